"""Checkpoints on disk: each is whole, or is not there, or is known to be damaged.

    DIRECTORY/checkpoint-00000007/state.safetensors    the arrays
                                 /manifest.json        everything else, sizes and checksums
    DIRECTORY/damaged-checkpoint-00000006/             did not verify when a run wanted to resume
    DIRECTORY/.lock                                    held by the run that writes here

There is no pointer to the latest: the one with the highest number that verifies is it. Nothing is
pickled: a checkpoint can be read without running what is in it.
"""

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from polus.files import TEMPORARY_PREFIX, atomic_write, remove

FORMAT = 1
STATE = "state.safetensors"
MANIFEST = "manifest.json"
DAMAGED_PREFIX = "damaged-"
NAME = "checkpoint-([0-9]{8,})"

DTYPES = {  # of arrays in a safetensors file, as NumPy calls them
    "bool": "BOOL",
    **{f"{kind}{n}": f"{kind[0].upper()}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)},
    **{f"float{n}": f"F{n}" for n in (16, 32, 64)},
}
ARRAY = "$array"  # marks in the manifest where an array of the state file belongs

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """No checkpoint can be written or used; the message says why and what to do."""


class DamagedError(CheckpointError):
    """The files of one checkpoint are not what was written."""


class Snapshot(NamedTuple):
    """A tree taken apart: what JSON can hold, and the arrays by the names they are stored under."""

    skeleton: Any
    arrays: dict[str, np.ndarray]


class Saved(NamedTuple):
    """A checkpoint that was read: its folder, the tree, and the facts that were written with it."""

    path: Path
    tree: Any
    facts: dict[str, Any]


def flatten_state(tree: Any, into: Mapping[str, np.ndarray] | None = None) -> Snapshot:
    """Copies a tree of dicts, lists, JSON values and NumPy arrays, so that its owner may go on.

    Args:
        tree: What is copied.
        into: The arrays of an earlier snapshot that nobody needs any more: they are overwritten
            where they fit, and no fresh memory is asked for.

    Raises:
        TypeError: If something else is in it; the message says where.
    """
    arrays: dict[str, np.ndarray] = {}
    into = {} if into is None else into

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, np.ndarray | np.generic):
            name = node.dtype.name
            if node.dtype.kind not in "biufc" and not hasattr(ml_dtypes, name):
                raise TypeError(f"At {path} the state has an array of {name}. Give numbers.")
            # A buffer is written as it lies: scrambled, unless in C order and native.
            array = _room(into.get(path), node)
            array[...] = node
            # NumPy can't load bfloat16 from such a file, which knows no complex128, ...
            arrays[path] = array if name in DTYPES else _bytes(array)
            return {ARRAY: path, "dtype": name, "shape": list(array.shape)}
        if isinstance(node, Mapping):
            if ARRAY in node or not all(isinstance(key, str) for key in node):
                raise TypeError(
                    f"At {path or 'its root'} the state has a dict with the keys {list(node)}. "
                    f"Keys have to be strings other than {ARRAY!r}."
                )
            return {key: visit(node[key], _join(path, key)) for key in node}
        if isinstance(node, list | tuple):
            return [visit(child, _join(path, str(i))) for i, child in enumerate(node)]
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(
            f"At {path or 'its root'} the state has a {type(node).__name__}. It is stored without "
            "pickle: give dicts, lists, numbers, strings, None and NumPy arrays "
            "(bytes as np.frombuffer(value, np.uint8))."
        )

    return Snapshot(visit(tree, ""), arrays)


def _room(used: np.ndarray | None, node: Any) -> np.ndarray:
    """Memory for a copy of `node`, in C order and native bytes: that of `used` if it is as much."""
    dtype = node.dtype.newbyteorder("=")
    if used is None or used.nbytes != node.nbytes:
        return np.empty(node.shape, dtype)
    room: np.ndarray = _bytes(used).view(dtype).reshape(node.shape)
    return room


def unflatten_state(snapshot: Snapshot) -> Any:
    """The tree that `flatten_state` was given (tuples are lists, NumPy scalars are arrays)."""

    def visit(node: Any) -> Any:
        if isinstance(node, dict):
            if ARRAY in node:
                array = snapshot.arrays[node[ARRAY]]
                dtype = getattr(ml_dtypes, node["dtype"], node["dtype"])
                return array.reshape(-1).view(dtype).reshape(node["shape"])
            return {key: visit(child) for key, child in node.items()}
        return [visit(child) for child in node] if isinstance(node, list) else node

    return visit(snapshot.skeleton)


