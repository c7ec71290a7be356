"""The record of a run as lines of JSON, which a crash leaves readable up to the last of them.

    {"steps": {"epoch": 0, "first_step": 0, "dtype": "float32", "terms": {"loss": [0.9, 0.5]}}}
    {"validation": {"epoch": 0, "step": 1, "name": "val", "results": {"macro_f1": 0.8}}}
    {"epoch": {"epoch": 0, "logs": {"loss": 0.7}, "record": {"secs": 2.1}, "secs": 3.0}}
    {"moment": {"epoch": 0, "step": 1, "secs": 2.5, "rates": {"learning_rate": 0.001}}}
    {"start": {"epoch": 0, "step": 1}}

A process begins with "start": it runs the steps from there on, again if they stand above. "moment"
tells when a step was done, in "secs" of its process, and the learning rates then. "steps" lists
its skipped steps as "skipped", and has a "dtype" where numbers have the nine digits that tell each
float32 from the next. "validation" may have a matrix "confusion", whose rows are the true classes.
JSON has no NaN and no infinity, so these are the texts "nan", "inf" and "-inf".
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from polus.files import make_folder, open_regular
from polus.history import History, Validation
from polus.host import to_host

NAME = "history.jsonl"

Array = np.ndarray[Any, Any]


class HistoryFile:
    """Appends to the record of a run. Each line is handed to the system as it is written.

    Args:
        path: The file. A last line that a crash has cut is removed.
        epoch: The epoch from which this process runs on.
        step: The step of it.
    """

    def __init__(self, path: Path, epoch: int, step: int) -> None:
        make_folder(path.parent)
        _remove_cut_line(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._write("start", {"epoch": epoch, "step": step})

    def add_steps(
        self,
        epoch: int,
        first_step: int,
        terms: Mapping[str, Sequence[float]],
        skipped: Sequence[int] = (),
    ) -> None:
        """Adds consecutive steps, and which of them were skipped; reads terms from the device."""
        columns = {name: to_host(values).reshape(-1) for name, values in terms.items()}
        entry: dict[str, Any] = {"epoch": epoch, "first_step": first_step}
        entry |= {"skipped": list(skipped)} if skipped else {}
        if all(c.dtype == np.float32 and np.isfinite(c).all() for c in columns.values()):
            self._write("steps", entry | {"dtype": "float32"}, f', "terms": {_written(columns)}')
        else:
            lists = {name: _listed(values) for name, values in columns.items()}
            self._write("steps", {**entry, "terms": lists})

    def add_validation(self, validation: Validation, confusion: Any = None) -> None:
        """Adds a validation, with the confusion matrix if there is one."""
        results = {name: _listed(value) for name, value in validation.results.items()}
        entry = {**validation._asdict(), "results": results}
        more = {} if confusion is None else {"confusion": _listed(confusion)}
        self._write("validation", entry | more)

    def add_moment(self, epoch: int, step: int, secs: float, rates: Mapping[str, float]) -> None:
        """Adds when a step was done, in seconds of this process, and the learning rates then."""
        known = {name: _listed(rate) for name, rate in rates.items()}
        self._write("moment", {"epoch": epoch, "step": step, "secs": secs, "rates": known})

    def end_epoch(
        self, epoch: int, logs: Mapping[str, Any], record: Mapping[str, Any], secs: float
    ) -> None:
        """Adds the logs of an epoch, how it went, and when it ended, in seconds of this process."""
        values, how = ({n: _listed(v) for n, v in each.items()} for each in (logs, record))
        entry = {"epoch": epoch, "logs": values, "record": how, "secs": secs}
        self._write("epoch", entry)

    def close(self) -> None:
        """Closes the file, whose content is on the disk then."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _write(self, kind: str, entry: dict[str, Any], more: str = "") -> None:
        line = json.dumps({kind: entry}, allow_nan=False)
        self._file.write(f"{line[:-2]}{more}}}}}\n")
        self._file.flush()


class Moment(NamedTuple):
    """When a step was done.

    Attributes:
        process: The number of the process that ran it, from 0.
        epoch: Its epoch.
        step: Its number in the epoch.
        secs: Seconds since the process began to train.
        rates: The learning rate of each optimizer.
    """

    process: int
    epoch: int
    step: int
    secs: float
    rates: dict[str, float]


class RunRecord(NamedTuple):
    """All that `history.jsonl` tells.

    Attributes:
        history: The record of the steps that count.
        starts: Epoch and step from which each process ran.
        skipped: Epoch and step of each update that was skipped.
        moments: When steps were done.
        epoch_ends: When epochs ended, after their validations: the process, the epoch, its seconds.
        confusions: Name of a validation set -> the confusion matrix of its newest validation, whose
            rows are the true classes.
    """

    history: History
    starts: list[tuple[int, int]]
    skipped: list[tuple[int, int]]
    moments: list[Moment]
    epoch_ends: list[tuple[int, int, float]]
    confusions: dict[str, Array]


