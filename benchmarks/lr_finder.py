"""Compares the suggested learning rates with a grid search, training two epochs at each rate.

    KERAS_BACKEND=torch python benchmarks/lr_finder.py --peers > peers.json  # optional
    KERAS_BACKEND=jax python benchmarks/lr_finder.py --with peers.json > table.md
    KERAS_BACKEND=jax python benchmarks/lr_finder.py --more --epochs 10   # other tasks, longer runs
    KERAS_BACKEND=jax python benchmarks/lr_finder.py --schedule --epochs 5  # or --validation
    KERAS_BACKEND=jax python benchmarks/lr_finder.py --tried  # without the grid: some seconds a row
    KERAS_BACKEND=jax python benchmarks/lr_finder.py --noise  # how far grids agree with each other

Three tasks (an MLP on scikit-learn's digits, a CNN on 10,000 digits of MNIST, a transformer on SMS
messages), Adam and SGD, three seeds: 18 rows. `--more` has others: the CNN, which normalizes
batches, with SGD with momentum, the MLP and a regression on scikit-learn's diabetes with AdamW and
momentum, retrieval heads on frozen vectors of Cranfield's titles and abstracts with AdamW. Rates
are compared by the mean loss over the training examples after two epochs, in inference mode. A
suggestion is right (bold) if it is within a factor of 3 of the grid's best rate, or its loss within
10 % of the grid's best.

*optuna* is a search of as many steps as `tried` took: ten short trials, whose rates Optuna's TPE
suggests. `--peers` runs the range tests of fastai and Lightning on the same models, with `--steps`:
on the PyTorch backend a Keras model is a PyTorch module. None of the three is needed otherwise.
With `--schedule` or `--validation`, *tried without* is the search without that option.
"""

import argparse
import csv
import functools
import gzip
import importlib.util
import itertools
import json
import logging
import math
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np
from keras import layers

from polus.data import from_arrays
from polus.history import History
from polus.lr_finder import LRFinderResult, SuggestionName
from polus.schedules import Cosine
from polus.state import Snapshot
from polus.training import ClassifierTrainer

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"
GRID = 10.0 ** np.arange(-5, 1.01, 0.5)
BATCH_SIZE = 32
OPTUNA_TRIALS = 10

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


def diabetes() -> Task:
    """Returns the examples, the targets and the layers."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    return x / x.std(0), y[:, None], [layers.Dense(64, "relu"), layers.Dense(1)]


class Heads(layers.Layer):
    """Two heads on the vectors of a query and of its document; returns scores of all pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = [layers.Dense(64), layers.Dense(64)]

    def call(self, x: Any) -> Any:
        """Returns (B, B) cosines over a temperature, of (B, 2, vector)."""
        query, document = (
            keras.ops.normalize(head(x[:, i]), axis=-1) for i, head in enumerate(self.heads)
        )
        return keras.ops.matmul(query, keras.ops.transpose(document)) / 0.05


class OwnDocument(keras.losses.Loss):
    """Each query's document is that of its own row; the others of the batch are wrong."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the cross-entropy of each row."""
        own = keras.ops.arange(keras.ops.shape(y_pred)[0])
        return keras.losses.sparse_categorical_crossentropy(own, y_pred, from_logits=True)