class Store:
    """The checkpoints in a folder.

    Args:
        directory: The folder. It is made by the first `write`.

    Attributes:
        spared: The names of checkpoints that are never removed: an earlier run's.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.spared: set[str] = set()

    def lock(self) -> filelock.BaseFileLock:
        """Takes the folder for this process, until `release()` or the end of the process.

        The system holds the lock, not the file: a killed run leaves none behind.

        Raises:
            CheckpointError: If another run has it.
            OSError: If the folder can't be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.directory / ".lock", blocking=False, thread_local=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise CheckpointError(
                f"Another run writes its checkpoints to {self.directory}. Two runs would mix "
                "theirs: wait until it has ended, or give this one a folder of its own."
            ) from None
        for rest in self._named(f"{re.escape(TEMPORARY_PREFIX)}[0-9a-f]+-{NAME}"):
            remove(rest)  # of a run that was killed while it saved
        return lock

    def paths(self) -> list[Path]:
        """The checkpoints' folders, oldest first, without those set aside."""
        return self._named(NAME)

    def damaged(self) -> list[Path]:
        """The checkpoints that were set aside, oldest first."""
        return self._named(f"{DAMAGED_PREFIX}{NAME}(-[0-9a-f]{{8}})?")

    def _named(self, form: str) -> list[Path]:
        """What has a name of this form, oldest first. What has none of ours is the user's own."""
        found = [path for path in self.directory.glob("*") if re.fullmatch(form, path.name)]
        return sorted(found, key=_number)

    def write(self, snapshot: Snapshot, facts: dict[str, Any], keep: int) -> Path:
        """Writes one more checkpoint, verifies it, and then removes all but the newest `keep`.

        Args:
            snapshot: What `flatten_state` gave.
            facts: JSON values to be read without the tree: progress, versions.
            keep: How many to keep, this one counted.

        Returns:
            The new checkpoint's folder.

        Raises:
            OSError: If it can't be written. What was there before still is.
            DamagedError: If what was written reads back differently; it has been set aside.
        """
        number = 1 + max(map(_number, self.paths() + self.damaged()), default=0)
        path = self.directory / f"checkpoint-{number:08d}"
        with atomic_write(path) as folder:
            folder.mkdir()
            manifest = {
                "format": FORMAT,
                "files": {STATE: _write_arrays(folder / STATE, snapshot.arrays)},
                "facts": facts,
                "tree": snapshot.skeleton,
            }
            (folder / MANIFEST).write_text(
                json.dumps(manifest | {"sha256": _manifest_sha256(manifest)})
            )
        try:
            if _manifest_sha256(verify(path)) != _manifest_sha256(manifest):
                raise DamagedError(f"{path / MANIFEST} reads back differently from what it was")
        except DamagedError as error:
            self._set_aside(path, error)
            raise
        for old in [path for path in self.paths() if path.name not in self.spared][:-keep]:
            self._rename(old, f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{old.name}", remove)
        return path

    def read_newest(self) -> Saved | None:
        """Reads the newest checkpoint that verifies; newer ones that don't are set aside.

        Returns:
            The checkpoint, or None where none was ever written.

        Raises:
            CheckpointError: If there are checkpoints but all are damaged: training from the start
                again is not for us to decide.
        """
        for path in reversed(self.paths()):
            try:
                return read(path)
            except DamagedError as error:
                self._set_aside(path, error)
        if damaged := [path.name for path in self.paths() + self.damaged()]:
            raise CheckpointError(
                f"All checkpoints in {self.directory} are damaged: {', '.join(damaged)}. To train "
                "from the start, give another folder or remove this one."
            )
        return None

    def _set_aside(self, path: Path, error: DamagedError) -> None:
        logger.warning("%s. It is set aside as %s%s.", error, DAMAGED_PREFIX, path.name)
        name = f"{DAMAGED_PREFIX}{path.name}"
        if (self.directory / name).exists():
            name += f"-{secrets.token_hex(4)}"
        self._rename(path, name)

    def _rename(self, path: Path, name: str, then: Callable[[Path], None] | None = None) -> None:
        """Takes a checkpoint out of the list in one go; a kill in between leaves no half of it."""
        target = path.with_name(name)
        try:
            path.rename(target)
        except OSError as error:
            logger.warning("%s could not be renamed to %s: %s", path, name, error)
        else:
            if then is not None:
                then(target)


def verify(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest and compares every file with it.

    Raises:
        DamagedError: If a byte is not as it was written.
        CheckpointError: If a newer version of Polus wrote it.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        seal = manifest.pop("sha256")
        if seal != _manifest_sha256(manifest):
            raise DamagedError(f"{path / MANIFEST} is damaged: its checksum differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path / MANIFEST} can't be read: {error!r}") from error
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this version of Polus reads format {FORMAT}. "
            "Install the version that wrote it."
        )
    for name, expected in manifest["files"].items():
        try:
            found = _fingerprint(path / name)
        except OSError as error:
            raise DamagedError(f"{path / name} can't be read: {error!r}") from error
        if found != expected:
            raise DamagedError(f"{path / name} is damaged: expected {expected}, found {found}")
    return manifest


def read(path: Path) -> Saved:
    """Verifies and reads one checkpoint; raises as `verify` does."""
    manifest = verify(path)
    arrays = load_file(path / STATE)
    return Saved(path, unflatten_state(Snapshot(manifest["tree"], arrays)), manifest["facts"])


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Writes a safetensors file. Its fingerprint is that of the memory, not of what arrived.

    So a file that verifies is what was to be written, and nothing is read to know it.
    """
    order = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # so that each is aligned
    header, end = {}, 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        kind, shape = DTYPES[arrays[name].dtype.name], arrays[name].shape
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        contents: list[Any] = [_bytes(arrays[name]) for name in order]
        for part in [len(text).to_bytes(8, "little"), text, *contents]:
            file.write(part)
            digest.update(part)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    """The checksum of a manifest's meaning: JSON in one certain spelling."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _number(path: Path) -> int:
    """The N of a name that has checkpoint-N in it."""
    return int(re.findall(NAME, path.name)[0])


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _join(path: str, key: str) -> str:
    """A name in the state file: the keys from the root (RFC 6901, so that none can collide)."""
    key = key.replace("~", "~0").replace("/", "~1")
    return f"{path}/{key}" if path else key
