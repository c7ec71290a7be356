"""What the charts of a report show, before it is drawn."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polus.figures import MAX_POINTS, STYLES, Line, binned, moving_average
from polus.report.loaded import NORM, LoadedRun

Array = np.ndarray[Any, Any]

MAX_VALUES = 100_000  # of the steps of all terms in a page
MIN_POINTS = 200
MAX_MARKS = 1000
DASHES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashdot"}


class Curve(NamedTuple):
    """A line.

    Attributes:
        name: What it is called.
        color: The number of its color; lines of one metric, or of one run, share it.
        dash: "solid", or another style for a validation set.
        x: Steps since the start, or their mean where several are drawn as one point.
        y: The values; for a term of the steps, their moving average.
        value: What a point is told to be: the value, or the mean of several steps.
        low: The smallest of the values that a point stands for; None if it is one.
        high: The largest of them.
        dots: Whether each point is marked.
    """

    name: str
    color: int
    dash: str
    x: Array
    y: Array
    value: Array
    low: Array | None = None
    high: Array | None = None
    dots: bool = False


class Chart(NamedTuple):
    """A chart with the number of steps as its x axis.

    Attributes:
        title: What stands above it.
        unit: What stands beside its y axis.
        curves: Its lines.
        wide: Whether it takes the whole width of the page.
    """

    title: str
    unit: str
    curves: list[Curve]
    wide: bool = False

    def bounds(self) -> tuple[float, float]:
        """Returns the smallest and the largest finite value; zeros if there is none."""
        known = [curve.y[np.isfinite(curve.y)] for curve in self.curves]
        values = np.concatenate([np.zeros(0), *known])
        return (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)


def of_steps(name: str, values: Array, color: int, points: int, band: bool = True) -> Curve:
    """Returns the curve of a term of each step, thinned to a number of points."""
    x, mean, low, high = binned(values, points)
    average = moving_average(mean)
    if len(x) == len(values):
        mean = np.where(np.isfinite(values), values, np.nan)  # as precise as they were recorded
    curve = Curve(name, color, "solid", x, average, mean, dots=len(x) == 1)
    return curve._replace(low=low, high=high) if band and len(x) < len(values) else curve


def of_line(name: str, line: Line, color: int, dash: str = "solid") -> Curve:
    """Returns the curve of values that were measured now and then, thinned if they are many."""
    x, y = np.asarray(line[0], float), np.asarray(line[1], float)
    every = -(-len(x) // MAX_POINTS)
    x, y = x[::-1][::every][::-1], y[::-1][::every][::-1]  # the last one is always among them
    return Curve(name, color, dash, x, y, y, dots=len(x) <= 60)


class Metric:
    """Tells what a name in a record stands for: a metric, on the training or a validation set.

    Args:
        sets: The names of the validation sets.
    """

    def __init__(self, sets: Sequence[str]) -> None:
        self.prefixes = [f"{name}_" for name in sets]

    def split(self, name: str) -> tuple[str, str]:
        """Returns a name without that of its set, and the style of the set's lines."""
        for i, prefix in enumerate(self.prefixes):
            if name.startswith(prefix):
                return name.removeprefix(prefix), DASHES[STYLES[i % len(STYLES)]]
        return name, "solid"


def charts_of(run: LoadedRun) -> list[Chart]:
    """Returns the charts of one run."""
    terms = run.terms()
    points = max(MIN_POINTS, min(MAX_POINTS, MAX_VALUES // max(len(terms), 1)))
    split = Metric(run.sets).split
    groups: dict[str, list[Curve]] = {}  # title -> curves
    colors: dict[str, dict[str, int]] = {}  # title -> metric -> color

    def add(title: str, metric: str, curve: Curve) -> None:
        seen = colors.setdefault(title, {})
        number = seen.setdefault(metric, len(seen))
        groups.setdefault(title, []).append(curve._replace(color=number))

    for name, values in terms.items():
        add(title_of(name), name, of_steps(name, values, 0, points))
    for name, line in run.metrics().items():
        metric, dash = split(name)
        add(title_of(metric), metric, of_line(name, line, 0, dash))
    for name, line in run.rates().items():
        add("learning rate", name, of_line(name, line, 0))
    for name, line in run.step_times().items():
        add("time per step", name, of_line(name, line, 0))
    return [_chart(title, groups[title]) for title in _ordered(groups)]


def charts_of_several(runs: Sequence[LoadedRun]) -> list[Chart]:
    """Returns the charts in which runs are compared: a color is a run."""
    groups: dict[str, list[Curve]] = {}
    several = sum(len(run.terms()) for run in runs)
    points = max(MIN_POINTS, min(MAX_POINTS, MAX_VALUES // max(several, 1)))
    for i, run in enumerate(runs):
        split = Metric(run.sets).split
        for name, values in run.terms().items():
            curve = of_steps(f"{run.name}: {name}", values, i, points, band=False)
            groups.setdefault(name, []).append(curve)
        for name, line in run.metrics().items():
            metric, dash = split(name)
            groups.setdefault(metric, []).append(of_line(f"{run.name}: {name}", line, i, dash))
        for name, line in run.rates().items():
            groups.setdefault(name, []).append(of_line(run.name, line, i))
        for dash, (name, line) in zip(("solid", "dashed"), run.step_times().items(), strict=False):
            curve = of_line(f"{run.name}: {name}", line, i, dash)
            groups.setdefault("time per step", []).append(curve)
    return [_chart(title, groups[title]) for title in _ordered(groups)]


def title_of(name: str) -> str:
    """Returns the title of the chart that a term or a metric belongs to."""
    if name.endswith(NORM):
        return "gradient norm"
    return "loss" if name == "loss" or name.endswith("_loss") else name


def _ordered(groups: Mapping[str, list[Curve]]) -> list[str]:
    """Returns titles: the loss, metrics, then rates, norms and times."""

    def rank(title: str) -> int:
        if title in ("loss", "time per step"):
            return 0 if title == "loss" else 5
        if title.endswith("learning_rate") or title == "learning rate":
            return 3
        return 4 if title.endswith(NORM) or title == "gradient norm" else 2

    return sorted(groups, key=rank)


def _chart(title: str, curves: list[Curve]) -> Chart:
    unit = "milliseconds" if title == "time per step" else title
    return Chart(title, unit, curves, wide=title == "loss")


def thinned(places: Sequence[int]) -> list[int]:
    """Returns at most `MAX_MARKS` of some places."""
    return list(places[:: -(-len(places) // MAX_MARKS) or 1])
