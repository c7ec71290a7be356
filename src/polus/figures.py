"""Figures drawn with matplotlib but without pyplot, so that no display is needed."""

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
Line = tuple[list[int], list[float]]  # steps since the start, and the values there

MAX_POINTS = 5000  # of a plotted line
STYLES = ("--", ":", "-.")  # of the first, second and third validation set


def new_figure(user: str, height: float, width: float = 8) -> "Figure":
    """Returns an empty figure.

    Args:
        user: The method that needs matplotlib, for the error.
        height: In units of 100 pixels.
        width: In units of 100 pixels.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{user} requires matplotlib. Install it with `pip install matplotlib`."
        ) from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            """Shows the figure in a notebook, which knows only those of pyplot."""
            png = io.BytesIO()
            self.savefig(png, format="png")
            return png.getvalue()

    return Picture(figsize=(width, height), dpi=100, layout="constrained")


def html_table(title: str, columns: Mapping[str, Sequence[str]], omitted: bool = False) -> str:
    """Returns a table for a notebook.

    Args:
        title: What stands above it.
        columns: Names and cells.
        omitted: Whether a row of dots says that earlier rows are left out.
    """
    rows = list(zip(*columns.values(), strict=True))
    if omitted:
        rows.insert(0, ("...",) * len(columns))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<p>{escape(title)}</p>{table if rows else ''}"


def history_figure(
    terms: Mapping[str, Array],
    lines: Mapping[str, Line],
    sets: Iterable[str],
    epoch_ends: Sequence[int],
) -> "Figure":
    """Draws the figure of `History.plot`.

    Args:
        terms: The values of each step, drawn thin, with a thick moving average.
        lines: Values measured now and then. Losses are drawn above with the terms, learning rates
            at the bottom, everything else between.
        sets: The names of the validation sets, such as "val". `val_loss` has the color of `loss`.
        epoch_ends: The number of steps up to the end of each epoch but the last.
    """
    rates = {name: line for name, line in lines.items() if name.endswith("learning_rate")}
    losses = {name: line for name, line in lines.items() if name.endswith("_loss")}
    metrics = {name: line for name, line in lines.items() if name not in losses | rates}
    rows = [("loss", losses, 3), ("metrics", metrics, 2), ("learning rate", rates, 1)]
    rows = [row for row in rows if row[1] or row[1] is losses]
    heights = [height for _, _, height in rows]
    figure = new_figure("History.plot", height=sum(heights))
    axes = figure.subplots(len(rows), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    prefixes = [f"{name}_" for name in sets]
    for ax, (label, drawn, _) in zip(axes, rows, strict=True):
        steps = terms if drawn is losses else {}
        _draw_steps(ax, steps)
        _draw_lines(ax, drawn, prefixes, list(steps))
        ax.set_ylabel(label)
    if rates and min(min(y) for _, y in rates.values()) > 0:
        axes[-1].set_yscale("log")
    _finish(axes.tolist(), epoch_ends)
    return figure


def _draw_steps(ax: "Axes", terms: Mapping[str, Array]) -> None:
    drawn = [np.ones(0)]
    for name, values in terms.items():
        x, mean, low, high = binned(values, MAX_POINTS)
        average = moving_average(mean)
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


def binned(values: Array, max_points: int) -> tuple[Array, Array, Array, Array]:
    """Returns at most `max_points` steps, with the mean, minimum and maximum of the values there.

    Only finite values count; a bin without any is NaN.
    """
    size = -(-len(values) // max_points)
    starts = np.arange(0, len(values), size)
    finite = np.isfinite(values)
    known = np.where(finite, values, np.nan)
    total = np.add.reduceat(np.where(finite, values, 0), starts, dtype=np.float64)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    mean = np.divide(total, count, out=np.full(len(starts), np.nan), where=count > 0)
    low, high = np.fmin.reduceat(known, starts), np.fmax.reduceat(known, starts)
    return starts + (1 + size) / 2, mean, low, high


def moving_average(values: Array) -> Array:
    """Returns the mean of the finite values in a window of a fiftieth of the whole around each."""
    window = np.ones(2 * (len(values) // 100) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0), window, "same")
    count = np.convolve(finite, window, "same")
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def _draw_lines(
    ax: "Axes", lines: Mapping[str, Line], prefixes: Sequence[str], colored: list[str]
) -> None:
    """Draws `lines`: those of one metric in one color, dashed for validation sets.

    Args:
        ax: Where the lines of the names in `colored` are drawn already, in their order.
        lines: Name to line.
        prefixes: "val_" and the like.
        colored: Names with the color of their index. Grows.
    """
    for name, (x, y) in lines.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        metric = name.removeprefix(prefix)
        if metric not in colored:
            colored.append(metric)
        style = STYLES[prefixes.index(prefix) % len(STYLES)] if prefix else "-"
        color = f"C{colored.index(metric) % 10}"
        ax.plot(x, y, style, marker="o", markersize=4, color=color, label=name)


def _finish(axes: Sequence["Axes"], epoch_ends: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    ends = epoch_ends if len(epoch_ends) < 30 else []  # more lines would be a grey field
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        # Beside the axes: it hides no curve there.
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        for end in ends:
            ax.axvline(end + 0.5, color="grey", linewidth=0.6, linestyle=":")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes[-1].set_xlabel("step (dotted: end of an epoch)" if ends else "step")
