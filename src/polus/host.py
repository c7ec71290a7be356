"""Values read from the device, and hints for misspelled names."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def to_host(value: object) -> np.ndarray[Any, Any]:
    """Returns a tensor, variable, number or array-like as a NumPy array. Waits for the device."""
    if isinstance(value, np.ndarray | np.generic | int | float | list):
        return np.asarray(value)
    import keras  # here: a misspelled name of `polus`, or a record to read, does not load it

    # Keras reads what NumPy cannot, such as a bfloat16 tensor of PyTorch.
    if keras.ops.is_tensor(value) or isinstance(value, keras.Variable):
        return keras.ops.convert_to_numpy(value)  # type: ignore[no-any-return]
    return np.asarray(value)


def as_number(value: Any) -> float | None:
    """Returns a scalar as a float; None for what is none: arrays, text, None."""
    if np.ndim(value) or isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Returns `"Did you mean 'loss'?"` for the closest of `names`, or "" if none is close."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def counted(count: int, noun: str) -> str:
    """Returns a number with its noun: "1 step", "2,000 steps"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


class DeviceValues(Sequence[float]):
    """One scalar per step, kept on the device until the first one is read.

    On the host they are float64 if the tensor is, or holds integers, and float32 otherwise.

    Args:
        values: A tensor whose first `count` elements are the values; it may be padded.
        count: The number of steps.
    """

    def __init__(self, values: object, count: int) -> None:
        self._values = values
        self._count = count
        self._read: np.ndarray[Any, Any] | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if self._read is None:
            values = to_host(self._values).reshape(-1)[: self._count]
            self._read = values.astype(np.result_type(values.dtype, np.float32), copy=False)
            self._values = None
        return self._read if dtype is None else self._read.astype(dtype)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        return np.asarray(self)[i]
