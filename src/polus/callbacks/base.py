"""The interface of callbacks, and what a callback sees of its run."""

import contextlib
import enum
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras

from polus.backends.placement import Placement
from polus.data.reader import DataReader
from polus.history import History
from polus.host import DeviceValues
from polus.log import BaseLogger
from polus.metrics import IMetric
from polus.signals import Signals


class Phase(enum.IntEnum):
    """The order in which callbacks hear an event. Within a phase, the order of the list."""

    MEASURE = 0
    """Adds values to the logs: validation, smoothed losses."""
    REACT = 1
    """Reads the logs and acts on the run: early stopping, schedules, Keras callbacks."""
    REPORT = 2
    """Shows what the others found: the console, timers."""
    SAVE = 3
    """Writes the model, after anything that may still change it."""


class KerasCallbackLike(Protocol):
    """A `keras.callbacks.Callback`, for type checkers, which find no types in Keras."""

    def set_params(self, params: object) -> object: ...
    def set_model(self, model: object) -> object: ...


class TrainerView(Protocol):
    """What callbacks use of a trainer."""

    early_stop: bool
    primary: str | None

    @property
    def model(self) -> keras.Model: ...

    optimizer: keras.optimizers.Optimizer

    @property
    def trainable_weights(self) -> list[keras.Variable]: ...
    @property
    def explicit_trainable_weights(self) -> list[keras.Variable] | None: ...
    def set_trainable_weights(self, weights: Sequence[keras.Variable] | None) -> None: ...
    @property
    def metrics(self) -> Sequence[IMetric]: ...
    @property
    def validation_metrics(self) -> Sequence[IMetric] | None: ...
    def evaluate(
        self,
        dataset: object,
        custom_data_transform_f: Callable[[Any], Any] | None = None,
        steps: int | None = None,
        *,
        model: keras.Model | None = None,
    ) -> dict[str, Any]: ...


