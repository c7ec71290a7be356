"""The history can be read in every form, reads the device lazily, and stays small."""

import json
import subprocess
import sys
import tracemalloc

import keras
import numpy as np
import pytest
from keras import ops

from polus import figures
from polus import history as history_module
from polus.data import from_arrays
from polus.history import History
from polus.training import ClassifierTrainer


class Lazy:
    """Stands for values on a device and records whether they were read."""

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


def test_steps_of_returns_the_terms_of_the_newest_epoch():
    history = recorded()
    history.add_steps(2, 0, {"loss": np.float32([9, 8]), "new": np.float32([1, 2])})
    history.add_steps(2, 2, {"loss": 7.0})
    newest = history.steps_of(2)
    np.testing.assert_array_equal(newest["loss"], [9, 8, 7])
    np.testing.assert_array_equal(newest["new"], [1, 2, np.nan])
    np.testing.assert_array_equal(newest["term"], [np.nan] * 3)
    with pytest.raises(ValueError, match="read-only"):
        newest["loss"][0] = 0
    np.testing.assert_array_equal(history.steps["loss"], [3, 2, 1, 0.5, 9, 8, 7])
    assert len(recorded().steps_of(2)["loss"]) == 0
    assert History().steps_of(0) == {}


def test_steps_are_numbered_within_epochs_that_were_recorded_in_parts():
    history = History()
    for epoch, first_step, count in [(0, 0, 3), (0, 3, 1), (1, 2, 2), (1, 7, 1), (3, 0, 2)]:
        history.add_steps(epoch, first_step, {"loss": np.zeros(count, "float32")})
    assert history.steps["epoch"].tolist() == [0, 0, 0, 0, 1, 1, 1, 3, 3]
    assert history.steps["step"].tolist() == [0, 1, 2, 3, 2, 3, 7, 0, 1]


def test_changing_the_returned_steps_does_not_change_the_history():
    history = recorded()
    history.steps["loss"][:] = 0
    np.testing.assert_array_equal(history.steps["loss"], [3, 2, 1, 0.5])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float64([0.1]), "float64"),
        (np.float32([0.1]), "float32"),
        (np.float16([0.1]), "float32"),
        (np.int32([1]), "float64"),  # float32 has no odd numbers above 2**24
        (0.1, "float32"),  # a Python number says nothing about the precision of the loss
        ([0.1], "float32"),
    ],
)
def test_terms_keep_their_precision(values, expected):
    history = History()
    history.add_steps(0, 0, {"loss": values})
    assert history.steps["loss"].dtype == expected


def test_a_float64_term_after_float32_steps_keeps_its_precision():
    history = History()
    history.add_steps(0, 0, {"loss": np.float32(0.1)})
    history.add_steps(0, 1, {"loss": np.float64(0.1)})
    history.add_steps(0, 2, {"loss": np.float32(0.1)})
    history.add_steps(0, 3, {"loss": 0.1})
    expected = [np.float32(0.1), 0.1, np.float32(0.1), 0.1]
    np.testing.assert_array_equal(history.steps["loss"], expected)


@pytest.mark.parametrize("floatx", ["float32", "float64"])
def test_losses_of_a_run_keep_the_precision_of_the_model(floatx):
    if keras.config.backend() == "jax" and floatx == "float64":
        import jax

        if not jax.config.jax_enable_x64:
            pytest.skip("JAX computes in float32 unless jax_enable_x64 is set")
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(floatx)  # another test has made a layer, which fixes it
    try:
        x, y = np.linspace(0, 1, 12).reshape(6, 2), np.full((6, 1), 1 / 3)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype=floatx)])
        # Keras computes its loss classes, `ops.mean` and `ops.matmul` in float32 on PyTorch: it
        # promotes no type to float64 there. A sum keeps the type that it is given.
        trainer = ClassifierTrainer(
            model, keras.optimizers.SGD(0.0), lambda y, p: ops.sum(ops.square(y - p)) / 2
        )
        history = trainer.train(from_arrays((x, y), 2, shuffle=False), epochs=1)
        # The model's own output: for the same reason it is not exactly that of NumPy.
        predicted = ops.convert_to_numpy(model(x)).astype("float64")
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy(policy)
    errors = (predicted - y).reshape(3, 2) ** 2
    assert history.steps["loss"].dtype == floatx
    tolerance = 1e-14 if floatx == "float64" else 1e-5
    np.testing.assert_allclose(history.steps["loss"], errors.mean(1), rtol=tolerance)
    np.testing.assert_allclose(history.epochs[0]["loss"], errors.mean(), rtol=tolerance)


