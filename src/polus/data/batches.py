"""Batches: structures of arrays, whose parts may be None."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from polus.backends import backend

# Class names of TensorFlow's values and specs, the name for people, the conversion to a tensor.
COMPOSITES = {
    "RaggedTensor": ("a ragged tensor", "{}.to_tensor()"),
    "SparseTensor": ("a sparse tensor", "tf.sparse.to_dense({})"),
}
# The kinds of NumPy dtypes that are not numbers.
TEXT, DATES, OBJECTS = "SU", "mM", "O"


def map_arrays(fn: Callable[..., Any], *batches: object) -> Any:
    """Returns a batch of what `fn` returns for each array. Parts that are None stay None."""
    return keras.tree.map_structure(fn, *batches, none_is_leaf=False)


def arrays_of(batch: object) -> list[Any]:
    """Returns the arrays of a batch, without the parts that are None."""
    return [leaf for leaf in keras.tree.flatten(batch) if leaf is not None]


def batch_size_of(batch: object) -> int:
    """Returns the length of the first axis of the first array, 1 if there is none."""
    for leaf in arrays_of(batch):
        shape: tuple[int, ...] = getattr(leaf, "shape", ())
        return int(shape[0]) if len(shape) else 1
    return 1


@functools.cache
def name_of(dtype: Any) -> str:
    """Returns the name of a dtype, which NumPy takes 3 µs to put together."""
    return str(dtype)


def signature_of(batch: object) -> list[Any]:
    """Returns the shape and dtype of each array of a batch; other leaves stand for themselves."""
    return [
        (tuple(shape), name_of(leaf.dtype))
        if (shape := getattr(leaf, "shape", None)) is not None
        else leaf
        for leaf in keras.tree.flatten(batch)
    ]


def plain_arrays(batch: Sequence[Any]) -> Any:
    """Converts all leaves but the backend's tensors to NumPy; float64 becomes Keras' `floatx`.

    Args:
        batch: The step's arguments.

    Raises:
        TypeError: If a part is not an array of numbers; the message says what to write.
    """
    try:
        return map_arrays(_plain, batch)
    except _NotNumbersError:
        # A single argument was the batch itself, and not a part of it.
        check_numbers(batch[0] if len(batch) == 1 else batch)
        raise


def check_numbers(batch: object) -> None:
    """Raises a TypeError that names the part of a batch that is not an array of numbers."""
    for path, leaf in keras.tree.flatten_with_path(batch):
        try:
            if leaf is not None:
                _plain(leaf)
        except _NotNumbersError as error:
            part = f"Part {_subscripts(path)} of a batch" if path else "A batch"
            function = _transform(batch, path, error.conversion)
            raise TypeError(
                f"{part} is {error.kind}, and the step computes with numbers. Convert it: "
                f"train(..., custom_data_transform_f={function})"
            ) from None


class _NotNumbersError(Exception):
    """A leaf is not an array of numbers.

    Args:
        kind: The kind of the leaf, with an article.
        conversion: An expression that converts it; `{}` stands for the leaf.
    """

    def __init__(self, kind: str, conversion: str) -> None:
        super().__init__(kind)
        self.kind = kind
        self.conversion = conversion


def columns_without_numbers(frame: Any) -> dict[str, str]:
    """Returns the columns of a data frame that don't hold numbers, and their dtypes."""
    return {
        str(name): str(dtype)
        for name, dtype in zip(frame.columns, frame.dtypes, strict=True)
        if getattr(dtype, "kind", "f") not in "biufc"
    }


def is_frame(value: object) -> bool:
    """Returns whether a value is a data frame, of pandas for example."""
    return hasattr(value, "columns") and hasattr(value, "dtypes")


def _plain(leaf: Any) -> Any:
    if type(leaf).__name__ in COMPOSITES:
        raise _NotNumbersError(*COMPOSITES[type(leaf).__name__])
    if keras.ops.is_tensor(leaf):
        return leaf
    if type(leaf).__module__.startswith("scipy.sparse"):
        raise _NotNumbersError(f"a scipy.sparse {type(leaf).__name__}", "{}.toarray()")
    if is_frame(leaf) and (columns := columns_without_numbers(leaf)):
        kinds = ", ".join(f"{name!r} is {dtype}" for name, dtype in columns.items())
        kind = f"a data frame with columns that are not numbers ({kinds})"
        raise _NotNumbersError(kind, f"{{}}.drop(columns={list(columns)})")
    array = np.asarray(leaf)
    if array.dtype.kind in TEXT + DATES + OBJECTS:
        _check_kind(array)
    return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array


def _check_kind(array: np.ndarray[Any, Any]) -> None:
    kind = array.dtype.kind
    is_text = kind in TEXT or all(isinstance(value, str | bytes) for value in array.flat)
    if is_text and backend.TAKES_TEXT:
        return
    if is_text:
        raise _NotNumbersError(f"text (dtype {array.dtype})", "encode({})")
    if kind in DATES:
        raise _NotNumbersError(f"dates (dtype {array.dtype})", "{}.astype('float32')")
    names = sorted({type(value).__name__ for value in array.flat})
    kinds = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    raise _NotNumbersError(f"an array of objects ({kinds})", "np.array({}.tolist(), 'float32')")


def _subscripts(path: tuple[Any, ...]) -> str:
    """Returns a path as one would write it behind a batch: `['x'][0]`."""
    return "".join(f"[{key!r}]" for key in path)


def _transform(batch: Any, path: tuple[Any, ...], conversion: str) -> str:
    """Returns the source of a function that converts one part of a batch."""
    converted = conversion.format(f"batch{_subscripts(path)}")
    if len(path) != 1:
        function = f"lambda batch: {converted}" if not path else f"lambda batch: (..., {converted})"
    elif isinstance(batch, dict):
        function = f"lambda batch: {{**batch, {path[0]!r}: {converted}}}"
    else:
        parts = [f"batch[{i}]" for i in range(len(batch))]
        parts[path[0]] = converted
        function = f"lambda batch: ({', '.join(parts)}{',' * (len(parts) == 1)})"
    return function