def read_history(path: str | os.PathLike[str]) -> History:
    """Returns the record of a run, also of one that goes on or was killed.

    Args:
        path: The run's directory, or its `history.jsonl`.

    Raises:
        OSError: If there is no such file.
        ValueError: If a line is not an entry of a record; the message says which.
    """
    return read_record(path).history


def read_record(path: str | os.PathLike[str]) -> RunRecord:
    """Returns all that is recorded of a run; see `read_history`."""
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    with open_regular(path) as file:
        *lines, _ = file.read().split(b"\n")  # behind the last one is nothing, or half a line
    entries: list[tuple[str, Any]] = []
    starts: list[tuple[int, int]] = []
    for number, line in enumerate(lines, 1):
        try:
            ((kind, entry),) = json.loads(line).items()
            if kind == "start":
                entries = _started(entries, entry)
                starts.append((entry["epoch"], entry["step"]))
            elif kind in ("moment", "epoch"):
                entries.append((kind, {**entry, "process": len(starts) - 1}))
            else:
                entries.append((kind, entry))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: line {number} is not an entry of a record ({error!r})."
            ) from error
    return _record(entries, starts)


def _record(entries: Sequence[tuple[str, Any]], starts: list[tuple[int, int]]) -> RunRecord:
    record = RunRecord(History(), starts, [], [], [], {})
    history = record.history
    for kind, entry in entries:
        if kind == "steps":
            dtype = entry.get("dtype")
            terms = {n: np.asarray(_array(v), dtype) for n, v in entry["terms"].items()}
            history.add_steps(entry["epoch"], entry["first_step"], terms)
            record.skipped.extend((entry["epoch"], step) for step in entry.get("skipped", ()))
        elif kind == "validation":
            results = {name: _array(value) for name, value in entry["results"].items()}
            history.add_validation(entry["epoch"], entry["step"], entry["name"], results)
            if "confusion" in entry:
                record.confusions[entry["name"]] = _array(entry["confusion"])
        elif kind == "moment":
            rates = {name: _array(rate) for name, rate in entry["rates"].items()}
            record.moments.append(Moment(**{**entry, "rates": rates}))
        else:
            logs = {name: _array(value) for name, value in entry["logs"].items()}
            history.end_epoch(entry["epoch"], logs)
            measured = {n: _array(v) for n, v in entry["record"].items() if n != "epoch"}
            history.add_record(entry["epoch"], measured)
            if "secs" in entry:
                record.epoch_ends.append((entry["process"], entry["epoch"], entry["secs"]))
    return record


def _started(entries: list[tuple[str, Any]], start: Mapping[str, int]) -> list[tuple[str, Any]]:
    """Returns the entries of the steps before the place where a process started."""
    place = start["epoch"], start["step"]
    kept: list[tuple[str, Any]] = []
    for kind, entry in entries:
        if kind == "steps":
            first = entry["epoch"], entry["first_step"]
            if first < place:
                count = place[1] - first[1] if first[0] == place[0] else None
                terms = {name: values[:count] for name, values in entry["terms"].items()}
                skipped = [s for s in entry.get("skipped", ()) if (first[0], s) < place]
                kept.append((kind, {**entry, "terms": terms, "skipped": skipped}))
        elif kind in ("validation", "moment"):
            if (entry["epoch"], entry["step"]) < place:
                kept.append((kind, entry))
        elif entry["epoch"] < place[0]:
            kept.append((kind, entry))
    return kept


def _written(columns: Mapping[str, Array]) -> str:
    """Returns finite float32 values as JSON; `json` would take three times as long for them."""
    texts = {n: ", ".join(["%.9g"] * len(c)) % tuple(c.tolist()) for n, c in columns.items()}
    return "{" + ", ".join(f"{json.dumps(name)}: [{text}]" for name, text in texts.items()) + "}"


def _listed(value: Any) -> Any:
    """Returns a number or array as JSON values."""
    array = to_host(value)
    if array.dtype.kind == "V":  # bfloat16 and its kind
        array = array.astype(np.float32)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return _spelled(array.tolist())
    return array.tolist()


def _spelled(value: Any) -> Any:
    if isinstance(value, list):
        return [_spelled(each) for each in value]
    return value if np.isfinite(value) else str(value)


def _array(value: Any) -> Any:
    """Returns what `_listed` was given, as an array of the values or a Python value."""
    if isinstance(value, list):
        return np.asarray(value, float) if _has_text(value) else np.asarray(value)
    return float(value) if value in ("nan", "inf", "-inf") else value


def _has_text(value: Any) -> bool:
    return any(map(_has_text, value)) if isinstance(value, list) else isinstance(value, str)


def _remove_cut_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
