"""Runs the suite once per backend, in parts, two of them at a time, and adds up the results.

Each file is in one part of each backend. Tests marked `once` need no backend: they run with the
last one only, which is the quickest.

python tests/every_backend.py tensorflow jax torch
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
# Small enough that both cores end at about the same time. Each costs an import of Keras.
PARTS = 6
NO_TESTS = 5  # pytest's exit code where a part has only tests marked `once`


@dataclass
class Part:
    """Some files of one backend's suite, and how their tests ended."""

    backend: str
    selection: Sequence[str]
    files: Sequence[Path]
    code: int = 0
    count: Counter[str] = field(default_factory=Counter)
    log: str = ""

    def run(self, folder: Path, lane: str) -> None:
        """Runs pytest, and keeps its exit code, output and counts of tests."""
        report = folder / f"{lane}.xml"
        report.unlink(missing_ok=True)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", f"--junitxml={report}"),
                *self.selection,
                *map(str, self.files),
            ],
            # Parts that run at once don't share JAX's cache: its files are not written atomically.
            env=os.environ
            | {"KERAS_BACKEND": self.backend, "POLUS_TESTS_CACHE": str(folder / f"cache-{lane}")},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.log = done.stdout.decode(errors="replace")
        self.code = 0 if done.returncode == NO_TESTS else done.returncode
        self.count = counted(report) if report.exists() else Counter(failed=1)  # pytest broke


def counted(report: Path) -> Counter[str]:
    """Returns the counts of passed, failed and skipped tests."""
    suite = ElementTree.parse(report).getroot()[0]
    count = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return Counter(passed=passed, failed=failed, skipped=count["skipped"])


def parts(backend: str, last: bool) -> list[Part]:
    """Returns the suite of a backend. The large files are spread over its parts."""
    files = sorted(Path(__file__).parent.rglob("test_*.py"), key=lambda file: -file.stat().st_size)
    selection = [] if last else ["-m", "not once"]
    return [Part(backend, selection, files[i::PARTS]) for i in range(PARTS)]


def line(count: Counter[str]) -> str:
    return ", ".join(f"{count[kind]} {kind}" for kind in ("passed", "failed", "skipped"))


def total(some: Sequence[Part]) -> Counter[str]:
    return sum((part.count for part in some), Counter())


def main(backends: list[str]) -> int:
    print(f"Running the suite on {', '.join(backends)}.", flush=True)
    suites = {backend: parts(backend, backend == backends[-1]) for backend in backends}
    # One lane works from each end of the queue. They meet in the quickest backend, which stands in
    # the middle; so JAX stays in one lane, where a part finds what an earlier one has compiled.
    queue = deque(part for backend in (backends[0], *backends[:0:-1]) for part in suites[backend])
    ended: list[Part] = []

    def work(folder: Path, lane: str) -> None:
        take = queue.popleft if lane == "left" else queue.pop
        while queue:
            part = take()
            began = time.perf_counter()
            part.run(folder, lane)
            ended.append(part)
            print(
                f"{part.backend}, {len(part.files)} files: {line(part.count)} "
                f"in {time.perf_counter() - began:.0f} s",
                flush=True,
            )
            suite = suites[part.backend]
            if sum(other.backend == part.backend for other in ended) == len(suite):
                logs = "\n".join(other.log for other in suite)
                print(f"\n{'=' * 30} {part.backend} {'=' * 30}\n{logs}", flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        for lane in [pool.submit(work, Path(folder), lane) for lane in ("left", "right")]:
            lane.result()
    print()
    for backend, suite in suites.items():
        codes = sorted({part.code for part in suite} - {0})
        ended_with = f" (pytest exit codes {codes})" if codes else ""
        print(f"{backend}: {line(total(suite))}{ended_with}")
    every = [part for suite in suites.values() for part in suite]
    print(line(total(every)))
    untested = [backend for backend, suite in suites.items() if not total(suite)["passed"]]
    return int(bool(untested) or any(part.code for part in every))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
