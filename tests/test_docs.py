"""What the documents say holds: their links lead somewhere and their code runs.

In a Markdown file each block marked `python`, or `{code-cell}` in a notebook, is run, after those
above it and in the same namespace. One that is not to be run says why in the line above:
`<!-- not run: the reason -->`.
"""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from html import unescape
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
BLOCK = re.compile(
    r"^(<!-- not run: \S[^\n]*-->\n)?```(?:python|\{code-cell\})\n(?::[^\n]*\n)*(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


def test_blocks_that_are_not_run_end_where_they_end():
    text = "<!-- not run: a -->\n```python\n1\n```\n```python\n2\n```\n" * 2
    assert [bool(block[1]) for block in BLOCK.finditer(text)] == [True, False] * 2


every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


@every_document
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    dead = [link for link in LINK.findall(text) if not (path.parent / link).exists()]
    assert not dead


# Pages use what Keras has today. An encoder takes a minute; `polus.ir` is tested on each backend.
@pytest.mark.needs_keras_3_15
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


@pytest.mark.needs_keras_3_15
@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert not doctest.testmod(importlib.import_module(name), optionflags=flags).failed


@pytest.mark.once
def test_pictures_are_drawn_from_the_code_and_tables_of_today(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    drawings = importlib.import_module("drawings")
    for name in drawings.PICTURES:
        drawn_from = unescape((drawings.STATIC / f"{name}.svg").read_text())
        assert drawings.source_of(name) in drawn_from, "run python docs/drawings.py"


@pytest.mark.once
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path):
    pytest.importorskip("myst_nb")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", ROOT / "docs", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert built.returncode == 0, built.stderr
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html")}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():
        for link, anchor in re.findall(r'href="(?!\w+:)([^"#?]*)[^"#]*(?:#([^"]*))?"', text):
            target = (page.parent / unescape(link)).resolve() if link else page
            assert target.exists(), (page.name, link)
            if anchor and target in anchors:
                assert unescape(anchor) in anchors[target], (page.name, link, anchor)


@pytest.mark.once
def test_no_page_has_the_name_of_one_that_sphinx_makes():
    assert not {"search", "genindex", "py-modindex"} & {
        page.stem for page in (ROOT / "docs").rglob("*.md")
    }
