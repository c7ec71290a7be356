"""`import polus` is enough: public names are found on first use, and nothing is loaded before."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import polus

MODULES = {
    "average",
    "callbacks",
    "checkpoint",
    "core",
    "data",
    "errors",
    "history",
    "hpo",
    "ir",
    "lr_finder",
    "metrics",
    "optimizers",
    "report",
    "runs",
    "schedules",
    "training",
}


def run(code):
    """Runs a program in a new process, where nothing of Polus is imported yet."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def names_for_type_checkers():
    """Reads `from polus.module import name as name` in the source as a type checker does."""
    for node in ast.walk(ast.parse(Path(polus.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("polus"):
            for alias in node.names:
                if alias.asname is not None:
                    assert alias.asname == alias.name, "only `X as X` is a public name"
                    yield node.module, alias.name


@pytest.mark.parametrize(("module", "name"), list(names_for_type_checkers()))
def test_every_name_is_what_type_checkers_see(module, name):
    value = getattr(polus, name)
    if module == "polus":
        assert value is importlib.import_module(f"polus.{name}")
    else:
        assert value is getattr(importlib.import_module(module), name)


def test_type_checkers_see_every_name():
    seen = {name for _, name in names_for_type_checkers()}
    assert seen == {*polus.__all__, *MODULES}


def test_trainers_callbacks_and_metrics_are_public():
    assert {"BaseTrainer", "ClassifierTrainer", "from_arrays", "History"} <= set(polus.__all__)
    assert {"function", "value_and_grad", "Checkpoint", "CheckpointError"} <= set(polus.__all__)
    assert {"set_jit_compile", "get_jit_compile", "with_iterator_state"} <= set(polus.__all__)
    assert set(polus.callbacks.__all__) <= set(polus.__all__)
    metrics = {
        name
        for name, value in vars(polus.metrics).items()
        if inspect.isclass(value) and issubclass(value, polus.IMetric) and not name.startswith("_")
    }
    assert {"Accuracy", "MacroF1Score"} <= metrics & set(polus.__all__)


def test_a_program_with_one_import_trains():
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    trainer = polus.ClassifierTrainer(
        keras.Sequential([keras.layers.Dense(2)]),
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[polus.Accuracy(2)],
    )
    data = polus.from_arrays((x, (x[:, 0] > 0).astype("int32")), batch_size=8)
    history = trainer.train(
        data, epochs=1, steps_per_execution=1, callbacks=[polus.LossSmoothCallback()]
    )
    assert isinstance(history, polus.History)


@pytest.mark.once
def test_a_new_process_finds_names_on_first_use():
    found = run("""
import polus
print(polus.EarlyStop.__module__, polus.metrics.Accuracy.__name__)
data = metrics = None
from polus import *
print(Checkpoint.__name__, data, metrics)  # a star import leaves a user's names alone
""")
    assert found.split() == ["polus.callbacks.early_stop", "Accuracy", "Checkpoint", "None", "None"]


@pytest.mark.once
def test_completion_lists_names_that_are_not_imported_yet():
    listed = run("import polus; print(*dir(polus))").split()
    assert {*polus.__all__, *MODULES, "__version__"} == set(listed)


@pytest.mark.once
@pytest.mark.parametrize("use", ["", "dir(polus)", "hasattr(polus, 'BaseTrainr')"])
def test_importing_loads_neither_keras_nor_a_backend(use):
    heavy = {"keras", "tensorflow", "jax", "torch", "rich"}
    found = run(f"import sys, polus\n{use}\nprint(*(set(sys.modules) & {heavy}))")
    assert found == ""


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("BaseTrainr", "BaseTrainer"),
        ("from_array", "from_arrays"),
        ("ValidationCallback", "ValidationDataCallback"),
        ("metric", "metrics"),
    ],
)
def test_misspelled_names_raise_with_a_hint(wrong, right):
    with pytest.raises(AttributeError, match=f"'polus' has no attribute '{wrong}'") as error:
        getattr(polus, wrong)
    assert str(error.value).endswith(f"Did you mean {right!r}?")


@pytest.mark.once
def test_the_interpreter_adds_no_second_hint():
    code = "import polus; polus.BaseTrainr"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stderr.count("Did you mean") == 1


@pytest.mark.parametrize("name", ["unrelated", "_BaseTrainer"])
def test_unknown_names_raise_without_a_hint(name):
    with pytest.raises(AttributeError, match=f"'polus' has no attribute '{name}'.$"):
        getattr(polus, name)


def test_no_advice_installs_polus_from_a_package_index():
    """Another project has this name there; optional libraries are installed by their own names."""
    root = Path(__file__).parent.parent
    folders = ("src", "docs", "examples", "benchmarks")
    files = [path for folder in folders for path in (root / folder).rglob("*.[pm][yd]")]
    files += [*root.glob("*.md"), root / "Makefile"]
    assert len(files) > 50
    advice = re.compile(r"pip install (--?\S+ )*[\"']?polus\b|polus\[")
    assert not [str(path) for path in files if advice.search(path.read_text())]
