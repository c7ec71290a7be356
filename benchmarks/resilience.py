"""Kills training runs repeatedly, resumes them, and compares the results bit by bit.

    python benchmarks/resilience.py                                # writes the tables
    python benchmarks/resilience.py --backend jax --source arrays  # measures a single row
    python benchmarks/resilience.py --results FILE                 # continues after an interruption
    python benchmarks/resilience.py --processes 2 --source arrays --only kills

For each data source one run trains without interruption. A second run is started repeatedly, and
its process is killed with SIGKILL at a random moment, every second time while it writes a
checkpoint. After eight kills it may finish. The benchmark compares, bit by bit, the loss of every
step that any of these processes ran, and at the end all losses, weights, validation results and
the states of the callbacks. The model has dropout, batch norm, and Adam with a schedule and
gradient accumulation.

With `--processes 2`, two processes train one model: one of them, chosen at random, is killed, and
what a launcher does follows: the other one is ended, and both are started again.

The cost of saving is the number of steps per second with and without a save in every hundred steps,
and the time that a save blocks the loop. Keras' BackupAndRestore is measured for comparison and, on
JAX, Orbax' AsyncCheckpointer if it is installed; these save the variables only. The model is frozen
except for its head: with Adam on all weights a step takes so long here that the cost of a save
disappears in it.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "benchmarks" / "resilience.md"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
OF_LIBRARIES = ["StatefulDataLoader", "grain", "Hugging Face"]
SOURCES = ["arrays", "tf.data", "DataLoader", *OF_LIBRARIES, "generator", "retrieval"]
METHODS = ["Polus", "Orbax", "Keras fit, BackupAndRestore"]
EPOCHS, EXAMPLES, BATCH = 8, 150, 8
MAX_BLOCKS = 12  # a process is killed within so many blocks of three steps; a run has 56 of them
PAUSE_SECS = 0.02  # after every block, so that a run is long enough to be killed


# ---------------------------------------------------------------------- one process of a run


def dataset(source: str, x: Any, y: Any) -> Any:
    """Returns a shuffled dataset of the given kind."""
    import numpy as np

    if source == "arrays":
        from polus.data import from_arrays

        return from_arrays((x, y), BATCH, seed=1)
    if source == "tf.data":
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(64, seed=1).batch(BATCH)
    if source == "DataLoader":
        import torch

        torch.manual_seed(1)
        return torch.utils.data.DataLoader([*zip(x, y, strict=True)], BATCH, shuffle=True)
    if source in OF_LIBRARIES:
        return dataset_of_library(source, [{"x": a, "y": b} for a, b in zip(x, y, strict=True)])

    def generator() -> Any:  # takes its order and noise from NumPy's global random generator
        order = np.random.permutation(len(x))
        for i in range(0, len(x), BATCH):
            rows = order[i : i + BATCH]
            noise = np.random.normal(scale=0.1, size=(len(rows), x.shape[1]))
            yield x[rows] + noise.astype("float32"), y[rows]

    return generator


def dataset_of_library(source: str, examples: list[dict[str, Any]]) -> Any:
    """Returns a shuffled dataset of a library whose iterators have a state."""
    if source == "StatefulDataLoader":
        import torch
        from torchdata.stateful_dataloader import StatefulDataLoader

        order = torch.Generator().manual_seed(1)
        return StatefulDataLoader(examples, BATCH, shuffle=True, generator=order)
    if source == "grain":
        import grain

        return grain.MapDataset.source(examples).seed(1).shuffle().batch(BATCH)
    import datasets

    streamed = datasets.Dataset.from_list(examples).to_iterable_dataset(num_shards=3)
    return streamed.shuffle(seed=1, buffer_size=40).batch(BATCH).with_format("numpy")


def pair(batch: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the batch of a library, a dict, as the step takes it."""
    return batch["x"], batch["y"]


