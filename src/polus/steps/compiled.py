"""Runs a step over blocks of batches, in the way that was measured to be the fastest."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from polus.backends import backend
from polus.core import JitMode
from polus.data.adapters import as_arguments
from polus.data.reader import EpochReader, StepBlock
from polus.state import Snapshot

# Progress still moves, Ctrl-C still works, and the dispatch itself is lost in it.
DISPATCH_SECS = 0.04
LONGEST_SECS = 0.25  # of the few steps at a time that are tried where each one is long
FEW_STEPS = 4
MAX_STEPS = 512  # beyond it nothing is won, and the stacked batches take memory
MAX_BYTES = 2**26  # of stacked batches per dispatch
MANY_SHAPES = 8

logger = logging.getLogger("polus.steps")


class CompiledStep:
    """One step, compiled as needed: for a batch by itself or for many in one call.

    Args:
        step: a stateful function of a batch's arguments, returning scalars (any structure of them).

    Attributes:
        jit_compile: the setting for programs made from now on.
        capacity: how many steps one call may run; 1 for step by step.
        measured: (jit_compile, steps per call) -> seconds per step.
        compile_secs: the longest compilation so far.
        settled: whether no more is to be measured, for runs that allow about `longest`.
        longest: the steps in one call that the run allowed when it was measured.
    """

    def __init__(
        self, step: Callable[..., Any], jit_compile: bool | None, capacity: int = 1
    ) -> None:
        self.step = step
        self.jit_compile = jit_compile
        self.capacity = capacity
        self.settled = False
        self.longest = MAX_STEPS
        self.measured: dict[tuple[bool, int], float] = {}
        self.compile_secs = 0.0
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._shapes: list[Any] = []

    def prepare(self, block: StepBlock) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The program for a block, and its arguments. What it returns has a row for each step."""
        if block.signature not in self._shapes:
            self._shapes.append(block.signature)
            if len(self._shapes) == MANY_SHAPES and backend.COMPILES:
                logger.warning(
                    "Batches of %d different shapes came so far, and each is compiled by itself: "
                    "%s. Pad the batches to few lengths, or drop the last, smaller one.",
                    MANY_SHAPES,
                    "; ".join(str(shape) for shape in self._shapes),
                )
        many = block.capacity > 1
        key = (self.jit_compile, block.fetch, many)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = backend.program(
                self.step, block.fetch, many, self.jit_compile
            )
        if many:
            return program, (np.int32(block.count), block.capacity, block.payload)
        return program, (block.payload,) if block.fetch else as_arguments(block.payload)


