"""Every Keras callback, alone and in pairs, does in `train` what it does in `fit`.

Both train the same model on the same batches. Compared are the epochs that ran, the history, the
weights, all files that the callbacks wrote, what they printed or sent, and their warnings.
"""

import csv
import json
import re
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import polus.core
from polus.callbacks import ValidationDataCallback
from polus.data import from_arrays
from polus.training import ClassifierTrainer

EPOCHS = 4
X = np.random.default_rng(3).normal(size=(32, 4)).astype("float32")
Y = (X @ np.array([1.0, -2.0, 0.5, 3.0], "float32"))[:, None]


@keras.saving.register_keras_serializable("polus-tests")
class Closeness(keras.metrics.Mean):
    """A user's metric that tells Keras its direction, against what its name suggests."""

    def __init__(self, name="closeness_error", **kwargs):
        super().__init__(name, **kwargs)
        self._direction = "up"

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(1 / (1 + ops.abs(y_true - y_pred)), sample_weight)


class WritesScore(keras.callbacks.Callback):
    """A user's validation score, best after the first epoch."""

    def on_epoch_end(self, epoch, logs=None):
        logs["val_score"] = 1 / (1 + epoch)

    def on_train_batch_end(self, batch, logs=None):
        logs["seen"] = batch


class Records(keras.callbacks.Callback):
    """Records all events with their logs, in a file beside those of the other callbacks."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.rows = []

    def __getattribute__(self, name):
        if not name.startswith("on_") or "test_batch" in name or "predict" in name:
            return super().__getattribute__(name)

        def record(*args, logs=None):
            numbers = [arg for arg in args if isinstance(arg, int)]
            given = args[-1] if args and isinstance(args[-1], dict) else logs
            self.rows.append([name, numbers, given or {}])
            if name == "on_train_end":
                self.path.write_text(json.dumps(self.rows))

        return record

    def on_train_batch_end(self, batch, logs=None):
        """Overridden, as Keras and Polus find out by looking."""


K = keras.callbacks
CALLBACKS = {
    # Those that change the logs, the weights or the rate, and those that end training.
    "WritesScore": lambda path: WritesScore(),
    "LearningRateScheduler": lambda path: K.LearningRateScheduler(lambda epoch, rate: rate / 2),
    "ReduceLROnPlateau": lambda path: K.ReduceLROnPlateau("loss", 0.5, 1, min_delta=100.0),
    "SwapEMAWeights": lambda path: K.SwapEMAWeights(),
    "SwapEMAWeights(swap_on_epoch)": lambda path: K.SwapEMAWeights(swap_on_epoch=True),
    "EarlyStopping": lambda path: K.EarlyStopping(
        "val_loss", min_delta=100.0, patience=2, restore_best_weights=True
    ),
    "EarlyStopping(metric)": lambda path: K.EarlyStopping("val_closeness_error", 1.0, patience=1),
    "EarlyStopping(score)": lambda path: K.EarlyStopping("val_score", mode="max", patience=2),
    "TerminateOnNaN": lambda path: K.TerminateOnNaN(),
    # Those that write what they hear.
    "CSVLogger": lambda path: K.CSVLogger(path / "log.csv"),
    "ModelCheckpoint": lambda path: K.ModelCheckpoint(path / "{epoch}.keras"),
    "ModelCheckpoint(best by metric)": lambda path: K.ModelCheckpoint(
        path / "closest-{epoch}.weights.h5",
        "val_closeness_error",
        save_best_only=True,
        save_weights_only=True,
    ),
    "ModelCheckpoint(best by score)": lambda path: K.ModelCheckpoint(
        path / "best.keras", "val_score", mode="max", save_best_only=True
    ),
    "ModelCheckpoint(by steps)": lambda path: K.ModelCheckpoint(
        path / "{epoch}-{batch}-{mean_absolute_error:.3f}.weights.h5",
        save_weights_only=True,
        save_freq=3,
    ),
    "BackupAndRestore": lambda path: K.BackupAndRestore(
        path / "backup", save_freq=3, delete_checkpoint=False
    ),
    "TensorBoard": lambda path: K.TensorBoard(path / "board", histogram_freq=2),
    "TensorBoard(by steps)": lambda path: K.TensorBoard(path / "steps", update_freq=2),
    "LambdaCallback": lambda path: K.LambdaCallback(
        on_epoch_end=lambda epoch, logs: (path / f"{epoch}.json").write_text(json.dumps(logs))
    ),
    "Records": lambda path: Records(path / "events.json"),
    "History": lambda path: K.History(),
    "ProgbarLogger": lambda path: K.ProgbarLogger(),
    "RemoteMonitor": lambda path: K.RemoteMonitor(),
}


class Side:
    """One of `fit` and `train`: a model that is compiled once, and starts anew for each case."""

    def __init__(self, how, use_ema):
        keras.utils.set_random_seed(5)
        self.how = how
        layers = [keras.Input((4,)), keras.layers.Dense(1, name="dense")]
        self.model = keras.Sequential(layers, name="model")
        self.optimizer = keras.optimizers.SGD(0.05, momentum=0.5, use_ema=use_ema, ema_momentum=0.5)
        loss = keras.losses.MeanSquaredError()
        jit = keras.config.backend() == "jax"
        # The trainer's model is its user's, who compiled it as well.
        metrics = [keras.metrics.MeanAbsoluteError(), Closeness()]
        self.model.compile(self.optimizer, loss, metrics=metrics, jit_compile=jit)
        if how == "train":
            metrics = [keras.metrics.MeanAbsoluteError(), Closeness()]
            self.trainer = ClassifierTrainer(self.model, self.optimizer, loss, metrics)
        self.optimizer.build(self.model.trainable_variables)
        self.variables = [*self.model.variables, *self.optimizer.variables]
        self.initial = [np.array(ops.convert_to_numpy(v)) for v in self.variables]

    def run(self, names, folder):
        """Trains with the callbacks of these names; returns what is compared."""
        for variable, value in zip(self.variables, self.initial, strict=True):
            variable.assign(value)
        history = keras.callbacks.History()
        callbacks = [*(CALLBACKS[name](folder) for name in names), history]
        x, y = X[:24], Y[:24]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            if self.how == "fit":
                validation = (X[24:], Y[24:])
                self.model.fit(
                    *(x, y, 8, EPOCHS, int("ProgbarLogger" in names), callbacks),
                    validation_data=validation,
                    validation_batch_size=4,
                    validation_freq=1,
                    shuffle=False,
                )
                epochs = [
                    {"epoch": epoch, **{name: v[i] for name, v in history.history.items()}}
                    for i, epoch in enumerate(history.epoch)
                ]
            else:
                validation = from_arrays((X[24:], Y[24:]), 4, shuffle=False)
                data = from_arrays((x, y), 8, shuffle=False)
                own = [ValidationDataCallback(validation)]
                epochs = self.trainer.train(data, EPOCHS, [*callbacks, *own]).epochs
        return {
            "epochs": epochs,
            "keras history": history.history,
            "weights": self.model.get_weights(),
            "warnings": [str(w.message).split("Available")[0] for w in caught],
            "files": {
                str(path.relative_to(folder)): contents(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file() and "tfevents" not in path.name
            },
            "events": {
                str(path.relative_to(folder).parent): scalars(path)
                for path in sorted(folder.rglob("*tfevents*"))
            },
        }


def contents(path: Path):
    """What a file holds, in a form that `assert_equal` compares with a tolerance."""
    if path.suffix == ".csv":
        return [
            {name: value if value == "NA" else float(value) for name, value in row.items()}
            for row in csv.DictReader(path.read_text().splitlines())
        ]
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".keras":
        model = keras.saving.load_model(path)
        config = model.get_compile_config()
        optimizer = [ops.convert_to_numpy(v) for v in model.optimizer.variables]
        kinds = [config[name]["class_name"] for name in ("optimizer", "loss")]
        return [kinds, model.get_weights(), optimizer]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.load_weights(path)
    return model.get_weights()


def scalars(path: Path):
    """The scalars of a TensorBoard file, without those that are times."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found = []
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars":
                array = tensor_util.make_ndarray(value.tensor)
                found.append([value.tag, event.step, float(array)])
            elif value.tag != "keras":
                found.append([value.tag, event.step])
    return sorted(found)


