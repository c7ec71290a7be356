"""Delivers the events of a run to its callbacks."""

import inspect
import time
from collections.abc import Iterable
from typing import Any

import keras

from polus.callbacks.base import ICallback, RunView, TrainerView
from polus.callbacks.keras_callback import KerasCallback
from polus.host import DeviceValues
from polus.log import BaseLogger

# A call has room for as many batches as it may run. Where the data may end after ten, more room
# costs more than it saves.
STEPS_OF_UNKNOWN = 256


class CallbackCoordinator(BaseLogger):
    """The callbacks of one run, in the order of their phases, and what they tell each other.

    Args:
        callbacks: Callbacks of Polus and of Keras; the latter are adapted.
        run: The run.

    Attributes:
        callbacks: The callbacks, ordered by phase.
        run: The run.
        shared_dict: What callbacks tell each other: `"smooth_loss"`, `"validation"` (set name ->
            metric name -> list of values), `"epoch_logs"`.
        secs: How long the callbacks took between steps so far, validations included.
    """

    def __init__(self, callbacks: Iterable[Any], run: RunView) -> None:
        super().__init__()
        self.run = run
        self.shared_dict: dict[str, Any] = {"validation": {}, "epoch_logs": {}}
        adapted = [_adapt(callback) for callback in checked_list(callbacks)]
        self.callbacks = sorted(adapted, key=lambda callback: callback.phase)
        for callback in self.callbacks:
            callback.add_coordinator(self)
        self._begun: list[ICallback] = []
        self.secs = 0.0

    @property
    def trainer(self) -> TrainerView:
        """The trainer of the run."""
        return self.run.trainer

    @property
    def logs(self) -> dict[str, Any]:
        """The logs of the run's current epoch."""
        return self.run.logs

    @property
    def exception(self) -> BaseException | None:
        """What ended the run early, else None."""
        return self.run.exception

    def has_callback(self, cls: type) -> bool:
        """Returns whether a callback of this class (or a Keras callback of it) is in the list."""
        return any(
            isinstance(c, cls) or (isinstance(c, KerasCallback) and isinstance(c.callback, cls))
            for c in self.callbacks
        )

    def steps_until_callback(self, step: int) -> int | None:
        """Returns how many steps may run from `step` on before a callback must; None for no limit.

        A run that was stopped before an epoch's first step runs that one only, as in `fit`.

        Raises:
            ValueError: If a callback's `every_steps` is neither None nor a positive integer.
        """
        return 1 if self.run.stopping else self._steps_until_callback(step)

    def _steps_until_callback(self, step: int) -> int | None:
        limit = None
        for callback in self.callbacks:
            if (n := callback.every_steps) is None:
                continue
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise ValueError(
                    f"{type(callback).__name__}.every_steps must be a positive integer, or None "
                    f"for a callback that runs only between epochs, got {n!r}."
                )
            left = n - step % n
            limit = left if limit is None else min(limit, left)
        return limit

    @property
    def max_steps_per_execution(self) -> int:
        """The largest number of steps that may ever run without a callback in between."""
        known = self.run.reader.num_batches
        due = self._steps_until_callback(0)
        steps = STEPS_OF_UNKNOWN if known is None else known
        return steps if due is None else min(steps, due)

    def on_train_begin(self) -> None:
        """Begins training for each callback."""
        for callback in self.callbacks:
            callback.on_train_begin()
            self._begun.append(callback)

    def on_epoch_begin(self) -> None:
        for callback in self.callbacks:
            callback.on_epoch_begin(self.run.epoch)

    def on_train_batch_begin(self) -> None:
        for callback in self.callbacks:
            callback.on_train_batch_begin(self.run.epoch, self.run.step)

    def on_steps_end(self, steps: range, losses: DeviceValues | None) -> None:
        began = time.perf_counter()
        for callback in self.callbacks:
            callback.on_steps_end(self.run.epoch, steps, losses)
        self.secs += time.perf_counter() - began

    def on_boundary(self) -> None:
        """Lets each callback save, also if an earlier one ends the program."""
        ended, began = None, time.perf_counter()
        for callback in self.callbacks:
            try:
                callback.on_boundary()
            except SystemExit as exit_:
                ended = ended or exit_
        self.secs += time.perf_counter() - began
        if ended is not None:
            raise ended

    def on_validation_begin(self) -> None:
        for callback in self.callbacks:
            callback.on_validation_begin()

    def on_validation_end(self, results: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_validation_end(results)

    def on_epoch_end(self) -> None:
        for callback in self.callbacks:
            callback.on_epoch_end(self.run.epoch)

    def on_train_end(self) -> BaseException | None:
        """Ends training for each callback that began; one that fails does not stop the others.

        Returns:
            The first error, unless the run had failed already.
        """
        first: BaseException | None = None
        for callback in self._begun:
            try:
                callback.on_train_end()
            except BaseException as exception:
                if self.run.exception is None:
                    self.run.exception = first = exception
                else:
                    self.logger.error(
                        "%s.on_train_end failed as well",
                        type(callback).__name__,
                        exc_info=exception,
                    )
        return first


def checked_list(callbacks: object) -> list[Any]:
    """Returns callbacks as a list of their own.

    Raises:
        TypeError: If they are not a list.
        ValueError: If one is in it twice.
    """
    if isinstance(callbacks, ICallback | keras.callbacks.Callback):
        raise TypeError(
            f"callbacks must be a list, got a single {type(callbacks).__name__}. Write "
            f"callbacks=[{type(callbacks).__name__}(...)]."
        )
    if not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks must be a list, got {callbacks!r}.")
    listed = list(callbacks)
    for i, callback in enumerate(listed):
        if not isinstance(callback, str) and any(callback is other for other in listed[:i]):
            raise ValueError(
                f"callbacks has the same {type(callback).__name__} twice, and it would hear each "
                "event twice. Remove one, or make a second object."
            )
    return listed


def _adapt(callback: Any) -> ICallback:
    if isinstance(callback, ICallback):
        if not type(callback).__module__.startswith("polus."):  # which costs a little
            _check_events(callback)
        return callback
    if isinstance(callback, keras.callbacks.Callback):
        return KerasCallback(callback)
    hint = f" Write {callback.__name__}(...)." if isinstance(callback, type) else ""
    raise TypeError(
        "A callback must be a polus.callbacks.Callback or a keras.callbacks.Callback, got "
        f"{callback!r} of type {type(callback).__name__}.{hint} To use a function, write a class "
        "with the event that it should hear: class Report(Callback): def on_epoch_end(self, "
        "epoch): ..."
    )


def _check_events(callback: ICallback) -> None:
    """Raises TypeError if a method can't take the arguments of its event."""
    for name, event in vars(ICallback).items():
        method = getattr(callback, name, None)
        if not name.startswith("on_") or getattr(type(callback), name, None) is event:
            continue
        arguments = list(inspect.signature(event).parameters)[1:]
        try:
            inspect.signature(method).bind(*arguments)  # type: ignore[arg-type]
        except ValueError:  # of a method without a signature
            continue
        except TypeError:
            raise TypeError(
                f"{type(callback).__name__}.{name}{inspect.signature(method)} is called with "  # type: ignore[arg-type]
                f"({', '.join(arguments)}). A callback whose methods take what Keras' callbacks "
                "take, (batch, logs) and (epoch, logs), extends keras.callbacks.Callback."
            ) from None
