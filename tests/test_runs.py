"""Run directories: all that a run leaves behind, after a crash as well."""

import json
import logging
import shutil
import sys
import warnings

import keras
import numpy as np
import pytest

from polus.callbacks import Callback, ValidationDataCallback
from polus.checkpoint import Checkpoint
from polus.data import from_arrays
from polus.history import History
from polus.runs import read_history
from polus.runs.directory import RunDirectory
from polus.runs.history_file import HistoryFile
from polus.training import BaseTrainer, ClassifierTrainer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 3)).astype("float32")
Y = RNG.integers(0, 2, 32).astype("int32")
EPOCHS = 3


class Own(keras.layers.Layer):
    """A layer that Keras can't save: it has no configuration for its argument."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, x):
        return x * self.factor.real

    def get_config(self):
        raise NotImplementedError("no configuration")


def make_trainer(*extra):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), *extra])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    return ClassifierTrainer(model, keras.optimizers.Adam(0.1), loss, metrics)


def validation():
    return ValidationDataCallback(from_arrays((X[:8], Y[:8]), 8))


def run(folder, *callbacks, epochs=EPOCHS, trainer=None):
    trainer = trainer or make_trainer()
    data = from_arrays((X, Y), 4, shuffle=True)
    history = trainer.train(data, epochs, [validation(), *callbacks], run_dir=folder)
    return trainer, history


class Crash(Callback):
    """Ends the run by an error after a step."""

    def __init__(self, epoch, step):
        super().__init__()
        self.place = epoch, step

    def on_train_batch_end(self, epoch, step, loss):
        if (epoch, step) == self.place:
            raise RuntimeError("a crash")


def assert_same(history, other):
    for name, values in other.steps.items():
        np.testing.assert_array_equal(history.steps[name], values, err_msg=name)
    assert history.epochs == other.epochs
    assert history.validations == other.validations


def test_a_run_leaves_record_parts_messages_checkpoints_and_best_model(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    best = []

    class Weights(Callback):
        def on_epoch_end(self, epoch):
            logs = self.coordinator.logs
            best.append((logs["val_loss"], self.coordinator.trainer.model.get_weights()))

    trainer, history = run(tmp_path / "a", Weights())
    assert_same(read_history(tmp_path / "a"), history)
    assert read_history(tmp_path / "a" / "history.jsonl").record == history.record
    facts = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (facts["status"], facts["epochs_done"]) == ("completed", EPOCHS)
    model = keras.saving.deserialize_keras_object(facts["models"][trainer.model.name])
    assert [w.shape for w in model.weights] == [w.shape for w in trainer.model.weights]
    rate = facts["optimizers"]["optimizer"]["config"]["learning_rate"]
    assert rate == pytest.approx(0.1)
    assert facts["data"]["batch"] == ["float32 [4, 3]", "int32 [4]"]
    assert "ValidationDataCallback" in [callback["class"] for callback in facts["callbacks"]]
    (start,) = facts["starts"]
    assert start["command"][1:] == sys.argv
    assert start["environment"]["backend"] == keras.config.backend()
    assert {"commit", "clean"} == set(start["git"] or {"commit": "", "clean": True})
    assert "Training all 2 trainable variables" in (tmp_path / "a" / "log.txt").read_text()
    saved = keras.models.load_model(tmp_path / "a" / "best.keras")
    _, weights = min(best, key=lambda pair: pair[0])
    for a, b in zip(saved.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert list((tmp_path / "a" / "checkpoints").iterdir())
    handlers = logging.getLogger("polus").handlers
    assert not any(isinstance(handler, logging.FileHandler) for handler in handlers)


def test_a_crashed_run_is_whole_up_to_its_last_step_and_continues(tmp_path):
    _, expected = run(tmp_path / "whole")
    folder = tmp_path / "crashed"
    rhythm = Checkpoint(folder / "checkpoints", every_steps=3)
    with pytest.raises(RuntimeError, match="a crash"):
        run(folder, rhythm, Crash(1, 4))
    record = read_history(folder)
    assert record.steps["step"].tolist() == [*range(8), *range(5)]
    np.testing.assert_allclose(record.steps["loss"], expected.steps["loss"][:13], rtol=1e-6)
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"steps": {"epo')  # half a line: the machine went down
    assert len(read_history(folder).steps["loss"]) == 13
    _, history = run(folder, Checkpoint(folder / "checkpoints", every_steps=3))
    assert_same(read_history(folder), history)
    np.testing.assert_allclose(history.steps["loss"], expected.steps["loss"], rtol=1e-6)
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["status"], len(facts["starts"])) == ("completed", 2)


def test_the_same_command_continues_and_a_finished_run_stays(tmp_path):
    run(tmp_path / "a", epochs=2)
    _, longer = run(tmp_path / "a", epochs=3)
    _, whole = run(tmp_path / "b", epochs=3)
    np.testing.assert_allclose(longer.steps["loss"], whole.steps["loss"], rtol=1e-6)
    before = (tmp_path / "a" / "history.jsonl").read_bytes()
    run(tmp_path / "a", epochs=3)
    assert (tmp_path / "a" / "history.jsonl").read_bytes() == before


class Remove(Callback):
    """Removes a folder when the second epoch begins."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_epoch_begin(self, epoch):
        if epoch == 1:
            shutil.rmtree(self.folder)


