"""What runs are made of and where they ran, as tables of texts."""

import json
import re
from collections.abc import Sequence
from typing import Any

from polus.report.loaded import LoadedRun

# How a run went, and what differs whenever it begins again.
OF_ONE_RUN = ("id", "status", "exception", "epochs_done", "starts")
OF_ONE_START = ("time",)
# Keras numbers these names in the order in which a process makes them.
NUMBERED = re.compile(r"_\d+(?=/|$)")
MISSING = "–"  # noqa: RUF001
MAX_LENGTH = 300


def settings(run: LoadedRun) -> dict[str, str]:
    """Returns the parts of a run and where it ran last, as path -> text."""
    facts = {name: value for name, value in run.facts.items() if name not in OF_ONE_RUN}
    starts = run.facts.get("starts") or [{}]
    ran = {name: value for name, value in starts[-1].items() if name not in OF_ONE_START}
    return flattened(facts) | flattened(ran)


def differences(runs: Sequence[LoadedRun]) -> dict[str, list[str]]:
    """Returns the settings in which runs differ: path -> the text of each run."""
    all_settings = [settings(run) for run in runs]
    paths = dict.fromkeys(path for each in all_settings for path in each)
    rows = {path: [each.get(path, MISSING) for each in all_settings] for path in paths}
    return {path: row for path, row in rows.items() if len(set(map(_unnumbered, row))) > 1}


def flattened(value: Any, path: str = "") -> dict[str, str]:
    """Returns JSON values as path -> text.

    A list of plain values is one text. An object that Keras serialized is the name of its class,
    with the entries of its configuration below.
    """
    if isinstance(value, dict) and {"class_name", "config"} <= value.keys():
        name, module = str(value["class_name"]), str(value.get("module") or "keras")
        name = name if module.split(".")[0] == "keras" else f"{module}.{name}"
        own = value["config"]
        if not isinstance(own, dict):  # that of a function is its name
            return {path: short(f"{name} {own}")}
        return {path: short(name)} | (flattened(own, path) if own else {})
    if isinstance(value, dict) and value:
        parts = {f"{path}.{name}" if path else str(name): each for name, each in value.items()}
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        parts = {f"{path}[{i}]": each for i, each in enumerate(value)}
    else:
        return {path: short(value)}
    return {name: text for p, each in parts.items() for name, text in flattened(each, p).items()}


def short(value: Any) -> str:
    """Returns a JSON value as a text of limited length."""
    if isinstance(value, list):
        separator = " " if all(isinstance(each, str) for each in value) else ", "
        text = separator.join(map(str, value))
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..."


def _unnumbered(text: str) -> str:
    return NUMBERED.sub("", text)
