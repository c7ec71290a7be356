"""What the documents say holds: their links lead somewhere and their code runs.

In a Markdown file each block marked `python` is run, after those above it and in the same
namespace. One that is not to be run says why in the line above: `<!-- not run: the reason -->`.
"""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import polus

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# The modules of one backend each are left out: importing them imports that backend.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(polus.__path__, "polus.")
    if not module.name.startswith("polus.backends.") and not module.name.endswith("__main__")
]
BLOCK = re.compile(r"^(<!-- not run: \S.*-->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


@every_document
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    dead = [link for link in LINK.findall(text) if not (path.parent / link).exists()]
    assert not dead


# An encoder takes a minute; tests of `polus.ir` run on each backend.
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.once) if p.name == "retrieval.md" else p for p in DOCUMENTS],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_code_runs(path, tmp_path, monkeypatch):
    text = path.read_text()
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        if block[1] is None:
            first_line = text[: block.start(2)].count("\n")
            code = "\n" * first_line + block[2]  # so that a traceback names the document's line
            exec(compile(code, path, "exec"), namespace)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert not doctest.testmod(importlib.import_module(name), optionflags=flags).failed
