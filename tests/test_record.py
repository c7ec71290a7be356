"""The record: learning rates, gradient norms, speed, waiting time and skipped steps."""

import keras
import numpy as np
import pytest
from keras import ops

from polus.backends import backend
from polus.callbacks import Callback
from polus.core import set_jit_compile, value_and_grad
from polus.data import from_arrays
from polus.training import BaseTrainer, ClassifierTrainer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype("float32")
Y = RNG.normal(size=(24, 2)).astype("float32")
LOSS = keras.losses.MeanSquaredError()


def make_model():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


def first_norms(clip):
    """The norms of the first batch's gradients by hand: as they are, and as Keras clips them."""
    model = make_model()
    _, gradients = value_and_grad(
        lambda: LOSS(Y[:4], model(X[:4], training=True)), model.trainable_variables
    )
    found = [np.array(ops.convert_to_numpy(g), np.float64) for g in gradients]
    clipped = found
    if "clipvalue" in clip:
        clipped = [np.clip(g, -clip["clipvalue"], clip["clipvalue"]) for g in found]
    if "clipnorm" in clip:
        clipped = [g * min(1, clip["clipnorm"] / np.linalg.norm(g)) for g in found]
    norm, after = (np.sqrt(sum(np.sum(g**2) for g in part)) for part in (found, clipped))
    if "global_clipnorm" in clip:
        after = min(norm, clip["global_clipnorm"])
    return norm, after


@pytest.mark.parametrize(
    "clip", [{}, {"clipvalue": 0.1}, {"clipnorm": 0.2}, {"global_clipnorm": 0.25}], ids=str
)
def test_gradient_norms_before_and_after_clipping(clip):
    trainer = ClassifierTrainer(make_model(), keras.optimizers.SGD(0.1, **clip), LOSS)
    history = trainer.train(from_arrays((X, Y), 4, shuffle=False), 1, record=True)
    norm, clipped = first_norms(clip)
    assert len(history.steps["gradient_norm"]) == 6
    assert history.steps["gradient_norm"][0] == pytest.approx(norm, rel=1e-5)
    assert ("clipped_gradient_norm" in history.steps) == bool(clip)
    if clip:
        assert history.steps["clipped_gradient_norm"][0] == pytest.approx(clipped, rel=1e-5)
    assert "gradient_norm" not in trainer.train(from_arrays((X, Y), 4), 1).steps


@pytest.mark.parametrize("jit_compile", backend.candidates() if backend.COMPILES else [False])
def test_norms_of_large_gradients_are_those_that_the_weights_moved_by(jit_compile):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    before = model.get_weights()
    trainer = ClassifierTrainer(model, keras.optimizers.SGD(1.0), LOSS)
    set_jit_compile(jit_compile)
    try:
        history = trainer.train(from_arrays((X, Y), 24), 1, record=True)
        after = model.get_weights()
        broken = from_arrays((np.full_like(X, np.nan), Y), 24)
        nans = trainer.train(broken, 1, record=True, on_nonfinite="ignore")
    finally:
        set_jit_compile("auto")
    expected = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(before, after, strict=True)))
    assert history.steps["gradient_norm"][0] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(nans.steps["gradient_norm"]).all()


def test_norms_of_each_variable():
    trainer = ClassifierTrainer(make_model(), keras.optimizers.SGD(0.1, clipvalue=0.1), LOSS)
    history = trainer.train(from_arrays((X, Y), 4, shuffle=False), 1, record="variables")
    model = make_model()
    _, gradients = value_and_grad(
        lambda: LOSS(Y[:4], model(X[:4], training=True)), model.trainable_variables
    )
    for variable, gradient in zip(trainer.model.trainable_variables, gradients, strict=True):
        found = history.steps[f"gradient_norm/{variable.path}"][0]
        assert found == pytest.approx(np.linalg.norm(ops.convert_to_numpy(gradient)), rel=1e-5)


def test_device_memory_is_recorded_where_there_is_a_device(monkeypatch):
    trainer = ClassifierTrainer(make_model(), keras.optimizers.SGD(0.1), LOSS)
    history = trainer.train(from_arrays((X, Y), 4), 1)
    assert ("peak_device_bytes" in history.record[0]) == (backend.peak_device_bytes() is not None)
    monkeypatch.setattr(backend, "peak_device_bytes", lambda: 12)
    assert trainer.train(from_arrays((X, Y), 4), 1).record[0]["peak_device_bytes"] == 12


