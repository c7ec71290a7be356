"""Keras' own callbacks, as they work in `fit`."""

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
# What is no state of a callback. Keras turns the sign of min_delta when it chooses the direction,
# in every process anew.
NO_STATE = {*vars(keras.callbacks.Callback()), "min_delta"}
COUNTERS = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.TensorBoard,
)
MISSING = object()


class KerasCallback(Callback):
    """Delivers a run's events to a `keras.callbacks.Callback`.

    The model has the trainer's optimizer as `model.optimizer` while it trains, and `stop_training`
    ends the run. Logs are those of `fit`: of a batch the running means over the epoch, of an epoch
    these and the validations', as `<set>_<metric>`. Of a validation it hears the begin and the end,
    not the batches; `model.evaluate` needs a compiled model, as anywhere. A resumed run gives it
    back what changed of its attributes, such as `wait` and `best`.

    Args:
        callback: the Keras callback; it is kept as `callback`.
    """

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        super().__init__()
        self.callback = callback
        self._overrides = any(_overridden(callback, event) for event in BATCH_EVENTS)
        # Keras' own that save or write only between epochs just count the steps.
        self._counts = type(callback) in COUNTERS and "epoch" in (
            getattr(callback, "save_freq", None),
            getattr(callback, "update_freq", None),
        )
        self.every_steps = 1 if self._overrides and not self._counts else None
        self._given = dict(vars(callback))
        self._sums: dict[str, float] = {}
        self._examples = 0

    def on_train_begin(self) -> None:
        run = self.coordinator
        model = run.trainer.model
        self._sums, self._examples = {}, 0
        if self is next(c for c in run.callbacks if isinstance(c, KerasCallback)):  # once for all
            run.closing.enter_context(_as_in_fit(model, run.trainer.optimizer))
        if getattr(self.callback, "mode", None) == "auto":  # which asks metrics of a compiled model
            self.callback.mode = "min" if lower_is_better(self.callback.monitor) else "max"
        self.callback.set_params({"epochs": run.epochs, "steps": run.steps, "verbose": 1})
        self.callback.set_model(model)
        if run.resuming and isinstance(self.callback, keras.callbacks.CSVLogger):
            self.callback.append = True  # else it empties the file
        self.callback.on_train_begin({})
        # Where BackupAndRestore leaves the epoch that it restored.
        run.epoch = model._initial_epoch or run.epoch

    def on_epoch_begin(self, epoch: int) -> None:
        self._sums, self._examples = {}, 0
        self.callback.on_epoch_begin(epoch, {})
        self._look()

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
                self.callback.on_train_batch_end(step, {})  # waits for no loss
            return
        run = self.coordinator
        sizes = run.batch_sizes[-len(steps) :]
        terms = {name: np.asarray(values) for name, values in run.step_logs.items()}
        metrics = {m.name: _number(m.result()) for m in run.trainer.metrics if m.has_samples}
        for i, step in enumerate(steps):
            if len(steps) > 1:
                self.callback.on_train_batch_begin(step, {})
            self._examples += sizes[i]
            for name, values in terms.items():
                self._sums[name] = self._sums.get(name, 0.0) + float(values[i]) * sizes[i]
            means = {name: total / self._examples for name, total in self._sums.items()}
            self.callback.on_train_batch_end(step, {**means, **metrics})
        self._look()

    def on_epoch_end(self, epoch: int) -> None:
        self.callback.on_epoch_end(epoch, dict(self.coordinator.logs))
        self._look()

    def on_train_end(self) -> None:
        failed = self.coordinator.exception is not None
        if failed and isinstance(self.callback, keras.callbacks.BackupAndRestore):
            return  # it would delete what the next run is to restore
        self.callback.on_train_end(dict(self.coordinator.logs))

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
            with contextlib.suppress(TypeError):  # files, functions: it makes them anew
                flatten_state(value)
                changed[name] = value
        return {"changed": changed, "sums": self._sums, "examples": self._examples}

    def set_state(self, state: dict[str, Any]) -> None:
        vars(self.callback).update(state["changed"])
        self._sums, self._examples = state["sums"], state["examples"]

    def _look(self) -> None:
        trainer = self.coordinator.trainer
        trainer.early_stop = trainer.early_stop or bool(trainer.model.stop_training)


@contextlib.contextmanager
def _as_in_fit(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Lends the model what callbacks look for there; a compiled one gets its own back."""
    lent = {"optimizer": optimizer, "stop_training": False, "_initial_epoch": None}
    before = {name: model.__dict__.get(name, MISSING) for name in lent}
    for name, value in lent.items():
        object.__setattr__(model, name, value)  # not tracked as a part of the model
    try:
        yield
    finally:
        for name, value in before.items():
            model.__dict__.pop(name, None)
            if value is not MISSING:
                object.__setattr__(model, name, value)


def _overridden(callback: keras.callbacks.Callback, event: str) -> bool:
    if isinstance(callback, keras.callbacks.LambdaCallback) and event in callback.__dict__:
        # It sets each event it was given as an attribute, and a function of no use for the others.
        name: str = callback.__dict__[event].__qualname__
        return name != "LambdaCallback.__init__.<locals>.<lambda>"
    method = getattr(callback, event)
    return getattr(method, "__func__", method) is not getattr(keras.callbacks.Callback, event)


def _number(value: Any) -> Any:
    array = np.asarray(keras.ops.convert_to_numpy(value))
    return array if array.ndim else array.item()
