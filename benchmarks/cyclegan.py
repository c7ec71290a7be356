"""Compares a step of four losses with hand-written loops that share one forward pass.

    KERAS_BACKEND=torch python benchmarks/cyclegan.py --rounds 10 --seconds 2

The step is that of examples/cyclegan.py: two translators, two judges, four optimizers, a penalty on
slopes at inputs. Each loop has the same initial weights and batches, and is compiled where the
backend compiles; after five steps both must have the same weights. Then they take turns, in
alternating order. The hand-written loop has its batches on the device before the clock starts. The
figures are the medians over the rounds of the steps per second, and of the rounds' own ratios: by
the clock, and by the processor time of this process, which other programs disturb less.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
EXAMPLE = Path(__file__).parent.parent / "examples" / "cyclegan.py"
NAMES = ("a_to_b", "b_to_a", "judge_a", "judge_b")
Call = Callable[[str, Any], Any]


def make_trainer() -> Any:
    import keras

    spec: Any = importlib.util.spec_from_file_location("cyclegan_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    keras.utils.set_random_seed(0)
    return module.make_trainer(filters=16)


def losses(call: Call, slope: Call, a: Any, b: Any) -> dict[str, Any]:
    """Returns the four losses of one forward pass.

    Args:
        call: Calls a model by its name.
        slope: Returns the gradient of the sum of a judge's numbers by images.
        a: Images of one side.
        b: Images of the other side.
    """
    from keras import ops

    fake_b, fake_a = call("a_to_b", a), call("b_to_a", b)
    cycle = ops.mean(ops.abs(call("b_to_a", fake_b) - a))
    cycle = cycle + ops.mean(ops.abs(call("a_to_b", fake_a) - b))
    found = {}
    for judge, opponent, real, fake in (
        ("judge_a", "b_to_a", a, fake_a),
        ("judge_b", "a_to_b", b, fake_b),
    ):
        steep = ops.mean(ops.sum(slope(judge, real) ** 2, axis=(1, 2, 3)))
        good, bad = call(judge, real), call(judge, fake)
        found[judge] = (ops.mean((good - 1) ** 2) + ops.mean(bad**2)) / 2 + steep
        found[opponent] = ops.mean((bad - 1) ** 2) + 10 * cycle
    return found


def tensorflow_loop(models: Any, optimizers: Any) -> Callable[..., Any]:
    import tensorflow as tf

    def slope(name: str, images: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(images)
            score = tf.reduce_sum(models[name](images, training=True))
        return tape.gradient(score, images)

    @tf.function
    def step(a: Any, b: Any) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            found = losses(lambda name, x: models[name](x, training=True), slope, a, b)
        weights = {name: models[name].trainable_variables for name in NAMES}
        gradients = {
            name: tape.gradient(found[name], [w.value for w in weights[name]]) for name in NAMES
        }
        for name in NAMES:
            optimizers[name].apply(gradients[name], weights[name])
        return found

    return step


def torch_loop(models: Any, optimizers: Any) -> Callable[..., Any]:
    import torch

    def slope(name: str, images: Any) -> Any:
        images = images.detach().requires_grad_()
        score = models[name](images, training=True).sum()
        return torch.autograd.grad(score, images, create_graph=True)[0]

    def step(a: Any, b: Any) -> Any:
        found = losses(lambda name, x: models[name](x, training=True), slope, a, b)
        weights = {name: models[name].trainable_variables for name in NAMES}
        gradients = {
            name: torch.autograd.grad(
                found[name], [w.value for w in weights[name]], retain_graph=name != NAMES[-1]
            )
            for name in NAMES
        }
        with torch.no_grad():
            for name in NAMES:
                optimizers[name].apply(gradients[name], weights[name])
        return {name: value.detach() for name, value in found.items()}

    return step


def jax_loop(models: Any, optimizers: Any) -> Callable[..., Any]:
    import functools

    import jax
    import jax.numpy as jnp

    def compute(weights: Any, others: Any, a: Any, b: Any) -> Any:
        others = dict(others)

        def call(name: str, x: Any) -> Any:
            y, others[name] = models[name].stateless_call(
                weights[name], others[name], x, training=True
            )
            return y

        def slope(name: str, images: Any) -> Any:
            return jax.grad(lambda x: jnp.sum(call(name, x)))(images)

        found = losses(call, slope, a, b)
        return [found[name] for name in NAMES], others

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, a: Any, b: Any) -> Any:
        weights, others, slots = state
        found, backward, others = jax.vjp(
            lambda weights: compute(weights, others, a, b), weights, has_aux=True
        )
        weights, slots = dict(weights), dict(slots)
        for i, name in enumerate(NAMES):
            (gradients,) = backward([jnp.float32(i == j) for j in range(len(NAMES))])
            weights[name], slots[name] = optimizers[name].stateless_apply(
                slots[name], gradients[name], weights[name]
            )
        return (weights, others, slots), found

    def values(variables: Any) -> Any:
        return [variable.value.copy() for variable in variables]

    state = (
        {name: values(models[name].trainable_variables) for name in NAMES},
        {name: values(models[name].non_trainable_variables) for name in NAMES},
        {name: values(optimizers[name].variables) for name in NAMES},
    )

    def run(a: Any, b: Any) -> Any:
        nonlocal state
        state, found = step(state, a, b)
        return found

    def finish() -> None:
        for name in NAMES:
            variables = models[name].trainable_variables, models[name].non_trainable_variables
            for kind, values in zip(variables, state, strict=False):
                for variable, value in zip(kind, values[name], strict=True):
                    variable.assign(value.copy())

    run.finish = finish  # type: ignore[attr-defined]
    return run


def by_hand(trainer: Any, data: list[Any]) -> Callable[..., None]:
    """Returns a loop over batches, given the number of passes."""
    import keras

    models = {name: trainer.model[name] for name in NAMES}
    for name in NAMES:
        trainer.optimizers[name].build(models[name].trainable_variables)
    make = {"tensorflow": tensorflow_loop, "jax": jax_loop, "torch": torch_loop}
    step = make[keras.config.backend()](models, trainer.optimizers)
    tensors = [tuple(map(keras.ops.convert_to_tensor, batch)) for batch in data]

    def run(passes: int, num_batches: int | None = None) -> None:
        found = None
        for _ in range(passes):
            for batch in tensors[:num_batches]:
                found = step(*batch)
        keras.tree.map_structure(keras.ops.convert_to_numpy, found)

    run.finish = getattr(step, "finish", lambda: None)  # type: ignore[attr-defined]
    return run


def polus(
    trainer: Any, data: list[Any], steps_per_execution: int | None = None
) -> Callable[..., None]:
    """Returns a run of the trainer, given the number of epochs."""
    import numpy as np

    from polus.data import from_arrays

    arrays = tuple(np.concatenate(part) for part in zip(*data, strict=True))
    dataset = from_arrays(arrays, len(data[0][0]), shuffle=False)
    settings = {"steps_per_execution": steps_per_execution}
    return lambda epochs: trainer.train(dataset, epochs=epochs, **settings) and None


def random_batches(count: int, batch_size: int = 16) -> list[Any]:
    """Returns batches of two images, each of uniform noise."""
    import numpy as np

    generator = np.random.default_rng(0)
    return [
        tuple(generator.uniform(-1, 1, (2, batch_size, 8, 8, 1)).astype("float32"))
        for _ in range(count)
    ]


def main(rounds: int = 10, seconds: float = 2.0, batch_size: int = 16) -> dict[str, float]:
    """Returns the steps per second of both, and the ratio."""
    import keras
    import numpy as np

    data = random_batches(40, batch_size)
    trainers = {name: make_trainer() for name in ("polus", "hand")}
    runs = {"polus": polus(trainers["polus"], data), "hand": by_hand(trainers["hand"], data)}
    polus(trainers["polus"], data[:5])(1)
    runs["hand"](1, 5)
    getattr(runs["hand"], "finish")()  # noqa: B009
    weights = [trainer.model.get_weights() for trainer in trainers.values()]
    difference = max(float(np.abs(a - b).max()) for a, b in zip(*weights, strict=True))
    if difference > 0.01:
        raise RuntimeError(f"The weights of both differ by {difference:.4f}.")
    start = time.perf_counter()
    runs["hand"](1)
    passes = max(1, round(seconds / (time.perf_counter() - start)))
    runs["polus"](passes)  # times its configurations for runs of this length
    rates: dict[str, list[float]] = {name: [] for name in runs}
    secs: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: 1 if i % 2 == 0 else -1]:
            start, used = time.perf_counter(), time.process_time()
            runs[name](passes)
            rates[name].append(passes * len(data) / (time.perf_counter() - start))
            secs[name].append(time.process_time() - used)
    ratios = [a / b for a, b in zip(rates["polus"], rates["hand"], strict=True)]
    result = {name: statistics.median(found) for name, found in rates.items()}
    result["ratio"] = statistics.median(ratios)
    used_ratios = [b / a for a, b in zip(secs["polus"], secs["hand"], strict=True)]
    result["processor ratio"] = statistics.median(used_ratios)
    print(keras.config.backend(), json.dumps(result), [round(r, 2) for r in sorted(ratios)])
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=16)
    main(**vars(parser.parse_args()))
