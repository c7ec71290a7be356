"""Adapts Keras callbacks, so that they work as they do in `fit`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from polus.callbacks.base import Callback
from polus.callbacks.monitor import lower_is_better

BATCH_EVENTS = (
    "on_batch_begin",
    "on_batch_end",
    "on_train_batch_begin",
    "on_train_batch_end",
)
# Attributes that are not part of a callback's state. Keras negates min_delta when it chooses the
# direction, once in every process.
NO_STATE = {*vars(keras.callbacks.Callback()), "min_delta"}
COUNTERS = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.TensorBoard,
)
MISSING = object()


class KerasCallback(Callback):
    """Delivers the events of a run to a `keras.callbacks.Callback`.

    During training `model.optimizer` is the trainer's optimizer, and `model.stop_training = True`
    ends the run. The logs are those of `fit`: running means over the epoch for a batch, and these
    plus the validation results (`<set>_<metric>`) for an epoch. The callback is told when a
    validation begins and ends, but not about its batches; `model.evaluate` needs a compiled model,
    as usual. A resumed run restores the attributes that changed, such as `wait` and `best`.

    Args:
        callback: The Keras callback, kept as `callback`.
    """

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        super().__init__()
        self.callback = callback
        self._overrides = any(_overridden(callback, event) for event in BATCH_EVENTS)
        # Keras' own callbacks that save or write once per epoch only count the steps.
        self._counts = type(callback) in COUNTERS and "epoch" in (
            getattr(callback, "save_freq", None),
            getattr(callback, "update_freq", None),
        )
        self.every_steps = 1 if self._overrides and not self._counts else None
        self._given = dict(vars(callback))
        self._sums: dict[str, float] = {}
        self._examples = 0

    def on_train_begin(self) -> None:
        run = self.coordinator.run
        model = run.trainer.model
        self._sums, self._examples = {}, 0
        if self is next(
            c for c in self.coordinator.callbacks if isinstance(c, KerasCallback)
        ):  # once per run
            run.closing.enter_context(_fit_attributes(model, run.trainer.optimizer))
        if getattr(self.callback, "mode", None) == "auto":  # Keras asks the compiled metrics
            self.callback.mode = "min" if lower_is_better(self.callback.monitor) else "max"
        self.callback.set_params({"epochs": run.epochs, "steps": run.steps, "verbose": 1})
        self.callback.set_model(model)
        if run.resuming and isinstance(self.callback, keras.callbacks.CSVLogger):
            self.callback.append = True  # otherwise it empties the file
        self.callback.on_train_begin({})
        # BackupAndRestore leaves the epoch to continue from here.
        run.epoch = model._initial_epoch or run.epoch

    def on_epoch_begin(self, epoch: int) -> None:
        self._sums, self._examples = {}, 0
        self.callback.on_epoch_begin(epoch, {})
        self._check_stop()

    def on_train_batch_begin(self, epoch: int, step: int) -> None:
        if self._overrides:
            self.callback.on_train_batch_begin(step, {})

    def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
        if not self._overrides:
            return
        if self._counts:
            for step in steps:
                if len(steps) > 1:
                    self.callback.on_train_batch_begin(step, {})
                self.callback.on_train_batch_end(step, {})  # no wait for the loss
            return
        run = self.coordinator.run
        sizes = run.batch_sizes[-len(steps) :]
        terms = {name: np.asarray(values) for name, values in run.step_logs.items()}
        metrics = {metric.name: _number(metric.result()) for metric in run.metrics}
        for i, step in enumerate(steps):
            if len(steps) > 1:
                self.callback.on_train_batch_begin(step, {})
            self._examples += sizes[i]
            for name, values in terms.items():
                self._sums[name] = self._sums.get(name, 0.0) + float(values[i]) * sizes[i]
            means = {name: total / self._examples for name, total in self._sums.items()}
            self.callback.on_train_batch_end(step, {**means, **metrics})
        self._check_stop()

    def on_epoch_end(self, epoch: int) -> None:
        self.callback.on_epoch_end(epoch, self.coordinator.run.logs)
        self._check_stop()

    def on_train_end(self) -> None:
        failed = self.coordinator.run.exception is not None
        if failed and isinstance(self.callback, keras.callbacks.BackupAndRestore):
            return  # it would delete the backup that the next run restores
        self.callback.on_train_end(self.coordinator.run.logs)

    def on_validation_begin(self) -> None:
        self.callback.on_test_begin({})

    def on_validation_end(self, results: dict[str, Any]) -> None:
        self.callback.on_test_end(results)

    def get_state(self) -> dict[str, Any]:
        from polus.state_tree import flatten_state

        changed = {}
        for name, value in vars(self.callback).items():
            scalar = isinstance(value, bool | int | float | str | None)
            if name in NO_STATE or (scalar and value == self._given.get(name, MISSING)):
                continue
            with contextlib.suppress(TypeError):  # files, functions: the callback recreates them
                flatten_state(value)
                changed[name] = value
        return {"changed": changed, "sums": self._sums, "examples": self._examples}

    def set_state(self, state: dict[str, Any]) -> None:
        vars(self.callback).update(state["changed"])
        self._sums, self._examples = state["sums"], state["examples"]

    def _check_stop(self) -> None:
        trainer = self.coordinator.run.trainer
        trainer.early_stop = trainer.early_stop or bool(trainer.model.stop_training)


@contextlib.contextmanager
def _fit_attributes(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Sets the model attributes that callbacks read, and restores the model's own afterwards."""
    lent = {"optimizer": optimizer, "stop_training": False, "_initial_epoch": None}
    before = {name: model.__dict__.get(name, MISSING) for name in lent}
    for name, value in lent.items():
        object.__setattr__(model, name, value)  # not tracked as part of the model
    try:
        yield
    finally:
        for name, value in before.items():
            model.__dict__.pop(name, None)
            if value is not MISSING:
                object.__setattr__(model, name, value)


def _overridden(callback: keras.callbacks.Callback, event: str) -> bool:
    if isinstance(callback, keras.callbacks.LambdaCallback) and event in callback.__dict__:
        # It stores a function for each event; a lambda of its own for those it was not given.
        name: str = getattr(callback.__dict__[event], "__qualname__", "")
        return name != "LambdaCallback.__init__.<locals>.<lambda>"
    method = getattr(callback, event)
    return getattr(method, "__func__", method) is not getattr(keras.callbacks.Callback, event)


def _number(value: Any) -> Any:
    array = np.asarray(keras.ops.convert_to_numpy(value))
    return array if array.ndim else array.item()
