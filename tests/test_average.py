"""Averages of weights, predictions, and steps that run eagerly."""

import copy

import keras
import numpy as np
import pytest
from keras import layers, ops
from recorder import Recorder

import polus
from polus.callbacks import EarlyStop, SaveModelCallback, TimeLimit, ValidationDataCallback
from polus.checkpoint import Checkpoint
from polus.training import BaseTrainer, ClassifierTrainer

X = np.random.default_rng(0).normal(size=(44, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 32, 16)]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make(cls=ClassifierTrainer, average=False, **settings):
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8), layers.BatchNormalization(), layers.Dense(2)]
    )
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    trainer = cls(model, keras.optimizers.Adam(0.05, **settings), LOSS, metrics=metrics)
    if average:
        trainer.average = polus.Average(model, decay=0.9)
    return trainer


def assert_equal(weights, others, **tolerance):
    for a, b in zip(weights, others, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


# ---------------------------------------------------------------------- averages


def test_an_average_is_that_of_keras():
    reference = make(use_ema=True, ema_momentum=0.9)
    trainer = make(average=True)
    for each in (reference, trainer):
        each.train(BATCHES, 3, steps_per_execution=2)
    # Which overwrites the weights by their average at the end.
    assert_equal(trainer.average.model.get_weights(), reference.model.get_weights(), rtol=1e-5)
    assert int(ops.convert_to_numpy(trainer.average.count)) == 6


class Teacher(ClassifierTrainer):
    """Updates the average by its own hand, and learns from it."""

    def train_step(self, x, y):
        result = super().train_step(x, y)
        self.average.update()
        return result

    def forward_without_grads(self, x, y):
        return x, y, self.average(x, training=False)

    def forward_with_grads(self, x, y, taught):
        return y, self.model(x, training=True) + 0 * taught


def test_a_step_may_update_and_call_an_average():
    trainer, other = make(Teacher, average=True), make(average=True)
    for each in (trainer, other):
        each.train(BATCHES, 2, steps_per_execution=2)
    assert_equal(trainer.average.model.get_weights(), other.average.model.get_weights(), rtol=1e-5)
    assert int(ops.convert_to_numpy(trainer.average.count)) == 4


def test_an_average_is_validated_saved_and_resumed(tmp_path):
    trainer = make(average=True)
    validation = ValidationDataCallback(BATCHES, name="ema", model=trainer.average)
    saving = SaveModelCallback("end", tmp_path / "average.keras", models=["average"])
    checkpoint = Checkpoint(tmp_path / "run")
    history = trainer.train(BATCHES, 3, [validation, saving], steps_per_execution=1)

    loaded = keras.saving.load_model(tmp_path / "average.keras")
    assert_equal(loaded.get_weights(), trainer.average.model.get_weights(), rtol=0)
    as_model = make()
    as_model.model.set_weights(loaded.get_weights())
    expected = as_model.evaluate(BATCHES)
    assert history.epochs[-1]["ema_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    before = trainer.model.get_weights()
    assert trainer.evaluate(BATCHES, model=loaded)["loss"] == pytest.approx(expected["loss"])
    assert_equal(trainer.model.get_weights(), before, rtol=0)

    folder = tmp_path / "run"
    make(average=True).train(BATCHES, 1, [checkpoint], steps_per_execution=1, resume=folder)
    resumed = make(average=True)
    callbacks = [Checkpoint(folder)]
    resumed.train(BATCHES, 3, callbacks, steps_per_execution=1, resume=folder)
    assert_equal(resumed.average.model.get_weights(), loaded.get_weights(), rtol=0)

    copied = copy.deepcopy(trainer)
    copied.train(BATCHES, 1, steps_per_execution=1)
    assert_equal(trainer.average.model.get_weights(), loaded.get_weights(), rtol=0)
    assert int(ops.convert_to_numpy(copied.average.count)) == 8


def test_averages_that_are_wrong_raise():
    trainer = make()
    stray, second = polus.Average(trainer.model), polus.Average(trainer.model)
    trainer.train(BATCHES, 1, [ValidationDataCallback(BATCHES, model=stray)])
    assert int(ops.convert_to_numpy(stray.count)) == 2  # it is part of the trainer now
    with pytest.raises(ValueError, match="an attribute of its own"):
        trainer.train(BATCHES, 1, [ValidationDataCallback(BATCHES, model=second)])
    with pytest.raises(ValueError, match="has no weights yet"):
        polus.Average(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(ValueError, match="decay must be a number from 0 to 1, got 2"):
        polus.Average(trainer.model, 2)
    with pytest.raises(ValueError, match="same variables"):
        polus.Average(trainer.model, average=keras.Sequential([keras.Input((6,)), layers.Dense(2)]))


# ---------------------------------------------------------------------- predictions


class Embedded(ClassifierTrainer):
    def prediction_step(self, x):
        logits = self.model(x, training=False)
        return {"label": ops.argmax(logits, -1), "logits": logits}


def test_predictions_come_in_the_order_of_the_data():
    trainer = make(Embedded)
    expected = trainer.model.predict(X, verbose=0)
    found = trainer.predict(polus.from_arrays(X, batch_size=16, drop_remainder=True))
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found["label"], expected.argmax(-1))
    plain = make()
    found = plain.predict((X[i : i + 10], None) for i in range(0, 44, 10))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    found = plain.predict(BATCHES, lambda batch: batch[0] * 0, steps=1)
    assert found.shape == (16, 2)

    seen = []
    watch = Recorder(lambda name, *_: name == "epoch_end" and seen.append(plain.predict(BATCHES)))
    history = plain.train(BATCHES, 2, [watch], steps_per_execution=1)
    undisturbed = make().train(BATCHES, 2, steps_per_execution=1)
    np.testing.assert_array_equal(history.steps["loss"], undisturbed.steps["loss"])
    assert np.abs(seen[0] - seen[1]).max() > 0


# ---------------------------------------------------------------------- debugging


class Printing(BaseTrainer):
    def train_step(self, x, y):
        print("mean", float(ops.convert_to_numpy(ops.mean(x))))
        loss = self.minimize(lambda: LOSS(y, self.model(x, training=True)), self.trainable_weights)
        self.losses.append(float(ops.convert_to_numpy(loss)))
        return loss

    def evaluation_step(self, x, y):
        print("evaluated", float(ops.convert_to_numpy(ops.mean(x))))
        return super().evaluation_step(x, y)


def test_a_step_that_runs_eagerly_has_values(capsys):
    trainer = make(Printing)
    trainer.losses = []
    validation = ValidationDataCallback(BATCHES)
    history = trainer.train(BATCHES, 2, [validation], run_eagerly=True)
    printed = capsys.readouterr().out
    assert f"mean {float(X[:16].mean()):.4f}"[:9] in printed
    assert "evaluated" in printed
    np.testing.assert_allclose(trainer.losses[-4:], history.steps["loss"], rtol=1e-6)

    class Quiet(Printing):
        def train_step(self, x, y):
            loss = lambda: LOSS(y, self.model(x, training=True))  # noqa: E731
            return self.minimize(loss, self.trainable_weights)

        evaluation_step = BaseTrainer.evaluation_step

    compiled = make(Quiet)
    expected = compiled.train(BATCHES, 2, steps_per_execution=1).steps["loss"]
    np.testing.assert_allclose(history.steps["loss"], expected, rtol=1e-4)
    compiled.train(BATCHES, 1, run_eagerly=True)
    compiled.train(BATCHES, 1)  # compiled again
    with pytest.raises(ValueError, match="run_eagerly must be True or False, got 3"):
        compiled.train(BATCHES, 1, run_eagerly=3)


# ---------------------------------------------------------------------- the end of a run


def test_the_best_weights_are_restored(tmp_path):
    """Of a run that gets worse when its rate becomes far too large."""

    def train(epochs, **arguments):
        trainer, weights = make(), []
        stop = EarlyStop("accuracy", patience=2, mode="max", restore_best_weights=True)
        stop.monitor.name = "measured"
        values = [1, 3, 2, 1, 0]
        keep = Recorder(lambda *event: event[0] == "epoch_end" and weights.append(measure(trainer)))

        def measure(trainer):
            keep.coordinator.logs["measured"] = values[keep.coordinator.run.epoch]
            return trainer.model.get_weights()

        keep.phase = 0
        trainer.train(BATCHES, epochs, [keep, stop, *arguments.pop("callbacks", ())], **arguments)
        return trainer, weights

    trainer, weights = train(5)
    assert len(weights) == 4
    assert_equal(trainer.model.get_weights(), weights[1], rtol=0)
    assert np.abs(weights[1][0] - weights[3][0]).max() > 0
    # The same in two processes.
    train(2, callbacks=[Checkpoint(tmp_path)], resume=tmp_path)
    resumed, _ = train(5, callbacks=[Checkpoint(tmp_path)], resume=tmp_path)
    assert_equal(resumed.model.get_weights(), weights[1], rtol=1e-6)


class Coded(BaseTrainer):
    """Trains a variable and a model of its own beside `model`, which were left as they ended."""

    def __init__(self):
        keras.utils.set_random_seed(1)
        dense = lambda: keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])  # noqa: E731
        super().__init__(dense(), keras.optimizers.Adam(0.1), primary="gap")
        self.codes = keras.Variable(np.ones(2, "float32"), name="codes")
        self.others = [dense()]
        self.average = polus.Average(self.model, decay=0.5)

    def train_step(self, x):
        def loss():
            return ops.mean((self.others[0](self.model(x) * self.codes) - x) ** 2)

        weights = [*self.model.weights, self.codes, *self.others[0].weights]
        return {"gap": self.minimize(loss, weights)}

    def all_weights(self):
        parts = [self.model, self.others[0], self.average.model]
        found = [self.codes, *(v for part in parts for v in part.weights)]
        return [np.array(ops.convert_to_numpy(variable)) for variable in found]


