"""Checkpoints of which each process writes a part: on disk, damaged, and from a stranger.

No backend is involved; `tests/distributed` trains with them.
"""

import hashlib
import json
import shutil
import threading

import numpy as np
import pytest

from polus.checkpoint import shards
from polus.checkpoint.__main__ import main
from polus.checkpoint.shards import ShardFolder, temporary_name
from polus.checkpoint.state_file import MAX_JSON_BYTES
from polus.checkpoint.store import CheckpointError, DamagedError, Store, read
from polus.sharded import Grid, ShardedArray, StoredArray
from polus.state_tree import flatten_state

pytestmark = pytest.mark.once  # no backend is involved

MANIFEST, FIRST, SECOND = "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"
GRID = Grid((4, 6), ((0, 1), (0, 2, 5)))  # six parts
OWNERS = [0, 1, 0, 1, 0, 1]
VALUES = np.arange(24, dtype="float32").reshape(4, 6)


def sharded(process, value, dtype="float32"):
    boxes = enumerate(GRID.boxes())
    values = (VALUES + value).astype(dtype)
    own = {i: values[box] for i, box in boxes if OWNERS[i] == process}
    return ShardedArray(GRID, values.dtype, OWNERS, own)


def flat(process, value, dtype="float32"):
    tree = {"weights": sharded(process, value, dtype), "other": np.full(3, value), "epoch": value}
    return flatten_state(tree if process == 0 else {"weights": tree["weights"]})


def folders(store):
    path = store.new_path()
    temporary = temporary_name(path, 7)
    temporary.mkdir(parents=True)
    return [ShardFolder(path, temporary, i, 2, threading.Event()) for i in range(2)]


def write(store, value, dtype="float32"):
    first, second = folders(store)
    second.write(flat(1, value, dtype).shards)
    path = store.write(flat(0, value, dtype), {"epoch": value}, 9, first)
    second.wait_for_first()
    return path


class Alone:
    """One of two processes whose other one finds nothing, or something damaged."""

    count = 2

    def __init__(self, index, other=0):
        self.index, self.other = index, other

    def largest(self, values):
        return [max(value, self.other) for value in values]


def test_each_process_has_a_file(tmp_path, capsys):
    """They are files of the safetensors library, with the parts by name."""
    from safetensors.numpy import load_file

    path = write(Store(tmp_path), 2)
    found = load_file(path / FIRST) | load_file(path / SECOND)
    assert set(load_file(path / SECOND)) == {"weights/1", "weights/3", "weights/5"}
    for i, box in enumerate(GRID.boxes()):
        np.testing.assert_array_equal(found[f"weights/{i}"], VALUES[box] + 2)
    names = sorted(file.name for file in path.iterdir())
    assert names == [MANIFEST, FIRST, SECOND, "state.safetensors"]
    assert list(tmp_path.glob(".tmp*")) == []
    for command in ("ls", "verify", "show"):
        assert main([command, str(tmp_path)]) == 0
    assert "weights: float32 [4, 6] in 6 parts" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_any_box_is_read(tmp_path, dtype):
    import ml_dtypes

    dtype = getattr(ml_dtypes, dtype, dtype)
    expected = (VALUES + 2).astype(dtype)
    stored = read(write(Store(tmp_path), 2, dtype)).tree["weights"]
    assert isinstance(stored, StoredArray)
    assert (stored.shape, stored.dtype) == ((4, 6), expected.dtype)
    np.testing.assert_array_equal(stored.read(), expected)
    for rows in (slice(None), slice(0, 2), slice(3, 4)):
        for columns in (slice(None), slice(0, 2), slice(1, 6), slice(2, 5)):
            found = stored.read((rows, columns))
            np.testing.assert_array_equal(found, expected[rows, columns])


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_reads_its_file_and_the_parts_it_needs(tmp_path, monkeypatch, index):
    path, seen = write(Store(tmp_path), 2), []
    read_shards = shards.read_shards

    def noted(path, expected, names=None):
        seen.append((path.name, names))
        return read_shards(path, expected, names)

    monkeypatch.setattr(shards, "read_shards", noted)
    stored = Store(tmp_path).read_newest(processes=Alone(index)).tree["weights"]
    assert seen == [([FIRST, SECOND][index], None)]
    for number, box in enumerate(GRID.boxes()):
        np.testing.assert_array_equal(stored.read(box), VALUES[box] + 2)
        assert (seen[-1][1] == [f"weights/{number}"]) == (OWNERS[number] != index)
    (path / [SECOND, FIRST][index]).write_bytes(b"")
    with pytest.raises(RuntimeError, match="has changed since it was verified"):
        stored.read()


