"""Polus callbacks: progress, saving, validation, early stopping."""

import contextlib
import io
import itertools
import logging
import re

import keras
import numpy as np
import pytest
from keras import ops
from recorder import Recorder
from rich.console import Console

from polus.callbacks import (
    Callback,
    ConsoleLogCallback,
    EarlyStop,
    LossSmoothCallback,
    Phase,
    SaveModelCallback,
    TimerCallback,
    ValidationDataCallback,
)
from polus.callbacks.epoch_table import EpochTable
from polus.callbacks.monitor import Monitor
from polus.metrics import Accuracy
from polus.training import ClassifierTrainer

X = np.random.default_rng(0).normal(size=(80, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 1] > 0)
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 80, 16)]
NAN = float("nan")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_trainer(rate=1e-2, **kwargs):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    kwargs.setdefault("metrics", [Accuracy(3)])
    return ClassifierTrainer(model, keras.optimizers.SGD(rate), CROSS_ENTROPY, **kwargs)


class Shared(Callback):
    """Keeps the shared values of the run at the end of each epoch."""

    phase = Phase.SAVE

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch):
        self.seen.append({**self.coordinator.shared_dict, **self.coordinator.logs})


class FixedMetric(ClassifierTrainer):
    """A trainer whose validation metric takes the given values."""

    def __init__(self, values):
        trainer = make_trainer()
        super().__init__(trainer.model, trainer.optimizer, CROSS_ENTROPY)
        self.values = iter(values)

    def evaluate(self, *args, **kwargs):
        return {"f1": next(self.values)}


# ---------------------------------------------------------------------- steps per execution


@pytest.mark.parametrize(
    "callback",
    [ConsoleLogCallback, LossSmoothCallback, TimerCallback, lambda: EarlyStop("loss")],
)
def test_polus_callbacks_do_not_limit_steps_per_execution(callback):
    assert callback().every_steps is None


def test_batch_events_need_single_steps_unless_every_steps_is_set():
    class Mine(Callback):
        def on_train_batch_end(self, epoch, step, loss):
            pass

    mine = Mine()
    assert mine.every_steps == 1
    mine.every_steps = None
    assert mine.every_steps is None
    mine.every_steps = 0
    with pytest.raises(ValueError, match="positive integer"):
        make_trainer().train(BATCHES, epochs=1, callbacks=[mine])


@pytest.mark.parametrize("steps_per_execution", [1, 2, 5])
def test_batch_events_come_once_per_step_in_order_with_the_loss(steps_per_execution):
    recorder = Recorder(every_steps=None)
    history = make_trainer().train(
        BATCHES, epochs=2, callbacks=[recorder], steps_per_execution=steps_per_execution
    )
    steps = [(epoch, step) for epoch in range(2) for step in range(5)]
    in_epochs = [event[:3] for event in recorder.events if event[0].startswith("step")]
    assert in_epochs == [(name, *at) for at in steps for name in ("step_begin", "step_end")]
    assert recorder.losses == pytest.approx(history.steps["loss"].tolist(), rel=0)


# ---------------------------------------------------------------------- smoothed loss and timing


def test_smooth_loss_is_a_bias_corrected_average():
    smooth, shared = LossSmoothCallback(beta=0.8), Shared()
    history = make_trainer().train(BATCHES, epochs=2, callbacks=[shared, smooth])
    average = 0.0
    for i, loss in enumerate(history.steps["loss"], start=1):
        average = 0.8 * average + 0.2 * float(loss)
        corrected = average / (1 - 0.8**i)
    assert smooth.smooth_loss == pytest.approx(corrected, rel=1e-6)
    assert shared.seen[-1]["smooth_loss"] == smooth.smooth_loss


def test_smooth_loss_resumes_from_its_state():
    whole, first, second = (LossSmoothCallback() for _ in range(3))
    losses = np.linspace(3, 1, 9)
    whole.on_steps_end(0, range(9), losses)
    first.on_steps_end(0, range(4), losses[:4])
    second.set_state(first.get_state())
    second.on_steps_end(0, range(4, 9), losses[4:])
    assert second.smooth_loss == pytest.approx(whole.smooth_loss, rel=1e-12)


