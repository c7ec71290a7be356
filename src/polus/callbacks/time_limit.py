"""A limit to the time of a run."""

import math
import time
from collections.abc import Callable

from polus.callbacks.base import Callback, Phase
from polus.callbacks.checks import check_callable, check_number

# Why a run was stopped; one that continues from its checkpoint trains on, with time of its own.
TIME_IS_UP = "max_secs"


class TimeLimit(Callback):
    """Ends training in order when its time is up: `train(..., max_secs=3600)`.

    The time counts from the beginning of `train`. A run that continues from a checkpoint has all of
    it again.

    Args:
        max_secs: The seconds after which no further step begins, validations included.
        clock: Returns the current time in seconds.
    """

    phase = Phase.REACT

    def __init__(self, max_secs: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        check_number("max_secs", max_secs, 0, math.inf)
        check_callable("clock", clock)
        self.max_secs = max_secs
        self.clock = clock

    def on_train_begin(self) -> None:
        self._began = self.clock()

    def on_steps_end(self, epoch: int, steps: range, losses: object) -> None:
        self._check()

    def on_epoch_end(self, epoch: int) -> None:
        self._check()

    def _check(self) -> None:
        run = self.coordinator.run
        if not run.stopping and self.clock() - self._began >= self.max_secs:
            self.logger.info("Training stops: its %g seconds are over.", self.max_secs)
            run.stop(TIME_IS_UP)
