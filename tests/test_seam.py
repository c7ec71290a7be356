"""The seam: `core.function` and `core.value_and_grad`, alone and under a trainer."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from recorder import Recorder

import polus
from polus import core
from polus.backends import backend
from polus.backends.scopes import VariableRecorder, active_dry_run, current_scope
from polus.data import from_arrays
from polus.training import BaseTrainer, ClassifierTrainer

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
HERE = str(Path(__file__))
SOURCE = str(Path(polus.__file__).parent)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def number(tensor) -> float:
    return float(ops.convert_to_numpy(tensor))


def variable(value, **kwargs) -> keras.Variable:
    return keras.Variable(np.asarray(value, "float32"), **kwargs)


# ---------------------------------------------------------------------- function


def test_variables_are_found_and_updated():
    total, rate = variable(0.0), variable(2.0)

    @core.function
    def add(x):
        total.assign_add(rate * ops.sum(x))
        return {"now": total.value, "twice": (2 * total,)}

    outputs = [add(np.float32([1, 2])) for _ in range(3)]
    assert number(total) == 18
    # What was returned stays as it was, though the variable went on.
    assert [number(o["now"]) for o in outputs] == [6, 12, 18]
    assert [number(o["twice"][0]) for o in outputs] == [12, 24, 36]
    rate.assign(0.0)  # only read, and still not a constant
    assert number(add(np.float32([1, 2]))["now"]) == 18


def test_a_variable_can_be_returned():
    total = variable(0.0)

    @core.function
    def add():
        total.assign_add(1.0)
        return total

    outputs = [add() for _ in range(3)]
    assert [number(o) for o in outputs] == [1, 2, 3]


def test_python_runs_once_per_signature_and_each_constant():
    seen = []

    @core.function
    def power(x, n, scale=1.0):
        seen.append(n)
        return scale * x**n

    runs = []
    for _ in range(3):
        assert number(power(np.float32(3), 2)) == 9
        assert number(power(np.float32(3), 3)) == 27
        assert number(power(np.float32(3), n=2, scale=2.0)) == 18
        runs.append(len(seen))
    assert set(np.diff(runs)) == ({0} if backend.COMPILES else {3})
    assert power(x=np.ones(5, "float32"), n=2).shape == (5,)
    assert len(seen) > runs[-1]


def test_methods_are_compiled_once_per_instance():
    class Counter:
        traces = 0

        def __init__(self, by):
            self.by = by
            self.total = variable(0.0)

        @core.function
        def count(self, x):
            type(self).traces += 1
            self.total.assign_add(self.by * x)
            return self.total + 0.0

        @core.function(jit_compile=keras.backend.backend() == "jax")
        def twice(self, x):
            return self.count(x) + self.count(x)

    ones, tens = Counter(1.0), Counter(10.0)
    runs = []
    for _ in range(3):
        ones.count(np.float32(1))
        tens.count(np.float32(1))
        runs.append(Counter.traces)
    assert (number(ones.total), number(tens.total)) == (3, 30)
    assert set(np.diff(runs)) == ({0} if backend.COMPILES else {2})
    assert number(ones.twice(np.float32(1))) == 4 + 5
    assert Counter.count.__name__ == "count"


def test_an_error_in_a_step_shows_the_line_of_the_user():
    class Wrong(ClassifierTrainer):
        def forward_with_grads(self, x, y):
            return y, ops.reshape(self.model(x), (7, 7))  # the line

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    trainer = Wrong(model, keras.optimizers.SGD(), keras.losses.MeanSquaredError())
    for run in (trainer.train_step, lambda *batch: trainer.train([batch], epochs=1)):
        with pytest.raises(Exception, match=r"7") as caught:
            run(X, X[:, :2])
        lines = [str(f.line) for f in traceback.extract_tb(caught.tb) if f.filename == HERE]
        assert lines[-1].endswith("# the line")
        assert "7" in str(caught.value)


# ---------------------------------------------------------------------- value_and_grad


def both(fn):
    """Run as it is and inside of a compiled function."""
    return [fn(), core.function(fn)()]


def test_gradients_are_those_of_calculus():
    a, b = variable([1.0, -2.0]), variable(3.0)

    def run():
        return core.value_and_grad(lambda: ops.sum(a**2) * b, [a, b])

    for value, (by_a, by_b) in both(run):
        assert number(value) == 15
        np.testing.assert_allclose(ops.convert_to_numpy(by_a), [6, -12])
        assert number(by_b) == 5


def test_gradients_in_gradients():
    a = variable(2.0)

    def run():
        def slope():
            return core.value_and_grad(lambda: a**4, [a])[1][0]

        def curvature():
            return core.value_and_grad(slope, [a])[1][0]

        return core.value_and_grad(curvature, [a])

    for value, (gradient,) in both(run):
        assert (number(value), number(gradient)) == (48, 48)  # 12 a^2, 24 a


def test_a_closure_may_assign_and_return_more():
    a, seen = variable(3.0), variable(0.0, trainable=False)

    def run():
        def closure():
            seen.assign_add(a * 2)
            return a**2 + seen, {"seen": seen + 0.0, "fixed": ops.ones(2)}

        before = seen + 1.0  # what was assigned before is seen inside, and after
        result = core.value_and_grad(closure, [a], has_aux=True)
        return before, seen + 0.0, *result

    for i, (before, after, (value, more), (gradient,)) in enumerate(both(run)):
        assert (number(before), number(after)) == (6 * i + 1, 6 * i + 6)
        assert number(value) == 9 + 6 * (i + 1)
        assert number(more["seen"]) == 6 * (i + 1)
        assert number(gradient) == 6  # a variable holds a value, not the way to it
    assert number(seen) == 12


def test_the_gradient_by_an_assigned_variable_is_that_at_its_new_value():
    a, b = variable(3.0), variable(1.0)

    def run():
        def closure():
            a.assign(ops.minimum(a, 2.0) * b)  # a layer that normalises its weight
            return a**2 * b

        return core.value_and_grad(closure, [a, b])

    for value, (by_a, by_b) in both(run):
        assert (number(value), number(a)) == (4, 2)
        assert (number(by_a), number(by_b)) == (4, 4)  # 2ab and a^2, at a = 2


def test_a_gradient_of_the_users_own_may_read_a_variable():
    a, scale = variable(3.0), variable(2.0, trainable=False)

    @ops.custom_gradient
    def scaled(x):
        def gradient(*args, upstream=None):
            return (args[0] if upstream is None else upstream) * scale

        return x * 1.0, gradient

    @core.function
    def run():
        return core.value_and_grad(lambda: scaled(ops.convert_to_tensor(a)), [a])[1][0]

    @core.function
    def run_in_loop(x):
        def slope(row):
            return core.value_and_grad(lambda: scaled(row * a), [a])[1][0]

        return backend.repeat(slope, 2, x)

    assert number(run()) == 2
    scale.assign(5.0)  # not a constant of the program
    assert number(run()) == 5
    for factor in (5.0, 7.0):
        scale.assign(factor)
        slopes = ops.convert_to_numpy(run_in_loop(np.float32([1, 2])))
        np.testing.assert_array_equal(slopes, [factor, 2 * factor])


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_an_optimizer_may_assign_a_variable_that_the_step_reads(steps_per_execution):
    count = variable(0.0, trainable=False)

    class Counting(keras.optimizers.SGD):
        def update_step(self, gradient, weight, learning_rate):
            count.assign_add(1.0)
            super().update_step(gradient, weight, learning_rate)

    class Counted(BaseTrainer):
        def train_step(self, x):
            loss = self.minimize(
                lambda: ops.mean(self.model(x)) + count, self.model.trainable_variables
            )
            return loss

    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    trainer = Counted(model, Counting(0.0), lambda: None)
    batches = [np.zeros((4, 3), "float32")] * 2
    history = trainer.train(batches, 1, steps_per_execution=steps_per_execution)
    assert (*history.steps["loss"], number(count)) == (0, 1, 2)


def test_no_gradient_is_none():
    used, unused = variable(1.0), variable([1.0, 2.0])
    kinds = []

    def run():
        value, gradients = core.value_and_grad(lambda: used * 2, [unused, used])
        kinds.append([gradient is None for gradient in gradients])
        return value

    both(run)
    assert kinds == [[True, False]] * len(kinds)
    fixed, frozen = variable(2.0, trainable=False), variable(2.0)
    frozen.trainable = False
    count = keras.Variable(1, trainable=False)
    for _, gradients in both(
        lambda: core.value_and_grad(lambda: used * fixed * frozen, [fixed, frozen, used, count])
    ):
        assert [g is None for g in gradients] == [True, True, False, True]
    constant = core.value_and_grad(lambda: ops.ones(()), [used, unused])
    assert constant[1] == [None, None]


def test_a_gradient_by_an_embedding_has_its_shape_and_updates_as_any_other():
    table = variable(np.ones((4, 2)))
    rows = np.int32([1, 1, 3])

    def run():
        return core.value_and_grad(
            lambda: ops.sum(ops.matmul(np.float32([[1, 2, 3]]), ops.take(table, rows, axis=0))),
            [table],
        )

    for _, (gradient,) in both(run):
        expected = np.float32([[0, 0], [3, 3], [0, 0], [3, 3]])
        np.testing.assert_array_equal(ops.convert_to_numpy(gradient), expected)

    # An optimizer that squares gradients has to square the sum over a repeated row.
    layer = keras.layers.Embedding(4, 2, embeddings_initializer="ones")
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    trainer = ClassifierTrainer(
        model,
        keras.optimizers.Adam(0.1, beta_2=0.5),
        lambda y, p: ops.sum(p * y),
        post_process_grads=lambda grads: [g * 1.0 for g in grads],
    )
    y = np.float32([[[1], [2], [3]]])
    for _ in range(2):
        trainer.train_step(rows[None], y)
    reference = keras.Variable(np.ones((4, 2), "float32"))
    optimizer = keras.optimizers.Adam(0.1, beta_2=0.5)
    optimizer.build([reference])
    for _ in range(2):
        optimizer.apply([ops.convert_to_tensor(expected)], [reference])
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer.embeddings), ops.convert_to_numpy(reference), rtol=1e-6
    )


@pytest.mark.parametrize("trial", range(4))  # what runs in the wrong order does so now and then
def test_a_loss_is_that_of_the_weights_before_the_update(trial):
    """Also where the gradient doesn't need it: that of a linear loss depends on its shape only."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    weights = [w.copy() for w in model.get_weights()]

    def terms(y, p):
        return {"loss": ops.mean(p), "largest": ops.max(p)}

    core.set_jit_compile(backend.candidates()[0])
    try:
        trainer = ClassifierTrainer(model, keras.optimizers.SGD(0.5), terms)
        history = trainer.train([(X, X)] * 3, epochs=1, steps_per_execution=3)
    finally:
        core.set_jit_compile("auto")
    for i in range(3):
        kernel, bias = weights[0] - 0.5 * i * X.mean(axis=0)[:, None], weights[1] - 0.5 * i
        expected = X @ kernel + bias
        assert history.steps["loss"][i] == pytest.approx(expected.mean(), abs=1e-5)
        assert history.steps["largest"][i] == pytest.approx(expected.max(), abs=1e-5)


