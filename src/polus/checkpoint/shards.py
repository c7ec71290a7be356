"""The part of a checkpoint that each process writes and reads by itself, if weights are sharded.

    checkpoint-00000007/shard-00000.safetensors    the parts that process 0 had
                       /shard-00001.safetensors    those of process 1

Each process writes its file into a folder with a temporary name, verifies it, and leaves a report
there. The first one waits for all reports, writes them into the manifest, and renames the folder.
The processes meet in the folder, since a thread that writes can't take part in the collectives of
the steps.
"""

import dataclasses
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from polus.checkpoint.state_file import Fingerprint, read_json, read_shards, write_shards
from polus.files import TEMPORARY_PREFIX, atomic_write, flush_entry
from polus.sharded import Array, StoredArray
from polus.state_tree import part_name, printable, reshaped, sharded_layout

WAIT_SECS = 1800.0  # for the slowest of the processes to write its shards
LAST_SECS = 30.0  # the same, after an error has ended the run
POLL_SECS = 0.02


class Processes(Protocol):
    """The processes of a run, which agree on what they have found; a `Placement` is one."""

    index: int
    count: int

    def largest(self, values: Sequence[float]) -> list[float]:
        """Returns the largest of each number over the processes."""


class OneProcess:
    """A process that reads a checkpoint alone."""

    index, count = 0, 1

    def largest(self, values: Sequence[float]) -> list[float]:
        """Returns the numbers."""
        return list(values)


@dataclasses.dataclass(frozen=True)
class ShardFolder:
    """Where the processes write one checkpoint together.

    Attributes:
        path: The checkpoint's name to be.
        temporary: Its name until all is there.
        index: The number of this process.
        count: The number of processes.
        ended: Set when the run has ended with an error: the others may be gone.
    """

    path: Path
    temporary: Path
    index: int
    count: int
    ended: threading.Event

    def write(self, shards: dict[str, Array]) -> None:
        """Writes and verifies this process's shards, and reports them to the first process.

        Raises:
            OSError: If they cannot be written, or read back differently; that is reported as well.
        """
        file = self.temporary / shard_name(self.index)
        report: dict[str, Any] = {}
        try:
            written = write_shards(file, shards)
            flush_entry(file)  # on this machine: the first process can't do it for another one
            for _ in read_shards(file, written):
                pass
            report = written._asdict()
        except (OSError, ValueError) as error:
            report = {"error": str(error)}
            raise OSError(f"{file}: {error}") from error
        finally:
            with atomic_write(self._report(self.index)) as temporary:
                temporary.write_text(json.dumps(report))

    def wait(self) -> dict[str, dict[str, Any]]:
        """Waits for the reports of all processes, and returns them by the names of their files.

        Raises:
            OSError: If a process could not write its shards, or has not done it in time.
        """
        reports = {}
        for index in range(self.count):
            late = f"process {index} has not written its shards in time"
            self._poll(self._report(index).exists, late)
            report = read_json(self._report(index))
            if "error" in report:
                raise OSError(f"process {index} could not write its shards: {report['error']}")
            reports[shard_name(index)] = report
        for index in range(self.count):
            self._report(index).unlink()
        return reports

    def wait_for_first(self) -> None:
        """Waits until the first process has made a checkpoint of it.

        Raises:
            OSError: If it could not, or has not done it in time.
        """
        late = "the first process has not completed the checkpoint in time"
        self._poll(lambda: not self.temporary.exists(), late)
        if not self.path.exists():
            raise OSError("the first process could not complete it; its message says why")

    def _poll(self, done: Callable[[], bool], late: str) -> None:
        began, ended = time.monotonic(), None
        while not done():
            now = time.monotonic()
            ended = now if ended is None and self.ended.is_set() else ended
            if now - began > WAIT_SECS or (ended is not None and now - ended > LAST_SECS):
                raise TimeoutError(late)
            time.sleep(POLL_SECS)

    def _report(self, index: int) -> Path:
        return self.temporary / f"report-{index:05d}.json"


def temporary_name(path: Path, token: int) -> Path:
    """Returns the name of a checkpoint while it is written; `token` sets it apart from others."""
    return path.with_name(f"{TEMPORARY_PREFIX}{token:08x}-{path.name}")


def new_token() -> int:
    """Returns a random token for `temporary_name`."""
    return secrets.randbits(32)


def shard_name(index: int) -> str:
    """Returns the name of the file of a process."""
    return f"shard-{index:05d}.safetensors"


class ShardFiles:
    """The shard files of a checkpoint.

    Args:
        path: The checkpoint's folder.
        files: The fingerprints of the files, by the numbers of their processes.
    """

    def __init__(self, path: Path, files: Sequence[Fingerprint]) -> None:
        self.path, self.files = path, files
        self._loaded: dict[int, dict[str, Array]] = {}

    def share_of(self, processes: Processes) -> range:
        """Returns the files that this process verifies.

        On the number of processes that wrote them, that is the file that this process wrote, which
        has just what it needs.
        """
        return range(processes.index, len(self.files), processes.count)

    def load(self, number: int) -> None:
        """Reads and verifies a file, and keeps it.

        Raises:
            ValueError: If a byte is not as it was written.
            OSError: If it cannot be read.
        """
        self._loaded[number] = self._read(number)

    def array(self, path: str, node: dict[str, Any]) -> StoredArray:
        """Returns an array by its place in the state and its node there.

        Raises:
            ValueError: If the node cannot be, or does not fit the files that are loaded.
        """
        grid, dtype = sharded_layout(path, node, len(self.files))
        boxes = grid.boxes()

        def read_part(number: int) -> Array:
            name, file = part_name(path, number), node["files"][number]
            found = self._loaded[file] if file in self._loaded else self._read_part(file, name)
            shape = [each.stop - each.start for each in boxes[number]]
            part = reshaped(found[name], dtype, shape) if name in found else None
            if part is None:
                raise ValueError(
                    f"{shard_name(file)} has no part {printable(name)} of {shape} {dtype.name}"
                )
            return part

        for number, file in enumerate(node["files"]):
            if file in self._loaded:
                read_part(number)
        return StoredArray(grid, dtype, read_part)

    def _read(self, number: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        return dict(read_shards(self.path / shard_name(number), self.files[number], names))

    def _read_part(self, number: int, name: str) -> dict[str, Array]:
        try:
            return self._read(number, [name])
        except (ValueError, OSError) as error:
            file = self.path / shard_name(number)
            raise RuntimeError(f"{file} has changed since it was verified: {error}") from error
