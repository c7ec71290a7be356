"""Compares the suggested learning rates with a grid search, training two epochs at each rate.

    KERAS_BACKEND=torch python benchmarks/lr_finder.py --peers > peers.json  # optional
    KERAS_BACKEND=jax python benchmarks/lr_finder.py --with peers.json > table.md
    KERAS_BACKEND=jax python benchmarks/lr_finder.py --tried  # without the grid: some seconds a row

Three tasks (an MLP on scikit-learn's digits, a CNN on 10,000 digits of MNIST, a transformer on SMS
messages), Adam and SGD, three seeds: 18 rows. Rates are compared by the mean loss over the training
examples after two epochs, in inference mode. A suggestion is right (bold) if it is within a factor
of 3 of the grid's best rate, or its loss within 10 % of the grid's best.

`--peers` runs the range tests of fastai and Lightning on the same models: on the PyTorch backend a
Keras model is a PyTorch module. Neither library is needed otherwise.
"""

import argparse
import csv
import gzip
import itertools
import json
import logging
import math
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np
from keras import layers

from polus.data import ArrayDataset, from_arrays
from polus.lr_finder import SuggestionName
from polus.state import Snapshot
from polus.training import ClassifierTrainer

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"
GRID = 10.0 ** np.arange(-5, 1.01, 0.5)
EPOCHS = 2
BATCH_SIZE = 32


Task = tuple[np.ndarray, np.ndarray, list[layers.Layer]]


def digits() -> Task:
    """Returns the examples, the labels and the layers."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x / 16, y, [layers.Dense(128, "relu"), layers.Dense(128, "relu"), layers.Dense(10)]


def mnist() -> Task:
    """Returns the examples, the labels and the layers."""
    with np.load(SHARED_DATA / "mnist" / "mnist.npz") as data:
        x, y = data["x_train"][:10_000, ..., None] / 255, data["y_train"][:10_000]
    blocks = [
        layer
        for filters in (8, 16)
        for layer in (
            layers.Conv2D(filters, 3, strides=2),
            layers.BatchNormalization(),
            layers.ReLU(),
        )
    ]
    return x, y, [*blocks, layers.Flatten(), layers.Dense(10)]


class Block(layers.Layer):
    """A transformer block with normalization before attention and before the dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, 16)
        self.norms = [layers.LayerNormalization(), layers.LayerNormalization()]
        self.dense = [layers.Dense(64, "gelu"), layers.Dense(32)]

    def call(self, x: Any) -> Any:
        """Returns the outputs, in the shape of the inputs."""
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed)
        return x + self.dense[1](self.dense[0](self.norms[1](x)))


def sms() -> Task:
    """Returns the examples, the labels and the layers."""
    path = SHARED_DATA / "sms_spam" / "SMSSpamCollection.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    x = np.zeros((len(rows), 32), np.int32)
    for i, (_, text) in enumerate(rows):
        words = text.lower().split()[:32]
        x[i, : len(words)] = [1 + zlib.crc32(word.encode()) % 4095 for word in words]
    y = np.array([label == "spam" for label, _ in rows], np.int32)
    embedding = layers.Embedding(4096, 32)
    return x, y, [embedding, Block(), Block(), layers.GlobalAveragePooling1D(), layers.Dense(2)]


TASKS = {"digits MLP": digits, "MNIST CNN": mnist, "SMS transformer": sms}
OPTIMIZERS = {"Adam": keras.optimizers.Adam, "SGD": keras.optimizers.SGD}


def prepared(task: str, seed: int) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Returns a built model, its examples and its labels."""
    keras.utils.set_random_seed(seed)
    x, y, stack = TASKS[task]()
    model = keras.Sequential(stack)
    model.build((None, *x.shape[1:]))
    return model, x.astype("float32") if x.dtype == np.float64 else x, y


def lightning_rate(task: str, optimizer: str, seed: int) -> float:
    """Returns the rate that Lightning's range test suggests."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.tuner import Tuner

    model, x, y = prepared(task, seed)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.learning_rate = model, 1e-3

        def training_step(self, batch: Any, _: int) -> Any:
            return torch.nn.functional.cross_entropy(self.model(batch[0], training=True), batch[1])

        def configure_optimizers(self) -> Any:
            return getattr(torch.optim, optimizer)(self.parameters(), lr=self.learning_rate)

    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y).long())
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH_SIZE, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False
        )
        return Tuner(trainer).lr_find(Module(), loader).suggestion()


