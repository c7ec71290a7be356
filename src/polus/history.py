"""What a training run leaves behind: every step's loss, every epoch's logs, every validation."""

from bisect import bisect_right
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import keras
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Entries of steps that are kept unread on the device at most; then the older half is read.
MAX_UNREAD = 4096


class Validation(NamedTuple):
    """One validation: on which set it was, after which step, and what came out."""

    epoch: int
    step: int
    name: str
    results: dict[str, Any]


class History:
    """What `train` returns.

    - `steps`: every step's loss and named terms, as arrays;
    - `epochs`: every epoch's logs, with what the validations gave, as a list of dicts;
    - `validations`: each validation, of which there may be several in an epoch;
    - `to_dict`, `to_frame`, `plot`: the same as columns, as a pandas data frame, as a picture.

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
        self._epoch_logs: dict[int, dict[str, Any]] = {}
        self._chunks: list[dict[str, np.ndarray]] = []
        self._unread: list[tuple[int, int, Mapping[str, Any]]] = []

    # What the loop and the callbacks write.

    def add_steps(self, epoch: int, first_step: int, logs: Mapping[str, Any]) -> None:
        """Adds one step or several; nothing waits for the device.

        Args:
            epoch: The epoch they belong to, from 0.
            first_step: The first one's number within the epoch, from 0.
            logs: Name to values, of shape `(n,)` for n steps or `()` for one. They may be tensors,
                or anything that NumPy can read, and are read later.
        """
        self._unread.append((epoch, first_step, logs))
        if len(self._unread) > MAX_UNREAD:
            self._read(MAX_UNREAD // 2)

    def add_validation(self, epoch: int, step: int, name: str, results: Mapping[str, Any]) -> None:
        """Adds what a validation on the set `name` gave after `step` of `epoch`."""
        results = {metric: _to_host(value) for metric, value in results.items()}
        self.validations.append(Validation(epoch, step, name, results))

    def end_epoch(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Adds the logs of an epoch: its loss, terms and training metrics."""
        self._epoch_logs[epoch] = {name: _to_host(value) for name, value in logs.items()}

    # What users read.

    @property
    def steps(self) -> dict[str, np.ndarray]:
        """All steps as columns of equal length.

        `epoch` and `step` (within the epoch) are int64, `loss` and each named term float32. A
        term that a step did not have is NaN there. Reading waits for the device.
        """
        self._read(len(self._unread))
        columns = _joined(self._chunks)
        self._chunks = [columns] if len(columns["step"]) else []
        return dict(columns)

    def steps_of(self, epoch: int) -> dict[str, np.ndarray]:
        """The rows of `steps` of the newest epoch, in a time that does not grow with the others."""
        self._read(len(self._unread))
        first = len(self._chunks)
        while first and self._chunks[first - 1]["epoch"][-1] == epoch:
            first -= 1
        columns = _joined(self._chunks[first:])
        if first < len(self._chunks):
            self._chunks[first:] = [columns]
        rows = columns["epoch"] == epoch  # the first of them may begin in an earlier one
        return {name: column[rows] for name, column in columns.items()}

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """One dict per epoch: `epoch`, its logs, and the last validation as `<set>_<metric>`."""
        rows: dict[int, dict[str, Any]] = {
            epoch: {"epoch": epoch, **logs} for epoch, logs in self._epoch_logs.items()
        }
        for epoch, _, name, results in self.validations:
            row = rows.setdefault(epoch, {"epoch": epoch})
            row |= {f"{name}_{metric}": value for metric, value in results.items()}
        return [rows[epoch] for epoch in sorted(rows)]

    def to_dict(self, level: Literal["epoch", "step"] = "epoch") -> dict[str, Any]:
        """Gives columns of equal length; what a row does not have is NaN.

        Args:
            level: `"epoch"` for a row per epoch, as lists, or `"step"` for the arrays of `steps`.
        """
        if level == "step":
            return self.steps
        if level != "epoch":
            raise ValueError(f'level is "epoch" or "step", but got {level!r}.')
        rows = self.epochs
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name, float("nan")) for row in rows] for name in names}

    def to_frame(self, level: Literal["epoch", "step"] = "epoch") -> Any:
        """Gives `to_dict(level)` as a `pandas.DataFrame`; pandas is imported only here."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "History.to_frame needs pandas, which is not installed: pip install pandas. "
                "History.to_dict gives the same columns without it."
            ) from error
        return pd.DataFrame(self.to_dict(level))

    def plot(self, path: str | PathLike[str] | None = None) -> "Figure":
        """Draws the loss of every step, and below it the metrics, with matplotlib.

        The thin line is each step's loss, the thick one its moving average. No display is needed,
        and nothing of pyplot's is touched.

        Args:
            path: Where the picture is written, if given; its ending chooses the format.

        Returns:
            The `matplotlib.figure.Figure`, 800 x 500 or 800 x 300 pixels.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "History.plot needs matplotlib, which is not installed: pip install polus[plot]"
            ) from error
        steps = self.steps
        if not len(steps["step"]):
            raise ValueError("There is nothing to plot: no step was recorded yet.")
        lines = self._metric_lines()
        losses = {name: line for name, line in lines.items() if name.endswith("_loss")}
        metrics = {name: line for name, line in lines.items() if name not in losses}

        figure = Figure(figsize=(8, 5 if metrics else 3), dpi=100, layout="constrained")
        axes = figure.subplots(
            1 + bool(metrics), sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + bool(metrics)]
        )[:, 0]
        _draw_losses(axes[0], steps)
        for name, (x, y) in losses.items():
            axes[0].plot(x, y, "o-", markersize=4, label=name)
        axes[0].set_ylabel("loss")
        for name, (x, y) in metrics.items():
            axes[-1].plot(x, y, "o-", markersize=4, label=name)
        if metrics:
            axes[-1].set_ylabel("metrics")
        ends = np.flatnonzero(np.diff(steps["epoch"])) + 1
        for ax in axes:
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
            # "best" looks at every point, which takes long where there are many.
            ax.legend(loc="upper right" if ax is axes[0] else "best", frameon=False)
            if len(ends) < 30:  # more of them would be a grey field
                for end in ends:
                    ax.axvline(end + 0.5, color="grey", linewidth=0.6, linestyle=":")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        axes[-1].set_xlabel("step (dotted: end of an epoch)" if 0 < len(ends) < 30 else "step")
        if path is not None:
            figure.savefig(path)
        return figure

    def __repr__(self) -> str:
        epochs, num_steps = self.epochs, len(self.steps["step"])
        title = (
            f"History of {len(epochs)} epoch{'s' * (len(epochs) != 1)}, "
            f"{num_steps} step{'s' * (num_steps != 1)}"
        )
        columns = {
            name: [_short(value) for value in values] for name, values in self.to_dict().items()
        }
        widths = {name: max(len(name), 6, *map(len, cells)) for name, cells in columns.items()}
        widths |= {"epoch": 5} if "epoch" in widths else {}
        shown = range(max(0, len(epochs) - 10), len(epochs))
        lines = [
            "  ".join(cell.rjust(widths[name]) for name, cell in row)
            for row in [
                [(name, name) for name in columns],
                *([(name, cells[i]) for name, cells in columns.items()] for i in shown),
            ]
        ]
        if shown.start:
            lines.insert(1, "  ...")
        return "\n".join([title, *lines] if epochs else [title])

    # What a checkpoint keeps.

    def get_state(self) -> dict[str, Any]:
        """Gives all that is recorded, as arrays and values that JSON can hold."""
        return {
            "steps": self.steps,
            "epochs": [[epoch, logs] for epoch, logs in self._epoch_logs.items()],
            "validations": [list(validation) for validation in self.validations],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `get_state` gave, in place of all that was recorded since."""
        self._unread = []
        self._chunks = [{name: np.asarray(column) for name, column in state["steps"].items()}]
        self._epoch_logs = {epoch: dict(logs) for epoch, logs in state["epochs"]}
        self.validations = [Validation(*validation) for validation in state["validations"]]

    def _read(self, count: int) -> None:
        """Brings the oldest `count` unread entries to the host."""
        entries, self._unread = self._unread[:count], self._unread[count:]
        for epoch, first_step, logs in entries:
            values = {name: np.atleast_1d(_to_numpy(value)) for name, value in logs.items()}
            n = max(map(len, values.values()))
            chunk = {
                "epoch": np.full(n, epoch, np.int64),
                "step": np.arange(first_step, first_step + n, dtype=np.int64),
            }
            for name, value in values.items():
                chunk[name] = np.broadcast_to(value, n).astype(np.float32)
            self._chunks.append(chunk)

    def _metric_lines(self) -> dict[str, tuple[list[int], list[float]]]:
        """Gives name -> (steps from the start, values) of what was measured once in a while."""
        steps = self.steps
        taken = list(zip(steps["epoch"].tolist(), steps["step"].tolist(), strict=True))
        last_step = dict(taken)  # of each epoch
        points = [
            (epoch, last_step[epoch], name, value)
            for epoch, logs in self._epoch_logs.items()
            for name, value in logs.items()
            if epoch in last_step and name not in steps
        ]
        points += [
            (epoch, step, f"{name}_{metric}", value)
            for epoch, step, name, results in self.validations
            for metric, value in results.items()
        ]
        lines: dict[str, tuple[list[int], list[float]]] = {}
        for epoch, step, name, value in points:
            if isinstance(value, float | int):
                x, y = lines.setdefault(name, ([], []))
                x.append(bisect_right(taken, (epoch, step)))
                y.append(value)
        return lines


def _joined(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns of equal length; a term that some of the steps did not have is NaN there."""
    if not chunks:
        return {"epoch": np.zeros(0, np.int64), "step": np.zeros(0, np.int64)}
    names = dict.fromkeys(name for chunk in chunks for name in chunk)
    return {
        name: np.concatenate(
            [c.get(name, np.full(len(c["step"]), np.nan, np.float32)) for c in chunks]
        )
        for name in names
    }


def _draw_losses(ax: "Axes", steps: Mapping[str, np.ndarray]) -> None:
    x = np.arange(1, len(steps["step"]) + 1)
    smoothed = {
        name: _moving_average(values)
        for name, values in steps.items()
        if name not in ("epoch", "step")
    }
    for name, values in smoothed.items():
        (line,) = ax.plot(x, values, linewidth=1.8, label=name, marker="o" if len(x) == 1 else "")
        ax.plot(x, steps[name], linewidth=0.6, alpha=0.35, color=line.get_color())
    drawn = np.concatenate(list(smoothed.values()))
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) and drawn.min() > 0 and drawn.max() > 100 * drawn.min():
        ax.set_yscale("log")


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Averages over a fiftieth of all values around each, of what is finite there."""
    window = np.ones(2 * (len(values) // 100) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0), window, "same")
    count = np.convolve(finite, window, "same")
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def _to_numpy(value: Any) -> np.ndarray:
    # Keras reads what NumPy cannot, such as a bfloat16 tensor of PyTorch.
    return keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else np.asarray(value)


def _to_host(value: Any) -> Any:
    array = _to_numpy(value)
    return array.item() if array.ndim == 0 else array


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
