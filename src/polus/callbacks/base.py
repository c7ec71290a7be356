"""The protocol of callbacks, and the coordinator that delivers events to all of them."""

import contextlib
import enum
import secrets
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from polus.core import BaseLogger
from polus.data.reader import DataReader, StepBlock
from polus.history import History
from polus.host import DeviceValues
from polus.signals import Signals

if TYPE_CHECKING:
    from polus.training import BaseTrainer


class Phase(enum.IntEnum):
    """The order in which callbacks hear of an event; within a phase it is that of the list."""

    MEASURE = 0
    """Adds values to the logs: validation, smoothed losses."""
    REACT = 1
    """Reads the logs and acts on the run: early stopping, schedules, Keras callbacks."""
    REPORT = 2
    """Shows what the others found: the console, timers."""
    SAVE = 3
    """Writes the model, after anything that may still change it."""


class ICallback:
    """What a callback can hear. Epochs count from 0, and so do the steps within each epoch.

    The loop hands the backend several steps at a time where every callback allows it: `every_steps`
    says when a callback next has to run *between* two steps. Events are delivered for each step all
    the same, in order, each with its own number and loss; but the model is current only at the
    steps that were asked for.
    """

    phase: Phase = Phase.REACT

    @property
    def every_steps(self) -> int | None:
        """1: at every step; n: after each n-th step of an epoch; None: only between epochs.

        A callback that overrides a batch event and says nothing is taken to need each step. Assign
        it (`callback.every_steps = None`) to say otherwise.
        """
        overrides = any(
            getattr(type(self), event) is not getattr(ICallback, event)
            for event in ("on_train_batch_begin", "on_train_batch_end")
        )
        return self.__dict__.get("every_steps", 1 if overrides else None)

    @every_steps.setter
    def every_steps(self, value: int | None) -> None:
        self.__dict__["every_steps"] = value

    def add_coordinator(self, coordinator: "CallbackCoordinator") -> None:
        """Called once before training with the coordinator of the run."""

    def on_train_begin(self) -> None:
        """Before the first step."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Before the first step of an epoch, and again where a run goes on in the middle of one."""

    def on_train_batch_begin(self, epoch: int, step: int) -> None:
        """Before a step."""

    def on_train_batch_end(self, epoch: int, step: int, loss: Any) -> None:
        """After a step, with its loss: a scalar (call `float` on it; that waits for the device)."""

    def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
        """After the steps `steps`, with their losses: a lazy float32 array of the same length.

        `np.asarray(losses)` waits for the device. By default the batch events are delivered one by
        one. Override this where one call for many steps is enough.
        """
        begin, end = self.on_train_batch_begin, self.on_train_batch_end
        if getattr(begin, "__func__", None) is ICallback.on_train_batch_begin:
            begin = None  # type: ignore[assignment]
        if getattr(end, "__func__", None) is ICallback.on_train_batch_end:
            end = None  # type: ignore[assignment]
        if begin is None and end is None:
            return
        for i, step in enumerate(steps):
            # A single step was announced by the loop before it ran.
            if begin is not None and len(steps) > 1:
                begin(epoch, step)
            if end is not None:
                end(epoch, step, losses[i])

    def on_boundary(self) -> None:
        """After all callbacks heard of some steps, or of an epoch's end: the run is whole here."""

    def on_epoch_end(self, epoch: int) -> None:
        """After the last step of an epoch. `coordinator.shared_dict["epoch_logs"]` has its logs."""

    def on_validation_begin(self) -> None:
        """Before a validation."""

    def on_validation_end(self, results: dict[str, Any]) -> None:
        """After a validation, with what it found."""

    def on_train_end(self) -> None:
        """At the end of training, also of one that ends in an error (`coordinator.exception`)."""

    def get_state(self) -> dict[str, Any]:
        """What a resumed run must know: values that JSON can write, and NumPy arrays."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Puts back what `get_state` gave."""


class Callback(ICallback, BaseLogger):
    """A callback to extend: it knows the coordinator of its run as `self.coordinator`."""

    coordinator: "CallbackCoordinator"

    def add_coordinator(self, coordinator: "CallbackCoordinator") -> None:
        self.coordinator = coordinator