def join(index: int, count: int, port: int) -> contextlib.AbstractContextManager[object]:
    """Makes this process one of several, which train in the scope that is returned."""
    backend = os.environ["KERAS_BACKEND"]
    if backend == "tensorflow":
        workers = [f"localhost:{port + i}" for i in range(count)]
        task = {"type": "worker", "index": index}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
        import tensorflow as tf

        return tf.distribute.MultiWorkerMirroredStrategy().scope()
    if backend == "jax":
        import jax
        import keras

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keras.distribution.initialize(f"localhost:{port}", count, index)
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    else:
        import torch

        address = f"tcp://localhost:{port}"
        torch.distributed.init_process_group("gloo", address, rank=index, world_size=count)
    return contextlib.nullcontext()


def child(source: str, folder: Path, result: Path, log: Path) -> None:
    """Starts or resumes the run, prints a line per block of steps, and writes the results."""
    import keras
    import numpy as np

    import polus.core
    from polus.backends import backend
    from polus.callbacks import Callback, EarlyStop, ValidationDataCallback
    from polus.checkpoint import Checkpoint
    from polus.metrics import Accuracy
    from polus.training import ClassifierTrainer

    keras.utils.set_random_seed(1)
    # A run keeps the compiler that "auto" chose from its first save on. Here processes are also
    # killed before that, and a second timing might choose a different one.
    polus.core.set_jit_compile(backend.candidates()[0])
    rng = np.random.default_rng(0)

    class Logged(Callback):
        """Writes every loss to a file as soon as it is known, and slows the run down."""

        def on_train_begin(self) -> None:
            self.file = log.open("a")

        def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
            print("block", flush=True)
            for step, loss in zip(steps, np.asarray(losses), strict=True):
                self.file.write(f"{epoch} {step} {loss.tobytes().hex()}\n")
            self.file.flush()
            time.sleep(PAUSE_SECS)

    layers = keras.layers
    stack = [layers.Dense(32, "relu"), layers.BatchNormalization(), layers.Dropout(0.3)]
    adam = keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(1e-2, 100), gradient_accumulation_steps=2
    )
    checkpoint = Checkpoint(folder, every_steps=3)
    trainer: Any
    if source == "retrieval":
        from polus.ir import losses, scores
        from polus.ir.callbacks import HardNegativeMining
        from polus.ir.data import PairBatches
        from polus.ir.models import DualEncoder
        from polus.ir.training import EfficientDenseRetrievalTrainer

        queries = rng.normal(size=(EXAMPLES, 12)).astype("float32")
        documents = (queries + rng.normal(size=queries.shape)).astype("float32")
        data: Any = PairBatches(queries, documents, [[i] for i in range(EXAMPLES)], BATCH, seed=1)
        trainer = EfficientDenseRetrievalTrainer(
            DualEncoder(keras.Sequential([*stack, layers.Dense(8)])),
            scores.cosine,
            optimizer=adam,
            loss=losses.InfoNCE(),
            freeze_encoder=False,
        )
        callbacks = [HardNegativeMining(data, k=2, every_epochs=2)]
    else:
        x = rng.normal(size=(2 * EXAMPLES, 12)).astype("float32")
        y = (x[:, :4].sum(axis=1) > 0).astype("int32") + (x[:, 4] > 1)
        data = dataset(source, x[:EXAMPLES], y[:EXAMPLES].astype("int32"))
        trainer = ClassifierTrainer(
            keras.Sequential([*stack, layers.Dense(3)]),
            adam,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[Accuracy(num_classes=3)],
        )
        held_out = [(x[EXAMPLES:], y[EXAMPLES:].astype("int32"))]
        callbacks = [ValidationDataCallback(held_out), EarlyStop("loss", patience=EPOCHS)]
    logged = Logged()
    history = trainer.train(
        data,
        EPOCHS,
        [*callbacks, checkpoint, logged],
        pair if source in OF_LIBRARIES else None,
        resume=folder,
        steps_per_execution=3,
    )
    variables = logged.coordinator.run.variables()
    weights = [keras.ops.convert_to_numpy(variable).tobytes() for variable in variables]
    outcome = {
        "losses": history.steps["loss"].tobytes().hex(),
        "epochs": json.dumps(history.epochs),
        "weights": hashlib.sha256(b"".join(weights)).hexdigest(),
        "callbacks": repr([callback.get_state() for callback in callbacks]),
    }
    result.write_text(json.dumps(outcome))


