"""Saves the model to disk: the best one, one per epoch, or the last one."""

import os
from pathlib import Path
from typing import Any, Literal, get_args

from polus.callbacks.base import Callback, Phase
from polus.callbacks.monitor import Mode, Monitor
from polus.files import atomic_write

ENDINGS = (".keras", ".weights.h5")
Strategy = Literal["best", "every", "end"]


class SaveModelCallback(Callback):
    """Saves the model in Keras' format. A file is written completely or not at all.

    Of several processes the first one writes.

    Args:
        strategy: `"best"` saves whenever the monitored value improves, `"every"` after each epoch,
            `"end"` when training ends without an error.
        path: The file, ending in `.keras` or `.weights.h5`. A relative path becomes absolute here,
            so a later change of the working directory does not move it. It may contain `{epoch}`
            (counted from 1), and must with `"every"`, since each epoch would overwrite the previous
            one's file.
        monitor: The name of a value in the logs, for `"best"`: `"loss"`, `"val_macro_f1"`, ...
        mode: `"min"`, `"max"` or `"auto"`; see `polus.callbacks.monitor.Monitor`.
        min_delta: The smallest change that counts as an improvement.
    """

    phase = Phase.SAVE  # the others first: a Keras callback may change the weights

    def __init__(
        self,
        strategy: Strategy = "best",
        path: str | os.PathLike[str] = "model.keras",
        monitor: str = "val_loss",
        mode: Mode = "auto",
        min_delta: float = 0.0,
    ) -> None:
        super().__init__()
        if strategy not in get_args(Strategy):
            path_given = isinstance(strategy, os.PathLike) or str(strategy).endswith(ENDINGS)
            hint = f" Did you mean SaveModelCallback(path={strategy!r})?" if path_given else ""
            raise ValueError(f'strategy must be "best", "every" or "end", got {strategy!r}.{hint}')
        self.path = _absolute(path)
        if strategy == "every" and "{epoch" not in self.path:
            raise ValueError(
                'With strategy="every", path must contain the epoch number, such as '
                f'"model-{{epoch:03d}}.keras", got {path!r}.'
            )
        self.strategy = strategy
        self.monitor = Monitor(monitor, mode, min_delta)

    def on_train_begin(self) -> None:
        self.monitor.best = None
        if not self.coordinator.run.placement.has_whole_weights:
            raise NotImplementedError(
                "SaveModelCallback saves the model from one process, and here weights are sharded "
                "over several. Use polus.checkpoint.Checkpoint(folder), which gathers them, and "
                "save the model after train(..., resume=folder) in a single process."
            )

    def on_epoch_end(self, epoch: int) -> None:
        if self.strategy == "best":
            value = self.monitor.value(self.coordinator)
            if value is not None and self.monitor.improved(value):
                path = self._save(epoch)
                self.logger.debug("%s improved to %.4g: saved %s", self.monitor.name, value, path)
        elif self.strategy == "every":
            self._save(epoch)

    def on_train_end(self) -> None:
        if self.strategy == "end" and self.coordinator.run.exception is None:
            self._save(self.coordinator.run.epoch - 1)

    def _save(self, epoch: int) -> Path:
        path = Path(self.path.format(epoch=epoch + 1))
        if not self.coordinator.run.placement.is_first:
            return path
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


def _absolute(path: Any) -> str:
    """Returns the absolute path as a format string.

    Raises:
        TypeError, ValueError: If it is no path, has another ending or other fields than {epoch}.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f'path must be a path, got {path!r}. Use, for example, "model.keras".')
    given = os.fspath(path)
    if not given.endswith(ENDINGS):
        raise ValueError(f"path must end in .keras or .weights.h5, got {given!r}.")
    try:
        given.format(epoch=1)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"path may contain {{epoch}} and formats of it, such as {{epoch:03d}}, got {given!r}."
        ) from error
    folder = os.getcwd().replace("{", "{{").replace("}", "}}")
    return os.path.normpath(os.path.join(folder, given))