def test_smooth_loss_stays_on_the_device_until_it_is_read():
    class Unread:
        def __array__(self, dtype=None, copy=None):
            reads.append(self)
            return np.ones(2, dtype)

    reads, smooth = [], LossSmoothCallback()
    for _ in range(3):
        smooth.on_steps_end(0, range(2), Unread())
    assert not reads
    assert smooth.smooth_loss == pytest.approx(1)
    assert len(reads) == 3
    for _ in range(5000):  # but not all of them
        smooth.on_steps_end(0, range(2), Unread())
    assert len(reads) > 2000


def test_timer_measures_epochs_with_its_clock():
    time = iter(range(100))
    shared = Shared()
    timer = TimerCallback(clock=lambda: next(time))
    make_trainer().train(BATCHES, epochs=2, callbacks=[timer, shared])
    seconds = [(row["seconds"], row["seconds_per_step"]) for row in shared.seen[-1]["timer"]]
    assert seconds == [(1, 0.2), (1, 0.2)]


# ---------------------------------------------------------------------- validation


def test_several_validation_sets_after_each_epoch():
    shared = Shared()
    sets = [ValidationDataCallback(BATCHES[:2], "dev"), ValidationDataCallback(BATCHES[2:], "test")]
    trainer = make_trainer()
    # First in the list, but the validation results are in the logs all the same.
    history = trainer.train(BATCHES, epochs=2, callbacks=[shared, *sets])
    logits = ops.convert_to_numpy(trainer.model(X[:32]))
    accuracy = (logits.argmax(-1) == Y[:32]).mean()
    assert history.epochs[-1]["dev_accuracy"] == pytest.approx(accuracy)
    assert shared.seen[-1]["dev_accuracy"] == pytest.approx(accuracy)
    assert len(shared.seen[-1]["validation"]["test"]["accuracy"]) == 2
    assert len(history.validations) == 4


def test_validation_every_n_steps():
    validation = ValidationDataCallback(BATCHES, every_steps=2)
    history = make_trainer().train(BATCHES, epochs=2, callbacks=[validation])
    assert [(v.epoch, v.step) for v in history.validations] == [
        (e, s) for e in range(2) for s in (1, 3, 4)
    ]


def test_validation_every_n_epochs_leaves_the_other_epochs_out():
    callbacks = [
        ValidationDataCallback(BATCHES, every_epochs=2),
        EarlyStop("val_accuracy", patience=2),
        seen := Shared(),
    ]
    history = make_trainer(rate=1e-9).train(BATCHES, epochs=9, callbacks=callbacks)
    # The first validation is the best, two more make the patience: 2, 4 and 6 epochs.
    assert [v.epoch for v in history.validations] == [1, 3, 5]
    assert ["val_accuracy" in row for row in history.epochs] == [False, True] * 3
    assert ["val_accuracy" in logs for logs in seen.seen] == [False, True] * 3


def test_values_that_callbacks_add_to_the_logs_are_seen_and_recorded():
    class Adds(Callback):
        phase = Phase.MEASURE

        def on_epoch_end(self, epoch):
            self.coordinator.logs["score"] = -epoch

    class Hears(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["heard"] = logs["score"]

    callbacks = [Hears(), EarlyStop("heard", patience=2, mode="max"), Adds()]
    history = make_trainer().train(BATCHES, epochs=9, callbacks=callbacks)
    assert [(row["score"], row["heard"]) for row in history.epochs] == [(0, 0), (-1, -1), (-2, -2)]


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return BATCHES[0]


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Endless(), ValueError, r"endless.*ValidationDataCallback\(\.\.\., steps=1000\)"),
        (3, TypeError, "dataset"),
    ],
)
def test_impossible_validation_data_raises_before_training(dataset, error, message):
    trainer = make_trainer()
    with pytest.raises(error, match=message):
        trainer.train(BATCHES, epochs=1, callbacks=[ValidationDataCallback(dataset)])
    assert int(trainer.step_counter) == 0


def test_duplicate_validation_set_names_raise():
    sets = [ValidationDataCallback(BATCHES), ValidationDataCallback(BATCHES)]
    with pytest.raises(ValueError, match="Two validation sets are named 'val'"):
        make_trainer().train(BATCHES, epochs=1, callbacks=sets)


# ---------------------------------------------------------------------- monitors


