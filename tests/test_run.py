"""A run: its states, its logs, and what ends it."""

import signal

import keras
import numpy as np
import pytest
from keras import ops
from recorder import Recorder

from polus.callbacks import Callback, EarlyStop, ValidationDataCallback
from polus.data import from_arrays
from polus.metrics import Accuracy
from polus.training import BaseTrainer, ClassifierTrainer
from polus.training.status import RunStatus

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_trainer(cls=ClassifierTrainer, **kwargs):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
    return cls(model, optimizer=keras.optimizers.SGD(0.1), loss=CROSS_ENTROPY, **kwargs)


class Watch(Recorder):
    """Notes the state of its run at each event, and acts where it is told to."""

    def __init__(self, **actions):
        super().__init__(self.note)
        self.actions, self.seen = actions, []

    def note(self, name, *_):
        self.seen.append((name, self.coordinator.run.status))
        if name in self.actions:
            self.actions[name](self.coordinator.run)


def train(watch, epochs=1, **kwargs):
    make_trainer(**kwargs).train(from_arrays((X, Y), 32), epochs, [watch], steps_per_execution=1)
    return watch.coordinator.run


def test_a_run_that_trains_all_epochs_is_completed():
    run = train(watch := Watch(), epochs=2)
    assert [status.name for _, status in watch.seen] == [
        "CREATED",  # train_begin
        "CREATED",  # the first epoch_begin
        *["RUNNING"] * 4,  # two steps
        "EPOCH_END",
        "EPOCH_END",  # the second epoch_begin
        *["RUNNING"] * 4,  # two steps
        "EPOCH_END",
        "COMPLETED",  # train_end
    ]
    assert (run.status, run.stop_reason) == (RunStatus.COMPLETED, "")


def test_stopping_ends_the_run_after_the_step_and_keeps_the_reason(caplog):
    caplog.set_level("INFO", "polus")
    run = train(watch := Watch(step_end=lambda run: run.stop("kl")), epochs=3)
    assert [event for event, _ in watch.seen] == [
        *["train_begin", "epoch_begin", "step_begin", "step_end", "epoch_end", "train_end"]
    ]
    assert (run.status, run.stop_reason) == (RunStatus.STOPPED, "kl")
    assert "Training was stopped after 1 of 3 epochs: kl." in caplog.text
    assert len(run.history.steps["loss"]) == 1


def test_early_stop_of_the_trainer_stops_the_run():
    def stop(run):
        run.trainer.early_stop = True

    run = train(Watch(epoch_end=stop), epochs=3)
    assert run.status is RunStatus.STOPPED
    assert run.epoch == 1


def test_early_stopping_says_why():
    watch = Watch()
    callbacks = [EarlyStop("loss", patience=1, mode="max"), watch]
    make_trainer().train(from_arrays((X, Y), 32), 5, callbacks)
    assert watch.coordinator.run.status is RunStatus.STOPPED
    assert "loss did not improve" in watch.coordinator.run.stop_reason


def test_an_error_fails_the_run():
    watch = Watch(step_end=lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(watch)
    assert watch.seen[-1] == ("train_end", RunStatus.FAILED)
    assert isinstance(watch.coordinator.exception, ZeroDivisionError)


def test_an_error_at_the_end_of_training_fails_the_run():
    watch = Watch(train_end=lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(watch)
    assert watch.coordinator.run.status is RunStatus.FAILED


def test_a_signal_interrupts_the_run():
    watch = Watch(step_end=lambda run: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(watch)
    assert watch.seen[-1] == ("train_end", RunStatus.INTERRUPTED)


def test_logs_are_one_dict_per_epoch_and_end_in_the_history():
    class Write(Callback):
        def on_epoch_end(self, epoch):
            self.coordinator.run.logs["mine"] = epoch / 2

    logs = []
    watch = Watch(epoch_end=lambda run: logs.append(run.logs))
    data = from_arrays((X, Y), 32)
    validation = ValidationDataCallback(from_arrays((X, Y), 64, shuffle=False))
    history = make_trainer(metrics=[Accuracy(2)]).train(data, 2, [watch, Write(), validation])
    assert logs[0] is not logs[1]
    assert list(logs[1]) == ["loss", "accuracy", "val_loss", "val_accuracy", "mine"]
    assert [row["mine"] for row in history.epochs] == [0.0, 0.5]
    assert history.epochs[1] == {"epoch": 1, **logs[1]}


def test_a_term_with_the_name_of_a_column_is_refused():
    class Step(ClassifierTrainer):
        def train_step(self, x, y):
            return {"loss": super().train_step(x, y), self.term: ops.zeros(())}

    for term in ("step", "epoch", "accuracy"):
        trainer = make_trainer(Step, metrics=[Accuracy(2)])
        trainer.term = term
        with pytest.raises(ValueError, match=f"term named '{term}'"):
            trainer.train(from_arrays((X, Y), 32), 1)


class Towers(BaseTrainer):
    def forward_with_grads(self, x, y):
        return y, self.model(x) + self.other(x)


def other_model():
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)], name="other")