def test_damage_that_another_process_finds_counts(tmp_path, caplog):
    store = Store(tmp_path)
    first, newest = write(store, 1), write(store, 2)
    damage = bytearray((newest / SECOND).read_bytes())
    damage[-1] ^= 1
    (newest / SECOND).write_bytes(damage)
    assert read(newest, Alone(0)).tree["epoch"] == 2  # its own file is whole
    with pytest.raises(DamagedError, match=f"{SECOND} is damaged: its checksum differs"):
        read(newest, Alone(1))
    with pytest.raises(CheckpointError, match="are damaged"):
        Store(tmp_path).read_newest(processes=Alone(0, other=1))
    assert "another process has found that" in caplog.text
    for path in store.damaged():
        path.rename(path.with_name(path.name.removeprefix("damaged-")))
    with pytest.raises(CheckpointError, match="cannot be read by another process"):
        store.read_newest(processes=Alone(0, other=2))
    assert store.read_newest().path == first


def test_a_process_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch):
    store = Store(tmp_path)
    before = write(store, 1)
    first, second = folders(store)

    def full(path, arrays):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shards", full)
        with pytest.raises(OSError, match=f"{SECOND}: No space"):
            second.write(flat(1, 2).shards)
    with pytest.raises(OSError, match="process 1 could not write its shards: No space left"):
        store.write(flat(0, 2), {}, 9, first)
    assert list(tmp_path.iterdir()) == [before]
    with pytest.raises(OSError, match="the first process could not complete it"):
        second.wait_for_first()


