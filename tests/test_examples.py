"""The examples, shrunk: they run on each backend, and do what they say."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _plots_need_no_screen(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(tmp_path, capsys):
    assert load("digits").main(epochs=1, runs=tmp_path) > 0.3, "one in ten is chance"
    printed = capsys.readouterr().out
    files = ("model.keras", "history.png", "confusion_matrix.png")
    assert all((tmp_path / "digits" / name).stat().st_size for name in files)
    assert all(name in printed for name in files)


def test_gan(tmp_path, capsys):
    load("gan").main(epochs=1, runs=tmp_path)
    assert (tmp_path / "gan" / "digits.png").stat().st_size
    assert "generated" in capsys.readouterr().out


def test_distillation(capsys):
    results = load("distillation").main(epochs=4)
    assert min(results) > 0.3, "one in ten is chance"
    assert len(set(results)) == 3, "three models, trained apart"
    assert "distilled" in capsys.readouterr().out


def test_custom_step(capsys):
    results = load("custom_step").main(epochs=4)
    assert len(results) == 2
    assert all(clean > 0.3 for clean, _ in results.values()), "one in ten is chance"
    assert "largest slope" in capsys.readouterr().out