def assert_equal(got, expected, where):
    """Compares nested values, numbers with a tolerance."""
    if isinstance(expected, dict):
        assert sorted(got) == sorted(expected), where
        for name, value in expected.items():
            assert_equal(got[name], value, f"{where}, {name}")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), (where, got, expected)
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_equal(one, other, f"{where}, {i}")
    elif isinstance(expected, str | None):
        assert got == expected, where
    else:
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=where)


def printed(text: str):
    """The last state of each line of a progress bar, without times, its values in order of name."""
    lines = [re.split(r"[\b\r]+", line.rstrip())[-1] for line in text.split("\n")]
    lines = [re.sub(r"\d+\w?s( \d+\w?s/(step|epoch))?|\x1b\[[\d;]*m", "", line) for line in lines]
    return [sorted(map(str.strip, line.split(" - "))) for line in lines]


@pytest.fixture(scope="module")
def sides():
    polus.core.set_jit_compile(keras.config.backend() == "jax")
    yield {(how, ema): Side(how, ema) for how in ("fit", "train") for ema in (False, True)}
    polus.core.set_jit_compile("auto")


@pytest.fixture
def compare(sides, tmp_path, capsys, monkeypatch):
    """Trains on both sides with the callbacks of some names and compares."""

    def run(*names):
        results = {}
        for how in ("fit", "train"):
            sent = []
            monkeypatch.setattr("requests.post", lambda *args, sent=sent, **kw: sent.append(args))
            folder = tmp_path / "-".join(map(str, (how, *names)))
            folder.mkdir()
            ema = any("EMA" in name for name in names)
            results[how] = sides[how, ema].run(names, folder)
            results[how]["sent"] = [[url, json.loads(data["data"])] for url, data in sent]
            results[how]["printed"] = printed(capsys.readouterr().out)
        assert_equal(results["train"], results["fit"], f"{names}")
        return results["train"]

    return run


