"""A rehearsal of a run: two steps and a validation, with every callback, that leave no trace."""

import copy
import logging
from typing import Any

import keras
import numpy as np

from polus.backends import backend
from polus.callbacks import Callback, SaveModelCallback, TensorBoardLog, ValidationDataCallback
from polus.callbacks.base import Phase
from polus.callbacks.monitor import Monitor
from polus.data import DataReader
from polus.data.isolated import isolated_copy
from polus.history import History
from polus.host import as_number, to_host
from polus.log import info_from_first
from polus.state import Snapshot, layers_of, random_state_kept
from polus.steps.variables import held_layers
from polus.training.config import TrainConfig
from polus.training.engine import Engine

STEPS = 2  # the second one meets what the first one has changed
BATCHES = 2  # of a validation

KERAS_WRITERS = (
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.BackupAndRestore,
    keras.callbacks.CSVLogger,
    keras.callbacks.TensorBoard,
)
logger = logging.getLogger("polus.training")


def dry_run(trainer: Any, engine: Engine, arguments: dict[str, Any]) -> History:
    """Runs two steps and a validation as `train` would, restores everything, and logs what it saw.

    Args:
        trainer: A copy of the trainer, with the same models, optimizers and metrics.
        engine: Its engine.
        arguments: The arguments of `train`.

    Returns:
        The record of the two steps.
    """
    config = TrainConfig.checked(arguments)
    data = isolated_copy(config.dataset)
    data.bind(trainer)
    live = data.live_state()
    with random_state_kept():
        inputs = DataReader(data, config.transform, prefetch=0).epoch(0).example
    with info_from_first(first := backend.placement().is_first):
        engine.executor.prepare(inputs)
    engine.executor.example = inputs
    layers = [part for layer in held_layers(trainer) for part in layers_of(layer)]
    trainable = [(layer, layer.trainable) for layer in layers]
    called, left_out = _callbacks(config)
    best = [c for c in left_out if isinstance(c, SaveModelCallback) and c.strategy == "best"]
    monitors = [copy.copy(callback.monitor) for callback in best]
    given = ("custom_data_transform_f", "learning_rate", "run_eagerly", "on_nonfinite", "record")
    kept = {name: arguments[name] for name in given if arguments.get(name) is not None}
    engine.arguments.clear()
    snapshot = Snapshot(engine.executor.state_variables())
    try:
        steps = min(n for n in (STEPS, config.steps, data.num_batches) if n is not None)
        history: History = trainer.train(
            data,
            1,
            [*called, _ReadsMonitors(monitors)],
            steps=steps,
            steps_per_execution=1,
            prefetch=0,
            **kept,
        )
    finally:
        for layer, value in trainable:
            if layer.trainable != value:
                layer.trainable = value
        snapshot.restore()
        data.set_live_state(live)
    with info_from_first(first):
        logger.info("%s", _described(history, inputs, called, left_out))
    return history


class _ReadsMonitors(Callback):
    """Raises if a value that is monitored by a callback that was left out is not in the logs."""

    phase = Phase.SAVE

    def __init__(self, monitors: list[Monitor]) -> None:
        super().__init__()
        self.monitors = monitors

    def on_epoch_end(self, epoch: int) -> None:
        for monitor in self.monitors:
            monitor.value(self.coordinator)


def _callbacks(config: TrainConfig) -> tuple[list[Any], list[Any]]:
    """Returns the callbacks to call, validations shortened, and those that would write files."""
    from polus.checkpoint import Checkpoint
    from polus.runs import RunDirectory

    writers = (Checkpoint, RunDirectory, SaveModelCallback, TensorBoardLog, *KERAS_WRITERS)
    called, left_out = [], []
    for callback in config.callbacks:
        if isinstance(callback, writers):
            left_out.append(callback)
        elif type(callback) is ValidationDataCallback:
            short = copy.copy(callback)
            short.every_steps, short.every_epochs = None, 1
            short.steps = min(BATCHES, callback.steps or BATCHES)
            called.append(short)
        else:
            called.append(callback)
    return called, left_out


def _described(
    history: History, inputs: tuple[Any, ...], called: list[Any], left_out: list[Any]
) -> str:
    arrays = [to_host(leaf) for leaf in keras.tree.flatten(inputs) if leaf is not None]
    names = [name for name in history.steps if name not in ("epoch", "step")]
    terms = (f"{n} {', '.join(f'{v:.4g}' for v in np.asarray(history.steps[n]))}" for n in names)
    numbers = {name: as_number(value) for name, value in history.epochs[-1].items()}
    logs = (f"{n} {v:.4g}" for n, v in numbers.items() if v is not None)
    lines = [
        f"Dry run: {len(history.steps['step'])} steps, and everything is as before.",
        f"batches: {', '.join(f'{a.dtype.name} {list(a.shape)}' for a in arrays)}",
        f"steps: {'; '.join(terms)}",
        f"logs: {', '.join(logs)}",
        f"callbacks: {_names(called) or 'none'}",
    ]
    if left_out:
        lines.append(f"left out, since they write files: {_names(left_out)}")
    return "\n  ".join(lines)


def _names(callbacks: list[Any]) -> str:
    return ", ".join(type(callback).__name__ for callback in callbacks)