def cranfield() -> Task:
    """Returns vectors of titles and abstracts, no labels, and the layers."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    with gzip.open(SHARED_DATA / "cranfield" / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    found = [each for each in found if each["title"] and each["text"]]
    texts = [each[part] for part in ("title", "text") for each in found]
    words = TfidfVectorizer(min_df=2, sublinear_tf=True).fit_transform(texts)
    vectors = TruncatedSVD(128, random_state=0).fit_transform(words)
    x = np.stack(np.split(vectors, 2), axis=1)
    return x, np.zeros(len(x), np.int32), [Heads()]


TASKS = {"digits MLP": digits, "MNIST CNN": mnist, "SMS transformer": sms}
MORE_TASKS = {"diabetes MLP": diabetes, "Cranfield heads": cranfield}
ALL_TASKS = TASKS | MORE_TASKS
OPTIMIZERS = {
    "Adam": keras.optimizers.Adam,
    "SGD": keras.optimizers.SGD,
    "AdamW": keras.optimizers.AdamW,
    "momentum": lambda: keras.optimizers.SGD(momentum=0.9),
}
ROWS = list(itertools.product(TASKS, ("Adam", "SGD")))
MORE_ROWS = [
    ("MNIST CNN", "momentum"),
    *itertools.product(("digits MLP", "diabetes MLP"), ("AdamW", "momentum")),
    ("Cranfield heads", "AdamW"),
]


def loss_of(task: str) -> keras.losses.Loss:
    """Returns the loss of a task."""
    special = {"diabetes MLP": keras.losses.MeanSquaredError, "Cranfield heads": OwnDocument}
    default = functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True)
    return special.get(task, default)()


def prepared(task: str, seed: int) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Returns a built model, its examples and its labels."""
    keras.utils.set_random_seed(seed)
    x, y, stack = ALL_TASKS[task]()
    model = keras.Sequential(stack)
    model.build((None, *x.shape[1:]))
    return model, *(a.astype("float32") if a.dtype == np.float64 else a for a in (x, y))


def lightning_rate(task: str, optimizer: str, seed: int, steps: int) -> float | None:
    """Returns the rate that Lightning's range test suggests; None if it suggests none."""
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
        return Tuner(trainer).lr_find(Module(), loader, num_training=steps).suggestion()


def fastai_rate(task: str, optimizer: str, seed: int, steps: int) -> float:
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
            return float(learner.lr_find(num_it=steps, show_plot=False).valley)


PEERS = {"fastai": fastai_rate, "lightning": lightning_rate}


def peer_rates(task: str, optimizer: str, seed: int, steps: int) -> dict[str, float]:
    """Returns the rates that the other libraries suggest after sweeps of so many steps."""
    found = {name: search(task, optimizer, seed, steps) for name, search in PEERS.items()}
    return {name: rate for name, rate in found.items() if rate is not None}


@dataclass(frozen=True)
class Setup:
    """How rates are compared.

    Attributes:
        epochs: Those of a training.
        schedule: Whether rates are peaks of a cosine with a warm-up, and tried as such.
        validation: Whether a fifth of the examples is held out, to judge trials and trainings.
    """

    epochs: int = 2
    schedule: bool = False
    validation: bool = False

    @property
    def plain(self) -> bool:
        """Whether no option of the search is measured."""
        return not (self.schedule or self.validation)


