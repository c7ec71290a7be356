"""The page of a report: its texts, tables and charts in one file."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from polus.report.configuration import differences, settings, short
from polus.report.curves import Chart, charts_of, charts_of_several, thinned
from polus.report.drawing import COLORS, SHARE_COLORS, Drawn, Marks
from polus.report.loaded import SHARES, LoadedRun

Array = np.ndarray[Any, Any]

DASHES = {"solid": "", "dashed": "6 4", "dotted": "2 3", "dashdot": "6 3 2 3"}
SCORES = ("class", "precision", "recall", "F1", "labels")
MAX_ROWS = 60  # of a table; the others can be unfolded
# Nothing is loaded, whatever a name or a library asks for.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{refresh}<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{body}
{scripts}
<script>
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload());
</script>
</body>
</html>
"""


def page_of(runs: Sequence[LoadedRun], refresh_secs: float | None = None) -> str:
    """Returns the page of a run, or of several in comparison.

    Args:
        runs: The runs.
        refresh_secs: After how many seconds the page loads itself again; None for never.
    """
    if len(runs) == 1:
        title, sections, drawn = _of_one(runs[0])
    else:
        title, sections, drawn = _of_several(runs)
    scripts, elements = drawn.embedded()
    body = "\n".join(sections)
    for key, element in elements.items():
        body = body.replace(_place(key), element, 1)
    refresh = (
        "" if refresh_secs is None else f'<meta http-equiv="refresh" content="{refresh_secs:g}">\n'
    )
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return PAGE.format(
        policy=POLICY, refresh=refresh, title=escape(title), style=style, body=body, scripts=scripts
    )


def _of_one(run: LoadedRun) -> tuple[str, list[str], Drawn]:
    drawn = Drawn(run.history.epoch_ends())
    skips, restarts = thinned(run.skips()), run.restarts()
    cards = []
    for i, chart in enumerate(charts_of(run)):
        marked = skips if chart.title == "loss" or i == 0 else []
        drawn.chart(f"chart{i}", chart, [Marks(restarts, marked, chart.curves[0])])
        cards.append(_card(f"chart{i}", chart))
    if run.history.record:
        drawn.shares("shares", [row["epoch"] for row in run.history.record], run.shares())
        cards.append(_shares_card("shares", "where the time of each epoch went"))
    sections = [
        f"<h1>{escape(run.name)}</h1>",
        _summary(run),
        _grid(cards) if cards else "<p>No step was written so far.</p>",
        *_confusions(run, drawn, "c"),
        "<h2>Configuration</h2>",
        _settings_table(settings(run)),
    ]
    return f"{run.name} – Polus", sections, drawn  # noqa: RUF001


def _of_several(runs: Sequence[LoadedRun]) -> tuple[str, list[str], Drawn]:
    drawn = Drawn()
    cards = []
    for i, chart in enumerate(charts_of_several(runs)):
        drawn.chart(f"chart{i}", chart, _marks_of_several(runs, chart) if i == 0 else ())
        cards.append(_card(f"chart{i}", chart))
    for i, run in enumerate(runs):
        if run.history.record:
            drawn.shares(f"shares{i}", [row["epoch"] for row in run.history.record], run.shares())
            cards.append(_shares_card(f"shares{i}", f"{run.name}: where the time went"))
    names = [run.name for run in runs]
    changed = differences(runs)
    rows = [[path, *texts] for path, texts in changed.items()]
    kind = "whole" if len(runs) == 2 else "many"
    sections = [
        f"<h1>{len(runs)} runs</h1>",
        "<h2>Differences of their configurations</h2>",
        _table(["", *names], rows, kind, MAX_ROWS) if rows else "<p>They have none.</p>",
        "<h2>Results</h2>",
        _table(["", *names], _results(runs), f"{kind} numbers"),
        "<h2>Curves</h2>",
        _grid(cards),
    ]
    for i, run in enumerate(runs):
        sections += _confusions(run, drawn, f"c{i}_", f"{run.name}: ")
    return f"{', '.join(names)} – Polus", sections, drawn  # noqa: RUF001


def _marks_of_several(runs: Sequence[LoadedRun], chart: Chart) -> list[Marks]:
    """Returns the restarts and skipped steps of runs, in the colors of their curves."""
    first = {curve.color: curve for curve in reversed(chart.curves)}
    return [
        Marks(run.restarts(), thinned(run.skips()), first[i], COLORS[i % len(COLORS)], run.name)
        for i, run in enumerate(runs)
        if i in first
    ]


# ---------------------------------------------------------------------- texts and tables


def _summary(run: LoadedRun) -> str:
    facts, history = run.facts, run.history
    steps = len(next(iter(run.terms().values()), ()))
    done, wanted = facts.get("epochs_done", len(history.record)), facts.get("epochs")
    lines = [
        f"{done} of {wanted} epochs" if wanted else f"{done} epochs",
        f"{steps:,} steps",
        _duration(run.total_secs()),
    ]
    if restarts := len(run.record.starts) - 1:
        lines.append(f"{restarts} restart{'s' * (restarts > 1)}")
    if skips := len(run.record.skipped):
        lines.append(f"{skips:,} skipped step{'s' * (skips > 1)}")
    kind = run.status if run.status.isalpha() else "unknown"
    parts = [
        f'<p><span class="status {escape(kind)}">{escape(run.status)}</span> {", ".join(lines)}</p>'
    ]
    if exception := facts.get("exception"):
        parts.append(f'<p class="error">{escape(str(exception))}</p>')
    if run.silent_secs:
        parts.append(
            f'<p class="error">Nothing was written for {_duration(run.silent_secs)}: was its '
            "process killed?</p>"
        )
    parts += [f'<p class="faint">{escape(line)}</p>' for line in _started(run)]
    return "\n".join(parts)


