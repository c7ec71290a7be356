"""The callback that saves a run, and ends it in order if a signal asks for that."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import filelock
import keras
import numpy as np

from polus.backends.placement import Placement
from polus.callbacks.base import Callback, Coordinator
from polus.checkpoint.shards import ShardFolder, new_token, temporary_name
from polus.checkpoint.store import CheckpointError, Store, number_of
from polus.environment import describe_environment
from polus.host import counted
from polus.sharded import Array
from polus.state_tree import FlatState, flatten_state
from polus.training_state import allocate_buffers, only_sharded, sharded_variables

logger = logging.getLogger("polus.checkpoint")

# What schedulers send before they kill (SIGUSR1: Slurm's --signal). Not every system has each.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Checkpoint(Callback):
    """Saves the whole run regularly, for `train(..., resume=directory)` to continue from.

    ```python
    trainer.train(
        data, epochs=10, callbacks=[Checkpoint("runs/a", every_secs=600)], resume="runs/a"
    )
    ```

    The loop waits only until the state is copied; a thread writes it. On SIGTERM, SIGUSR1 and
    Ctrl-C the run saves at the next step boundary, calls each callback's `on_train_end`, and exits
    with 128 + the signal's number. If a save fails (a full disk), an error is logged and the next
    save is tried when it is due.

    Several processes that train one model all get this callback, and a folder that all of them see.
    The first one writes; a signal to any of them ends all, after the save. From
    `polus.training_state.SHARD_BYTES` of weights that are split over processes, each process writes
    its own.

    Args:
        directory: The folder of this run's checkpoints. One run at a time writes there.
        every_steps: Saves after each n-th step of an epoch.
        every_secs: Saves at the first opportunity after so many seconds since the last save.
        every_epochs: Saves after each n-th epoch; None for only at the end of the run.
        keep: The number of checkpoints to keep. Older ones are the reserve for a damaged one.
        clock: Returns the time in seconds.

    Raises:
        CheckpointError: At the start if another run writes to the folder; at the end if not a
            single checkpoint could be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every_steps: int | None = None,
        every_secs: float | None = None,
        every_epochs: int | None = 1,
        keep: int = 3,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        _check_rhythm(every_steps, every_secs, every_epochs, keep)
        self.store = Store(directory)
        self.every_steps = every_steps
        self.every_secs = every_secs
        self.every_epochs = every_epochs
        self.keep = keep
        self.clock = clock
        self._lock: filelock.BaseFileLock | None = None
        self._locked: tuple[int, int] | None = None  # the file that is locked
        self._unread: Any = None  # a term of the newest steps

    def add_coordinator(self, coordinator: Coordinator) -> None:
        """Lets the data remember where an epoch began."""
        super().add_coordinator(coordinator)
        coordinator.run.reader.tracked = True

    def on_train_begin(self) -> None:
        """Locks the folder and listens to signals."""
        run = self.coordinator.run
        self._allocated = False
        self._ended = threading.Event()
        self._writing: Future[dict[str, Array]] | None = None
        self._newest: os.PathLike[str] | None = None
        self._failure: Exception | None = None
        self._last_time = self.clock()
        self._position: tuple[int, int] | None = None
        self._environment = describe_environment(run.trainer.model, run.steps_per_execution)
        self._first_process_takes_folder(run.placement)
        for number in SIGNALS:
            run.signals.listen(number)

    def _first_process_takes_folder(self, placement: Placement) -> None:
        """Locks the folder in the process that writes there.

        Raises:
            CheckpointError: In all processes, if another run writes to the folder.
        """
        refused = None
        if placement.is_first:
            try:
                self._acquire_lock()
                if not self.coordinator.run.resuming:
                    self._warn_of_earlier_run()
            except OSError as error:
                self._failed(error)
            except CheckpointError as error:
                refused = error
        if placement.agreed([refused is not None])[0]:
            raise refused or CheckpointError(
                f"The first process can't write to {self.store.directory}; its message says why."
            )

    def on_steps_end(self, epoch: int, steps: range, losses: object) -> None:
        """Waits for the steps before these, since a device may be dozens of steps behind the loop.

        A signal would have to wait for all of them: seconds, if a step is long.
        """
        newest = next(iter(self.coordinator.run.step_logs.values()), None)
        before, self._unread = self._unread, newest
        if before is not None:
            np.asarray(before)

    def on_boundary(self) -> None:
        """Saves if a save is due, and ends the run if a signal arrived."""
        self._allocate()
        if self._is_due():
            self.save()
        number = self.coordinator.run.signals.pending  # also one that arrived during that save
        if number is None:
            return
        self.save()  # a no-op if that save was it
        self._finish()
        placement = self.coordinator.run.placement
        placement.agreed([0])  # a launcher kills the first process as soon as another one has ended
        if self._failure is None and placement.is_first:
            logger.warning(
                "%s: the run is saved in %s after %s and %s. To continue it, start "
                "the same program again: with its run_dir, or with resume=%r.",
                signal.Signals(number).name,
                self._newest,
                counted(self.coordinator.run.epoch, "epoch"),
                counted(self.coordinator.run.step, "step"),
                str(self.store.directory),
            )
        raise SystemExit(128 + number)

    def on_train_end(self) -> None:
        """Waits for the writing thread, unless a second signal arrived, and unlocks the folder.

        Raises:
            CheckpointError: If the training succeeded, but not a single checkpoint was written.
        """
        exception = self.coordinator.run.exception
        if exception is not None and not isinstance(exception, SystemExit):
            self._ended.set()
        try:
            if not self.coordinator.run.signals.second:
                self._finish()
        finally:
            self._release_lock()
        if self._newest is None and self._failure and self.coordinator.run.exception is None:
            raise CheckpointError(
                f"Not one checkpoint could be written to {self.store.directory}: "
                f"{self._failure!r}. The training itself is complete and the model is trained: "
                "save it now, elsewhere."
            ) from self._failure

    def save(self) -> None:
        """Saves the run as it is now. Returns when the state is copied; a thread writes it.

        Call it in `on_boundary`: in other events, some callbacks have not heard of the newest steps
        yet.
        """
        run = self.coordinator.run
        self._allocate()
        buffers = self._finish()  # one save at a time, or the copies pile up
        self._last_time = self.clock()
        failed = self._failure is not None and run.placement.count == 1
        if self._position == (run.epoch, run.step) and not failed:
            return
        state = run.get_state()  # smaller sharded values come together in the first process
        shards = only_sharded(state)
        if shards is not None and (shared := self._shared_folder(run.placement)) is None:
            self._position = run.epoch, run.step
            return
        if not run.placement.is_first:
            self._position = run.epoch, run.step
            if shards is not None:
                flat = flatten_state(shards, buffers)
                self._in_background(self._write_shards, flat, shared)
            return
        try:
            flat = flatten_state(state, buffers)
        except TypeError as error:
            callbacks = self.coordinator.callbacks
            names = (f"callbacks/{i} is {type(c).__name__}" for i, c in enumerate(callbacks))
            error.add_note(", ".join(names))
            raise
        facts = {
            "run": run.id,
            "epoch": run.epoch,
            "step": run.step,
            "epochs": run.epochs,
            "backend": keras.config.backend(),
            "saved": time.strftime("%Y-%m-%d %H:%M:%S"),
            "environment": self._environment,
        }
        self._position = run.epoch, run.step
        self._in_background(self._write, flat, facts, shared if shards is not None else None)

    def _shared_folder(self, placement: Placement) -> ShardFolder | None:
        """Makes the folder into which all processes write their shards; None if that fails."""
        number, token, failure = 0, new_token(), None
        if placement.is_first:
            try:
                self._acquire_lock()
                path = self.store.new_path()
                temporary_name(path, token).mkdir()
                number = number_of(path)
            except (OSError, CheckpointError) as error:
                failure = error
        number, token = map(int, placement.agreed([number, token]))
        path = self.store.path_of(number)
        temporary = temporary_name(path, token)
        if placement.largest([not number or not temporary.is_dir()])[0]:
            self._failed(
                failure
                or CheckpointError(
                    f"the processes of this run don't see the same folder {self.store.directory}"
                )
            )
            return None
        return ShardFolder(path, temporary, placement.index, placement.count, self._ended)

    def _allocate(self) -> None:
        """Lets a thread fetch the memory for the copies, once the variables are known."""
        if not self._allocated and self.coordinator.run.placement.is_first:
            self._allocated = True
            variables = self.coordinator.run.variables()
            sharded = set(sharded_variables(variables))  # asked here: a step replaces the values
            self._in_background(allocate_buffers, variables, "variables", sharded)

    def _is_due(self) -> bool:
        run = self.coordinator.run
        if run.step:
            # A run that is stopping reaches the end of its epoch at once, and is saved there.
            steps = self.every_steps is not None and run.step % self.every_steps == 0
            return (steps or self._time_is_up()) and not run.stopping
        if run.epoch == 0:
            return False
        epochs = self.every_epochs is not None and run.epoch % self.every_epochs == 0
        ended = run.epoch >= run.epochs or run.stopping
        return epochs or ended or self._time_is_up()

    def _time_is_up(self) -> bool:
        if self.every_secs is None:
            return False
        up = self.clock() - self._last_time >= self.every_secs
        return bool(self.coordinator.run.placement.agreed([up])[0])

    def _write(
        self, flat: FlatState, facts: dict[str, Any], shared: ShardFolder | None
    ) -> dict[str, Array]:
        try:
            self._acquire_lock()
            self._newest = self.store.write(flat, facts, self.keep, shared)
            self._failure = None
        except (OSError, CheckpointError) as error:
            self._failed(error)
        return flat.arrays | (flat.shards or {})

    def _write_shards(self, flat: FlatState, shared: ShardFolder) -> dict[str, Array]:
        """Writes what this process has; the first one makes the checkpoint of it."""
        shards = flat.shards or {}
        try:
            shared.write(shards)
            shared.wait_for_first()
            self._newest, self._failure = shared.path, None
        except (OSError, CheckpointError) as error:
            self._failed(error)
        return shards

    def _acquire_lock(self) -> None:
        if self._lock is not None:
            if self._locked == _identity(self._lock.lock_file):
                return
            self._lock.release()  # the folder was removed since: that lock keeps nobody out
            self._lock = None
        self._lock = self.store.lock()
        self._locked = _identity(self._lock.lock_file)

    def _release_lock(self) -> None:
        """Releases the lock as soon as nothing is being written."""
        lock, writing = self._lock, self._writing
        self._lock = self._writing = None
        if lock is not None and writing is not None:
            writing.add_done_callback(lambda _: lock.release())
        elif lock is not None:
            lock.release()

    def _warn_of_earlier_run(self) -> None:
        if old := self.store.paths():
            logger.warning(
                "%s has checkpoints of an earlier run (the newest is %s), and this run starts from "
                "the beginning. They stay until you remove them. To continue the earlier run "
                "instead: train(..., resume=%r).",
                self.store.directory,
                old[-1].name,
                str(self.store.directory),
            )

    def _in_background(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function in a daemon thread, which does not delay the exit of the process."""
        # Assigned before the thread starts: a second Ctrl-C may arrive between two lines.
        writing = self._writing = Future()

        def work() -> None:
            try:
                writing.set_result(function(*arguments))
            except BaseException as exception:  # raised again where the result is asked for
                writing.set_exception(exception)

        threading.Thread(target=work, name="polus-checkpoint", daemon=True).start()

    def _finish(self) -> dict[str, Array]:
        """Waits for the writing thread. Returns its buffers, for the next copy."""
        return {} if self._writing is None else self._writing.result()

    def _failed(self, error: Exception) -> None:
        self._failure = error
        written = []
        with contextlib.suppress(OSError):
            written = self.store.paths()
        logger.error(
            "NO CHECKPOINT WAS WRITTEN to %s: %s. Training goes on, and the next checkpoint is "
            "tried when it is due. %s",
            self.store.directory,
            error,
            f"The newest one is {written[-1]}." if written else "There is none yet.",
        )


def _check_rhythm(every_steps: Any, every_secs: Any, every_epochs: Any, keep: Any) -> None:
    optional = {"every_steps": every_steps, "every_epochs": every_epochs}
    for name, value in {**optional, "keep": keep}.items():
        if value is None and name in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    if every_secs is None:
        return
    number = isinstance(every_secs, int | float) and not isinstance(every_secs, bool)
    if not number or not 0 <= every_secs < float("inf"):
        raise ValueError(f"every_secs must be a number of seconds, got {every_secs!r}.")


def _identity(path: str) -> tuple[int, int] | None:
    """Returns the device and inode of a file, which tell it from another of its name, or None."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
