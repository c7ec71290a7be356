"""Checkpoints on disk. No backend is involved, so one process covers all three."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polus.checkpoint import store as store_module
from polus.checkpoint.state_file import write_arrays
from polus.checkpoint.store import CheckpointError, DamagedError, Store, read, verify
from polus.state_tree import STORED_DTYPES, flatten_state, unflatten_state

pytestmark = pytest.mark.once  # no backend is involved


def tree_of(value):
    return {
        "variables": [np.full((3, 2), value, "float32"), np.full(2, value, "bfloat16")],
        "progress": {"epoch": value, "step": 2 * value},
    }


def write(store, value, keep=3):
    return store.write(flatten_state(tree_of(value)), {"epoch": value}, keep)


def assert_same(found, expected):
    """The same structure, dtypes and bits; NumPy and JSON leaves alike."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype.newbyteorder("="), expected.shape)
        native = np.array(expected, found.dtype, order="C")
        assert found.tobytes() == native.tobytes()
    else:
        assert type(found) is type(expected)
        assert repr(found) == repr(expected)


ARRAYS = {
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(6, dtype="int64").reshape(2, 3).T,
    "strided": np.arange(10, dtype="float16")[::3],
    "big endian": np.arange(4, dtype=">i4"),
    "scalar": np.array(3.5, "float32"),
    "empty": np.zeros((0, 4), "int8"),
    "bool": np.array([True, False]),
    "not a number": np.array([0x7FC00001, 0xFFC00000, 0x80000000], "uint32").view("float32"),
    "complex": np.array([1 + 2j]),
    "bfloat16": np.arange(-3, 3).astype("bfloat16").reshape(2, 3).T,
    "bfloat16 scalar": np.array(1.5, ml_dtypes.bfloat16),
    "float8": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
    "int4": np.arange(-4, 4).astype(ml_dtypes.int4),
    "uint64": np.array([2**64 - 1], "uint64"),
}


def test_tree_round_trips_bit_for_bit(tmp_path):
    tree = {
        "arrays": ARRAYS,
        "names": {"a/b": {"c": np.zeros(1)}, "a": {"b/c": np.ones(1)}, "a~1b": {"c": np.ones(2)}},
        "values": [None, True, 0, 2**200, 0.1, float("nan"), float("-inf"), -0.0, "ä/~", [], {}],
    }
    store = Store(tmp_path / "new" / "folder")
    path = store.write(flatten_state(tree), {"versions": {"numpy": "2"}}, keep=1)
    saved = store.read_newest()
    assert_same(saved.tree, tree)
    assert saved.facts == {"versions": {"numpy": "2"}}
    assert saved.path == path
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state.safetensors"]
    # Others can read it too, and find the arrays by their place in the tree.
    np.testing.assert_array_equal(
        load_file(path / "state.safetensors")["arrays/fortran"], ARRAYS["fortran"]
    )


def test_flatten_copies():
    array = np.zeros(2)
    snapshot = flatten_state({"array": array})
    array += 1
    assert_same(unflatten_state(snapshot), {"array": np.zeros(2)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "At callbacks/0/seen the state has a set"),
        (b"bytes", "np.frombuffer"),
        (np.array([object()]), "an array of object"),
        (np.array(["text"]), "an array of str"),
        ({1: "one"}, r"keys \[1\]"),
    ],
)
def test_values_that_need_pickle_raise_with_their_place(value, message):
    with pytest.raises(TypeError, match=message):
        flatten_state({"callbacks": [{"seen": value}]})


def test_keep_removes_the_oldest(tmp_path):
    store = Store(tmp_path)
    assert store.read_newest() is None
    for value in range(12):
        write(store, value, keep=3)
    assert [read(path).tree["progress"]["epoch"] for path in store.paths()] == [9, 10, 11]
    assert sorted(os.listdir(tmp_path)) == [path.name for path in store.paths()]


