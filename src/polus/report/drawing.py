"""Charts drawn with Bokeh, whose scripts a page can hold."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from bokeh.embed import components
from bokeh.models import (
    ColumnDataSource,
    FactorRange,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    Tool,
)
from bokeh.palettes import Category10_10
from bokeh.plotting import figure
from bokeh.resources import Resources

from polus.report.curves import Chart, Curve
from polus.report.loaded import SHARES

Array = np.ndarray[Any, Any]

COLORS = Category10_10
TEXT_SIZE = "12px"  # 9 points
TOOLS = "box_zoom,pan,reset,save"
HEIGHT = 300
SHARE_COLORS = ("#1f77b4", "#ff7f0e", "#9467bd", "#2ca02c", "#8c8c8c")


RED = "#d62728"


class Marks(NamedTuple):
    """What is marked of a run in a chart.

    Attributes:
        restarts: Steps before each restart.
        skips: Steps that were skipped.
        curve: The curve on which these lie.
        color: The color of all of them.
        name: That of the run, where there are several.
    """

    restarts: Sequence[int]
    skips: Sequence[int]
    curve: Curve
    color: str = RED
    name: str = ""


class Drawn:
    """The charts of a page, which share the range of their x axis.

    Args:
        epoch_ends: Steps up to the end of each epoch but the last; no lines if there are many.
    """

    def __init__(self, epoch_ends: Sequence[int] = ()) -> None:
        self.epoch_ends = epoch_ends if len(epoch_ends) < 30 else ()
        self.figures: dict[str, Any] = {}
        self._x_range: Any = None

    def chart(self, key: str, chart: Chart, marks: Sequence[Marks] = ()) -> None:
        """Draws a chart of steps.

        Args:
            key: Its name in the page.
            chart: What to draw.
            marks: What is marked in it.
        """
        shared = {} if self._x_range is None else {"x_range": self._x_range}
        low, high = chart.bounds()
        kind = "log" if low > 0 and high > 100 * low else "linear"
        fig = _figure(y_axis_type=kind, x_axis_label="step", y_axis_label=chart.unit, **shared)
        self._x_range = fig.x_range
        fig.xaxis.formatter = NumeralTickFormatter(format="0.[00]a")  # 200k
        if low == high != 0:
            fig.y_range.default_span = 2 * abs(
                low
            )  # else a rate of 0.001 would lie between -1 and 1
        if kind == "linear":
            fig.yaxis.formatter.power_limit_low = -5  # 0.005 rather than 5.000e-3
        hovered = [_draw(fig, curve) for curve in chart.curves]
        tips = [("", "$name"), ("step", "@x{0,0}"), ("value", "@value{%.5g}")]
        formats: Any = {"@value": "printf"}
        tool = HoverTool(renderers=hovered, tooltips=tips, formatters=formats, mode="vline")
        fig.add_tools(tool)
        if len(self.epoch_ends):
            ends = ColumnDataSource({"x": np.asarray(self.epoch_ends) + 0.5})
            style = {"line_color": "#888888", "line_dash": "dotted", "line_alpha": 0.7}
            fig.vspan("x", source=ends, level="underlay", **style)
        for marked in marks:
            _mark(fig, marked)
        self.figures[key] = fig

    def shares(self, key: str, epochs: Sequence[int], shares: dict[str, list[float]]) -> None:
        """Draws where the time of each epoch went, as bars from 0 to 100 %."""
        seconds = np.array([shares[part] for part in SHARES])
        groups = np.arange(0, seconds.shape[1], -(-seconds.shape[1] // 100))
        seconds = np.add.reduceat(seconds, groups, axis=1)
        percent = 100 * seconds / np.maximum(seconds.sum(axis=0), 1e-12)
        numbers = np.asarray(epochs)[groups] + 1
        fig = _figure(y_range=(0, 100), x_axis_label="epoch", y_axis_label="% of the time")
        fig.xaxis.ticker.min_interval = 1
        bottom = np.zeros(len(groups))
        width = 0.8 * (numbers[1] - numbers[0] if len(numbers) > 1 else 1)
        for part, share, secs, color in zip(SHARES, percent, seconds, SHARE_COLORS, strict=True):
            data = {"x": numbers, "bottom": bottom, "top": bottom + share, "share": share}
            source = ColumnDataSource(data | {"secs": secs})
            bars = fig.vbar(
                "x", width, "top", "bottom", source=source, color=color, line_color=None, name=part
            )
            tips = [("", "$name"), ("epoch", "@x"), ("share", "@share{0.0} %")]
            _hover(fig, bars, [*tips, ("seconds", "@secs{0,0.000}")])
            bottom = bottom + share
        self.figures[key] = fig

    def confusion(self, key: str, matrix: Array) -> None:
        """Draws a confusion matrix; a color is the share of the true class."""
        count = len(matrix)
        classes = [str(i) for i in range(count)]
        true, predicted = np.divmod(np.arange(count * count), count)
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        fig = _figure(
            x_range=FactorRange(factors=classes),
            y_range=FactorRange(factors=classes[::-1]),
            x_axis_label="predicted",
            y_axis_label="true",
            height=max(HEIGHT, min(120 + 30 * count, 560)),
        )
        cells = {
            "true": [classes[i] for i in true],
            "predicted": [classes[i] for i in predicted],
            "count": matrix.ravel(),
            "share": share.ravel(),
            "percent": 100 * share.ravel(),
            "ink": ["#ffffff" if s > 0.45 else "#1b1f24" for s in share.ravel()],
            "text": [f"{value:g}" for value in matrix.ravel()],
        }
        source = ColumnDataSource(cells)
        blues = ["#f2f6fb", "#d9e6f4", "#b5d0e9", "#85b2da", "#5491c7", "#2f6fae", "#174f8f"]
        mapper = LinearColorMapper(palette=blues, low=0, high=1)
        color = {"field": "share", "transform": mapper}
        marks = fig.rect("predicted", "true", 1, 1, source=source, color=color, line_color=None)
        if count <= 20:
            text = {"text_align": "center", "text_baseline": "middle", "text_color": "ink"}
            fig.text("predicted", "true", "text", source=source, text_font_size=TEXT_SIZE, **text)
        elif count > 40:
            fig.axis.major_label_text_font_size = "0px"
        tips = [("true", "@true"), ("predicted", "@predicted"), ("count", "@text")]
        _hover(fig, marks, [*tips, ("of the class", "@percent{0.0} %")])
        fig.grid.visible = False
        self.figures[key] = fig

    def embedded(self) -> tuple[str, dict[str, str]]:
        """Returns the scripts of the page, and the element of each chart by its key."""
        library = Resources(mode="inline", components=["bokeh"], log_level="warn")
        scripts = library.render_js()
        if not self.figures:
            return "", {}
        script, elements = components(self.figures)
        return f"{scripts}\n{script}", dict(elements)


def _figure(**arguments: Any) -> Any:
    height = arguments.pop("height", HEIGHT)
    fig = figure(height=height, sizing_mode="stretch_width", tools=TOOLS, **arguments)
    fig.toolbar.logo = None
    fig.toolbar.active_drag = None  # on a phone a finger scrolls the page
    fig.toolbar.autohide = True
    fig.background_fill_color = fig.border_fill_color = fig.outline_line_color = None
    fig.axis.major_label_text_font_size = TEXT_SIZE
    fig.axis.axis_label_text_font_size = TEXT_SIZE
    fig.axis.axis_label_text_font_style = "normal"
    fig.min_border_right = 16
    return fig


def _hover(fig: Any, renderer: Any, tips: list[tuple[str, str]]) -> None:
    tool: Tool = HoverTool(renderers=[renderer], tooltips=tips, visible=False)
    fig.add_tools(tool)


def _draw(fig: Any, curve: Curve) -> Any:
    """Draws a curve, and returns what tells its values."""
    color = COLORS[curve.color % len(COLORS)]
    data = {"x": _small(curve.x), "y": _small(curve.y), "value": _small(curve.value)}
    if curve.low is not None and curve.high is not None:
        data |= {"low": _small(curve.low), "high": _small(curve.high)}
    source = ColumnDataSource(data)
    if "low" in data:
        fig.varea("x", "low", "high", source=source, color=color, alpha=0.25)
    elif curve.y is not curve.value:
        fig.line("x", "value", source=source, color=color, alpha=0.4, line_width=0.8)
    if curve.dots:
        fig.scatter("x", "y", source=source, color=color, size=6)
    return fig.line(
        "x", "y", source=source, color=color, line_width=2, line_dash=curve.dash, name=curve.name
    )


def _mark(fig: Any, marks: Marks) -> None:
    """Marks restarts as lines, and skipped steps on a curve where its average is known."""
    curve, prefix = marks.curve, f"{marks.name}: " if marks.name else ""
    if len(marks.restarts):
        source = ColumnDataSource({"x": np.asarray(marks.restarts) + 0.5})
        lines = fig.vspan("x", source=source, line_color=marks.color, line_dash="dashed")
        _hover(fig, lines, [("", f"{prefix}restart after step @x{{0,0}}")])
    known = np.isfinite(curve.y)
    if len(marks.skips) and known.any():
        heights = np.interp(marks.skips, curve.x[known], curve.y[known])
        source = ColumnDataSource({"x": np.asarray(marks.skips), "y": heights})
        crosses = fig.scatter(
            "x", "y", source=source, marker="x", size=10, line_width=2, color=marks.color
        )
        _hover(fig, crosses, [("", f"{prefix}skipped: step @x{{0,0}}")])


def _small(values: Array) -> Array:
    """Returns values in the fewest bytes that keep them: whole numbers as int32."""
    small = values.dtype == np.float64 and bool(np.all(np.abs(values) < 2**31))
    whole = small and bool(np.all(values == np.round(values)))
    return values.astype(np.int32) if whole else values
