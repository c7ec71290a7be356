"""The layout of a run's state, and the comparison of a saved one with the present run."""

import itertools
from typing import Any, Protocol

import keras
import numpy as np

from polus.history import History
from polus.state import layers_of, random_state
from polus.state_tree import check_layout, is_count
from polus.training_state import CALLBACKS_LAYOUT, VARIABLES_LAYOUT, check_random_state

# See `polus.state_tree.check_layout`; the rest is for its owners to check.
STATE_LAYOUT = {
    "progress": {
        "epoch": is_count,
        "step": is_count,
        "steps": lambda steps: steps is None or is_count(steps),
        "epochs": is_count,
        "early_stop": bool,
        "stop_reason": str,
        "batch_sizes": lambda sizes: isinstance(sizes, np.ndarray) and sizes.dtype == np.int64,
    },
    "parts": {...: str},
    "layers": [str],
    "variables": VARIABLES_LAYOUT,
    "random": dict,
    "data": dict,
    "history": dict,
    "shared": dict,
    "callbacks": CALLBACKS_LAYOUT,
    "tuning": {...: (bool | None, is_count)},
}


class Parts(Protocol):
    """The parts of a trainer that make a run this run."""

    loss: Any

    @property
    def model(self) -> keras.Model: ...
    @property
    def optimizer(self) -> keras.optimizers.Optimizer: ...
    @property
    def metrics(self) -> Any: ...


def check_state(facts: dict[str, Any], state: Any) -> None:
    """Checks a state from a file as far as that is possible without a run, and changes nothing.

    Args:
        facts: What was written with it.
        state: The state.

    Raises:
        ValueError: If it is not the state of a run.
    """
    check_layout(state, STATE_LAYOUT)
    check_random_state(state["random"], facts.get("backend") == keras.config.backend())
    try:
        history = History()
        history.set_state(state["history"])
        repr(history)  # reads all of it
    except Exception as error:
        raise ValueError(f"its history cannot be read: {error!r}") from error


def kinds_of(trainer: Parts) -> dict[str, str]:
    """Returns the kinds of a run's parts: a checkpoint of others is another run's."""
    return {
        "trainer": type(trainer).__name__,
        "model": type(trainer.model).__name__,
        "optimizer": type(trainer.optimizer).__name__,
        "loss": getattr(trainer.loss, "__name__", type(trainer.loss).__name__),
        "metrics": ", ".join(metric.name for metric in trainer.metrics),
    }


def layer_names(model: keras.Model) -> list[str]:
    """Returns the class of each layer."""
    return [type(layer).__name__ for layer in layers_of(model)]


def check_layers(saved: list[str], now: list[str]) -> None:
    """Raises ValueError if the model has other layers; some have no variables to tell them."""
    for i, (then, layer) in enumerate(itertools.zip_longest(saved, now)):
        if then != layer:
            raise ValueError(f"layer {i} of the model was {then}, and is {layer}.")


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError if a part of the run is of another kind than it was."""
    differing = [
        f"{name} was {saved.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if saved.get(name) != value
    ]
    if differing:
        raise ValueError(f"{', '.join(differing)}.")


def use_own_generators(state: dict[str, Any]) -> None:
    """Replaces the states of another backend's generators by this one's."""
    data, own = state["data"], random_state()["backend"]
    starts = [data["epoch_start"]]
    if "previous_epoch" in data:
        starts.append(data["previous_epoch"]["epoch_start"])
    for random in (state["random"], *(start["random"] for start in starts)):
        random["backend"] = own
