"""One call of `train`: where it stands, how it ended, and its state for a checkpoint."""

import contextlib
import math
import secrets
import signal
import time
from array import array
from collections.abc import Callable, Generator, Iterator
from typing import Any

import keras
import numpy as np

from polus.callbacks.coordinator import CallbackCoordinator
from polus.callbacks.time_limit import TIME_IS_UP
from polus.data import EpochReader, StepBlock
from polus.history import History
from polus.host import DeviceValues
from polus.log import BaseLogger, info_from_first
from polus.metrics import IMetric, results_by_name
from polus.optimizers import begin_schedules, rates_of
from polus.signals import Signals
from polus.state import random_state, set_random_state
from polus.steps.compiled import CompiledStep, as_terms
from polus.steps.executor import StepExecutor
from polus.steps.finite import Flags
from polus.training.config import TrainConfig
from polus.training.epoch_logs import EpochRecord, Spent, weighted_means
from polus.training.nonfinite import STOPPED, NonFiniteSteps, non_finite_error, sizes_of
from polus.training.parts import TrainerParts
from polus.training.processes import check_same_batch, check_same_length, check_same_programs
from polus.training.reports import log_stop, stays_ended, warn_of_missing_steps, warn_of_unsaved
from polus.training.run_state import Settings, check_state, data_state, use_own_generators
from polus.training.status import TRANSITIONS, RunStatus
from polus.training_state import (
    callbacks_state,
    check_variables,
    restore_callbacks,
    restore_variables,
    storable,
    variables_state,
    without_learning_rates,
)


