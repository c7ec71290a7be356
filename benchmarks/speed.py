"""Compares the speed of Polus with Keras' fit and with hand-written loops, interleaved in one run.

    python benchmarks/speed.py                                   # every backend; writes the table
    python benchmarks/speed.py --backend jax --workload mlp      # measures a single workload

Each method trains on the same data in the same order, with the same initial weights, layers, loss
and optimizer; after the first epoch all of them must have reached the same weights. Then they take
turns for a few tenths of a second each, in alternating order; the table shows the median over the
rounds. The hand-written loops have their batches on the device before the clock starts and compute
no metric: they are an upper limit. The time to the first step, the peak memory and the import time
are measured in fresh processes; the first step in three of them per method.

All output goes to a pseudo-terminal, so that all progress bars are live.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import logging
import os
import platform
import pty
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from device import add_device, check, choose, page

ROOT = Path(__file__).parent.parent
MNIST = ROOT.parent / "shared" / "data" / "mnist" / "mnist.npz"
TABLE = ROOT / "docs" / "benchmarks" / "speed.md"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
STEPS_PER_EXECUTION = (10, 50, "auto")
DEVICE: list[str] = []  # the arguments that name it

# ---------------------------------------------------------------------- what is trained


@dataclass
class Workload:
    """Arrays of examples, and a function that returns a model from inputs to logits."""

    x: Any
    y: Any
    batch_size: int
    make_model: Callable[[], Any]


def mlp() -> Workload:
    import numpy as np
    from keras import Sequential, layers

    x = np.random.default_rng(0).normal(size=(32_000, 64)).astype("float32")
    y = np.argmax(x[:, :10], axis=1).astype("int32")
    stack = lambda: [layers.Dense(128, "relu"), layers.Dense(10)]  # noqa: E731
    return Workload(x, y, 32, lambda: Sequential([layers.Input((64,)), *stack()]))


def cnn() -> Workload:
    import numpy as np
    from keras import Sequential, layers

    count = 20 * 128
    if MNIST.exists():
        with np.load(MNIST) as data:
            x, y = data["x_train"][:count, ..., None], data["y_train"][:count]
    else:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (count, 28, 28, 1)), rng.integers(0, 10, count)
    stack = lambda: [  # noqa: E731
        layers.Conv2D(16, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(10),
    ]
    make = lambda: Sequential([layers.Input((28, 28, 1)), *stack()])  # noqa: E731
    return Workload((x / 255).astype("float32"), y.astype("int32"), 128, make)


def encoder() -> Workload:
    import numpy as np
    from keras import Model, layers

    rng = np.random.default_rng(0)
    x = rng.integers(0, 1000, (10 * 32, 64)).astype("int32")

    def make() -> Model:
        tokens = layers.Input((64,), dtype="int32")
        h = layers.Embedding(1000, 128)(tokens)
        for _ in range(2):
            h = layers.LayerNormalization()(h + layers.MultiHeadAttention(4, 32)(h, h))
            h = layers.LayerNormalization()(h + layers.Dense(128)(layers.Dense(512, "relu")(h)))
        return Model(tokens, layers.Dense(10)(layers.GlobalAveragePooling1D()(h)))

    return Workload(x, (x[:, 0] % 10).astype("int32"), 32, make)


def dual_encoder() -> Workload:
    """Returns pairs of a question and a text; question i belongs to text i of the batch."""
    import numpy as np
    from keras import Model, layers, ops

    rng = np.random.default_rng(0)
    texts = rng.integers(0, 5000, (100 * 32, 64)).astype("int32")

    def make() -> Model:
        question = layers.Input((16,), dtype="int32")
        text = layers.Input((64,), dtype="int32")
        words, pool = layers.Embedding(5000, 64), layers.GlobalAveragePooling1D()
        dense, out = layers.Dense(64, "relu"), layers.Dense(64)
        encoded = [out(dense(pool(words(tokens)))) for tokens in (question, text)]
        scores = layers.Lambda(lambda q: ops.matmul(q[0], ops.transpose(q[1])))(encoded)
        return Model([question, text], scores)

    return Workload([texts[:, :16], texts], np.arange(len(texts), dtype="int32") % 32, 32, make)


WORKLOADS = {"mlp": mlp, "cnn": cnn, "encoder": encoder, "dual encoder": dual_encoder}

# ---------------------------------------------------------------------- how it is trained

# A method takes a workload and returns the model and a function that trains for some epochs.
Method = Callable[[Workload], tuple[Any, Callable[[int], Any]]]


class NotApplicable(Exception):
    """Raised if a backend does not have this method of training."""


def parts(work: Workload) -> tuple[Any, Any, Any]:
    """Returns a model, an optimizer and a loss, the same for every method."""
    import keras

    keras.utils.set_random_seed(0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return work.make_model(), keras.optimizers.Adam(1e-3), loss


def polus(work: Workload, bare: bool = False, eager: bool = False, watch: Any = None) -> Any:
    import keras

    from polus.callbacks import Callback, ConsoleLogCallback, LossSmoothCallback
    from polus.core import get_jit_compile, set_jit_compile
    from polus.data import from_arrays
    from polus.metrics import Accuracy
    from polus.training import ClassifierTrainer

    class StopAfterEpoch(Callback):
        def on_epoch_end(self, epoch: int) -> None:
            self.coordinator.trainer.early_stop = True

    if eager and keras.config.backend() != "torch":
        raise NotApplicable  # only PyTorch is eager by default
    model, *rest = parts(work)
    trainer = ClassifierTrainer(
        model, *rest, metrics=[] if bare else [Accuracy(model.output_shape[-1] or work.batch_size)]
    )
    data = from_arrays((work.x, work.y), work.batch_size, shuffle=False)
    callbacks = [watch] if watch else []
    if not bare:
        callbacks += [ConsoleLogCallback(), LossSmoothCallback()]

    def train(epochs: int) -> None:
        mode = get_jit_compile()
        set_jit_compile(False if eager else mode)
        try:
            if epochs == 1:  # a long run that is stopped: in a short one Polus would time less
                trainer.train(data, epochs=10_000, callbacks=[*callbacks, StopAfterEpoch()])
            else:
                trainer.train(data, epochs=epochs, callbacks=callbacks)
        finally:
            set_jit_compile(mode)

    return model, train


def fit(work: Workload, steps_per_execution: Any = 1, watch: Any = None) -> Any:
    model, optimizer, loss = parts(work)
    model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=steps_per_execution)

    def train(epochs: int) -> None:
        callbacks = [watch] if watch else []
        model.fit(work.x, work.y, work.batch_size, epochs, shuffle=False, callbacks=callbacks)

    return model, train


def batches(work: Workload) -> list[Any]:
    """Returns all batches as tensors of the backend."""
    import keras

    def rows(i: int) -> Any:
        part = slice(i, i + work.batch_size)
        return keras.tree.map_structure(
            lambda array: keras.ops.convert_to_tensor(array[part]), (work.x, work.y)
        )

    return [rows(i) for i in range(0, len(work.y), work.batch_size)]


def stacks(work: Workload, max_steps: int = 200) -> list[Any]:
    """Returns the same batches, many of them stacked: (steps, batch size, ...)."""
    import keras

    data = batches(work)
    count = next(n for n in range(min(max_steps, len(data)), 0, -1) if len(data) % n == 0)
    return [
        keras.tree.map_structure(lambda *rows: keras.ops.stack(rows), *data[i : i + count])
        for i in range(0, len(data), count)
    ]


def by_hand(work: Workload, many: bool = False, watch: Any = None) -> Any:
    """Returns the loop of the backend's own tutorial, with one or many steps per call."""
    import keras

    model, optimizer, loss = parts(work)
    optimizer.build(model.trainable_variables)
    make = {"tensorflow": tensorflow_loop, "jax": jax_loop, "torch": torch_loop}
    if many and keras.config.backend() == "torch":
        raise NotApplicable  # PyTorch has no compiled loop
    run = make[keras.config.backend()](model, optimizer, loss, many)
    data = stacks(work) if many else batches(work)
    return model, lambda epochs: run(data * epochs, watch or (lambda losses: None))


