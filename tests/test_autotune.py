"""Steps per execution: how many run in one call, how that is chosen, and what callbacks hear."""

import contextlib
import logging
import math
import signal
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops
from recorder import Recorder

import polus.data.blocks
import polus.steps.compiled
import polus.steps.pace
from polus import core
from polus.backends import backend
from polus.backends.placement import Placement, ReplicaState
from polus.callbacks.coordinator import STEPS_OF_UNKNOWN
from polus.data import DataReader, as_adapter, from_arrays
from polus.host import to_host
from polus.signals import Signals
from polus.state import random_state
from polus.steps.autotune import Autotuner, Limits, RunLength, Timing, Tuning, Way
from polus.steps.compiled import CompiledStep
from polus.steps.pace import Pace
from polus.steps.variables import has_convolutions
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


@pytest.mark.parametrize("sized", [True, False])
def test_a_call_has_room_for_the_batches_that_there_may_be(sized):
    def room():
        return recorder.coordinator.run.executor.tuning.steps_per_execution

    batches, recorder = BATCHES * 60, Recorder(every_steps=None)
    trainer = make_trainer()
    trainer.train(batches if sized else lambda: iter(batches), 1, [recorder])
    assert room() == (len(batches) if sized else STEPS_OF_UNKNOWN)
    trainer.train(batches if sized else lambda: iter(batches), 2, [recorder])  # not compiled again
    assert room() == (len(batches) if sized else STEPS_OF_UNKNOWN)


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


@pytest.mark.skipif(keras.config.backend() != "jax", reason="others trace in their own way")
@pytest.mark.parametrize("arguments", [{}, {"steps_per_execution": 1}, {"on_nonfinite": "ignore"}])
def test_jax_traces_a_step_once_per_shape_and_once_to_see_its_variables(arguments):
    trainer = make_trainer(Traced, keras.layers.Dropout(0.3), keras.layers.BatchNormalization())
    trainer.train(BATCHES[:1], 1, **arguments)
    assert trainer.runs == 2
    trainer.train([(X[:4], Y[:4])], 1, **arguments)
    assert trainer.runs == 3


@pytest.mark.parametrize("own_step", [True, False])
def test_many_batch_shapes_warn_once(own_step, caplog):
    shapes = [(X[:n], Y[:n]) for n in range(3, 14)]
    with caplog.at_level(logging.WARNING, "polus"):
        make_trainer(*[Traced] * own_step).train(shapes, 2)
    said = [r.getMessage() for r in caplog.records if "different shapes" in r.getMessage()]
    # TensorFlow traces the step of ClassifierTrainer for all shapes together.
    compiles = backend.COMPILES and (own_step or not backend.OPEN_LENGTHS)
    assert len(said) == (1 if compiles else 0)
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
    """Two compilers: the seconds that a step takes in each configuration, and what was asked."""

    def __init__(self, secs, **limits):
        self.secs = {Tuning(*key): value for key, value in secs.items()}
        self.asked = []
        self.tuner = Autotuner()
        ways = [Way(False, True), Way(True, True)]
        self.limits = {"ways": ways, "max_steps": 64, "max_batches": 10_000, "long_run_secs": {}}
        self.limits |= limits

    def tune(self, total_steps=math.inf, max_secs=math.inf, **limits):
        length = RunLength(total_steps, max_secs)
        limits = Limits(**{**self.limits, "length": length, **limits})
        return self.tuner(limits, self.time, contextlib.nullcontext)

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
    executor.tuned(data, 64, steps_per_execution=None, length=RunLength(10**9))
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(np.array(variable), value, err_msg=variable.path)
    assert str(random_state()) == str(generators)
    with contextlib.closing(data.blocks(3)) as blocks:
        assert sum(block.count for block in blocks) == len(BATCHES)


PLAIN, COMPILED = Tuning(False, 64), Tuning(True, 64)


def test_a_run_is_measured_only_if_it_is_long_enough_to_win_that_back():
    clock = Clock({PLAIN: 5e-3, COMPILED: 4e-3})
    # Unknown, or too short to time a few steps of; then five seconds, while compiling takes one.
    for total_steps, asked in ((math.inf, []), (100, []), (1_000, [PLAIN]), (1_500, [PLAIN])):
        assert clock.tune(total_steps) == PLAIN
        assert clock.asked == asked
        assert not clock.tuner.tuned
    for _ in range(2):
        assert clock.tune(10_000) == COMPILED
        assert clock.asked == [PLAIN, COMPILED]
        assert clock.tuner.tuned


def test_a_single_way_is_never_timed():
    clock = Clock({}, ways=[Way(True, True)])
    assert clock.tune(10**6) == COMPILED
    assert clock.tune(10**6, max_steps=1) == COMPILED  # its loop runs one step as well
    assert clock.asked == []


@pytest.mark.parametrize(("fits", "steps"), [(3, 3), (10_000, 64)])
def test_a_call_has_room_for_as_many_steps_as_fit(fits, steps):
    assert Clock({}, max_batches=fits).tune() == (False, steps)


