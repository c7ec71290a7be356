"""Learning rates that change from epoch to epoch."""

import inspect
from collections.abc import Callable
from typing import Any

from polus.callbacks.base import Callback
from polus.callbacks.checks import check_callable, check_name
from polus.optimizers import optimizer_named, rate_of


class LearningRateScheduler(Callback):
    """Sets a learning rate at the beginning of each epoch.

    Args:
        schedule: Takes the epoch, from 0, and returns the rate; or takes the epoch and the present
            rate.
        optimizer: The name of the optimizer: an attribute of the trainer, "optimizer" or
            "d_optimizer"; "optimizers.actor" in a dict, "optimizer.adam" in a `MultiOptimizer`.
    """

    def __init__(self, schedule: Callable[..., float], optimizer: str = "optimizer") -> None:
        super().__init__()
        check_callable("schedule", schedule)
        check_name("optimizer", optimizer, 'Write, for example, optimizer="d_optimizer".')
        self.schedule = schedule
        self.optimizer = optimizer
        self._takes_rate = _takes_two(schedule)

    def on_train_begin(self) -> None:
        optimizer_named(self.coordinator.trainer, self.optimizer)  # raises before training

    def on_epoch_begin(self, epoch: int) -> None:
        optimizer = optimizer_named(self.coordinator.trainer, self.optimizer)
        present = (rate_of(optimizer),) if self._takes_rate else ()
        optimizer.learning_rate = float(self.schedule(epoch, *present))


def _takes_two(schedule: Callable[..., Any]) -> bool:
    try:
        inspect.signature(schedule).bind(0, 0.1)
    except TypeError:
        return False
    return True
