"""Checkpoints on disk: each one is complete, absent, or known to be damaged.

    DIRECTORY/checkpoint-00000007/state.safetensors    the arrays
                                 /manifest.json        everything else, sizes and checksums
                                 /shard-00000.safetensors ...  if weights are sharded: `shards.py`
    DIRECTORY/damaged-checkpoint-00000006/             failed verification during a resume
    DIRECTORY/.lock                                    held by the run that writes here

No file points to the latest checkpoint: it is the one with the highest number that verifies.
Nothing is pickled, so reading a checkpoint runs no code from it. Names, sizes and shapes in it are
checked before they are used: a file may come from a stranger, whose checksums are right.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from polus.checkpoint.shards import OneProcess, Processes, ShardFiles, ShardFolder, shard_name
from polus.checkpoint.state_file import (
    MAX_JSON_BYTES,
    Fingerprint,
    check_file,
    read_arrays,
    read_json,
    write_arrays,
)
from polus.files import TEMPORARY_PREFIX, atomic_write, check_directory, make_folder, remove
from polus.state_tree import FlatState, printable, unflatten_state

FORMAT = 2
SHARDED_FORMAT = 3  # with shard files
STATE = "state.safetensors"
MANIFEST = "manifest.json"
DAMAGED_PREFIX = "damaged-"
NAME = "checkpoint-([0-9]{8,15})"

# A file that is gone, of another kind, or on a bad disk is lost. Any other error, such as a missing
# permission or too many open files, says nothing about the checkpoint.
LOST = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EIO}

logger = logging.getLogger("polus.checkpoint")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used; the message says why and what to do."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are not what was written."""


class Saved(NamedTuple):
    """A checkpoint in memory: its folder, the state, and the facts that were written with it."""

    path: Path
    tree: Any
    facts: dict[str, Any]


class Manifest(NamedTuple):
    """The verified content of a manifest."""

    facts: dict[str, Any]
    skeleton: Any
    state: Fingerprint
    shards: list[Fingerprint]

    @property
    def run(self) -> str | None:
        """The id of the run that wrote the checkpoint."""
        run = self.facts.get("run")
        return run if isinstance(run, str) else None