def test_foreign_files_are_left_alone(tmp_path):
    store, others = Store(tmp_path), ["checkpoint-best", "checkpoint-00000001-mine", ".tmp-mine"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    lock = store.lock()
    paths = [write(store, value, keep=2) for value in range(4)]
    lock.release()
    expected = [".lock", "checkpoint-notes.txt", *others, *(path.name for path in paths[2:])]
    assert sorted(os.listdir(tmp_path)) == sorted(expected)
    assert paths[0].name == "checkpoint-00000001"
    assert store.paths() == paths[2:]
    assert_same(store.read_newest().tree, tree_of(3))


class Killed(BaseException):
    """Stands for SIGKILL: from here on the process does nothing, not even tidy up."""


class Disk:
    """Lets one file operation in a folder fail: the n-th, counted from zero.

    Python's own audit events tell of each opening, making, renaming, listing and removing, whoever
    asks for it; the flushing and the writing itself, which they don't tell of, are wrapped below.
    """

    def __init__(self):
        self.folder = None

    def start(self, folder, fails_at=None, how=None):
        self.folder, self.fails_at, self.how = str(folder), fails_at, how
        self.count, self.dead = 0, False

    def stop(self):
        self.folder = None

    def audit(self, event, arguments):
        watched = event == "open" or event.startswith(("os.", "shutil."))
        if self.folder and watched and self.folder in str(arguments[:1]):
            self.operation()

    def operation(self, half=lambda: None):
        if not self.folder:
            return
        if self.dead:
            raise Killed
        self.count += 1
        if self.count - 1 == self.fails_at:
            self.dead = self.how == "killed"
            half()
            raise Killed if self.dead else OSError(self.how, os.strerror(self.how))


disk = Disk()
sys.addaudithook(disk.audit)


@pytest.fixture
def faulty_disk(monkeypatch):
    fsync, write_text = os.fsync, store_module.Path.write_text
    write_arrays = store_module.write_arrays

    def halved(path, write):
        def half():
            folder, disk.folder = disk.folder, None  # the fault itself meets none
            write()
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            disk.folder = folder

        disk.operation(half)
        return write()

    monkeypatch.setattr(os, "fsync", lambda fd: (disk.operation(), fsync(fd)))
    monkeypatch.setattr(
        store_module,
        "write_arrays",
        lambda path, arrays: halved(path, lambda: write_arrays(path, arrays)),
    )
    monkeypatch.setattr(
        store_module.Path,
        "write_text",
        lambda path, text: halved(path, lambda: write_text(path, text)),
    )
    yield disk
    disk.stop()


def count_operations(disk, folder):
    store = Store(folder)
    for value in range(2):
        write(store, value, keep=2)
    disk.start(folder)
    write(store, 2, keep=2)
    disk.stop()
    return disk.count


@pytest.mark.parametrize("how", ["killed", errno.ENOSPC, errno.EIO])
def test_save_that_fails_at_any_operation_leaves_a_valid_checkpoint(tmp_path, faulty_disk, how):
    operations = count_operations(faulty_disk, tmp_path / "count")
    assert operations > 20
    for fails_at in range(operations):
        store = Store(tmp_path / str(fails_at))
        for value in range(2):
            write(store, value, keep=2)
        faulty_disk.start(store.directory, fails_at, how)
        try:
            write(store, 2, keep=2)
            written = True
        except (Killed, OSError, CheckpointError):
            written = False
        faulty_disk.stop()

        again = Store(store.directory)
        lock = again.lock()
        saved = again.read_newest()
        epoch = saved.tree["progress"]["epoch"]
        assert epoch == 2 if written else epoch in (1, 2), fails_at
        assert_same(saved.tree, tree_of(epoch))
        write(again, 3, keep=2)
        assert_same(again.read_newest().tree, tree_of(3))
        lock.release()
        # Nothing is left over, and no whole checkpoint of the two to be kept was lost.
        rest = {name.removeprefix("damaged-") for name in os.listdir(again.directory)}
        assert all(name.startswith("checkpoint-") for name in rest - {".lock"}), fails_at
        assert len(again.paths()) == 2, fails_at


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_checkpoint_that_reads_back_differently_is_set_aside(tmp_path, monkeypatch, name):
    """A disk that loses a bit on the way, and says nothing."""
    store = Store(tmp_path)
    write(store, 1)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (flip(-9)(a / name), replace(a, b)))
    with pytest.raises(DamagedError, match=name):
        write(store, 2, keep=1)
    assert_same(store.read_newest().tree, tree_of(1))


def test_state_file_matches_the_safetensors_library(tmp_path):
    arrays = {name: np.arange(3).astype(name)[None] for name in STORED_DTYPES}
    arrays |= {"scalar": np.array(1.5), "empty": np.zeros((0, 4)), "ä/\\": np.zeros(1)}
    write_arrays(tmp_path / "ours", arrays)
    save_file(arrays, tmp_path / "theirs")
    found, expected = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert_same(dict(sorted(found.items())), dict(sorted(expected.items())))
    content = (tmp_path / "ours").read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:data]).items():
        assert (data + entry["data_offsets"][0]) % arrays[name].itemsize == 0  # aligned


def test_flatten_reuses_buffers():
    first = flatten_state(ARRAYS | {"grows": np.zeros(2)})
    changed = {name: np.roll(array, 1) for name, array in ARRAYS.items()}
    expected = changed | {"grows": np.ones(3), "new": np.ones(1)}
    second = flatten_state(expected, first.arrays)
    assert_same(unflatten_state(second), expected)
    for name in changed:
        assert np.shares_memory(second.arrays[name], first.arrays[name]) or not changed[name].size


