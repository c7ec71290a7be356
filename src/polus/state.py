"""What a run is, in memory: variables and random states, to be put back as they were."""

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from polus.backends import backend


class Snapshot:
    """The values of some variables and all random states, at the time it is made.

    Args:
        variables: Keras variables.
    """

    def __init__(self, variables: Iterable[Any]) -> None:
        self.variables = list(variables)
        self.values = [backend.copy(variable) for variable in self.variables]
        self.random = random_state()

    def restore(self) -> None:
        """Puts everything back; may be called more than once."""
        for variable, value in zip(self.variables, self.values, strict=True):
            variable.assign(value)
        set_random_state(self.random)


def layers_of(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """Yields a layer and all layers inside it, depth first, also those that custom layers hold."""
    yield layer
    for part in layer._layers:  # what `Model.layers` reads; layers have no public name for it
        yield from layers_of(part)


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and the backend's global generators.

    And of PyTorch's, where it is imported: a `DataLoader` draws from it on every backend.
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
    """Puts `random_state()` back, also where its tuples have become lists on the way."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    backend.set_random_state(state["backend"])
    if "torch" in state and (torch := sys.modules.get("torch")) is not None:
        torch.set_rng_state(torch.from_numpy(state["torch"].copy()))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves the global generators as they were, whatever is drawn inside."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