@pytest.mark.parametrize("limit", ["WAIT_SECS", "LAST_SECS"])
def test_a_process_that_is_gone_is_not_waited_for_forever(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(shards, limit, 0.0)
    store = Store(tmp_path)
    first, _ = folders(store)
    if limit == "LAST_SECS":
        first.ended.set()
    with pytest.raises(TimeoutError, match="process 1 has not written its shards in time"):
        store.write(flat(0, 2), {}, 9, first)
    assert list(tmp_path.iterdir()) == []
    second = folders(store)[1]
    if limit == "LAST_SECS":
        second.ended.set()
    with pytest.raises(TimeoutError, match="the first process has not completed"):
        second.wait_for_first()


def test_the_next_run_removes_what_a_kill_left(tmp_path):
    store = Store(tmp_path)
    first, second = folders(store)
    second.write(flat(1, 2).shards)  # and here all are killed
    assert store.paths() == []
    store.lock().release()
    assert not first.temporary.exists()


# ---------------------------------------------------------------------- hostile input


def manifest(change):
    """A fault: changes the manifest, and seals it again."""

    def fault(path):
        found = json.loads((path / MANIFEST).read_text())
        found.pop("sha256")
        change(found)
        text = json.dumps(found, sort_keys=True).encode()
        found["sha256"] = hashlib.sha256(text).hexdigest()
        (path / MANIFEST).write_text(json.dumps(found))

    return fault


def node(**changed):
    return manifest(lambda found: found["tree"]["weights"].update(changed))


def files(**changed):
    return manifest(lambda found: found["files"].update(changed))


def header(change):
    """A fault: changes the header of the second file, with its right checksum in the manifest."""

    def fault(path):
        content = (path / SECOND).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        found = json.loads(content[8:end])
        text = json.dumps(change(found) or found).encode()
        text = len(text).to_bytes(8, "little") + text
        (path / SECOND).write_bytes(text + content[end:])
        size, sha256 = len(text) + len(content) - end, hashlib.sha256(text).hexdigest()
        files(**{SECOND: {"size": size, "sha256": sha256}})(path)

    return fault


def flipped(name, position):
    def fault(path):
        content = bytearray((path / name).read_bytes())
        content[position] ^= 1
        (path / name).write_bytes(content)

    return fault


ROWS, COLUMNS = [0, 1], [0, 2, 5]
FAULTS = {
    # damage
    "a bit of the first": (flipped(FIRST, -1), f"{FIRST} is damaged: its checksum differs"),
    "a bit of the second": (flipped(SECOND, -30), f"{SECOND} is damaged: its checksum differs"),
    "a bit of a header": (flipped(SECOND, 20), SECOND),
    "missing": (lambda path: (path / SECOND).unlink(), f"{SECOND} is damaged: No such file"),
    "cut off": (lambda path: (path / SECOND).write_bytes(b""), "0 bytes"),
    "exchanged": (lambda path: shutil.copy(path / FIRST, path / SECOND), SECOND),
    "a link": (
        lambda path: ((path / FIRST).unlink(), (path / FIRST).symlink_to(path / SECOND)),
        "not a regular file",
    ),
    # slices
    "out of range": (node(cuts=[ROWS, [0, 2, 6]]), "a part of weights is outside"),
    "far out of range": (node(cuts=[ROWS, [0, 2, 2**61]]), "a part of weights is outside"),
    "negative": (node(cuts=[ROWS, [0, -2, 5]]), "parts of weights don't begin"),
    "not from the beginning": (node(cuts=[ROWS, [1, 2, 5]]), "parts of weights don't begin"),
    "overlapping": (node(cuts=[ROWS, [0, 2, 2]]), "parts of weights overlap"),
    "reversed": (node(cuts=[ROWS, [0, 5, 2]]), "parts of weights overlap"),
    "missing part": (node(files=OWNERS[:5]), "are not as many"),
    "one part too many": (node(files=[*OWNERS, 0]), "are not as many"),
    "no parts": (node(cuts=[[], []], files=[]), "parts of weights don't begin"),
    "a cut less": (node(cuts=[ROWS, [0, 2]], files=OWNERS[:4]), "has no part weights/1"),
    "a cut elsewhere": (node(cuts=[ROWS, [0, 3, 5]]), "has no part weights/0"),
    "cuts of no axis": (node(cuts=[ROWS]), "cut along other axes"),
    "cuts are a number": (node(cuts=3), "cut along other axes"),
    "cuts are texts": (node(cuts=["01", "025"]), "don't begin"),
    "cuts are fractions": (node(cuts=[[0.0, 1.0], COLUMNS]), "don't begin"),
    "a million parts": (node(cuts=[list(range(10**6))] * 2), "outside of the array"),
    "in no file": (node(files=[0, 2, 0, 1, 0, 1]), "in a file that is not there"),
    "in a negative file": (node(files=[0, -1, 0, 1, 0, 1]), "in a file that is not there"),
    "in another file": (node(files=[1, 0, 0, 1, 0, 1]), "has no part weights/0"),
    "files are a text": (node(files="010101"), "are not as many"),
    # shapes and dtypes
    "larger": (node(shape=[4, 7]), "has no part weights/2"),
    "smaller": (node(shape=[3, 6]), "has no part weights/3"),
    "empty": (node(shape=[0, 6]), "a part of weights is outside"),
    "shape of truth values": (node(shape=[True, 6]), "cut along other axes"),
    "negative shape": (node(shape=[-4, 6]), "cut along other axes"),
    "huge shape": (node(shape=[10**300, 6]), "cut along other axes"),
    "another dtype": (node(dtype="float64"), "has no part weights/0"),
    "dtype of nothing": (node(dtype="object"), "no dtype object"),
    "another place": (node(**{"$sharded": "other"}), "no array belongs at weights"),
    "more in it": (node(more=1), "no array belongs at weights"),
    # files
    "a file more": (files(**{"shard-00002.safetensors": {"size": 0, "sha256": ""}}), "shard-00002"),
    "a path out of the folder": (
        files(**{"../../secret": {"size": 0, "sha256": ""}}),
        "other files",
    ),
    "no shards": (
        manifest(lambda found: [found["files"].pop(name) for name in (FIRST, SECOND)]),
        "other files",
    ),
    "of the unsharded format": (manifest(lambda found: found.update(format=2)), "other files"),
    "no size": (files(**{SECOND: {"sha256": ""}}), "without size"),
    "not a dict": (files(**{SECOND: None}), "without size"),
    # the header of a file
    "no metadata": (header(lambda found: found.pop("__metadata__") and None), "no dict"),
    "metadata of nothing": (header(lambda found: found.update(__metadata__={})), "other arrays"),
    "metadata of more": (
        header(lambda found: found["__metadata__"].update(more="")),
        "other arrays",
    ),
    "a checksum is a number": (
        header(lambda found: found["__metadata__"].update({"weights/1": 3})),
        "checksum differs",
    ),
    "an array of another name": (
        header(lambda found: found.update({"weights/9": found.pop("weights/1")})),
        "other arrays",
    ),
    "offsets overlap": (
        header(lambda found: found["weights/3"].update(data_offsets=[0, 24])),
        "arrays overlap",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_hostile_shards_fall_back_to_the_previous_checkpoint(tmp_path, caplog, capsys, fault):
    store = Store(tmp_path / "run")
    first, newest = write(store, 1), write(store, 2)
    change, message = FAULTS[fault]
    change(newest)
    with pytest.raises(DamagedError, match=message):
        read(newest)
    for command in ("ls", "verify", "show"):
        assert main([command, str(store.directory)]) in (0, 1)
    assert main(["verify", str(store.directory)]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    saved = store.read_newest()
    assert saved.path == first
    np.testing.assert_array_equal(saved.tree["weights"].read(), VALUES + 1)
    assert f"damaged-{newest.name}" in caplog.text


def test_shards_of_the_table_are_hostile_by_their_fault_alone(tmp_path):
    """The tools of the table, without a fault, make a checkpoint that is read."""
    path = write(Store(tmp_path), 2)
    for harmless in (node(), files(), header(lambda found: None)):
        harmless(path)
        np.testing.assert_array_equal(read(path).tree["weights"].read(), VALUES + 2)


def test_a_manifest_of_many_parts_is_small():
    """A thousand devices and a thousand variables fit into a manifest."""
    grid = Grid((1024, 64), (tuple(range(1024)), (0,)))
    array = ShardedArray(grid, "float32", [i // 8 for i in range(1024)], {})
    skeleton = json.dumps(flatten_state({"weights": array}).skeleton)
    assert 1000 * len(skeleton) < MAX_JSON_BYTES