@pytest.mark.parametrize("block", [2**16, 7])
def test_epoch_means_are_weighted_by_batch_size(monkeypatch, block):
    monkeypatch.setattr(history_module, "BLOCK", block)
    rng, history = np.random.default_rng(0), recorded()
    loss, term, sizes = rng.normal(size=50), rng.normal(size=50), rng.integers(1, 9, 50)
    for part in (slice(0, 20), slice(20, 50)):
        history.add_steps(2, part.start, {"loss": loss[part], "b": np.float32(term[part])})
    means = history.epoch_means(2, sizes.tolist())
    expected = {
        "loss": np.average(loss, weights=sizes),
        "b": np.average(np.float32(term).astype("float64"), weights=sizes),
    }
    assert means == pytest.approx(expected, rel=1e-14)  # "term" is absent: it was never there


@pytest.mark.once
def test_a_step_of_a_long_epoch_takes_at_most_40_bytes():
    history, num_steps = History(), 200_000
    tracemalloc.start()
    try:
        for step in range(num_steps):
            history.add_steps(0, step, {"loss": np.float32(step), "term": np.float32(1)})
        history.epoch_means(0, np.broadcast_to(1, num_steps))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * num_steps
    np.testing.assert_array_equal(history.steps["loss"], np.arange(num_steps))


@pytest.mark.parametrize("name", ["epoch", "step"])
def test_terms_with_reserved_names_raise(name):
    with pytest.raises(ValueError, match=f"a term named '{name}'.* reserved .*Rename the term"):
        History().add_steps(0, 0, {"loss": 1.0, name: 2.0})


def test_epochs_hold_logs_and_the_last_validation():
    history = recorded()
    assert history.epochs == [
        {"epoch": 0, "loss": 2.0, "accuracy": 0.5, "val_f1": 0.75},
        {"epoch": 1, "loss": 0.5, "accuracy": 0.75},
    ]
    assert history.validations[0] == (0, 1, "val", {"f1": 0.5})
    assert [v.step for v in history.validations] == [1, 2]


def test_values_are_not_read_before_they_are_needed():
    history, losses = History(), Lazy([1.0, 2.0])
    history.add_steps(0, 0, {"loss": losses})
    assert not losses.was_read
    np.testing.assert_array_equal(history.steps["loss"], [1, 2])


def test_the_oldest_of_many_unread_entries_are_read(monkeypatch):
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
    with pytest.raises(ValueError, match="got 'batch'"):
        history.to_dict("batch")


def test_state_round_trips_through_json_and_arrays():
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


def test_a_state_with_columns_of_different_lengths_raises():
    history, state = recorded(), recorded().get_state()
    state["steps"]["terms"]["loss"] = state["steps"]["terms"]["loss"][:-1]
    with pytest.raises(ValueError, match="columns of different lengths"):
        history.set_state(state)
    assert history.steps["loss"].tolist() == [3, 2, 1, 0.5]


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


def test_notebooks_show_a_table_and_a_picture():
    history = recorded()
    history.end_epoch(1, {"loss": 0.3, "a < b": 0.75})
    shown = history._repr_html_()
    assert "<p>History of 2 epochs, 4 steps</p>" in shown
    assert "<th>a &lt; b</th>" in shown
    assert "<td>0.75</td>" in shown
    assert "<table>" not in History()._repr_html_()
    assert history.plot()._repr_png_().startswith(b"\x89PNG")


