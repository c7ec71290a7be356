"""Epoch and step times."""

import time
from collections.abc import Callable

from polus.callbacks.base import Callback, Phase
from polus.callbacks.checks import check_callable


class TimerCallback(Callback):
    """Measures the time of each epoch: `shared_dict["timer"]` is a list with one dict per epoch.

    `seconds` is the wall-clock time of the epoch, other callbacks included; `seconds_per_step` is
    that time divided by the number of steps; `waited_seconds` is how long the loop waited for data.

    Args:
        clock: Returns the current time in seconds.
    """

    phase = Phase.REPORT  # the epoch ends when the other callbacks have finished

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        check_callable("clock", clock)
        self.clock = clock

    def on_train_begin(self) -> None:
        self.coordinator.shared_dict.setdefault("timer", [])
        self._began, self._waited = self.clock(), self.coordinator.run.reader.waited_secs

    def on_epoch_begin(self, epoch: int) -> None:
        self._began, self._waited = self.clock(), self.coordinator.run.reader.waited_secs

    def on_epoch_end(self, epoch: int) -> None:
        seconds = self.clock() - self._began
        self.coordinator.shared_dict["timer"].append(
            {
                "seconds": seconds,
                "seconds_per_step": seconds / max(1, self.coordinator.run.step),
                "waited_seconds": self.coordinator.run.reader.waited_secs - self._waited,
            }
        )