def _started(run: LoadedRun) -> list[str]:
    """Returns when, where and by what each process of a run was started."""
    lines = []
    for start in run.facts.get("starts", []):
        environment, git = start.get("environment") or {}, start.get("git")
        parts = [str(start.get("time", "")), short(start.get("command", []))]
        if isinstance(git, dict):
            clean = "" if git.get("clean") else " with changes"
            parts.append(f"git {str(git.get('commit'))[:12]}{clean}")
        versions = [
            f"{name} {environment[key]}"
            for name in ("polus", "keras", str(environment.get("backend")))
            if (key := f"version of {name}") in environment
        ]
        lines.append(" · ".join(part for part in [*parts, ", ".join(versions)] if part))
    return lines


def _results(runs: Sequence[LoadedRun]) -> list[list[str]]:
    """Returns the rows of a table: each metric's last value (and its range), speed, time."""
    rows: dict[str, list[str]] = {}

    def put(name: str, i: int, value: object) -> None:
        rows.setdefault(name, [""] * len(runs))[i] = str(value)

    for i, run in enumerate(runs):
        put("status", i, run.status)
        put("steps", i, f"{len(next(iter(run.terms().values()), ())):,}")
        put("time", i, _duration(run.total_secs()))
        put("restarts", i, max(len(run.record.starts) - 1, 0))
        put("skipped steps", i, f"{len(run.record.skipped):,}")
        for name, values in run.epoch_values().items():
            put(name, i, f"{values[-1]:.4g} ({min(values):.4g} to {max(values):.4g})")
        for part, secs in run.shares().items():
            put(f"seconds: {part}", i, f"{sum(secs):.3g}")
    return [[name, *cells] for name, cells in rows.items()]


def _duration(secs: float) -> str:
    if secs < 60:
        return f"{secs:.1f} s"
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _settings_table(known: Mapping[str, str]) -> str:
    rows = [[path, text] for path, text in known.items() if text not in ("null", "")]
    of_parts = [row for row in rows if not row[0].startswith("models.")]
    of_models = [row for row in rows if row[0].startswith("models.")]
    models = f"<details><summary>Models</summary>{_table([], of_models, 'whole')}</details>"
    return _table([], of_parts, "whole") + (models if of_models else "")


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], kind: str, most: int | None = None
) -> str:
    """Returns a table of a kind that style.css knows; rows beyond `most` can be unfolded."""
    shown = f'<div class="scroll"><table class="{kind}">{_rows(head, rows[:most])}</table></div>'
    if most is not None and (rest := rows[most:]):
        folded = _table(head, rest, kind)
        shown += f"<details><summary>{len(rest)} more</summary>{folded}</details>"
    return shown


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head) if any(head) else ""
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"


# ---------------------------------------------------------------------- charts


def _place(key: str) -> str:
    """Returns what stands in the page until the chart does; no text of a run contains it."""
    return f"<!--chart {key}-->"


def _grid(cards: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>'


def _card(key: str, chart: Chart) -> str:
    entries = [
        _entry(COLORS[curve.color % len(COLORS)], curve.name, DASHES[curve.dash])
        for curve in chart.curves
    ]
    wide = " wide" if chart.wide else ""
    return (
        f'<section class="card{wide}"><h3>{escape(chart.title)}</h3>'
        f'<ul class="legend">{"".join(entries)}</ul>'
        f'<div class="lines">{_place(key)}</div></section>'
    )


def _shares_card(key: str, title: str) -> str:
    entries = [_entry(color, part) for part, color in zip(SHARES, SHARE_COLORS, strict=True)]
    return (
        f'<section class="card"><h3>{escape(title)}</h3>'
        f'<ul class="legend">{"".join(entries)}</ul>'
        f'<div class="lines">{_place(key)}</div></section>'
    )


def _entry(color: str, name: str, dashes: str = "") -> str:
    line = f'stroke="{color}" stroke-width="3" stroke-dasharray="{dashes}"'
    return (
        '<li><svg width="26" height="8" aria-hidden="true">'
        f'<path d="M0 4H26" {line}/></svg><span>{escape(name)}</span></li>'
    )


def _confusions(run: LoadedRun, drawn: Drawn, key: str, prefix: str = "") -> list[str]:
    """Returns a section for each validation set with a confusion matrix."""
    sections = []
    for i, (name, matrix) in enumerate(run.record.confusions.items()):
        drawn.confusion(f"{key}{i}", matrix)
        title = f"{prefix}newest validation on {name}"
        scores = _table(SCORES, scores_of(matrix), "numbers")
        picture = f"<div>{_place(f'{key}{i}')}</div>"
        cards = [
            f'<section class="card"><h3>{heading}</h3>{content}</section>'
            for heading, content in (("confusion matrix", picture), ("scores by class", scores))
        ]
        sections += [f"<h2>{escape(title[0].upper() + title[1:])}</h2>", _grid(cards)]
    return sections


def scores_of(matrix: Array) -> list[list[str]]:
    """Returns class, precision, recall, F1 and the number of labels of each class, as texts.

    Args:
        matrix: Counts by true class (row) and predicted class (column).
    """
    hits, true, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    rows = []
    for i in range(len(matrix)):
        scores = (
            (hits[i], predicted[i]),
            (hits[i], true[i]),
            (2 * hits[i], true[i] + predicted[i]),
        )
        cells = [f"{part / whole:.3f}" if whole else "–" for part, whole in scores]  # noqa: RUF001
        rows.append([str(i), *cells, f"{true[i]:g}"])
    return rows