def test_the_best_weights_are_those_of_all_parts():
    trainer, weights = Coded(), []
    keep = Recorder(lambda *event: event[0] == "epoch_end" and weights.append(measure()))

    def measure():
        keep.coordinator.logs["measured"] = [2, 1, 3][keep.coordinator.run.epoch]
        return trainer.all_weights()

    keep.phase = 0
    stop = EarlyStop("measured", patience=1, mode="min", restore_best_weights=True)
    x = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    trainer.train([x], 5, [keep, stop])
    assert len(weights) == 3
    for restored, best, last in zip(trainer.all_weights(), *weights[1:], strict=True):
        np.testing.assert_array_equal(restored, best)
        assert not np.array_equal(best, last)
    assert int(ops.convert_to_numpy(trainer.step_counter)) == 3


def test_only_the_newest_files_are_kept(tmp_path):
    saving = SaveModelCallback("every", tmp_path / "{epoch}.weights.h5", keep=2)
    (tmp_path / "9.weights.h5").touch()  # of somebody else
    make().train(BATCHES, 4, [saving])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["3.weights.h5", "4.weights.h5", "9.weights.h5"]
    with pytest.raises(ValueError, match="keep=2 keeps files of several epochs"):
        SaveModelCallback("end", tmp_path / "model.keras", keep=2)


def test_a_run_ends_when_its_time_is_up(tmp_path):
    now = iter(range(100))
    limit = TimeLimit(4, clock=lambda: next(now))
    history = make().train(BATCHES, 5, [limit], steps_per_execution=1)
    assert len(history.steps["loss"]) == 3  # one reading each: begin, step, step, epoch, step
    assert limit.coordinator.run.stop_reason == "max_secs"

    saving = [Checkpoint(tmp_path, every_steps=1)]
    make().train(BATCHES, 2, saving, resume=tmp_path, max_secs=0, steps_per_execution=1)
    trainer = make()
    history = trainer.train(BATCHES, 2, [Checkpoint(tmp_path)], resume=tmp_path, max_secs=1e6)
    assert [row["epoch"] for row in history.epochs] == [0, 1]
    with pytest.raises(ValueError, match="max_secs must be at least 0"):
        trainer.train(BATCHES, 1, max_secs=-1)
