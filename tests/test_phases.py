"""Training in phases: thawed layers, rates by layer, groups of weights."""

import copy

import keras
import numpy as np
import pytest
from keras import layers, ops
from recorder import Recorder

from polus import schedules
from polus.callbacks import Unfreeze
from polus.callbacks.unfreeze import thaw
from polus.checkpoint import Checkpoint
from polus.describe import describe
from polus.optimizers import by_name, layerwise, rebuilt
from polus.training import ClassifierTrainer

X = np.random.default_rng(0).normal(size=(48, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 48, 16)]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Killed(Exception):
    pass


def make(optimizer=None, frozen=True):
    keras.utils.set_random_seed(2)
    backbone = keras.Sequential(
        [
            layers.Dense(8, "relu", name="block_1"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(8, "relu", name="block_2"),
        ],
        name="backbone",
    )
    backbone.trainable = not frozen
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(2, name="head")(backbone(inputs)))
    return ClassifierTrainer(model, optimizer or keras.optimizers.Adam(0.02), LOSS)


def weights(trainer):
    return {variable.path: ops.convert_to_numpy(variable) for variable in trainer.model.variables}


def assert_equal(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for path, value in found.items():
        np.testing.assert_allclose(value, expected[path], err_msg=path, **tolerance)


def phases(**arguments):
    return Unfreeze({1: "block_2", 2: ["block_*"]}, **arguments)


def test_layers_are_thawed_when_their_epoch_begins():
    trainer, seen = make(), []
    watch = Recorder(lambda name, *_: name == "epoch_end" and seen.append(weights(trainer)))
    before = weights(trainer)
    trainer.train(BATCHES, 3, [phases(), watch], steps_per_execution=3)
    moved = [
        {path.split("/")[-2] for path in then if np.abs(now[path] - then[path]).max() > 0}
        for then, now in zip([before, *seen], seen, strict=False)
    ]
    assert moved == [{"head"}, {"head", "block_2"}, {"head", "block_2", "block_1"}]

    everything = make()
    everything.train(BATCHES, 1, [Unfreeze({0: "*"}, batch_norm=True)])
    names = {variable.path.split("/")[-2] for variable in everything.model.trainable_variables}
    assert names == {"block_1", "norm", "block_2", "head"}


def test_layers_that_are_no_trainable_weights_are_thawed():
    trainer = make(frozen=False)
    head = trainer.model.get_layer("head").trainable_weights
    trainer.trainable_weights = head
    before = weights(trainer)
    trainer.train(BATCHES, 1, [Unfreeze({1: "block_2"})])
    once = weights(trainer)
    trainer.train(BATCHES, 2, [Unfreeze({1: "block_2"})])
    now = weights(trainer)
    moved = [
        {path.split("/")[-2] for path in now if np.abs(then[path] - other[path]).max() > 0}
        for then, other in ((before, once), (once, now))
    ]
    assert moved == [{"head", "norm"}, {"head", "norm", "block_2"}]  # norm by its statistics


def test_phases_are_those_of_a_loop_by_hand():
    """With an optimizer without slots, that is thawing by hand between calls of `train`."""
    trainer, reference = make(keras.optimizers.SGD(0.1)), make(keras.optimizers.SGD(0.1))
    trainer.train(BATCHES, 3, [phases(learning_rate={2: 0.01})], steps_per_execution=1)
    backbone = reference.model.get_layer("backbone")
    block_1, norm, _ = backbone.layers
    for epoch in range(3):
        if epoch == 1:
            backbone.trainable = True
            block_1.trainable = norm.trainable = False
        block_1.trainable = epoch == 2
        reference.optimizer = keras.optimizers.SGD(0.1 if epoch < 2 else 0.01)
        if epoch == 0:
            backbone.trainable = False
        reference.train(BATCHES, 1, steps_per_execution=1)
    found = {path.split("/", 1)[-1]: value for path, value in weights(trainer).items()}
    expected = {path.split("/", 1)[-1]: value for path, value in weights(reference).items()}
    assert_equal(found, expected, rtol=1e-5)


@pytest.mark.needs_keras_3_15
def test_the_optimizer_keeps_what_it_knows():
    trainer = make()
    trainer.train(BATCHES, 1)
    thaw(trainer.model, "*", batch_norm=True)
    old, new = trainer.optimizer, rebuilt(trainer.optimizer, trainer.model.trainable_variables)
    slots = {v.path: ops.convert_to_numpy(v) for v in new.variables}
    assert int(slots.pop(new.iterations.path)) == 3
    for slot in old.variables[1:]:
        np.testing.assert_array_equal(slots.pop(slot.path), ops.convert_to_numpy(slot))
    assert slots  # of the new weights, which have not moved
    assert all(not value.any() for value in slots.values())
    chosen = keras.optimizers.MultiOptimizer(lambda variable: old)
    with pytest.raises(ValueError, match=r"chooses by a function can't be made again.*by_name"):
        rebuilt(chosen, [])


ADAM = keras.optimizers.Adam
SEVERAL = {
    "by_name": lambda: by_name({"*/bias": ADAM(0.02), "*": ADAM(0.02)}),
    "layerwise": lambda: layerwise(make(frozen=False).model, 0.02, 1.0, ADAM),
    "map": lambda: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(ADAM(0.02), {".*/bias": ADAM(0.02)})
    ),
}


