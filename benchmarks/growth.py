"""Measures how the costs of a run grow with its sizes, and writes the table of docs/benchmarks.

    python benchmarks/growth.py                        # all, some minutes
    python benchmarks/growth.py --case callbacks --size 100

Each row is a process of its own. *Memory* is what the process' peak grew by while it was timed. A
step is one of a model of two weights, unless the row says otherwise. Models of many weights are
PyTorch's: JAX compiles one of a thousand for minutes.
"""

import argparse
import atexit
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")  # the fastest for steps that do almost nothing
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import polus

TABLE = Path(__file__).parent.parent / "docs" / "benchmarks" / "growth.md"


def trainer_of(model: Any, optimizer: Any = None) -> Any:
    return polus.ClassifierTrainer(
        model,
        optimizer=optimizer or keras.optimizers.SGD(1e-3),
        loss=keras.losses.MeanSquaredError(),
    )


def small_trainer() -> Any:
    return trainer_of(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))


def small_data(steps: int) -> Any:
    x = np.random.default_rng(0).normal(size=(steps, 1)).astype("float32")
    return polus.from_arrays((x, 2 * x), batch_size=1)


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# ---------------------------------------------------------------------- the cases
# Each takes a size, and returns a function that is timed, and by what its seconds are divided.

Case = tuple[Callable[[], Any], float]


def history(steps: int) -> Case:
    trainer, data = small_trainer(), small_data(steps)
    trainer.train(small_data(2_000), epochs=1)
    return lambda: trainer.train(data, epochs=1), steps * 1e-6


def callbacks(count: int) -> Case:

    class Counter(polus.Callback):
        every_steps = None
        steps = 0

        def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
            self.steps += len(steps)

    trainer, data, all_ = small_trainer(), small_data(20_000), [Counter() for _ in range(count)]
    trainer.train(data, epochs=1, callbacks=all_)
    return lambda: trainer.train(data, epochs=2, callbacks=all_), 40_000 * 1e-6


