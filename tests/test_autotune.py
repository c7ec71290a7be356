"""Steps per execution: how many run in one call, how that is chosen, and what callbacks hear."""

import contextlib
import logging
import math
import signal

import keras
import numpy as np
import pytest
from keras import ops
from recorder import Recorder

import polus.data.blocks
import polus.steps.compiled
from polus import core
from polus.backends import backend
from polus.data import DataReader, as_adapter, from_arrays
from polus.signals import Signals
from polus.state import random_state
from polus.steps.autotune import Autotuner, Limits, Timing, Tuning
from polus.steps.compiled import CompiledStep
from polus.training import ClassifierTrainer

X = np.random.default_rng(0).normal(size=(80, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 1] > 0)
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 80, 8)]
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Traced(ClassifierTrainer):
    """Counts how often the step's Python runs."""

    runs = 0

    def forward_with_grads(self, x, y):
        self.runs += 1
        return super().forward_with_grads(x, y)


def make_trainer(cls=ClassifierTrainer, *more_layers):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), *more_layers, keras.layers.Dense(3)])
    return cls(model, keras.optimizers.Adam(1e-2), CROSS_ENTROPY)


def number(tensor) -> float:
    return float(ops.convert_to_numpy(tensor))


# ---------------------------------------------------------------------- steps per call


@pytest.mark.parametrize(
    ("steps_per_execution", "every_steps", "counts"),
    [
        (1, None, [1] * 10),
        (4, None, [4, 4, 2]),
        (4, 3, [3, 3, 3, 1]),
        # A callback is due at each third step of the epoch, not three steps after the last call.
        (2, 3, [2, 1, 2, 1, 2, 1, 1]),
        (100, None, [10]),
        (100, 1, [1] * 10),
    ],
)
@pytest.mark.parametrize("kind", ["batches", "arrays"])
def test_a_call_runs_as_many_steps_as_callbacks_allow(
    kind, steps_per_execution, every_steps, counts
):
    data = BATCHES if kind == "batches" else from_arrays((X, Y), 8, shuffle=False)
    reference, recorder = Recorder(every_steps=None), Recorder(every_steps=every_steps)
    make_trainer().train(data, 2, [reference], steps_per_execution=1)
    make_trainer().train(data, 2, [recorder], steps_per_execution=steps_per_execution)
    assert recorder.blocks == 2 * counts
    assert recorder.steps == reference.steps
    np.testing.assert_allclose(recorder.losses, reference.losses, rtol=1e-5)


def test_slow_data_changes_no_result(monkeypatch):
    def losses():
        return make_trainer().train(BATCHES, 1, steps_per_execution=4).steps["loss"]

    quick = losses()
    monkeypatch.setattr(polus.data.blocks, "GROUP_SECS", 0.0)
    np.testing.assert_array_equal(losses(), quick)


def test_the_model_is_current_at_each_batch_event():
    def count(event, *_):
        if event == "step_end":
            counted.append(number(trainer.step_counter))

    counted, trainer = [], make_trainer()
    trainer.train(BATCHES, 1, [Recorder(count)])
    assert counted == list(range(1, 11))


def test_two_callbacks_each_run_at_their_own_steps():
    threes, fours = Recorder(every_steps=3), Recorder(every_steps=4)
    make_trainer().train(BATCHES, 2, [threes, fours], steps_per_execution=100)
    ends = np.cumsum(threes.blocks)
    assert ends.tolist() == [3, 4, 6, 8, 9, 10, 13, 14, 16, 18, 19, 20]
    assert threes.blocks == fours.blocks


def test_each_batch_shape_is_compiled_once():
    shapes = [BATCHES[0]] * 3 + [(X[:4], Y[:4])] * 3 + [BATCHES[0]] * 2 + [(X[:4], Y[:4])]
    trainer = make_trainer(Traced)
    trainer.train(shapes, 1, steps_per_execution=3)
    runs = trainer.runs
    trainer.train(shapes, 3, steps_per_execution=3)
    again = trainer.runs - runs
    assert again == (0 if backend.COMPILES else 3 * len(shapes))


def test_many_batch_shapes_warn_once(caplog):
    shapes = [(X[:n], Y[:n]) for n in range(3, 14)]
    with caplog.at_level(logging.WARNING, "polus"):
        make_trainer().train(shapes, 2)
    said = [r.getMessage() for r in caplog.records if "different shapes" in r.getMessage()]
    assert len(said) == (1 if backend.COMPILES else 0)
    assert all(f"({n}, 6)" in said[0] for n in range(3, 10) if said)


def interrupt_at(*moment):
    """Sends Ctrl-C at an event of the run."""

    def interrupt(*event):
        if event == moment:
            signal.raise_signal(signal.SIGINT)

    return interrupt