def fastai_rate(task: str, optimizer: str, seed: int) -> float:
    """Returns the rate that fastai's range test suggests, its `valley`."""
    import fastai.callback.progress
    import fastai.callback.schedule
    import fastai.optimizer
    import torch
    from fastai.basics import DataLoader, DataLoaders, Learner

    model, x, y = prepared(task, seed)
    samples = list(zip(torch.tensor(x), torch.tensor(y).long(), strict=True))
    loaders = DataLoaders(*[DataLoader(samples, bs=BATCH_SIZE, shuffle=True, num_workers=0)] * 2)
    function = getattr(fastai.optimizer, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        loss = torch.nn.CrossEntropyLoss()
        learner = Learner(loaders, model, loss_func=loss, opt_func=function, path=folder)
        with learner.no_bar():
            return float(learner.lr_find(show_plot=False).valley)


PEERS = {"fastai": fastai_rate, "lightning": lightning_rate}


def made(
    task: str, optimizer: str, seed: int
) -> tuple[ClassifierTrainer, Snapshot, ArrayDataset, ArrayDataset]:
    """Returns a trainer, its initial state, its data and the data to evaluate."""
    model, x, y = prepared(task, seed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = ClassifierTrainer(model, OPTIMIZERS[optimizer](), loss)
    trainer.optimizer.build(model.trainable_variables)
    start = Snapshot([*model.variables, *trainer.optimizer.variables, trainer.step_counter])
    batches = from_arrays((x, y), BATCH_SIZE, seed=seed)
    return trainer, start, batches, from_arrays((x, y), 512, shuffle=False)


def row(
    task: str, optimizer: str, seed: int, peers: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """Returns the rate and loss of the grid's best, of each suggestion and of the peers."""
    trainer, start, batches, everything = made(task, optimizer, seed)

    def loss_at(rate: float) -> float:
        start.restore()
        trainer.train(batches, epochs=EPOCHS, learning_rate=float(rate))
        value = trainer.evaluate(everything)["loss"]
        return value if math.isfinite(value) else math.inf

    best = min((loss_at(rate), rate) for rate in GRID)[::-1]
    start.restore()
    suggestions = trainer.lr_finder(batches).suggestions | peers
    return {"grid": best, **{name: (rate, loss_at(rate)) for name, rate in suggestions.items()}}


def tried(task: str, optimizer: str, seed: int) -> dict[str, float]:
    """Returns the rate found by trials, its loss, and what finding it cost."""
    trainer, start, batches, everything = made(task, optimizer, seed)
    began = time.perf_counter()
    result = trainer.lr_finder(batches)
    secs = time.perf_counter() - began
    steps = len(result.losses) + sum(len(trial.losses) for trial in result.trials)
    steps += 0 if result.baseline is None else len(result.baseline)
    start.restore()
    trainer.train(batches, epochs=EPOCHS, learning_rate=result.suggestion)
    loss = trainer.evaluate(everything)["loss"]
    return {"rate": result.suggestion, "loss": loss, "steps": steps, "secs": secs}


def right(found: tuple[float, float], best: tuple[float, float]) -> bool:
    """Returns whether a rate and its loss are as good as the grid's best."""
    near = max(found[0] / best[0], best[0] / found[0]) <= 3
    return near or found[1] <= 1.1 * best[1]


def main() -> None:
    """Prints the table or, with --peers, the rates that the other libraries suggest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--peers", action="store_true", help="run the other libraries only")
    parser.add_argument("--tried", action="store_true", help="run no grid, only the default")
    parser.add_argument("--with", dest="known", type=Path, help="the output of --peers")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = list(itertools.product(options.task or TASKS, OPTIMIZERS, options.seeds))
    if options.tried:
        for each in rows:
            print(json.dumps([*each, tried(*each)]), flush=True)
        return
    if options.peers:
        found = {str(r): {name: search(*r) for name, search in PEERS.items()} for r in rows}
        print(json.dumps(found, indent=1))
        return
    peers = json.loads(options.known.read_text()) if options.known else {}
    names = [*get_args(SuggestionName), *(PEERS if peers else [])]
    count = dict.fromkeys(names, 0)
    print(f"| task | optimizer | seed | grid's best | {' | '.join(names)} |")
    print("|---" * (4 + len(names)) + "|")
    for task, optimizer, seed in rows:
        key = str((task, optimizer, seed))
        found = row(task, optimizer, seed, peers.get(key, {}))
        best = found["grid"]
        cells = ["{:.1e} ({:.3g})".format(*best)]
        for name in names:
            good = name in found and right(found[name], best)
            count[name] += good
            shown = "{:.1e} ({:.3g})".format(*found[name]) if name in found else "none"
            cells.append(f"**{shown}**" if good else shown)
        print(f"| {task} | {optimizer} | {seed} | {' | '.join(cells)} |", flush=True)
    print(f"| right | | | | {' | '.join(f'{n} of {len(rows)}' for n in count.values())} |")


if __name__ == "__main__":
    main()
