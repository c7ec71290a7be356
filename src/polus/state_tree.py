"""Any state as named arrays and JSON: what a checkpoint stores, without pickle.

    {"epoch": 3, "loss": array}

becomes a skeleton that JSON can hold, and the arrays under their place in the tree:

    {"epoch": 3, "loss": {"$array": "loss", "dtype": "float32", "shape": [8]}}, {"loss": array}

An array that is split over processes has a node of its own. `cuts` are where its parts begin along
each axis, and `files` says for each part, in C order, which process has it:

    {"$sharded": "loss", "dtype": "float32", "shape": [8], "cuts": [[0, 4]], "files": [0, 1]}
"""

import functools
import itertools
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from polus.sharded import Array, Grid, ShardedArray, StoredArray

ARRAY = "$array"  # marks the place of an array in the skeleton
SHARDED = "$sharded"  # and that of an array that is split
MARKS = {ARRAY, SHARDED}
MAX_DEPTH = 100  # of nested dicts and lists; a state that contains itself has no end
MAX_AXES = 32

# NumPy's names of the dtypes that a safetensors file has, and its own names for them. An array of
# another dtype is stored as its bytes.
STORED_DTYPES = {
    "bool": "BOOL",
    **{f"{kind}{n}": f"{kind[0].upper()}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)},
    **{f"float{n}": f"F{n}" for n in (16, 32, 64)},
}


class FlatState(NamedTuple):
    """A state as a skeleton that JSON can hold, and the arrays by their names.

    `shards` has this process's parts of arrays that are split; None if no array is.
    """

    skeleton: Any
    arrays: dict[str, Array]
    shards: dict[str, Array] | None = None


def flatten_state(tree: object, into: Mapping[str, Array] | None = None) -> FlatState:
    """Copies a tree of dicts, lists, JSON values and NumPy arrays, so that its owner may go on.

    Args:
        tree: The state.
        into: Arrays of an earlier result that nobody needs any more. They are overwritten where
            they fit: fresh memory costs more than the copy.

    Raises:
        TypeError: If the tree contains anything else; the message says where.
    """
    arrays: dict[str, Array] = {}
    shards: dict[str, Array] | None = None
    into = {} if into is None else into

    def visit(node: object, path: str, depth: int) -> Any:
        nonlocal shards
        if depth > MAX_DEPTH:
            raise TypeError(f"At {path} the state is nested deeper than {MAX_DEPTH} levels.")
        if isinstance(node, np.ndarray | np.generic):
            arrays[path] = _copy(node, path, into.get(path))
            return {ARRAY: path, "dtype": node.dtype.name, "shape": list(node.shape)}
        if isinstance(node, ShardedArray):
            parts = {part_name(path, i): part for i, part in node.own.items()}
            copies = {n: _copy(np.asarray(a), path, into.get(n)) for n, a in parts.items()}
            shards = (shards or {}) | copies
            return _sharded_node(node, path)
        if isinstance(node, Mapping):
            if MARKS & node.keys() or not all(isinstance(key, str) for key in node):
                raise TypeError(
                    f"At {path or 'its root'} the state has a dict with the keys {list(node)}. "
                    f"Keys must be strings other than {ARRAY!r} and {SHARDED!r}."
                )
            return {key: visit(node[key], _join(path, key), depth + 1) for key in node}
        if isinstance(node, list | tuple):
            return [visit(child, _join(path, str(i)), depth + 1) for i, child in enumerate(node)]
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(
            f"At {path or 'its root'} the state has a {type(node).__name__}. It is stored without "
            "pickle: give dicts, lists, numbers, strings, None and NumPy arrays "
            "(bytes as np.frombuffer(value, np.uint8))."
        )

    skeleton = visit(tree, "", 0)
    return FlatState(skeleton, arrays, shards)


def unflatten_state(
    flat: FlatState, stored: Callable[[str, dict[str, Any]], StoredArray] | None = None
) -> Any:
    """Returns the tree that `flatten_state` was given (tuples as lists, NumPy scalars as arrays).

    Args:
        flat: The state.
        stored: Returns an array that is split by its place in the tree and its node there.

    Raises:
        ValueError: If the skeleton and the arrays do not belong together.
    """
    place: list[str] = []  # the keys from the root; joined only where an array is

    def visit(node: object) -> Any:
        if len(place) > MAX_DEPTH:
            raise ValueError(f"the state is nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, dict):
            if ARRAY in node:
                return _array_at(node, functools.reduce(_join, place, ""), flat.arrays)
            if SHARDED in node and stored is not None:
                return stored(functools.reduce(_join, place, ""), node)
            return {key: below(key, child) for key, child in node.items()}
        if isinstance(node, list):
            return [below(str(i), child) for i, child in enumerate(node)]
        return node

    def below(key: str, child: object) -> Any:
        place.append(key)
        result = visit(child)
        place.pop()
        return result

    return visit(flat.skeleton)


def check_layout(value: object, layout: object, place: str = "the state") -> None:
    """Checks that a tree from a file has the parts and types that its reader expects.

    A layout is a type (`bool` is no `int`), a union of types, a list with the layout of all
    elements, a tuple with one layout for each element of a list, a dict with a layout for each key
    (`...` for all other keys, which are not allowed otherwise), or a function of the value that
    returns whether it fits.

        check_layout({"epoch": 3, "names": ["a"]}, {"epoch": int, "names": [str]})

    Raises:
        ValueError: At the first part that does not fit.
    """
    if isinstance(layout, dict):
        others = layout.get(...)
        missing = [key for key in layout if key is not ... and not _has_key(value, key)]
        if not isinstance(value, dict) or missing or (others is None and value.keys() - layout):
            raise ValueError(f"{place} has other parts than {', '.join(map(str, layout))}")
        for key, child in value.items():
            check_layout(child, layout.get(key, others), f"{place}/{printable(key, 80)}")
    elif isinstance(layout, list | tuple):
        if not isinstance(value, list) or (len(value) != len(layout) and isinstance(layout, tuple)):
            raise ValueError(f"{place} is no list of its kind")
        for i, child in enumerate(value):
            of_child = layout[i] if isinstance(layout, tuple) else layout[0]
            check_layout(child, of_child, f"{place}/{i}")
    elif not _fits(value, layout):
        name = getattr(layout, "__name__", layout)
        raise ValueError(f"{place} is no {name}, but {printable(repr(value), 80)}")


def is_count(value: object) -> bool:
    """Returns whether a value out of JSON is an integer from 0 on, and of a size to count with."""
    return type(value) is int and 0 <= value < 2**62


def _has_key(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _fits(value: Any, layout: Any) -> bool:
    if isinstance(layout, type | types.UnionType):
        kinds = layout.__args__ if isinstance(layout, types.UnionType) else (layout,)
        return isinstance(value, layout) and (type(value) is not bool or bool in kinds)
    return bool(layout(value))


def is_shape(value: object) -> bool:
    """Returns whether a value out of JSON is a list of sizes that an array can have."""
    return isinstance(value, list) and len(value) <= MAX_AXES and all(map(is_count, value))


def printable(value: object, length: int = 400) -> str:
    """Returns a text from a stranger without control characters, and not longer than `length`."""
    text = str(value)
    if len(text) > length:
        text = f"{text[:length]}..."
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _copy(node: Any, path: str, used: Array | None) -> Array:
    """Returns a copy in C order and native bytes: a file gets the buffer as it is."""
    name = node.dtype.name
    if node.dtype.kind not in "biufc" and not hasattr(ml_dtypes, name):
        raise TypeError(f"At {path} the state has an array of {name}. Give numbers.")
    dtype = node.dtype.newbyteorder("=")
    if used is None or used.nbytes != node.nbytes:
        array = np.empty(node.shape, dtype)
    else:
        array = as_bytes(used).view(dtype).reshape(node.shape)
    array[...] = node
    return array if name in STORED_DTYPES else as_bytes(array)


def part_name(path: str, number: int) -> str:
    """Returns the name of a part of the array at a place in the tree."""
    return f"{path}/{number}"


def _sharded_node(array: ShardedArray, path: str) -> dict[str, Any]:
    return {
        SHARDED: path,
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "cuts": list(map(list, array.grid.cuts)),
        "files": array.owners,
    }


def sharded_layout(path: str, node: dict[str, Any], files: int) -> tuple[Grid, np.dtype[Any]]:
    """Returns the layout and the dtype of a node from a file, for an array at a place in the tree.

    Args:
        path: The place.
        node: The node.
        files: The number of files with parts.

    Raises:
        ValueError: If the parts are not exactly the array, or are in other files.
    """
    if node.keys() != {SHARDED, "dtype", "shape", "cuts", "files"} or node[SHARDED] != path:
        raise ValueError(f"no array belongs at {printable(path)}")
    shape, cuts, owners, shown = node["shape"], node["cuts"], node["files"], printable(path)
    if not is_shape(shape) or not isinstance(cuts, list) or len(cuts) != len(shape):
        raise ValueError(f"the array at {shown} is cut along other axes than it has")
    for size, begins in zip(shape, cuts, strict=True):
        if not isinstance(begins, list) or not all(map(is_count, begins)) or begins[:1] != [0]:
            raise ValueError(f"the parts of {shown} don't begin with the array")
        if any(a >= b for a, b in itertools.pairwise(begins)):
            raise ValueError(f"the parts of {shown} overlap")
        if begins[-1] >= size:
            raise ValueError(f"a part of {shown} is outside of the array")
    grid = Grid(tuple(shape), tuple(map(tuple, cuts)))
    if not isinstance(owners, list) or len(owners) != grid.num_parts:
        raise ValueError(f"the parts of {shown} are not as many as its cuts make")
    if not all(is_count(number) and number < files for number in owners):
        raise ValueError(f"a part of {shown} is in a file that is not there")
    return grid, _dtype_of(node["dtype"])


def reshaped(array: Array, dtype: np.dtype[Any], shape: Sequence[int]) -> Array | None:
    """Returns the bytes of an array from a file as another dtype and shape; None if they differ."""
    if math.prod(shape) * dtype.itemsize != array.nbytes:
        return None
    return array.reshape(-1).view(dtype).reshape(shape)


def _array_at(node: dict[str, Any], path: str, arrays: Mapping[str, Array]) -> Array:
    if node.keys() != {ARRAY, "dtype", "shape"} or node[ARRAY] != path or path not in arrays:
        raise ValueError(f"no array belongs at {printable(path)}")
    shape, dtype = node["shape"], _dtype_of(node["dtype"])
    array = reshaped(arrays[path], dtype, shape) if is_shape(shape) else None
    if array is None:
        raise ValueError(f"the array at {printable(path)} has another size than its shape says")
    return array


def _dtype_of(name: Any) -> np.dtype[Any]:
    if isinstance(name, str):
        scalar = getattr(ml_dtypes, name, None)
        if isinstance(scalar, type) and issubclass(scalar, np.generic):
            return np.dtype(scalar)
        if re.fullmatch(r"bool|(int|uint|float|complex)[0-9]{1,3}", name):
            try:
                return np.dtype(name)
            except TypeError:
                pass
    raise ValueError(f"there is no dtype {printable(name)}")


def as_bytes(array: Array) -> Array:
    """Returns the memory of a contiguous array as one row of bytes."""
    return array.reshape(-1).view(np.uint8)


def _join(path: str, key: str) -> str:
    """Returns the keys from the root as one name (RFC 6901, so that no two are the same)."""
    key = key.replace("~", "~0").replace("/", "~1")
    return f"{path}/{key}" if path else key
