"""Writes a report: `python -m polus.report runs/a`, or `runs/a runs/b` to compare runs."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from polus.report import write_report
from polus.report.loaded import has_ended

LIVE_SECS = 10.0
MAX_SECS = 1e6


def main(
    arguments: Sequence[str] | None = None, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Writes the report and returns the exit code: 0, or 1 with the reason.

    Args:
        arguments: Those of the command line; None for those of the process.
        sleep: Waits for so many seconds.
    """
    parser = argparse.ArgumentParser(prog="python -m polus.report", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("-o", "--output", help="the file to write, by default report.html")
    parser.add_argument(
        "--live",
        type=_seconds,
        nargs="?",
        const=LIVE_SECS,
        metavar="SECS",
        help="writes again every SECS seconds (10) until the runs have ended",
    )
    given = parser.parse_args(arguments)
    try:
        return _write(given.runs, given.output, given.live, sleep)
    except KeyboardInterrupt:
        return 0
    except (OSError, ImportError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


def _seconds(text: str) -> float:
    try:
        secs = float(text)
    except ValueError:
        secs = math.nan
    if not 0 < secs < MAX_SECS:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return secs


def _write(
    runs: Sequence[str], output: str | None, live: float | None, sleep: Callable[[float], None]
) -> int:
    told = False
    while True:
        # Looked at first, so that the last page has all that a run wrote before it ended.
        ended = all(has_ended(Path(run)) for run in runs)
        goes_on = live is not None and not ended
        path = write_report(runs, output, refresh_secs=live if goes_on else None)
        if not told:
            print(path, "is written again until the runs have ended." if goes_on else "")
            told = True
        if not goes_on or live is None:
            return 0
        sleep(live)


if __name__ == "__main__":
    sys.exit(main())
