"""Checkpoints from a stranger: their checksums are right, and their content is not.

Each one is damaged, so the checkpoint before it is used. Nothing hangs, nothing outside of the
folder is read, and nothing raw is printed. No backend is involved.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import unicodedata

import numpy as np
import pytest

from polus.checkpoint.__main__ import main
from polus.checkpoint.store import CheckpointError, DamagedError, Store, read
from polus.state_tree import flatten_state

pytestmark = pytest.mark.once  # no backend is involved

STATE, MANIFEST = "state.safetensors", "manifest.json"


def write(store, value, facts=None):
    tree = {"weights": np.full((3, 2), value, "float32"), "epoch": value}
    return store.write(flatten_state(tree), facts or {"epoch": value}, keep=9)


def sealed(manifest):
    manifest.pop("sha256", None)
    text = json.dumps(manifest, sort_keys=True).encode()
    return json.dumps(manifest | {"sha256": hashlib.sha256(text).hexdigest()})


def manifest(change):
    """A fault: changes the manifest, and seals it again."""

    def fault(path):
        found = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(sealed(change(found) or found))

    return fault


def text(content):
    """A fault: another text in the place of the manifest."""
    content = content if isinstance(content, bytes) else content.encode()
    return lambda path: (path / MANIFEST).write_bytes(content)


def parts(**changed):
    return manifest(lambda found: found | changed)


def file(**changed):
    return manifest(lambda found: found["files"][STATE].update(changed))


def array(**changed):
    return manifest(lambda found: found["tree"]["weights"].update(changed))


def state(content):
    """A fault: another file of arrays, with its right size and checksum in the manifest."""

    def fault(path):
        (path / STATE).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        file(size=len(content), sha256=digest)(path)

    return fault


def header(content, data=24, length=None):
    content = content if isinstance(content, str) else json.dumps(content)
    length = len(content) if length is None else length
    return state(length.to_bytes(8, "little") + content.encode() + bytes(data))


def entry(dtype="F32", shape=(3, 2), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def replace(name, make):
    """A fault: something that is no regular file in the place of one."""

    def fault(path):
        target = path / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()
        make(target)

    return fault


def in_place_of_folder(make):
    def fault(path):
        shutil.rmtree(path)
        make(path)

    return fault


def elsewhere(path):
    """A whole checkpoint in another folder."""
    return write(Store(path.parent.parent / "elsewhere"), 7)


def listen(path):
    before = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def sparse(name):
    return lambda path: os.truncate(path / name, 2**40)


def nested(depth):
    tree = 0
    for _ in range(depth):
        tree = [tree]
    return tree


NAN = float("nan")
FAULTS = {
    # no regular files
    "state: link to an endless device": replace(STATE, lambda p: p.symlink_to("/dev/zero")),
    "manifest: link to an endless device": replace(MANIFEST, lambda p: p.symlink_to("/dev/zero")),
    "state: FIFO": replace(STATE, os.mkfifo),
    "manifest: FIFO": replace(MANIFEST, os.mkfifo),
    "state: socket": replace(STATE, listen),
    "manifest: socket": replace(MANIFEST, listen),
    "state: link out of the folder": lambda p: replace(
        STATE, lambda target: target.symlink_to(elsewhere(p) / STATE)
    )(p),
    "manifest: link out of the folder": lambda p: replace(
        MANIFEST, lambda target: target.symlink_to(elsewhere(p) / MANIFEST)
    )(p),
    "manifest: dangling link": replace(MANIFEST, lambda p: p.symlink_to("nowhere")),
    "manifest: link to itself": replace(MANIFEST, lambda p: p.symlink_to(MANIFEST)),
    "folder: link out of the folder": in_place_of_folder(lambda p: p.symlink_to(elsewhere(p))),
    "folder: file": in_place_of_folder(lambda p: p.write_text("")),
    "folder: FIFO": in_place_of_folder(os.mkfifo),
    # sizes
    "manifest: a terabyte": sparse(MANIFEST),
    "state: a terabyte": sparse(STATE),
    "state: a terabyte, as the manifest says": lambda p: (sparse(STATE)(p), file(size=2**40)(p)),
    "manifest: large": text("[" + "[],[[]]," * 2**23 + "0]"),
    # texts
    "manifest: nested lists": text("[" * 10**6),
    "manifest: nested dicts": text('{"a":' * 10**6),
    "manifest: null": text("null"),
    "manifest: number": text("3"),
    "manifest: not a number": text("NaN"),
    "manifest: text": text('"manifest"'),
    "manifest: list": text('["format", "files", "facts", "tree", "sha256"]'),
    "manifest: no UTF-8": text(b'{"format": "\xff\xfe"}'),
    "manifest: a key twice": text('{"format": 2, "format": 2}'),
    "manifest: long number": text('{"format": ' + "9" * 10**5 + "}"),
    "manifest: checksum of another kind": text('{"format": 2, "sha256": []}'),
    # parts
    "format: true": parts(format=True),
    "format: null": parts(format=None),
    "format: text": parts(format="2"),
    "format: list": parts(format=[2]),
    "format: not a number": parts(format=NAN),
    "facts: list": parts(facts=[1]),
    "facts: null": parts(facts=None),
    "another part": parts(more=1),
    "no tree": manifest(lambda found: found.pop("tree") and None),
    "tree: deep": parts(tree=nested(300)),
    "tree: as deep as JSON goes": parts(tree=nested(900)),
    "files: none": parts(files={}),
    "files: list": parts(files=[STATE]),
    "files: a text in it": parts(files={STATE: "0"}),
    "files: a path out of the folder": parts(files={"../../secret": {"size": 0, "sha256": ""}}),
    "files: an absolute path": parts(files={"/etc/passwd": {"size": 0, "sha256": ""}}),
    "files: one more": manifest(lambda found: found["files"].update({"/dev/zero": {}})),
    "size: negative": file(size=-1),
    "size: not a number": file(size=NAN),
    "size: infinite": file(size=float("inf")),
    "size: true": file(size=True),
    "size: text": file(size="24"),
    "size: huge": file(size=10**300),
    "checksum: null": file(sha256=None),
    "checksum: another": file(sha256="0" * 64),
    # arrays in the tree
    "array: of another place": array(**{"$array": "epoch"}),
    "array: not in the file": manifest(
        lambda found: found["tree"].update(new={"$array": "new", "dtype": "int8", "shape": [1]})
    ),
    "array: its name is a list": array(**{"$array": ["weights"]}),
    "array: more in it": array(more=1),
    "array: no shape": manifest(lambda found: found["tree"]["weights"].pop("shape") and None),
    "shape: negative": array(shape=[-3, -2]),
    "shape: minus one": array(shape=[-1, 2]),
    "shape: smaller": array(shape=[3, 1]),
    "shape: larger": array(shape=[10**9, 10**9]),
    "shape: overflows to nothing": array(shape=[0, 2**64]),
    "shape: overflows to its size": array(shape=[2**63, 2, 3, 2]),
    "shape: not a number": array(shape=[NAN, 2]),
    "shape: fraction": array(shape=[3.0, 2.0]),
    "shape: texts": array(shape=["3", "2"]),
    "shape: a number": array(shape=6),
    "shape: a million axes": array(shape=[1] * 10**6),
    "shape: truth values": array(shape=[True] * 3),
    "dtype: object": array(dtype="object"),
    "dtype: of nothing": array(dtype="V4"),
    "dtype: structure": array(dtype="f4,f4"),
    "dtype: subarray": array(dtype="(2,)f4"),
    "dtype: time": array(dtype="datetime64[s]"),
    "dtype: a name of its library": array(dtype="finfo"),
    "dtype: null": array(dtype=None),
    "dtype: of another size": array(dtype="float64"),
    "dtype: unknown size": array(dtype="float999"),
    # the header of the arrays
    "header: shorter than its length": state(b"\0" * 7),
    "header: of no length": header("", data=0),
    "header: longer than the file": header({"weights": entry()}, length=10**6),
    "header: the longest there is": header({"weights": entry()}, length=2**64 - 1),
    "header: no JSON": header("{weights}"),
    "header: list": header([entry()]),
    "header: nested": header("[" * 10**6),
    "header: metadata": header({"__metadata__": {"a": "b"}, "weights": entry()}),
    "header: a name twice": header(
        '{"weights": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}, '
        '"weights": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}}'
    ),
    "header: an entry is null": header({"weights": None}),
    "header: more in an entry": header({"weights": entry(more=1)}),
    "header: unknown dtype": header({"weights": entry(dtype="F128")}),
    "header: dtype is a list": header({"weights": entry(dtype=["F32"])}),
    "header: negative shape": header({"weights": entry(shape=(-3, -2))}),
    "header: another shape": header({"weights": entry(shape=(3, 3))}),
    "header: a million axes": header({"weights": entry(shape=[10**18] * 10**6)}),
    "offsets: overlap": header(
        {"weights": entry(), "other": entry(shape=[3], offsets=(0, 12))}, data=24
    ),
    "offsets: overlap in part": header(
        {"weights": entry(), "other": entry(offsets=(12, 36))}, data=36
    ),
    "offsets: a gap": header({"weights": entry(offsets=(8, 32))}, data=32),
    "offsets: bytes of nobody": header({"weights": entry()}, data=32),
    "offsets: beyond the end": header({"weights": entry()}, data=20),
    "offsets: negative": header({"weights": entry(offsets=(-24, 0))}),
    "offsets: reversed": header({"weights": entry(offsets=(24, 0))}),
    "offsets: not a number": header({"weights": entry(offsets=(NAN, NAN))}),
    "offsets: fractions": header({"weights": entry(offsets=(0.0, 24.0))}),
    "offsets: three": header({"weights": entry(offsets=(0, 12, 24))}),
    "offsets: huge": header({"weights": entry(offsets=(2**63, 2**63 + 24))}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_hostile_checkpoint_falls_back_to_the_previous_one(tmp_path, caplog, capsys, fault):
    store = Store(tmp_path / "run")
    first, newest = write(store, 1), write(store, 2)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    FAULTS[fault](newest)

    with pytest.raises(DamagedError):
        read(newest)
    for command in ("ls", "verify", "show"):
        assert main([command, str(store.directory)]) in (0, 1)
    assert main(["verify", str(store.directory)]) == 1
    assert "DAMAGED" in capsys.readouterr().out

    saved = store.read_newest()
    assert saved.path == first
    assert saved.tree["epoch"] == 1
    assert f"damaged-{newest.name}" in caplog.text
    assert [path.name for path in store.damaged()] == [f"damaged-{newest.name}"]
    assert write(store, 3).name == "checkpoint-00000003"
    assert secret.read_text() == "secret"


def test_checkpoint_larger_than_the_memory_raises_at_once(tmp_path):
    path = write(Store(tmp_path), 1)
    size = 2**40
    content = json.dumps({"weights": entry(shape=[size // 4], offsets=(0, size))})
    state(len(content).to_bytes(8, "little") + content.encode())(path)
    os.truncate(path / STATE, 8 + len(content) + size)
    file(size=8 + len(content) + size)(path)
    with pytest.raises(CheckpointError, match="larger than the memory") as error:
        read(path)
    assert not isinstance(error.value, DamagedError)


def test_checkpoints_of_the_table_are_hostile_by_their_fault_alone(tmp_path):
    """The tools of the table, without a fault, make a checkpoint that is read."""
    path = write(Store(tmp_path), 2)
    for harmless in (parts(), file(), array(), header({"weights": entry()})):
        harmless(path)
        assert read(path).tree["weights"].shape == (3, 2)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_unreadable_checkpoint_is_not_damaged(tmp_path, monkeypatch, capsys, name, number):
    store = Store(tmp_path)
    paths = [write(store, 1), write(store, 2)]
    opened = os.open

    def denied(path, *arguments, **kwargs):
        if str(path) == str(paths[1] / name):  # tests may run as root, who may read anything
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        message = f"{paths[1] / name} cannot be read: {os.strerror(number)}"
        with pytest.raises(CheckpointError, match=message):
            store.read_newest()
        assert main(["verify", str(tmp_path)]) == 1
        assert "NOT READ" in capsys.readouterr().out
    assert store.paths() == paths
    assert store.read_newest().tree["epoch"] == 2


def test_file_that_its_disk_has_lost_is_damaged(tmp_path, monkeypatch):
    store = Store(tmp_path)
    first, newest = write(store, 1), write(store, 2)
    opened = os.open

    def broken(path, *arguments, **kwargs):
        if str(path) == str(newest / STATE):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", broken)
        assert store.read_newest().path == first


def test_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path, monkeypatch):
    store = Store(tmp_path)
    write(store, 1)

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(PermissionError):
        store.read_newest()


ESCAPES = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "a\rb\nc\td",
    "\u202e\u200f",
    "\ud800",
    "\x9b1m",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_command_line_prints_no_control_characters(tmp_path, capsys, escape):
    store = Store(tmp_path)
    path = write(store, 1)
    facts = {"saved": escape, escape: {escape: [escape]}, "epoch": {escape: 1}, "epochs": NAN}
    tree = {escape: [{escape: escape}], "v": [{"path": escape, "value": 1}], "s": escape, "l": []}
    manifest(lambda found: found | {"facts": facts, "tree": tree})(path)
    header({}, data=0)(path)
    for command in ("ls", "verify", "show"):
        assert main([command, str(tmp_path)]) == 0
    (tmp_path / "checkpoint-00000009").mkdir()
    write(store, 2)
    manifest(lambda found: found["tree"]["weights"].update(dtype=escape))(store.paths()[-1])
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["show", str(tmp_path)]) == 1
    assert main(["ls", str(tmp_path / "none" / escape)]) == 1
    captured = capsys.readouterr()
    for character in (captured.out + captured.err).replace("\n", ""):
        assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co"), repr(character)
    assert "a\\rb\\nc\\td" in captured.out or escape != ESCAPES[2]


@pytest.mark.parametrize("tree", [None, 3, "text", [], {}, [[1], {"a": 2}], NAN])
def test_command_line_shows_any_tree(tmp_path, capsys, tree):
    path = write(Store(tmp_path), 1)
    parts(tree=tree)(path)
    header({}, data=0)(path)
    assert main(["show", str(tmp_path)]) == 0
    assert main(["ls", str(path)]) == 0
    assert "state:" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["", "a\0b", "file", "file/run"])
def test_command_line_says_that_a_path_is_no_folder(tmp_path, monkeypatch, capsys, argument):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["ls", argument]) == 1
    assert "directory must be" in capsys.readouterr().err