class VariablePeak(Cosine):
    """A cosine with a warm-up, whose peak changes without compiling again."""

    def __init__(self) -> None:
        super().__init__(1.0, warmup=0.06)
        self.peak = keras.Variable(1.0, trainable=False, name="peak")

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that a compiled step reads."""
        return [*super().variables, self.peak]


class Bench:
    """A model that is trained at many rates, each time from the same state."""

    def __init__(self, task: str, optimizer: str, seed: int, setup: Setup) -> None:
        model, x, y = prepared(task, seed)
        held_out = np.zeros(len(x), bool)
        if setup.validation:
            held_out[np.random.default_rng(seed).permutation(len(x))[: len(x) // 5]] = True
        judged = held_out if setup.validation else ~held_out
        self.setup = setup
        self.trainer = ClassifierTrainer(model, OPTIMIZERS[optimizer](), loss_of(task))
        self.optimizer = self.trainer.optimizer
        self.rate = self.optimizer.learning_rate
        if setup.schedule:
            self.optimizer.learning_rate = schedule = VariablePeak()
            self.rate = schedule.peak
        self.optimizer.build(model.trainable_variables)
        self.start = Snapshot(
            [*model.variables, *self.optimizer.variables, self.trainer.step_counter]
        )
        self.examples = x[~held_out], y[~held_out]
        self.batches = from_arrays(self.examples, BATCH_SIZE, seed=seed)
        self.judging = from_arrays((x[judged], y[judged]), 512, shuffle=False)
        self.trainer.changing_train_config(epochs=setup.epochs)

    def train(self, rate: float, **arguments: Any) -> History:
        """Trains from the start, at a rate or with a schedule of this peak."""
        self.start.restore()
        if not self.setup.schedule:
            arguments["learning_rate"] = float(rate)
        self.rate.assign(float(rate))
        return self.trainer.train(self.batches, on_nonfinite="ignore", **arguments)

    def loss_at(self, rate: float) -> float:
        """Returns the loss after a training."""
        self.train(rate, epochs=self.setup.epochs)
        value = self.trainer.evaluate(self.judging)["loss"]
        return value if math.isfinite(value) else math.inf

    def search(self, options: bool = True) -> LRFinderResult:
        """Searches a rate, with the options of the search that are measured or without them."""
        self.start.restore()
        arguments: dict[str, Any] = {}
        if options and self.setup.schedule:
            arguments["for_schedule"] = "warmup_cosine"
        if options and self.setup.validation:
            arguments["validation_data"] = self.judging
        # The default where the run's length is not known, as it has to be for a schedule.
        return self.trainer.lr_finder(self.batches, max_steps=500, **arguments)


def optuna_rate(bench: Bench, steps: int, seed: int) -> float:
    """Returns the rate that a search of as many steps finds by the end of short trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    length = steps // OPTUNA_TRIALS

    def objective(trial: Any) -> float:
        rate = trial.suggest_float("rate", GRID[0], GRID[-1], log=True)
        history = bench.train(rate, epochs=1, steps=length)
        loss = float(np.mean(history.steps["loss"][length // 2 :]))
        return loss if math.isfinite(loss) else 1e9

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, OPTUNA_TRIALS)
    return float(study.best_params["rate"])


def steps_of(result: LRFinderResult) -> int:
    """Returns the training steps that a search took."""
    steps = len(result.losses) + sum(len(trial.losses) for trial in result.trials)
    return steps + (0 if result.baseline is None else len(result.baseline))


def row(
    task: str, optimizer: str, seed: int, setup: Setup, peers: dict[str, float]
) -> tuple[dict[str, tuple[float, float]], int, float]:
    """Returns rates and losses (the grid's best, suggestions, peers), and the cost of `tried`."""
    bench = Bench(task, optimizer, seed, setup)
    best = min((bench.loss_at(rate), rate) for rate in GRID)[::-1]
    began = time.perf_counter()
    result = bench.search()
    secs, steps = time.perf_counter() - began, steps_of(result)
    suggestions = result.suggestions | peers
    if not setup.plain and (without := bench.search(options=False).suggestions):
        suggestions["tried without"] = without["tried"]
    elif setup.plain and importlib.util.find_spec("optuna") is not None:
        suggestions["optuna"] = optuna_rate(bench, steps, seed)
    found = {name: (rate, bench.loss_at(rate)) for name, rate in suggestions.items()}
    return {"grid": best, **found}, steps, secs


def tried(task: str, optimizer: str, seed: int, setup: Setup) -> dict[str, float]:
    """Returns the rate found by trials, its loss, and what finding it cost."""
    bench = Bench(task, optimizer, seed, setup)
    began = time.perf_counter()
    result = bench.search()
    secs, steps = time.perf_counter() - began, steps_of(result)
    loss = bench.loss_at(result.suggestion)
    return {"rate": result.suggestion, "loss": loss, "steps": steps, "secs": secs}


def noise(task: str, optimizer: str, seed: int, setup: Setup) -> dict[str, int]:
    """Returns whether `tried`, and a grid's best rate, are right by grids of other batch orders.

    The rate found with the batches in one order is judged by the grid of another one, both ways.
    """
    bench = Bench(task, optimizer, seed, setup)
    suggestion = bench.search().suggestion
    bests, losses = [], []
    for order in (seed, seed + 100):
        bench.batches = from_arrays(bench.examples, BATCH_SIZE, seed=order)
        grid = {float(rate): bench.loss_at(rate) for rate in GRID}
        bests.append(min(grid, key=lambda rate: grid[rate]))
        losses.append(grid | {suggestion: bench.loss_at(suggestion)})
    count = {"tried": 0, "grid": 0}
    for own, found in zip(losses, reversed(bests), strict=True):
        best = min((own[float(rate)], float(rate)) for rate in GRID)[::-1]
        count["tried"] += right((suggestion, own[suggestion]), best)
        count["grid"] += right((found, own[found]), best)
    return count


def right(found: tuple[float, float], best: tuple[float, float]) -> bool:
    """Returns whether a rate and its loss are as good as the grid's best."""
    near = max(found[0] / best[0], best[0] / found[0]) <= 3
    return near or found[1] <= 1.1 * best[1]


def main() -> None:
    """Prints the table or, with --peers, the rates that the other libraries suggest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--task", choices=ALL_TASKS, action="append")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, action="append")
    parser.add_argument("--more", action="store_true", help="other tasks and optimizers")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of a training")
    parser.add_argument("--schedule", action="store_true", help='for_schedule="warmup_cosine"')
    parser.add_argument("--validation", action="store_true", help="with validation_data")
    parser.add_argument("--peers", action="store_true", help="run the other libraries only")
    parser.add_argument("--steps", type=int, default=100, help="of the sweeps of --peers")
    parser.add_argument("--tried", action="store_true", help="run no grid, only the default")
    parser.add_argument("--noise", action="store_true", help="judge grids by grids")
    parser.add_argument("--with", dest="known", type=Path, help="the output of --peers")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    pairs = MORE_ROWS if options.more else ROWS
    if options.optimizer:
        pairs = list(itertools.product(options.task or ALL_TASKS, options.optimizer))
    elif options.task:
        pairs = [pair for pair in pairs if pair[0] in options.task]
    rows = [(*pair, seed) for pair in pairs for seed in options.seeds]
    setup = Setup(options.epochs, options.schedule, options.validation)
    if options.tried:
        for each in rows:
            print(json.dumps([*each, tried(*each, setup)]), flush=True)
        return
    if options.noise:
        counts = []
        for each in rows:
            counts.append(noise(*each, setup))
            print(json.dumps([*each, counts[-1]]), flush=True)
        total = {name: sum(count[name] for count in counts) for name in counts[0]}
        print(f"right of {2 * len(rows)}: {total}")
        return
    if options.peers:
        found = {str(r): peer_rates(*r, options.steps) for r in rows}
        print(json.dumps(found, indent=1))
        return
    peers = json.loads(options.known.read_text()) if options.known else {}
    last = "optuna" if setup.plain else "tried without"
    names = [*get_args(SuggestionName), *(PEERS if peers else []), last]
    count = dict.fromkeys(names, 0)
    print(f"| task | optimizer | seed | grid's best | {' | '.join(names)} | steps | seconds |")
    print("|---" * (6 + len(names)) + "|")
    for task, optimizer, seed in rows:
        key = str((task, optimizer, seed))
        found, steps, secs = row(task, optimizer, seed, setup, peers.get(key, {}))
        best = found["grid"]
        cells = ["{:.1e} ({:.3g})".format(*best)]
        for name in names:
            good = name in found and right(found[name], best)
            count[name] += good
            shown = "{:.1e} ({:.3g})".format(*found[name]) if name in found else "none"
            cells.append(f"**{shown}**" if good else shown)
        cells += [str(steps), f"{secs:.0f}"]
        print(f"| {task} | {optimizer} | {seed} | {' | '.join(cells)} |", flush=True)
    print(f"| right | | | | {' | '.join(f'{n} of {len(rows)}' for n in count.values())} | | |")


if __name__ == "__main__":
    main()
