"""Checksums and structures of batches, and the comparison of random states."""

import zlib
from typing import Any

import keras
import numpy as np


def checksum(batch: Any) -> int:
    """A CRC-32 of everything in a batch."""
    value = 0
    for leaf in keras.tree.flatten(batch):
        array = _array(leaf)
        value = zlib.crc32(array.tobytes() if array.dtype != object else repr(leaf).encode(), value)
    return value


def leaves_of(batch: Any) -> list[list[Any]]:
    """The dtype and the number of axes of each array of a batch."""
    arrays = [_array(leaf) for leaf in keras.tree.flatten(batch)]
    return [[array.dtype.name, array.ndim] for array in arrays]


def _array(leaf: Any) -> np.ndarray[Any, Any]:
    return keras.ops.convert_to_numpy(leaf) if keras.ops.is_tensor(leaf) else np.asarray(leaf)


def same(a: Any, b: Any) -> bool:
    """Whether two random states are equal."""
    if isinstance(a, dict):
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return all(map(same, a, b))
    return bool(np.array_equal(a, b))
