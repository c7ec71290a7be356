"""Draws the site's pictures from the code and the tables: `python docs/drawings.py`.

Each picture carries what it was drawn from, so that a test can tell whether it is stale.
"""

import ast
import json
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parent.parent
STATIC = ROOT / "docs" / "_static"
# The rooms of the house, from the user's side down to the backends.
LAYERS = [
    ["ir", "hpo"],
    ["training", "lr_finder"],
    ["runs", "report"],
    ["checkpoint", "callbacks"],
    ["steps", ""],
    ["data", "metrics", "core", "history"],
    ["backends"],
]
HIDDEN = {"Polus, bare", "Polus, eager"}  # of the speeds
ROLES = {
    "ir": "retrieval",
    "hpo": "a search on Optuna",
    "training": "trainers, the run, the loop",
    "lr_finder": "range test",
    "runs": "run directories",
    "report": "a run as a page",
    "checkpoint": "save and resume",
    "callbacks": "what runs between steps",
    "steps": "one compiled step",
    "history": "the record",
    "data": "adapters and reader",
    "metrics": "metrics",
    "core": "compile, differentiate",
    "backends": "one protocol, three engines",
}


def imports() -> list[tuple[str, str]]:
    """Returns which package imports which, read off the syntax trees."""
    source = ROOT / "src" / "polus"
    found = set()
    for path in source.rglob("*.py"):
        user = path.relative_to(source).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            used = {m.split(".")[1] for m in modules if m.startswith("polus.")}
            found |= {(user, name) for name in used if {user, name} <= ROLES.keys()}
    return sorted((user, used) for user, used in found if user != used)


def speeds() -> list[tuple[str, str, float]]:
    """Returns backend, method and steps/s of the first table of docs/benchmarks/speed.md."""
    text = (ROOT / "docs/benchmarks/speed.md").read_text(encoding="utf-8").split("\n### ")[1]
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \| ([\d,]+) \|", text, re.MULTILINE)
    return [(backend, method, float(speed.replace(",", ""))) for backend, method, speed in rows]


def without_detours(edges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leaves out an import that follows from two others, and the one way against the layers."""
    layer = {name: row for row, names in enumerate(LAYERS) for name in names}
    # Imported when they are called: `trainer.lr_finder`, and the report at the end of a run.
    against = {("training", "lr_finder"), ("runs", "report")}
    edges = [(a, b) for a, b in edges if layer[a] <= layer[b] and (a, b) not in against]
    reached = set(edges)
    for middle in ROLES:
        before = {user for user, used in reached if used == middle}
        reached |= {(user, used) for user in before for first, used in reached if first == middle}
    return [
        (user, used)
        for user, used in edges
        if not any({(user, name), (name, used)} <= reached for name in ROLES)
    ]


def architecture(edges: list[tuple[str, str]]) -> Figure:
    """Draws the packages in layers, with an arrow from each to those that it imports."""
    figure = Figure(figsize=(8, 7.4), layout="constrained")
    ax = figure.add_subplot(xlim=(0, 8), ylim=(-1.3, 6.2))
    ax.axis("off")
    place = {}
    for row, names in enumerate(LAYERS):
        for column, name in enumerate(names):
            place[name] = (8 * (column + 0.5) / len(names), 5.7 - 1.1 * row)
    for user, used in without_detours(edges):
        (x, top), (below, bottom) = place[user], place[used]
        around = x == below and top - bottom > 1.2  # the boxes between
        bend = "arc3,rad=0.55" if around else "arc3"
        arrow = {"arrowstyle": "-|>", "color": "0.45", "shrinkA": 18, "shrinkB": 20}
        arrow["connectionstyle"] = bend
        ax.annotate("", place[used], place[user], arrowprops=arrow, zorder=0)
    del place[""]  # an empty place
    for name, (x, y) in place.items():
        colors = {"facecolor": "#e8eefc", "edgecolor": "#35507e"}
        ax.add_patch(FancyBboxPatch((x - 0.9, y - 0.28), 1.8, 0.56, "round,pad=0.04", **colors))
        ax.text(x, y + 0.09, f"polus.{name}", ha="center", va="center", weight="bold")
        ax.text(x, y - 0.14, ROLES[name], ha="center", va="center", fontsize=9)
    return figure


def speed(rows: list[tuple[str, str, float]]) -> Figure:
    """Draws the steps per second of the small classifier, one panel for each backend."""
    backends = list(dict.fromkeys(backend for backend, _, _ in rows))
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    shown = [row for row in rows if row[1] not in HIDDEN]
    bars_of = {b: [(method, value) for name, method, value in shown if name == b] for b in backends}
    heights = [len(drawn) + 1 for drawn in bars_of.values()]
    axes = figure.subplots(len(backends), height_ratios=heights)
    for ax, (backend, drawn) in zip(axes, bars_of.items(), strict=True):
        bars = ax.barh(
            [method for method, _ in drawn],
            [value for _, value in drawn],
            color=["#3467c9" if method == "Polus" else "0.7" for method, _ in drawn],
        )
        ax.bar_label(bars, [f"{value:,.0f}" for _, value in drawn], padding=3, fontsize=9)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set_title(backend, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("steps per second")
    return figure


PICTURES = {"architecture": (imports, architecture), "speed": (speeds, speed)}


def source_of(name: str) -> str:
    """Returns what a picture is drawn from, as the text that it carries."""
    return json.dumps(PICTURES[name][0]())


def main() -> None:
    """Writes the pictures."""
    matplotlib.rcParams["svg.hashsalt"] = "polus"  # equal files from equal sources
    for name, (read, draw) in PICTURES.items():
        metadata = {"Date": None, "Description": source_of(name)}
        draw(read()).savefig(STATIC / f"{name}.svg", metadata=metadata)


if __name__ == "__main__":
    main()