@pytest.mark.parametrize(
    ("name", "mode", "values", "improved"),
    [
        ("val_loss", "auto", [3, 2, 2, 4, 1], [True, True, False, False, True]),
        ("val_macro_f1", "auto", [0.5, 0.4, 0.6], [True, False, True]),
        ("val_macro_f1", "min", [0.5, 0.4, 0.6], [True, True, False]),
        ("accuracy", "max", [float("nan"), 0.1], [False, True]),
    ],
)
def test_monitor_detects_improvements(name, mode, values, improved):
    monitor = Monitor(name, mode)
    assert [monitor.improved(value) for value in values] == improved


def test_changes_below_min_delta_are_no_improvement():
    monitor = Monitor("loss", min_delta=0.1)
    assert [monitor.improved(v) for v in (1.0, 0.95, 0.85)] == [True, False, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EarlyStop(3), r"got 3\. Did you mean EarlyStop\(patience=3\)\?"),
        (lambda: EarlyStop(None), "monitor must be a string, got None"),
        (lambda: EarlyStop(""), "monitor must not be empty"),
        (lambda: EarlyStop("loss", 0), "patience must be a positive integer, got 0"),
        (lambda: EarlyStop("loss", 1.5), r"patience must be a positive integer, got 1\.5"),
        (lambda: EarlyStop("loss", "max"), "patience must be a positive integer, got 'max'"),
        (lambda: EarlyStop("loss", True), "patience must be a positive integer, got True"),
        (lambda: EarlyStop("loss", mode="up"), '"min", "max" or "auto", got \'up\''),
        (lambda: EarlyStop("loss", min_delta=-1), "min_delta must be at least 0 and finite"),
        (lambda: EarlyStop("loss", min_delta=NAN), "min_delta must be at least 0 and finite"),
        (lambda: EarlyStop("loss", min_delta="1"), "min_delta must be a number, got '1'"),
        (lambda: SaveModelCallback("sometimes"), '"best", "every" or "end"'),
        (lambda: SaveModelCallback("a.keras"), r"mean SaveModelCallback\(path='a\.keras'\)\?"),
        (lambda: SaveModelCallback("best", "model.pt"), "must end in .keras or .weights.h5"),
        (lambda: SaveModelCallback("best", 3), "path must be a path, got 3"),
        (lambda: SaveModelCallback("best", "{loss}.keras"), r"such as \{epoch:03d\}, got '\{loss"),
        (lambda: SaveModelCallback("every", "model.keras"), "must contain the epoch number"),
        (lambda: LossSmoothCallback(1.0), "beta must be at least 0 and less than 1, got 1.0"),
        (lambda: LossSmoothCallback(NAN), "beta must be at least 0 and less than 1, got nan"),
        (lambda: LossSmoothCallback("fast"), "beta must be a number, got 'fast'"),
        (lambda: TimerCallback(3), "clock must be a function, got 3"),
        (lambda: ConsoleLogCallback(3), "console must be a rich.console.Console, got 3"),
        (lambda: ConsoleLogCallback(clock=3), "clock must be a function, got 3"),
        (lambda: ValidationDataCallback(BATCHES, len, "v"), "name must be a string, got <built-in"),
        (lambda: ValidationDataCallback(BATCHES, "v", len), "every_steps must be a positive int"),
        (lambda: ValidationDataCallback(BATCHES, "v", 0), "every_steps must be a positive int"),
        (lambda: ValidationDataCallback(BATCHES, "v", None, 3), "_transform_f must be a function"),
        (lambda: ValidationDataCallback(BATCHES, steps=0), "steps must be a positive integer"),
        (
            lambda: ValidationDataCallback(BATCHES, every_epochs=0),
            "every_epochs must be a positive",
        ),
        (
            lambda: ValidationDataCallback(BATCHES, every_steps=2, every_epochs=2),
            "Pass either every_steps or every_epochs",
        ),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


class Closeness(keras.metrics.Mean):
    """A metric that tells its direction as those of Keras do, against what its name suggests."""

    def __init__(self):
        super().__init__("closeness_error")
        self._direction = "up"

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(ops.cast(ops.argmax(y_pred, -1) == y_true, "float32"))


