"""Writes a run's record for TensorBoard, on any backend and without TensorFlow."""

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from polus.callbacks.base import Callback, Phase
from polus.callbacks.checks import check_callable
from polus.files import check_directory, make_folder
from polus.host import DeviceValues, as_number

SECS_BETWEEN_WRITES = 1.0


class TensorBoardLog(Callback):
    """Writes scalars that TensorBoard shows: each step's loss and terms, and each epoch's logs.

    It needs the package `tensorboard`, which shows them (`tensorboard --logdir runs`), and no
    TensorFlow. `keras.callbacks.TensorBoard`, which needs it, adds histograms and profiles.

    The tags are `steps/loss`, over the number of the step in the run, and `epochs/val_accuracy`,
    over the number of the epoch, both from 0. A run that continues from a checkpoint replaces what
    an earlier process wrote after it. Of several processes, the first one writes.

    Args:
        directory: The folder of this run, such as "runs/a/tensorboard".
        clock: Returns the time in seconds since 1970.

    Raises:
        ImportError: Without tensorboard.
    """

    phase = Phase.REPORT  # when the others have added their values

    def __init__(
        self, directory: str | os.PathLike[str], clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__()
        self.directory = check_directory(directory)
        check_callable("clock", clock)
        self.clock = clock
        self.num_steps = 0
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            message = "TensorBoardLog requires tensorboard. Run `pip install tensorboard`."
            raise ImportError(message) from error

    def on_train_begin(self) -> None:
        self.num_steps = 0
        self._unwritten: list[tuple[int, Mapping[str, DeviceValues]]] = []
        self._written = self.clock()
        self._file: BinaryIO | None = None

    def on_steps_end(self, epoch: int, steps: range, losses: Sequence[float] | None) -> None:
        """Writes the steps of the last second, if it is over."""
        self._unwritten.append((self.num_steps, self.coordinator.run.step_logs))
        self.num_steps += len(steps)
        if self.clock() - self._written >= SECS_BETWEEN_WRITES:
            self._flush()

    def on_epoch_end(self, epoch: int) -> None:
        self._flush()
        logs = {name: as_number(value) for name, value in self.coordinator.logs.items()}
        self._write(epoch, {f"epochs/{n}": v for n, v in logs.items() if v is not None})

    def on_train_end(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _flush(self) -> None:
        """Writes the steps that are not in the file yet."""
        for first, terms in self._unwritten:
            columns = {name: np.asarray(values) for name, values in terms.items()}
            for i in range(min(map(len, columns.values()), default=0)):
                self._write(first + i, {f"steps/{n}": float(v[i]) for n, v in columns.items()})
        self._unwritten = []
        self._written = self.clock()
        if self._file is not None:
            self._file.flush()

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write_event(Event(step=step, summary=Summary(value=values)), step)

    def _write_event(self, event: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        if not self.coordinator.run.placement.is_first:
            return
        events = [event]
        if self._file is None:
            make_folder(self.directory)
            name = f"events.out.tfevents.{self.clock():.6f}.{socket.gethostname()}.{os.getpid()}"
            self._file = (self.directory / name).open("wb")
            # TensorBoard drops what an earlier process wrote from this step on.
            start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
            events = [Event(file_version="brain.Event:2"), start, event]
        for each in events:
            each.wall_time = self.clock()
            RecordWriter(self._file).write(each.SerializeToString())

    def get_state(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def set_state(self, state: dict[str, Any]) -> None:
        self.num_steps = int(state["num_steps"])
