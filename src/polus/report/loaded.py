"""A run as it is read from its directory."""

import itertools
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from polus.figures import Line
from polus.history import History
from polus.runs.history_file import NAME, RunRecord, read_record

Array = np.ndarray[Any, Any]

NORM = "gradient_norm"
# Parts of the time of an epoch: the name of the part, and its key in `History.record`.
PARTS = {"waiting for data": "waited_secs", "compiling": "compile_secs"}
IN_CALLBACKS, BETWEEN, REST = "callbacks", "validation and saving between epochs", "steps"
SHARES = (REST, *PARTS, IN_CALLBACKS, BETWEEN)
STALE_SECS = 300.0
RESTART_SECS = 60.0  # in which a run that was killed may be started again
ENDED = ("completed", "stopped", "failed", "interrupted")
SHOWN = 5  # runs in an error


class LoadedRun:
    """A run that has ended, was killed, or goes on.

    Args:
        directory: Its directory.
        name: What the page calls it.

    Attributes:
        directory: Its directory.
        name: What the page calls it.
        facts: The content of `run.json`; empty if there is none.
        record: The content of `history.jsonl`.
        written: When a step was written last, in seconds since the epoch; None for no step.

    Raises:
        ValueError: If a line of `history.jsonl` is not an entry of a record.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.facts = read_facts(directory)
        path = directory / NAME
        there = path.exists()
        empty = RunRecord(History(), [], [], [], [], {})
        self.record = read_record(path) if there else empty
        self.written = path.stat().st_mtime if there else None

    @property
    def history(self) -> History:
        """The record of its steps, epochs and validations."""
        return self.record.history

    @property
    def status(self) -> str:
        """How the run ended, or "running"."""
        return status_of(self.facts)

    @property
    def silent_secs(self) -> float:
        """How long a run that goes on has written nothing; 0 if it is not long or the run ended."""
        if self.status != "running" or self.written is None:
            return 0.0
        silent = time.time() - self.written
        return silent if silent > STALE_SECS else 0.0

    @property
    def sets(self) -> list[str]:
        """The names of the validation sets."""
        return list(dict.fromkeys(validation.name for validation in self.history.validations))

    def terms(self) -> dict[str, Array]:
        """Returns the loss, the terms and the gradient norms of each step."""
        return {n: v for n, v in self.history.steps.items() if n not in ("epoch", "step")}

    def metrics(self) -> dict[str, Line]:
        """Returns name -> (steps since the start, values) of metrics and validations."""
        measured = {name for row in self.history.record for name in row}
        lines = self.history.metric_lines()
        return {name: line for name, line in lines.items() if name not in measured}

    def epoch_values(self) -> dict[str, list[float]]:
        """Returns the finite values that each term and metric had in the logs of epochs."""
        left_out = {"epoch", *(name for row in self.history.record for name in row)}
        values: dict[str, list[float]] = {}
        for row in self.history.epochs:
            for name, value in row.items():
                number = isinstance(value, int | float) and np.isfinite(value)
                if number and name not in left_out:
                    values.setdefault(name, []).append(value)
        return values

    def rates(self) -> dict[str, Line]:
        """Returns the learning rates: at most one a second, and that at the end of each epoch."""
        points: list[tuple[int, float, dict[str, float]]] = []
        points += [(m.epoch, m.step, m.rates) for m in self.record.moments]
        for row in self.history.record:
            known = {n: v for n, v in row.items() if n.endswith("learning_rate")}
            points.append((row["epoch"], np.inf, known))
        lines: dict[str, Line] = {}
        for epoch, step, rates in sorted(points, key=lambda point: point[:2]):
            for name, rate in rates.items():
                x, y = lines.setdefault(name, ([], []))
                x.append(self.history.position(epoch, step))
                y.append(rate)
        return lines

    def step_times(self) -> dict[str, Line]:
        """Returns the milliseconds of a step: within epochs by the second, and of each epoch."""
        lines: dict[str, Line] = {}
        moments = self.record.moments
        for before, after in itertools.pairwise(moments):
            steps = after.step - before.step
            if before[:2] == after[:2] and steps > 0:
                place = self.history.position(after.epoch, after.step)
                x, y = lines.setdefault("within epochs", ([], []))
                x.append(place)
                y.append(1000 * (after.secs - before.secs) / steps)
        for row in self.history.record:
            if row.get("steps_per_sec"):
                x, y = lines.setdefault("mean of the epoch", ([], []))
                x.append(self.history.position(row["epoch"]))
                y.append(1000 / row["steps_per_sec"])
        return lines

    def shares(self) -> dict[str, list[float]]:
        """Returns where the time of each epoch in `history.record` went: seconds by part."""
        columns: dict[str, list[float]] = {part: [] for part in SHARES}
        between = self._between()
        for row in self.history.record:
            secs = {part: float(row.get(key, 0.0)) for part, key in PARTS.items()}
            secs[IN_CALLBACKS] = float(row.get("callback_secs", 0.0))
            secs[REST] = max(float(row.get("secs", 0.0)) - sum(secs.values()), 0.0)
            secs[BETWEEN] = max(between.get(row["epoch"], 0.0) - float(row.get("secs", 0.0)), 0.0)
            for part in SHARES:
                columns[part].append(secs[part])
        return columns

    def _between(self) -> dict[int, float]:
        """Returns epoch -> the seconds since the end of the one before in the same process."""
        taken: dict[int, float] = {}
        before: dict[int, float] = {}
        for process, epoch, secs in self.record.epoch_ends:
            taken[epoch] = secs - before.get(process, 0.0)
            before[process] = secs
        return taken

    def restarts(self) -> list[int]:
        """Returns the number of steps before each later process began."""
        return [self.history.position(*_before(*start)) for start in self.record.starts[1:]]

    def skips(self) -> list[int]:
        """Returns the positions of the steps whose update was skipped."""
        return [self.history.position(*place) for place in self.record.skipped]

    def total_secs(self) -> float:
        """Returns how long its processes ran, as far as it was written."""
        ends: dict[int, float] = {}
        for process, secs in [
            *((m.process, m.secs) for m in self.record.moments),
            *((process, secs) for process, _, secs in self.record.epoch_ends),
        ]:
            ends[process] = max(secs, ends.get(process, 0.0))
        return sum(ends.values())


def _before(epoch: int, step: int) -> tuple[int, float]:
    """Returns the place of the last step before one; -1 is before the first of an epoch."""
    return (epoch, step - 1) if step else (epoch - 1, np.inf)


def read_facts(directory: Path) -> dict[str, Any]:
    """Returns the content of a run's `run.json`; empty if there is none that can be read."""
    try:
        facts = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(facts, dict):
        return {}
    starts = facts.get("starts")
    facts["starts"] = [s for s in starts if isinstance(s, dict)] if isinstance(starts, list) else []
    return facts