def test_early_stop_asks_the_metric_for_its_direction():
    monitors = {name: EarlyStop(f"val_{name}", patience=9) for name in ("closeness_error", "loss")}
    history = make_trainer(0.5, metrics=[Closeness()]).train(
        BATCHES, epochs=4, callbacks=[ValidationDataCallback(BATCHES), *monitors.values()]
    )
    for name, best in (("closeness_error", max), ("loss", min)):
        values = [row[f"val_{name}"] for row in history.epochs]
        assert monitors[name].monitor.best == pytest.approx(best(values))
        assert len(set(values)) > 1


def test_unknown_monitor_lists_the_available_names():
    callbacks = [ValidationDataCallback(BATCHES), EarlyStop("val_acuracy")]
    with pytest.raises(
        ValueError, match=r"Did you mean 'val_accuracy'\?.*They have accuracy, loss"
    ):
        make_trainer().train(BATCHES, epochs=1, callbacks=callbacks)


# ---------------------------------------------------------------------- early stop


def test_early_stop_respects_patience(caplog):
    caplog.set_level(logging.INFO)
    trainer = FixedMetric([0.1, 0.3, 0.2, 0.25, 0.9])
    callbacks = [EarlyStop("val_f1", patience=2), ValidationDataCallback(BATCHES)]
    history = trainer.train(BATCHES, epochs=5, callbacks=callbacks)
    assert len(history.epochs) == 4
    assert (
        "Training was stopped after 4 of 5 epochs: val_f1 did not improve on 0.3 for 2 epochs"
        in caplog.text
    )


def test_early_stop_ends_training_at_a_non_finite_loss():
    trainer = make_trainer(rate=float("nan"))
    history = trainer.train(BATCHES, 9, [EarlyStop()], on_nonfinite="ignore")
    assert len(history.epochs) == 1


# ---------------------------------------------------------------------- saving


def test_best_model_is_saved_and_can_be_loaded(tmp_path):
    path = tmp_path / "made" / "best.keras"
    trainer = FixedMetric([0.1, 0.3, 0.2])
    weights = []

    class Weights(Callback):
        def on_epoch_end(self, epoch):
            weights.append(self.coordinator.trainer.model.get_weights())

    save = SaveModelCallback("best", path, monitor="val_f1")
    trainer.train(BATCHES, epochs=3, callbacks=[save, Weights(), ValidationDataCallback(BATCHES)])
    loaded = keras.saving.load_model(path).get_weights()
    for mine, expected, last in zip(loaded, weights[1], weights[2], strict=True):
        np.testing.assert_array_equal(mine, expected)
        assert not np.array_equal(mine, last)
    assert [file.name for file in path.parent.iterdir()] == ["best.keras"]


def test_the_best_model_is_that_of_several_runs(tmp_path):
    """As with Keras' ModelCheckpoint: a worse second run does not replace it."""
    save = SaveModelCallback("best", tmp_path / "best.keras", monitor="val_f1")
    for scores in ([0.3], [0.1]):
        trainer = FixedMetric(scores)
        trainer.train(BATCHES, 1, callbacks=[save, ValidationDataCallback(BATCHES)])
        if scores == [0.3]:
            best = trainer.model.get_weights()
    loaded = keras.saving.load_model(tmp_path / "best.keras").get_weights()
    np.testing.assert_array_equal(loaded[0], best[0])


def test_events_with_the_arguments_of_keras_raise():
    class Mine(Callback):
        def on_train_batch_end(self, batch, logs=None):
            pass

    with pytest.raises(TypeError, match=r"is called with \(epoch, step, loss\).*extends keras"):
        FixedMetric([0.1]).train(BATCHES, 1, callbacks=[Mine()])


def test_models_are_saved_every_epoch_and_at_the_end(tmp_path):
    callbacks = [
        SaveModelCallback("every", tmp_path / "{epoch:02d}.weights.h5"),
        SaveModelCallback("end", tmp_path / "last.keras"),
    ]
    make_trainer().train(BATCHES, epochs=2, callbacks=callbacks)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["01.weights.h5", "02.weights.h5", "last.keras"]


def test_relative_paths_do_not_move_with_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "{odd}").mkdir()
    monkeypatch.chdir(tmp_path / "{odd}")
    save = SaveModelCallback("every", "models/{epoch}.weights.h5")
    monkeypatch.chdir(tmp_path)
    make_trainer().train(BATCHES, epochs=1, callbacks=[save])
    assert (tmp_path / "{odd}" / "models" / "1.weights.h5").is_file()