def calls(count: int) -> Case:
    x = np.random.default_rng(0).normal(size=(500 * 32, 64)).astype("float32")
    layers = keras.layers.Dense(128, "relu"), keras.layers.Dense(1)
    trainer = trainer_of(keras.Sequential([keras.Input((64,)), *layers]))
    data = polus.from_arrays((x, x[:, :1]), batch_size=32)
    trainer.train(data, epochs=4)

    def run() -> None:
        for _ in range(count):
            trainer.train(data, epochs=60 // count)

    return run, 30_000 * 1e-6


@keras.saving.register_keras_serializable()
class Many(keras.layers.Layer):
    """A layer of many weights."""

    def __init__(self, count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts = [self.add_weight(shape=(4,), name=f"w{i}") for i in range(count)]

    def call(self, x: Any) -> Any:
        return x * sum(keras.ops.sum(part) for part in self.parts)


def many_weights(count: int) -> Any:
    return trainer_of(keras.Sequential([keras.Input((1,)), Many(count)]), keras.optimizers.Adam())


def variables(count: int) -> Case:
    trainer, data = many_weights(count), small_data(10)
    return lambda: trainer.train(data, epochs=1), 1


def checkpoint(count: int) -> Case:
    trainer, data = many_weights(count), small_data(2)
    trainer.train(data, epochs=1)
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    # The first one makes Keras import TensorFlow, if it is there.
    saves = [[polus.Checkpoint(f"{folder}/{name}")] for name in ("first", "second")]
    trainer.train(data, epochs=1, callbacks=saves[0])
    return lambda: trainer.train(data, epochs=1, callbacks=saves[1]), 1


def examples(count: int) -> Case:
    data = polus.from_arrays(np.zeros(count, np.uint8), batch_size=64, device_bytes=0)
    return lambda: next(data.rows(1)), 1e-3


def batch_bytes(count: int) -> Case:
    model = keras.Sequential([keras.Input((count // 4,)), keras.layers.Dense(1, use_bias=False)])
    x = np.zeros((1, count // 4), "float32")
    trainer, data = trainer_of(model), [(x, x[:, :1])] * 8
    trainer.train(data, epochs=1)
    return lambda: trainer.train(data, epochs=2), 16 * 1e-3


def levels(depth: int) -> Case:

    class Nested(polus.BaseTrainer):
        def train_step(self, *batch: Any) -> Any:
            parts = keras.tree.flatten(batch)
            loss = lambda: keras.ops.mean(sum(self.model(part) for part in parts))  # noqa: E731
            return self.minimize(loss, self.trainable_weights)

    def nest(parts: list[Any], depth: int) -> Any:
        if depth == 1:
            return {str(i): part for i, part in enumerate(parts)}
        half = len(parts) // 2
        return {"a": nest(parts[:half], depth - 1), "b": nest(parts[half:], depth - 1)}

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    trainer = Nested(model, keras.optimizers.SGD(1e-3))
    x = np.zeros((4, 1), "float32")
    data = [nest([x] * 8, depth) for _ in range(2_000)]
    trainer.train(data, epochs=1)
    return lambda: trainer.train(data, epochs=2), 4_000 * 1e-6


class Row(NamedTuple):
    """A row of the table for each size: of what the seconds are shown, and where it runs."""

    case: Callable[[int], Case]
    sizes: tuple[int, ...]
    unit: str
    what: str
    backend: str = keras.config.backend()


ROWS = [
    Row(history, (10**4, 10**5, 10**6, 10**7), "µs", "a step of one epoch, all losses kept"),
    Row(callbacks, (1, 10, 100, 500), "µs", "a step, with so many callbacks"),
    Row(calls, (1, 6, 60), "µs", "a step, where 60 epochs of 500 steps are so many calls"),
    Row(variables, (10, 100, 1_000, 5_000), "s", "ten first steps of so many weights", "torch"),
    Row(checkpoint, (10, 100, 1_000, 5_000), "s", "two steps of these and a checkpoint", "torch"),
    Row(examples, (10**4, 10**6, 10**7, 10**8), "ms", "the first batch of a shuffled epoch"),
    Row(batch_bytes, (10**3, 10**5, 10**7, 5 * 10**8), "ms", "a step of batches of so many bytes"),
    Row(levels, (1, 2, 3, 4), "µs", "a step of batches that are dicts in dicts"),
]


def measure(case: Callable[[int], Case], size: int) -> dict[str, float]:
    call, unit = case(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    secs = timed(call)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"time": secs / unit, "memory": grown / 2**10}


def main() -> None:
    rows = {row.case.__name__: row for row in ROWS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=rows, action="append")
    parser.add_argument("--size", type=int)
    args = parser.parse_args()
    if args.size is not None:
        print(json.dumps(measure(rows[args.case[0]].case, args.size)))
        return
    lines = []
    for name in args.case or rows:
        row = rows[name]
        for size in row.sizes:
            command = [sys.executable, __file__, "--case", name, "--size", str(size)]
            env = os.environ | {"KERAS_BACKEND": row.backend}
            result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(result.stdout.splitlines()[-1])
            what = f"{name.replace('_', ' ')}: {row.what} ({row.backend})"
            cells = f"{size:,}", f"{found['time']:,.3g} {row.unit}", f"{found['memory']:,.0f} MiB"
            lines.append(f"| {what} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if args.case is None:
        write(lines)


def write(lines: list[str]) -> None:
    versions = [f"{n} {importlib.metadata.version(n)}" for n in ("keras", "jax", "torch")]
    head = (
        "# How costs grow\n\n"
        f"Written by `python benchmarks/growth.py` on {datetime.date.today()}: {os.cpu_count()} "
        f"cores, {platform.machine()}, {', '.join(versions)}. Each row is a process of its own; "
        "*memory* is what its peak grew by.\n\n"
        "| case | size | time | memory |\n|---|---:|---:|---:|\n"
    )
    TABLE.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
