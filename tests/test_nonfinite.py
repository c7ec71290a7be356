"""Steps that are not finite: nothing of them is applied, and nothing of them is hidden."""

import logging
import time

import keras
import numpy as np
import pytest
from keras import layers, ops

from polus import NonFiniteError
from polus.callbacks import Callback
from polus.checkpoint import Checkpoint
from polus.core import value_and_grad
from polus.data import from_arrays
from polus.steps import finite
from polus.training import BaseTrainer, ClassifierTrainer

STEPS, SIZE = 12, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(STEPS * SIZE, 3)).astype("float32")
Y = RNG.normal(size=(STEPS * SIZE, 2)).astype("float32")
BAD = 7  # the step whose batch has a NaN


def data(*bad, count=STEPS, kind=np.nan):
    """Batches in order, those of some steps with a value that is not finite."""
    x = X.copy()
    for step in bad:
        x[step * SIZE + 1, 2] = kind
    return from_arrays((x[: count * SIZE], Y[: count * SIZE]), SIZE, shuffle=False)


def make_model():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, "tanh"),
            layers.BatchNormalization(),
            layers.Dense(2),
        ]
    )


class Root(BaseTrainer):
    """A finite loss, whose gradient is not finite for the bad batch."""

    def forward_with_grads(self, x, y):
        rows = ops.where(ops.isnan(x), 0.0, x)
        zero = ops.sum(self.model.layers[0].kernel) * 0.0
        # 0 or 1; the gradient of the root of 0 is 0 * inf.
        broken = ops.sqrt(ops.where(ops.any(ops.isnan(x)), zero, 1.0))
        return (ops.mean((self.model(rows, training=True) - y) ** 2) + broken,)


class Gan(BaseTrainer):
    """Two optimizers, of which the second one's loss is not finite."""

    def __init__(self, model, other, **kwargs):
        super().__init__(model, keras.optimizers.Adam(0.01))
        self.other, self.other_optimizer = other, keras.optimizers.Adam(0.01)

    def train_step(self, x, y):
        rows = ops.where(ops.isnan(x), 0.0, x)
        first = self.minimize(
            lambda: ops.mean((self.model(rows, training=True) - y) ** 2),
            self.model.trainable_weights,
        )
        second = self.minimize(
            lambda: ops.mean((self.other(x, training=True) - y) ** 2),
            self.other.trainable_weights,
            self.other_optimizer,
        )
        return {"first": first, "second": second}


class Together(Gan):
    def train_step(self, x, y):
        rows = ops.where(ops.isnan(x), 0.0, x)
        return self.minimize_together(
            lambda: {
                "first": ops.mean((self.model(rows, training=True) - y) ** 2),
                "second": ops.mean((self.other(x, training=True) - y) ** 2),
            },
            {
                "first": (self.model.trainable_weights, self.optimizer),
                "second": (self.other.trainable_weights, self.other_optimizer),
            },
        )


class ByHand(BaseTrainer):
    """A gradient and an optimizer of the user's own."""

    def train_step(self, x, y):
        weights = self.model.trainable_weights
        loss, gradients = value_and_grad(
            lambda: ops.mean((self.model(x, training=True) - y) ** 2), weights
        )
        self.optimizer.apply(gradients, weights)
        return loss


def classifier(**kwargs):
    return ClassifierTrainer(
        make_model(),
        kwargs.pop("optimizer", None) or keras.optimizers.Adam(0.01),
        keras.losses.MeanSquaredError(),
        metrics=[keras.metrics.MeanSquaredError()],
        **kwargs,
    )


def root():
    return Root(make_model(), keras.optimizers.Adam(0.01), lambda loss: loss)


def by_hand():
    trainer = ByHand(make_model(), keras.optimizers.Adam(0.01))
    trainer.optimizer.build(trainer.model.trainable_variables)
    return trainer


KINDS = {
    "classifier": classifier,
    "finite loss": root,
    "two optimizers": lambda: Gan(make_model(), make_model()),
    "minimize_together": lambda: Together(make_model(), make_model()),
    "by hand": by_hand,
}


def values(trainer):
    """All variables of the trainer's models and optimizers, and its step counter."""
    held = [v for v in vars(trainer).values() if isinstance(v, keras.Model | keras.Optimizer)]
    found = [v for owner in held for v in owner.variables] + [trainer.step_counter]
    return [np.array(ops.convert_to_numpy(v)) for v in found]


