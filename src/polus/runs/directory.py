"""The folder of a run, with all that it leaves behind."""

import contextlib
import importlib.util
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from polus.callbacks.base import Callback, Coordinator, Phase
from polus.callbacks.monitor import Mode, Monitor, improving_direction
from polus.checkpoint import Checkpoint
from polus.files import atomic_write, check_directory, make_folder
from polus.history import Validation
from polus.host import DeviceValues
from polus.metrics import IConfusionMatrix
from polus.models import models_of
from polus.optimizers import rates_of
from polus.runs.facts import describe_run, describe_start
from polus.runs.history_file import NAME, HistoryFile

SECS_BETWEEN_WRITES = 1.0
SECS_BETWEEN_SAVES = 60.0
CHECKPOINTS = "checkpoints"


class RunDirectory(Callback):
    """Writes a run's record, its parts and its best model into a folder.

    `train(..., run_dir="runs/a")` adds it, with a `Checkpoint` in `runs/a/checkpoints`:

    - `history.jsonl`: each step's loss and terms, each validation, each epoch's logs and how it
      went. Written at least every second, and whole after a crash: see `polus.runs.read_history`.
    - `run.json`: the serialized models, optimizers and loss, the callbacks and the batches' shapes;
      how the run ended; and for each process that began or continued it the command line, the git
      commit and whether its tree was clean, versions, devices and checksums of the generators.
    - `log.txt`: Polus' messages.
    - `report.html`: all of it as a page, at the end, if Bokeh is installed: see `polus.report`.
    - `best.keras`: the model with the best loss of a validation set, or its best first metric;
      `best_<name>.keras` of each of several.

    Of several processes, the first one writes.

    Args:
        directory: The folder.
        monitor: The name in the logs of what makes a model the best one. By default the loss of a
            validation set, or its first metric.
        mode: `"min"`, `"max"` or `"auto"`; see `polus.callbacks.monitor.Monitor`.
        report: Whether `report.html` is written.
        clock: Returns the time in seconds.
    """

    phase = Phase.SAVE  # when the others have added their values

    def __init__(
        self,
        directory: str | os.PathLike[str],
        monitor: str | None = None,
        mode: Mode = "auto",
        report: bool = True,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.directory = check_directory(directory, "run_dir")
        self.monitor = monitor
        self.mode = mode
        self.report = report
        self.clock = clock
        self.best: dict[str, float | None] = {}
        self._file: HistoryFile | None = None

    def add_coordinator(self, coordinator: Coordinator) -> None:
        """Looks whether the folder can be written to, before anything is computed.

        Raises:
            OSError: If it can't.
        """
        super().add_coordinator(coordinator)
        if not coordinator.run.placement.is_first:
            return
        try:
            make_folder(self.directory)
            tempfile.TemporaryFile(dir=self.directory).close()
        except OSError as error:
            raise OSError(
                f"run_dir={str(self.directory)!r} can't be written to: {error}. Pass another "
                "folder."
            ) from error

    def on_train_begin(self) -> None:
        """Begins to log into the folder."""
        self._unwritten: list[tuple[int, int, Mapping[str, DeviceValues], list[int]]] = []
        self._confusions: list[Any] = []  # of the validations that are not written yet
        self._began = self._written = self.clock()
        self._validations = len(self.coordinator.run.history.validations)
        self._has_written_facts = False
        self._heard = (0, 0)
        self._first = self.coordinator.run.placement.is_first
        self._handler = logging.NullHandler() if not self._first else self._log_file()
        logging.getLogger("polus").addHandler(self._handler)
        self._start = describe_start(self.coordinator.run) if self._first else {}

    def _log_file(self) -> logging.Handler:
        make_folder(self.directory)
        handler = logging.FileHandler(self.directory / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        return handler

    def on_steps_end(self, epoch: int, steps: range, losses: Sequence[float] | None) -> None:
        """Writes the steps of the last second, if it is over."""
        if not self._first:
            return
        file = self._file or self._open(epoch, steps.start)
        self._add(epoch, steps)
        self._heard = epoch, steps.stop
        if self.clock() - self._written >= SECS_BETWEEN_WRITES:
            self._flush()
            rates = rates_of(self.coordinator.trainer, always=True)
            file.add_moment(epoch, steps[-1], self._written - self._began, rates)

    def _add(self, epoch: int, steps: range) -> None:
        run = self.coordinator.run
        sizes = run.batch_sizes[steps.start : steps.stop]
        skipped = [step for step in steps if not run.batch_sizes[step]] if 0 in sizes else []
        self._unwritten.append((epoch, steps.start, run.step_logs, skipped))

    def on_validation_begin(self) -> None:
        """Forgets the confusion matrices of training."""
        for metric in self._confusion_metrics():
            metric.evaluated = None

    def on_validation_end(self, results: dict[str, Any]) -> None:
        """Keeps the confusion matrix of the first metric that has one."""
        if not self._first:
            return
        found = [metric.evaluated for metric in self._confusion_metrics()]
        self._confusions.append(next((matrix for matrix in found if matrix is not None), None))

    def _confusion_metrics(self) -> list[IConfusionMatrix]:
        trainer = self.coordinator.trainer
        some = trainer.validation_metrics
        metrics = trainer.metrics if some is None else some
        return [metric for metric in metrics if isinstance(metric, IConfusionMatrix)]

    def _open(self, epoch: int, step: int) -> HistoryFile:
        self._file = HistoryFile(self.directory / NAME, epoch, step)
        # What a checkpoint knew stands there already.
        places = [(v.epoch, v.step) for v in self.coordinator.run.history.validations]
        self._validations = sum(place < (epoch, step) for place in places)
        self._write_facts({"status": "running"})
        return self._file

    def on_epoch_end(self, epoch: int) -> None:
        """Writes the epoch, and the model if it is the best one."""
        if self._file is None:
            return
        run = self.coordinator.run
        self._flush()
        record = run.history.record[-1] if run.history.record else {}
        self._file.end_epoch(epoch, run.logs, record, self.clock() - self._began)
        self._save_best()

    def on_train_end(self) -> None:
        """Writes what is left, and how the run ended."""
        logging.getLogger("polus").removeHandler(self._handler)
        self._handler.close()
        run = self.coordinator.run
        newest = next(iter(run.step_logs.values()), ())
        if self._first and run.step and self._heard != (run.epoch, run.step) and len(newest):
            # Another callback has ended the run before this one heard of these steps.
            first_step = run.step - len(newest)
            if self._file is None:
                self._open(run.epoch, first_step)
            self._add(run.epoch, range(first_step, run.step))
        if self._file is None:
            return
        self._flush()
        self._file.close()
        self._file = None
        ended = "stopped" if run.stopping else "completed"
        facts: dict[str, Any] = {"status": ended, "epochs_done": run.epoch}
        if run.exception is not None:
            kind = "interrupted" if run.signals.pending is not None else "failed"
            facts |= {"status": kind, "exception": repr(run.exception)}
        self._write_facts(facts)
        if self.report:
            self._write_report()

    def _write_report(self) -> None:
        """Writes `report.html`; a run does not fail because its picture does."""
        if importlib.util.find_spec("bokeh") is None:
            self.logger.info("No report.html: it requires Bokeh. Install it: pip install bokeh")
            return
        from polus.report import write_report  # which reads what is written here

        try:
            write_report(self.directory)
        except Exception as error:
            self.logger.warning("report.html can't be written: %r", error)

    def _flush(self) -> None:
        """Writes the steps and validations that are not in the file yet."""
        assert self._file is not None
        run = self.coordinator.run
        for epoch, first_step, terms, skipped in self._unwritten:
            self._file.add_steps(epoch, first_step, terms, skipped)
        new: list[Validation] = run.history.validations[self._validations :]
        for validation, confusion in zip_longest(new, self._confusions[: len(new)]):
            self._file.add_validation(validation, confusion)
        self._validations += len(new)
        self._unwritten, self._confusions = [], self._confusions[len(new) :]
        self._written = self.clock()

    def _write_facts(self, status: dict[str, Any]) -> None:
        path = self.directory / "run.json"
        earlier: list[Any] = []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            earlier = list(json.loads(path.read_text())["starts"])
        if self._has_written_facts:
            earlier = earlier[:-1]  # without that of this process
        self._has_written_facts = True
        starts = [*earlier, self._start]
        facts = {
            **status,
            **describe_run(self.coordinator.run, self.coordinator.callbacks),
            "starts": starts,
        }
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(facts, indent=2))

    # ------------------------------------------------------------------ the best model

    def _save_best(self) -> None:
        name = self.monitor or self._monitored()
        if name is None:
            return
        monitor = Monitor(name, self.mode)
        monitor.best = self.best.get(name)
        value = monitor.value(self.coordinator)
        if value is None or not monitor.improved(value):
            return
        self.best = {name: value}
        models = models_of(self.coordinator.trainer.model)
        for part, model in models.items():
            stem = "best" if len(models) == 1 else f"best_{part}"
            try:
                with atomic_write(self.directory / f"{stem}.keras") as temporary:
                    model.save(temporary)
            except (NotImplementedError, TypeError, ValueError) as error:
                self.logger.warning("%s can't be saved whole, but its weights: %s", part, error)
                with atomic_write(self.directory / f"{stem}.weights.h5") as temporary:
                    model.save_weights(temporary)

    def _monitored(self) -> str | None:
        """Returns the name in the logs of what is monitored; None if no validation tells."""
        logs = self.coordinator.logs
        for name, metrics in self.coordinator.shared_dict["validation"].items():
            for metric in ("loss", *metrics):
                full = f"{name}_{metric}"
                if full in logs and (self.mode != "auto" or self._improves(full)):
                    return full
        return None

    def _improves(self, name: str) -> bool:
        return improving_direction(name, self.coordinator) is not None

    def get_state(self) -> dict[str, Any]:
        return {"best": self.best}

    def set_state(self, state: dict[str, Any]) -> None:
        self.best = dict(state["best"])


def with_run_dir(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `train` with what `run_dir` stands for.

    Raises:
        ValueError: If checkpoints or a record are asked for elsewhere as well.
    """
    directory = check_directory(arguments["run_dir"], "run_dir")
    callbacks = list(arguments.get("callbacks", ()))
    saving = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
    folder = directory / CHECKPOINTS
    elsewhere = [c.store.directory for c in saving if c.store.directory != folder]
    if arguments.get("resume") is not None or elsewhere:
        raise ValueError(
            f"A run with run_dir={str(directory)!r} keeps its checkpoints in {folder}, and "
            "continues from there. Leave out resume, and the Checkpoint or its other folder: "
            f"Checkpoint({str(folder)!r}, every_steps=...) sets its rhythm."
        )
    for callback in callbacks:
        if isinstance(callback, RunDirectory) and callback.directory != directory:
            raise ValueError(
                f"This run has run_dir={str(directory)!r} and a RunDirectory of another folder, "
                f"{str(callback.directory)!r}. Leave one of them out."
            )
    if not saving:
        saves = Checkpoint(folder, every_secs=SECS_BETWEEN_SAVES, every_epochs=None)
        callbacks.append(saves)
    if not any(isinstance(callback, RunDirectory) for callback in callbacks):
        callbacks.append(RunDirectory(directory))
    return {**arguments, "callbacks": callbacks, "resume": folder}