class Store:
    """The checkpoints in a folder.

    Args:
        directory: The folder; the first `write` creates it. A relative path is resolved now.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = check_directory(directory)
        self._runs: dict[tuple[str, int], str | None] = {}  # of folders, by name and inode

    def lock(self) -> filelock.BaseFileLock:
        """Locks the folder for this process, until `release()` or the end of the process.

        The operating system holds the lock, not the file: a killed run leaves none behind.

        Raises:
            CheckpointError: If another run holds it.
            OSError: If the folder cannot be written to.
        """
        make_folder(self.directory)
        lock = filelock.FileLock(self.directory / ".lock", blocking=False, thread_local=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise CheckpointError(
                f"Another run is writing its checkpoints to {self.directory}. Wait until it has "
                "ended, or give this run a folder of its own."
            ) from None
        for rest in self._named(f"{re.escape(TEMPORARY_PREFIX)}[0-9a-f]+-{NAME}"):
            remove(rest)  # left by a run that was killed during a save
        return lock

    def paths(self) -> list[Path]:
        """Returns the checkpoints' folders, oldest first, without those that were set aside."""
        return self._named(NAME)

    def damaged(self) -> list[Path]:
        """Returns the checkpoints that were set aside, oldest first."""
        return self._named(f"{DAMAGED_PREFIX}{NAME}(-[0-9a-f]{{8}})?")

    def _named(self, pattern: str) -> list[Path]:
        """Returns what has a name of ours, oldest first. Anything else belongs to the user."""
        try:
            names = os.listdir(self.directory)  # not glob, which passes over an unreadable folder
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = [self.directory / name for name in names if re.fullmatch(pattern, name)]
        return sorted(found, key=number_of)

    def paths_of(self, run: str | None) -> list[Path]:
        """Returns the checkpoints of one run, oldest first; None for those that name no run."""
        return [path for path in self.paths() if self._run_of(path) == run]

    def _run_of(self, path: Path) -> str | None:
        """Returns the id of the run that wrote a checkpoint, "" if its manifest is damaged."""
        try:
            key = path.name, os.lstat(path).st_ino
            if key not in self._runs:
                self._runs[key] = read_manifest(path).run
            return self._runs[key]
        except (CheckpointError, OSError):
            return ""

    def new_path(self) -> Path:
        """Returns the folder of the next checkpoint."""
        return self.path_of(1 + max(map(number_of, self.paths() + self.damaged()), default=0))

    def path_of(self, number: int) -> Path:
        """Returns the folder of the checkpoint of a number."""
        return self.directory / f"checkpoint-{number:08d}"

    def write(
        self, flat: FlatState, facts: dict[str, Any], keep: int, shared: ShardFolder | None = None
    ) -> Path:
        """Writes a checkpoint, verifies it, and removes all but the newest `keep` of its run.

        Args:
            flat: The state, as `flatten_state` returns it.
            facts: JSON values that can be read without the state: progress, versions, and as "run"
                the id of the run. Checkpoints of other runs are never removed.
            keep: How many checkpoints to keep, including this one.
            shared: The folder into which other processes write their shards of it.

        Returns:
            The new checkpoint's folder.

        Raises:
            OSError: If it cannot be written. Earlier checkpoints are untouched.
            DamagedError: If it reads back differently; it has been set aside.
        """
        path = self.new_path() if shared is None else shared.path
        with atomic_write(path, None if shared is None else shared.temporary) as folder:
            folder.mkdir(exist_ok=shared is not None)
            state = write_arrays(folder / STATE, flat.arrays)
            files = {STATE: state._asdict()}
            if shared is not None:
                shared.write(flat.shards or {})
                files |= shared.wait()
            manifest = {
                "format": FORMAT if shared is None else SHARDED_FORMAT,
                "files": files,
                "facts": facts,
                "tree": flat.skeleton,
            }
            text = json.dumps(manifest | {"sha256": _manifest_sha256(manifest)})
            if len(text) > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"The state has {len(text):,} bytes of values that are not arrays, more than "
                    f"the {MAX_JSON_BYTES:,} of a manifest. Store long lists as NumPy arrays."
                )
            (folder / MANIFEST).write_text(text)
        try:
            self._verify_written(path, text)
        except DamagedError as error:
            self._set_aside(path, error)
            raise
        for old in self.paths_of(facts.get("run"))[:-keep]:
            self._rename(old, f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{old.name}", remove)
        return path

    def _verify_written(self, path: Path, text: str) -> None:
        with _damage_named(path / MANIFEST):
            if (path / MANIFEST).read_text() != text:
                raise ValueError("it reads back differently from what was written")
        verify(path)

    def read_newest(
        self,
        check: Callable[[dict[str, Any], Any], None] = lambda facts, tree: None,
        processes: Processes | None = None,
    ) -> Saved | None:
        """Reads the newest checkpoint that verifies, and sets damaged newer ones aside.

        Args:
            check: Called with the facts and the state. A ValueError that it raises means damage.
            processes: Those that read the same checkpoints together. Each one reads its share of
                the shards, and what one finds damaged is so for all.

        Returns:
            The checkpoint, or None if the folder has none.

        Raises:
            CheckpointError: If there are checkpoints, but all are damaged or cannot be read, or
                only those of an earlier run are left. Whether to start again from the beginning,
                or from there, is for the user to decide.
        """
        processes = processes or OneProcess()
        for path in reversed(self.paths()):
            try:
                with _agreeing(processes, path):
                    saved = read(path, processes)
                    with _damage_named(path / MANIFEST):
                        check(saved.facts, saved.tree)
            except DamagedError as error:
                self._set_aside(path, error)
            else:
                self._check_not_an_earlier_run(saved)
                return saved
        if damaged := [path.name for path in self.paths() + self.damaged()]:
            raise CheckpointError(
                f"All checkpoints in {self.directory} are damaged: {', '.join(damaged)}. To train "
                "from the beginning, give another folder or remove this one."
            )
        return None

    def _check_not_an_earlier_run(self, saved: Saved) -> None:
        """Raises if newer checkpoints, all damaged, are of another run than the one to resume."""
        newer = [p for p in self.paths() + self.damaged() if number_of(p) > number_of(saved.path)]
        runs = {path: self._run_of(path) for path in newer}
        others = [p.name for p, run in runs.items() if run not in ("", saved.facts.get("run"))]
        if others:
            raise CheckpointError(
                f"The newest run in {self.directory} has only damaged checkpoints: "
                f"{', '.join(others)}. {saved.path.name} is of an earlier run. To continue that "
                "one, remove the damaged folders; to start again, give another folder."
            )

    def _set_aside(self, path: Path, error: DamagedError) -> None:
        logger.warning("%s. It is set aside as %s%s.", error, DAMAGED_PREFIX, path.name)
        name = f"{DAMAGED_PREFIX}{path.name}"
        if os.path.lexists(self.directory / name):
            name += f"-{secrets.token_hex(4)}"
        self._rename(path, name)

    def _rename(self, path: Path, name: str, then: Callable[[Path], None] | None = None) -> None:
        """Takes a checkpoint out of the list in one operation, which a kill cannot divide."""
        target = path.with_name(name)
        try:
            path.rename(target)
        except FileNotFoundError:
            return  # another process of this run was faster
        except OSError as error:
            logger.warning("%s could not be renamed to %s: %s", path, name, error)
        else:
            if then is not None:
                then(target)


def read_manifest(path: Path) -> Manifest:
    """Reads and verifies the manifest of the checkpoint in the folder `path`.

    Raises:
        DamagedError: If it is not as it was written.
        CheckpointError: If another version of Polus wrote it, or it cannot be read.
    """
    with _damage_named(path / MANIFEST):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise ValueError("its folder is no folder")
        manifest = read_json(path / MANIFEST)
        if not isinstance(manifest, dict):
            raise ValueError("it is no dict")
        if manifest.pop("sha256", None) != _manifest_sha256(manifest):
            raise ValueError("its checksum differs")
    found = manifest.get("format")
    if type(found) is int and found not in (FORMAT, SHARDED_FORMAT):
        raise CheckpointError(
            f"{path} has format {found}, and this version of Polus reads formats {FORMAT} and "
            f"{SHARDED_FORMAT}. Install the version that wrote it."
        )
    with _damage_named(path / MANIFEST):
        if manifest.keys() != {"format", "files", "facts", "tree"} or type(found) is not int:
            raise ValueError("it has other parts than a manifest")
        if not isinstance(manifest["facts"], dict):
            raise ValueError("its facts are no dict")
        state, *shards = _fingerprints(manifest["files"], found == SHARDED_FORMAT)
        return Manifest(manifest["facts"], manifest["tree"], state, shards)


def verify(path: Path) -> Manifest:
    """Reads a checkpoint's manifest and compares its arrays with it; raises as `read_manifest`.

    Shards are left to those who wrote them.
    """
    manifest = read_manifest(path)
    with _damage_named(path / STATE):
        check_file(path / STATE, manifest.state)
    return manifest


def read(path: Path, processes: Processes | None = None) -> Saved:
    """Verifies and reads one checkpoint; raises as `read_manifest`.

    Args:
        path: Its folder.
        processes: Those that read it together: each one verifies its share of the shards. Without
            them, all of them are read.
    """
    manifest = read_manifest(path)
    with _damage_named(path / STATE):
        arrays = read_arrays(path / STATE, manifest.state)
    shards = ShardFiles(path, manifest.shards)
    for number in shards.share_of(processes or OneProcess()):
        with _damage_named(path / shard_name(number)):
            shards.load(number)
    with _damage_named(path / MANIFEST):
        tree = unflatten_state(FlatState(manifest.skeleton, arrays), shards.array)
    return Saved(path, tree, manifest.facts)


@contextlib.contextmanager
def _agreeing(processes: Processes, path: Path) -> Iterator[None]:
    """Raises in all processes if a block failed in one of them. All have to enter it."""
    found, failure = 0, None
    try:
        yield
    except CheckpointError as error:
        found, failure = 1 if isinstance(error, DamagedError) else 2, error
    (worst,) = processes.largest([found])
    if failure is not None and found == worst:
        raise failure
    if worst == 1:
        raise DamagedError(f"{path} is damaged: another process has found that")
    if worst == 2:
        raise CheckpointError(f"{path} cannot be read by another process; its message says why.")


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns an error about a file's content, or of reading it, into one that names the file."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {printable(error)}") from error
    except OSError as error:
        if error.errno in LOST:
            raise DamagedError(f"{path} is damaged: {error.strerror}") from error
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. That is no damage, and it is left as it "
            "is. Make it readable for this process, or move its folder away to use the checkpoint "
            "before it."
        ) from error
    except MemoryError as error:
        raise CheckpointError(f"{path} is larger than the memory of this process.") from error


def _fingerprints(files: Any, sharded: bool) -> list[Fingerprint]:
    """Returns the fingerprints of the files in a manifest: the state's, and those of shards."""
    count = len(files) - 1 if isinstance(files, dict) and sharded else 0
    names = [STATE, *map(shard_name, range(count))]
    if not isinstance(files, dict) or files.keys() != set(names) or sharded > count:
        raise ValueError(f"it names other files than {STATE}{' and its shards' * sharded}")
    return [_fingerprint(files[name]) for name in names]


def _fingerprint(value: Any) -> Fingerprint:
    if isinstance(value, dict) and value.keys() == {"size", "sha256"}:
        size, sha256 = value["size"], value["sha256"]
        if type(size) is int and size >= 0:
            return Fingerprint(size, str(sha256))
    raise ValueError("it has a file without size and checksum")


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    """Returns the checksum of a manifest's meaning: JSON in one certain spelling."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def number_of(path: Path) -> int:
    """Returns the N of a name with checkpoint-N in it."""
    return int(re.findall(NAME, path.name)[0])
