"""Checksums and structures of batches, and the comparison of random states."""

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
