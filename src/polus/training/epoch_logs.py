"""What a run says of an epoch: means, validations, and how it went."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from polus.backends import backend
from polus.history import History
from polus.optimizers import rates_of
from polus.training.reports import warn_of_non_finite


def weighted_means(
    history: History, epoch: int, batch_sizes: Sequence[int], logger: logging.Logger
) -> dict[str, float]:
    """Returns the means of loss and terms over an epoch, weighted by the batches' sizes.

    Args:
        history: The record of its steps.
        epoch: The newest epoch.
        batch_sizes: The number of examples of each step; 0 for one that was skipped.
        logger: Hears of values that are not finite in other steps.
    """
    columns = history.steps_of(epoch)
    monitored = {"loss": columns["loss"]} if "loss" in columns else columns
    if 0 not in batch_sizes:  # the skipped ones were reported
        warn_of_non_finite(logger, monitored, epoch)
    return history.epoch_means(epoch, batch_sizes)


class Spent(NamedTuple):
    """Where the time of a run went so far, and how many steps were skipped.

    Attributes:
        waited_secs: How long the loop waited for data.
        callback_secs: How long callbacks took between steps.
        skipped_steps: How many steps were skipped.
    """

    waited_secs: float = 0.0
    callback_secs: float = 0.0
    skipped_steps: int = 0


class EpochRecord:
    """Measures how the epochs of a run go.

    Args:
        clock: Returns the current time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._began = self._called = self._compiled = 0.0
        self._first = 0
        self._before = Spent()
        self._programs: list[object] = []  # those that were called

    def begin(self, step: int, spent: Spent) -> None:
        """Begins an epoch, or continues one, at its next step."""
        self._began, self._compiled = self.clock(), 0.0
        self._first, self._before = step, spent
        self._calls = 0

    def calls(self, program: object, waited_secs: float) -> None:
        """Notes that a program is about to be called, and how long was waited for data so far.

        The first call of a program compiles it. What comes before the first call of an epoch are
        the trace of the step and its tuning, if these are due.
        """
        self._called = self.clock()
        self._compiles = not any(program is known for known in self._programs)
        self._calls += 1
        if self._compiles:
            self._programs.append(program)
            if self._calls == 1:
                waited = waited_secs - self._before.waited_secs
                self._compiled += max(self._called - self._began - waited, 0.0)

    def called(self) -> None:
        """Notes that the call is over."""
        if self._compiles:
            self._compiled += self.clock() - self._called

    def end(self, owner: object, sizes: Sequence[int], spent: Spent) -> dict[str, float]:
        """Returns learning rates, skipped steps, speed, and where the time went.

        Args:
            owner: The trainer.
            sizes: The number of examples of each step of the epoch.
            spent: What the run has spent so far.
        """
        secs = max(self.clock() - self._began, 1e-9)
        steps = sizes[self._first :]
        since = [now - before for now, before in zip(spent, self._before, strict=True)]
        waited, in_callbacks, skipped = since
        peak = backend.peak_device_bytes()
        return {
            **rates_of(owner, always=True),
            "skipped_steps": int(skipped),
            "secs": secs,
            "steps_per_sec": len(steps) / secs,
            "examples_per_sec": sum(steps) / secs,
            "waited_secs": waited,
            "callback_secs": in_callbacks,
            "compile_secs": self._compiled,
            **({} if peak is None else {"peak_device_bytes": peak}),
        }
