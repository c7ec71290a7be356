"""Adapts Keras callbacks, so that they work as they do in `fit`."""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from polus.backends.placement import Placement
from polus.callbacks.base import Callback, RunView
from polus.callbacks.monitor import improving_direction
from polus.host import to_host
from polus.metrics import results_by_name
from polus.optimizers import optimizer_named

BATCH_EVENTS = (
    "on_batch_begin",
    "on_batch_end",
    "on_train_batch_begin",
    "on_train_batch_end",
)
TEST_BATCH_EVENTS = ("on_test_batch_begin", "on_test_batch_end")
MONITORS = (
    keras.callbacks.EarlyStopping,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.ReduceLROnPlateau,
)
COUNTERS = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.TensorBoard,
)
# What these do, one process does for all.
WRITERS = (
    keras.callbacks.CSVLogger,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)
MISSING = object()


class KerasCallback(Callback):
    """Delivers the events of a run to a `keras.callbacks.Callback`.

    During training `model.optimizer` is the trainer's optimizer, `model.history` a Keras history,
    and `model.stop_training = True` ends the run. The logs are those of `fit`: running means over
    the epoch for a batch, and these plus the validation results (`<set>_<metric>`) for an epoch.
    All Keras callbacks get the same dict, so each sees what those before it wrote. As in `fit`,
    `on_train_end` is not called if an exception ended the run. The callback is told when a
    validation begins and ends, but not about its batches; `model.evaluate` needs a compiled model,
    as usual.

    A resumed run restores the attributes that changed, such as `wait` and `best`, if they are
    numbers, arrays, None, or lists and dicts of these. Strings and the constructor arguments of
    Keras' own callbacks are never restored, so that a checkpoint cannot change where files go.

    Of several processes, only the first one calls Keras' own callbacks that write files.

    Args:
        callback: The Keras callback, kept as `callback`.
        optimizer: The name of the optimizer that it finds as `model.optimizer`, such as
            "d_optimizer": see `polus.callbacks.LearningRateScheduler`.
    """

    fit: "FitEmulation"  # from the beginning of the run on

    def __init__(self, callback: keras.callbacks.Callback, optimizer: str = "optimizer") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.callback = callback
        self.called: Any = callback
        self.has_batch_events = any(_overridden(callback, event) for event in BATCH_EVENTS)
        self.only_counts = self.has_batch_events and _only_counts_batches(callback)
        self.every_steps = 1 if self.has_batch_events and not self.only_counts else None
        self._initial = dict(vars(callback))
        self._fixed = _fixed_attributes(callback)

    def on_train_begin(self) -> None:
        run = self.coordinator.run
        self._prepare_for_processes()
        adapters = [c for c in self.coordinator.callbacks if isinstance(c, KerasCallback)]
        if self is adapters[0]:
            fit = FitEmulation(run, adapters)
            run.closing.enter_context(fit.model_attributes())
            for adapter in adapters:
                adapter.fit = fit
                adapter.callback.set_model(fit.model)
                adapter.callback.set_params(
                    {"verbose": 1, "epochs": run.epochs, "steps": run.steps}
                )
        if isinstance(self.callback, MONITORS) and self.callback.mode == "auto":
            # Keras would ask the metrics of a compiled model, and raises if they don't know.
            self.callback.mode = (
                improving_direction(self.callback.monitor, self.coordinator) or "auto"
            )
        if run.resuming and isinstance(self.callback, keras.callbacks.CSVLogger):
            self.callback.append = True  # otherwise it empties the file
        with self.fit.lent_optimizer(self.optimizer):
            self.called.on_train_begin(self.fit.begin_logs(self))
        # BackupAndRestore leaves the epoch to continue from here. It has no public name.
        run.epoch = vars(self.fit.model)["_initial_epoch"] or run.epoch

    def _prepare_for_processes(self) -> None:
        """Leaves files to the first process."""
        placement = self.coordinator.run.placement
        if placement.count > 1 and isinstance(self.callback, keras.callbacks.BackupAndRestore):
            raise NotImplementedError(
                "BackupAndRestore restores one process only, and the others would start from the "
                "beginning. Use polus.checkpoint.Checkpoint(folder) with train(resume=folder)."
            )
        if placement.count > 1 and isinstance(self.callback, WRITERS):
            self.called = _Writer(self.callback, placement)

    def on_epoch_begin(self, epoch: int) -> None:
        if self is self.fit.first:
            self.fit.begin_epoch()
        with self.fit.lent_optimizer(self.optimizer):
            self.called.on_epoch_begin(epoch, self.fit.begin_logs(self))
        self.fit.check_stop(self)

    def on_train_batch_begin(self, epoch: int, step: int) -> None:
        logs = self.fit.begin_logs(self)
        if self.has_batch_events:
            self.called.on_train_batch_begin(step, logs)

    def on_steps_end(self, epoch: int, steps: range, losses: Sequence[float] | None) -> None:
        if self is self.fit.first:
            self.fit.add_steps(steps)
        if not self.has_batch_events:
            return
        with self.fit.lent_optimizer(self.optimizer):
            for i, step in enumerate(steps):
                if len(steps) > 1:
                    self.called.on_train_batch_begin(step, {})
                self.called.on_train_batch_end(step, self.fit.batch_logs(i))
        self.fit.check_stop(self)

    def on_epoch_end(self, epoch: int) -> None:
        logs = self.coordinator.run.logs
        if self is self.fit.first:
            self.fit.train_logs = dict(logs)
        rate = logs.get("learning_rate", MISSING)
        with self.fit.lent_optimizer(self.optimizer):
            self.called.on_epoch_end(epoch, logs)
        if self.optimizer != "optimizer":  # it has written the rate of the one that it was lent
            logs.pop("learning_rate", None)
            logs.update({} if rate is MISSING else {"learning_rate": rate})
        if self is self.fit.last and self.fit.adds_history:
            self.fit.history.on_epoch_end(epoch, logs)
        self.fit.check_stop(self)

    def on_train_end(self) -> None:
        if self.coordinator.run.exception is None:
            self.called.on_train_end(self.fit.train_logs)

    def on_validation_begin(self) -> None:
        if self is self.fit.first:
            self.fit.warn_about_test_batches()
        self.called.on_test_begin(self.fit.begin_logs(self))

    def on_validation_end(self, results: dict[str, Any]) -> None:
        if self is self.fit.first:
            self.fit.test_logs = dict(results)
        self.called.on_test_end(self.fit.test_logs)

    # ------------------------------------------------------------------ state

    def get_state(self) -> dict[str, Any]:
        changed, strings = {}, []
        for name, value in vars(self.callback).items():
            scalar = isinstance(value, bool | int | float | str | None)
            if name in self._fixed or (scalar and value == self._initial.get(name, MISSING)):
                continue
            if _is_plain(value):
                changed[name] = value
            elif isinstance(value, str) and not name.startswith("_"):
                strings.append(name)
        state = {"class": type(self.callback).__name__, "changed": changed, "strings": strings}
        return state | (self.fit.get_state() if self is self.fit.first else {})

    def set_state(self, state: dict[str, Any]) -> None:
        if self is self.fit.first:
            self.fit.set_state(state)
        name = type(self.callback).__name__
        if state["class"] != name:
            self.logger.warning(
                "The checkpoint has the state of a %r where this run has %s: %s does not continue "
                "from it. Pass the same Keras callbacks in the same order.",
                state["class"],
                name,
                name,
            )
            return
        attributes = vars(self.callback)
        for key, value in state["changed"].items():
            present = attributes.get(key, getattr(type(self.callback), key, None))
            if key not in self._fixed and _may_replace(present, value):
                attributes[key] = value
        if state["strings"]:
            self.logger.warning(
                "%s changed its attributes %r during the run. They are strings, which a checkpoint "
                "does not restore since they may be paths.",
                name,
                state["strings"],
            )


