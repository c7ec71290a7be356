"""Chooses how to run a step: with which compiler, and how many steps per call, by timing it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

# Progress still moves, Ctrl-C still works, and the cost of the call itself is negligible.
EXECUTION_SECS = 0.04
LONGEST_SECS = 0.25  # limits the few steps per call that are tried where a single step is long
FEW_STEPS = 4
MAX_STEPS = 512  # more gain nothing, and the stacked batches take memory

logger = logging.getLogger("polus.steps")


class Tuning(NamedTuple):
    """How to run a step: the compiler setting, and the steps per call of the backend."""

    jit_compile: bool | None
    steps_per_execution: int


class Timing(NamedTuple):
    """The cost of one configuration: seconds of a call, and of compiling it first."""

    secs: float
    compile_secs: float


@dataclass(frozen=True)
class Limits:
    """What may be chosen for a run.

    Attributes:
        modes: The settings of `jit_compile` to try.
        max_steps: The steps per call that callbacks and the epoch's length allow.
        max_batches: The batches that fit into the memory set aside for a call.
        steps_per_execution: The steps per call if the user fixed them.
        total_steps: The steps of the whole run; infinite if unknown.
        long_run_secs: The settings that pay off in long runs only, with the length of such a run.
    """

    modes: tuple[bool, ...]
    max_steps: int
    max_batches: int
    steps_per_execution: int | None = None
    total_steps: float = float("inf")
    long_run_secs: dict[bool, float] = field(default_factory=dict)


@dataclass
class Autotuner:
    """Times the configurations of one step and keeps the timings for later runs.

    Each compiler is timed step by step, then each with many steps per call. What can't win is
    skipped, and so is what takes longer to compile than all steps of the run take.

    Attributes:
        secs: Seconds per step of each configuration timed so far.
        compile_secs: The longest compilation so far.
        tuned: Whether nothing is left to time for runs that allow about `max_steps` per call.
        max_steps: The steps per call that the run allowed when it was tuned.
        tuning: The newest choice.
    """

    secs: dict[Tuning, float] = field(default_factory=dict)
    compile_secs: float = 0.0
    tuned: bool = False
    max_steps: int = MAX_STEPS
    tuning: Tuning | None = None

    def __call__(
        self,
        limits: Limits,
        time_step: Callable[[Tuning], Timing],
        undone: Callable[[], AbstractContextManager[object]],
    ) -> Tuning:
        """Returns the fastest configuration that `limits` allow, and times what is missing.

        Args:
            limits: What may be chosen.
            time_step: Times one configuration on the first batch.
            undone: Returns a context that undoes what the timed steps change.
        """
        self.tuning = self._tune(limits, time_step, undone)
        return self.tuning

    def _tune(
        self,
        limits: Limits,
        time_step: Callable[[Tuning], Timing],
        undone: Callable[[], AbstractContextManager[object]],
    ) -> Tuning:
        fixed = limits.steps_per_execution
        allowed = min(limits.max_steps, MAX_STEPS)
        max_steps = min(allowed, limits.max_batches)
        if len(limits.modes) == 1 and (max_steps == 1 or fixed is not None):
            self.tuned = True
            return Tuning(limits.modes[0], fixed or 1)
        if self.tuned and self.tuning is not None:
            fits = self.tuning.steps_per_execution <= limits.max_batches
            # A run that allows calls twice as long is tuned again.
            if fixed is not None or (fits and allowed < 2 * self.max_steps):
                return self.tuning
        self.max_steps = allowed
        missing = list(self._missing(limits, max_steps))
        if all(self._too_short(limits, tuning) for tuning in missing):
            self.tuned = not missing
            return self._fastest(limits, max_steps)[0]
        with undone():
            self._time_missing(limits, max_steps, time_step)
        return self._fastest(limits, max_steps)[0]

    def _missing(
        self, limits: Limits, max_steps: int, failed: frozenset[bool] | set[bool] = frozenset()
    ) -> Iterator[Tuning]:
        """Yields what is worth timing and was not yet: single steps first."""
        fixed = limits.steps_per_execution
        for many in (False, True):
            for mode in limits.modes:
                count = self._worthwhile_steps(mode, max_steps, fixed) if many else fixed or 1
                tuning = Tuning(mode, count)
                if mode not in failed and count and tuning not in self.secs:
                    yield tuning

    def _worthwhile_steps(self, mode: bool, max_steps: int, fixed: int | None) -> int:
        """Returns how many steps per call are worth timing under this setting; 0 for none."""
        single = self.secs.get(Tuning(mode, 1))
        if fixed is not None or single is None:
            return 0
        # If one compiler is 3x slower per single step, looping will not make it win: skip it.
        if single > 3 * min(s for tuning, s in self.secs.items() if tuning[1] == 1):
            return 0
        few = min(FEW_STEPS, int(LONGEST_SECS / single))
        if max_steps == 1 or few < 2:
            return 0
        # More than single steps suggest: a loop is faster than they are. Also for long steps: XLA
        # runs a transformer a third faster inside a loop.
        return min(max_steps, max(few, int(2.5 * EXECUTION_SECS / single)))

    def _too_short(self, limits: Limits, tuning: Tuning) -> bool:
        """Returns whether the run is too short for timing this to pay off."""
        if not self.secs:
            return False
        long_run = limits.long_run_secs.get(bool(tuning.jit_compile), 0.0)
        if long_run and limits.total_steps == float("inf"):
            return True  # after the first epoch the length is known, if it ever is
        return max(self.compile_secs, long_run) > limits.total_steps * min(self.secs.values())

    def _time_missing(
        self, limits: Limits, max_steps: int, time_step: Callable[[Tuning], Timing]
    ) -> None:
        failed: set[bool] = set()
        self.tuned = True
        total = 0.0
        for tuning in self._missing(limits, max_steps, failed):
            if self._too_short(limits, tuning):
                self.tuned = False
                continue
            try:
                timing = time_step(tuning)
            except Exception as error:
                if not self.secs:
                    raise  # the step itself is at fault, not a compiler
                failed.add(bool(tuning.jit_compile))
                logger.warning(
                    "jit_compile=%s can't compile this step%s: %s",
                    tuning.jit_compile,
                    " in a loop" * (tuning.steps_per_execution > 1),
                    (str(error).strip() or repr(error)).splitlines()[0],
                )
                continue
            self.secs[tuning] = timing.secs / tuning.steps_per_execution
            self.compile_secs = max(self.compile_secs, timing.compile_secs)
            total += timing.compile_secs + timing.secs
        fastest = self._fastest(limits, max_steps)
        if len(fastest) < 2:
            return  # there was no choice
        logger.info(
            "Timed %d ways to run a step in %.1f s; fastest: %s.",
            len(fastest),
            total,
            "; then ".join(f"{describe(t)} ({_speed(self.secs[t])})" for t in fastest),
        )

    def _fastest(self, limits: Limits, max_steps: int) -> list[Tuning]:
        """Returns what was timed and is allowed, fastest first."""
        longest = max(max_steps, limits.steps_per_execution or 1)
        known = (t for t in self.secs if t.steps_per_execution <= longest)
        return sorted(known, key=self.secs.__getitem__)


def describe(tuning: Tuning) -> str:
    """Returns a configuration in words: XLA on TensorFlow and JAX, `torch.compile` on PyTorch."""
    compiler = "compiled" if tuning.jit_compile else "not compiled"
    count = tuning.steps_per_execution
    return f"{compiler}, {count} step{'s' * (count != 1)} per call"


def _speed(secs_per_step: float) -> str:
    if secs_per_step > 1:
        return f"{secs_per_step:.1f} s/step"
    return f"{1 / secs_per_step:,.0f} steps/s"
