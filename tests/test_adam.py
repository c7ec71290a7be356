"""Keras' Adam by PyTorch's fused kernel, beside Keras' own update."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("PyTorch's kernel", allow_module_level=True)

import torch
from keras import ops

from polus.backends import backend, torch_adam

SHAPES = (40, 3), (3,), (3, 5)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(torch_adam, "MIN_WEIGHTS", 1)


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def pair(make, constraint=None):
    """Returns two optimizers with weights of the same values; ours and the reference's."""
    both = []
    for _ in range(2):
        weights = [
            keras.Variable(normal(i, shape), name=f"weight_{i}") for i, shape in enumerate(SHAPES)
        ]
        weights[0].constraint = constraint
        optimizer = make()
        optimizer.build(weights)
        both.append((optimizer, weights))
    return both


def gradients_of(step):
    found = [torch.from_numpy(normal((step, i), shape)) for i, shape in enumerate(SHAPES)]
    found[2] = found[2].T.contiguous().T  # of other strides than its weight
    return found


def decaying(**kwargs):
    return keras.optimizers.AdamW(0.01, weight_decay=0.1, **kwargs)


def excluding():
    optimizer = decaying()
    optimizer.exclude_from_weight_decay(var_names=["weight_1"])
    return optimizer


ADAMS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "large epsilon": lambda: keras.optimizers.Adam(0.01, 0.5, 0.9, epsilon=0.1),
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.InverseTimeDecay(0.1, 1, 0.5)
    ),
    "weight decay": decaying,
}


@pytest.mark.parametrize("name", ADAMS)
def test_fused_adam_equals_keras(name, monkeypatch):
    """Up to rounding, in weights and slots; either may continue what the other began."""
    (ours, mine), (theirs, reference) = pair(ADAMS[name])
    for step in range(4):
        monkeypatch.setattr(torch_adam, "MIN_WEIGHTS", 1000 if step == 1 else 1)
        backend.apply_gradients(ours, gradients_of(step), mine)
        theirs.apply(gradients_of(step), reference)
    for own, expected in zip(
        [*mine, *ours.variables], [*reference, *theirs.variables], strict=True
    ):
        np.testing.assert_allclose(
            ops.convert_to_numpy(own), ops.convert_to_numpy(expected), rtol=2e-6, atol=2e-7
        )


class Own(keras.optimizers.Adam):
    """A user's own rule."""

    def update_step(self, gradient, variable, learning_rate):
        variable.assign_sub(gradient * learning_rate)


OTHERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "own": lambda: Own(0.01),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "clipped": lambda: keras.optimizers.Adam(0.01, clipnorm=0.1),
    "clipped values": lambda: keras.optimizers.Adam(0.01, clipvalue=0.1),
    "clipped at once": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1),
    "averaged": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2),
    "accumulated": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.Adam(0.01, loss_scale_factor=8.0),
    "excluded": excluding,
    "constraint": lambda: keras.optimizers.Adam(0.01),
    "no gradient": decaying,
}


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_what_the_kernel_does_not_do_is_left_to_keras(name):
    constraint = keras.constraints.NonNeg() if name == "constraint" else None
    (ours, mine), (theirs, reference) = pair(OTHERS[name], constraint)
    for step in range(3):
        gradients = gradients_of(step)
        if name == "no gradient":
            gradients[1] = None
        backend.apply_gradients(ours, gradients, mine)
        theirs.apply(gradients, reference)
    for own, expected in zip(mine, reference, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(own), ops.convert_to_numpy(expected))


def test_fused_adam_makes_no_array_of_the_size_of_the_weights():
    """Keras' own update makes several."""
    (ours, mine), (theirs, reference) = pair(ADAMS["adam"])

    def largest(update):
        with torch.profiler.profile(profile_memory=True) as profile:
            update()
        return max(event.self_cpu_memory_usage for event in profile.events())

    size = np.prod(SHAPES[0]) * 4
    found = gradients_of(0)
    assert largest(lambda: backend.apply_gradients(ours, found, mine)) < size
    assert largest(lambda: theirs.apply(found, reference)) >= size
