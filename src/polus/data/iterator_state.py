"""The states of other libraries' iterators, in types that a checkpoint can hold."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def encode(state: Any) -> object:
    """Returns an iterator's state as lists, single-key dicts, plain values and NumPy arrays."""
    if isinstance(state, dict):
        return {"dict": [[encode(key), encode(value)] for key, value in state.items()]}
    if isinstance(state, list | tuple):
        return {type(state).__name__: [encode(item) for item in state]}
    if isinstance(state, bytes):
        return {"bytes": np.frombuffer(state, np.uint8)}
    if type(state).__module__ == "torch":
        return {"tensor": state.numpy().copy()}
    return state


def check(state: object) -> None:
    """Checks a state from a file.

    Raises:
        ValueError: If `encode` has not made it.
    """
    try:
        decode(state, as_tensor=np.copy)
    except Exception as error:  # a key that can't be one, a pair of three, ...
        raise ValueError(f"the state of its iterator cannot be read: {error!r}") from error


def decode(state: object, as_tensor: Callable[[Any], Any] | None = None) -> Any:
    """Returns the state that `encode` was given; `as_tensor` makes a PyTorch tensor of an array."""
    if not isinstance(state, dict):
        return state
    ((kind, value),) = state.items()
    if kind == "dict":
        return {decode(key, as_tensor): decode(item, as_tensor) for key, item in value}
    if kind in ("list", "tuple"):
        items = [decode(item, as_tensor) for item in value]
        return items if kind == "list" else tuple(items)
    if not isinstance(value, np.ndarray) or kind not in ("bytes", "tensor"):
        raise ValueError(f"{kind!r} is no kind of value")
    if kind == "bytes":
        return value.tobytes()
    return (as_tensor or sys.modules["torch"].from_numpy)(value.copy())
