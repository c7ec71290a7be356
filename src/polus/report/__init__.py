"""Reports of runs: `python -m polus.report runs/a` writes one page with all that was recorded.

The page needs no network, and a browser of any width. It is drawn with Bokeh (`pip install bokeh`).
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from polus.files import atomic_write
from polus.report.loaded import load_runs

__all__ = ["write_report"]

NAME = "report.html"


def write_report(
    directories: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str] | None = None,
    *,
    refresh_secs: float | None = None,
) -> Path:
    """Writes a page about a run, or one that compares several.

    The page shows the loss and other terms of each step, metrics, learning rates, gradient norms,
    the time of a step and where it went, the confusion matrix of the newest validation, restarts,
    skipped steps and the configuration. Of several runs it shows first how their configurations
    differ. A long run is thinned: a point of a curve is the mean of several steps, and a band
    shows their smallest and largest value. Of a run that goes on or crashed it shows what was
    written so far.

    `train(..., run_dir="runs/a")` writes the page of its run when it ends.

    Args:
        directories: The directory of a run (`run_dir`), or of several.
        path: The file to write. Defaults to `report.html` in the directory of a single run, or in
            the current folder for several.
        refresh_secs: After how many seconds the page loads itself again; None for never.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If a directory does not exist, or is one of several runs.
        ImportError: If Bokeh is not installed.
        TypeError: If `directories` are no paths.
        ValueError: If there is no directory, or a record has a line that is none.
    """
    one = isinstance(directories, str | os.PathLike)
    given: list[Any] = [directories] if one else _listed(directories)
    if not given:
        raise ValueError("write_report needs the directory of at least one run, got none.")
    try:
        from polus.report.page import page_of
    except ImportError as error:
        raise ImportError(
            "The report requires Bokeh. Install it with `pip install bokeh`."
        ) from error

    runs = load_runs(given)
    page = page_of(runs, refresh_secs)
    file = (
        Path(path) if path is not None else (runs[0].directory if len(runs) == 1 else Path()) / NAME
    )
    with atomic_write(file) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return file


def _listed(directories: object) -> list[Any]:
    found = list(directories) if isinstance(directories, Iterable) else [directories]
    for directory in found:
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(
                f"write_report needs the run_dir of a run, or a list of some, got {directory!r}."
            )
    return found
