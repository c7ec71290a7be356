"""What a notebook shows: tables, pictures, and nothing in red that is no warning."""

import keras
import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

CELLS = [
    """
import logging
import keras, numpy as np, polus
x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
y = (x.sum(axis=1) > 0).astype("int32")
trainer = polus.ClassifierTrainer(
    keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)]),
    keras.optimizers.Adam(1e-2),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=[polus.Accuracy(2)],
)
data = polus.from_arrays((x, y), 16)
validation = polus.ValidationDataCallback(data)
""",
    "history = trainer.train(data, 3, [polus.ConsoleLogCallback(), validation])\nhistory",
    "history.plot()",
    "result = trainer.lr_finder(data, end_lr=1e4)\nresult",
    "result.plot()",
    "logging.getLogger('polus').warning('careful')",
    """
from polus.callbacks.notebook import NotebookTable
table = NotebookTable()
table.add({"epoch": "1", "a < b": "0.5"})
for epoch in range(2, 31):
    table.add({"epoch": str(epoch), "loss": "1"})
table.show("now <here>", 3, 10)
""",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The outputs of each cell."""
    folder = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
            patch.setenv(name, str(folder / name))
        patch.setenv("KERAS_BACKEND", keras.backend.backend())
        cells = [nbformat.v4.new_code_cell(text) for text in CELLS]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbclient.NotebookClient(notebook, timeout=120).execute()
    return [cell.outputs for cell in notebook.cells]


def shown(output):
    return output["data"]["text/html"]


@pytest.mark.once
def test_training_is_one_table_that_was_updated_in_place(outputs):
    (table,) = [output for output in outputs[1] if output.output_type == "display_data"]
    assert "3 epochs, 12 steps in" in shown(table)
    assert "3 epochs, 12 steps in" in table["data"]["text/plain"]
    names = ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "time"]
    assert "".join(f"<th>{name}</th>" for name in names) in shown(table)
    assert shown(table).count("<tr><td>") == 3
    assert "<progress" not in shown(table)  # it has ended


@pytest.mark.once
def test_a_table_shows_the_last_epochs_and_escapes_names(outputs):
    (table,) = outputs[6]
    assert '<progress value="3" max="10"></progress> now &lt;here&gt;' in shown(table)
    assert "<th>a &lt; b</th>" in shown(table)
    assert shown(table).count("<tr><td>") == 21  # twenty, and the dots
    assert "<td>...</td>" in shown(table)


@pytest.mark.once
def test_results_are_tables_and_plots_are_pictures(outputs):
    history, plot, result, curve = (cell[-1] for cell in outputs[1:5])
    assert "<p>History of 3 epochs, 12 steps</p><table>" in shown(history)
    assert "<table>" in shown(result)
    for picture in (plot, curve):
        assert picture["data"]["image/png"].startswith("iVBOR")


@pytest.mark.once
def test_only_warnings_are_red(outputs):
    red = [[o["text"] for o in cell if o.get("name") == "stderr"] for cell in outputs]
    assert red.pop(5) == ["careful\n"]
    assert not any(red)
    told = "".join(o["text"] for o in outputs[1] if o.get("name") == "stdout")
    assert "Training all 2 trainable variables" in told
