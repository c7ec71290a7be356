"""Runs the suite once per backend, one after the other, and adds up the results.

Tests marked `once` need no backend and run with the first one only.

python tests/every_backend.py tensorflow jax torch
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent


def run(backend: str, report: Path, first: bool) -> tuple[int, Counter[str]]:
    """Returns pytest's exit code and its counts of passed, failed and skipped tests."""
    print(f"\n{'=' * 30} {backend} {'=' * 30}", flush=True)
    selection = [] if first else ["-m", "not once"]
    code = subprocess.call(
        [sys.executable, "-m", "pytest", f"--junitxml={report}", *selection],
        env=os.environ | {"KERAS_BACKEND": backend},
        cwd=ROOT,
    )
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
    with tempfile.TemporaryDirectory() as folder:
        results = {
            backend: run(backend, Path(folder) / f"{backend}.xml", first=i == 0)
            for i, backend in enumerate(backends)
        }
    print()
    for backend, (code, count) in results.items():
        print(f"{backend}: {line(count)}" + (f" (pytest exit code {code})" if code else ""))
    print(line(sum((count for _, count in results.values()), Counter())))
    return int(any(code for code, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