def status_of(facts: dict[str, Any]) -> str:
    """Returns how a run ended, or "running", from the content of its `run.json`.

    "killed" is a run that has not written its end, and whose newest process of this machine is no
    more.
    """
    status = str(facts.get("status", "not begun"))
    process = (facts.get("starts") or [{}])[-1].get("process")
    if status != "running" or os.name != "posix" or not isinstance(process, dict):
        return status
    host, pid = process.get("host"), process.get("pid")
    if host != socket.gethostname() or type(pid) is not int or pid <= 0:
        return status
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return "killed"
    except PermissionError:  # it is another user's
        pass
    return status


def has_ended(directory: Path) -> bool:
    """Returns whether a run has ended, or was killed and not started again within a minute."""
    status = status_of(read_facts(directory))
    if status != "killed":
        return status in ENDED
    files = [path for path in (directory / "run.json", directory / NAME) if path.exists()]
    return time.time() - max(path.stat().st_mtime for path in files) > RESTART_SECS


def load_runs(directories: list[str | os.PathLike[str]]) -> list[LoadedRun]:
    """Reads runs, and names them by their folders as briefly as tells them apart.

    Raises:
        FileNotFoundError: If one of the folders does not exist, or is one of several runs.
    """
    paths = [Path(directory) for directory in directories]
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(
                f"There is no run directory {str(path)!r}. Pass the run_dir of a call of train."
            )
        runs = sorted(str(record.parent) for record in path.glob(f"*/{NAME}"))
        if runs and not (path / NAME).exists():
            raise FileNotFoundError(
                f"{str(path)!r} is no run directory, but holds some. Pass those to look at: "
                f"{', '.join(runs[:SHOWN])}{', ...' * (len(runs) > SHOWN)}"
            )
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return [LoadedRun(path, name) for path, name in zip(paths, names, strict=True)]