def test_a_run_whose_folder_is_removed_trains_to_its_end(tmp_path):
    _, history = run(tmp_path / "a", Remove(tmp_path / "a"))
    assert len(history.epochs) == EPOCHS
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "completed"


def test_a_loss_that_is_a_lambda_warns_of_nothing(tmp_path):
    trainer = make_trainer()
    keras_loss = trainer.loss
    trainer.loss = lambda y, logits: keras_loss(y, logits)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        run(tmp_path, trainer=trainer, epochs=1)
    assert not [warning for warning in seen if "lambda" in str(warning.message)]


def test_a_model_that_keras_cannot_save_leaves_its_weights(tmp_path, caplog):
    trainer, _ = run(tmp_path, trainer=make_trainer(Own(2.0)), epochs=1)
    assert "can't be saved whole" in caplog.text
    other = make_trainer(Own(2.0)).model
    other.load_weights(tmp_path / "best.weights.h5")
    for a, b in zip(other.get_weights(), trainer.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class Steps(BaseTrainer):
    def forward_with_grads(self, x, y):
        return y, self.model(x)


def test_an_own_trainer_without_validation_keeps_no_best_model(tmp_path):
    trainer = Steps(make_trainer().model, keras.optimizers.SGD(0.1), lambda y, p: p[0, 0] * 0)
    history = trainer.train(from_arrays((X, Y), 4), 1, run_dir=tmp_path)
    assert_same(read_history(tmp_path), history)
    assert not list(tmp_path.glob("best*"))


@pytest.mark.once
def test_a_process_that_starts_within_recorded_steps_replaces_the_rest_of_them(tmp_path):
    for start, losses in ((0, [4.0, 3.0, 2.0, 1.0]), (2, [2.5])):
        file = HistoryFile(tmp_path / "history.jsonl", 0, start)
        file.add_steps(0, start, {"loss": np.array(losses, np.float32)})
        file.close()
    assert read_history(tmp_path).steps["loss"].tolist() == [4.0, 3.0, 2.5]


@pytest.mark.once
def test_values_that_json_has_no_numbers_for(tmp_path):
    file = HistoryFile(tmp_path / "history.jsonl", 0, 0)
    values = np.array([0.1, np.nan, np.inf, -np.inf], np.float32)
    file.add_steps(0, 0, {"loss": values})
    file.end_epoch(0, {"loss": float("nan"), "matrix": np.eye(2)}, {"secs": np.inf}, 2.0)
    file.close()
    history: History = read_history(tmp_path)
    np.testing.assert_array_equal(history.steps["loss"], values)
    assert np.isnan(history.epochs[0]["loss"])
    np.testing.assert_array_equal(history.epochs[0]["matrix"], np.eye(2))
    assert history.record[0]["secs"] == np.inf
    for line in (tmp_path / "history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.once
def test_a_line_of_another_file_raises(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"start": {"epoch": 0, "step": 0}}\n[1]\n')
    with pytest.raises(ValueError, match=r"history\.jsonl: line 2"):
        read_history(tmp_path)


@pytest.mark.once
@pytest.mark.parametrize("given", [{"resume": "b"}, {"callbacks": [Checkpoint("b")]}], ids=list)
def test_checkpoints_elsewhere_raise(tmp_path, given):
    with pytest.raises(ValueError, match="continues from there"):
        make_trainer().train(from_arrays((X, Y), 4), 1, run_dir=tmp_path, **given)


def test_a_folder_that_cannot_be_written_raises_before_the_first_step(
    tmp_path, monkeypatch, caplog
):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("polus.runs.directory.tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"can't be written to: .*denied. Pass another folder"):
        run(tmp_path / "a")
    assert "NO CHECKPOINT" not in caplog.text


def test_a_record_elsewhere_raises(tmp_path):
    with pytest.raises(ValueError, match="a RunDirectory of another folder"):
        run(tmp_path / "a", RunDirectory(tmp_path / "b"))
    assert not list(tmp_path.iterdir())
