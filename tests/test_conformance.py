"""Each step computes what a hand-written loop of the backend computes, and the other backends."""

import functools
import json

import keras
import numpy as np
import pytest
from conformance import RECORDED, ROWS, build, plain_losses
from keras import ops
from recorder import Recorder

from polus import core
from polus.backends import backend

REFERENCE = json.loads(RECORDED.read_text())
# What may be compiled in several ways is held to the same in each.
MODES = backend.candidates() if backend.COMPILES else (False,)


@pytest.fixture
def jit(request):
    core.set_jit_compile(request.param)
    yield request.param
    core.set_jit_compile("auto")


def trained(case, steps_per_execution):
    """The losses, and after each call but the first how often it ran the step's Python."""
    counts = []
    recorder = Recorder(
        lambda event, *_: counts.append(case.trainer.traces) if event == "step_end" else None,
        every_steps=steps_per_execution,
    )
    history = case.trainer.train(
        case.batches, epochs=1, callbacks=[recorder], steps_per_execution=steps_per_execution
    )
    return history.steps["loss"], np.diff(counts[steps_per_execution - 1 :: steps_per_execution])


def values(case):
    return [ops.convert_to_numpy(variable) for variable in case.variables]


@functools.cache
def by_hand(name):
    """A row after the hand-written loop: the losses, and all variables."""
    plain = build(name)
    losses = plain_losses(plain)
    for holder in plain.holders:  # at the end of an epoch the trainer reads its metrics
        if isinstance(holder, keras.metrics.Metric):
            holder.reset_state()
    return losses, values(plain)


# XLA on TensorFlow draws other numbers from the same seed than the plain loop.
CASES = [(name, mode) for name in ROWS for mode in MODES if mode == MODES[0] or name in REFERENCE]


@pytest.mark.parametrize(("name", "jit"), CASES, indirect=["jit"])
def test_steps_equal_the_hand_written_loop(name, jit):
    single, several = build(name), build(name)
    rtol, (expected, variables) = single.rtol, by_hand(name)
    assert len(set(expected)) == len(expected)  # something is trained
    losses, traces = trained(single, 1)
    np.testing.assert_allclose(losses, expected, rtol=rtol)
    # Each step after the second does as many gradients in Python: none where steps are compiled.
    assert len(set(traces[1:])) == 1
    assert (traces[-1] == 0) == backend.COMPILES

    in_blocks, traces = trained(several, 5)
    np.testing.assert_allclose(in_blocks, expected, rtol=rtol)
    assert (traces[-1] == 0) == backend.COMPILES

    for ours in (single, several):  # and so are all variables: weights, statistics, slots, seeds
        for variable, got, wanted in zip(ours.variables, values(ours), variables, strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(
                got, wanted, rtol=10 * rtol, atol=10 * rtol, err_msg=variable.path
            )
    if single.deterministic:
        np.testing.assert_allclose(losses, REFERENCE[name], rtol=1e-4)


@pytest.mark.once
def test_every_deterministic_row_has_a_reference():
    assert set(REFERENCE) == {name for name in ROWS if build(name).deterministic}
