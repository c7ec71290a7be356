"""What a run leaves behind can be read in every form, and lazily."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from polus import history as history_module
from polus.history import History


class Lazy:
    """Stands for values on a device: says when they are read."""

    def __init__(self, values):
        self.values = values
        self.was_read = False

    def __array__(self, dtype=None, copy=None):
        self.was_read = True
        return np.array(self.values, dtype=dtype)


def recorded() -> History:
    history = History()
    history.add_steps(0, 0, {"loss": np.float32([3, 2]), "term": np.float32([1, 0.5])})
    history.add_validation(0, 1, "val", {"f1": 0.5})
    history.add_steps(0, 2, {"loss": 1.0, "term": 0.25})
    history.add_validation(0, 2, "val", {"f1": 0.75})
    history.end_epoch(0, {"loss": 2.0, "accuracy": 0.5})
    history.add_steps(1, 0, {"loss": np.float32([0.5])})
    history.end_epoch(1, {"loss": 0.5, "accuracy": 0.75})
    return history


def test_steps_are_columns():
    steps = recorded().steps
    assert steps["loss"].dtype == np.float32
    np.testing.assert_array_equal(steps["epoch"], [0, 0, 0, 1])
    np.testing.assert_array_equal(steps["step"], [0, 1, 2, 0])
    np.testing.assert_array_equal(steps["loss"], [3, 2, 1, 0.5])
    np.testing.assert_array_equal(steps["term"], [1, 0.5, 0.25, np.nan])


def test_the_steps_of_the_newest_epoch_are_its_rows_of_all_steps():
    for all_read_between in (False, True):
        history = recorded()
        history.add_steps(2, 0, {"loss": np.float32([9, 8]), "new": np.float32([1, 2])})
        if all_read_between:  # and so joined with the epochs before
            _ = history.steps
        history.add_steps(2, 2, {"loss": 7.0})
        newest = history.steps_of(2)
        np.testing.assert_array_equal(newest["step"], [0, 1, 2])
        np.testing.assert_array_equal(newest["loss"], [9, 8, 7])
        np.testing.assert_array_equal(newest["new"], [1, 2, np.nan])
        np.testing.assert_array_equal(history.steps["loss"], [3, 2, 1, 0.5, 9, 8, 7])
    history = recorded()
    assert len(history.steps_of(2)["step"]) == len(History().steps_of(0)["step"]) == 0


def test_epochs_have_logs_and_the_last_validation():
    history = recorded()
    assert history.epochs == [
        {"epoch": 0, "loss": 2.0, "accuracy": 0.5, "val_f1": 0.75},
        {"epoch": 1, "loss": 0.5, "accuracy": 0.75},
    ]
    assert history.validations[0] == (0, 1, "val", {"f1": 0.5})
    assert [v.step for v in history.validations] == [1, 2]


def test_nothing_is_read_before_somebody_asks():
    history, losses = History(), Lazy([1.0, 2.0])
    history.add_steps(0, 0, {"loss": losses})
    assert not losses.was_read
    np.testing.assert_array_equal(history.steps["loss"], [1, 2])


def test_many_unread_entries_are_read_oldest_first(monkeypatch):
    monkeypatch.setattr(history_module, "MAX_UNREAD", 10)
    history, losses = History(), [Lazy(float(i)) for i in range(12)]
    for step, loss in enumerate(losses):
        history.add_steps(0, step, {"loss": loss})
    assert [loss.was_read for loss in losses] == [True] * 5 + [False] * 7
    np.testing.assert_array_equal(history.steps["loss"], np.arange(12))


def test_tensors_of_the_backend_are_read():
    history = History()
    history.add_steps(0, 0, {"loss": ops.cast([1.5, 2.5], "bfloat16")})
    history.add_steps(0, 2, {"loss": keras.Variable(3.5)})
    history.add_validation(0, 2, "val", {"f1": ops.convert_to_tensor(0.5)})
    np.testing.assert_array_equal(history.steps["loss"], [1.5, 2.5, 3.5])
    assert type(history.validations[0].results["f1"]) is float


def test_to_dict_and_to_frame():
    history = recorded()
    epochs = history.to_dict()
    assert epochs["epoch"] == [0, 1]
    np.testing.assert_array_equal(epochs["val_f1"], [0.75, np.nan])
    frame = history.to_frame("step")
    assert list(frame.columns) == ["epoch", "step", "loss", "term"]
    np.testing.assert_array_equal(frame["loss"], history.to_dict("step")["loss"])
    assert history.to_frame().shape == (2, 4)
    with pytest.raises(ValueError, match="but got 'batch'"):
        history.to_dict("batch")


def test_state_survives_json_and_arrays():
    history, restored = recorded(), History()
    restored.add_steps(5, 0, {"loss": 9.0})
    state = history.get_state()
    arrays = state.pop("steps")
    restored.set_state(json.loads(json.dumps(state)) | {"steps": arrays})
    assert repr(restored) == repr(history)
    assert restored.epochs == history.epochs
    assert restored.validations == history.validations
    restored.add_steps(1, 1, {"loss": 0.25})
    np.testing.assert_array_equal(restored.steps["loss"], [3, 2, 1, 0.5, 0.25])
    np.testing.assert_array_equal(history.steps["loss"], [3, 2, 1, 0.5])


def test_repr_is_a_table():
    assert repr(recorded()).splitlines() == [
        "History of 2 epochs, 4 steps",
        "epoch    loss  accuracy  val_f1",
        "    0       2       0.5    0.75",
        "    1     0.5      0.75     nan",
    ]
    assert repr(History()) == "History of 0 epochs, 0 steps"
    long = History()
    for epoch in range(40):
        long.end_epoch(epoch, {"loss": 1.0})
    assert len(repr(long).splitlines()) == 13


def test_plot_draws_losses_above_metrics(tmp_path):
    figure = recorded().plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    above, below = figure.axes
    assert above.get_legend_handles_labels()[1] == ["loss", "term"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in below.get_lines()}
    assert lines["val_f1"] == [[2, 0.5], [3, 0.75]]  # x: steps done by then
    assert lines["accuracy"] == [[3, 0.5], [4, 0.75]]


def test_plot_puts_a_validation_loss_beside_the_loss():
    history = recorded()
    history.add_validation(1, 0, "val", {"loss": 0.4})
    above, below = history.plot().axes
    assert "val_loss" in above.get_legend_handles_labels()[1]
    assert "val_loss" not in below.get_legend_handles_labels()[1]


def test_plot_of_nothing_and_of_one_nan():
    with pytest.raises(ValueError, match="no step was recorded"):
        History().plot()
    history = History()
    history.add_steps(0, 0, {"loss": np.nan})
    assert len(history.plot().axes) == 1


def test_optional_packages_are_asked_for_by_name(monkeypatch):
    for package in ("pandas", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install pandas"):
        recorded().to_frame()
    with pytest.raises(ImportError, match=r"pip install polus\[plot\]"):
        recorded().plot()


def test_import_needs_neither_pandas_nor_matplotlib():
    # Keras itself imports both where they are installed, so whether they are loaded tells nothing.
    code = "import sys; sys.modules.update(pandas=None, matplotlib=None); import polus.history"
    subprocess.run([sys.executable, "-c", code], check=True)
