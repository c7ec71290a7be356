"""Learning rates in shares of a run."""

import math

import keras
import numpy as np
import pytest
from keras import layers, ops

from polus import schedules
from polus.checkpoint import Checkpoint
from polus.training import ClassifierTrainer

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
BATCHES = [(X, X)] * 5


def rates(schedule, total, first=0):
    schedule.begin(first, total)
    return [float(ops.convert_to_numpy(schedule(first + step))) for step in range(total)]


def test_schedules_are_those_of_the_papers():
    """With the formulas of transformers' schedules of these names, for 10 steps of 4 of warm-up."""
    rise = [step / 4 for step in range(4)]
    shares = [step / 6 for step in range(6)]
    expected = {
        schedules.Constant: [*rise, *[1] * 6],
        schedules.Linear: [*rise, *(1 - s for s in shares)],
        schedules.Cosine: [*rise, *((1 + math.cos(math.pi * s)) / 2 for s in shares)],
    }
    for kind, values in expected.items():
        for warmup in (0.4, 4):
            found = rates(kind(0.5, warmup=warmup), 10, first=3)
            np.testing.assert_allclose(found, 0.5 * np.array(values), rtol=1e-5, atol=1e-7)


def test_one_cycle_is_that_of_pytorch():
    import torch

    for total, warmup in ((20, 0.3), (50, 0.1)):
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))])
        reference = torch.optim.lr_scheduler.OneCycleLR(
            sgd, 0.5, total_steps=total, pct_start=warmup, cycle_momentum=False
        )
        expected = []
        for _ in range(total):
            expected += reference.get_last_lr()
            sgd.step()
            reference.step()
        found = rates(schedules.OneCycle(0.5, warmup), total)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


class Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(ops.convert_to_numpy(self.model.optimizer.learning_rate)))


def train(epochs, callbacks=(), trainer=None, **arguments):
    keras.utils.set_random_seed(0)
    if trainer is None:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
        optimizer = keras.optimizers.SGD(schedules.Linear(0.1))
        trainer = ClassifierTrainer(model, optimizer, keras.losses.MeanSquaredError())
    history = trainer.train(BATCHES, epochs, [*callbacks], **arguments)
    return trainer, history.steps["loss"]


def test_a_schedule_knows_the_length_of_each_run(tmp_path):
    watch = Watch()
    trainer, losses = train(2, [watch])
    expected = [0.1 * (1 - (step + 1) / 10) for step in range(10)]  # read after each step
    np.testing.assert_allclose(watch.rates, expected, rtol=1e-5, atol=1e-8)
    train(1, [watch], trainer)
    expected = [0.1 * (1 - (step + 1) / 5) for step in range(5)]
    np.testing.assert_allclose(watch.rates[10:], expected, rtol=1e-5, atol=1e-8)
    _, faster = train(2, steps_per_execution=5)
    np.testing.assert_allclose(faster, losses, rtol=1e-4)

    # Interrupted, and continued in another process.
    class Killed(Exception):
        pass

    class Kill(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                raise Killed

    with pytest.raises(Killed):
        train(2, [Kill(), Checkpoint(tmp_path, every_steps=1)], resume=tmp_path)
    _, resumed = train(2, [Checkpoint(tmp_path)], resume=tmp_path)
    np.testing.assert_allclose(resumed, losses, rtol=1e-5)


def test_schedules_that_are_wrong_raise():
    trainer, _ = train(1)
    with pytest.raises(ValueError, match=r"Linear needs the number of steps.*steps="):
        trainer.train(lambda: iter(BATCHES), 2)
    trainer.train(lambda: iter(BATCHES), 2, steps=5)
    with pytest.raises(ValueError, match="warmup must be a number of at least 0, got -1"):
        schedules.Cosine(0.1, -1)
    config = keras.optimizers.schedules.serialize(schedules.Cosine(0.1, 0.2))["config"]
    assert schedules.Cosine.from_config(config).warmup == 0.2
