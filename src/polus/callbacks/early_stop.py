"""Early stopping."""

import math
from typing import Any

import keras
import numpy as np

from polus.average import Average
from polus.callbacks.base import Callback
from polus.callbacks.checks import check_count
from polus.callbacks.monitor import Mode, Monitor
from polus.host import counted, to_host
from polus.models import named_parts


class EarlyStop(Callback):
    """Ends training when a monitored value stops improving or is not finite.

    An epoch in which the monitored validation set is not evaluated does not count.

    Args:
        monitor: The name of the value in the logs: `"loss"`, `"val_macro_f1"`, ...
        patience: The number of epochs without improvement after which training ends; at least 1.
        min_delta: The smallest change that counts as an improvement.
        mode: `"min"`, `"max"` or `"auto"`; see `polus.callbacks.monitor.Monitor`.
        restore_best_weights: Whether the model has, at the end of training, the weights of its best
            epoch; and so have other models, averages and variables in attributes of the trainer.
            They are kept in memory, and are part of a checkpoint.
    """

    def __init__(
        self,
        monitor: str = "loss",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Mode = "auto",
        restore_best_weights: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(monitor, int):
            raise TypeError(
                f"monitor must be the name of a value in the logs, got {monitor!r}. Did you mean "
                f"EarlyStop(patience={monitor})?"
            )
        check_count("patience", patience, "It is a number of epochs.")
        if not isinstance(restore_best_weights, bool):
            raise TypeError(
                f"restore_best_weights must be True or False, got {restore_best_weights!r}."
            )
        self.monitor = Monitor(monitor, mode, min_delta)
        self.patience = patience
        self.waited = 0
        self.restore_best_weights = restore_best_weights
        self.best_weights: list[np.ndarray[Any, Any]] | None = None

    def on_train_begin(self) -> None:
        self.waited = 0
        self.monitor.best = None
        self.best_weights = None

    def on_epoch_end(self, epoch: int) -> None:
        value = self.monitor.value(self.coordinator)
        name = self.monitor.name
        if value is None:
            return
        if not math.isfinite(value):
            self._stop(f"{name} is {value}")
        elif self.monitor.improved(value):
            self.waited = 0
            if self.restore_best_weights:
                self.best_weights = [np.array(to_host(variable)) for variable in self._weights()]
        else:
            self.waited += 1
            if self.waited >= self.patience:
                self._stop(
                    f"{name} did not improve on {self.monitor.best:.4g} for "
                    f"{counted(self.waited, 'epoch')}"
                )

    def _weights(self) -> list[keras.Variable]:
        """Returns the variables of all models, averages and layers of the trainer, and its own."""
        trainer = self.coordinator.trainer
        found = list(trainer.model.variables)
        for name, part in named_parts(trainer):
            if isinstance(part, keras.layers.Layer | Average):
                found += part.variables
            elif isinstance(part, keras.Variable) and name != "step_counter":
                found.append(part)
        return list({id(variable): variable for variable in found}.values())

    def _stop(self, reason: str) -> None:
        self.coordinator.run.stop(reason)

    def on_train_end(self) -> None:
        if self.best_weights is None or self.coordinator.run.exception is not None:
            return
        for variable, value in zip(self._weights(), self.best_weights, strict=True):
            variable.assign(value)
        self.logger.info(
            "The model has the weights of the epoch with the best %s, %.4g.",
            self.monitor.name,
            self.monitor.best,
        )

    def get_state(self) -> dict[str, Any]:
        state = {"waited": self.waited, "best": self.monitor.best}
        return state if self.best_weights is None else {**state, "weights": self.best_weights}

    def set_state(self, state: dict[str, Any]) -> None:
        self.waited, self.monitor.best = state["waited"], state["best"]
        self.best_weights = state.get("weights")