def test_the_users_own_number_of_steps_is_used():
    clock = Clock({(False, 7): 5e-3, (True, 7): 4e-3}, steps_per_execution=7)
    assert clock.tune(100) == (False, 7)
    assert clock.tune(10_000) == (True, 7)


def test_runs_that_allow_longer_calls_are_tuned_again():
    clock = Clock({PLAIN: 5e-3, COMPILED: 4e-3, (False, 2): 5e-3, (True, 2): 4e-3})
    for max_steps in (2, 3):
        assert clock.tune(10_000, max_steps=max_steps) == (True, 2)
        assert clock.asked == [(False, 2), (True, 2)]
    for _ in range(2):
        assert clock.tune(10_000) == COMPILED
        assert clock.asked == [(False, 2), (True, 2), PLAIN, COMPILED]
    assert clock.tune(10_000, max_batches=2) == (True, 2)  # 64 do not fit


@pytest.mark.parametrize(
    ("secs", "total_steps", "tried"),
    [
        (0.1, 90, False),  # nine seconds, and compiling takes one
        (0.1, 200, True),
        (0.01, 10_000, False),  # a loop costs steps of 10 ms nothing
    ],
)
def test_long_steps_are_tried_without_a_loop(secs, total_steps, tried):
    ways = [Way(True, True), Way(True, False)]
    clock = Clock({COMPILED: secs, (True, 1): secs / 2}, ways=ways)
    assert clock.tune(total_steps) == ((True, 1) if tried else COMPILED)


def test_what_one_compiler_cannot_do_the_other_does():
    clock = Clock({PLAIN: 5e-3, COMPILED: TypeError("no")})
    for _ in range(2):
        assert clock.tune(10_000) == PLAIN
        assert clock.asked == [PLAIN, COMPILED]


def test_a_run_of_limited_time_compiles_no_longer_than_it_may_take():
    clock = Clock({PLAIN: 5e-3, COMPILED: 4e-3})
    assert clock.tune(10**9, max_secs=9) == PLAIN  # ten times what compiling takes
    assert clock.asked == [PLAIN]
    assert clock.tune(10**9, max_secs=11) == COMPILED
    # What another run found faster takes longer to compile than it saves.
    clock.tuner = Autotuner(clock.tuner.timings)
    clock.tuner.timings.costs[COMPILED] = Timing(4e-3, compile_secs=10.0)
    assert clock.tune(10**9, max_secs=3) == PLAIN
    assert clock.asked == [PLAIN, COMPILED]


def test_a_slow_compiler_is_tried_in_long_runs_only():
    for secs, total_steps in ((5e-3, 60_000), (0.5e-3, 60_000)):  # 300 and 30 seconds
        clock = Clock({PLAIN: secs, COMPILED: secs / 2}, long_run_secs={True: 300.0})
        assert clock.tune(total_steps - 1_000) == PLAIN
        assert clock.asked == [PLAIN]
        assert clock.tune(total_steps + 1_000) == COMPILED


def test_batches_of_many_lengths_are_timed_once(monkeypatch):
    asked = []

    def time(step, block):
        asked.append((step.jit_compile, block.capacity))
        return Timing(6e-3 if step.jit_compile else 5e-3, 0.0)

    monkeypatch.setattr(CompiledStep, "time", time)
    monkeypatch.setattr(backend, "candidates", lambda: (False, True))
    monkeypatch.setattr(backend, "ways", lambda convolutions: ((False, True), (True, True)))
    monkeypatch.setattr(backend, "LONG_RUN_SECS", {})
    epochs = iter([[8, 4, 2] * 50, [4, 8, 2] * 50, [2, 4, 8] * 50])
    make_trainer().train(lambda: ((X[:n], Y[:n]) for n in next(epochs)), 3)
    assert len(asked) == len(set(asked)) == 2