def truncate(length):
    def fault(path):
        with open(path, "r+b") as file:
            file.truncate(length if length >= 0 else path.stat().st_size + length)

    return fault


def flip(position):
    def fault(path):
        content = bytearray(path.read_bytes())
        content[position] ^= 4
        path.write_bytes(content)

    return fault


FAULTS = {
    "empty": truncate(0),
    "cut in the length": truncate(5),
    "cut in the header": truncate(40),
    "cut before the last byte": truncate(-1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a null": lambda path: path.write_text("null"),
    "a list": lambda path: path.write_text("[]"),
    "bit in the first byte": flip(0),
    "bit in the middle": flip(60),
    "bit in the last byte": flip(-1),
}


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, caplog, name, fault):
    store = Store(tmp_path)
    for value in (1, 2):
        path = write(store, value)
    FAULTS[fault](path / name)
    assert_same(store.read_newest().tree, tree_of(1))
    assert [p.name for p in store.damaged()] == [f"damaged-{path.name}"]
    assert f"damaged-{path.name}" in caplog.text
    assert name in caplog.text


def test_every_flipped_bit_is_detected(tmp_path):
    path = write(Store(tmp_path), 1)
    generator = np.random.default_rng(0)
    for file in path.iterdir():
        content = file.read_bytes()
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= 1 << int(generator.integers(8))
            file.write_bytes(flipped)
            with pytest.raises(DamagedError):
                verify(path)
        file.write_bytes(content)
    verify(path)


def test_empty_checkpoint_folder_is_damaged(tmp_path):
    store = Store(tmp_path)
    write(store, 1)
    (tmp_path / "checkpoint-00000009").mkdir()
    assert_same(store.read_newest().tree, tree_of(1))
    assert write(store, 2).name == "checkpoint-00000010"  # a number is used once


def test_all_damaged_raises(tmp_path):
    store = Store(tmp_path)
    for value in (1, 2):
        truncate(9)(write(store, value) / "state.safetensors")
    for _ in range(2):  # the second time all have been set aside already
        with pytest.raises(CheckpointError, match=r"All checkpoints in .* are damaged") as error:
            store.read_newest()
        assert "checkpoint-00000001, damaged-checkpoint-00000002" in str(error.value)


def test_damaged_checkpoint_on_read_only_disk_is_skipped(tmp_path, monkeypatch, caplog):
    store = Store(tmp_path)
    for value in (1, 2):
        path = write(store, value)
    truncate(9)(path / "state.safetensors")

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "rename", read_only)
    assert_same(store.read_newest().tree, tree_of(1))
    assert "Read-only file system" in caplog.text


def reseal(path, change=None, **parts):
    """Changes a manifest and gives it a checksum that is right, as a stranger would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256", None)
    manifest |= parts
    if change is not None:
        change(manifest)
    text = json.dumps(manifest, sort_keys=True).encode()
    sealed = manifest | {"sha256": hashlib.sha256(text).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(sealed))


@pytest.mark.parametrize("found", [1, 4])
def test_other_formats_raise_and_stay(tmp_path, found):
    store = Store(tmp_path)
    path = write(store, 1)
    reseal(path, format=found)
    message = f"has format {found}, and this version of Polus reads formats 2 and 3. Install"
    with pytest.raises(CheckpointError, match=message):
        store.read_newest()
    assert store.paths() == [path]


def test_full_disk_raises_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    store = Store(tmp_path)
    write(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.write(flatten_state({"big": np.ones(100_000)}), {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["checkpoint-00000001"]
    assert_same(store.read_newest().tree, tree_of(1))


def test_folder_is_locked(tmp_path):
    lock = Store(tmp_path).lock()
    with pytest.raises(CheckpointError, match="Another run is writing its checkpoints to"):
        Store(tmp_path).lock()
    lock.release()
    Store(tmp_path).lock().release()


def test_killed_run_releases_its_lock(tmp_path):
    store = Store(tmp_path)
    rest = tmp_path / ".tmp-1234-checkpoint-00000001"
    rest.mkdir()
    program = (
        "import filelock, os, sys\n"
        "lock = filelock.FileLock(sys.argv[1])\n"
        "lock.acquire()\n"
        "if os.fork() == 0:\n"  # as the workers of a loader, which live on for a while
        "    print('locked and forked', flush=True)\n"
        "    sys.stdin.read()\n"
        "    os._exit(0)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdout.readline() == b"locked and forked\n"
        with pytest.raises(CheckpointError, match="Another run"):
            store.lock()
        assert rest.exists()
        child.send_signal(signal.SIGKILL)
        child.wait()
        store.lock().release()
    assert not rest.exists()
