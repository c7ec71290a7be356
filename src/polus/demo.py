"""Trains and evaluates a classifier of handwritten digits.

python -m polus.demo                       # scikit-learn's 1,797 digits, 8 x 8 pixels
python -m polus.demo --data path/to/mnist  # a folder with mnist.npz, 28 x 28 pixels

It requires scikit-learn and matplotlib.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

from polus.callbacks import (
    ConsoleLogCallback,
    EarlyStop,
    LossSmoothCallback,
    SaveModelCallback,
    ValidationDataCallback,
)
from polus.data import from_arrays
from polus.metrics import Accuracy, MacroF1Score
from polus.training import ClassifierTrainer

try:
    import matplotlib  # noqa: F401
    from sklearn.datasets import load_digits
    from sklearn.metrics import ConfusionMatrixDisplay
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise ImportError(
        f"The demo requires {error.name}. Run `pip install scikit-learn matplotlib`."
    ) from error

Array = np.ndarray[Any, Any]


def load(folder: Path | None) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Returns the training and the held-out set: images (n, size, size, 1) in [0, 1], labels."""
    if folder is None:
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
        split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        x, x_test, y, y_test = split
    else:
        with np.load(folder / "mnist.npz") as file:
            x, y, x_test, y_test = (file[k] for k in ("x_train", "y_train", "x_test", "y_test"))
        x, x_test = (images[..., None].astype("float32") / 255 for images in (x, x_test))
    return (x, y.astype("int32")), (x_test, y_test.astype("int32"))


def build(size: int) -> keras.Model:
    """Returns a small convolutional network, with one more pooling step for larger images."""
    layers = [keras.Input((size, size, 1))]
    for filters in (16, 32) if size > 8 else (32,):
        layers += [keras.layers.Conv2D(filters, 3, activation="relu"), keras.layers.MaxPooling2D()]
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10),
    ]
    return keras.Sequential(layers)


def main(data: Path | None = None, epochs: int | None = None, runs: Path = Path("runs")) -> float:
    """Trains, evaluates the best model, writes it and two figures, and returns its macro-F1.

    Args:
        data: A folder with mnist.npz. By default scikit-learn's digits.
        epochs: By default 40, or 4 with `data`.
        runs: The folder of the results.
    """
    keras.utils.set_random_seed(0)
    folder = runs / ("digits" if data is None else "mnist")
    folder.mkdir(parents=True, exist_ok=True)
    (x, y), (x_test, y_test) = load(data)
    held_out = from_arrays((x_test, y_test), batch_size=256, shuffle=False)

    trainer = ClassifierTrainer(
        build(x.shape[1]),
        optimizer=keras.optimizers.Adam(2e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[Accuracy(10), MacroF1Score(10)],
    )
    start = time.perf_counter()
    history = trainer.train(
        from_arrays((x, y), batch_size=32 if data is None else 128, seed=0),
        epochs=epochs or (40 if data is None else 4),
        callbacks=[
            ConsoleLogCallback(),
            LossSmoothCallback(),
            ValidationDataCallback(held_out, name="val"),
            SaveModelCallback("best", folder / "model.keras", monitor="val_macro_f1"),
            EarlyStop("val_macro_f1", patience=8),
        ],
    )
    seconds = time.perf_counter() - start

    _draw(folder, x_test, y_test)
    history.plot(folder / "history.png")
    scores = history.to_dict()["val_macro_f1"]
    score, epoch = float(max(scores)), int(np.argmax(scores)) + 1
    print(f"""
Trained     {trainer.model.count_params():,} weights on {len(x):,} images, {keras.backend.backend()}
Quality     macro-F1 {score:.4f} on {len(x_test):,} held-out images, after epoch {epoch}
Time        {len(scores)} epochs in {seconds:.1f} s, compilation included
Files       {folder}/model.keras, history.png, confusion_matrix.png""")
    return score


def _draw(folder: Path, x_test: Array, y_test: Array) -> None:
    """Draws the confusion matrix of the best model, loaded as any user of the file loads it."""
    best = keras.saving.load_model(folder / "model.keras")
    predicted = best.predict(x_test, batch_size=256, verbose=0).argmax(-1)
    display = ConfusionMatrixDisplay.from_predictions(
        y_test, predicted, colorbar=False, cmap="Blues"
    )
    display.figure_.savefig(folder / "confusion_matrix.png", bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with mnist.npz")
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    main(arguments.data, arguments.epochs)