# ---------------------------------------------------------------------- the kills


Processes = list[subprocess.Popen[bytes]]


def start(backend: str, source: str, folder: Path, count: int) -> Processes:
    """Starts the processes of a run."""
    command = [sys.executable, __file__, "--backend", backend, "--source", source]
    command += ["--child", str(folder)]
    environment = os.environ | {"KERAS_BACKEND": backend}
    port = str(free_port(count))
    return [
        subprocess.Popen(
            [*command, *(["--join", str(i), str(count), port] if count > 1 else [])],
            env=environment,
            stdout=subprocess.PIPE if i == 0 else subprocess.DEVNULL,
            stderr=(folder / "stderr").open("ab"),
        )
        for i in range(count)
    ]


def free_port(count: int) -> int:
    """Returns the first of `count` ports that are free, one after the other."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            first = stack.enter_context(socket.socket())
            first.bind(("localhost", 0))
            port = int(first.getsockname()[1])
            for i in range(1, count):
                stack.enter_context(socket.socket()).bind(("localhost", port + i))
            return port


def survive(backend: str, source: str, most_kills: int, count: int) -> dict[str, int]:
    """Kills a run repeatedly and counts what is identical to an uninterrupted one."""
    with tempfile.TemporaryDirectory() as temporary:
        whole, parts = Path(temporary) / "whole", Path(temporary) / "parts"
        for folder in (whole, parts):
            folder.mkdir()
        finish(start(backend, source, whole, count), whole)
        expected = dict(read_log(whole))
        kills = in_save = 0
        while not (parts / "result").exists():
            processes = start(backend, source, parts, count)
            output = processes[0].stdout
            assert output is not None
            killed = False
            for _ in range(random.randrange(1, MAX_BLOCKS) if kills < most_kills else 10**9):
                if not output.readline():
                    break
            else:
                killed = kill(processes, parts)
            if killed:
                end(processes)
                kills += 1
                in_save += any(parts.glob("checkpoints/.tmp-*"))
            else:
                finish(processes, parts)
        ran = read_log(parts)
        first, second = (json.loads((folder / "result").read_text()) for folder in (whole, parts))
        return {
            "kills": kills,
            "in_save": in_save,
            "steps": len(ran),
            "same": sum(expected.get(position) == loss for position, loss in ran),
            "results": len(first),
            "same_results": sum(first[name] == second[name] for name in first),
        }


def kill(processes: Processes, folder: Path) -> bool:
    """Kills a process at a random moment within two blocks; half the time during a save.

    Returns:
        Whether it was still running.
    """
    time.sleep(random.uniform(0, 2 * PAUSE_SECS))
    process = random.choice(processes)
    saving = random.random() < 0.5
    while saving and process.poll() is None and not any(folder.glob("checkpoints/.tmp-*")):
        time.sleep(0.0005)
    process.kill()
    return process.wait() == -9


def end(processes: Processes) -> None:
    """Ends the processes that are left, as a launcher does."""
    time.sleep(random.uniform(0, 10 * PAUSE_SECS) if len(processes) > 1 else 0)
    for process in processes:
        process.kill()
        process.communicate()


def finish(processes: Processes, folder: Path) -> None:
    """Waits for the processes to finish."""
    for process in processes:
        process.communicate()
    if any(process.returncode for process in processes):
        raise SystemExit((folder / "stderr").read_text())


def read_log(folder: Path) -> list[tuple[str, str]]:
    """Returns the epoch and step, and the bits of the loss, of every step that was run."""
    lines = (folder / "log").read_text().splitlines()
    found = [line.rsplit(" ", 1) for line in lines]
    # The last line may be cut off.
    return [(position, loss) for position, loss in found if len(loss) == 8]


# ---------------------------------------------------------------------- the cost


def costs(method: str, megabytes: int) -> dict[str, float]:
    """Measures steps per second with and without saving, and how long a save blocks the loop.

    A save is due every 200 steps, so every second hundred steps of the run contain a save and the
    others do not.
    """
    import keras
    import numpy as np

    from polus.callbacks import Callback
    from polus.checkpoint import Checkpoint
    from polus.data import from_arrays
    from polus.training import ClassifierTrainer

    width = int((megabytes * 1e6 / 3 / 4) ** 0.5)
    hundreds = 40 if megabytes < 10 else 5
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8 * 100 * hundreds, width)).astype("float32")
    y = np.zeros(len(x), "int32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    held: list[float] = []
    times: list[float] = []

    def timed(save: Callable[..., None]) -> Callable[..., None]:
        def timed_save(*arguments: Any, **named: Any) -> None:
            start_time = time.perf_counter()
            save(*arguments, **named)
            held.append(time.perf_counter() - start_time)

        return timed_save

    def model() -> Any:
        frozen = [keras.layers.Dense(width, "relu", trainable=False) for _ in range(3)]
        return keras.Sequential([*frozen, keras.layers.Dense(2)])

    class Clock(Callback):
        every_steps = 100

        def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
            np.asarray(losses)  # waits for the device
            if steps.stop % 100 == 0:
                times.append(time.perf_counter())

    class KerasClock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            float(logs["loss"])
            if (batch + 1) % 100 == 0:
                times.append(time.perf_counter())

    def train(saver: Callback) -> None:
        trainer = ClassifierTrainer(model(), keras.optimizers.Adam(1e-3), loss)
        trainer.train(from_arrays((x, y), 8), 1, [Clock(), saver])

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).absolute()
        if method == "Polus":
            checkpoint = Checkpoint(folder, every_steps=200)
            checkpoint.save = timed(checkpoint.save)  # type: ignore[method-assign]
            train(checkpoint)
        elif method == "Orbax":
            import orbax.checkpoint as ocp

            class Orbax(Callback):
                every_steps = 200
                variables: Any = None

                def on_boundary(self) -> None:
                    run = self.coordinator.run
                    if run.step and run.step % 200 == 0:
                        self.variables = self.variables or run.variables()
                        self.save(run.step, [v.value for v in self.variables])

                @timed
                def save(self, step: int, values: Any) -> None:
                    orbax.save(folder / str(step % 400), values, force=True)

            with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as orbax:
                train(Orbax())
        else:
            fitted = model()
            fitted.build((None, width))
            fitted.compile(keras.optimizers.Adam(1e-3), loss)
            backup = keras.callbacks.BackupAndRestore(folder / "keras", save_freq=200)
            backup._save_model = timed(backup._save_model)
            fitted.fit(x, y, 8, verbose=0, shuffle=False, callbacks=[KerasClock(), backup])
    hundred_secs = np.diff(times)
    return {
        # The first hundred steps include compilation; the first save allocates its buffers.
        "without": 100 / statistics.median(hundred_secs[2::2]),
        "with": 100 / statistics.median(hundred_secs[3::2]),
        "first": held[0],
        "held": statistics.median(held[1:]),
    }


# ---------------------------------------------------------------------- the tables


def survival_table(rows: list[tuple[str, str, dict[str, int]]]) -> str:
    """Returns the table of the killed runs."""
    lines = [
        "| backend | data | kills | of these during a save | steps run, repeated ones included "
        "| identical losses | identical results |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for backend, source, n in rows:
        lines.append(
            f"| {BACKENDS[backend]} | {source} | {n['kills']} | {n['in_save']} | {n['steps']} "
            f"| {n['same']} | {n['same_results']} of {n['results']} |"
        )
    total = {name: sum(row[2][name] for row in rows) for name in rows[0][2]}
    lines.append(
        f"| **all** | | **{total['kills']}** | **{total['in_save']}** | **{total['steps']}** "
        f"| **{total['same']}** | **{total['same_results']} of {total['results']}** |"
    )
    return "\n".join(lines)


def cost_table(rows: list[tuple[str, int, str, dict[str, float]]]) -> str:
    """Returns the table of the cost of saving."""
    lines = [
        "| backend | state | saved by | steps/s without saving | steps/s, one save per 100 steps "
        "| loop blocked per save | by the first save |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for backend, megabytes, method, n in rows:
        lines.append(
            f"| {BACKENDS[backend]} | {megabytes} MB | {method} | {n['without']:,.1f} "
            f"| {n['with']:,.1f} ({n['with'] / n['without'] - 1:+.0%}) "
            f"| {n['held'] * 1000:,.0f} ms | {n['first'] * 1000:,.0f} ms |"
        )
    return "\n".join(lines)


def measured(
    results: Path, key: list[Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Returns the values stored in the file under this key, or measures and stores them."""
    for line in results.read_text().splitlines() if results.exists() else []:
        if (found := json.loads(line))["key"] == key:
            return dict(found["values"])
    values = measure()
    print(key, values, flush=True)
    with results.open("a") as file:
        file.write(json.dumps({"key": key, "values": values}) + "\n")
    return values


