"""The callback that saves a run, and ends it in order when a signal asks for that."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable as Function
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import filelock
import keras
import numpy as np

from polus.callbacks.base import Callback, Coordinator
from polus.checkpoint.run import Variables, allocate_buffers, environment, run_state
from polus.checkpoint.store import CheckpointError, Snapshot, Store, flatten_state

logger = logging.getLogger("polus.checkpoint")

# What schedulers send before they kill (SIGUSR1: Slurm's --signal); not every system has each.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Checkpoint(Callback):
    """Saves the whole run from time to time, for `train(..., resume=directory)` to go on from.

    ```python
    trainer.train(
        data, epochs=10, callbacks=[Checkpoint("runs/a", every_secs=600)], resume="runs/a"
    )
    ```

    The loop waits for a copy of the state; a thread writes it. On SIGTERM, SIGUSR1 and Ctrl-C the
    run saves at the next step boundary, ends in order, and exits with 128 + the signal's number. A
    save that fails (a full disk) is reported and tried again when the next one is due.

    Args:
        directory: the folder of this run's checkpoints; one run at a time writes there.
        every_steps: saves after each n-th step of an epoch.
        every_secs: saves at the first opportunity after so many seconds since the last save.
        every_epochs: saves after each n-th epoch; None for only at the end of the run.
        keep: how many checkpoints to keep; the others are the reserve for a damaged one.
        clock: tells the time in seconds.

    Raises:
        CheckpointError: at the start if another run writes to the folder; at the end if not one
            checkpoint could be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every_steps: int | None = None,
        every_secs: float | None = None,
        every_epochs: int | None = 1,
        keep: int = 3,
        *,
        clock: Function[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        numbers = {"every_steps": every_steps, "every_epochs": every_epochs, "keep": keep}
        for name, value in numbers.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is a positive integer, and got {value!r}.")
        if every_secs is not None and (not isinstance(every_secs, int | float) or every_secs < 0):
            raise ValueError(f"every_secs is a number of seconds, and got {every_secs!r}.")
        self.store = Store(Path(directory))
        self.every_steps = every_steps
        self.every_secs = every_secs
        self.every_epochs = every_epochs
        self.keep = keep
        self.clock = clock
        self._lock: filelock.BaseFileLock | None = None
        self._locked: tuple[int, int] | None = None  # which file that is
        self._losses: Any = None  # of the newest steps

    def add_coordinator(self, coordinator: Coordinator) -> None:
        """Makes the data remember where an epoch began."""
        super().add_coordinator(coordinator)
        coordinator.reader.tracked = True

    def on_train_begin(self) -> None:
        """Takes the folder, and the signals."""
        self._variables: Variables | None = None
        self._writing: Future[dict[str, np.ndarray]] | None = None
        self._newest: Path | None = None
        self._failure: Exception | None = None
        self._last_time = self.clock()
        self._position: tuple[int, int] | None = None
        self._environment = environment(self.coordinator)
        try:
            self._acquire_lock()
        except OSError as error:
            self._failed(error)
        old = [] if self.coordinator.resuming else self.store.paths()
        self.store.spared = {path.name for path in old}
        if old:
            logger.warning(
                "%s has checkpoints of an earlier run (the newest is %s), and this run starts from "
                "the beginning. They stay until you remove them. To continue that run instead: "
                "train(..., resume=%r).",
                self.store.directory,
                old[-1].name,
                str(self.store.directory),
            )
        for number in SIGNALS:
            self.coordinator.signals.listen(number)

    def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
        """Waits for the steps before these: a device may be dozens of steps behind the loop.

        A signal would have to wait for all of them, for seconds where a step is long.
        """
        before, self._losses = self._losses, losses
        if before is not None:
            np.asarray(before)

    def on_boundary(self) -> None:
        """Saves if it is time, and ends the run if a signal came."""
        self._know_variables()
        if self._is_due():
            self.save()
        number = self.coordinator.signals.pending  # also one that came during that save
        if number is None:
            return
        self.save()  # nothing, if that save was it
        self._finish()
        name, folder = signal.Signals(number).name, self.store.directory
        if self._failure is None:
            logger.warning(
                "%s: the run is saved in %s, %d epochs and %d steps are done. To continue it, "
                "start the same program again with train(..., resume=%r).",
                name,
                self._newest,
                self.coordinator.epoch,
                self.coordinator.step,
                str(folder),
            )
        raise SystemExit(128 + number)

    def on_train_end(self) -> None:
        """Waits for what is being written, unless a second signal came, and gives the folder back.

        Raises:
            CheckpointError: if the run itself went well and not one checkpoint could be written.
        """
        try:
            if not self.coordinator.signals.second:
                self._finish()
        finally:
            self._release_lock()
        if self._newest is None and self._failure and self.coordinator.exception is None:
            raise CheckpointError(
                f"Not one checkpoint could be written to {self.store.directory}: "
                f"{self._failure!r}. The training itself is complete, and the model is as it "
                "should be: save it now, elsewhere."
            ) from self._failure

    def save(self) -> None:
        """Saves the run as it stands. Returns when it is copied; a thread writes it.

        Call it in `on_boundary`: in other events some callbacks haven't heard of the newest steps.
        """
        run, variables = self.coordinator, self._know_variables()
        memory = self._finish()  # one at a time: else the copies pile up
        self._last_time = self.clock()
        if self._position == (run.epoch, run.step) and self._failure is None:
            return
        try:
            snapshot = flatten_state(run_state(run, variables), memory)
        except TypeError as error:
            names = (f"callbacks/{i} is {type(c).__name__}" for i, c in enumerate(run.callbacks))
            error.add_note(", ".join(names))
            raise
        facts = {
            "epoch": run.epoch,
            "step": run.step,
            "epochs": run.epochs,
            "backend": keras.config.backend(),
            "saved": time.strftime("%Y-%m-%d %H:%M:%S"),
            "environment": self._environment,
        }
        self._position = run.epoch, run.step
        self._in_background(self._write, snapshot, facts)

    def _know_variables(self) -> Variables:
        if self._variables is None:
            self._variables = self.coordinator.trainer.state_variables()
            # Memory that is fresh from the system costs many times the copy: a thread fetches it.
            self._in_background(allocate_buffers, self._variables)
        return self._variables

    def _is_due(self) -> bool:
        run = self.coordinator
        if run.step:
            # A run that is stopping comes to the end of its epoch at once, and is saved there.
            steps = self.every_steps is not None and run.step % self.every_steps == 0
            return (steps or self._time_is_up()) and not run.trainer.early_stop
        if run.epoch == 0:
            return False
        epochs = self.every_epochs is not None and run.epoch % self.every_epochs == 0
        ended = run.epoch >= run.epochs or run.trainer.early_stop
        return epochs or ended or self._time_is_up()

    def _time_is_up(self) -> bool:
        return self.every_secs is not None and self.clock() - self._last_time >= self.every_secs

    def _write(self, snapshot: Snapshot, facts: dict[str, Any]) -> dict[str, np.ndarray]:
        try:
            self._acquire_lock()
            self._newest = self.store.write(snapshot, facts, self.keep)
            self._failure = None
        except (OSError, CheckpointError) as error:
            self._failed(error)
        return snapshot.arrays

    def _acquire_lock(self) -> None:
        if self._lock is not None:
            if self._locked == _identity(self._lock.lock_file):
                return
            self._lock.release()  # the folder was removed since: that lock keeps nobody out
            self._lock = None
        self._lock = self.store.lock()
        self._locked = _identity(self._lock.lock_file)

    def _in_background(self, function: Function[..., Any], *arguments: Any) -> None:
        """Calls it in a thread that, unlike a pool's, doesn't hold up the end of the process."""
        # Known before the thread is: a second Ctrl-C may fall between two lines.
        writing = self._writing = Future()

        def work() -> None:
            try:
                writing.set_result(function(*arguments))
            except BaseException as exception:  # raised again where the result is asked for
                writing.set_exception(exception)

        threading.Thread(target=work, name="polus-checkpoint", daemon=True).start()

    def _release_lock(self) -> None:
        """Releases the lock, once nothing is written any more."""
        lock, writing = self._lock, self._writing
        self._lock = self._writing = None
        if lock is not None and writing is not None:
            writing.add_done_callback(lambda _: lock.release())
        elif lock is not None:
            lock.release()

    def _finish(self) -> dict[str, np.ndarray]:
        """Waits for what is being written. Returns the memory of it, for the next copy."""
        return {} if self._writing is None else self._writing.result()

    def _failed(self, error: Exception) -> None:
        self._failure = error
        written = self.store.paths()
        logger.error(
            "NO CHECKPOINT WAS WRITTEN to %s: %s. Training goes on, and it is tried again when the "
            "next one is due. %s",
            self.store.directory,
            error,
            f"The newest one is {written[-1]}." if written else "There is none yet.",
        )


def _identity(path: str) -> tuple[int, int] | None:
    """What tells a file from another one of its name; None where there is none."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino
