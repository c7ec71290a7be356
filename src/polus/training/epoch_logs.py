"""What a run says of an epoch: means, validations, and how it went."""

import logging
import time
from collections.abc import Callable, Sequence

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


class EpochRecord:
    """Measures how the epochs of a run go.

    Args:
        clock: Returns the current time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._began = self._waited = 0.0
        self._first = self._skipped = 0

    def begin(self, step: int, waited_secs: float, skipped: int) -> None:
        """Begins an epoch, or continues one.

        Args:
            step: Its next step.
            waited_secs: How long the loop has waited for data so far.
            skipped: How many steps of the run were skipped.
        """
        self._began, self._waited = self.clock(), waited_secs
        self._first, self._skipped = step, skipped

    def end(
        self, owner: object, sizes: Sequence[int], waited_secs: float, skipped: int
    ) -> dict[str, float]:
        """Returns learning rates, speed, waiting time and skipped steps since the beginning.

        Args:
            owner: The trainer.
            sizes: The number of examples of each step of the epoch.
            waited_secs: How long the loop has waited for data so far.
            skipped: How many steps of the run were skipped.
        """
        secs = max(self.clock() - self._began, 1e-9)
        steps = sizes[self._first :]
        return {
            **rates_of(owner, always=True),
            "skipped_steps": skipped - self._skipped,
            "secs": secs,
            "steps_per_sec": len(steps) / secs,
            "examples_per_sec": sum(steps) / secs,
            "waited_secs": waited_secs - self._waited,
        }