class Run(BaseLogger):
    """One call of `train`.

    ```
    CREATED -> (RESTORED) -> RUNNING <-> EPOCH_END -> COMPLETED      all epochs are done
                                |-> STOPPED(stop_reason)             early stop, `run.stop(...)`
                                |-> INTERRUPTED(signal)              saved, if there is a checkpoint
                                '-> FAILED(exception)
    ```

    Args:
        trainer: The trainer.
        executor: The trainer's executor.
        config: The arguments of `train`.
        total_steps: The steps of earlier calls on this trainer, which count for tuning.
        first_epoch: The number that the data's order has in this run's first epoch.

    Attributes:
        id: Names the run in its checkpoints. A resumed run keeps it.
        trainer: The trainer.
        executor: Prepares, compiles and tunes the step.
        config: The arguments of `train`.
        reader: The training data.
        callbacks: The coordinator of the callbacks.
        history: What was recorded so far; what `train` returns.
        epoch_record: Measures how epochs go.
        settings: What the run is made of, to compare with a checkpoint.
        placement: The devices that it runs on.
        signals: The signals that wait for the end of a step.
        epochs: The number of epochs.
        steps: The steps of an epoch; None until it is known.
        epoch: The current epoch, from 0.
        step: The next step of the epoch, from 0.
        compiled: The step as programs, tuned for the epoch; set by `blocks`.
        block: The batches that were passed to the step last.
        batch_sizes: The number of examples of each step of this epoch so far.
        step_logs: The loss and terms of the newest steps, by name.
        step_arrays: What the newest step returned besides scalars, on the device.
        logs: Means, metrics and validations of the newest epoch; callbacks share and add to it.
        status: The state of the run.
        stop_reason: Why the run was stopped early; empty if it was not.
        exception: What ended the run early, else None.
        resuming: Whether the run continues from a checkpoint.
        open_ended: Whether the number of epochs and of their steps is not known.
        guarded: Keeps a step that is not finite from changing anything; `non_finite` counts these.
        closing: What callbacks want closed after the last of them has ended.
    """

    compiled: CompiledStep

    def __init__(
        self,
        trainer: TrainerParts,
        executor: StepExecutor,
        config: TrainConfig,
        total_steps: int = 0,
        first_epoch: int = 0,
    ) -> None:
        super().__init__()
        self.id = secrets.token_hex(8)
        self.trainer = trainer
        self.executor = executor
        self.config = config
        self.reader = config.reader(trainer, first_epoch)
        self.history = History()
        self.epoch_record = EpochRecord()
        self.placement = self.reader.placement
        self.signals = Signals()
        self.epochs = config.epochs
        self.steps = self.reader.num_batches
        self.steps_before = total_steps
        self.epoch = self.step = 0
        self.block: StepBlock | None = None
        self.batch_sizes = array("i")  # a list would take ten times as much for each step
        self.step_logs: dict[str, DeviceValues] = {}
        self.step_arrays: dict[str, Any] = {}
        self.logs: dict[str, Any] = {}
        self.status = RunStatus.CREATED
        self.stop_reason = ""
        self.exception: BaseException | None = None
        self.resuming = self.open_ended = False
        self._agreed_to_stop = False
        self._began = 0.0
        self.closing = contextlib.ExitStack()
        self.settings = Settings(trainer, config.transform)
        self.callbacks = CallbackCoordinator(config.callbacks, self)
        self.non_finite = NonFiniteSteps(config.on_nonfinite, config.max_skips, self.callbacks)
        self.guarded = executor.guarded.begin(self.non_finite.limit)

    # ------------------------------------------------------------------ from beginning to end

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Begins the run, and ends it for each callback that began, whatever happens."""
        with self.closing, info_from_first(self.placement.is_first):
            try:
                with self.signals:
                    self.signals.shared = self.placement.count > 1
                    check_same_programs(self.placement, self.config)
                    check_same_length(self.reader)
                    if self.reader.tracked or self.config.resume is not None:
                        self.settings.begin()
                    self.callbacks.on_train_begin()
                    yield
            except BaseException as exception:
                self.exception = exception
                interrupted = self.signals.pending is not None
                self._move(RunStatus.INTERRUPTED if interrupted else RunStatus.FAILED)
                raise
            else:
                self._move(RunStatus.STOPPED if self.stopping else RunStatus.COMPLETED)
                if self.stopping:
                    epochs = None if self.open_ended else self.epochs
                    log_stop(self.logger, self.epoch, epochs, self.stop_reason)
            finally:
                if (error := self.callbacks.on_train_end()) is not None:
                    self.status = RunStatus.FAILED
                    raise error

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the run is stopping."""
        return self.epoch >= self.epochs or self.stopping

    @property
    def stopping(self) -> bool:
        """Whether the run ends after the current step.

        Several processes stop together: what one of them wants counts from `agree` on.
        """
        return self.trainer.early_stop if self.placement.count == 1 else self._agreed_to_stop

    def stop(self, reason: str) -> None:
        """Ends the run after the current step, in order."""
        self.stop_reason = self.stop_reason or reason
        self.trainer.early_stop = True

    def open_epoch(self) -> EpochReader:
        """Begins an epoch, or continues one, and returns its data."""
        resumed = self.step > 0
        known = 0 if self.open_ended else self.epochs * (self.steps or 0)
        self.executor.progress.set(self.epoch, known)
        if self.status in (RunStatus.CREATED, RunStatus.RESTORED):
            begin_schedules(self.trainer, known, self.status is RunStatus.RESTORED)
        data = self.reader.epoch(self.epoch, start=self.step)
        self.epoch_record.begin(self.step, self._spent())
        if not resumed:
            self.batch_sizes, self.logs = array("i"), {}
            self.callbacks.shared_dict["epoch_logs"] = self.logs
            self.callbacks.on_epoch_begin()
        self.executor.example = data.example
        check_same_batch(self.placement, data.example)
        self._move(RunStatus.RUNNING)
        return data

    def blocks(self, data: EpochReader) -> Generator[StepBlock]:
        """Tunes the step and returns the blocks of an epoch; its metrics start empty.

        A block has batches of equal shape, as many as tuning and callbacks allow.
        """
        if self.step == 0:
            for metric in self.metrics:
                metric.reset()
        self.compiled = self.guarded.use(
            self.executor.tuned(
                data,
                self.callbacks.max_steps_per_execution,
                self.config.steps_per_execution,
                self.config.length(self.steps_before + self.epochs * (self.steps or math.inf)),
            )
        )
        return data.blocks(
            self.compiled.steps_per_execution,
            self.callbacks.steps_until_callback,
            self.handle_signals,
            self.compiled.pace,
        )

    def begin(self, block: StepBlock) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Tells the callbacks that a block begins. Returns its program, and the arguments of it."""
        check_same_length(self.reader, block.count)
        self.block = block
        if block.count == 1:
            self.callbacks.on_train_batch_begin()
        program, arguments = self.guarded.program(block)
        self.epoch_record.calls(program, self.reader.waited_secs)
        self._began = time.perf_counter()
        return program, arguments

    def record(self, block: StepBlock, outputs: object) -> Any:
        """Records the steps of a block, tells the callbacks, and handles signals.

        Returns:
            What the steps returned, on the device.

        Raises:
            NonFiniteError: If a step was not finite, by the policy of the run.
        """
        self.compiled.pace.observe(block.count, outputs, self._began)
        outputs = self.guarded.checked(block, outputs)
        self.epoch_record.called()
        finite = self.guarded.finite
        count = self.non_finite.count(block, finite)
        terms = as_terms(outputs, self.trainer.primary)
        names = sorted(terms, key=lambda name: name != "loss")  # JAX sorts them by name
        arrays = self.executor.array_terms
        self.step_logs = {
            name: DeviceValues(terms[name], count) for name in names if name not in arrays
        }
        self.step_arrays = {name: terms[name] for name in arrays}
        steps = range(self.step, self.step + count)
        self.history.add_steps(self.epoch, self.step, self.step_logs)
        self.batch_sizes.extend(sizes_of(block, count, finite))
        self.step = steps.stop
        self.callbacks.on_steps_end(steps, self.step_logs.get("loss"))
        if finite is not None:
            self._judge(block, steps, finite)
        self._agree()
        self.callbacks.on_boundary()
        self.handle_signals()
        return outputs

    def _judge(self, block: StepBlock, steps: range, finite: Flags) -> None:
        """Ends the run, or reports what was skipped."""
        if not self.non_finite.ends:
            self.non_finite.report(self.epoch, steps, finite)
        elif self.non_finite.policy == "stop":
            self.stop(f"{STOPPED}: batch {self.step} of epoch {self.epoch + 1}")
        elif not self.stopping:
            terms = {name: float(values[-1]) for name, values in self.step_logs.items()}
            place = self.epoch, self.step - 1
            raise non_finite_error(self.guarded, block, len(steps) - 1, place, terms)

    def close_epoch(self) -> None:
        """Ends an epoch: its logs, the callbacks, signals; the next one begins."""
        if not self.stopping:
            check_same_length(self.reader, 0)
            warn_of_missing_steps(self.logger, self.step, self.reader.steps, self.epoch)
        if not self.open_ended:
            self.steps = self.steps or self.step
        metrics = results_by_name(self.metrics, lambda metric: metric.evaluate())
        means = weighted_means(self.history, self.epoch, self.batch_sizes, self.logger)
        record = self.epoch_record.end(self.trainer, self.batch_sizes, self._spent())
        self.history.add_record(self.epoch, record)
        rates = rates_of(self.trainer) | (record if self.config.record else {})
        own = means | metrics  # a term or metric named "secs" is the user's: the record has ours
        rates = {name: value for name, value in rates.items() if name not in own}
        self.logs.update(own | rates | self.history.validation_logs(self.epoch))
        self._move(RunStatus.EPOCH_END)
        self.callbacks.on_epoch_end()
        measured = self.history.validation_logs(self.epoch)
        logs = {k: v for k, v in self.logs.items() if k not in measured or v is not measured[k]}
        self.history.end_epoch(self.epoch, logs)
        self.epoch, self.step = self.epoch + 1, 0
        self._agree()
        self.callbacks.on_boundary()
        self.handle_signals()

    def _spent(self) -> Spent:
        return Spent(self.reader.waited_secs, self.callbacks.secs, self.non_finite.skipped)

    def validated(self, name: str, results: dict[str, Any]) -> None:
        """Records the results of a validation on the set `name`, after the last step that ran."""
        self.history.add_validation(self.epoch, self.step - 1, name, results)
        self.logs.update({f"{name}_{metric}": value for metric, value in results.items()})
        values = self.callbacks.shared_dict["validation"].setdefault(name, {})
        for metric, value in results.items():
            values.setdefault(metric, []).append(value)

    def handle_signals(self) -> None:
        """Handles a pending signal. Called between steps and while waiting for data."""
        if self.signals.pending is not None:
            self.callbacks.on_boundary()  # a checkpoint saves first
            self.signals.check()

    def _agree(self) -> None:
        """Lets all processes act on a signal, or a wish to stop, that one of them has."""
        if self.placement.count > 1:
            arrived, stop = self.placement.largest(
                [self.signals.arrived or 0, self.trainer.early_stop]
            )
            self.signals.pending = int(arrived) or None
            self._agreed_to_stop = bool(stop)

    @property
    def steps_per_execution(self) -> int | None:
        """The steps per call of the backend that the user asked for; None if it is tuned."""
        return self.config.steps_per_execution

    @property
    def metrics(self) -> list[IMetric]:
        """The metrics that the step feeds."""
        return self.executor.fed_metrics

    def _move(self, status: RunStatus) -> None:
        if status not in TRANSITIONS[self.status]:
            raise RuntimeError(f"A run can't go from {self.status.name} to {status.name}.")
        self.status = status

    # ------------------------------------------------------------------ for checkpoints

    def variables(self) -> list[keras.Variable]:
        """Returns all variables of the run, in an order that is the same in each process."""
        return self.executor.state_variables()

    def get_state(self) -> dict[str, Any]:
        """Returns the run as it stands between two steps: nested dicts, JSON values, arrays."""
        return {
            "progress": {
                "epoch": self.epoch,
                "step": self.step,
                "steps": self.steps,
                "epochs": self.epochs,
                "early_stop": self.stopping,
                "stop_reason": self.stop_reason,
                "batch_sizes": np.array(self.batch_sizes, np.int64),
            },
            "settings": self.settings.get_state(),
            "variables": variables_state(self.variables()),
            "random": random_state(),
            "data": data_state(self.reader, self.epoch, self.step, self.executor.example),
            "history": self.history.get_state(),
            "shared": storable(self.callbacks.shared_dict),
            "callbacks": callbacks_state(self.callbacks.callbacks),
            "non_finite": self.non_finite.get_state(self.guarded),
            "tuning": self.executor.get_state(),
        }

    @staticmethod
    def check_state(facts: dict[str, Any], state: object) -> None:
        """Checks a state from a file; see `check_state`."""
        check_state(facts, state)

    def set_state(self, state: dict[str, Any], same_backend: bool = True) -> None:
        """Continues from what `get_state` returned, in a new process too.

        Args:
            state: The state.
            same_backend: Whether it was saved on the present backend; if not, the backend's own
                generators and the tuning start fresh.

        Raises:
            ValueError: If it is the state of another run; the message says what differs.
        """
        accept = self.config.resume_changes == "accept"
        for callback in self.callbacks.callbacks:
            callback.on_resume(state["progress"]["epoch"], state["progress"]["step"])
        self.settings.check(state["settings"], accept)
        progress = state["progress"]
        self.epoch, self.step = progress["epoch"], progress["step"]
        self.steps = self.steps or progress["steps"]
        self.executor.set_state(state["tuning"] if same_backend else {})
        if not same_backend:
            use_own_generators(state)
        random = self.reader.set_state(
            state["data"], self.epoch, self.step, state["random"], self._stop_if_asked
        )
        assert self.reader.current is not None  # it has opened the epoch
        self._set_up(self.reader.current.example)
        # Nothing reads the data from here on, and what building draws is undone below.
        saved, variables = state["variables"], self.variables()
        self.settings.check_built(state["settings"], accept)
        if self.settings.learning_rate_changed:
            saved, variables = without_learning_rates(saved, variables)
        check_variables(saved, variables, same_backend)
        restore_variables(saved, variables)
        self.executor.progress.forget()
        self.batch_sizes = array("i", progress["batch_sizes"].tolist())
        self.history.set_state(state["history"])
        self.callbacks.shared_dict |= state["shared"]
        self.logs = self.history.validation_logs(self.epoch)
        self.callbacks.shared_dict["epoch_logs"] = self.logs
        restore_callbacks(self.callbacks.callbacks, state["callbacks"])
        self.non_finite.set_state(state["non_finite"], self.guarded)
        self._restore_early_stop(progress)
        set_random_state(random)
        self._move(RunStatus.RESTORED)

    def _set_up(self, example: tuple[Any, ...]) -> None:
        """Does what happened before the first step: callbacks set themselves up, models are built.

        What they change is overwritten afterwards.
        """
        self.executor.example = example
        if not self.step:
            return
        if self.epoch:  # only the first epoch began with unbuilt models
            self.executor.prepare(example)
        self.callbacks.on_epoch_begin()

    def _restore_early_stop(self, progress: dict[str, Any]) -> None:
        reason, ended = progress["stop_reason"], progress["early_stop"]
        skipping = reason.startswith(STOPPED) and self.non_finite.policy != "stop"
        goes_on = skipping or reason == TIME_IS_UP
        ended = ended and not goes_on and stays_ended(self.logger, progress, self.epochs)
        self.trainer.early_stop = self._agreed_to_stop = ended
        self.stop_reason = reason if ended else ""

    def _stop_if_asked(self) -> None:
        """Ends the run on a signal before it continues: a save would be of half a run."""
        if self.signals.pending is not None:
            warn_of_unsaved(self.logger, signal.Signals(self.signals.pending).name)
            self.signals.check()