def test_an_interruption_takes_effect_after_the_step():
    first, second = Recorder(interrupt_at("step_begin", 0, 3)), Recorder(every_steps=None)
    trainer = make_trainer()
    with pytest.raises(KeyboardInterrupt):
        trainer.train(BATCHES, 2, [first, second])
    run = second.coordinator.run
    assert first.names[-1] == second.names[-1] == "train_end"
    assert (run.epoch, run.step) == (0, 4)
    assert number(trainer.step_counter) == len(second.steps) == len(run.history.steps["loss"]) == 4


def test_an_interruption_after_the_last_step_is_raised():
    with pytest.raises(KeyboardInterrupt):  # at an epoch's end a validation may run
        make_trainer().train(BATCHES, 2, [Recorder(interrupt_at("epoch_end", 1))])


def test_an_interruption_before_the_first_step_is_raised():
    with pytest.raises(KeyboardInterrupt), Signals():
        signal.raise_signal(signal.SIGINT)


# ---------------------------------------------------------------------- autotuning


class Clock:
    """Two compilers: the seconds that a call takes in each configuration, and what was asked."""

    def __init__(self, secs, **limits):
        self.secs = {Tuning(*key): value for key, value in secs.items()}
        self.asked = []
        self.tuner = Autotuner()
        self.limits = {"modes": (False, True), "max_steps": 64, "max_batches": 10_000, **limits}

    def tune(self, **limits):
        return self.tuner(Limits(**{**self.limits, **limits}), self.time, contextlib.nullcontext)

    def time(self, tuning):
        self.asked.append(tuning)
        if isinstance(result := self.secs[tuning], Exception):
            raise result
        return Timing(result, compile_secs=1.0)


def executor_of(trainer):
    return trainer._engine.executor


def test_timing_leaves_no_trace():
    layers = keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)
    trainer = make_trainer(ClassifierTrainer, *layers)
    data = DataReader(as_adapter(BATCHES)).epoch(0)
    executor = executor_of(trainer)
    executor.example = data.example
    variables = executor.state_variables()
    before = [np.array(variable) for variable in variables]
    generators = random_state()
    executor.tuned(data, max_steps=64, steps_per_execution=None)
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(np.array(variable), value, err_msg=variable.path)
    assert str(random_state()) == str(generators)
    with contextlib.closing(data.blocks(3)) as blocks:
        assert sum(block.count for block in blocks) == len(BATCHES)


def test_short_runs_time_less_and_longer_runs_the_rest():
    clock = Clock({(False, 1): 5e-3, (True, 1): 4e-3, (False, 20): 20e-3, (True, 25): 10e-3})
    # Half a second of steps, while compiling takes a second.
    assert clock.tune(total_steps=100) == clock.tune(total_steps=100) == (False, 1)
    assert clock.asked == [(False, 1)]
    assert clock.tune() == clock.tune() == (True, 25)
    assert sorted(clock.asked) == sorted(clock.secs)


def test_runs_that_allow_longer_calls_are_timed_again():
    singles, pairs = {(False, 1): 5e-3, (True, 1): 4e-3}, {(False, 2): 8e-3, (True, 2): 6e-3}
    clock = Clock(singles | pairs | {(False, 20): 20e-3, (True, 25): 10e-3})
    for max_steps in (2, 3):
        assert clock.tune(max_steps=max_steps) == (True, 2)
        assert clock.asked == [*singles, *pairs]
    for _ in range(2):
        assert clock.tune() == (True, 25)
        assert clock.asked == list(clock.secs)
    # Batches of which 25 do not fit into one call: the timings of fewer tell enough.
    assert clock.tune(max_batches=2) == (True, 2)
    assert clock.asked == list(clock.secs)


def test_batches_of_many_lengths_are_timed_once(monkeypatch):
    secs = {(False, 1): 5e-3, (True, 1): 6e-3, (False, 20): 20e-3, (True, 16): 20e-3}
    asked = []

    def time(step, block):
        asked.append((step.jit_compile, block.count))
        return Timing(secs[asked[-1]], 1.0)

    monkeypatch.setattr(CompiledStep, "time", time)
    monkeypatch.setattr(backend, "candidates", lambda: (False, True))
    monkeypatch.setattr(backend, "LONG_RUN_SECS", {})
    epochs = iter([[8, 4, 2], [4, 8, 2], [2, 4, 8]])
    trainer = make_trainer()
    trainer.train(lambda: ((X[:n], Y[:n]) for n in next(epochs)), 3)
    assert sorted(asked) == sorted(secs)


