"""The file of a checkpoint's arrays: safetensors, written and read in one pass with its checksum.

The library of that name maps a file into memory (one that is cut off meanwhile kills the process)
and reads it once more for a checksum; and NumPy can't load bfloat16 through it.
"""

import contextlib
import hashlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polus.files import open_regular
from polus.state_tree import STORED_DTYPES, Array, as_bytes, is_shape

MAX_JSON_BYTES = 2**26  # of a manifest: more of it would take gigabytes in memory
MAX_HEADER_BYTES = 2 * MAX_JSON_BYTES  # names each array as the manifest does, and its offsets

NUMPY_DTYPES = {stored: name for name, stored in STORED_DTYPES.items()}


class Fingerprint(NamedTuple):
    """The size and the checksum of a file."""

    size: int
    sha256: str


class Entry(NamedTuple):
    """One array in a file: its name, dtype, shape and its place behind the header."""

    name: str
    dtype: np.dtype[Any]
    shape: list[int]
    begin: int
    end: int


def write_arrays(path: Path, arrays: dict[str, Array]) -> Fingerprint:
    """Writes a safetensors file and returns the fingerprint of the memory it was written from.

    A file that verifies against it is what was meant to be written, and nothing is read to know.
    """
    order = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # so that each is aligned
    header, end = {}, 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        dtype, shape = STORED_DTYPES[arrays[name].dtype.name], arrays[name].shape
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        contents: list[Any] = [as_bytes(arrays[name]) for name in order]
        for part in [len(text).to_bytes(8, "little"), text, *contents]:
            file.write(part)
            digest.update(part)
        return Fingerprint(file.tell(), digest.hexdigest())


def read_arrays(path: Path, expected: Fingerprint) -> dict[str, Array]:
    """Reads and verifies a file of `write_arrays`.

    Raises:
        ValueError: If a byte is not as it was written, or it is no such file.
        OSError: If it cannot be read.
        MemoryError: If it is larger than the memory of this machine.
    """
    arrays = {}
    with open_regular(path) as file:
        _check_size(file, expected.size)
        digest = hashlib.sha256()
        entries = _read_header(file, expected.size, digest)
        _check_memory(expected.size)
        for entry in entries:
            arrays[entry.name] = array = np.empty(entry.shape, entry.dtype)
            memory = as_bytes(array).data
            if file.readinto(memory) != memory.nbytes:
                raise ValueError("it ends early")
            digest.update(memory)
        _check_digest(digest.hexdigest(), expected.sha256)
    return arrays


def check_file(path: Path, expected: Fingerprint) -> None:
    """Compares a file with its fingerprint; raises as `read_arrays` does."""
    with open_regular(path) as file:
        _check_size(file, expected.size)
        _check_digest(hashlib.file_digest(file, "sha256").hexdigest(), expected.sha256)


def read_json(path: Path) -> Any:
    """Reads a JSON file that may come from a stranger.

    Raises:
        ValueError: If it is no JSON, is too large, or repeats a key.
        RecursionError: If it is nested too deeply.
        OSError: If it cannot be read.
    """
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError("it is larger than 64 MB")
    return parse_json(text)


def parse_json(text: bytes) -> Any:
    """Returns the value of a JSON text; raises as `read_json` does."""
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _check_size(file: io.BufferedReader, expected: int) -> None:
    size = file.seek(0, 2)
    file.seek(0)
    if size != expected:
        raise ValueError(f"it has {size} bytes, and {expected} were written")


def _check_memory(size: int) -> None:
    # Some systems give out any amount of memory, and end the process when it is used.
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError


def _check_digest(found: str, expected: str) -> None:
    if found != expected:
        raise ValueError("its checksum differs")


def _read_header(file: io.BufferedReader, size: int, digest: Any) -> list[Entry]:
    """Returns the arrays in the order of their bytes, which they share with nothing else."""
    length_bytes = file.read(8)
    length = int.from_bytes(length_bytes, "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"its header is said to have {length} bytes")
    text = file.read(length)
    digest.update(length_bytes)
    digest.update(text)
    header = parse_json(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no dict")
    entries = [_entry(*item) for item in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise ValueError("its arrays overlap, or leave gaps")
        end = entry.end
    if end != size - 8 - length:
        raise ValueError("its arrays are not all that it has")
    return entries


def _entry(name: str, value: Any) -> Entry:
    with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
        dtype, shape = np.dtype(NUMPY_DTYPES[value.pop("dtype")]), value.pop("shape")
        begin, end = value.pop("data_offsets")
        if (
            not value
            and is_shape(shape)
            and is_shape([begin, end])
            and end - begin == math.prod(shape) * dtype.itemsize
        ):
            return Entry(name, dtype, shape, begin, end)
    raise ValueError("its header has an array that cannot be")