def tensorflow_loop(model: Any, optimizer: Any, loss: Any, many: bool) -> Any:
    import tensorflow as tf

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(value, weights), weights, strict=True))
        return value

    def steps(xs: Any, ys: Any) -> Any:
        losses = tf.TensorArray(tf.float32, len(ys))
        for i in tf.range(len(ys)):
            batch = tf.nest.map_structure(lambda rows, i=i: rows[i], (xs, ys))
            losses = losses.write(i, step(*batch))
        return losses.stack()

    compiled = tf.function(steps, jit_compile=True) if many else tf.function(step)

    def run(data: list[Any], watch: Any) -> Any:
        losses = []
        for x, y in data:
            losses.append(compiled(x, y))
            watch(losses)
        return [value.numpy() for value in losses]

    return run


def jax_loop(model: Any, optimizer: Any, loss: Any, many: bool) -> Any:
    import jax

    def compute(trainable: Any, others: Any, x: Any, y: Any) -> Any:
        predicted, others = model.stateless_call(trainable, others, x, training=True)
        return loss(y, predicted), others

    def step(state: Any, batch: Any) -> Any:
        trainable, others, slots = state
        (value, others), gradients = jax.value_and_grad(compute, has_aux=True)(
            trainable, others, *batch
        )
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return (trainable, others, slots), value

    def steps(state: Any, batches: Any) -> Any:
        return jax.lax.scan(step, state, batches)

    compiled = jax.jit(steps if many else step, donate_argnums=0)
    variables = model.trainable_variables, model.non_trainable_variables, optimizer.variables
    # Copies, since the buffers are donated, and Keras shares buffers of equal initial values.
    state = tuple([v.value.copy() for v in kind] for kind in variables)

    def run(data: list[Any], watch: Any) -> Any:
        nonlocal state
        losses = []
        for batch in data:
            state, value = compiled(state, batch)
            losses.append(value)
            watch(losses)
        values = jax.device_get(losses)
        for kind, new in zip(variables, state, strict=True):
            for variable, value in zip(kind, new, strict=True):
                variable.assign(value.copy())
        return values

    return run


