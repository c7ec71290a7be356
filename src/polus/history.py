"""The record of a training run: each step's loss, each epoch's logs, each validation."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from polus.figures import Line, history_figure, html_table
from polus.host import to_host

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]

MAX_UNREAD = 4096  # entries kept on the device; beyond it the older half is read
BLOCK = 2**16  # steps averaged at a time, so that no float64 copy of a whole epoch is made
RESERVED = ("epoch", "step")


class Validation(NamedTuple):
    """A validation: the epoch and step after which it ran, the set's name, and the results."""

    epoch: int
    step: int
    name: str
    results: dict[str, Any]


class History:
    """The record that `train` returns.

    - `steps`: the loss and named terms of each step, as arrays;
    - `epochs`: the logs of each epoch, validations included, as a list of dicts;
    - `validations`: each validation, of which an epoch may have several;
    - `record`: how each epoch of this process went, as a list of dicts: every optimizer's learning
      rate, `skipped_steps`, `secs`, `steps_per_sec`, `examples_per_sec`, and of `secs` those that
      the loop waited for data, `waited_secs`, those that callbacks took between steps,
      `callback_secs`, and `compile_secs`: the trace of the step, its tuning and the first call of
      each program. A checkpoint does not keep it;
    - `to_dict`, `to_frame`, `plot`: the same as columns, as a pandas data frame, as a figure.

    A step takes 4 bytes for each float32 term and 8 for each float64 term, up to half as much again
    for growth, and no more while an epoch is in progress.

    >>> history = History()
    >>> history.add_steps(epoch=0, first_step=0, logs={"loss": [0.9, 0.5]})
    >>> history.add_validation(epoch=0, step=1, name="val", results={"macro_f1": 0.8})
    >>> history.end_epoch(epoch=0, logs={"loss": 0.7})
    >>> history
    History of 1 epoch, 2 steps
    epoch    loss  val_macro_f1
        0     0.7           0.8
    """

    def __init__(self) -> None:
        self.validations: list[Validation] = []
        self.record: list[dict[str, Any]] = []
        self._epoch_logs: dict[int, dict[str, Any]] = {}
        self._table = _StepTable()
        self._unread: list[tuple[int, int, Mapping[str, Any]]] = []

    # Written by the loop and by callbacks.

    def add_steps(self, epoch: int, first_step: int, logs: Mapping[str, Any]) -> None:
        """Adds one or several consecutive steps without waiting for the device.

        Args:
            epoch: The epoch of the steps, from 0.
            first_step: The number of the first step within the epoch, from 0.
            logs: Term to values, of shape `(n,)` for n steps or `()` for one. Tensors and anything
                else that NumPy can read; they are read later. float64 values are kept as float64,
                Python numbers and anything less precise as float32.

        Raises:
            ValueError: If a term has the name of a column, "epoch" or "step".
        """
        for name in RESERVED:
            if name in logs:
                raise ValueError(
                    f"The loss has a term named {name!r}, but this name is reserved for the number "
                    f"of each {name} in the history. Rename the term, for example "
                    f"'{name}_loss'."
                )
        self._unread.append((epoch, first_step, logs))
        if len(self._unread) > MAX_UNREAD:
            self._read(MAX_UNREAD // 2)

    def add_validation(self, epoch: int, step: int, name: str, results: Mapping[str, Any]) -> None:
        """Adds the results of a validation on the set `name` after `step` of `epoch`."""
        results = {metric: _python_value(value) for metric, value in results.items()}
        self.validations.append(Validation(epoch, step, name, results))

    def validation_logs(self, epoch: int) -> dict[str, Any]:
        """Returns the newest result of each validation of an epoch, as `<set>_<metric>`."""
        return {
            f"{validation.name}_{metric}": value
            for validation in self.validations
            if validation.epoch == epoch
            for metric, value in validation.results.items()
        }

    def end_epoch(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Adds the logs of an epoch: its loss, terms and training metrics."""
        self._epoch_logs[epoch] = {name: _python_value(value) for name, value in logs.items()}

    def add_record(self, epoch: int, record: Mapping[str, float]) -> None:
        """Adds how an epoch went: learning rates, speed, waiting time, skipped steps."""
        self.record.append({"epoch": epoch, **record})

    def steps_of(self, epoch: int) -> dict[str, Array]:
        """Returns the terms of the newest epoch as read-only arrays, without copying them."""
        self._read(len(self._unread))
        return self._table.newest(epoch)

    def epoch_means(self, epoch: int, batch_sizes: Sequence[int]) -> dict[str, float]:
        """Returns the mean of each term over the newest epoch, in float64.

        Args:
            epoch: The newest epoch.
            batch_sizes: The number of examples of each of its steps, by which they are weighted.
        """
        return {
            name: _weighted_mean(column, batch_sizes)
            for name, column in self.steps_of(epoch).items()
            if name == "loss" or not np.isnan(column).all()
        }

    # Read by users.

    @property
    def steps(self) -> dict[str, Array]:
        """All steps as columns of equal length.

        `epoch` and `step` (within the epoch) are int64. `loss` and each named term are float32, or
        float64 if the loss is; a term is NaN for steps that did not have it. Reading waits for the
        device.
        """
        self._read(len(self._unread))
        return self._table.columns()

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """A dict per epoch: `epoch`, its logs, and its last validation as `<set>_<metric>`."""
        rows: dict[int, dict[str, Any]] = {
            epoch: {"epoch": epoch, **logs} for epoch, logs in self._epoch_logs.items()
        }
        for epoch, _, name, results in self.validations:
            row = rows.setdefault(epoch, {"epoch": epoch})
            row |= {f"{name}_{metric}": value for metric, value in results.items()}
        return [rows[epoch] for epoch in sorted(rows)]

    def to_dict(self, level: Literal["epoch", "step"] = "epoch") -> dict[str, Any]:
        """Returns columns of equal length, NaN where a row has no value.

        Args:
            level: `"epoch"` for a row per epoch, as lists, or `"step"` for the arrays of `steps`.
        """
        if level == "step":
            return self.steps
        if level != "epoch":
            raise ValueError(f'level must be "epoch" or "step", got {level!r}.')
        rows = self.epochs
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name, float("nan")) for row in rows] for name in names}

    def to_frame(self, level: Literal["epoch", "step"] = "epoch") -> "pd.DataFrame":
        """Returns `to_dict(level)` as a `pandas.DataFrame`.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "History.to_frame requires pandas. Install it with `pip install pandas`, or use "
                "History.to_dict, which returns the same columns."
            ) from error
        return pd.DataFrame(self.to_dict(level))

    def plot(self, path: str | PathLike[str] | None = None) -> "Figure":
        """Plots the loss of each step and, below it, the metrics and the learning rates.

        Thin lines are the losses of single steps, or their range if there are many; thick lines are
        their moving averages. The figure is created without pyplot, so it needs no display and
        leaves pyplot's figures alone.

        Args:
            path: The file to save the figure to, if any. Its suffix sets the format.

        Returns:
            The figure, 800 pixels wide: 300 high for the loss, 200 more for metrics, 100 more for
            learning rates that the history has.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If no step has been recorded.
        """
        self._read(len(self._unread))
        if not self._table.num_rows:
            raise ValueError("There is nothing to plot: no step has been recorded yet.")
        sets = dict.fromkeys(validation.name for validation in self.validations)
        figure = history_figure(
            self._table.terms(), self.metric_lines(), sets, self._table.epoch_ends()
        )
        if path is not None:
            figure.savefig(path)
        return figure

    def __repr__(self) -> str:
        title, columns, omitted = self._shown()
        widths = {name: max(len(name), 6, *map(len, cells)) for name, cells in columns.items()}
        widths |= {"epoch": 5} if "epoch" in widths else {}
        rows = [tuple(columns), *zip(*columns.values(), strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths.values(), strict=True))
            for row in rows
        ]
        if omitted:
            lines.insert(1, "  ...")
        return "\n".join([title, *lines] if columns else [title])

    def _repr_html_(self) -> str:
        """Shows the table in a notebook."""
        return html_table(*self._shown())

    def _shown(self) -> tuple[str, dict[str, list[str]], bool]:
        """Returns a title, the cells of the last epochs by name, and whether some are left out."""
        self._read(len(self._unread))
        num_epochs, num_steps = len(self.epochs), self._table.num_rows
        title = (
            f"History of {num_epochs} epoch{'s' * (num_epochs != 1)}, "
            f"{num_steps} step{'s' * (num_steps != 1)}"
        )
        columns = self.to_dict() if num_epochs else {}
        shown = {name: [_short(v) for v in values[-10:]] for name, values in columns.items()}
        return title, shown, num_epochs > 10

    # Saved in a checkpoint.

    def get_state(self) -> dict[str, Any]:
        """Returns the whole record as arrays and JSON values."""
        self._read(len(self._unread))
        return {
            "steps": self._table.get_state(),
            "epochs": [[epoch, logs] for epoch, logs in self._epoch_logs.items()],
            "validations": [list(validation) for validation in self.validations],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Replaces the record with one returned by `get_state`.

        Raises:
            ValueError: If it does not hold the same number of steps for each term.
        """
        table = _StepTable()
        table.set_state(state["steps"])
        self._unread, self._table = [], table
        self._epoch_logs = {epoch: dict(logs) for epoch, logs in state["epochs"]}
        self.validations = [Validation(*validation) for validation in state["validations"]]

    def _read(self, count: int) -> None:
        """Reads the oldest `count` unread entries from the device."""
        entries, self._unread = self._unread[:count], self._unread[count:]
        for epoch, first_step, logs in entries:
            self._table.append(epoch, first_step, logs)

    def position(self, epoch: int, step: float = float("inf")) -> int:
        """Returns the number of recorded steps up to one of an epoch, or up to the epoch's end."""
        self._read(len(self._unread))
        return self._table.position(epoch, step)

    def epoch_ends(self) -> list[int]:
        """Returns the number of recorded steps up to the end of each epoch but the last."""
        self._read(len(self._unread))
        return self._table.epoch_ends()

    def metric_lines(self) -> dict[str, Line]:
        """Returns name -> (steps since the start, values) of metrics and validations."""
        self._read(len(self._unread))
        table, terms, recorded = self._table, self._table.terms(), self._table.epochs()
        validations = [
            (table.position(epoch, step), f"{name}_{metric}", value)
            for epoch, step, name, results in self.validations
            for metric, value in results.items()
        ]
        # An epoch's logs repeat the last of its validations.
        drawn = terms.keys() | {name for _, name, _ in validations}
        points = [
            (table.position(epoch), name, value)
            for epoch, logs in self._epoch_logs.items()
            for name, value in logs.items()
            if name not in drawn and epoch in recorded
        ]
        lines: dict[str, Line] = {}
        for position, name, value in points + validations:
            if isinstance(value, float | int):
                x, y = lines.setdefault(name, ([], []))
                x.append(position)
                y.append(value)
        return lines


class _StepTable:
    """The values of all steps, in columns that grow.

    Step numbers are kept as ranges of consecutive steps, of which an epoch usually has one.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self._ranges: list[tuple[int, int, int]] = []  # epoch, first step, first row
        self._columns: dict[str, Array] = {}  # with room for more rows than there are

    def append(self, epoch: int, first_step: int, logs: Mapping[str, Any]) -> None:
        values = {name: _as_column(value) for name, value in logs.items()}
        start = self.num_rows
        stop = start + max(len(column) for column, _ in values.values())
        if not self._ranges or (epoch, first_step - start) != self._offset(-1):
            self._ranges.append((epoch, first_step, start))
        for name in self._columns.keys() - values.keys():
            self._column(name, np.float32, stop)[start:stop] = np.nan
        for name, (column, dtype) in values.items():
            self._column(name, dtype, stop)[start:stop] = column
        self.num_rows = stop

    def _offset(self, i: int) -> tuple[int, int]:
        """Returns the epoch of a range, and the difference between its step and row numbers."""
        epoch, first_step, start = self._ranges[i]
        return epoch, first_step - start

    def _column(self, name: str, dtype: npt.DTypeLike, num_rows: int) -> Array:
        """Returns a column with room for `num_rows` rows of at least this precision."""
        column = self._columns.get(name)
        if column is None:
            column = np.full(max(num_rows, 64), np.nan, np.result_type(dtype, np.float32))
        dtype = np.result_type(column.dtype, dtype)
        if len(column) < num_rows or column.dtype != dtype:
            grown = np.empty(max(num_rows + num_rows // 2, 64), dtype)
            grown[: self.num_rows] = column[: self.num_rows]
            column = grown
        self._columns[name] = column
        return column

    def terms(self, first_row: int = 0) -> dict[str, Array]:
        """Returns the columns from a row on, read-only and without copying them."""
        views = {name: c[first_row : self.num_rows] for name, c in self._columns.items()}
        for view in views.values():
            view.flags.writeable = False
        return views

    def newest(self, epoch: int) -> dict[str, Array]:
        """Returns the rows at the end that belong to this epoch."""
        first_row = self.num_rows
        for number, _, start in reversed(self._ranges):
            if number != epoch:
                break
            first_row = start
        return self.terms(first_row)

    def columns(self) -> dict[str, Array]:
        """Returns copies of all columns, with the epoch and the step of each row."""
        epochs = np.empty(self.num_rows, np.int64)
        steps = np.arange(self.num_rows)
        for epoch, first_step, start in self._ranges:  # each overwrites the rest of those before
            epochs[start:] = epoch
            steps[start:] = np.arange(first_step, first_step + self.num_rows - start)
        terms = {name: column.copy() for name, column in self.terms().items()}
        return {"epoch": epochs, "step": steps, **terms}

    def epochs(self) -> set[int]:
        """Returns the epochs of which a step was recorded."""
        return {epoch for epoch, *_ in self._ranges}

    def position(self, epoch: int, step: float = float("inf")) -> int:
        """Returns the number of rows up to a step, or up to the end of an epoch."""
        i = bisect_right(self._ranges, (epoch, step, float("inf"))) - 1
        if i < 0:
            return 0
        number, first_step, start = self._ranges[i]
        stop = self._ranges[i + 1][2] if i + 1 < len(self._ranges) else self.num_rows
        return int(min(stop, start + step - first_step + 1)) if number == epoch else stop

    def epoch_ends(self) -> list[int]:
        """Returns the number of rows up to the end of each epoch but the last."""
        pairs = zip(self._ranges[1:], self._ranges, strict=False)
        return [start for (epoch, _, start), (before, *_) in pairs if epoch != before]

    def get_state(self) -> dict[str, Any]:
        ranges = np.array(self._ranges, np.int64).reshape(-1, 3)
        return {"ranges": ranges, "terms": {n: c.copy() for n, c in self.terms().items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._columns = {name: np.array(column) for name, column in state["terms"].items()}
        self._ranges = [(e, step, start) for e, step, start in np.asarray(state["ranges"]).tolist()]
        self.num_rows = max(map(len, self._columns.values()), default=0)
        edges = [*(start for *_, start in self._ranges), self.num_rows]
        lengths = map(len, self._columns.values())
        if {*lengths, self.num_rows} != {self.num_rows} or edges != sorted({0, *edges}):
            raise ValueError("The steps of the history have columns of different lengths.")


def _as_column(value: Any) -> tuple[Array, npt.DTypeLike]:
    """Returns the values of a term and the precision to keep them in."""
    column = np.atleast_1d(to_host(value))
    # Python numbers are float64 to NumPy, but say nothing about the precision of the loss.
    return column, np.float32 if type(value) in (float, int, list, tuple) else column.dtype


def _weighted_mean(column: Array, weights: Sequence[int]) -> float:
    total = weight = 0.0
    for start in range(0, len(column), BLOCK):
        part = np.asarray(weights[start : start + BLOCK])
        values = np.where(part, column[start : start + BLOCK], 0)  # a skipped step counts nothing
        total += float(np.sum(values.astype(np.float64) * part))
        weight += float(part.sum())
    return total / weight if weight else float("nan")


def _python_value(value: Any) -> Any:
    array = to_host(value)
    return array.item() if array.ndim == 0 else array


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