def test_failed_save_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "model.keras"
    trainer = make_trainer()
    trainer.train(BATCHES, epochs=1, callbacks=[SaveModelCallback("end", path)])
    before = path.read_bytes()

    def fails(self, target, *args, **kwargs):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(type(trainer.model), "save", fails)
    with pytest.raises(OSError, match="No space left"):
        trainer.train(BATCHES, epochs=1, callbacks=[SaveModelCallback("end", path)])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.keras"]


def test_no_model_is_saved_at_the_end_after_an_error(tmp_path):
    class Fails(Callback):
        def on_epoch_end(self, epoch):
            raise RuntimeError

    callbacks = [SaveModelCallback("end", tmp_path / "last.keras"), Fails()]
    with pytest.raises(RuntimeError):
        make_trainer().train(BATCHES, epochs=1, callbacks=callbacks)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- progress


def shown(terminal: bool, callbacks=(), clock=None, width=120, error=None) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    progress = ConsoleLogCallback(console, **({"clock": clock} if clock else {}))
    with pytest.raises(error) if error else contextlib.nullcontext():
        make_trainer().train(BATCHES, epochs=2, callbacks=[progress, *callbacks])
    return out.getvalue()


class Note(Callback):
    """Puts into the logs what is no number."""

    def on_epoch_end(self, epoch):
        self.coordinator.logs.update(note="warm", nothing=None, more={"a": 1})


def test_logs_that_are_no_numbers_are_shown_as_they_are():
    lines = shown(False, [Note()]).splitlines()
    assert "note warm  nothing None  more {'a': 1}" in lines[0]
    history = make_trainer().train(BATCHES, epochs=2, callbacks=[Note()], dry_run=True)
    assert history.epochs[0]["note"] == "warm"


def test_plain_lines_without_a_terminal():
    lines = shown(False, [ValidationDataCallback(BATCHES)]).splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == ["epoch 1/2", "epoch 2/2"]
    for part in ("loss ", "accuracy 0.", "val_accuracy 0.", " s"):
        assert part in lines[1]
    assert lines[2].startswith("2 epochs, 10 steps in ")
    assert "steps/s" in lines[2]
    assert "examples/s" in lines[2]


def test_progress_bar_in_a_terminal():
    ticks = iter(range(10_000))
    text = shown(True, [LossSmoothCallback()], clock=lambda: next(ticks))
    for part in ("epoch 1/2 ━", "epoch 2/2 ━", "smooth loss", "steps/s", "5/5"):
        assert part in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


class Clock(Callback):
    """A clock that advances by a fixed time at each step."""

    every_steps = 1

    def __init__(self, secs_per_step):
        super().__init__()
        self.secs_per_step = secs_per_step
        self.steps = 0

    def __call__(self):
        return self.steps * self.secs_per_step

    def on_train_batch_begin(self, epoch, step):
        self.steps += 1


def bars_of(text):
    return [line for line in text.replace("\x1b[2K", "\n").splitlines() if "━" in line]


def test_bar_shows_the_remaining_time_of_all_epochs():
    clock = Clock(20 * 60)
    bars = bars_of(shown(True, [clock], clock=clock))
    left = [bar.split("━ ")[-1].split()[0] for bar in bars if "s/step" in bar]
    assert list(dict.fromkeys(left)) == [
        *("2:40:00", "2:20:00", "2:00:00", "1:40:00", "1:20:00"),
        *("1:00:00", "40:00", "20:00", "0:00"),
    ]


def test_slow_steps_are_shown_in_seconds_per_step():
    clock = Clock(150)
    text = shown(False, [clock], clock=clock)
    assert "150 s/step, 0.11 examples/s" in text.splitlines()[-1]
    assert "steps/s" not in text


def test_epochs_shorter_than_the_refresh_interval_are_shown():
    clock = Clock(0.03)
    bars = bars_of(shown(True, [clock], clock=clock))
    assert any(bar.startswith("epoch 2/2") and " 2/5  loss " in bar for bar in bars)


def test_narrow_terminal_keeps_epoch_and_loss():
    ticks = iter(range(10_000))
    text = shown(True, [LossSmoothCallback()], clock=lambda: next(ticks), width=60)
    bars = bars_of(text)
    assert any(line.startswith("epoch 2/2 ━") and "  loss " in line for line in bars)
    assert all(len(line) <= 60 for line in bars)


