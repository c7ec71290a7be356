"""The states of other libraries' iterators, in types that a checkpoint can hold."""

import sys
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


def decode(state: object) -> Any:
    """Returns the state that `encode` was given."""
    if not isinstance(state, dict):
        return state
    ((kind, value),) = state.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in value}
    if kind == "bytes":
        return value.tobytes()
    if kind == "tensor":
        return sys.modules["torch"].from_numpy(value.copy())
    items = [decode(item) for item in value]
    return items if kind == "list" else tuple(items)
