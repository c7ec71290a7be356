"""Saves the model to disk: the best one, one per epoch, or the last one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import keras

from polus.average import Average
from polus.callbacks.base import Callback, Phase
from polus.callbacks.checks import check_count
from polus.callbacks.monitor import Mode, Monitor
from polus.files import atomic_write
from polus.host import did_you_mean
from polus.models import models_of, named_parts

ENDINGS = (".keras", ".weights.h5")
Strategy = Literal["best", "every", "end"]


class SaveModelCallback(Callback):
    """Saves the model in Keras' format. A file is written completely or not at all.

    Of several processes the first one writes.

    Args:
        strategy: `"best"` saves whenever the monitored value improves, upon that of earlier runs
            with this callback too, as Keras' `ModelCheckpoint`; `"every"` after each epoch,
            `"end"` when training ends without an error.
        path: The file, ending in `.keras` or `.weights.h5`. A relative path becomes absolute here,
            so a later change of the working directory does not move it. It may contain `{epoch}`
            (counted from 1), and must with `"every"`, since each epoch would overwrite the previous
            one's file. It may contain `{model}`, the model's name, and must if several are saved.
        monitor: The name of a value in the logs, for `"best"`: `"loss"`, `"val_macro_f1"`, ...
        mode: `"min"`, `"max"` or `"auto"`; see `polus.callbacks.monitor.Monitor`.
        min_delta: The smallest change that counts as an improvement.
        models: The names of the models to save: keys of the trainer's dict of models, or attributes
            of the trainer, "targets.actor" in a dict of them. By default all models of the dict,
            or the trainer's only model.
        keep: The number of newest files of each model to keep, where `path` has the epoch. Older
            ones of this run are removed.
    """

    phase = Phase.SAVE  # the others first: a Keras callback may change the weights

    def __init__(
        self,
        strategy: Strategy = "best",
        path: str | os.PathLike[str] = "model.keras",
        monitor: str = "val_loss",
        mode: Mode = "auto",
        min_delta: float = 0.0,
        *,
        models: Sequence[str] | None = None,
        keep: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(models, str) or not all(isinstance(name, str) for name in models or ()):
            raise TypeError(f"models must be a list of names, got {models!r}.")
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
        if keep is not None:
            check_count("keep", keep)
            if "{epoch" not in self.path:
                raise ValueError(
                    f"keep={keep} keeps files of several epochs, so path must contain the epoch "
                    f'number, such as "model-{{epoch:03d}}.keras", got {path!r}.'
                )
        self.keep = keep
        self.strategy = strategy
        self.monitor = Monitor(monitor, mode, min_delta)
        self.models = models

    def on_train_begin(self) -> None:
        self._saved_epochs: list[int] = []
        if len(found := self._models()) > 1 and "{model" not in self.path:
            raise ValueError(
                f"{len(found)} models are saved ({', '.join(found)}), so path must contain "
                f'{{model}}, such as "runs/{{model}}.keras", got {self.path!r}. To save one of '
                f"them: models=[{next(iter(found))!r}]."
            )
        if not self.coordinator.run.placement.has_whole_weights:
            raise NotImplementedError(
                "SaveModelCallback saves the model from one process, and here weights are sharded "
                "over several. Use polus.checkpoint.Checkpoint(folder), which gathers them, and "
                "save the model after train(..., resume=folder) in a single process."
            )

    def _models(self) -> dict[str, keras.Model]:
        """Returns the models to save by name."""
        trainer = self.coordinator.trainer
        named = models_of(trainer.model)
        if self.models is None:
            return named
        parts = dict(named_parts(trainer))
        held = {n: p.model if isinstance(p, Average) else p for n, p in parts.items()}
        named = {n: m for n, m in held.items() if isinstance(m, keras.Model)} | named
        for name in self.models:
            if name not in named:
                hint = did_you_mean(name, named)
                raise ValueError(
                    f"The trainer has no model named {name!r} to save. {hint + ' ' * bool(hint)}"
                    f"It has {', '.join(name for name in named if name != 'model')}."
                )
        return {name: named[name] for name in self.models}

    def on_epoch_end(self, epoch: int) -> None:
        if self.strategy == "best":
            value = self.monitor.value(self.coordinator)
            if value is not None and self.monitor.improved(value):
                paths = ", ".join(map(str, self._save(epoch)))
                self.logger.debug("%s improved to %.4g: saved %s", self.monitor.name, value, paths)
        elif self.strategy == "every":
            self._save(epoch)

    def on_train_end(self) -> None:
        if self.strategy == "end" and self.coordinator.run.exception is None:
            self._save(self.coordinator.run.epoch - 1)

    def _save(self, epoch: int) -> list[Path]:
        paths, placement = [], self.coordinator.run.placement
        for name, model in self._models().items():
            path = Path(self.path.format(epoch=epoch + 1, model=name))
            paths.append(path)
            if not placement.is_first:
                continue
            save = model.save if self.path.endswith(".keras") else model.save_weights
            with atomic_write(path) as temporary:
                placement.by_itself(save, temporary)
        if placement.is_first:
            self._remove_old(epoch)
        return paths

    def _remove_old(self, epoch: int) -> None:
        if self.keep is None:
            return
        self._saved_epochs.append(epoch)
        old, self._saved_epochs = (
            self._saved_epochs[: -self.keep],
            self._saved_epochs[-self.keep :],
        )
        for number in old:
            for name in self._models():
                Path(self.path.format(epoch=number + 1, model=name)).unlink(missing_ok=True)

    def get_state(self) -> dict[str, Any]:
        # Not the paths: a checkpoint must not say which files to remove.
        return {"best": self.monitor.best, "epochs": self._saved_epochs}

    def set_state(self, state: dict[str, Any]) -> None:
        self.monitor.best = state["best"]
        self._saved_epochs = [int(epoch) for epoch in state["epochs"]]


def _absolute(path: Any) -> str:
    """Returns the absolute path as a format string.

    Raises:
        TypeError, ValueError: If it is no path, has another ending, or fields other than {epoch}
            and {model}.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f'path must be a path, got {path!r}. Use, for example, "model.keras".')
    given = os.fspath(path)
    if "\0" in given:
        raise ValueError(f"path must not contain the character NUL, got {given!r}.")
    if not given.endswith(ENDINGS):
        raise ValueError(f"path must end in .keras or .weights.h5, got {given!r}.")
    try:
        given.format(epoch=1, model="model")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            "path may contain {model}, {epoch} and formats of it, such as {epoch:03d}, got "
            f"{given!r}."
        ) from error
    folder = os.getcwd().replace("{", "{{").replace("}", "}}")
    return os.path.normpath(os.path.join(folder, given))
