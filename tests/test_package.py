"""The packages: what their pages show, and what is in them."""

import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
build = pytest.importorskip("hatchling.build")
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not (ROOT / "hatch_build.py").exists(), reason="not the source tree"),
]


def test_links_of_the_readme_are_absolute_wherever_it_is_shown(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from hatch_build import absolute_links

    text = "[a](docs/a.md#b), [b](https://c.invalid), [d](#e) and ![f](g.png)"
    assert absolute_links(text, "https://host.invalid/polus") == (
        "[a](https://host.invalid/polus/blob/main/docs/a.md#b), [b](https://c.invalid), [d](#e) "
        "and ![f](https://host.invalid/polus/blob/main/g.png)"
    )


def test_the_source_distribution_holds_what_the_tests_read(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        (about,) = (name for name in archive.getnames() if name.endswith("PKG-INFO"))
        metadata = archive.extractfile(about).read().decode()
    folders = ("src/polus", "tests", "docs", "examples", "benchmarks")
    wanted = {p.relative_to(ROOT).as_posix() for f in folders for p in (ROOT / f).rglob("*.*")}
    wanted = {name for name in wanted if "__pycache__" not in name and "_cache" not in name}
    assert wanted - names == set()
    assert {"README.md", "CHANGELOG.md", "Makefile", "pyproject.toml"} <= names
    assert not any(name.startswith((".venv", ".ci", "runs")) for name in names)
    assert "](docs/" not in metadata
    assert "Project-URL: Source, https://" in metadata


def test_a_release_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT)
    import release

    (tmp_path / "src" / "polus").mkdir(parents=True)
    (tmp_path / "src" / "polus" / "__init__.py").write_text('__version__ = "0.2.0.dev0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n")
    (tmp_path / "pyproject.toml").write_text('repository = "https://repository.invalid/polus"\n')
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "git", lambda *a: " M file" if a[0] == "status" else "v0.2.0")
    assert len(list(release.problems("0.2.0"))) == 5
    monkeypatch.setattr(release.sys, "argv", ["release.py", "0.2.0", "--facts"])
    assert release.main() == 1
    assert "no section `## [0.2.0] - <date>`" in capsys.readouterr().out

    (tmp_path / "src" / "polus" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.2.0] - 2027-01-31\n")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(release, "git", lambda *a: "")
    assert release.main() == 0
    assert "git tag v0.2.0" in capsys.readouterr().out