@pytest.mark.parametrize(
    ("fn", "came"), [(lambda a: a * 2, r"shape \(2,\)"), (lambda a: 1.0, "a float")]
)
def test_a_value_that_is_no_scalar(fn, came):
    a = variable([1.0, 2.0])
    with pytest.raises(ValueError, match=f"scalar tensor, and the function returned {came}"):
        core.value_and_grad(lambda: fn(a), [a])


# ---------------------------------------------------------------------- programs of a step


def gathered(payload):
    """Batches of three columns and a label each, out of rows of the payload."""
    examples, rows = payload
    batches = ops.take(examples, rows, axis=0)
    return {"x": batches[..., :3]}, batches[..., 3], None


@pytest.mark.parametrize(
    ("jit_compile", "convolutions"), [(None, False), (None, True), (False, False)]
)
@pytest.mark.parametrize("unpack", [None, gathered])
def test_a_program_runs_a_step_once_or_many_times(unpack, jit_compile, convolutions):
    total, runs = variable(0.0, trainable=False), []

    def step(features, y, missing):
        assert missing is None
        runs.append(len(runs))
        total.assign_add(ops.sum(features["x"]) + ops.sum(y))
        return {"sums": (total, ops.sum(y))}  # the variable's value at this step, not the last one

    rows = np.int32([[0, 1], [2, 3], [4, 5], [6, 7]])
    stacked = ({"x": ops.convert_to_tensor(X[rows, :3])}, ops.convert_to_tensor(X[rows, 3]), None)
    examples = ops.convert_to_tensor(X)
    single = backend.program(step, unpack, False, jit_compile)
    many = backend.program(step, unpack, True, jit_compile, convolutions=convolutions)
    expected, sums = X[rows].sum(axis=(1, 2)), X[rows, 3].sum(axis=1)
    for turn in range(3):
        total.assign(0.0)
        payload = stacked if unpack is None else (examples, rows)
        outputs = many(np.int32(3), 4, payload)["sums"]
        now, y = (ops.convert_to_numpy(output)[:3] for output in outputs)
        np.testing.assert_allclose(now, np.cumsum(expected)[:3], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(y, sums[:3], rtol=1e-4, atol=1e-5)

        first = ({"x": stacked[0]["x"][3]}, stacked[1][3], None)
        arguments = first if unpack is None else ((examples, rows[3:]),)
        now, y = single(*arguments)["sums"]
        assert number(now) == pytest.approx(expected.sum(), abs=1e-4)
        assert number(total) == pytest.approx(expected.sum(), abs=1e-4)
        if turn == 0:
            traced = len(runs)
    if backend.COMPILES and jit_compile is None:
        assert len(runs) == traced  # compiled once


@pytest.mark.parametrize("convolutions", [False, True])
def test_a_program_serves_every_count_up_to_its_capacity(convolutions):
    runs = []

    def step(x):
        runs.append(x)
        return ops.sum(x)

    many = backend.program(step, None, True, convolutions=convolutions)
    x = ops.convert_to_tensor(X)
    traced = []
    for count in (8, 5, 2):
        outputs = ops.convert_to_numpy(many(np.int32(count), 8, (x,)))[:count]
        np.testing.assert_allclose(outputs, X.sum(axis=1)[:count], rtol=1e-5, atol=1e-6)
        traced.append(len(runs))
    assert traced == ([traced[0]] * 3 if backend.COMPILES else [8, 13, 15])


def test_repeat_applies_a_function_to_rows_inside_a_step():
    total = variable(0.0, trainable=False)

    @core.function
    def step(x):
        doubled = backend.repeat(lambda row: (total.assign_add(ops.sum(row)), 2 * row)[1], 8, x)
        return doubled, total + 0.0

    doubled, after = step(X)
    np.testing.assert_allclose(ops.convert_to_numpy(doubled), 2 * X, rtol=1e-6)
    assert number(after) == pytest.approx(X.sum(), abs=1e-4)


# ---------------------------------------------------------------------- dry runs


def test_a_dry_run_reports_variables_and_updates_and_changes_nothing():
    a, b = variable(1.0, name="a"), variable(2.0, name="b")
    total, unused = variable(0.0, name="total", trainable=False), variable(0.0)
    sgd, adam = keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.1)
    sgd.build([a])
    before = [number(v) for v in (a, b, total, sgd.iterations)]

    def step(x):
        dry_run = active_dry_run()
        total.assign_add(ops.sum(x))
        for optimizer, weights in ((sgd, [a]), (adam, [b]), (adam, [a, b])):
            dry_run.record_updates((optimizer, weights))
        with VariableRecorder(outer=current_scope()):
            assert active_dry_run() is dry_run
        return total + a * b

    dry_run = backend.trace(step, [X])
    assert active_dry_run() is None
    assert [number(v) for v in (a, b, total, sgd.iterations)] == before
    assert dry_run.updates == [(sgd, [a]), (adam, [b]), (adam, [a, b])]
    assert dry_run.merged_updates() == [(sgd, [a]), (adam, [b, a])]
    assert dry_run.variables == [total, a, *sgd.variables, b]
    assert not any(v is unused for v in dry_run.variables)
    assert not adam.built


