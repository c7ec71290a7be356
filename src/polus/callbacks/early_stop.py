"""Early stopping."""

import math
from typing import Any

from polus.callbacks.base import Callback
from polus.callbacks.checks import check_count
from polus.callbacks.monitor import Mode, Monitor


class EarlyStop(Callback):
    """Ends training when a monitored value stops improving or is not finite.

    An epoch in which the monitored validation set is not evaluated does not count.

    Args:
        monitor: The name of the value in the logs: `"loss"`, `"val_macro_f1"`, ...
        patience: The number of epochs without improvement after which training ends; at least 1.
        min_delta: The smallest change that counts as an improvement.
        mode: `"min"`, `"max"` or `"auto"`; see `polus.callbacks.monitor.Monitor`.
    """

    def __init__(
        self,
        monitor: str = "loss",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Mode = "auto",
    ) -> None:
        super().__init__()
        if isinstance(monitor, int):
            raise TypeError(
                f"monitor must be the name of a value in the logs, got {monitor!r}. Did you mean "
                f"EarlyStop(patience={monitor})?"
            )
        check_count("patience", patience, "It is a number of epochs.")
        self.monitor = Monitor(monitor, mode, min_delta)
        self.patience = patience
        self.waited = 0

    def on_train_begin(self) -> None:
        self.waited = 0
        self.monitor.best = None

    def on_epoch_end(self, epoch: int) -> None:
        value = self.monitor.value(self.coordinator)
        name = self.monitor.name
        if value is None:
            return
        if not math.isfinite(value):
            self._stop(f"{name} is {value}")
        elif self.monitor.improved(value):
            self.waited = 0
        else:
            self.waited += 1
            if self.waited >= self.patience:
                self._stop(
                    f"{name} did not improve on {self.monitor.best:.4g} for {self.waited} epochs"
                )

    def _stop(self, reason: str) -> None:
        self.coordinator.run.stop(reason)

    def get_state(self) -> dict[str, Any]:
        return {"waited": self.waited, "best": self.monitor.best}

    def set_state(self, state: dict[str, Any]) -> None:
        self.waited, self.monitor.best = state["waited"], state["best"]
