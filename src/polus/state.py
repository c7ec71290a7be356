"""The state of a run in memory: variables and random generators, with a way to restore them."""

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from polus.backends import backend


class Snapshot:
    """A copy of the values of some variables and of all random states.

    Args:
        variables: The variables to copy, of Keras or of the backend.
    """

    def __init__(self, variables: Iterable[Any]) -> None:
        self.variables = list(variables)
        self.values = [backend.copy(variable) for variable in self.variables]
        self.random = random_state()

    def restore(self) -> None:
        """Restores everything. May be called more than once."""
        for variable, value in zip(self.variables, self.values, strict=True):
            backend.assign(variable, value)
        set_random_state(self.random)


def layers_of(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """Yields a layer and all layers inside it, depth first, also those that custom layers hold."""
    yield layer
    for part in layer._layers:  # what `Model.layers` reads; layers have no public name for it
        yield from layers_of(part)


def random_state() -> dict[str, Any]:
    """Returns the states of the global generators of Python, NumPy and the backend.

    If PyTorch is imported, its state is included: a `DataLoader` draws from it on every backend.
    """
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "backend": backend.random_state(),
    }
    if (torch := sys.modules.get("torch")) is not None:
        state["torch"] = torch.get_rng_state().numpy().copy()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restores a state that `random_state` returned; JSON may have turned its tuples into lists."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    backend.set_random_state(state["backend"])
    if "torch" in state and (torch := sys.modules.get("torch")) is not None:
        torch.set_rng_state(torch.from_numpy(state["torch"].copy()))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the global generators at the end of the block."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