def test_minimize_in_a_dry_run_calls_the_loss_and_updates_nothing():
    trainer = Following()
    gradients = []
    trainer.post_process_grads = lambda found: gradients.append(found) or found
    before = ops.convert_to_numpy(trainer.source).copy()
    dry_run = backend.trace(trainer.train_step, [X])
    assert dry_run.updates == [(trainer.optimizer, [trainer.source])]
    assert not gradients
    np.testing.assert_array_equal(trainer.source, before)
    with pytest.raises(ValueError, match=r"scalar tensor, got a tensor of shape \(8, 1\)"):
        backend.trace(lambda x: trainer.minimize(lambda: trainer.model(x), [trainer.source]), [X])


def test_a_hand_written_update_in_a_dry_run_changes_nothing():
    weight, sgd = variable(3.0), keras.optimizers.SGD(0.5)

    def step(x):
        value, gradients = core.value_and_grad(lambda: weight**2 * ops.mean(x), [weight])
        sgd.apply(gradients, [weight])
        return value

    dry_run = backend.trace(step, [np.ones(4, "float32")])
    assert number(weight) == 3
    assert {id(weight), *map(id, sgd.variables)} <= {id(v) for v in dry_run.variables}
    assert number(core.function(step)(np.ones(4, "float32"))) == 9
    assert number(weight) == 3 - 0.5 * 6


