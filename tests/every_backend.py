"""Runs the suite once per backend, two backends at a time, and adds up the results.

Tests marked `once` need no backend: they run with the last one only, which is the quickest.

python tests/every_backend.py tensorflow jax torch
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
# A suite keeps one core busy: its models are small, and most of its time compiles and traces.
AT_A_TIME = 2


def run(backend: str, folder: Path, last: bool) -> tuple[int, Counter[str]]:
    """Returns pytest's exit code and its counts of passed, failed and skipped tests."""
    report, log = folder / f"{backend}.xml", folder / f"{backend}.txt"
    selection = [] if last else ["-m", "not once"]
    with log.open("w") as output:
        code = subprocess.call(
            [sys.executable, "-m", "pytest", f"--junitxml={report}", *selection],
            env=os.environ | {"KERAS_BACKEND": backend},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    print(f"\n{'=' * 30} {backend} {'=' * 30}\n{log.read_text(errors='replace')}", flush=True)
    if not report.exists():  # pytest itself broke
        return code, Counter(failed=1)
    suite = ElementTree.parse(report).getroot()[0]
    count = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return code, Counter(passed=passed, failed=failed, skipped=count["skipped"])


def line(count: Counter[str]) -> str:
    return ", ".join(f"{count[kind]} {kind}" for kind in ("passed", "failed", "skipped"))


def main(backends: list[str]) -> int:
    print(f"Running the suite on {', '.join(backends)}.", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_A_TIME) as pool:
        runs = [
            pool.submit(run, backend, Path(folder), backend == backends[-1]) for backend in backends
        ]
        results = dict(zip(backends, [run.result() for run in runs], strict=True))
    print()
    for backend, (code, count) in results.items():
        print(f"{backend}: {line(count)}" + (f" (pytest exit code {code})" if code else ""))
    print(line(sum((count for _, count in results.values()), Counter())))
    return int(any(code for code, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