@pytest.mark.needs_keras_3_15
@pytest.mark.parametrize("name", SEVERAL)
def test_phases_with_several_optimizers(name):
    """All of one rate, they are one optimizer; if each counts the steps that it has made."""
    keras.utils.clear_session()  # names begin again, for layerwise chooses by them
    trainer, reference = make(SEVERAL[name]()), make()
    trainer.train(BATCHES, 2, [phases()], steps_per_execution=3)
    reference.train(BATCHES, 1, steps_per_execution=3)
    if name == "layerwise":  # a layer's own optimizer begins when it is thawed
        reference.optimizer = by_name({"*head/*": reference.optimizer, "*": ADAM(0.02)})
    thaw(reference.model, ["block_2"])
    if name != "layerwise":
        reference.optimizer = rebuilt(reference.optimizer, reference.trainable_weights)
    reference.train(BATCHES, 1, steps_per_execution=3)
    for found, expected in zip(weights(trainer).values(), weights(reference).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.needs_keras_3_15
def test_a_rate_for_the_phases_of_several_optimizers_raises():
    trainer = make(by_name({"*/bias": keras.optimizers.SGD(0.1), "*": ADAM()}))
    with pytest.raises(ValueError, match=r'LearningRateScheduler\(schedule, "optimizer.sgd"\)'):
        trainer.train(BATCHES, 2, [phases(learning_rate=0.1)])


def test_schedules_go_on_in_phases():
    trainer, rates = make(ADAM(schedules.Linear(0.02))), []
    rate = lambda each: float(ops.convert_to_numpy(each.optimizer.learning_rate))  # noqa: E731
    watch = Recorder(lambda name, *_: name == "epoch_end" and rates.append(rate(trainer)))
    trainer.train(BATCHES, 3, [phases(), watch])
    np.testing.assert_allclose(rates, 0.02 * (1 - np.array([3, 6, 9]) / 9), atol=1e-8)
    copy.deepcopy(trainer).train(BATCHES, 1)
    assert rate(trainer) == pytest.approx(0, abs=1e-8)  # each has a schedule of its own


def test_what_is_excluded_from_weight_decay_stays_so():
    """In phases and in copies: Keras' configuration of an optimizer leaves it out."""
    decaying = keras.optimizers.SGD(0.1, weight_decay=0.5)
    trainer = make(decaying)
    head = trainer.model.get_layer("head")
    head.bias.assign([1.0, 2.0])
    decaying.exclude_from_weight_decay(var_list=[head.kernel], var_names=["bias"])
    zero = lambda found: [None if g is None else 0 * g for g in found]  # noqa: E731
    trainer.post_process_grads = zero
    copied = copy.deepcopy(trainer)
    kernel = ops.convert_to_numpy(head.kernel).copy()
    for each in (trainer, copied):
        before = weights(each)
        each.train(BATCHES, 1, [Unfreeze({0: "block_2"})])
        moved = {p for p, value in weights(each).items() if not np.array_equal(value, before[p])}
        assert {path.split("backbone/")[-1] for path in moved} == {"block_2/kernel"}
    np.testing.assert_array_equal(ops.convert_to_numpy(head.kernel), kernel)


@pytest.mark.parametrize(
    ("place", "name", "rate"),
    [
        ((1, 1), None, 0.005),
        ((2, 0), None, 0.005),
        pytest.param((1, 1), "by_name", None, marks=pytest.mark.needs_keras_3_15),
    ],
)
def test_a_run_in_phases_resumes_exactly(tmp_path, place, name, rate):
    def kill(name, *at):
        if (name, *at[:2]) == ("step_end", *place):
            raise Killed

    def train(*callbacks, **arguments):
        trainer = make(SEVERAL[name]() if name else None)
        callbacks = [phases(learning_rate=rate), *callbacks]
        trainer.train(BATCHES, 3, callbacks, steps_per_execution=1, **arguments)
        return trainer

    expected = train()
    with pytest.raises(Killed):
        train(Recorder(kill), Checkpoint(tmp_path, every_steps=1), resume=tmp_path)
    found = train(Checkpoint(tmp_path), resume=tmp_path)
    for a, b in zip(weights(found).values(), weights(expected).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_phases_that_are_wrong_raise():
    with pytest.raises(ValueError, match=r"No layer's name matches 'blok_\*'.*block_1"):
        make().train(BATCHES, 1, [Unfreeze({1: "blok_*"})])
    with pytest.raises(TypeError, match="phases must be a dict of epochs"):
        Unfreeze("block_1")


@pytest.mark.needs_keras_3_15
def test_rates_fall_from_layer_to_layer():
    """By plain gradients: what a step of SGD moves is the rate times the gradient."""
    unit, trainer = make(keras.optimizers.SGD(1.0), frozen=False), make(frozen=False)
    backbone = trainer.model.get_layer("backbone")
    trainer.optimizer = layerwise(trainer.model, 0.1, decay=0.5, make=keras.optimizers.SGD)
    moved = []
    for each in (unit, trainer):
        before = weights(each)
        each.train_step(*BATCHES[0])
        moved.append([weights(each)[path] - before[path] for path in before])
    names = [variable.path.split("/")[-2] for variable in trainer.model.variables]
    for name, gradient, step in zip(names, *moved, strict=True):
        if name != "norm":  # whose statistics have no rate
            rate = {"head": 0.1, "block_2": 0.05, "block_1": 0.0125}[name]
            np.testing.assert_allclose(step, rate * gradient, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="has no weights yet"):
        layerwise(keras.Sequential([layers.Dense(2)]), 0.1)
    assert backbone.built


@pytest.mark.needs_keras_3_15
def test_groups_of_weights_have_their_own_optimizers():
    still, moving = keras.optimizers.SGD(0.0), keras.optimizers.SGD(0.1)
    trainer = make(by_name({"*/bias": still, "*": moving}), frozen=False)
    before = weights(trainer)
    trainer.train(BATCHES, 1)
    for path, value in weights(trainer).items():
        if path.endswith(("kernel", "bias")):
            assert np.array_equal(value, before[path]) == path.endswith("bias")
    with pytest.raises(ValueError, match=r"No pattern matches the variable '.*bias'"):
        make(by_name({"*/kernel": moving}), frozen=False).train(BATCHES, 1)


@pytest.mark.once
def test_layerwise_for_the_same_model_made_again_is_the_same_setting():
    """Keras counts the names of a process's layers, and a notebook makes a model more than once."""

    def described(decay=0.5):
        stack = [keras.Input((6,)), layers.Dense(3), layers.Dense(2)]
        return describe(layerwise(keras.Sequential(stack), 0.02, decay, ADAM))

    assert described() == described() != described(0.6)
    groups = [describe(by_name({f"block_{k}/*": ADAM(), "*": ADAM()})) for k in (4, 4, 5)]
    assert groups[0] == groups[1] != groups[2]
