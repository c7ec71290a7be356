"""The examples run, shrunk."""

import importlib.util
from pathlib import Path

import keras
import numpy as np

ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(tmp_path, capsys):
    score = load("digits").main(epochs=3, runs=tmp_path)
    assert score > 0.8
    out = capsys.readouterr().out
    for part in ("epoch 3/3  loss ", "val_macro_f1 0.", "3 epochs, 135 steps", "How well    macro"):
        assert part in out
    folder = tmp_path / "digits"
    assert {p.name for p in folder.iterdir()} == {
        "model.keras",
        "history.png",
        "confusion_matrix.png",
    }
    assert keras.saving.load_model(folder / "model.keras").count_params() == 19_466


def test_mnist_files_are_read_the_same_way(tmp_path):
    digits = load("digits")
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    digits.main(data=tmp_path, epochs=1, runs=tmp_path / "runs")
    assert (tmp_path / "runs" / "mnist" / "model.keras").exists()
