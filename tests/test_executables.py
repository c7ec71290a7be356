"""On JAX, a program with the very operations of an earlier one is not compiled again."""

import contextlib
import gc
import weakref

import keras
import numpy as np
import pytest
from keras import layers

if keras.backend.backend() != "jax":
    pytest.skip("JAX only", allow_module_level=True)

import jax
import jax.numpy as jnp

from polus.backends import jax_executables
from polus.core import function
from polus.data import from_arrays
from polus.training import ClassifierTrainer

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
COMPILING = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(autouse=True)
def fresh():
    jax_executables.forget()


@contextlib.contextmanager
def compilations():
    """Yields a list that gets the name of each program that XLA compiles, as JAX says."""
    names = []

    def listen(event, _, fun_name="", **details):
        if event == COMPILING:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def trained(rate=0.1, units=8, activation="relu"):
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(units, activation), layers.Dropout(0.5, seed=1), layers.Dense(2)]
    model = keras.Sequential([keras.Input((6,)), *stack])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = ClassifierTrainer(model, keras.optimizers.SGD(rate), loss)
    losses = trainer.train(from_arrays((X, Y), 16), epochs=2).epochs
    return [float(epoch["loss"]) for epoch in losses], model.get_weights()


def test_an_equal_step_is_compiled_once_and_gives_the_same_bits():
    with compilations() as first:
        losses, weights = trained()
    assert "jit(loop)" in first
    with compilations() as second:
        again, weights_again = trained()
    assert "jit(loop)" not in second
    assert again == losses
    for a, b in zip(weights, weights_again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_fewer_passes_of_the_compiler_give_the_bits_of_its_own_choice(monkeypatch):
    asked, compiled = [], jax.stages.Lowered.compile
    forced = {"xla_cpu_use_fusion_emitters": True}  # the tests' own flags are others

    def spied(self, compiler_options=None):
        asked.append(compiler_options)
        return compiled(self, forced | (compiler_options or {}))

    monkeypatch.setattr(jax.stages.Lowered, "compile", spied)
    monkeypatch.setenv("XLA_FLAGS", "")
    losses, weights = trained(units=100, activation="gelu")
    assert asked[-1] == {jax_executables.LEVEL: 1}
    jax_executables.forget()
    monkeypatch.setenv("XLA_FLAGS", f"--{jax_executables.LEVEL}=3")
    forced[jax_executables.LEVEL] = 3
    own, own_weights = trained(units=100, activation="gelu")
    assert asked[-1] is None
    assert own == losses
    for a, b in zip(own_weights, weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_xla_without_the_option_compiles_as_it_does(monkeypatch):
    losses, _ = trained()
    jax_executables.forget()
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax_executables, "LEVEL", "xla_no_such_option")
    assert trained()[0] == losses


@pytest.mark.parametrize("changes", [{"units": 9}, {"activation": "tanh"}])
def test_another_step_is_compiled(changes):
    losses, _ = trained()
    with compilations() as names:
        others, _ = trained(**changes)
    assert "jit(loop)" in names
    jax_executables.forget()
    assert trained(**changes)[0] == others != losses


def test_a_rate_is_no_constant_of_the_program():
    trained()
    slow, _ = trained(1e-3)
    jax_executables.forget()
    assert trained(1e-3)[0] == slow


def test_arguments_that_are_not_used_tell_programs_apart():
    first, second = function(lambda a, b: a + 1), function(lambda a, b: b + 1)
    a, b = jnp.asarray(1.0), jnp.asarray(10.0)
    assert (float(first(a, b)), float(second(a, b))) == (2.0, 11.0)


def test_a_callback_runs_the_function_of_its_own_program():
    seen = []

    def program(name):
        def fn(a):
            jax.debug.callback(lambda: seen.append(name))
            return a + 1

        return function(fn)

    for name in ("first", "second"):
        program(name)(jnp.asarray(1.0))
        jax.effects_barrier()
    assert seen == ["first", "second"]


def test_names_of_outputs_are_kept_apart():
    first, second = function(lambda a: {"a": a + 1}), function(lambda a: {"b": a + 1})
    assert list(first(jnp.asarray(1.0))) == ["a"]
    assert list(second(jnp.asarray(1.0))) == ["b"]


def test_arrays_may_move_to_another_device():
    fn = function(lambda a: a + 1)
    for device in jax.devices():
        assert fn(jax.device_put(jnp.asarray(1.0), device)).devices() == {device}


def test_what_is_kept_holds_no_model():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    known = weakref.ref(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ClassifierTrainer(model, keras.optimizers.SGD(0.1), loss).train(
        from_arrays((X, Y), 16), epochs=1
    )
    del model
    keras.backend.clear_session()
    gc.collect()
    assert known() is None


def test_few_are_kept(monkeypatch):
    monkeypatch.setattr(jax_executables, "MAX_KEPT", 2)
    programs = [lambda a, i=i: a * i for i in range(2, 5)]
    with compilations() as names:
        for fn in (*programs, programs[2], programs[0]):  # the first one was dropped
            function(fn)(jnp.asarray(1.0))
    assert len(names) == 4


def test_nothing_is_shared_while_nans_are_looked_for():
    with jax.debug_nans(True):
        function(lambda a: a + 1)(jnp.asarray(1.0))
        with compilations() as names:
            function(lambda a: a + 1)(jnp.asarray(1.0))
    assert names