class FitEmulation:
    """What `fit` shares among its callbacks: attributes of the model, and a dict of logs per event.

    Args:
        run: The run.
        adapters: Its Keras callbacks in the order in which they are called.
    """

    def __init__(self, run: RunView, adapters: list[KerasCallback]) -> None:
        self.run = run
        self.model = run.trainer.model
        self.adapters = adapters
        self.first, self.last = adapters[0], adapters[-1]
        self.needs_batch_logs = any(a.has_batch_events and not a.only_counts for a in adapters)
        given = [a.callback for a in adapters if isinstance(a.callback, keras.callbacks.History)]
        self.history = given[0] if given else keras.callbacks.History()
        self.adds_history = not given
        self.history.set_model(self.model)
        self.history.on_train_begin()
        self.train_logs: dict[str, Any] = {}
        self.test_logs: dict[str, Any] = {}
        self._begin_logs: dict[str, Any] = {}
        self._batch_logs: list[dict[str, Any]] = []
        self._sums: dict[str, float] = {}
        self._examples = 0
        self._warned = False

    @contextlib.contextmanager
    def model_attributes(self) -> Iterator[None]:
        """Sets the model attributes that callbacks read; restores the model's own afterwards."""
        model, optimizer = self.model, self.run.trainer.optimizer
        lent = {
            "optimizer": optimizer,
            "stop_training": False,
            "history": self.history,
            "_initial_epoch": None,
        }
        if model.compiled and model.optimizer is not optimizer:
            own = model.get_compile_config

            # The optimizer's variables are saved with the model, so its configuration must match.
            def get_compile_config() -> Any:
                config = own()
                if config and "optimizer" in config:
                    config |= {"optimizer": keras.optimizers.serialize(optimizer)}
                return config

            lent["get_compile_config"] = get_compile_config
        before = {name: vars(model).get(name, MISSING) for name in lent}
        for name, value in lent.items():
            object.__setattr__(model, name, value)  # not tracked as part of the model
        try:
            yield
        finally:
            for name, value in before.items():
                vars(model).pop(name, None)
                if value is not MISSING:
                    object.__setattr__(model, name, value)

    @contextlib.contextmanager
    def lent_optimizer(self, name: str) -> Iterator[None]:
        """Sets `model.optimizer` to one of the trainer's other optimizers for one callback."""
        if name == "optimizer":
            yield
            return
        before = vars(self.model)["optimizer"]
        object.__setattr__(self.model, "optimizer", optimizer_named(self.run.trainer, name))
        try:
            yield
        finally:
            object.__setattr__(self.model, "optimizer", before)

    def check_stop(self, adapter: KerasCallback) -> None:
        """Ends the run if a callback asked for it."""
        if self.model.stop_training and not self.run.stopping:
            self.run.stop(f"{type(adapter.callback).__name__} set model.stop_training")

    def begin_epoch(self) -> None:
        self._sums, self._examples = {}, 0

    def begin_logs(self, adapter: KerasCallback) -> dict[str, Any]:
        """Returns the logs of the event that begins: an empty dict, the same for all callbacks."""
        if adapter is self.first:
            self._begin_logs = {}
        return self._begin_logs

    def add_steps(self, steps: range) -> None:
        """Computes the logs of some finished steps: the means over the epoch so far."""
        if not self.needs_batch_logs:
            return
        run = self.run
        sizes = run.batch_sizes[-len(steps) :]
        terms = {name: np.asarray(values) for name, values in run.step_logs.items()}
        results = results_by_name(run.metrics, lambda metric: metric.result())
        metrics = {name: _scalar(value) for name, value in results.items()}
        self._batch_logs = []
        for i, size in enumerate(sizes):
            self._examples += size
            for name, values in terms.items() if size else ():  # else its update was skipped
                self._sums[name] = self._sums.get(name, 0.0) + float(values[i]) * size
            means = {name: total / max(1, self._examples) for name, total in self._sums.items()}
            self._batch_logs.append({**means, **metrics})

    def batch_logs(self, i: int) -> dict[str, Any]:
        """Returns the logs of the i-th of the steps that were added last, the same for all.

        They are empty if all callbacks only count batches: nothing waits for the losses then.
        """
        return self._batch_logs[i] if self.needs_batch_logs else {}

    def warn_about_test_batches(self) -> None:
        for adapter in self.adapters if not self._warned else ():
            callback = adapter.callback
            ignored = [event for event in TEST_BATCH_EVENTS if _overridden(callback, event)]
            if ignored and not type(callback).__module__.startswith("keras."):
                adapter.logger.warning(
                    "%s.%s is not called in train: Keras callbacks are told when a validation "
                    "begins and ends, not about its batches. Use on_test_end(logs).",
                    type(callback).__name__,
                    ignored[0],
                )
        self._warned = True

    def get_state(self) -> dict[str, Any]:
        return {"sums": self._sums, "examples": self._examples}

    def set_state(self, state: dict[str, Any]) -> None:
        self._sums, self._examples = state["sums"], state["examples"]


