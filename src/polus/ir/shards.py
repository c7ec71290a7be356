"""Vectors on disk, appended to as they are computed, each with a checksum.

    FOLDER/shard-00000000.vectors    float32 numbers, one vector or several after the other
          /shard-00000000.entries    for each of them: key, place, size and checksum
          /shard-00000001...         begun when the last one has reached a gigabyte
          /.lock                     held while a process appends

An entry is written after its vector, so a process that is killed loses only what it was writing. A
flipped byte, or what a power cut took, doesn't match the checksum and counts as absent. Of several
entries with one key the last one counts.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import filelock
import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

MAX_SHARD_BYTES = 2**30
KEY_BYTES = 32
_ENTRY = np.dtype(
    [
        ("key", np.uint8, KEY_BYTES),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("tokens", "<u4"),  # 0 for a single vector, without an axis of tokens
        ("checksum", "<u4"),
    ]
)
_CHECKED = _ENTRY.itemsize - 4  # bytes of an entry before its checksum


class VectorShards:
    """A persistent mapping from keys of 32 bytes to vectors `(E,)` or `(tokens, E)`.

    Several processes may read and append at the same time.

    Args:
        folder: Where the shards are. It is created when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged = 0
        """The number of entries read so far whose vectors didn't match their checksum."""
        self._forget()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Vectors]:
        """Returns the vectors of those keys that are stored undamaged."""
        self._refresh()
        found: dict[bytes, Vectors] = {}
        if not len(self._entries):
            return found
        wanted = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        last = np.searchsorted(self._prefixes, _prefixes(wanted), side="right") - 1
        numbers = self._order[np.maximum(last, 0)]
        same = (self._entries["key"][numbers] == wanted).all(axis=1)
        for shard in np.unique(self._shards[numbers[same]]):
            path = self._path(shard, "vectors")
            # An empty file can't be mapped.
            vectors = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, "u1")
            for i in np.flatnonzero(same & (self._shards[numbers] == shard)).tolist():
                each = _verified(self._entries[numbers[i]], vectors)
                if each is None:
                    self.damaged += 1
                else:
                    found[keys[i]] = each
        return found

    def append(self, vectors: Mapping[bytes, Vectors]) -> None:
        """Adds vectors by their keys."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.folder / ".lock"):
            shard = max(self._numbers(), default=0)
            path = self._path(shard, "vectors")
            if path.exists() and path.stat().st_size >= MAX_SHARD_BYTES:
                shard += 1
            with open(self._path(shard, "vectors"), "ab") as file:
                entries = np.zeros(len(vectors), _ENTRY)
                for entry, (key, each) in zip(entries, vectors.items(), strict=True):
                    data = np.ascontiguousarray(each, "<f4").tobytes()
                    entry["key"] = np.frombuffer(key, np.uint8)
                    entry["offset"], entry["size"] = file.tell(), len(data)
                    entry["tokens"] = len(each) if each.ndim == 2 else 0
                    entry["checksum"] = _checksum(entry, data)
                    file.write(data)
            with open(self._path(shard, "entries"), "ab") as file:
                # After a kill in the middle of an entry, the next one begins where it should.
                file.truncate(file.tell() // _ENTRY.itemsize * _ENTRY.itemsize)
                file.write(entries.tobytes())

    def _path(self, shard: int, kind: str) -> Path:
        return self.folder / f"shard-{shard:08d}.{kind}"

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem[6:]) for path in self.folder.glob("shard-*.vectors"))

    def _forget(self) -> None:
        self._entries = np.empty(0, _ENTRY)
        self._shards = np.empty(0, np.int64)  # which one each entry belongs to
        self._read: dict[int, int] = {}  # how many entries of each shard are known
        self._order = np.empty(0, np.int64)  # of the entries, sorted by the prefixes of their keys
        self._prefixes = np.empty(0, np.uint64)

    def _refresh(self) -> None:
        """Reads the entries that were appended since the last call, by any process."""
        counts = {
            shard: path.stat().st_size // _ENTRY.itemsize
            for shard in self._numbers()
            if (path := self._path(shard, "entries")).exists()
        }
        if any(counts.get(shard, 0) < known for shard, known in self._read.items()):
            self._forget()  # somebody has deleted files
        for shard, count in counts.items():
            known = self._read.get(shard, 0)
            if count == known:
                continue
            offset = known * _ENTRY.itemsize
            new = np.fromfile(self._path(shard, "entries"), _ENTRY, count - known, offset=offset)
            self._entries = np.concatenate([self._entries, new])
            self._shards = np.concatenate([self._shards, np.full(len(new), shard)])
            self._read[shard] = known + len(new)
        if len(self._order) != len(self._entries):
            prefixes = _prefixes(self._entries["key"])
            self._order = np.argsort(prefixes, kind="stable")
            self._prefixes = prefixes[self._order]


def _prefixes(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Returns the first 8 bytes of each key as a number, which can be sorted."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]


def _checksum(entry: np.void, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(entry.tobytes()[:_CHECKED]))


def _verified(entry: np.void, vectors: NDArray[np.uint8]) -> Vectors | None:
    """Returns the vectors of an entry; None if they aren't what was written, or aren't finite."""
    start, size, tokens = int(entry["offset"]), int(entry["size"]), int(entry["tokens"])
    data = vectors[start : start + size].tobytes()
    if _checksum(entry, data) != entry["checksum"]:
        return None
    found = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(found).all():
        return None
    return found.reshape(tokens, -1) if tokens else found
