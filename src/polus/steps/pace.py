"""How many steps one call of a compiled loop runs."""

import time

from polus.backends import backend

# Progress still moves, Ctrl-C still works, and what a call costs is small: before it the values of
# variables are kept, to undo a step that is not finite.
EXECUTION_SECS = 0.15
FIRST_STEPS = 2  # before anything is known: a step may take seconds
MAX_GROWTH = 16
MAX_TIMED_CALLS = 4


class Pace:
    """Adapts the number of steps per call to the time that they take, in the first calls of a run.

    A compiled loop runs as many steps as it is told, up to the capacity that it was compiled for.
    So the number changes no bit of a result, and it may depend on the clock.

    Args:
        secs: Seconds per step, if they are known.
        fixed: Whether each call is to run as many steps as fit.

    Attributes:
        steps: The most steps of the next call; None for no limit.
        known: Whether it is settled.
    """

    def __init__(self, secs: float | None = None, fixed: bool = False) -> None:
        self.steps: int | None = FIRST_STEPS
        self._calls = 0
        if fixed:
            self.steps = None
        elif secs is not None:
            self.steps = _steps_of(secs)
        self.known = fixed or secs is not None

    def observe(self, count: int, outputs: object, began: float) -> None:
        """Learns from a call of `count` steps that began at `began` (`time.perf_counter`).

        The call is waited for, until enough is known. The first one compiles, and tells nothing. No
        more does one of fewer steps than the pace: it was prefetched before the pace grew, or the
        data is slow, or no more steps are allowed.
        """
        if self.known or self.steps is None or count < self.steps:
            return
        self._calls += 1
        if self._calls == 1:
            return
        backend.wait(outputs)
        fitting = _steps_of((time.perf_counter() - began) / count)
        self.known = self._calls > MAX_TIMED_CALLS or fitting <= MAX_GROWTH * count
        self.steps = min(fitting, MAX_GROWTH * count)


def _steps_of(secs: float) -> int:
    return max(1, int(EXECUTION_SECS / max(secs, 1e-9)))
