"""Chooses how to run a step: with which compiler, and in a loop of how many steps.

A run starts in the way that is usually best, without any measurement. Timing another way costs its
compilation, so that is done only where the run is long enough to win it back.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

from polus.backends import backend

MAX_STEPS = 1024  # per call: a call of small steps is looked at once, which is to cost little
TIMED_STEPS = 200  # the length of a run in which timing a few steps is a small part
SMALL_STEP_SECS = 1e-3  # such steps are mostly overhead, of which a compiler removes much
LONG_STEP_SECS = 0.02  # such steps gain little from a loop, and may lose by it

logger = logging.getLogger("polus.steps")


class Tuning(NamedTuple):
    """How to run a step: the compiler setting, and the most steps per call of the backend."""

    jit_compile: bool | None
    steps_per_execution: int


class Timing(NamedTuple):
    """The cost of one configuration: seconds of a step, and of compiling it first."""

    secs: float
    compile_secs: float


class Way(NamedTuple):
    """A compiler setting, whether many steps run in one call, and how many at most."""

    jit_compile: bool
    many: bool
    most: int = MAX_STEPS


class RunLength(NamedTuple):
    """How long a run is: its steps, and the seconds that it may take; infinite if unknown."""

    steps: float = math.inf
    secs: float = math.inf

    def secs_at(self, step_secs: float) -> float:
        """Returns the seconds of the run if a step takes so many."""
        return min(self.steps * step_secs, self.secs)


@dataclass(frozen=True)
class Limits:
    """What may be chosen for a run.

    Attributes:
        ways: The ways to run the step, the one that is usually best first.
        max_steps: The steps per call that callbacks and the epoch's length allow.
        max_batches: The batches that fit into the memory set aside for a call.
        steps_per_execution: The steps per call if the user fixed them.
        length: The length of the whole run.
        long_run_secs: From how many seconds of a run on a compiler is worth a try; by default the
            backend's own.
    """

    ways: Sequence[Way]
    max_steps: int
    max_batches: int
    steps_per_execution: int | None = None
    length: RunLength = field(default_factory=RunLength)
    long_run_secs: Mapping[bool, float] = field(default_factory=lambda: backend.LONG_RUN_SECS)

    def tunings(self) -> list[Tuning]:
        """Returns the configurations of all ways."""
        fixed = self.steps_per_execution
        capacity = max(1, min(self.max_steps, self.max_batches, MAX_STEPS))
        steps = [fixed or (min(capacity, way.most) if way.many else 1) for way in self.ways]
        found = [Tuning(way.jit_compile, n) for way, n in zip(self.ways, steps, strict=True)]
        return list(dict.fromkeys(found))


@dataclass
class Timings:
    """What was measured of steps of one kind.

    Attributes:
        costs: The cost of each configuration timed so far.
        failed: The configurations that can't be compiled.
        save: Keeps them for other programs.
    """

    costs: dict[Tuning, Timing] = field(default_factory=dict)
    failed: set[Tuning] = field(default_factory=set)
    save: Callable[[], None] = lambda: None

    @property
    def tried(self) -> set[Tuning]:
        """The configurations of which all is known."""
        return {*self.costs, *self.failed}

    @property
    def compile_secs(self) -> float:
        """The longest compilation so far."""
        return max((cost.compile_secs for cost in self.costs.values()), default=0.0)


@dataclass
class Autotuner:
    """Chooses the configuration of one step.

    Attributes:
        timings: What was measured of it, by this tuner or by others of steps of the same kind.
        compiled: The configurations that the step was compiled in.
        tuned: Whether nothing is left to time for runs that allow about `max_steps` per call.
        max_steps: The steps per call that the run allowed when it was tuned.
        tuning: The newest choice.
    """

    timings: Timings = field(default_factory=Timings)
    compiled: set[Tuning] = field(default_factory=set)
    tuned: bool = False
    max_steps: int = MAX_STEPS
    tuning: Tuning | None = None

    def __call__(
        self,
        limits: Limits,
        time_step: Callable[[Tuning], Timing],
        undone: Callable[[], AbstractContextManager[object]],
    ) -> Tuning:
        """Returns the configuration to use, and times others where that pays off.

        Args:
            limits: What may be chosen.
            time_step: Times one configuration on the first batch.
            undone: Returns a context that undoes what the timed steps change.
        """
        if self.tuning is None or not self._still_holds(self.tuning, limits):
            self.tuning = self._tune(limits, time_step, undone)
        return self.tuning

    def _still_holds(self, tuning: Tuning, limits: Limits) -> bool:
        if limits.steps_per_execution is not None:
            return self.tuned and tuning.steps_per_execution == limits.steps_per_execution
        fits = tuning.steps_per_execution <= limits.max_batches
        # A run that allows calls twice as long is tuned again.
        return self.tuned and fits and min(limits.max_steps, MAX_STEPS) < 2 * self.max_steps

    def _tune(
        self,
        limits: Limits,
        time_step: Callable[[Tuning], Timing],
        undone: Callable[[], AbstractContextManager[object]],
    ) -> Tuning:
        self.max_steps = min(limits.max_steps, MAX_STEPS)
        tunings = [t for t in limits.tunings() if t not in self.timings.failed]
        self.tuned = len(tunings) == 1
        timed = TIMED_STEPS <= limits.length.steps < math.inf
        if len(tunings) > 1 and timed and self._worth_timing(tunings, limits):
            with undone():
                self._time(tunings, limits, time_step)
            self.timings.save()
        known = [tuning for tuning in tunings if tuning in self.timings.costs]
        usual = self.timings.costs.get(tunings[0])
        steps = limits.length.steps if limits.length.steps < math.inf else TIMED_STEPS
        if usual is not None:
            steps = min(steps, limits.length.secs / max(usual.secs, 1e-9))
        choice = min(known, key=lambda t: self._secs(t, steps)) if known else tunings[0]
        self.compiled.add(choice)
        return choice

    def _secs(self, tuning: Tuning, steps: float) -> float:
        """Returns how long a run takes, compiling included where that is not done yet."""
        secs, compile_secs = self.timings.costs[tuning]
        return secs * steps + (0.0 if tuning in self.compiled else compile_secs)

    def _worth_timing(self, tunings: Sequence[Tuning], limits: Limits) -> bool:
        return tunings[0] not in self.timings.costs or any(
            self._pays_off(tuning, tunings[0], limits) for tuning in tunings[1:]
        )

    def _pays_off(self, tuning: Tuning, usual: Tuning, limits: Limits) -> bool:
        """Returns whether the run is long enough to try this instead of the usual way."""
        if tuning in self.timings.tried:
            return False
        secs, compile_secs = self.timings.costs[usual].secs, self.timings.compile_secs
        if tuning.jit_compile == usual.jit_compile:
            worth = secs > LONG_STEP_SECS
            return worth and limits.length.secs_at(secs) > 10 * compile_secs
        least = limits.long_run_secs.get(bool(tuning.jit_compile), 0.0)
        if secs < SMALL_STEP_SECS:
            least /= 10
        return limits.length.secs_at(secs) > max(least, 10 * compile_secs)

    def _time(
        self, tunings: Sequence[Tuning], limits: Limits, time_step: Callable[[Tuning], Timing]
    ) -> None:
        costs, usual, total = self.timings.costs, tunings[0], 0.0
        if usual not in costs:
            total += self._time_one(usual, time_step)
        self.tuned = True
        for tuning in tunings[1:]:
            if not self._pays_off(tuning, usual, limits):
                self.tuned &= tuning in self.timings.tried
                continue
            try:
                total += self._time_one(tuning, time_step)
            except Exception as error:
                self.timings.failed.add(tuning)
                logger.warning(
                    "jit_compile=%s can't compile this step%s: %s",
                    tuning.jit_compile,
                    " in a loop" * (tuning.steps_per_execution > 1),
                    (str(error).strip() or repr(error)).splitlines()[0],
                )
        fastest = sorted((t for t in tunings if t in costs), key=lambda t: costs[t].secs)
        if len(fastest) < 2:
            return  # there was no choice
        logger.info(
            "Timed %d ways to run a step in %.1f s; fastest: %s.",
            len(fastest),
            total,
            "; then ".join(f"{describe(t)} ({_speed(costs[t].secs)})" for t in fastest),
        )

    def _time_one(self, tuning: Tuning, time_step: Callable[[Tuning], Timing]) -> float:
        """Times a configuration, and returns how long that took."""
        timing = self.timings.costs[tuning] = time_step(tuning)
        self.compiled.add(tuning)
        return timing.compile_secs + timing.secs


def describe(tuning: Tuning) -> str:
    """Returns a configuration in words: XLA on TensorFlow and JAX, `torch.compile` on PyTorch."""
    compiler = "compiled" if tuning.jit_compile else "not compiled"
    count = tuning.steps_per_execution
    return f"{compiler}, " + ("one step per call" if count == 1 else "many steps per call")


def _speed(secs_per_step: float) -> str:
    if secs_per_step > 1:
        return f"{secs_per_step:.1f} s/step"
    return f"{1 / secs_per_step:,.0f} steps/s"