def test_plot_draws_losses_above_metrics(tmp_path):
    figure = recorded().plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    above, below = figure.axes
    assert above.get_legend_handles_labels()[1] == ["loss", "term"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in below.get_lines()}
    assert lines["val_f1"] == [[2, 0.5], [3, 0.75]]  # x is the number of steps so far
    assert lines["accuracy"] == [[3, 0.5], [4, 0.75]]


def test_plot_draws_validation_losses_with_the_loss():
    history = recorded()
    history.add_validation(1, 0, "val", {"loss": 0.4})
    above, below = history.plot().axes
    assert "val_loss" in above.get_legend_handles_labels()[1]
    assert "val_loss" not in below.get_legend_handles_labels()[1]


def test_plot_draws_validations_of_a_metric_once_in_its_color_and_dashed():
    history = recorded()
    history.end_epoch(1, {"loss": 0.3, "accuracy": 0.75, "val_f1": 0.75})  # as the loop records it
    lines = {line.get_label(): line for line in history.plot().axes[1].get_lines()}
    assert lines["val_f1"].get_xydata().tolist() == [[2, 0.5], [3, 0.75]]
    history.add_validation(1, 0, "val", {"accuracy": 0.4})
    lines = {line.get_label(): line for line in history.plot().axes[1].get_lines()}
    trained, validated = lines["accuracy"], lines["val_accuracy"]
    assert trained.get_color() == validated.get_color() != lines["val_f1"].get_color()
    assert (trained.get_linestyle(), validated.get_linestyle()) == ("-", "--")


def test_plot_draws_learning_rates_apart():
    history = recorded()
    history.end_epoch(1, {"loss": 0.3, "accuracy": 0.75, "learning_rate": 1e-3})
    *_, rates = history.plot().axes
    assert rates.get_ylabel() == "learning rate"
    assert rates.get_legend_handles_labels()[1] == ["learning_rate"]


def test_plot_of_many_steps_draws_their_range_and_average(monkeypatch):
    monkeypatch.setattr(figures, "MAX_POINTS", 100)
    history, loss = History(), np.random.default_rng(0).normal(size=1001).astype("float32")
    loss[[3, 500]] = np.nan, np.inf
    history.add_steps(0, 0, {"loss": loss})
    (axes,) = history.plot().axes
    (line,) = axes.get_lines()
    (band,) = axes.collections
    x, y = band.get_paths()[0].vertices.T
    finite = loss[np.isfinite(loss)]
    assert (y.min(), y.max()) == (finite.min(), finite.max())
    spike = np.nanargmax(np.where(np.isfinite(loss), loss, np.nan))
    assert abs(x[y.argmax()] - (spike + 1)) <= 11 / 2
    assert len(line.get_xdata()) == 91  # 1001 steps, 11 in each bin
    assert np.abs(line.get_ydata()).max() < 1


def test_plot_of_no_steps_raises_and_of_one_nan_works():
    with pytest.raises(ValueError, match="no step has been recorded"):
        History().plot()
    history = History()
    history.add_steps(0, 0, {"loss": np.nan})
    assert len(history.plot().axes) == 1


def test_missing_packages_are_named(monkeypatch):
    for package in ("pandas", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install pandas"):
        recorded().to_frame()
    with pytest.raises(ImportError, match="Install it with `pip install matplotlib`"):
        recorded().plot()


@pytest.mark.once
def test_import_requires_neither_pandas_nor_matplotlib():
    # Keras imports both if they are installed, so checking sys.modules would prove nothing.
    code = "import sys; sys.modules.update(pandas=None, matplotlib=None); import polus.history"
    subprocess.run([sys.executable, "-c", code], check=True)