class CallbackCoordinator:
    """One run: where it stands, what it recorded, and the delivery of events to its callbacks.

    Attributes:
        id: names the run in its checkpoints; a resumed run keeps it.
        trainer: the trainer of the run. callbacks: the callbacks, Keras' own ones adapted.
        epochs: the number of epochs. steps: the steps of one epoch, None where it is not known yet.
        epoch, step: what comes next, both from 0.
        resuming: whether there is a checkpoint that the run goes on from.
        steps_per_execution: how many steps the user wants run in one call, None where not said.
        reader: the data. history: the `History` of the run.
        shared_dict: what callbacks tell each other: `"smooth_loss"`, `"validation"` (set name ->
            metric name -> list of values), `"epoch_logs"`.
        signals: the signals that came and wait for the end of a step.
        exception: what ended the run early, else None.
    """

    def __init__(
        self, callbacks: Iterable[Any], trainer: "BaseTrainer", epochs: int, reader: DataReader
    ) -> None:
        self.id = secrets.token_hex(8)
        self.trainer = trainer
        self.epochs = epochs
        self.steps = reader.num_batches
        self.reader = reader
        self.epoch = 0
        self.step = 0
        self.resuming = False
        self.steps_per_execution: int | None = None
        self.batch_sizes: list[int] = []  # of the steps of this epoch so far
        self.history = History()
        self.shared_dict: dict[str, Any] = {"validation": {}, "epoch_logs": {}}
        self.signals = Signals()
        self.exception: BaseException | None = None
        self.closing = contextlib.ExitStack()  # what callbacks want undone behind the last of them
        adapted = [_adapted(callback) for callback in callbacks]
        self.callbacks = sorted(adapted, key=lambda callback: callback.phase)
        for callback in self.callbacks:
            callback.add_coordinator(self)

    def has_callback(self, cls: type) -> bool:
        """Whether a callback of this class (or a Keras callback of it) is in the list."""
        return any(
            isinstance(c, cls) or isinstance(getattr(c, "callback", None), cls)
            for c in self.callbacks
        )

    @property
    def logs(self) -> dict[str, Any]:
        """The present epoch's logs, and the newest results of validations as `<set>_<metric>`."""
        logs = dict(self.shared_dict["epoch_logs"])
        for name, metrics in self.shared_dict["validation"].items():
            logs |= {f"{name}_{metric}": values[-1] for metric, values in metrics.items() if values}
        return logs

    def add_validation(self, name: str, results: dict[str, Any]) -> None:
        """Records what a validation on the set `name` gave, after the last step that ran."""
        self.history.add_validation(self.epoch, self.step - 1, name, results)
        values = self.shared_dict["validation"].setdefault(name, {})
        for metric, value in results.items():
            values.setdefault(metric, []).append(value)

    def steps_until_callback(self, step: int) -> int | None:
        """How many steps may run from `step` on before a callback has to; None for no limit.

        Raises:
            ValueError: if a callback's `every_steps` is not None or a positive integer.
        """
        due = None
        for callback in self.callbacks:
            if (n := callback.every_steps) is None:
                continue
            if not isinstance(n, int) or n < 1:
                raise ValueError(
                    f"{type(callback).__name__}.every_steps is {n!r}; it takes a positive "
                    "integer, or None for a callback that runs only between epochs."
                )
            due = n - step % n if due is None else min(due, n - step % n)
        return due

    def max_steps_per_execution(self) -> int:
        """The largest number of steps that may ever run without a callback in between."""
        limits = [n for n in (self.steps_until_callback(0), self.steps) if n is not None]
        return min(limits, default=sys.maxsize)

    def poll(self) -> None:
        """Lets a signal that came end the run. Called between steps, also while data is late."""
        if self.signals.pending is not None:
            self._boundary()  # a checkpoint saves first
            self.signals.check()

    def _boundary(self) -> None:
        ended = None
        for callback in self.callbacks:
            try:
                callback.on_boundary()
            except SystemExit as exit_:  # the others, too, save before that
                ended = ended or exit_
        if ended is not None:
            raise ended

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Begins the run, and ends it in order for each callback that began, whatever happens."""
        with self.closing:
            begun: list[ICallback] = []
            try:
                with self.signals:
                    for callback in self.callbacks:
                        callback.on_train_begin()
                        begun.append(callback)
                    yield
            except BaseException as exception:
                self.exception = exception
                raise
            finally:
                first = self.exception
                for callback in begun:
                    try:
                        callback.on_train_end()
                    except BaseException as exception:  # the others have their end all the same
                        if self.exception is None:
                            self.exception = exception
                        else:
                            self.trainer.logger.error(
                                "%s.on_train_end failed as well",
                                type(callback).__name__,
                                exc_info=exception,
                            )
                if first is None and self.exception is not None:
                    raise self.exception

    def on_epoch_begin(self) -> None:
        self.batch_sizes = []
        for callback in self.callbacks:
            callback.on_epoch_begin(self.epoch)

    def on_train_batch_begin(self) -> None:
        for callback in self.callbacks:
            callback.on_train_batch_begin(self.epoch, self.step)

    def on_steps_end(self, block: StepBlock, outputs: Any) -> None:
        """Records the steps of a block, and tells of them."""
        terms = outputs if isinstance(outputs, dict) else {"loss": outputs}
        terms = {"loss": terms["loss"], **terms}  # JAX sorts them by name
        logs = {name: DeviceValues(values, block.count) for name, values in terms.items()}
        steps = range(self.step, self.step + block.count)
        self.history.add_steps(self.epoch, self.step, logs)
        self.batch_sizes += [block.batch_size] * block.count
        self.step = steps.stop
        self.step_logs = logs
        for callback in self.callbacks:
            callback.on_steps_end(self.epoch, steps, logs["loss"])
        self._boundary()

    def on_epoch_end(self, metrics: dict[str, Any]) -> None:
        """Closes an epoch: its logs, the callbacks, and the next one begins."""
        wanted = self.reader.steps
        if wanted is not None and self.step < wanted and not self.trainer.early_stop:
            self.trainer.logger.warning(
                "The dataset ended after %d of the %d steps of epoch %d. Give it more batches, "
                "repeat it, or lower steps.",
                self.step,
                wanted,
                self.epoch + 1,
            )
        self.steps = self.steps or self.step
        logs = self.shared_dict["epoch_logs"] = {**self._weighted_means(), **metrics}
        for callback in self.callbacks:
            callback.on_epoch_end(self.epoch)
        self.history.end_epoch(self.epoch, logs)
        self.epoch, self.step = self.epoch + 1, 0
        self._boundary()

    def _weighted_means(self) -> dict[str, float]:
        """The loss and terms of this epoch, each step weighted by its number of examples."""
        columns = self.history.steps_of(self.epoch)
        means = {}
        for name, column in columns.items():
            if name in ("epoch", "step") or (name != "loss" and np.isnan(column).all()):
                continue
            means[name] = float(np.average(column.astype(np.float64), weights=self.batch_sizes))
        bad = np.flatnonzero(~np.isfinite(columns["loss"]))
        if len(bad):
            self.trainer.logger.warning(
                "The loss is not finite from step %d of epoch %d on (%s). Try a smaller learning "
                "rate (trainer.lr_finder finds one), or clip gradients: "
                "keras.optimizers.Adam(clipnorm=1.0).",
                bad[0],
                self.epoch + 1,
                columns["loss"][bad[0]],
            )
        return means


def _adapted(callback: Any) -> ICallback:
    if isinstance(callback, ICallback):
        return callback
    if isinstance(callback, keras.callbacks.Callback):
        from polus.callbacks.keras_callback import KerasCallback

        return KerasCallback(callback)
    raise TypeError(
        "A callback is a polus.callbacks.Callback or a keras.callbacks.Callback, and got "
        f"{type(callback).__name__}: {callback!r}. For a function, write a class with the event "
        "that it should hear: class Report(Callback): def on_epoch_end(self, epoch): ..."
    )