def test_a_call_that_another_program_disturbed_does_not_make_a_step_long(monkeypatch):
    now, pauses = [0.0], [1.0, 0.03]  # the first call compiles, the second has to wait

    def call(step, block, count):
        now[0] += pauses.pop(0) if pauses else 1e-5 * count

    monkeypatch.setattr(CompiledStep, "_call", call)
    monkeypatch.setattr(polus.steps.compiled.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(backend, "wait", lambda outputs: None)
    step = CompiledStep(lambda: 0, Placement(), ReplicaState())
    timing = step.time(SimpleNamespace(count=1000))
    assert timing == pytest.approx((1e-5, 1.0))


# ---------------------------------------------------------------------- the pace


@pytest.mark.parametrize("secs", [1e-5, 1e-3, 0.5])
def test_calls_take_some_milliseconds_once_a_few_were_timed(secs, monkeypatch):
    monkeypatch.setattr(backend, "wait", lambda outputs: None)
    pace, now = Pace(), [0.0]
    monkeypatch.setattr(polus.steps.pace.time, "perf_counter", lambda: now[0])
    calls = []
    for _ in range(8):
        calls.append(pace.steps)
        began, now[0] = now[0], now[0] + secs * calls[-1] + 10 * (not calls)  # the first compiles
        pace.observe(calls[-1], None, began)
    assert calls[0] == calls[1] == 2
    assert calls[-1] == pytest.approx(max(1, 0.15 / secs), rel=0.01)


def test_calls_that_were_prefetched_do_not_end_the_growth(monkeypatch):
    monkeypatch.setattr(backend, "wait", lambda outputs: None)
    pace, now, calls = Pace(), [0.0], [2, 2, 2, 2, 2, 2]  # of which four were read ahead
    monkeypatch.setattr(polus.steps.pace.time, "perf_counter", lambda: now[0])
    for _ in range(16):
        count = calls.pop(0)
        began, now[0] = now[0], now[0] + 1e-3 + 1e-5 * count
        pace.observe(count, None, began)
        calls.append(pace.steps)
    assert pace.steps > 1000


def test_a_batch_alone_and_many_at_a_time_have_programs_of_their_own():
    def losses(*capacities):
        trainer = make_trainer()
        executor_of(trainer).prepare(BATCHES[0])
        step = CompiledStep(executor_of(trainer).step, Placement(), ReplicaState())
        found = []
        for capacity in capacities:
            data = DataReader(as_adapter(from_arrays((X, Y), 8, shuffle=False))).epoch(0)
            with contextlib.closing(data.blocks(capacity)) as blocks:
                for block in blocks:
                    assert (block.capacity > 1) == (capacity > 1)
                    rows = np.asarray(to_host(step(block)["loss"])).reshape(-1)
                    found += rows[: block.count].tolist()
        return found

    np.testing.assert_allclose(losses(1, 5, 1), losses(1, 1, 1), rtol=1e-6)


@pytest.mark.parametrize("kind", ["batches", "arrays", "arrays with a smaller last batch"])
def test_the_pace_changes_no_bit(kind):
    def losses(steps):
        trainer = make_trainer()
        executor_of(trainer).prepare(BATCHES[0])
        step = CompiledStep(executor_of(trainer).step, Placement(), ReplicaState())
        pace = SimpleNamespace(steps=steps, known=True)
        data = BATCHES if kind == "batches" else from_arrays((X[:size], Y[:size]), 8, shuffle=False)
        with contextlib.closing(
            DataReader(as_adapter(data)).epoch(0).blocks(4, pace=pace)
        ) as blocks:
            found, counts = [], []
            for block in blocks:
                counts.append(block.count)
                found += (
                    np.asarray(to_host(step(block)["loss"])).reshape(-1)[: block.count].tolist()
                )
        return found, counts

    size = 76 if "smaller" in kind else 80
    (all_at_once, counts), (one_by_one, slow) = losses(None), losses(1)
    np.testing.assert_array_equal(one_by_one, all_at_once)
    last = [1, 1] if "smaller" in kind else [2]
    assert (counts, slow) == ([4, 4, *last], [2, 1, 1, 2, 1, 1, *last])


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="only PyTorch's steps are eager by default"
)
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of its own parts
@pytest.mark.needs_keras_3_15  # a graph break in Keras itself
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
    clock = Clock({PLAIN: 2.5, COMPILED: 4e-3})
    with caplog.at_level(logging.INFO, "polus"):
        clock.tune(10_000)
    (said,) = [r.getMessage() for r in caplog.records if "Timed" in r.getMessage()]
    assert said.startswith("Timed 2 ways to run a step in 4.5 s; fastest: ")
    assert said.endswith(
        "compiled, many steps per call (250 steps/s); then not compiled, many steps per call "
        "(2.5 s/step)."
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
        step = executor.tuned(data, 64, steps_per_execution=None, length=RunLength(10**9))
    assert step.jit_compile is False
    assert "can't compile this step" in caplog.text


def test_a_model_with_convolutions_learns_the_same_in_calls_of_one_step_and_of_many():
    """On JAX a call of many steps is no compiled loop: XLA is slow at convolutions inside one."""

    def trained(at_once):
        keras.utils.set_random_seed(0)
        stack = [keras.layers.Conv1D(2, 3, activation="relu"), keras.layers.Flatten()]
        model = keras.Sequential([keras.Input((6, 1)), *stack, keras.layers.Dense(3)])
        assert has_convolutions([model])
        trainer = ClassifierTrainer(model, keras.optimizers.Adam(0.01), CROSS_ENTROPY)
        data = from_arrays((X[..., None], Y), 16, shuffle=False)
        history = trainer.train(data, 2, steps_per_execution=at_once)
        return [history.steps["loss"], *model.get_weights()]

    for one, many in zip(trained(1), trained(4), strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-6)
    assert not has_convolutions([keras.Sequential([keras.layers.Dense(3)])])
