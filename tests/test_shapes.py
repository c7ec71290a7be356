"""Batches of many shapes: TensorFlow's step is traced for any length, and resumed runs as well."""

import json
import logging

import keras
import numpy as np
import pytest
from keras import layers

from polus import BaseTrainer, Checkpoint, ClassifierTrainer
from polus.callbacks import Callback
from polus.steps.shapes import Shapes

tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="others compile each shape, or none"
)
LENGTHS = [9, 9, 4, 7, 7, 5, 9, 6, 3, 8, 4, 4, 2]


def batches():
    rng = np.random.default_rng(0)
    found = [rng.integers(0, 20, (4, length)).astype("int32") for length in LENGTHS]
    return [(x, (x[:, 0] % 3).astype("int32")) for x in found]


def model(pooling=None):
    keras.utils.set_random_seed(0)
    words, last = layers.Embedding(20, 8), layers.Dense(3)
    words.build()
    last.build((None, 8))
    return Model([words, Counted(), pooling or layers.GlobalAveragePooling1D(), last])


class Model(keras.Model):
    """Layers one after the other, of which some can't be called with an open length."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def call(self, x, training=False):
        for part in self.parts:
            x = part(x)
        return x


def parts():
    return keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Counted(layers.Layer):
    """Counts how often it is traced."""

    traces = 0

    def call(self, x):
        Counted.traces += 1
        return x


class Unrolled(layers.Layer):
    """Needs the length of its input as a number."""

    def call(self, x):
        return sum(x[:, i] for i in range(x.shape[1])) / x.shape[1]


def trainer_of(pooling=None):
    return ClassifierTrainer(model(pooling), *parts())


def close(weights, others, rtol=1e-5):
    for a, b in zip(weights, others, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.once
def test_which_shapes_share_a_program():
    shapes = Shapes()
    of = lambda *sizes: [(sizes, "int32"), (sizes[:1], "int32")]  # noqa: E731
    assert [shapes.lengths(of(32, 9)) for _ in range(2)] == [None, None]
    assert shapes.lengths(of(8, 9)) is None  # an epoch's last batch
    assert shapes.lengths(of(32, 7)) == ((32, None), (32,))
    assert shapes.lengths(of(16, 9)) == ((None, None), (None,))
    assert shapes.lengths(of(32, 5)) == ((None, None), (None,))
    assert shapes.lengths(of(32, 9)) is None
    assert shapes.lengths([((32, 9, 1), "int32"), ((32,), "int32")]) is None  # another kind
    assert shapes.lengths([((32, 9), "int64"), ((32,), "int32")]) is None
    again = Shapes()
    again.set_state(json.loads(json.dumps(shapes.get_state())))
    assert again.get_state() == shapes.get_state()
    assert again.lengths(of(8, 9)) is None
    assert again.lengths(of(4, 4)) == ((None, None), (None,))


@pytest.mark.parametrize("at_once", [1, 4])
def test_batches_of_many_lengths_train_as_in_fit(at_once):
    Counted.traces = 0
    trainer = trainer_of()
    trainer.train(batches(), epochs=2, steps_per_execution=at_once)
    traces = Counted.traces
    expected = model()
    expected.compile(*parts())
    for _ in range(2):
        for x, y in batches():
            expected.train_on_batch(x, y)
    close(trainer.model.get_weights(), expected.get_weights())
    if keras.backend.backend() == "tensorflow":
        Counted.traces = 0
        trainer_of().train([batches()[0]] * 2, epochs=1, steps_per_execution=at_once)
        # Once more for all other lengths, and where several run in a call, for single ones.
        assert traces <= Counted.traces + 1 + 2 * (at_once > 1)


@tensorflow_only
def test_a_step_that_needs_its_lengths_is_compiled_for_each(caplog):
    caplog.set_level(logging.INFO, "polus.backends")
    trainer, reference = trainer_of(Unrolled()), trainer_of()
    trainer.train(batches(), epochs=1)
    reference.train(batches(), epochs=1)
    close(trainer.model.get_weights(), reference.model.get_weights(), 1e-4)
    assert "can't be compiled for batches of any length" in caplog.text


@tensorflow_only
def test_a_step_of_ones_own_sees_each_shape():
    class Wrong(BaseTrainer):
        def train_step(self, x, y):
            if x.shape[1] == 7:
                raise ZeroDivisionError("seven")
            loss = lambda: self.loss(y, self.model(x, training=True))  # noqa: E731
            return self.minimize(loss, self.trainable_weights)

    with pytest.raises(ZeroDivisionError, match="seven"):
        Wrong(model(), *parts()).train(
            [b for b in batches() if b[0].shape[1] in (9, 7)], epochs=1, steps_per_execution=1
        )


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_resumed_run_uses_the_programs_of_the_run(at_once, tmp_path):
    class Killed(Exception):
        pass

    class Dies(Callback):
        every_steps = 1

        def on_train_batch_end(self, epoch, step, loss):
            if (epoch, step) == (0, 8):
                raise Killed

    class Looks(Callback):
        def on_train_end(self):
            Looks.state = self.coordinator.run.executor.get_state()["shapes"]

    def run(*callbacks, **arguments):
        trainer = ClassifierTrainer(model(), *parts(), metrics=[])
        trainer.train(batches(), 2, list(callbacks), steps_per_execution=at_once, **arguments)
        return trainer.model.get_weights()

    folder = str(tmp_path)
    whole, shapes = run(Checkpoint(f"{folder}/other", every_steps=5), Looks()), Looks.state
    with pytest.raises(Killed):
        run(Checkpoint(folder, every_steps=5), Dies())
    resumed = run(Checkpoint(folder, every_steps=5), Looks(), resume=folder)
    assert Looks.state == shapes
    for a, b in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(a, b)