class RunView(Protocol):
    """What callbacks see of a run.

    Attributes:
        id: Names the run in its checkpoints.
        trainer: The trainer.
        reader: The training data.
        history: What was recorded so far.
        placement: The devices that it runs on. Only the process for which `placement.is_first` is
            True should print and write files.
        signals: The signals that wait for the end of a step.
        epoch: The current epoch, from 0.
        step: The next step of the epoch, from 0.
        epochs: The number of epochs.
        steps: The steps of an epoch; None until it is known.
        batch_sizes: The number of examples of each step of this epoch so far.
        step_logs: The loss and terms of the newest steps, by name.
        step_arrays: What the newest step returned besides scalars, such as samples to draw, by
            name; tensors on the device.
        logs: The logs of the current epoch; see `Run`.
        resuming: Whether the run continues from a checkpoint.
        open_ended: Whether the number of epochs and of their steps is not known.
        exception: What ended the run early, else None.
    """

    id: str
    epoch: int
    exception: BaseException | None

    @property
    def trainer(self) -> TrainerView: ...
    @property
    def reader(self) -> DataReader: ...
    @property
    def history(self) -> History: ...
    @property
    def placement(self) -> Placement: ...
    @property
    def signals(self) -> Signals: ...
    @property
    def closing(self) -> contextlib.ExitStack: ...
    @property
    def metrics(self) -> Sequence[IMetric]: ...
    @property
    def step(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def steps_per_execution(self) -> int | None: ...
    @property
    def batch_sizes(self) -> Sequence[int]: ...
    @property
    def step_logs(self) -> dict[str, DeviceValues]: ...
    @property
    def step_arrays(self) -> dict[str, Any]: ...
    @property
    def logs(self) -> dict[str, Any]: ...
    @property
    def resuming(self) -> bool: ...
    @property
    def open_ended(self) -> bool: ...
    @property
    def stopping(self) -> bool: ...
    def stop(self, reason: str) -> None: ...
    def validated(self, name: str, results: dict[str, Any]) -> None: ...
    def get_state(self) -> dict[str, Any]: ...
    def variables(self) -> list[keras.Variable]: ...


class Coordinator(Protocol):
    """What callbacks see of `polus.callbacks.CallbackCoordinator`."""

    shared_dict: dict[str, Any]

    @property
    def run(self) -> RunView: ...
    @property
    def trainer(self) -> TrainerView: ...
    @property
    def logs(self) -> dict[str, Any]: ...
    @property
    def exception(self) -> BaseException | None: ...
    @property
    def callbacks(self) -> Sequence["ICallback"]: ...
    def has_callback(self, cls: type) -> bool: ...
    def on_validation_begin(self) -> None: ...
    def on_validation_end(self, results: dict[str, Any]) -> None: ...


class ICallback:
    """The interface of callbacks. Epochs count from 0, and so do the steps within each epoch.

    The loop runs several steps per call of the backend where every callback allows it:
    `every_steps` says when a callback next has to run *between* two steps. Each step's batch events
    are delivered all the same, in order, with its own number and loss; but the model is up to date
    only at the steps that `every_steps` asks for.
    """

    phase: Phase = Phase.REACT

    @property
    def every_steps(self) -> int | None:
        """1: at every step; n: after each n-th step of an epoch; None: only between epochs.

        Batch events are delivered for each step whatever it says. A callback that overrides a batch
        event and says nothing is taken to need each step. Assign it (`callback.every_steps = None`)
        to say otherwise.
        """
        overrides = any(
            getattr(type(self), event) is not getattr(ICallback, event)
            for event in ("on_train_batch_begin", "on_train_batch_end")
        )
        return self.__dict__.get("every_steps", 1 if overrides else None)

    @every_steps.setter
    def every_steps(self, value: int | None) -> None:
        self.__dict__["every_steps"] = value

    def add_coordinator(self, coordinator: Coordinator) -> None:
        """Called once before training with the coordinator of the run."""

    def on_train_begin(self) -> None:
        """Called before the first step."""

    def on_resume(self, epoch: int, step: int) -> None:
        """Called before a checkpoint's state is restored, with the place where the run continues.

        A callback that changes which layers are trained, or by which optimizer, does here what it
        had done until then: the state is that of the changed parts.
        """

    def on_epoch_begin(self, epoch: int) -> None:
        """Called before the first step of an epoch, and when a run resumes within an epoch."""

    def on_train_batch_begin(self, epoch: int, step: int) -> None:
        """Called before a step."""

    def on_train_batch_end(self, epoch: int, step: int, loss: object) -> None:
        """Called after a step with its loss, a scalar. `float(loss)` waits for the device.

        The loss is None if the step returns no term named "loss", and the trainer has no `primary`.
        All terms are in `run.step_logs`.
        """

    def on_steps_end(self, epoch: int, steps: range, losses: Sequence[float] | None) -> None:
        """Called after the steps `steps` with their losses, a lazy array of the same length.

        `np.asarray(losses)` waits for the device. They are None if the run has no loss. By default
        this delivers the batch events one by one. Override it where one call for many steps is
        enough.
        """
        begin, end = self.on_train_batch_begin, self.on_train_batch_end
        if getattr(begin, "__func__", None) is ICallback.on_train_batch_begin:
            begin = None  # type: ignore[assignment]
        if getattr(end, "__func__", None) is ICallback.on_train_batch_end:
            end = None  # type: ignore[assignment]
        if begin is None and end is None:
            return
        for i, step in enumerate(steps):
            # The loop announces a single step before it runs.
            if begin is not None and len(steps) > 1:
                begin(epoch, step)
            if end is not None:
                end(epoch, step, None if losses is None else losses[i])

    def on_boundary(self) -> None:
        """Called when all callbacks heard of some steps, or of an epoch's end.

        The run is consistent here, so this is where a checkpoint is saved.
        """

    def on_epoch_end(self, epoch: int) -> None:
        """Called after the last step of an epoch, when `run.logs` holds the epoch's logs."""

    def on_validation_begin(self) -> None:
        """Called before a validation."""

    def on_validation_end(self, results: dict[str, Any]) -> None:
        """Called after a validation with its results."""

    def on_train_end(self) -> None:
        """Called at the end of training, also after an error (see `run.exception`)."""

    def get_state(self) -> dict[str, Any]:
        """Returns what a resumed run needs: JSON values and NumPy arrays."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` returned."""


class Callback(ICallback, BaseLogger):
    """A callback to extend.

    Attributes:
        coordinator: The coordinator of its run: `has_callback(cls)`, `shared_dict`, and
            `run`: where the run stands, what it recorded, and how to stop it.
    """

    coordinator: Coordinator

    def add_coordinator(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
