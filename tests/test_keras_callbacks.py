"""Keras callbacks behave in `train` as they do in `fit`."""

import contextlib
import csv
import functools
import logging

import keras
import numpy as np
import pytest

import polus.core
from polus.callbacks import (
    Callback,
    ConsoleLogCallback,
    EarlyStop,
    LossSmoothCallback,
    SaveModelCallback,
    TimerCallback,
    ValidationDataCallback,
)
from polus.callbacks.keras_callback import KerasCallback
from polus.checkpoint import Checkpoint
from polus.data import from_arrays
from polus.training import ClassifierTrainer

X = np.random.default_rng(1).normal(size=(60, 5)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(autouse=True)
def _one_compiler():
    polus.core.set_jit_compile(keras.config.backend() == "jax")
    yield
    polus.core.set_jit_compile("auto")


def run(callbacks, how, epochs=4, rate=0.1, optimizer=None, **arguments):
    """Trains the same model on the same batches with `fit` or `train`; returns the model."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    optimizer = optimizer() if optimizer else keras.optimizers.SGD(rate)
    if how == "fit":
        jit = keras.config.backend() == "jax"
        metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        model.compile(optimizer, CROSS_ENTROPY, metrics=metrics, jit_compile=jit)
        model.fit(
            X[:48],
            Y[:48],
            16,
            epochs,
            shuffle=False,
            validation_data=(X[48:], Y[48:]),
            validation_batch_size=12,
            callbacks=callbacks,
            verbose=0,
        )
    else:
        metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        trainer = ClassifierTrainer(model, optimizer, CROSS_ENTROPY, metrics)
        validation = ValidationDataCallback(from_arrays((X[48:], Y[48:]), 12, shuffle=False))
        data = from_arrays((X[:48], Y[:48]), 16, shuffle=False)
        trainer.train(data, epochs, [*callbacks, validation], **arguments)
        assert not hasattr(model, "stop_training")
        assert not hasattr(model, "optimizer")
    return model


class Recorder(keras.callbacks.Callback):
    """Records every event with its logs."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __getattribute__(self, name):
        if name.startswith("on_") and not name.startswith(("on_test", "on_predict")):
            method = super().__getattribute__(name)

            def heard(*args, **kwargs):
                logs = kwargs.get("logs") or (args[-1] if isinstance(args[-1], dict) else {})
                number = [arg for arg in args if isinstance(arg, int)]
                self.heard.append((name, number, dict(logs)))
                return method(*args, **kwargs)

            return heard
        return super().__getattribute__(name)

    def on_train_batch_begin(self, batch, logs=None):
        pass

    def on_train_batch_end(self, batch, logs=None):
        pass


def test_events_and_logs_match_fit():
    heard = {}
    for how in ("fit", "train"):
        recorder = Recorder()
        run([recorder], how, epochs=2)
        heard[how] = recorder.heard
    names = [[(name, number) for name, number, _ in heard[how]] for how in ("fit", "train")]
    assert names[0] == names[1]
    for (name, _, expected), (_, _, got) in zip(heard["fit"], heard["train"], strict=True):
        assert got.keys() == expected.keys(), name
        for key, value in expected.items():
            assert got[key] == pytest.approx(float(value), rel=1e-4, abs=1e-6), (name, key)


class StopAsAnEpochBegins(keras.callbacks.Callback):
    """Without an event per batch, so that several steps may run in one call."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.stop_training = epoch == 1


CASES = {
    "stop as an epoch begins": lambda path: StopAsAnEpochBegins(),
    "reduce on plateau": lambda path: keras.callbacks.ReduceLROnPlateau(
        monitor="val_loss", patience=1, min_delta=1.0, factor=0.5
    ),
    "schedule": lambda path: keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1)),
    "early stopping": lambda path: keras.callbacks.EarlyStopping(
        monitor="val_loss", patience=1, min_delta=1.0, restore_best_weights=True
    ),
    "early stopping by a metric": lambda path: keras.callbacks.EarlyStopping(
        monitor="val_accuracy", patience=1, restore_best_weights=True
    ),
    "swap EMA": lambda path: keras.callbacks.SwapEMAWeights(),
    "checkpoint": lambda path: keras.callbacks.ModelCheckpoint(
        path / "{epoch}.weights.h5", save_weights_only=True
    ),
    "best checkpoint": lambda path: keras.callbacks.ModelCheckpoint(
        path / "{epoch}.keras", save_best_only=True, monitor="val_loss"
    ),
    "nothing": lambda path: keras.callbacks.LambdaCallback(),
}


@pytest.mark.parametrize("case", CASES)
def test_model_and_files_match_fit(case, tmp_path):
    def optimizer():
        return keras.optimizers.SGD(0.1, use_ema=case == "swap EMA", ema_momentum=0.5)

    models, files = {}, {}
    for how in ("fit", "train"):
        folder = tmp_path / how
        folder.mkdir()
        models[how] = run([CASES[case](folder)], how, optimizer=optimizer)
        files[how] = sorted(file.name for file in folder.iterdir())
    for got, expected in zip(
        models["train"].get_weights(), models["fit"].get_weights(), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert files["train"] == files["fit"]
    if case == "best checkpoint":
        name = files["fit"][-1]
        saved = (keras.saving.load_model(tmp_path / how / name) for how in ("train", "fit"))
        for got, expected in zip(*(model.get_weights() for model in saved), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_history_matches_fit():
    histories = {how: keras.callbacks.History() for how in ("fit", "train")}
    for how, history in histories.items():
        run([history], how)
    got, expected = histories["train"].history, histories["fit"].history
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, rel=1e-4), name


def test_backup_is_restored_as_in_fit(tmp_path):
    models, epochs = {}, {}
    for how in ("fit", "train"):
        epochs[how] = []

        def begin(epoch, logs, seen=epochs[how]):
            seen.append(epoch)
            if seen == [0, 1, 2]:
                raise RuntimeError("broken")

        def callbacks(folder=tmp_path / how, begin=begin):
            events = keras.callbacks.LambdaCallback(on_epoch_begin=begin)
            return [keras.callbacks.BackupAndRestore(folder), events]

        with pytest.raises(RuntimeError, match="broken"):
            run(callbacks(), how)
        models[how] = run(callbacks(), how)
    assert epochs["train"] == epochs["fit"] == [0, 1, 2, 2, 3]
    weights = (models[how].get_weights() for how in ("train", "fit"))
    for got, expected in zip(*weights, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert not list(tmp_path.iterdir())  # deleted after success


def test_resumed_run_restores_the_state_of_keras_callbacks(tmp_path, caplog):
    """A run interrupted within an epoch ends exactly like an uninterrupted one."""

    def callbacks(folder, fails=False):
        def end(step, logs):
            heard.append(logs)
            if fails and len(heard) == 8:
                raise RuntimeError("broken")

        heard = []
        stopping = keras.callbacks.EarlyStopping("val_loss", 1.0, 3, restore_best_weights=True)
        rates = keras.callbacks.ReduceLROnPlateau("val_loss", 0.5, patience=2, min_delta=1.0)
        own = [ConsoleLogCallback(), TimerCallback(), LossSmoothCallback(), EarlyStop("val_loss")]
        saved = SaveModelCallback("best", folder / "best.keras")
        events = keras.callbacks.LambdaCallback(on_train_batch_end=end)
        checkpoint = Checkpoint(folder, every_steps=1)
        return heard, [*own, saved, stopping, rates, events, checkpoint]

    caplog.set_level(logging.WARNING)
    whole, given = callbacks(tmp_path / "whole")
    expected = run(given, "train", 6)
    _, given = callbacks(tmp_path / "parts", fails=True)
    with pytest.raises(RuntimeError, match="broken"):
        run(given, "train", 6)
    parts, given = callbacks(tmp_path / "parts")
    model = run(given, "train", 6, resume=tmp_path / "parts")
    assert parts == whole[7:]
    for got, weights in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(got, weights)
    assert not caplog.records


def test_csv_log_has_the_same_rows_as_in_fit(tmp_path):
    rows = {}
    for how in ("fit", "train"):
        run([keras.callbacks.CSVLogger(tmp_path / how)], how)
        with open(tmp_path / how) as file:
            rows[how] = list(csv.DictReader(file))
    assert len(rows["train"]) == len(rows["fit"]) == 4
    for got, expected in zip(rows["train"], rows["fit"], strict=True):
        assert got.keys() == expected.keys()
        for name in got:
            assert float(got[name]) == pytest.approx(float(expected[name]), rel=1e-4)


def test_resumed_run_appends_to_the_csv_log(tmp_path):
    def log(name, *totals):
        for epochs in totals:
            given = [keras.callbacks.CSVLogger(tmp_path / name), Checkpoint(tmp_path / f"{name}.d")]
            run(given, "train", epochs, resume=tmp_path / f"{name}.d")
        return (tmp_path / name).read_text()

    (tmp_path / "parts").write_text("from an earlier run")
    assert log("parts", 2, 2, 3) == log("whole", 3)  # resuming a finished run changes nothing


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_terminate_on_nan_ends_training_as_in_fit():
    batches = {}
    for how in ("fit", "train"):
        recorder = Recorder()
        run([recorder, keras.callbacks.TerminateOnNaN()], how, rate=float("nan"))
        batches[how] = [n for name, n, _ in recorder.heard if name == "on_train_batch_end"]
    # The first loss is finite: it belongs to the weights before the first update.
    assert batches["train"] == batches["fit"] == [[0], [1]]


def test_compiled_model_keeps_its_own_optimizer():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    own = keras.optimizers.SGD()
    model.compile(own, CROSS_ENTROPY)
    trainer = ClassifierTrainer(model, keras.optimizers.Adam(), CROSS_ENTROPY)
    trainer.train([(X, Y)], epochs=1, callbacks=[keras.callbacks.LambdaCallback()])
    assert model.optimizer is own


def test_epoch_level_keras_callbacks_do_not_limit_steps_per_execution(tmp_path):
    class Mine(keras.callbacks.ModelCheckpoint):
        def on_train_batch_end(self, batch, logs=None):
            pass

    every = {
        "ModelCheckpoint": keras.callbacks.ModelCheckpoint(tmp_path / "a.keras"),
        "of one's own": Mine(tmp_path / "a.keras"),
        "by steps": keras.callbacks.ModelCheckpoint(tmp_path / "a.keras", save_freq=5),
        "CSVLogger": keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        "lambda": keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
        "lambda by batch": keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: None),
        "TerminateOnNaN": keras.callbacks.TerminateOnNaN(),
    }
    assert {name: KerasCallback(callback).every_steps for name, callback in every.items()} == {
        "ModelCheckpoint": None,
        "of one's own": 1,
        "by steps": 1,
        "CSVLogger": None,
        "lambda": None,
        "lambda by batch": 1,
        "TerminateOnNaN": 1,
    }


def test_tensorboard_writes_event_files(tmp_path):
    run([keras.callbacks.TensorBoard(tmp_path)], "train", epochs=1)
    assert list(tmp_path.rglob("events*"))


class Tells(keras.callbacks.Callback):
    """Tells which events came, and what the model had."""

    def __init__(self):
        super().__init__()
        self.events = []
        self.histories = []

    def on_epoch_end(self, epoch, logs=None):
        self.events.append(epoch)
        self.histories.append({k: list(v) for k, v in self.model.history.history.items()})

    def on_train_end(self, logs=None):
        self.events.append("end")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_terminate_on_nan_raises_as_in_fit():
    """Callbacks hear no end then, so a backup is kept for the next run."""
    events = {}
    for how in ("fit", "train"):
        tells = Tells()
        with pytest.raises(RuntimeError, match="NaN or Inf loss encountered at batch 1"):
            run([tells, keras.callbacks.TerminateOnNaN(True)], how, rate=float("nan"))
        events[how] = tells.events
    assert events["train"] == events["fit"] == []


def test_callbacks_find_the_history_at_the_model_as_in_fit():
    histories = {}
    for how in ("fit", "train"):
        tells = Tells()
        model = run([tells], how, epochs=3)
        histories[how] = tells.histories
    assert not hasattr(model, "history")
    assert [len(h.get("val_loss", [])) for h in histories["train"]] == [0, 1, 2]
    for got, expected in zip(histories["train"], histories["fit"], strict=True):
        assert got.keys() == expected.keys()
        for name, values in expected.items():
            assert got[name] == pytest.approx(values, rel=1e-4), name


def test_lambda_callbacks_take_any_callable():
    heard = []
    event = functools.partial(lambda number, batch, logs: heard.append(number), 7)
    run([keras.callbacks.LambdaCallback(on_train_batch_end=event)], "train", epochs=1)
    assert heard == [7] * 3


@pytest.mark.parametrize("how", ["fit", "train"])
def test_validation_every_n_epochs_matches_validation_freq(how):
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    history = keras.callbacks.History()
    optimizer = keras.optimizers.SGD(0.1)
    if how == "fit":
        model.compile(optimizer, CROSS_ENTROPY)
        given = {"validation_data": (X, Y), "validation_freq": 2, "shuffle": False}
        model.fit(X, Y, 20, 5, 0, [history], **given)
    else:
        trainer = ClassifierTrainer(model, optimizer, CROSS_ENTROPY)
        validation = ValidationDataCallback([(X, Y)], every_epochs=2)
        trainer.train(from_arrays((X, Y), 20, shuffle=False), 5, [history, validation])
    assert len(history.history["loss"]) == 5
    assert len(history.history["val_loss"]) == 2


def test_a_compiled_model_is_saved_with_its_loss_and_the_optimizer_that_trained_it(tmp_path):
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(), CROSS_ENTROPY, metrics=["accuracy"])
    optimizer = keras.optimizers.Adam(0.25)
    trainer = ClassifierTrainer(model, optimizer, CROSS_ENTROPY)
    callbacks = [keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")]
    trainer.train([(X, Y)], epochs=3, callbacks=callbacks)
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    assert model.get_compile_config()["optimizer"]["class_name"] == "SGD"
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, keras.optimizers.Adam)
    assert isinstance(loaded.loss, keras.losses.SparseCategoricalCrossentropy)
    for got, expected in zip(loaded.optimizer.variables, optimizer.variables, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (got, expected)))
    # Both go on alike.
    model.compile(optimizer, CROSS_ENTROPY)
    for each in (model, loaded):
        each.fit(X, Y, 60, 2, 0)
    for got, expected in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


class Told(keras.metrics.Mean):
    """A user's metric, which tells Keras its direction or not."""

    def __init__(self, name, direction=None):
        super().__init__(name)
        if direction:
            self._direction = direction

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(keras.ops.abs(y_true - y_pred))


@pytest.mark.parametrize(
    ("monitor", "expected"),
    [
        *(("loss", "less"), ("val_loss", "less"), ("val_mean_absolute_error", "less")),
        *(("val_told_error", "greater"), ("told_score", "less"), ("val_r2_score", "greater")),
        *(("val_untold", "ValueError"), ("val_mistyped", "ValueError")),
    ],
)
def test_auto_mode_finds_the_direction_as_in_fit(monitor, expected):
    found = {}
    for how in ("fit", "train"):
        metrics = [
            *(keras.metrics.MeanAbsoluteError(), keras.metrics.R2Score()),
            *(Told("told_error", "up"), Told("told_score", "down"), Told("untold")),
        ]
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
        loss, optimizer = keras.losses.MeanSquaredError(), keras.optimizers.SGD()
        y = Y[:, None].astype("float32")
        stopping = keras.callbacks.EarlyStopping(monitor)
        try:
            if how == "fit":
                model.compile(optimizer, loss, metrics=metrics)
                model.fit(X, y, 60, 1, 0, [stopping], validation_data=(X, y))
            else:
                trainer = ClassifierTrainer(model, optimizer, loss, metrics)
                trainer.train([(X, y)], 1, [stopping, ValidationDataCallback([(X, y)])])
            found[how] = stopping.monitor_op.__name__
        except ValueError as error:
            unknown = "automatically determine" in str(error)
            found[how] = "ValueError" if unknown else str(error)
    assert found == {"fit": expected, "train": expected}


class Overwrites(Callback):
    """Restores a state in which every attribute of the Keras callbacks has a hostile value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def on_epoch_begin(self, epoch):
        for adapter in self.coordinator.callbacks:
            if isinstance(adapter, KerasCallback):
                state = adapter.get_state()
                names = [*vars(adapter.callback), "filepath", "on_epoch_end", "model"]
                state["changed"] = dict.fromkeys(names, self.value)
                adapter.set_state(state)


WRITERS = {
    "ModelCheckpoint": lambda path: keras.callbacks.ModelCheckpoint(path / "a.keras", mode="min"),
    "CSVLogger": lambda path: keras.callbacks.CSVLogger(path / "log.csv"),
    "BackupAndRestore": lambda path: keras.callbacks.BackupAndRestore(
        path / "backup", delete_checkpoint=False
    ),
    "TensorBoard": lambda path: keras.callbacks.TensorBoard(path / "board", write_graph=False),
}


@pytest.mark.parametrize("value", ["elsewhere.keras", ["elsewhere"], 1, None])
@pytest.mark.parametrize("name", WRITERS)
def test_a_restored_state_moves_no_file(name, value, tmp_path, monkeypatch):
    folders = {}
    monkeypatch.chdir(tmp_path)
    for hostile in (False, True):
        path = tmp_path / f"hostile-{hostile}"
        path.mkdir()
        callback = WRITERS[name](path)
        before = {k: v for k, v in vars(callback).items() if isinstance(v, bool | str)}
        # At worst the run ends: TensorBoard is told that it traces, and raises ValueError.
        with contextlib.suppress(TypeError, AttributeError, ValueError):
            run([callback, *[Overwrites(value)] * hostile], "train", epochs=1)
        assert {k: vars(callback)[k] for k in before if k[0] != "_"} == {
            k: v for k, v in before.items() if k[0] != "_"
        }
        files = [file for file in path.rglob("*") if file.is_file()]
        folders[hostile] = sorted(str(f.relative_to(path)).split(".")[0] for f in files)
    assert set(folders[True]) <= set(folders[False]) != set()
    assert {file.name for file in tmp_path.iterdir()} == {"hostile-False", "hostile-True"}


class Counts(keras.callbacks.Callback):
    """A user's callback with a state: numbers, arrays, a string and a function."""

    def __init__(self, count=0):
        super().__init__()
        self.count = count
        self.norms = []
        self.name = "none yet"
        self.made = lambda: None

    def on_epoch_end(self, epoch, logs=None):
        self.count += 1
        self.norms.append(np.array([logs["loss"], epoch]))
        self.name = f"epoch {epoch}"


def test_resuming_restores_numbers_and_arrays_and_warns_of_strings(tmp_path, caplog):
    first, second = Counts(), Counts()
    run([first, Checkpoint(tmp_path)], "train", 2)
    run([second, Checkpoint(tmp_path)], "train", 4, resume=tmp_path)
    assert second.count == 4
    np.testing.assert_array_equal(second.norms[:2], first.norms)
    assert "Counts changed its attributes ['name'] during the run" in caplog.text


def test_resuming_with_other_keras_callbacks_warns(tmp_path, caplog):
    run([Counts(), Checkpoint(tmp_path)], "train", 2)
    stopping = keras.callbacks.EarlyStopping("loss")
    run([stopping, Checkpoint(tmp_path)], "train", 3, resume=tmp_path)
    assert "has the state of a 'Counts' where this run has EarlyStopping" in caplog.text


def test_ignored_test_batch_events_warn(caplog):
    class Hears(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            pass

    run([Hears()], "train", epochs=2)
    assert caplog.text.count("Hears.on_test_batch_end is not called in train") == 1