def torch_loop(model: Any, optimizer: Any, loss: Any, many: bool) -> Any:
    import torch

    weights = model.trainable_variables

    def run(data: list[Any], watch: Any) -> Any:
        losses = []
        for x, y in data:
            model.zero_grad()
            value = loss(y, model(x, training=True))
            value.backward()
            with torch.no_grad():
                optimizer.apply([weight.value.grad for weight in weights], weights)
            losses.append(value.detach())
            watch(losses)
        return [value.item() for value in losses]

    return run


METHODS: dict[str, Method] = {
    "Polus": polus,
    "Polus, bare": functools.partial(polus, bare=True),
    "Polus, eager": functools.partial(polus, eager=True),
    "fit": fit,
    **{
        f"fit, {n} steps per call": functools.partial(fit, steps_per_execution=n)
        for n in STEPS_PER_EXECUTION
    },
    "hand-written": by_hand,
    "hand-written, many steps per call": functools.partial(by_hand, many=True),
}

# ---------------------------------------------------------------------- how it is measured


class AutotuneLog(logging.Handler):
    """Keeps the log line in which Polus reports the configurations that it timed."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Timed"):
            self.text = record.getMessage()


def race(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Measures steps per second of each method in interleaved rounds."""
    import numpy as np

    work = WORKLOADS[name]()
    num_steps = -(-len(work.y) // work.batch_size)
    runs: dict[str, tuple[Callable[[], Any], int]] = {}
    autotune: dict[str, str] = {}
    unavailable: dict[str, str] = {}
    reference = None
    for method, make in METHODS.items():
        handler = AutotuneLog()
        logging.getLogger("polus.steps").addHandler(handler)
        try:
            model, train = make(work)
            train(1)  # compiles; Polus times its configurations
        except NotApplicable:
            continue
        except Exception as error:
            if method in ("Polus", "fit", "hand-written"):
                raise
            unavailable[method] = f"{type(error).__name__}: {error}"
            continue
        finally:
            logging.getLogger("polus.steps").removeHandler(handler)
        if handler.text:
            autotune[method] = handler.text
        weights = model.get_weights()
        reference = reference or weights
        difference = max(
            float(np.abs(a - b).max()) for a, b in zip(weights, reference, strict=True)
        )
        if difference > 0.02:
            raise RuntimeError(f"{name}: the weights of {method} differ by {difference:.3f}.")
        train(1)
        start = time.perf_counter()
        train(1)
        epochs = max(1, round(seconds / (time.perf_counter() - start)))
        runs[method] = functools.partial(train, epochs), epochs * num_steps
    rates: dict[str, list[float]] = {method: [] for method in runs}
    for i in range(rounds):
        for method in list(runs)[:: 1 if i % 2 == 0 else -1]:
            run, steps = runs[method]
            start = time.perf_counter()
            run()
            rates[method].append(steps / (time.perf_counter() - start))
    return {"rates": rates, "autotune": autotune, "unavailable": unavailable}


def fresh(name: str, method: str, memory: bool) -> dict[str, float]:
    """Measures the first step of this process in seconds and, with `memory`, its peak in MiB.

    That is the memory of the device, and of the process where the device has none of its own.

    The time of the first step runs from the call that trains until the loss is on the host, with
    fit's compiler and no timing of others. The peak is that after three epochs.
    """
    import gc

    import keras

    import polus.core
    from polus.backends import backend
    from polus.callbacks import Callback

    times: list[float] = []

    class First(Callback):
        def on_train_batch_end(self, epoch: int, step: int, loss: Any) -> None:
            self.coordinator.trainer.early_stop = bool(times.append(time.perf_counter()) or loss)

    class FirstOfFit(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            times.append(time.perf_counter())
            self.model.stop_training = True

    def first_by_hand(losses: list[Any]) -> None:
        if not times:
            float(keras.ops.convert_to_numpy(losses[0]))
            times.append(time.perf_counter())

    watch = {"Polus": First, "fit": FirstOfFit}.get(method.split(",")[0], lambda: first_by_hand)()
    polus.core.set_jit_compile(keras.config.backend() == "jax")
    work = WORKLOADS[name]()
    _, train = METHODS[method](work, watch=watch)
    gc.collect()  # collecting the imports' garbage takes a quarter of a second, at any moment
    start = time.perf_counter()
    train(1)
    if not memory:
        return {"first": times[0] - start}
    polus.core.set_jit_compile("auto")
    polus.core.set_tuning_cache(None)
    _, train = METHODS[method](work)
    train(1)  # of a long run: Polus times its configurations
    train(2)
    peak = backend.peak_device_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first": times[0] - start, "MiB": peak / 2**20}


def all_fresh(backend: str, name: str) -> dict[str, dict[str, float]]:
    """Returns the median first step of three processes, and the peak memory, of each method."""
    methods = ("Polus", "fit", "hand-written")
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for i in range(3):
        for method in methods:
            arguments = ["--workload", name, "--fresh", method, *["--memory"] * (i == 0)]
            runs[method].append(in_child(backend, *arguments))
    return {
        method: {
            "first": statistics.median(run["first"] for run in results),
            "MiB": results[0]["MiB"],
        }
        for method, results in runs.items()
    }


def imports() -> float:
    """Returns the seconds that it takes to import Polus after Keras."""
    code = (
        "import time, keras; start = time.perf_counter()\n"
        "import polus, polus.training, polus.callbacks, polus.data, polus.metrics\n"
        "print(time.perf_counter() - start)"
    )
    taken = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(5)]
    return statistics.median(map(float, taken))


def in_child(backend: str, *arguments: str) -> Any:
    """Runs this program in a new process with a terminal, and returns its result."""
    with tempfile.NamedTemporaryFile("r") as file:
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, __file__, "--into", file.name, *DEVICE, *arguments],
            env=os.environ | {"KERAS_BACKEND": backend, "TERM": "xterm-256color"},
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        shown = bytearray()

        def drain() -> None:
            while True:
                try:
                    shown.extend(os.read(master, 65536))
                except OSError:  # the process has closed its side of the terminal
                    return
                del shown[:-20_000]

        thread = threading.Thread(target=drain)
        thread.start()
        code = process.wait()
        thread.join()
        os.close(master)
        if code:
            sys.exit(f"{backend}: {' '.join(arguments)} failed.\n{shown.decode(errors='replace')}")
        return json.load(file)