def choose(
    dispatch: CompiledStep,
    epoch: EpochReader,
    survey: Callable[[], Iterable[Any]],
    jit_mode: JitMode,
    longest: int,
    fixed: int | None = None,
    steps: float = math.inf,
) -> None:
    """Measures on the first batch and sets the fastest way. No variable or random state is changed.

    Each compiler step by step, then each of them many steps at a time; but nothing that can't win,
    and nothing that takes longer to compile than all the steps take that are to be run. What was
    chosen stays, until a run allows calls twice as long, or batches come that no longer fit.

    Args:
        dispatch: gets its `jit_compile` and `capacity`, and keeps what was measured.
        epoch: the data; its first batch is measured on, and stays.
        survey: gives all variables that the step may assign; asked only where it is measured.
        jit_mode: True or False to measure under this setting only, or "auto".
        longest: the number of steps that may run in one call at most.
        fixed: the number of steps in one call where it is not to be chosen.
        steps: the number of steps to be run, infinite where it isn't known.
    """
    modes = list(backend.candidates()) if jit_mode == "auto" else [jit_mode]
    long_run_secs: dict[bool, float] = backend.LONG_RUN_SECS if jit_mode == "auto" else {}
    allowed = min(longest, MAX_STEPS)
    room = max(1, MAX_BYTES // max(1, _num_bytes(epoch.example)))
    longest = min(allowed, room)
    if len(modes) == 1 and (longest == 1 or fixed is not None):
        dispatch.jit_compile, dispatch.capacity, dispatch.settled = modes[0], fixed or 1, True
        return
    if dispatch.settled and (
        fixed is not None or (dispatch.capacity <= room and allowed < 2 * dispatch.longest)
    ):
        return
    dispatch.longest = allowed
    measured = dispatch.measured

    def unmeasured() -> Iterator[tuple[bool, int]]:
        for many, mode in itertools.product((False, True), list(modes)):
            count = _count(measured, mode, longest, fixed) if many else fixed or 1
            if mode in modes and count and (mode, count) not in measured:
                yield mode, count

    def too_short(mode: bool) -> bool:
        if not measured:
            return False
        long_enough = long_run_secs.get(mode, 0.0)
        if long_enough and math.isinf(steps):
            return True  # known after the first epoch, if it ever is
        return max(dispatch.compile_secs, long_enough) > steps * min(measured.values())

    def fastest_first() -> list[tuple[bool, int]]:
        ways = (way for way in measured if way[1] <= max(longest, fixed or 1))
        return sorted(ways, key=lambda way: measured[way])

    ways = list(unmeasured())
    if all(too_short(mode) for mode, _ in ways):
        dispatch.settled = not ways
        dispatch.jit_compile, dispatch.capacity = fastest_first()[0]
        return
    began = time.perf_counter()
    snapshot = Snapshot(survey())
    dispatch.settled = True
    try:
        for mode, count in unmeasured():
            if too_short(mode):
                dispatch.settled = False
                continue
            dispatch.jit_compile = mode
            try:
                seconds = _seconds(dispatch, epoch.sample(count))
            except Exception as error:
                if not measured:
                    raise  # the step itself is at fault, not a compiler
                modes.remove(mode)
                logger.warning(
                    "jit_compile=%s can't compile this step%s: %s",
                    mode,
                    " in a loop" * (count > 1),
                    _first_line(error),
                )
            else:
                measured[mode, count] = seconds / count
    finally:
        snapshot.restore()
    ways = fastest_first()
    dispatch.jit_compile, dispatch.capacity = ways[0]
    logger.info(
        "Measured in %.1f s, fastest first: %s",
        time.perf_counter() - began,
        "; ".join(
            f"jit_compile={m}, {n} at a time: {1 / measured[m, n]:,.0f} steps/s" for m, n in ways
        ),
    )


def _count(
    measured: dict[tuple[bool, int], float], mode: bool, longest: int, fixed: int | None
) -> int:
    """How many steps at a time are worth measuring under this setting; 0 for none."""
    if fixed is not None or (one := measured.get((mode, 1))) is None:
        return 0
    # Of compilers that differ so much step by step, the slower one does not win by its loop.
    if one > 3 * min(seconds for (_, count), seconds in measured.items() if count == 1):
        return 0
    few = min(FEW_STEPS, int(LONGEST_SECS / one))
    if longest == 1 or few < 2:
        return 0
    # Room for more than single steps suggest: a loop is faster than they are. On long steps, too:
    # XLA runs a transformer a third faster inside of one.
    return min(longest, max(few, int(2.5 * DISPATCH_SECS / one)))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _seconds(dispatch: CompiledStep, block: StepBlock) -> float:
    """The shortest of some runs, after two that compile: the second meets what the first made."""
    began = time.perf_counter()
    program, arguments = dispatch.prepare(block)
    for _ in range(2):
        backend.wait(program(*arguments))
    dispatch.compile_secs = max(dispatch.compile_secs, time.perf_counter() - began)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < DISPATCH_SECS and len(times) < 20):
        began = time.perf_counter()
        backend.wait(program(*arguments))
        times.append(time.perf_counter() - began)
        if sum(times) > 1:
            break
    return min(times)


def _num_bytes(batch: Any) -> int:
    """The bytes of what one step adds to a dispatch."""
    return sum(int(np.prod(leaf.shape)) * 8 for leaf in keras.tree.flatten(batch))
