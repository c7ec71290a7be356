"""Files that are whole or absent."""

import os

import pytest

from polus.files import atomic_write


def test_the_new_content_replaces_the_old(tmp_path):
    target = tmp_path / "runs" / "best.keras"
    for content in ("first", "second"):
        with atomic_write(target) as temporary:
            assert temporary.suffix == ".keras"
            temporary.write_text(content)
        assert target.read_text() == content
    assert os.listdir(target.parent) == ["best.keras"]


def test_a_folder_gets_its_name_with_all_that_is_in_it(tmp_path):
    with atomic_write(tmp_path / "model") as temporary:
        (temporary / "assets").mkdir(parents=True)
        (temporary / "assets" / "words").write_text("a")
    assert (tmp_path / "model" / "assets" / "words").read_text() == "a"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_content_and_no_rest(tmp_path, error):
    target = tmp_path / "best.keras"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["best.keras"]


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with atomic_write(tmp_path / "best.keras") as temporary:
        temporary.write_text("new")
    assert events == ["fsync", "rename", "fsync"]
