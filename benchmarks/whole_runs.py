"""Times whole runs, compiling and choosing how to run included, beside `fit` and fixed settings.

    python benchmarks/whole_runs.py            # every backend; puts its rows into the page's table
    python benchmarks/whole_runs.py --backend torch --workload mlp --data list [--write]

Each run has a fresh model, and Polus starts without any memory of earlier choices or, on JAX, of
what it has compiled (fit has none: a second run of an equal model is much shorter). The clock runs
from before `compile` or the trainer is made until the loss of the last step is read. The methods
take turns; the table shows the median over the rounds. *fit* is the faster one of
`steps_per_execution` 1 and 10, and for the GAN the hand-written loop of benchmarks/cyclegan.py.
*Regret* is the time of Polus divided by that of the best fixed setting: the compiler on or off,
with 1, 10 or 100 steps per execution. Runs of 100,000 steps take turns once, each kind of method
with its most steps per execution only.
"""

import argparse
import functools
import gc
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from device import add_device, check, choose, page
from speed import BACKENDS, ROOT, WORKLOADS, Workload, parts

TABLE = ROOT / "docs" / "benchmarks" / "whole_runs.md"
GAN = "cyclegan"
LENGTHS = {
    "mlp": (10, 100, 1_000, 10_000, 100_000),
    "dual encoder": (10, 100, 1_000),
    "cnn": (10, 100),
    "encoder": (10,),
    GAN: (10, 100),
}
LONG = 10_000  # steps of runs that only arrays are measured with, and one round if there are more
DATA = ("arrays", "list", "generator", "tf.data", "loader")
ONLY = {"tf.data": "tensorflow", "loader": "torch"}  # kinds that only this backend is measured with
STEPS_PER_EXECUTION = (1, 10, 100)


def batches(work: Workload, steps: int) -> Iterator[Any]:
    """Yields `steps` batches of NumPy arrays, from the start again where they end."""
    import keras

    starts = itertools.cycle(range(0, len(work.y) - work.batch_size + 1, work.batch_size))
    for start in itertools.islice(starts, steps):
        rows = slice(start, start + work.batch_size)
        yield keras.tree.map_structure(lambda a, rows=rows: a[rows], (work.x, work.y))


def loaded(work: Workload, kind: str, steps: int) -> Any:
    """Returns `steps` batches as a `tf.data` pipeline or a `DataLoader`."""
    if kind == "tf.data":
        import tensorflow as tf

        examples = tf.data.Dataset.from_tensor_slices((work.x, work.y))
        return examples.batch(work.batch_size, drop_remainder=True).repeat().take(steps).prefetch(2)
    import torch

    examples = torch.utils.data.TensorDataset(torch.tensor(work.x), torch.tensor(work.y))
    rows = [i % len(work.y) for i in range(steps * work.batch_size)]
    return torch.utils.data.DataLoader(torch.utils.data.Subset(examples, rows), work.batch_size)


