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
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polus.files import open_regular
from polus.sharded import Array
from polus.state_tree import STORED_DTYPES, as_bytes, is_shape

MAX_JSON_BYTES = 2**26  # of a manifest: more of it would take gigabytes in memory
MAX_HEADER_BYTES = 2 * MAX_JSON_BYTES  # names each array as the manifest does, and its offsets

METADATA = "__metadata__"  # safetensors' name for texts that describe a file
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
    digest = hashlib.sha256()
    header, contents = _described(arrays)
    with open(path, "wb") as file:
        for part in [_as_text(header), *contents]:
            file.write(part)
            digest.update(part)
        return Fingerprint(file.tell(), digest.hexdigest())


def write_shards(path: Path, arrays: dict[str, Array]) -> Fingerprint:
    """Writes a safetensors file whose arrays can be read and verified one by one.

    Its metadata has the checksum of each array. The fingerprint is the file's size and the checksum
    of the header, so it covers the arrays as well.
    """
    header, contents = _described(arrays)
    names = list(header)
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    header[METADATA] = dict(zip(names, digests, strict=True))
    text = _as_text(header)
    with open(path, "wb") as file:
        for part in [text, *contents]:
            file.write(part)
        return Fingerprint(file.tell(), hashlib.sha256(text).hexdigest())


def read_shards(
    path: Path, expected: Fingerprint, names: Collection[str] | None = None
) -> Iterator[tuple[str, Array]]:
    """Yields the arrays of a file of `write_shards`, each one verified.

    Args:
        path: The file.
        expected: Its fingerprint.
        names: Those to read; None for all. Others are not looked at.

    Raises:
        ValueError: If a byte of the header or of one of these arrays is not as it was written.
        OSError: If the file cannot be read.
        MemoryError: If it is larger than the memory of this machine.
    """
    with open_regular(path) as file:
        _check_size(file, expected.size)
        digest = hashlib.sha256()
        entries, digests = _read_header(file, expected.size, digest, with_metadata=True)
        _check_digest(digest.hexdigest(), expected.sha256)
        start = file.tell()
        known = {entry.name for entry in entries}
        if digests.keys() != known or not known.issuperset(names or ()):
            raise ValueError("it has other arrays than it should")
        for entry in entries:
            if names is None or entry.name in names:
                _check_memory(entry.end - entry.begin)
                file.seek(start + entry.begin)
                array, memory = _read_entry(file, entry)
                _check_digest(hashlib.sha256(memory).hexdigest(), digests[entry.name])
                yield entry.name, array


def _described(arrays: dict[str, Array]) -> tuple[dict[str, Any], list[Any]]:
    """Returns the header of a file, and its contents in that order."""
    order = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # so that each is aligned
    header, end = {}, 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        dtype, shape = STORED_DTYPES[arrays[name].dtype.name], arrays[name].shape
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header, [as_bytes(arrays[name]) for name in order]


def _as_text(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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
        entries, _ = _read_header(file, expected.size, digest)
        _check_memory(expected.size)
        for entry in entries:
            arrays[entry.name], memory = _read_entry(file, entry)
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


def _read_entry(file: io.BufferedReader, entry: Entry) -> tuple[Array, memoryview]:
    """Returns the next array of a file, and its memory."""
    array = np.empty(entry.shape, entry.dtype)
    memory = as_bytes(array).data
    if file.readinto(memory) != memory.nbytes:
        raise ValueError("it ends early")
    return array, memory


def _read_header(
    file: io.BufferedReader, size: int, digest: Any, with_metadata: bool = False
) -> tuple[list[Entry], dict[str, Any]]:
    """Returns the arrays in the order of their bytes, which they share with nothing else.

    And the metadata, where the file has to have them.
    """
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
    metadata = header.pop(METADATA, None) if with_metadata else {}
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are no dict")
    entries = [_entry(*item) for item in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise ValueError("its arrays overlap, or leave gaps")
        end = entry.end
    if end != size - 8 - length:
        raise ValueError("its arrays are not all that it has")
    return entries, metadata


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
