"""Checks that a version can be released, and says what remains: `python release.py 0.2.0`.

The checklist in the order in which it is cheap to fail. `--facts` leaves out what takes minutes.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent
VERBS = ("check", "test", "docs", "dist", "test-lowest")
BY_HAND = (
    "look at build/site in a browser, at the width of a phone too, light and dark",
    "run `make bench` on a quiet machine, and read the tables of docs/benchmarks",
    "git tag v{version}, and push the tag",
    "twine upload dist/*",
    "add an empty [Unreleased] to CHANGELOG.md, and the next .dev0 to src/polus/__init__.py",
)


def problems(version: str) -> Iterator[str]:
    """Yields what the files say against a release."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"{version!r} is not a version such as 0.2.0"
    source = (ROOT / "src" / "polus" / "__init__.py").read_text()
    if f'__version__ = "{version}"' not in source:
        yield f'src/polus/__init__.py has no __version__ = "{version}"'
    changes = (ROOT / "CHANGELOG.md").read_text()
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        yield f"CHANGELOG.md has no section `## [{version}] - <date>`"
    if "repository.invalid" in (ROOT / "pyproject.toml").read_text():
        yield "pyproject.toml has no address of the repository yet"
    if git("status", "--porcelain"):
        yield "the work tree has changes that are not committed"
    if git("tag", "--list", f"v{version}"):
        yield f"the tag v{version} is there already"


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version")
    parser.add_argument("--facts", action="store_true", help="only what the files say")
    options = parser.parse_args()
    if found := list(problems(options.version)):
        print("Not yet:", *found, sep="\n- ")
        return 1
    for verb in () if options.facts else VERBS:
        print(f"make {verb}", flush=True)
        if subprocess.run(["make", verb], cwd=ROOT).returncode:
            return 1
    print("By hand:", *(step.format(version=options.version) for step in BY_HAND), sep="\n- ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