def fit(work: Workload, kind: str, steps: int, steps_per_execution: int) -> float:
    model, optimizer, loss = parts(work)
    x: Any = batches(work, steps)
    arguments: dict[str, Any] = {}
    if kind == "arrays":
        count = steps * work.batch_size
        rows = slice(count) if count <= len(work.y) else slice(None)
        import keras

        x = keras.tree.map_structure(lambda a: a[rows], work.x)
        arguments = {"y": work.y[rows], "batch_size": work.batch_size, "shuffle": False}
        arguments["epochs"] = max(1, count // len(work.y))
    elif kind == "list":
        data = list(x)

        class Batches(keras_dataset()):
            def __len__(self) -> int:
                return len(data)

            def __getitem__(self, i: int) -> Any:
                return data[i]

        x = Batches()
    elif kind in ONLY:
        x = loaded(work, kind, steps)
    began = time.perf_counter()
    model.compile(optimizer, loss, steps_per_execution=steps_per_execution)
    model.fit(x, verbose=0, **arguments)
    return time.perf_counter() - began


def gan(work: None, kind: str, steps: int, *fixed: Any, by_hand: bool = False) -> float:
    """Times CycleGAN's step of four models and optimizers, which `fit` doesn't have."""
    import cyclegan

    data, trainer = cyclegan.random_batches(min(steps, 40)), cyclegan.make_trainer()
    passes = max(1, steps // len(data))
    if not by_hand:
        start_anew(*fixed[:1])
    began = time.perf_counter()
    if by_hand:
        cyclegan.by_hand(trainer, data)(passes)
    else:
        cyclegan.polus(trainer, data, *fixed[1:])(passes)
    return time.perf_counter() - began


def keras_dataset() -> Any:
    import keras

    return keras.utils.PyDataset


def polus(
    work: Workload,
    kind: str,
    steps: int,
    jit: bool | str = "auto",
    per_execution: int | None = None,
) -> float:
    import keras

    from polus.data import from_arrays
    from polus.training import ClassifierTrainer

    model, *rest = parts(work)
    count, epochs = steps * work.batch_size, 1
    data: Any = lambda: batches(work, steps)  # noqa: E731
    if kind == "arrays":
        epochs = max(1, count // len(work.y))
        rows = slice(count) if count <= len(work.y) else slice(None)
        arrays = keras.tree.map_structure(lambda a: a[rows], (work.x, work.y))
        data = from_arrays(arrays, work.batch_size, shuffle=False)
    elif kind == "list":
        data = list(data())
    elif kind in ONLY:
        data = loaded(work, kind, steps)
    start_anew(jit)
    began = time.perf_counter()
    trainer = ClassifierTrainer(model, *rest)
    history = trainer.train(data, epochs=epochs, steps_per_execution=per_execution)
    assert history.epochs[-1]["loss"] is not None
    return time.perf_counter() - began


def start_anew(jit: bool | str = "auto") -> None:
    """Sets the compiler, and has Polus forget what it chose and compiled before."""
    import keras

    from polus.core import set_jit_compile, set_tuning_cache

    set_jit_compile(jit)
    set_tuning_cache(None)
    if keras.backend.backend() == "jax":
        from polus.backends.jax_executables import forget

        forget()


def methods(workload: str, steps: int) -> dict[str, Callable[[Any, str, int], float]]:
    """Returns the contenders by name."""
    import keras

    own: Any = gan if workload == GAN else polus
    found: dict[str, Any] = {"Polus": own}
    for count in (1,) if keras.backend.backend() == "torch" else (1, 10):
        found[f"fit, {count}"] = lambda *a, count=count: fit(*a, count)
    if workload == GAN:
        found = {"Polus": gan, "fit, by hand": functools.partial(gan, by_hand=True)}
    modes = {"tensorflow": (False, True), "jax": (True,), "torch": (False,)}
    for jit in modes[keras.backend.backend()]:
        for count in STEPS_PER_EXECUTION:
            name = f"fixed, {'compiled' if jit else 'plain'}, {count}"
            found[name] = lambda *a, jit=jit, count=count: own(*a, jit, count)
    if steps <= LONG:
        return found
    fastest = [name for name in found if name.startswith("fit")][-1]
    return {n: run for n, run in found.items() if n in ("Polus", fastest) or n.endswith(", 100")}


def measure(workload: str, kind: str, steps: int, rounds: int) -> dict[str, float]:
    """Returns the median seconds of each method."""
    work = None if workload == GAN else WORKLOADS[workload]()
    contenders = methods(workload, steps)
    secs: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(1 if steps > LONG else rounds):
        order = list(contenders) if i % 2 else list(reversed(contenders))
        for name in order:
            gc.collect()  # what earlier runs left would be collected in this one
            secs[name].append(contenders[name](work, kind, steps))
    return {name: statistics.median(values) for name, values in secs.items()}


def row(backend: str, workload: str, kind: str, steps: int, secs: dict[str, float]) -> str:
    own = secs["Polus"]
    best_fit = min(value for name, value in secs.items() if name.startswith("fit"))
    fixed = {name: value for name, value in secs.items() if name.startswith("fixed")}
    best = min(fixed, key=fixed.__getitem__)
    return (
        f"| {BACKENDS[backend]} | {workload} | {kind} | {steps:,} | {own:.2f} | {best_fit:.2f} "
        f"| {best_fit / own:.2f} | {own / fixed[best]:.2f} | {best.removeprefix('fixed, ')} |"
    )


HEADER = """\
| backend | workload | data | steps | Polus, s | fit, s | fit / Polus | regret | best fixed |
|---|---|---|---|---|---|---|---|---|"""


def child(arguments: argparse.Namespace) -> None:
    """Measures on the backend of this process, and prints a row as each is known."""
    import keras

    check(arguments.device)
    logging.disable(logging.WARNING)
    backend = keras.backend.backend()
    for workload in arguments.workload or LENGTHS:
        for kind in arguments.data or (DATA if workload == "mlp" else DATA[:1]):
            if ONLY.get(kind, backend) != backend:
                continue
            measure(workload, kind, 10, 1)  # loads code
            for steps in arguments.steps or LENGTHS[workload]:
                if steps >= LONG and kind != "arrays" and not arguments.steps:
                    continue
                secs = measure(workload, kind, steps, arguments.rounds)
                print(json.dumps(row(backend, workload, kind, steps, secs)), flush=True)


def write(rows: list[str], path: Path) -> None:
    """Puts rows into the table of the page, each in the place of that of the same run."""
    run = lambda line: tuple(line.split("|")[1:5])  # noqa: E731
    text = path.read_text() if path.exists() else f"# Whole runs\n\n{__doc__}\n{HEADER}\n"
    lines = text.splitlines()
    for new in rows:
        of_table = [i for i, line in enumerate(lines) if line.startswith("|")]
        old = [i for i in of_table if run(lines[i]) == run(new)]
        if old:
            lines[old[0]] = new
        else:
            same = [i for i in of_table if run(lines[i])[:3] == run(new)[:3]]
            lines.insert((same or of_table)[-1] + 1, new)
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--workload", choices=LENGTHS, action="append")
    parser.add_argument("--data", choices=DATA, action="append")
    parser.add_argument("--steps", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    add_device(parser)
    parser.add_argument("--write", action="store_true", help="put the rows into the page's table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    choose(arguments.device)
    if arguments.child:
        return child(arguments)
    rows: list[str] = []
    print(HEADER)
    for backend in arguments.backend or BACKENDS:
        command = [sys.executable, __file__, *sys.argv[1:], "--child"]
        environment = os.environ | {"KERAS_BACKEND": backend}
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            for line in process.stdout or ():
                if line.startswith('"|'):
                    rows.append(json.loads(line))
                    print(rows[-1], flush=True)
            if process.wait():
                errors.seek(0)
                sys.exit(errors.read())
    parts_of_it = arguments.workload, arguments.data, arguments.steps, arguments.backend
    if arguments.write or not any(parts_of_it):
        write(rows, page(TABLE, arguments.device))
    return None


if __name__ == "__main__":
    main()