@pytest.mark.parametrize("name", CALLBACKS)
def test_callback_alone(name, compare):
    compare(name)


NAMES = list(CALLBACKS)
WRITERS = NAMES[NAMES.index("CSVLogger") :]  # of files: none changes what another one does


def in_pairs():
    """All pairs on one backend, and on each those with a callback that sets weights."""
    for name in NAMES[: -len(WRITERS)]:
        marks = [] if "EMA" in name or name == "EarlyStopping" else pytest.mark.once
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("first", list(in_pairs()))
def test_callback_in_front_of_each_other_one(first, compare):
    for second in NAMES[NAMES.index(first) + 1 :]:
        if (first, second) != (
            "SwapEMAWeights",
            "SwapEMAWeights(swap_on_epoch)",
        ):  # undo each other
            compare(first, second)


def test_all_writers_together(compare):
    compare(*WRITERS)


def test_values_are_seen_only_behind_the_callback_that_wrote_them(compare):
    epochs = [
        {"learning_rate", "val_score"} <= row.keys()
        for row in compare("WritesScore", "LearningRateScheduler")["epochs"]
    ]
    assert epochs == [True] * EPOCHS
    assert len(compare("WritesScore", "EarlyStopping(score)")["epochs"]) == 3
    assert len(compare("EarlyStopping(score)", "WritesScore")["epochs"]) == EPOCHS
    log = compare("CSVLogger", "LearningRateScheduler")["files"]["log.csv"]
    assert "learning_rate" not in log[0]