def _only_counts_batches(callback: keras.callbacks.Callback) -> bool:
    """Returns True for callbacks of Keras that write once per epoch and only count batches."""
    once_per_epoch = "epoch" in (
        getattr(callback, "save_freq", None),
        getattr(callback, "update_freq", None),
    )
    # TensorBoard measures single batches for these two. Keras has no public name for the second.
    times_batches = getattr(callback, "write_steps_per_second", False) or getattr(
        callback, "_should_trace", False
    )
    return type(callback) in COUNTERS and once_per_epoch and not times_batches


def _fixed_attributes(callback: keras.callbacks.Callback) -> set[str]:
    """Returns the attributes that a resumed run keeps as they are.

    These are the attributes of every callback, such as the model, and the constructor arguments of
    Keras' own callbacks: the user's configuration. (Keras itself changes `min_delta`, whose sign it
    turns once in each process.) `CSVLogger` continues from its file.
    """
    fixed = set(vars(keras.callbacks.Callback()))
    if isinstance(callback, keras.callbacks.CSVLogger):
        fixed |= set(vars(callback))
    for cls in type(callback).__mro__:
        if cls.__module__.startswith("keras.") and "__init__" in vars(cls):
            fixed |= set(inspect.signature(cls).parameters)
    return fixed


def _is_plain(value: Any) -> bool:
    """Returns True for None, numbers and numeric arrays, and for lists and dicts of these."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(child) for key, child in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, np.ndarray | np.generic):
        # bfloat16 and its kind are void types to NumPy, without fields.
        return value.dtype.kind in "biufc" or keras.backend.is_float_dtype(value.dtype.name)
    return isinstance(value, bool | int | float | None)


def _may_replace(present: Any, value: Any) -> bool:
    """Returns True if both values are plain and of the same kind, or one of them is None."""
    if not _is_plain(present) or not _is_plain(value):
        return False
    kinds: tuple[Any, ...] = (bool | int | float | np.generic, np.ndarray, list | tuple, dict)
    alike = any(isinstance(present, kind) and isinstance(value, kind) for kind in kinds)
    return alike or present is None or value is None


class _Writer:
    """A callback that writes files, called in the first of several processes only."""

    def __init__(self, callback: keras.callbacks.Callback, placement: Placement) -> None:
        self.callback = callback
        self.placement = placement

    def __getattr__(self, event: str) -> Any:
        method = getattr(self.callback, event)
        if not self.placement.is_first:
            return lambda *arguments: None
        return functools.partial(self.placement.by_itself, method)


def _overridden(callback: keras.callbacks.Callback, event: str) -> bool:
    if isinstance(callback, keras.callbacks.LambdaCallback) and event in vars(callback):
        # It stores a function for each event; a lambda of its own for those it was not given.
        name: str = getattr(vars(callback)[event], "__qualname__", "")
        return name != "LambdaCallback.__init__.<locals>.<lambda>"
    method = getattr(callback, event)
    return getattr(method, "__func__", method) is not getattr(keras.callbacks.Callback, event)


def _scalar(value: Any) -> Any:
    array = to_host(value)
    return array if array.ndim else array.item()