def test_norms_under_loss_scaling_are_unscaled():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, clipvalue=0.1), 1024)
    trainer = ClassifierTrainer(make_model(), optimizer, LOSS)
    history = trainer.train(from_arrays((X, Y), 4, shuffle=False), 1, record=True)
    norm, clipped = first_norms({"clipvalue": 0.1})
    assert history.steps["gradient_norm"][0] == pytest.approx(norm, rel=1e-4)
    assert history.steps["clipped_gradient_norm"][0] == pytest.approx(clipped, rel=1e-4)


def test_post_processed_gradients_have_a_norm_of_their_own():
    trainer = ClassifierTrainer(
        make_model(),
        keras.optimizers.SGD(0.1),
        LOSS,
        post_process_grads=lambda g: [x / 2 for x in g],
    )
    history = trainer.train(from_arrays((X, Y), 4, shuffle=False), 1, record=True)
    np.testing.assert_allclose(
        history.steps["clipped_gradient_norm"], history.steps["gradient_norm"] / 2, rtol=1e-5
    )


class Two(BaseTrainer):
    def __init__(self):
        super().__init__(make_model(), keras.optimizers.SGD(0.1))
        self.critic, self.critic_optimizer = make_model(), keras.optimizers.Adam(0.01)

    def train_step(self, x, y):
        first = self.minimize(
            lambda: ops.mean((self.model(x) - y) ** 2), self.model.trainable_weights
        )
        self.minimize(
            lambda: ops.mean((self.critic(x) - y) ** 2),
            self.critic.trainable_weights,
            self.critic_optimizer,
        )
        return first


def test_each_optimizer_has_its_rate_and_norm():
    history = Two().train(from_arrays((X, Y), 4), 1, record=True)
    assert {"loss", "gradient_norm", "critic_optimizer_gradient_norm"} <= history.steps.keys()
    assert history.record[0]["learning_rate"] == pytest.approx(0.1)
    assert history.record[0]["critic_optimizer_learning_rate"] == pytest.approx(0.01)


def test_metrics_named_like_the_record_are_kept():
    names = ["secs", "learning_rate"]
    metrics = [keras.metrics.MeanSquaredError(name=name) for name in [*names, "mse"]]
    trainer = ClassifierTrainer(make_model(), keras.optimizers.SGD(0.1), LOSS, metrics)
    history = trainer.train(from_arrays((X, Y), 4), 1, record=True)
    logs = history.epochs[0]
    assert logs["secs"] == logs["learning_rate"] == logs["mse"]
    assert history.record[0]["learning_rate"] == pytest.approx(0.1)


def test_the_record_is_kept_by_default_and_logged_on_request():
    class Slow(Callback):
        """A clock that each step moves by half a second."""

        now = 0.0

        def on_train_begin(self):
            self.coordinator.run.epoch_record.clock = lambda: self.now

        def on_steps_end(self, epoch, steps, losses):
            self.now += 0.5 * len(steps)

    heard = []
    tells = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: heard.append(logs))
    x = X.copy()
    x[5] = np.nan
    trainer = ClassifierTrainer(make_model(), keras.optimizers.SGD(0.1), LOSS)
    history = trainer.train(
        from_arrays((x, Y), 4, shuffle=False), 2, [Slow(), tells], on_nonfinite="skip"
    )
    row = history.record[1]
    assert (row["epoch"], row["skipped_steps"], row["secs"]) == (1, 1, 3.0)
    assert (row["steps_per_sec"], row["examples_per_sec"]) == (2.0, 20 / 3)
    assert row["learning_rate"] == pytest.approx(0.1)
    assert row["waited_secs"] >= 0
    assert set(heard[0]) == set(history.epochs[0]) - {"epoch"} == {"loss"}
    logged = trainer.train(from_arrays((X, Y), 4), 1, [tells], record=True)
    names = {"learning_rate", "skipped_steps", "examples_per_sec", "waited_secs", "gradient_norm"}
    assert names <= heard[-1].keys() & logged.epochs[0].keys()
