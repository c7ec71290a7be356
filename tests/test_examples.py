"""The examples, shrunk: they run on each backend, and do what they say."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from polus import demo

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
    assert demo.main(epochs=1, runs=tmp_path) > 0.3, "one in ten is chance"
    printed = capsys.readouterr().out
    files = ("model.keras", "history.png", "confusion_matrix.png")
    assert all((tmp_path / "digits" / name).stat().st_size for name in files)
    assert all(name in printed for name in files)


def test_digits_from_the_files_of_mnist(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "mnist.npz", **arrays)
    demo.main(data=tmp_path, epochs=1, runs=tmp_path)
    assert (tmp_path / "mnist" / "model.keras").stat().st_size


def test_gan(tmp_path, capsys):
    load("gan").main(epochs=1, runs=tmp_path)
    assert (tmp_path / "gan" / "digits.png").stat().st_size
    assert "generated" in capsys.readouterr().out


def test_distillation(capsys):
    results = load("distillation").main(epochs=4)
    assert len(results) == 3
    assert min(results.values()) > 0.3, "one in ten is chance"
    assert "distilled" in capsys.readouterr().out


def test_custom_step(capsys):
    results = load("custom_step").main(epochs=4)
    assert len(results) == 2
    assert all(clean > 0.3 for clean, _ in results.values()), "one in ten is chance"
    assert "largest slope" in capsys.readouterr().out


def test_ddpm(tmp_path, capsys):
    load("ddpm").main(epochs=2, num_times=10, runs=tmp_path)
    names = {path.name for path in (tmp_path / "ddpm").iterdir()}
    assert names == {"average.keras", "epoch-001.png", "epoch-002.png"}
    assert "recognizes" in capsys.readouterr().out


def test_ppo(capsys):
    assert load("ppo").main(epochs=30) > 0.0, "a paddle that does not learn has -0.6"
    assert "Mean reward" in capsys.readouterr().out


def test_transfer(capsys):
    results = load("transfer").main(epochs=1)
    assert results.keys() == {"from scratch", "transferred"}
    assert "predictions are right" in capsys.readouterr().out


def test_several_devices(tmp_path, capsys):
    """On the two fake devices of JAX, and on one elsewhere."""
    import keras

    try:
        assert load("several_devices").main(epochs=3, runs=tmp_path) > 0.5, "one in ten is chance"
    finally:
        if keras.backend.backend() == "jax":
            keras.distribution.set_distribution(None)
    assert (tmp_path / "several_devices" / "model.keras").stat().st_size
    assert "epoch 3/3" in capsys.readouterr().out