def assert_same(trainer, reference, tolerance=1e-6):
    for a, b in zip(values(trainer), values(reference), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.fixture(scope="module")
def good():
    """Trainers of each kind after the steps before the bad one, trained without any guard."""
    trained = {}

    def get(kind):
        if kind not in trained:
            trained[kind] = KINDS[kind]()
            trained[kind].train(data(count=BAD), epochs=1, on_nonfinite="ignore")
        return trained[kind]

    return get


@pytest.mark.parametrize("at_once", [1, 4, 5])  # with 4 it is the last of a call
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_before_the_step_that_raises(kind, at_once, good):
    trainer = KINDS[kind]()
    with pytest.raises(NonFiniteError, match=f"Batch {BAD + 1} of epoch 1") as caught:
        trainer.train(data(BAD), epochs=2, steps_per_execution=at_once)
    assert_same(trainer, good(kind))
    assert (caught.value.epoch, caught.value.step) == (0, BAD)
    assert "1 of 12 values not finite" in str(caught.value)
    kernel = trainer.model.layers[0].kernel.path
    if kind == "finite loss":
        assert caught.value.terms == []
        assert caught.value.gradients == [kernel]
    elif kind == "by hand":
        assert caught.value.terms == ["loss"]
        assert kernel in caught.value.variables
    elif kind == "classifier":
        assert caught.value.terms == ["loss"]
        assert kernel in caught.value.gradients
    else:
        assert caught.value.terms == ["second"]
        assert kernel not in caught.value.gradients


@pytest.mark.parametrize("at_once", [1, STEPS])
@pytest.mark.parametrize("kind", ["classifier", "two optimizers"])
def test_skipped_steps_leave_no_trace(kind, at_once, caplog):
    skipping, reference = KINDS[kind](), KINDS[kind]()
    history = skipping.train(
        data(3, BAD), epochs=1, on_nonfinite="skip", steps_per_execution=at_once
    )
    kept = [i for i in range(STEPS) if i not in (3, BAD)]
    rows = [(X[i * SIZE : (i + 1) * SIZE], Y[i * SIZE : (i + 1) * SIZE]) for i in kept]
    expected = reference.train(rows, epochs=1)
    assert_same(skipping, reference)
    term = "loss" if kind == "classifier" else "second"
    assert np.flatnonzero(~np.isfinite(history.steps[term])).tolist() == [3, BAD]
    for name, value in expected.epochs[0].items():
        assert history.epochs[0][name] == pytest.approx(value, rel=1e-5), name
    assert "Batch 4 of epoch 1 gave a loss or gradients that are not finite" in caplog.text


@pytest.mark.parametrize("kind", ["classifier", "minimize_together"])
def test_large_models_are_watched_without_copies(kind, monkeypatch):
    """Many steps per call, with all variables taken for large ones."""
    copied = []
    monkeypatch.setattr("polus.steps.executor.MAX_HELD_BYTES", 0)
    if keras.backend.backend() == "jax":
        monkeypatch.setattr("polus.backends.jax_loops.MANY_NUMBERS", 0)
    skipping, reference = KINDS[kind](), KINDS[kind]()
    weights = {id(v) for v in skipping.model.trainable_weights}
    hold = finite.backend.hold

    def counted(variables):
        copied.extend(v.path for v in variables if id(v) in weights)
        return hold(variables)

    monkeypatch.setattr(finite.backend, "hold", counted)
    skipping.train(data(3, BAD), epochs=1, on_nonfinite="skip", steps_per_execution=STEPS)
    assert not copied
    kept = [i for i in range(STEPS) if i not in (3, BAD)]
    rows = [(X[i * SIZE : (i + 1) * SIZE], Y[i * SIZE : (i + 1) * SIZE]) for i in kept]
    reference.train(rows, epochs=1)
    assert_same(skipping, reference)


@pytest.mark.parametrize("at_once", [1, STEPS])
def test_too_many_skips_in_a_row_raise(at_once):
    trainer = classifier()
    with pytest.raises(NonFiniteError, match="Batch 6 of epoch 1"):
        trainer.train(
            data(1, 3, 4, 5),
            epochs=1,
            on_nonfinite="skip",
            max_skips=3,
            steps_per_execution=at_once,
        )
    trainer.train(
        data(1, 3, 4, 6), epochs=1, on_nonfinite="skip", max_skips=3, steps_per_execution=at_once
    )


@pytest.mark.parametrize("at_once", [1, STEPS])
def test_stop_ends_training_in_order(at_once, good, caplog):
    caplog.set_level(logging.INFO)
    ended = []

    class Ended(Callback):
        def on_epoch_end(self, epoch):
            ended.append(epoch)

    trainer = classifier()
    history = trainer.train(
        data(BAD), 3, [Ended()], on_nonfinite="stop", steps_per_execution=at_once
    )
    assert_same(trainer, good("classifier"))
    assert ended == [0]
    assert len(history.steps["loss"]) == BAD + 1
    assert np.isfinite(history.epochs[0]["loss"])
    assert "a step was not finite: batch 8 of epoch 1" in caplog.text


def test_ignore_trains_on_and_warns(caplog):
    trainer = classifier()
    history = trainer.train(data(BAD), epochs=1, on_nonfinite="ignore")
    assert np.isnan(history.steps["loss"][BAD:]).all()
    assert np.isnan(values(trainer)[0]).all()
    assert "not finite from step 7 of epoch 1" in caplog.text


def test_an_infinite_learning_rate_raises_before_it_is_applied():
    trainer = classifier(optimizer=keras.optimizers.SGD(float("inf")))
    before = values(trainer)
    for at_once in (1, 4):
        with pytest.raises(NonFiniteError, match="Batch 1 of epoch 1"):
            trainer.train(data(), epochs=1, steps_per_execution=at_once)
    for a, b in zip(values(trainer)[:4], before[:4], strict=True):
        np.testing.assert_array_equal(a, b)


def test_terminate_on_nan_ends_training_at_the_same_batch_as_in_fit():
    x = X.copy()
    x[BAD * SIZE] = np.nan
    seen = {}

    class Batches(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen[how] = batch

    for how in ("fit", "train"):
        callbacks = [Batches(), keras.callbacks.TerminateOnNaN()]
        trainer = classifier()
        if how == "train":
            trainer.train(from_arrays((x, Y), SIZE, shuffle=False), 2, callbacks)
        else:
            model = trainer.model
            model.compile(keras.optimizers.Adam(0.01), "mse")
            model.fit(x, Y, SIZE, 2, verbose=0, shuffle=False, callbacks=callbacks)
    assert seen["fit"] == seen["train"] == BAD


def test_a_scaled_loss_that_overflows_is_no_error():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), 3e38)
    trainer = classifier(optimizer=optimizer)
    trainer.train(data(), epochs=1, steps_per_execution=4)
    assert float(ops.convert_to_numpy(optimizer.dynamic_scale)) < 3e38
    for at_once in (1, STEPS):
        with pytest.raises(NonFiniteError, match="the loss is nan"):
            trainer.train(data(BAD), epochs=1, steps_per_execution=at_once)


