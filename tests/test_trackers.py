"""What trackers are told, read back with their own libraries."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from polus.callbacks import Callback, TensorBoardLog, ValidationDataCallback
from polus.checkpoint import Checkpoint
from polus.data import from_arrays
from polus.training import ClassifierTrainer

pytest.importorskip("tensorboard")

X = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


def train(*callbacks, epochs=2, **arguments):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    trainer = ClassifierTrainer(model, keras.optimizers.Adam(0.1), loss, metrics)
    held_out = ValidationDataCallback(from_arrays((X, Y), 8, shuffle=False))
    return trainer.train(from_arrays((X, Y), 4), epochs, [*callbacks, held_out], **arguments)


def scalars(folder):
    """The scalars as TensorBoard reads them: by tag, the steps and values."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), {"scalars": 0}).Reload()
    found = {}
    for tag in read.Tags()["scalars"]:
        events = read.Scalars(tag)
        found[tag] = [e.step for e in events], np.array([e.value for e in events], np.float32)
    return found


class Stop(Callback):
    """Ends the run by an error after a step."""

    def on_train_batch_end(self, epoch, step, loss):
        if (epoch, step) == (1, 3):
            raise RuntimeError("a crash")


def test_tensorboard_reads_what_the_history_has(tmp_path):
    history = train(TensorBoardLog(tmp_path / "board"))
    read = scalars(tmp_path / "board")
    assert read.keys() == {
        "steps/loss",
        *(f"epochs/{n}" for n in history.epochs[0] if n != "epoch"),
    }
    assert read["steps/loss"][0] == list(range(12))
    np.testing.assert_array_equal(read["steps/loss"][1], history.steps["loss"])
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        steps, values = read[f"epochs/{name}"]
        assert steps == [0, 1]
        np.testing.assert_allclose(values, [logs[name] for logs in history.epochs], rtol=1e-6)


def test_tensorboard_leaves_out_logs_that_are_no_numbers(tmp_path):
    class Note(Callback):
        def on_epoch_end(self, epoch):
            self.coordinator.logs.update(note="warm", nothing=None, size=3)

    train(Note(), TensorBoardLog(tmp_path / "board"))
    read = scalars(tmp_path / "board")
    assert "epochs/size" in read
    assert not {"epochs/note", "epochs/nothing"} & read.keys()


def test_a_resumed_run_replaces_what_was_written_after_its_checkpoint(tmp_path):
    def callbacks(began):
        now = iter(range(began, began + 999))  # each write is due
        log = TensorBoardLog(tmp_path / "board", clock=lambda: float(next(now)))
        return [log, Checkpoint(tmp_path / "a", every_steps=2)]

    with pytest.raises(RuntimeError, match="a crash"):
        train(*callbacks(1000), Stop(), resume=tmp_path / "a")
    history = train(*callbacks(2000), resume=tmp_path / "a")
    read = scalars(tmp_path / "board")
    assert read["steps/loss"][0] == list(range(12))
    np.testing.assert_array_equal(read["steps/loss"][1], history.steps["loss"])
    assert len(list((tmp_path / "board").iterdir())) == 2


@pytest.mark.filterwarnings("ignore")  # those of these libraries
def test_weights_and_biases_offline(tmp_path):
    wandb = pytest.importorskip("wandb")
    from wandb.integration.keras import WandbMetricsLogger

    run = wandb.init(project="polus", mode="offline", dir=tmp_path)
    history = train(WandbMetricsLogger(log_freq=1))
    summary = dict(run.summary)
    run.finish()
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert summary[f"epoch/{name}"] == pytest.approx(history.epochs[-1][name], rel=1e-6)
    assert summary["batch/batch_step"] == 11
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.filterwarnings("ignore")
def test_mlflow_offline(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with mlflow.start_run() as run:
        history = train(mlflow.keras.MlflowCallback())
    client = mlflow.MlflowClient()
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        values = [each.value for each in client.get_metric_history(run.info.run_id, name)]
        assert values == pytest.approx([logs[name] for logs in history.epochs], rel=1e-6)


@pytest.mark.once
def test_without_tensorboard_the_message_says_how_to_install_it():
    code = "import sys; sys.modules['tensorboard'] = None; import polus; polus.TensorBoardLog('a')"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TensorBoardLog requires tensorboard. Run `pip install" in process.stderr
