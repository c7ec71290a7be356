"""Type checkers find a user's mistakes, and nothing in a program that has none.

Both checkers read `tests/typing`. In `mistakes.py` each line with a mistake names the rules that
find it: `# mypy: arg-type, pyright: reportArgumentType`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
USER, MISTAKES = ROOT / "tests" / "typing" / "user.py", ROOT / "tests" / "typing" / "mistakes.py"
EXPECTED = re.compile(r"# mypy: (?P<mypy>[\w-]+), pyright: (?P<pyright>\w+)")

# One finding: the file, the line and the rule.
Finding = tuple[Path, int, str]


def run(*command: str) -> str:
    """The output of a checker, whether or not it found something."""
    settings = {
        # The node of the test's own environment, and no question for a newer version.
        "PYRIGHT_PYTHON_GLOBAL_NODE": "0",
        "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.stdout


def found_by_mypy() -> list[tuple[Finding, str]]:
    # Strict, but that a user need not annotate their functions.
    output = run(
        "mypy",
        "--allow-untyped-defs",
        "--allow-untyped-calls",
        "--output=json",
        str(USER),
        str(MISTAKES),
    )
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [
        ((ROOT / row["file"], row["line"], row["code"]), row["message"])
        for row in rows
        if row["severity"] == "error"
    ]


def found_by_pyright() -> list[tuple[Finding, str]]:
    output = run(
        "pyright", "--outputjson", "--pythonpath", sys.executable, str(USER), str(MISTAKES)
    )
    return [
        (
            (Path(row["file"]), row["range"]["start"]["line"] + 1, row.get("rule", "")),
            row["message"],
        )
        for row in json.loads(output)["generalDiagnostics"]
        if row["severity"] == "error"
    ]


@pytest.fixture(scope="module", params=["mypy", "pyright"])
def checker(request) -> tuple[str, list[tuple[Finding, str]]]:
    pytest.importorskip(request.param)
    find = {"mypy": found_by_mypy, "pyright": found_by_pyright}[request.param]
    return request.param, find()


def test_a_users_program_is_clean(checker):
    _, findings = checker
    offenders = [
        f"line {line}: {message} [{rule}]"
        for (path, line, rule), message in findings
        if path == USER
    ]
    assert not offenders, "\n".join(offenders)


def test_each_mistake_is_found_by_its_rule(checker):
    name, findings = checker
    lines = enumerate(MISTAKES.read_text().splitlines(), start=1)
    expected = {
        (line, match[name]) for line, text in lines if (match := EXPECTED.search(text)) is not None
    }
    found = {(line, rule) for (path, line, rule), _ in findings if path == MISTAKES}
    assert len(expected) > 40
    assert expected <= found, f"not found: {sorted(expected - found)}"
    lines_expected = {line for line, _ in expected}
    assert {line for line, _ in found} == lines_expected