def test_a_gradient_that_the_user_repairs_is_no_error():
    def repaired(gradients):
        return [ops.where(ops.isnan(g), 0.0, g) for g in gradients]

    trainer = root()
    trainer.post_process_grads = repaired
    trainer.train(data(BAD), epochs=1)
    assert all(np.isfinite(value).all() for value in values(trainer))


def test_a_run_eagerly_raises_too(good):
    trainer = classifier()
    with pytest.raises(NonFiniteError, match="Batch 8 of epoch 1"):
        trainer.train(data(BAD), epochs=1, run_eagerly=True)
    assert_same(trainer, good("classifier"), 1e-5)


def test_a_session_raises_too():
    def loop():
        with classifier().session() as run:
            run.step(X[:4], Y[:4])
            run.step(X[:4] * np.nan, Y[:4])

    with pytest.raises(NonFiniteError, match="Batch 2 of epoch 1"):
        loop()


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the loop over steps is Python's")
def test_slow_steps_keep_no_copies_of_the_weights(monkeypatch):
    """A call of one step looks at its gradients; one of many has to keep what it began with."""
    kept = []
    hold = finite.backend.hold

    def counted(variables):
        kept.append(len(variables))
        return hold(variables)

    class Slow(ClassifierTrainer):
        secs = 0.1

        def forward_without_grads(self, x, y):
            time.sleep(self.secs)
            return x, y

    monkeypatch.setattr(finite.backend, "hold", counted)
    trainer = Slow(make_model(), keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
    weights = len(trainer.model.trainable_weights)
    trainer.train(data(count=6), 1)
    assert kept[-1] < weights  # how slow it is, the first calls have shown
    with pytest.raises(NonFiniteError):
        trainer.train(data(4, count=6), 1)
    kept.clear()
    trainer.secs = 0.0
    trainer.train(data(), 2)
    assert max(kept) > weights


def test_a_resumed_run_meets_the_step_again_and_can_skip_it(tmp_path):
    def run(policy):
        trainer = classifier()
        save = Checkpoint(tmp_path, every_steps=5)
        batches = data(1, BAD) if policy == "skip" else data(BAD)
        history = trainer.train(
            batches, 2, [save], resume=tmp_path, on_nonfinite=policy, steps_per_execution=5
        )
        return trainer, history

    for _ in range(2):
        with pytest.raises(NonFiniteError, match="Batch 8 of epoch 1"):
            run("raise")
    resumed = classifier()
    history = resumed.train(
        data(BAD), 2, [Checkpoint(tmp_path)], resume=tmp_path, on_nonfinite="skip"
    )
    whole = classifier()
    expected = whole.train(data(BAD), 2, on_nonfinite="skip")
    assert_same(resumed, whole, 1e-5)
    np.testing.assert_allclose(history.steps["loss"], expected.steps["loss"], rtol=1e-4)


@pytest.mark.once
def test_an_unknown_policy_raises():
    with pytest.raises(ValueError, match="Did you mean 'skip'"):
        classifier().train(data(), 1, on_nonfinite="skipp")