def test_epochs_are_rows_of_a_table_in_a_terminal():
    text = shown(True, [ValidationDataCallback(BATCHES, every_epochs=2)], width=100)
    lines = [line.rstrip() for line in re.split(r"\n|\r|\x1b\[[0-9;?]*[A-Za-z]", text)]
    rows = [line for line in lines if re.match(r"epoch +loss|\d/\d ", line)]
    heads = [row.split() for row in rows if row.startswith("epoch")]
    assert heads == [
        ["epoch", "loss", "accuracy", "time"],
        ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "time"],
    ]
    first, second = (row for row in rows if not row.startswith("epoch"))
    for head, row in zip((rows[0], rows[2]), (first, second), strict=True):
        for name in head.split()[1:-1]:  # numbers stand below the ends of their names
            end = head.index(f" {name} ") + 1 + len(name)
            assert row[end - 1].isdigit()
            assert row[end] == " "


@pytest.mark.once
def test_a_narrow_table_shows_what_matters_and_breaks_no_name():
    names = {"loss": "0.5", "gradient_norm": "1.25", "accuracy": "0.75", "val_loss": "0.6"}
    order = ["loss", "val_loss", "accuracy", "gradient_norm"]
    table = EpochTable(45)
    assert table.lines("1/5", names, "0.5 s", order) == [
        "epoch       loss   val_loss   time  +2",
        "1/5          0.5        0.6  0.5 s",
    ]
    assert table.lines("2/5", names | {"val_loss": ""}, "0.5 s", order) == [
        "2/5          0.5             0.5 s"
    ]
    for width in range(30, 120):
        lines = EpochTable(width).lines("1/5", names, "0.5 s", order)
        assert len(max(lines, key=len)) <= width


def test_a_bar_shows_metrics_once_an_epoch_takes_seconds():
    clock = Clock(1.0)
    bars = bars_of(shown(True, [clock], clock=clock))
    assert any("accuracy 0." in bar for bar in bars if " 3/5 " in bar)
    assert not any("accuracy" in bar for bar in bars if " 1/5 " in bar)


def test_long_epochs_print_lines_without_a_terminal():
    ticks = iter(range(0, 100_000, 20))

    class TwoTerms(ClassifierTrainer):
        def train_step(self, x, y):
            loss = super().train_step(x, y)
            return {"loss": loss, "half[1]": loss / 2}

    trainer = make_trainer()
    trainer = TwoTerms(trainer.model, trainer.optimizer, CROSS_ENTROPY)
    console = Console(file=(out := io.StringIO()), width=200)
    progress = ConsoleLogCallback(console, clock=lambda: next(ticks))
    history = trainer.train(BATCHES, epochs=1, callbacks=[progress], steps_per_execution=1)
    lines = out.getvalue().splitlines()
    loss = history.steps["loss"][4]
    assert lines[-3].startswith(f"  step 5/5  loss {loss:.4g}  half[1] {loss / 2:.4g}  ")


def test_bar_is_closed_after_an_error():
    class Fails(Callback):
        def on_epoch_end(self, epoch):
            raise RuntimeError

    text = shown(True, [Fails()], error=RuntimeError)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert "0 epochs, 5 steps in " in text.splitlines()[-1]


def test_callback_error_still_ends_the_other_callbacks():
    class Fails(Callback):
        def on_epoch_end(self, epoch):
            raise RuntimeError("mine")

    class Ends(Callback):
        ended = None

        def on_train_end(self):
            self.ended = self.coordinator.exception

    ends = [Ends(), Ends()]
    with pytest.raises(RuntimeError, match="mine") as error:
        make_trainer().train(BATCHES, epochs=1, callbacks=[ends[0], Fails(), ends[1]])
    assert [end.ended for end in ends] == [error.value] * 2


def test_summary_reports_time_spent_waiting_for_data():
    seconds = itertools.chain([0], itertools.repeat(100))
    slow = ConsoleLogCallback(Console(file=(out := io.StringIO())), clock=lambda: next(seconds))
    trainer = make_trainer()

    class Waits(Callback):
        def on_epoch_end(self, epoch):
            self.coordinator.run.reader.waited_secs += 43.0

    trainer.train(BATCHES, epochs=1, callbacks=[slow, Waits()], steps_per_execution=1)
    assert "input-bound: 43%" in out.getvalue().replace("\n", " ")
