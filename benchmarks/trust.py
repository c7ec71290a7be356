"""Measures what it costs to watch and record a training: `python benchmarks/trust.py`.

The small MLP of `speed.py`, whose steps are mostly dispatch, so that what is added shows most. All
ways train in one process, from the same data, and take turns, in alternating order. The figures are
medians over the rounds: steps per second, and the cost beside *nothing* in the same round, by the
clock and by the processor time of the process, which other programs disturb less.

- *nothing*: `on_nonfinite="ignore"`.
- *default*: a step that is not finite raises.
- *record*: `record=True`, with gradient norms of each step.
- *everything*: `record=True` and a run directory, without the report at its end.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from speed import mlp, parts


def ways() -> dict[str, Callable[[int], Any]]:
    """Returns a function of the number of epochs for each way to train."""
    import polus
    from polus.runs import RunDirectory

    work = mlp()
    data = polus.from_arrays((work.x, work.y), work.batch_size, shuffle=False)

    def trainer() -> Any:
        model, *rest = parts(work)
        return polus.ClassifierTrainer(model, *rest, metrics=[polus.Accuracy(10)])

    def everything(epochs: int, trainer: Any) -> None:
        folder = tempfile.mkdtemp()
        try:
            saving = [RunDirectory(folder, report=False)]
            trainer.train(data, epochs, saving, record=True, run_dir=folder)
        finally:
            shutil.rmtree(folder)

    trainers = [trainer() for _ in range(4)]
    return {
        "nothing": lambda n: trainers[0].train(data, n, on_nonfinite="ignore"),
        "default": lambda n: trainers[1].train(data, n),
        "record": lambda n: trainers[2].train(data, n, record=True),
        "everything": lambda n: everything(n, trainers[3]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    import keras

    logging.disable(logging.WARNING)
    runs, steps = ways(), len(mlp().y) // 32
    for run in runs.values():
        run(3)
    began = time.perf_counter()
    runs["default"](3)
    epochs = max(3, round(3 * options.seconds / (time.perf_counter() - began)))
    clock: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(options.rounds):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            began, used = time.perf_counter(), time.process_time()
            runs[name](epochs)
            clock[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - used)
    for name in runs:
        costs = [
            statistics.median(a / b - 1 for a, b in zip(secs[name], secs["nothing"], strict=True))
            for secs in (clock, processor)
        ]
        rate = epochs * steps / statistics.median(clock[name])
        found = {"steps/s": round(rate), "cost": costs[0], "processor": costs[1]}
        print(keras.backend.backend(), name, json.dumps(found))


if __name__ == "__main__":
    main()