@pytest.mark.parametrize(
    ("secs", "asked", "chosen"),
    [
        # Both step by step, then both in a loop, and the fastest of the four wins.
        (
            {(False, 1): 5e-3, (True, 1): 4e-3, (False, 20): 40e-3, (True, 25): 25e-3},
            [(False, 1), (True, 1), (False, 20), (True, 25)],
            (True, 25),
        ),
        # A loop that is slower than single steps loses.
        (
            {(False, 1): 5e-3, (True, 1): 6e-3, (False, 20): 400e-3, (True, 16): 400e-3},
            [(False, 1), (True, 1), (False, 20), (True, 16)],
            (False, 1),
        ),
        # A compiler that is three times slower step by step gets no loop.
        (
            {(False, 1): 5e-3, (True, 1): 16e-3, (False, 20): 80e-3},
            [(False, 1), (True, 1), (False, 20)],
            (False, 20),
        ),
        # A few long steps per call are tried; very long ones are not.
        (
            {(False, 1): 50e-3, (True, 1): 60e-3, (False, 4): 160e-3, (True, 4): 170e-3},
            [(False, 1), (True, 1), (False, 4), (True, 4)],
            (False, 4),
        ),
        (
            {(False, 1): 70e-3, (True, 1): 200e-3, (False, 3): 180e-3},
            [(False, 1), (True, 1), (False, 3)],
            (False, 3),
        ),
        ({(False, 1): 0.3, (True, 1): 0.2}, [(False, 1), (True, 1)], (True, 1)),
        # What one compiler can't do, the other does.
        (
            {(False, 1): 5e-3, (True, 1): TypeError("no"), (False, 20): 20e-3},
            [(False, 1), (True, 1), (False, 20)],
            (False, 20),
        ),
    ],
)
def test_the_fastest_configuration_wins_and_hopeless_ones_are_skipped(secs, asked, chosen):
    clock = Clock(secs)
    assert clock.tune() == chosen
    assert clock.asked == asked
    assert clock.tuner.tuned


def test_a_slow_compiler_is_tried_in_long_runs_only():
    secs = {(False, 1): 5e-3, (True, 1): 4e-3, (False, 20): 20e-3, (True, 25): 10e-3}
    clock = Clock(secs, long_run_secs={True: 300.0})
    for total_steps in (10_000, math.inf):  # 50 seconds; unknown
        clock.tune(total_steps=total_steps)
        assert clock.asked == [(False, 1), (False, 20)]
        assert not clock.tuner.tuned
    clock.tune(total_steps=1_000_000)
    assert clock.asked == [(False, 1), (False, 20), (True, 1), (True, 25)]
    assert clock.tuner.tuned


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="only PyTorch's steps are eager by default"
)
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of its own parts
def test_torch_compiles_the_whole_step_and_equals_eager():
    import torch

    if len(backend.candidates()) == 1:
        pytest.skip("NOT TESTED: there is no C++ compiler")
    losses, breaks = [], torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    for mode in (False, True):
        core.set_jit_compile(mode)
        try:
            trainer = make_trainer()
            losses.append(trainer.train(BATCHES, 2, steps_per_execution=4).steps["loss"])
        finally:
            core.set_jit_compile("auto")
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert not breaks


def test_an_error_in_the_step_is_not_blamed_on_a_compiler(caplog):
    class Broken(ClassifierTrainer):
        def forward_with_grads(self, x, y):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), caplog.at_level(logging.WARNING, "polus"):
        make_trainer(Broken).train(BATCHES, 1)
    assert not [r for r in caplog.records if "compile" in r.getMessage()]


def test_timings_are_logged(caplog):
    clock = Clock({(False, 1): 2.5, (True, 1): 4e-3, (False, 20): 20e-3, (True, 25): 10e-3})
    with caplog.at_level(logging.INFO, "polus"):
        clock.tune()
    (said,) = [r.getMessage() for r in caplog.records if "Timed" in r.getMessage()]
    assert said.startswith("Timed 3 ways to run a step in 5.5 s; fastest: ")
    assert said.endswith(
        "compiled, 25 steps per call (2,500 steps/s); then compiled, 1 step per call "
        "(250 steps/s); then not compiled, 1 step per call (2.5 s/step)."
    )


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="only TensorFlow has steps that XLA refuses"
)
def test_a_step_that_xla_refuses_runs_without_xla(caplog):
    class Host(ClassifierTrainer):
        def forward_without_grads(self, x, y):
            import tensorflow as tf

            x = tf.ensure_shape(tf.numpy_function(lambda a: a, [x], tf.float32), (8, 6))
            return x, y

    trainer = make_trainer(Host)
    data = DataReader(as_adapter(BATCHES)).epoch(0)
    executor = executor_of(trainer)
    executor.prepare(data.example)
    with caplog.at_level(logging.WARNING, "polus"):
        step = executor.tuned(data, max_steps=64, steps_per_execution=None)
    assert step.jit_compile is False
    assert "can't compile this step" in caplog.text