def costs_alone(backend: str, megabytes: int, method: str) -> dict[str, Any]:
    """Measures `costs` in a new process."""
    output = subprocess.run(
        [sys.executable, __file__, "--costs", method, str(megabytes)],
        env=os.environ | {"KERAS_BACKEND": backend},
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main() -> None:
    """Runs the measurements that the command line selects."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--source", choices=SOURCES, action="append")
    parser.add_argument("--kills", type=int, default=8, help="maximum number of kills per run")
    parser.add_argument("--only", choices=["kills", "costs"])
    parser.add_argument(
        "--results",
        type=Path,
        help="a file to append each result to; results that it contains are not measured again",
    )
    parser.add_argument("--processes", type=int, default=1, help="that train one model")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--join", nargs=3, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--costs", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, index = options.child, options.join[0] if options.join else 0
        with join(*options.join) if options.join else contextlib.nullcontext():
            others = f"-{index}" if index else ""  # only those of the first process are compared
            files = folder / f"result{others}", folder / f"log{others}"
            child(options.source[0], folder / "checkpoints", *files)
        return
    if options.costs:
        print(json.dumps(costs(options.costs[0], int(options.costs[1]))))
        return
    backends = options.backend or list(BACKENDS)
    with tempfile.TemporaryDirectory() as temporary:
        results = options.results or Path(temporary) / "results"
        tables = []
        if options.only != "costs":
            rows = []
            for backend, source in itertools.product(backends, options.source or SOURCES):
                several = [options.processes] if options.processes > 1 else []
                run = functools.partial(survive, backend, source, options.kills, options.processes)
                rows.append((backend, source, measured(results, [backend, source, *several], run)))
            tables.append(survival_table(rows))
        if options.only != "kills":
            costly = []
            for key in itertools.product(backends, (1, 500), METHODS):
                if key[2] == "Orbax" and (key[0] != "jax" or not importlib.util.find_spec("orbax")):
                    continue
                run = functools.partial(costs_alone, *key)
                costly.append((*key, measured(results, list(key), run)))
            tables.append(cost_table(costly))
    text = "\n\n".join(tables)
    print(text)
    if not options.backend and not options.source and not options.only:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(
            "# Killed runs\n\nWritten by `python benchmarks/resilience.py` on "
            f"{os.cpu_count()} cores; its docstring describes the measurements.\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
