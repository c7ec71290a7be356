"""Files that are whole or absent."""

import errno
import os
from pathlib import Path

import pytest

from polus.files import atomic_write, check_directory, open_regular

pytestmark = pytest.mark.once  # no backend is involved


def test_new_content_replaces_the_old(tmp_path):
    target = tmp_path / "runs" / "best.keras"
    for content in ("first", "second"):
        with atomic_write(target) as temporary:
            assert temporary.suffix == ".keras"
            temporary.write_text(content)
        assert target.read_text() == content
    assert os.listdir(target.parent) == ["best.keras"]


def test_folder_is_renamed_with_its_content(tmp_path):
    with atomic_write(tmp_path / "model") as temporary:
        (temporary / "assets").mkdir(parents=True)
        (temporary / "assets" / "words").write_text("a")
    assert (tmp_path / "model" / "assets" / "words").read_text() == "a"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_error_leaves_the_old_content_and_no_temporary_file(tmp_path, error):
    target = tmp_path / "best.keras"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["best.keras"]


def test_content_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with atomic_write(tmp_path / "best.keras") as temporary:
        temporary.write_text("new")
    assert events == ["fsync", "rename", "fsync"]


def test_names_of_new_parent_folders_are_flushed(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    with atomic_write(tmp_path / "a" / "b" / "best.keras") as temporary:
        temporary.write_text("new")
    # The entry of a is in tmp_path, that of b in a, that of the file in b.
    assert [path for path in flushed if ".tmp-" not in path] == [
        str(tmp_path),
        str(tmp_path / "a"),
        str(tmp_path / "a" / "b"),
    ]


def test_open_regular_reads_files_only(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"text"
    for path in (tmp_path / "link", tmp_path / "folder", tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


def test_check_directory_returns_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    for path in ("runs", "new", "new/folder", "link", Path("runs"), "."):
        assert check_directory(path) == Path(os.path.abspath(path))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (3, TypeError, "resume must be the path of a folder, got 3."),
        (True, TypeError, "got True"),
        (b"runs", TypeError, "got b'runs'"),
        ("", ValueError, "resume must be the path of a folder, got ''."),
        ("ru\0ns", ValueError, r"got 'ru\\x00ns'"),
        ("file", ValueError, "resume must be a folder, got 'file': .*/file is not a folder."),
        ("file/below/it", ValueError, "got 'file/below/it': .*/file is not a folder."),
        ("dangling", ValueError, ".*/dangling is a link to 'nowhere', which does not exist."),
        ("dangling/run", ValueError, ".*/dangling is a link to 'nowhere'"),
        ("loop", ValueError, ".*/loop is a link to 'loop'"),
        ("n" * 300, ValueError, "File name too long"),
    ],
)
def test_check_directory_raises(tmp_path, monkeypatch, path, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(error, match=message):
        check_directory(path, "resume")


def test_check_directory_raises_for_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "scandir", denied)  # tests may run as root, who may read anything
    with pytest.raises(ValueError, match="Permission denied"):
        check_directory(tmp_path)


def test_a_tilde_is_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_directory("~/runs/a") == tmp_path / "runs" / "a"
