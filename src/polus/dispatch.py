"""Runs a step over blocks of batches, in the way that was measured to be the fastest."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from polus.backends import backend
from polus.core import JitMode
from polus.data.feed import Block, Epoch, stacked
from polus.data.source import as_arguments
from polus.state import Snapshot

DISPATCH_SECS = 0.04  # progress still moves, Ctrl-C still works, and the dispatch itself is lost in it
MAX_STEPS = 512  # beyond it nothing is won, and the stacked batches take memory
MAX_BYTES = 2**26  # of stacked batches per dispatch
MANY_SHAPES = 8

logger = logging.getLogger("polus.dispatch")


class Dispatch:
    """One step, compiled as needed: for a batch by itself or for many in one call.

    Args:
        step: a stateful function of a batch's arguments, returning scalars (any structure of them).

    Attributes:
        jit_compile: the setting for programs made from now on.
        capacity: how many steps one call may run; 1 for step by step.
    """

    def __init__(self, step: Callable[..., Any], jit_compile: bool | None, capacity: int = 1) -> None:
        self.step = step
        self.jit_compile = jit_compile
        self.capacity = capacity
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._shapes: list[Any] = []

    def prepare(self, block: Block) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The program for a block, and its arguments. What it returns has a row for each step."""
        if block.signature not in self._shapes:
            self._shapes.append(block.signature)
            if len(self._shapes) == MANY_SHAPES and backend.COMPILES:
                logger.warning(
                    "Batches of %d different shapes came so far, and each is compiled by itself: %s. "
                    "Pad the batches to few lengths, or drop the last, smaller one.",
                    MANY_SHAPES,
                    "; ".join(str(shape) for shape in self._shapes),
                )
        many = block.count > 1
        key = (self.jit_compile, block.fetch, many)
        program = self._programs.get(key)
        if program is None:
            fetch, step = block.fetch, self.step
            if many:
                fn = backend.repeat(step, fetch)
            elif fetch is None:
                fn = step
            else:
                fn = _one(step, fetch)
            program = self._programs[key] = backend.function(fn, self.jit_compile)
        if many:
            return program, (np.int32(block.count), block.capacity, block.payload)
        return program, (block.payload,) if block.fetch else as_arguments(block.payload)


def _one(step: Callable[..., Any], fetch: Callable[..., Any]) -> Callable[..., Any]:
    def one(payload: Any) -> Any:
        return step(*fetch(payload, 0))

    return one


def choose(
    dispatch: Dispatch,
    epoch: Epoch,
    survey: Callable[[], Iterable[Any]],
    jit_mode: JitMode,
    longest: int,
    fixed: int | None = None,
) -> None:
    """Measures on the first batch and sets the fastest way. No variable or random state is changed.

    Args:
        dispatch: gets its `jit_compile` and `capacity`.
        epoch: the data; its first batch is measured on, and stays.
        survey: gives all variables that the step may assign; asked only where something is measured.
        jit_mode: True or False to measure under this setting only, or "auto".
        longest: the number of steps that may run in one call at most.
        fixed: the number of steps in one call where it is not to be chosen.
    """
    modes = backend.candidates() if jit_mode == "auto" else (jit_mode,)
    single = epoch.sample(1)
    longest = min(longest, MAX_STEPS, max(1, MAX_BYTES // max(1, _num_bytes(single))))
    if len(modes) == 1 and (longest == 1 or fixed is not None):
        dispatch.jit_compile, dispatch.capacity = modes[0], fixed or 1
        return
    began = time.perf_counter()
    snapshot = Snapshot(survey())
    measured: dict[tuple[bool, int], float] = {}
    try:
        for mode in modes:
            dispatch.jit_compile = mode
            try:
                _measure(dispatch, epoch, longest, fixed, measured)
            except Exception as error:
                if not any(m == mode for m, _ in measured) and mode == modes[-1] and not measured:
                    raise  # the step itself is at fault, not a compiler
                logger.warning("jit_compile=%s can't compile this step: %s", mode, _first_line(error))
    finally:
        snapshot.restore()
    ways = sorted(measured, key=lambda way: measured[way])
    dispatch.jit_compile, dispatch.capacity = ways[0]
    logger.info(
        "Measured in %.1f s, fastest first: %s",
        time.perf_counter() - began,
        "; ".join(f"jit_compile={m}, {n} at a time: {1 / measured[m, n]:,.0f} steps/s" for m, n in ways),
    )


def _measure(
    dispatch: Dispatch,
    epoch: Epoch,
    longest: int,
    fixed: int | None,
    measured: dict[tuple[bool, int], float],
) -> None:
    """Adds to `measured` the seconds per step of one setting, by itself and several at a time."""
    mode = bool(dispatch.jit_compile)
    if fixed is not None:
        measured[mode, fixed] = _seconds(dispatch, epoch.sample(fixed)) / fixed
        return
    one = measured[mode, 1] = _seconds(dispatch, epoch.sample(1))
    # Room for twice what single steps suggest: a loop is faster than they are.
    count = min(longest, int(2 * DISPATCH_SECS / one))
    # A program whose single steps take three times as long won't win by its loop.
    if count > 1 and one < 3 * min(measured.values()):
        measured[mode, count] = _seconds(dispatch, epoch.sample(count)) / count


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _seconds(dispatch: Dispatch, block: Block) -> float:
    """The shortest of some runs, after one that compiles."""
    program, arguments = dispatch.prepare(block)
    backend.wait(program(*arguments))
    times: list[float] = []
    while len(times) < 3 or (sum(times) < DISPATCH_SECS and len(times) < 20):
        began = time.perf_counter()
        backend.wait(program(*arguments))
        times.append(time.perf_counter() - began)
        if sum(times) > 1:
            break
    return min(times)


def _num_bytes(block: Block) -> int:
    """The bytes of what one step adds to a dispatch."""
    moved = block.payload[1] if block.fetch is not None and block.fetch is not stacked else block.payload
    return sum(int(np.prod(leaf.shape)) * 8 for leaf in keras.tree.flatten(moved))
