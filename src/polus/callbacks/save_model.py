"""The model on disk: the best one, each epoch's, or the last."""

import os
from pathlib import Path
from typing import Any

from polus.callbacks.base import Callback, Phase
from polus.callbacks.monitor import Monitor
from polus.files import atomic_write


class SaveModelCallback(Callback):
    """Saves the model in Keras' format; a file is whole or absent, whatever happens.

    Args:
        strategy: `"best"` saves whenever the monitored value improved, `"every"` after each epoch,
            `"end"` when training ended without an error.
        path: the file, ending in `.keras` or `.weights.h5`. It may hold `{epoch}` (from 1), and has
            to with `"every"`, lest each epoch overwrite the last one.
        monitor: a name of the logs, for `"best"`: `"loss"`, `"val_macro_f1"`, ...
        mode: `"min"`, `"max"` or `"auto"`; see `polus.callbacks.monitor.Monitor`.
        min_delta: a change less than this is no improvement.
    """

    phase = (
        Phase.SAVE
    )  # of an epoch's end others come first: Keras callbacks may change the weights

    def __init__(
        self,
        strategy: str = "best",
        path: str | os.PathLike[str] = "model.keras",
        monitor: str = "val_loss",
        mode: str = "auto",
        min_delta: float = 0.0,
    ) -> None:
        super().__init__()
        self.path = os.fspath(path)
        if strategy not in ("best", "every", "end"):
            raise ValueError(f'strategy is "best", "every" or "end", and got {strategy!r}.')
        if not self.path.endswith((".keras", ".weights.h5")):
            raise ValueError(f"path ends in .keras or .weights.h5, and got {self.path!r}.")
        if strategy == "every" and "{epoch" not in self.path:
            raise ValueError(
                f'With "every", path needs the epoch\'s number: "model-{{epoch:03d}}.keras", and '
                f"got {self.path!r}."
            )
        self.strategy = strategy
        self.monitor = Monitor(monitor, mode, min_delta)

    def on_train_begin(self) -> None:
        self.monitor.best = None

    def on_epoch_end(self, epoch: int) -> None:
        if self.strategy == "best":
            value = self.monitor.value(self.coordinator)
            if self.monitor.improved(value):
                path = self._save(epoch)
                self.logger.debug("%s is %.4g: saved %s", self.monitor.name, value, path)
        elif self.strategy == "every":
            self._save(epoch)

    def on_train_end(self) -> None:
        if self.strategy == "end" and self.coordinator.exception is None:
            self._save(self.coordinator.epoch - 1)

    def _save(self, epoch: int) -> Path:
        path = Path(self.path.format(epoch=epoch + 1))
        with atomic_write(path) as temporary:
            if self.path.endswith(".keras"):
                self.coordinator.trainer.model.save(temporary)
            else:
                self.coordinator.trainer.model.save_weights(temporary)
        return path

    def get_state(self) -> dict[str, Any]:
        return {"best": self.monitor.best}

    def set_state(self, state: dict[str, Any]) -> None:
        self.monitor.best = state["best"]