# ---------------------------------------------------------------------- buffers and their owners


class Following(BaseTrainer):
    """Its target is a copy of the model's kernel, from before the update."""

    def __init__(self):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False)])
        super().__init__(model, keras.optimizers.SGD(1.0), loss=ops.mean)
        self.source = model.trainable_variables[0]
        self.target = variable(np.zeros((4, 1)), trainable=False)

    def train_step(self, x):
        self.target.assign(self.source)
        return self.minimize(
            lambda: ops.mean(self.model(x)), self.model.trainable_variables, self.optimizer
        )


def test_variables_that_share_a_buffer_go_their_own_ways():
    trainer = Following()
    slope = X.mean(axis=0)[:, None]
    start = ops.convert_to_numpy(trainer.source).copy()
    held = trainer.source.value
    trainer.target.assign(trainer.source)  # one buffer from here on, on some backends
    for steps_per_execution in (1, 3):
        trainer.source.assign(start)
        trainer.target.assign(trainer.source)
        trainer.train([(X,)] * 6, epochs=1, steps_per_execution=steps_per_execution)
        np.testing.assert_allclose(trainer.source, start - 6 * slope, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(trainer.target, start - 5 * slope, rtol=1e-4, atol=1e-5)
    # A value that the user took before is not torn away by a donated buffer.
    assert ops.convert_to_numpy(held).shape == (4, 1)


def kernels_seen(every_steps):
    """The kernel after each call of the backend. It is doubled after step 5."""
    trainer, seen = Following(), {}

    def look(name, epoch=0, step=0, loss=None):
        if name == "step_end" and (step + 1) % every_steps == 0:
            seen[step] = ops.convert_to_numpy(trainer.source).copy()
            if step == 5:
                trainer.source.assign(2 * trainer.source)

    trainer.source.assign(np.ones((4, 1)))
    recorder = Recorder(look, every_steps)
    trainer.train([(X,)] * 9, epochs=1, callbacks=[recorder], steps_per_execution=3)
    assert set(recorder.blocks) == {every_steps}
    return seen


def test_callbacks_see_and_set_variables_between_calls():
    single, several = kernels_seen(1), kernels_seen(3)
    assert sorted(several) == [2, 5, 8]
    slope = X.mean(axis=0)[:, None]
    for step, kernel in several.items():
        expected = 1 - (step + 1) * slope if step <= 5 else 2 * (1 - 6 * slope) - (step - 5) * slope
        np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(kernel, single[step], rtol=1e-4, atol=1e-5)


def test_what_the_user_sets_between_steps_is_seen():
    trainer = Following()
    trainer.train_step(X)
    trainer.source.assign(np.full((4, 1), 7.0))
    trainer.train_step(X)
    np.testing.assert_allclose(trainer.target, np.full((4, 1), 7.0))
    saved = trainer.model.get_weights()
    trainer.train_step(X)
    trainer.model.set_weights(saved)
    trainer.train_step(X)
    np.testing.assert_allclose(trainer.target, saved[0])


# ---------------------------------------------------------------------- as Keras' own fit


@pytest.mark.parametrize(
    ("optimizer", "policy"),
    [
        ({"gradient_accumulation_steps": 3}, "float32"),
        ({"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 4}, "float32"),
        ({"clipnorm": 0.02}, "float32"),
        ({"global_clipnorm": 0.05}, "float32"),
        ({"clipvalue": 0.01, "weight_decay": 0.1}, "float32"),
        ({}, "mixed_bfloat16"),
        ({}, "mixed_float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value), "plain"),
)
def test_optimizers_do_what_they_do_in_fit(optimizer, policy):
    # A layer's policy is not a model's, which both of us look at.
    scaled = policy == "mixed_float16"

    def make():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(8, "tanh", dtype=policy),
                keras.layers.Dense(2, dtype="float32"),
            ]
        )
        adam = keras.optimizers.Adam(0.02, **optimizer)
        return model, keras.optimizers.LossScaleOptimizer(adam, 64.0) if scaled else adam

    # Compilers may keep more bits between two operations than a 16-bit type has.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if policy == "float32" else {"atol": 2e-2}
    as_in_fit(make, X, 1, 4, **tolerance)


def embedding():
    return keras.layers.Embedding(5, 3), keras.layers.Flatten()  # rows that come several times


def normalised():
    # It assigns the weight that it normalises, inside the gradient by this weight.
    return (keras.layers.SpectralNormalization(keras.layers.Dense(3, "tanh")),)


@pytest.mark.parametrize("layers", [embedding, normalised])
def test_layers_do_what_they_do_in_fit(layers):
    if layers is normalised and keras.backend.backend() == "jax":
        pytest.skip("On JAX, fit drops what a layer assigns to a trained weight.")
    dtype = "int32" if layers is embedding else "float32"
    x = np.abs(2 * X).astype(dtype)

    def make():
        model = keras.Sequential([keras.Input((4,), dtype=dtype), *layers(), keras.layers.Dense(2)])
        return model, keras.optimizers.Adam(0.02)

    as_in_fit(make, x, 4, rtol=1e-4, atol=1e-5)


def as_in_fit(make, x, *steps_per_execution, **tolerance):
    """Trains what `make` gives with `fit` and each number of steps, and compares the weights."""
    y = (X[:, :1] > 0).astype("int32")
    keras.utils.set_random_seed(1)
    theirs, optimizer = make()
    start = theirs.get_weights()
    theirs.compile(optimizer, CROSS_ENTROPY, jit_compile=False)
    theirs.fit(x, y, batch_size=4, epochs=5, shuffle=False, verbose=0)

    expected = theirs.get_weights()
    moved = [np.abs(a - b).max() for a, b in zip(expected, start, strict=True)]
    assert min(moved) > 0.005
    assert max(moved) > 0.02

    batches = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4)] * 5
    for count in steps_per_execution:
        keras.utils.set_random_seed(1)
        ours, optimizer = make()
        core.set_jit_compile(backend.candidates()[0])
        try:
            trainer = ClassifierTrainer(ours, optimizer, CROSS_ENTROPY)
            trainer.train(batches, epochs=1, steps_per_execution=count)
        finally:
            core.set_jit_compile("auto")
        for mine, other in zip(ours.get_weights(), expected, strict=True):
            np.testing.assert_allclose(mine, other, **tolerance, err_msg=f"{count} at a time")


# ---------------------------------------------------------------------- across backends


@pytest.mark.parametrize("trained_on", ["tensorflow", "jax", "torch"])
@pytest.mark.needs_keras_3_15  # the files were written by Keras 3.15
def test_a_model_trained_on_one_backend_predicts_the_same_on_another(trained_on):
    saved = Path(__file__).parent / "data" / f"trained_on_{trained_on}.keras"
    stored = json.loads(saved.with_suffix(".json").read_text())
    model = keras.saving.load_model(saved)
    predicted = ops.convert_to_numpy(model(np.float32(stored["inputs"])))
    np.testing.assert_allclose(predicted, stored["predictions"], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------- what is loaded, and how deep


def test_a_new_process_loads_one_backend_and_no_extras_and_configures_nothing(tmp_path):
    code = """
import logging, os, sys
import keras, numpy as np
before = set(sys.modules)  # Keras loads of them what it finds
others = {"tensorflow", "jax", "torch"} - {keras.backend.backend()}
extras = {"matplotlib.pyplot", "pandas", "sklearn", "ir_measures", "tokenizers"}
def check_modules():
    found = (others | extras) & (set(sys.modules) - before)
    assert not found, found
    if keras.backend.backend() != "tensorflow":
        assert "tensorflow" not in sys.modules

import polus.core, polus.callbacks, polus.metrics, polus.data, polus.training
check_modules()
for name in polus.__all__:
    getattr(polus, name)
import polus.lr_finder, polus.checkpoint
check_modules()
assert not logging.getLogger().handlers and not logging.getLogger("polus").handlers
assert not os.listdir(), os.listdir()
keras.config.set_floatx("float64")
assert keras.config.dtype_policy().name == "float64"  # it was left open
keras.config.set_floatx("float32")
keras.config.set_dtype_policy("float32")

model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
loss = keras.losses.MeanSquaredError()
trainer = polus.training.ClassifierTrainer(model, keras.optimizers.SGD(), loss)
x = np.ones((4, 2), "float32")
trainer.train([(x, x[:, :1])], epochs=1, steps_per_execution=1)
check_modules()
import polus.ir.training
assert len(logging.getLogger("polus").handlers) == 1 and not logging.getLogger().handlers
assert not os.listdir(), os.listdir()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(SOURCE).parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def frames_of_a_run(**settings) -> list[list[str]]:
    """Polus' own frames around each call of the loss, of a run on arrays in memory."""
    found = []

    def loss(y, p):
        frames = [(f.filename, f.name) for f in traceback.extract_stack()]
        found.append([name for file, name in frames if file.startswith(SOURCE)])
        return ops.mean((y - p) ** 2)

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    trainer = ClassifierTrainer(model, keras.optimizers.SGD(), loss)
    trainer.train(from_arrays((X, X[:, :1]), batch_size=2), epochs=2, **settings)
    return found


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_the_frames_between_train_and_the_loss(steps_per_execution):
    """A longer list is a deeper library: each name is one that a reader has to know."""
    core.set_jit_compile(backend.candidates()[0])  # nothing has to be timed
    try:
        frames = frames_of_a_run(steps_per_execution=steps_per_execution)[-1]
    finally:
        core.set_jit_compile("auto")
    program = PROGRAM_FRAMES[keras.backend.backend()]
    if steps_per_execution > 1 and program == ["single"]:
        program = ["loop"]
    # A single step looks at its gradients; a loop is looked at once it has run.
    guarded = ["guarded"] if steps_per_execution == 1 else []
    assert frames == ["train", *program, *guarded, *STEP_FRAMES, "forward"]


def test_the_frames_below_a_program_with_default_settings():
    """As in the test above, also where Polus times ways to run a step, and in the dry run."""
    found = {tuple(names[names.index("train_step") - 1 :]) for names in frames_of_a_run()}
    caller = {"tensorflow": {"__call__"}, "jax": {"pure"}, "torch": {"single", "loop"}}
    dry = {names for names in found if "value_and_grad" not in names}
    callers = caller[keras.backend.backend()]
    assert found - dry <= {(name, *STEP_FRAMES, "forward") for name in callers}
    assert found - dry
    assert {names[1:] for names in dry} == {("train_step", "minimize", "forward")}


def test_the_frames_of_the_dry_run():
    """Where a user's bug is met first."""
    call = [] if keras.backend.backend() == "torch" else ["call"]  # looks at what a step returns
    expected = ["train", "prepare", "trace", *call, "train_step", "minimize", "forward"]
    assert frames_of_a_run()[0] == expected


# JAX's two transformations, jit and grad, each take a function of the variables' values.
PROGRAM_FRAMES = {"tensorflow": ["__call__"], "jax": ["__call__", "pure"], "torch": ["single"]}
STEP_FRAMES = ["train_step", "minimize", "value_and_grad"]
if keras.backend.backend() == "jax":
    STEP_FRAMES.append("differentiated")