def test_a_second_model_that_no_optimizer_updates_warns(caplog):
    trainer = make_trainer(Towers)
    trainer.other = other_model()
    trainer.train(from_arrays((X, Y), 32), 1)
    (warned,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "2 trainable variables take part in the loss and no optimizer updates them" in warned
    assert "trainable_weights=[" in warned


@pytest.mark.parametrize("frozen", [True, False])
def test_a_second_model_that_is_frozen_or_listed_does_not_warn(frozen, caplog):
    trainer = make_trainer(Towers)
    trainer.other = other_model()
    if frozen:
        trainer.other.trainable = False
    else:
        trainer.trainable_weights = [
            *trainer.model.trainable_weights,
            *trainer.other.trainable_weights,
        ]
    trainer.train(from_arrays((X, Y), 32), 1)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_an_attribute_that_a_callback_changes_is_seen_by_the_step():
    class Weighted(ClassifierTrainer):
        weight = 0.0

        def train_step(self, x, y):
            return {"loss": super().train_step(x, y), "weight": ops.zeros(()) + self.weight}

    def set_weight(run):
        run.trainer.weight = float(run.epoch)

    trainer = make_trainer(Weighted)
    data = from_arrays((X, Y), 16)
    for _ in range(2):
        watch = Watch(epoch_begin=set_weight)
        watch.every_steps = None
        history = trainer.train(data, 4, [watch])
        assert [row["weight"] for row in history.epochs] == [0, 1, 2, 3]


def test_freezing_between_two_runs_counts():
    back = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(4), keras.layers.BatchNormalization()]
    )
    head = keras.layers.Dense(2)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, head(back(inputs)))
    trainer = ClassifierTrainer(
        model, head.trainable_weights, keras.optimizers.SGD(0.1), CROSS_ENTROPY
    )

    def moved():
        before = np.array(back.layers[-1].moving_mean)
        trainer.train(from_arrays((X, Y), 16), 1)
        return not np.array_equal(before, np.array(back.layers[-1].moving_mean))

    assert moved()
    back.trainable = False
    assert not moved()
    back.trainable = True
    assert moved()


def test_metrics_that_the_step_updates_are_shown_and_reset():
    class Step(ClassifierTrainer):
        def train_step(self, x, y):
            loss = super().train_step(x, y)
            self.seen.update_state(ops.ones(8))
            for metric in self.metrics:
                if metric.name == "passed":
                    metric.update_state(ops.ones(4))
            return loss

        def metric_samples(self, *outputs):
            return None

    trainer = make_trainer(Step, metrics=[keras.metrics.Sum(name="passed")])
    trainer.seen = keras.metrics.Sum(name="seen")
    history = trainer.train(from_arrays((X, Y), 32), 2)
    assert [row["seen"] for row in history.epochs] == [16, 16]
    assert [row["passed"] for row in history.epochs] == [8, 8]


def test_a_variable_that_is_listed_twice_is_updated_once(caplog):
    once, twice = make_trainer(), make_trainer()
    twice.model.set_weights(once.model.get_weights())
    twice.trainable_weights = 2 * twice.model.trainable_weights
    assert "lists 2 variables more than once" in caplog.text
    for trainer in (once, twice):
        trainer.train(from_arrays((X, Y), 32), 1)
    for a, b in zip(once.model.get_weights(), twice.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_callback_that_is_listed_twice_is_refused():
    callback = Watch()
    with pytest.raises(ValueError, match="the same Watch twice"):
        make_trainer().train(from_arrays((X, Y), 32), 1, [callback, callback])


WEIGHTS = np.where(Y, 5.0, 0.1).astype("float32")


@pytest.mark.parametrize("weights", ["sample", "class"])
def test_weights_count_as_in_fit(weights):
    sample = WEIGHTS if weights != "class" else None
    by_class = {1: 3.0} if weights != "sample" else None
    parts = (X, Y) if sample is None else (X, Y, sample)
    ours, theirs = make_trainer().model, make_trainer().model
    ours.set_weights(theirs.get_weights())

    def accuracy():
        return keras.metrics.SparseCategoricalAccuracy(name="acc")

    def weighted():
        return keras.metrics.SparseCategoricalAccuracy(name="weighted")

    theirs.compile(
        keras.optimizers.SGD(0.1),
        CROSS_ENTROPY,
        metrics=[accuracy()],
        weighted_metrics=[weighted()],
    )
    expected = theirs.fit(
        X,
        Y,
        sample_weight=sample,
        class_weight=by_class,
        batch_size=16,
        shuffle=False,
        epochs=2,
        verbose=0,
        validation_data=parts,
    ).history
    trainer = ClassifierTrainer(
        ours,
        keras.optimizers.SGD(0.1),
        CROSS_ENTROPY,
        metrics=[accuracy()],
        weighted_metrics=[weighted()],
        class_weight=by_class,
    )
    data = from_arrays(parts, 16, shuffle=False)
    history = trainer.train(data, 2, [ValidationDataCallback(data)]).to_dict()
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-5, err_msg=name)


def test_a_none_part_of_a_batch_is_as_in_fit():
    once, none = make_trainer(), make_trainer()
    none.model.set_weights(once.model.get_weights())
    histories = [
        once.train([(X, Y)], 1).steps["loss"],
        none.train([(X, Y, None)], 1).steps["loss"],
    ]
    np.testing.assert_array_equal(*histories)


def test_one_epoch_a_call_trains_what_many_epochs_in_one_call_do():
    at_once, calls = make_trainer(), make_trainer()
    calls.model.set_weights(at_once.model.get_weights())
    data = from_arrays((X, Y), 16)
    expected = at_once.train(data, 3).steps["loss"]
    losses = np.concatenate([calls.train(data, 1).steps["loss"] for _ in range(3)])
    np.testing.assert_array_equal(losses, expected)
    for a, b in zip(at_once.model.get_weights(), calls.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
