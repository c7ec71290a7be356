"""Figures drawn with matplotlib but without pyplot, so that no display is needed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
Line = tuple[list[int], list[float]]  # steps since the start, and the values there

MAX_POINTS = 5000  # of a plotted line


def new_figure(user: str, height: float) -> "Figure":
    """Returns an empty figure, 800 pixels wide.

    Args:
        user: The method that needs matplotlib, for the error.
        height: In units of 100 pixels.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{user} requires matplotlib. Install it with `pip install matplotlib`."
        ) from error
    return Figure(figsize=(8, height), dpi=100, layout="constrained")


def history_figure(
    terms: Mapping[str, Array], lines: Mapping[str, Line], epoch_ends: Sequence[int]
) -> "Figure":
    """Draws the figure of `History.plot`.

    Args:
        terms: The values of each step, drawn thin, with a thick moving average.
        lines: Values measured now and then. Losses are drawn above with the terms, everything else
            below.
        epoch_ends: The number of steps up to the end of each epoch but the last.
    """
    losses = {name: line for name, line in lines.items() if name.endswith("_loss")}
    metrics = {name: line for name, line in lines.items() if name not in losses}
    num_axes = 1 + bool(metrics)
    figure = new_figure("History.plot", height=5 if metrics else 3)
    axes = figure.subplots(num_axes, sharex=True, squeeze=False, height_ratios=[3, 2][:num_axes])[
        :, 0
    ].tolist()
    _draw_steps(axes[0], terms)
    _draw_lines(axes[0], "loss", losses)
    if metrics:
        _draw_lines(axes[-1], "metrics", metrics)
    _finish(axes, epoch_ends)
    return figure


def _draw_steps(ax: "Axes", terms: Mapping[str, Array]) -> None:
    drawn = [np.ones(0)]
    for name, values in terms.items():
        x, mean, low, high = _binned(values)
        average = _moving_average(mean)
        marker = "o" if len(x) == 1 else ""
        (line,) = ax.plot(x, average, linewidth=1.8, label=name, marker=marker)
        if len(x) == len(values):
            ax.plot(x, values, linewidth=0.6, alpha=0.35, color=line.get_color())
        else:
            ax.fill_between(x, low, high, linewidth=0, alpha=0.25, color=line.get_color())
        drawn.append(average[np.isfinite(average)])
    every = np.concatenate(drawn)
    if len(every) and every.min() > 0 and every.max() > 100 * every.min():
        ax.set_yscale("log")


def _binned(values: Array) -> tuple[Array, Array, Array, Array]:
    """Returns at most `MAX_POINTS` steps, with the mean, minimum and maximum of the values there.

    Only finite values count; a bin without any is NaN.
    """
    size = -(-len(values) // MAX_POINTS)
    starts = np.arange(0, len(values), size)
    finite = np.isfinite(values)
    known = np.where(finite, values, np.nan)
    total = np.add.reduceat(np.where(finite, values, 0), starts, dtype=np.float64)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    mean = np.divide(total, count, out=np.full(len(starts), np.nan), where=count > 0)
    low, high = np.fmin.reduceat(known, starts), np.fmax.reduceat(known, starts)
    return starts + (1 + size) / 2, mean, low, high


def _moving_average(values: Array) -> Array:
    """Returns the mean of the finite values in a window of a fiftieth of the whole around each."""
    window = np.ones(2 * (len(values) // 100) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0), window, "same")
    count = np.convolve(finite, window, "same")
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def _draw_lines(ax: "Axes", label: str, lines: Mapping[str, Line]) -> None:
    for name, (x, y) in lines.items():
        ax.plot(x, y, "o-", markersize=4, label=name)
    ax.set_ylabel(label)


def _finish(axes: Sequence["Axes"], epoch_ends: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    ends = epoch_ends if len(epoch_ends) < 30 else []  # more lines would be a grey field
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        # "best" compares every point, which is slow for many points.
        ax.legend(loc="upper right" if ax is axes[0] else "best", frameon=False)
        for end in ends:
            ax.axvline(end + 0.5, color="grey", linewidth=0.6, linestyle=":")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes[-1].set_xlabel("step (dotted: end of an epoch)" if ends else "step")
