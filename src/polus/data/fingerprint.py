"""Checksums and structures of batches, and the comparison of random states."""

import collections
import math
import zlib
from typing import Any

import keras
import numpy as np

from polus.host import to_host


def checksum(batch: object, max_bytes: int | None = None) -> int:
    """Returns the CRC-32 of all values of a batch, or of the first `max_bytes` of each array."""
    value = 0
    for leaf in keras.tree.flatten(batch):
        array = to_host(leaf)
        if max_bytes is not None and array.nbytes > max_bytes:
            array = array.reshape(-1)[: max_bytes // array.itemsize]
        value = zlib.crc32(array.tobytes() if array.dtype != object else repr(leaf).encode(), value)
    return value


class RunningChecksum:
    """Checksums of an epoch's batches from its first to each of the newest ones.

    Of each array only the first rows count, up to a kilobyte: labels as a rule are covered whole,
    and a batch costs some microseconds.
    """

    MAX_BYTES = 1024
    NUM_KEPT = 2**14  # the prefetch thread is ahead of a checkpoint by so many batches at most

    def __init__(self) -> None:
        self._count = self._value = 0
        self._newest: collections.deque[tuple[int, int]] = collections.deque(maxlen=self.NUM_KEPT)

    def add(self, batch: Any) -> None:
        """Adds the next batch."""
        # Flattening takes several times as long as the rest.
        plain = type(batch) is tuple and all(type(leaf) is np.ndarray for leaf in batch)
        for leaf in batch if plain else keras.tree.flatten(batch):
            self._value = zlib.crc32(_first_bytes(leaf, self.MAX_BYTES), self._value)
        self._count += 1
        self._newest.append((self._count, self._value))

    def after(self, count: int) -> int | None:
        """Returns the checksum of the first `count` batches; None if it is not known."""
        return dict(list(self._newest)).get(count)


def _first_bytes(leaf: Any, max_bytes: int) -> bytes:
    if not getattr(leaf, "shape", ()):
        return repr(to_host(leaf).item()).encode()  # the same for a tensor and an array
    row_bytes = math.prod(leaf.shape) * 8 // max(1, len(leaf))
    rows = leaf[: max(1, max_bytes // max(1, row_bytes))]
    rows = rows if type(rows) is np.ndarray else to_host(rows)
    return rows.tobytes()[:max_bytes] if rows.dtype != object else repr(rows).encode()


def leaves_of(batch: object) -> list[list[Any]]:
    """Returns the dtype and the number of axes of each array of a batch."""
    arrays = [to_host(leaf) for leaf in keras.tree.flatten(batch)]
    return [[array.dtype.name, array.ndim] for array in arrays]


def same(a: Any, b: Any) -> bool:
    """Returns whether two random states are equal."""
    if isinstance(a, dict):
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return all(map(same, a, b))
    return bool(np.array_equal(a, b))