# ---------------------------------------------------------------------- the tables


def median(result: dict[str, Any], method: str) -> float:
    return statistics.median(result["rates"][method])


def formatted(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def best_rate(result: dict[str, Any], *starts: str) -> float:
    """Returns the rate of the fastest method whose name starts with one of `starts`."""
    return max(median(result, method) for method in result["rates"] if method.startswith(starts))


def targets(
    backend: str, name: str, result: dict[str, Any]
) -> list[tuple[str, float, float, bool]]:
    """Returns the targets as (measure, value, target, whether the target is a minimum)."""
    torch = backend == "torch"
    ours = median(result, "Polus")
    first = result["fresh"]["Polus"]["first"] / result["fresh"]["fit"]["first"]
    memory = result["fresh"]["Polus"]["MiB"] / result["fresh"]["fit"]["MiB"]
    rows = [("first step vs `fit`", first, 1.2, False), ("memory vs `fit`", memory, 1.1, False)]
    if name == "mlp":
        bounds = {"tensorflow": (5, 1.5, 0.8), "jax": (3, 1.5, 0.7), "torch": (1.2, 1.2, 0.95)}
        limit = "hand-written" if torch else "hand-written, many steps per call"
        of = ("`fit`", "best `fit`", limit)
        against = (median(result, "fit"), best_rate(result, "fit"), median(result, limit))
        rows += [
            (f"vs {what}", ours / rate, bound, True)
            for what, rate, bound in zip(of, against, bounds[backend], strict=True)
        ]
    elif name in ("cnn", "encoder"):
        rate = max(median(result, "fit"), median(result, "hand-written"))
        rows.append(("vs the better of `fit` and hand-written", ours / rate, 1.0, True))
        if name == "encoder" and backend == "tensorflow":
            rows.append(("vs `fit`", ours / median(result, "fit"), 1.1, True))
    return rows


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats the results (backend -> workload or "imports" -> measurements) as Markdown."""
    lines = []
    for name in WORKLOADS:
        if not any(name in result for result in results.values()):
            continue
        lines += [
            f"### {name}",
            "",
            "| backend | method | steps/s | range | Polus speed-up | first step | peak memory |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for backend, of_backend in results.items():
            result = of_backend[name]
            for method, rates in result["rates"].items():
                rate, cost = median(result, method), result["fresh"].get(method)
                costs = f"{cost['first']:.2f} s | {cost['MiB']:,.0f} MiB" if cost else " | "
                lines.append(
                    f"| {BACKENDS[backend]} | {method} | {formatted(rate)} "
                    f"| {formatted(min(rates))} to {formatted(max(rates))} "
                    f"| {median(result, 'Polus') / rate:.2f} x | {costs} |"
                )
        lines.append("")
        for backend, of_backend in results.items():
            if text := of_backend[name]["autotune"].get("Polus"):
                lines += [f"{BACKENDS[backend]}: {text}", ""]
    unavailable = {
        f"{BACKENDS[backend]}, {method}: {why}": None  # the same for each workload
        for backend, of_backend in results.items()
        for name in WORKLOADS
        if name in of_backend
        for method, why in of_backend[name]["unavailable"].items()
    }
    lines += ["### Not available", "", *(f"- {line}" for line in unavailable), ""]
    lines += [
        "### Targets",
        "",
        "| backend | workload | measure | target | measured | |",
        "|---" * 6 + "|",
    ]
    for backend, of_backend in results.items():
        rows = [
            (name, *row)
            for name in WORKLOADS
            if name in of_backend
            for row in targets(backend, name, of_backend[name])
        ]
        rows.append(("", "`import polus` after Keras, s", of_backend["imports"], 0.15, False))
        for name, what, value, bound, least in rows:
            good = value >= bound if least else value <= bound
            lines.append(
                f"| {BACKENDS[backend]} | {name} | {what} | {'at least' if least else 'at most'} "
                f"{bound} | {value:.2f} | {'reached' if good else '**missed**'} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="approximate time per method and round"
    )
    add_device(parser)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    parser.add_argument("--fresh", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.workload or list(WORKLOADS)
    choose(options.device)
    DEVICE[:] = "--device", options.device
    if options.into:
        check(options.device)
        (name,) = names
        result: Any = (
            fresh(name, options.fresh, options.memory)
            if options.fresh
            else race(name, options.rounds, options.seconds)
        )
        Path(options.into).write_text(json.dumps(result))
        return
    start, load = time.time(), os.getloadavg()[0]
    results: dict[str, dict[str, Any]] = {}
    for backend in options.backend or BACKENDS:
        os.environ["KERAS_BACKEND"] = backend
        results[backend] = {}
        for name in names:
            print(f"{time.time() - start:.0f} s: {backend}, {name}", file=sys.stderr, flush=True)
            size = "--rounds", str(options.rounds), "--seconds", str(options.seconds)
            result = in_child(backend, "--workload", name, *size)
            result["fresh"] = all_fresh(backend, name)
            results[backend][name] = result
        results[backend]["imports"] = imports()
    found = importlib.metadata.distributions()
    known = {d.metadata["Name"].replace("_", "-"): d.version for d in found}
    packages = [p for p in ("keras", "tensorflow-cpu", "tensorflow", "jax", "torch") if p in known]
    versions = ", ".join(f"{p} {known[p]}" for p in packages)
    text = (
        f"# Speed\n\nWritten by `make bench` on {datetime.date.today()}, in "
        f"{(time.time() - start) / 60:.0f} minutes: {os.cpu_count()} cores, {platform.machine()}, "
        f"{options.device}, load {load:.1f} at the start; "
        f"Python {platform.python_version()}, {versions}. "
        f"Median of {options.rounds} interleaved rounds. Compare rows of one backend only. "
        "[Performance](../performance.md#the-benchmark) explains how to read the tables."
        f"\n\n{table(results)}\n"
    )
    print(text)
    if not options.backend and not options.workload:
        page(TABLE, options.device).write_text(text)


if __name__ == "__main__":
    main()
