"""The layout of a run's state, and the comparison of a saved one with the present run."""

from typing import Any, Protocol

import keras
import numpy as np

from polus.configuration import Difference, changes_since, check_changes, describe_parts
from polus.data import DataReader, iterator_state
from polus.data.batches import map_arrays
from polus.describe import describe_object
from polus.history import History
from polus.host import to_host
from polus.models import Models
from polus.state import random_state
from polus.state_tree import check_layout, is_count
from polus.steps.shapes import SHAPES_LAYOUT
from polus.training_state import (
    CALLBACKS_LAYOUT,
    VARIABLES_LAYOUT,
    canonical_paths,
    check_random_state,
)


def _anything(value: Any) -> bool:
    return True


# See `polus.state_tree.check_layout`; the rest is for its owners to check.
EPOCH_START_LAYOUT = {"random": dict, "adapter": dict}
ITERATOR_LAYOUT = {
    "num_read": is_count,
    "state": _anything,
    "generators": EPOCH_START_LAYOUT,
    "next_checksum": is_count,
}
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
    "settings": {"first": dict, "newest": dict},
    "variables": VARIABLES_LAYOUT,
    "random": dict,
    "data": {
        "dataset": dict,
        "first_epoch": is_count,
        "epoch_start": EPOCH_START_LAYOUT,
        ...: _anything,
    },
    "history": dict,
    "shared": dict,
    "callbacks": CALLBACKS_LAYOUT,
    "non_finite": {"skipped": is_count, "consecutive": is_count, "trusting": bool},
    "tuning": {"ways": {...: (bool | None, is_count)}, "shapes": {...: SHAPES_LAYOUT}},
}


# Attributes of every trainer that are no settings, or are described as parts.
NOT_SETTINGS = ("_engine", "early_stop", "log_name", "step_counter", "trainable_weights")


class Parts(Protocol):
    """The parts of a trainer that make a run this run."""

    loss: Any

    @property
    def model(self) -> keras.Model: ...
    @property
    def optimizer(self) -> keras.optimizers.Optimizer: ...
    @property
    def metrics(self) -> Any: ...
    @property
    def trainable_weights(self) -> list[keras.Variable]: ...


class Settings:
    """The settings of a run, compared with those that a checkpoint was saved with.

    Args:
        trainer: The trainer.
        transform: The function applied to each batch, if any.

    Attributes:
        first: The description of the settings that the run began with.
        changes: The settings that were not those of the checkpoint, and were accepted.
    """

    def __init__(self, trainer: Parts, transform: object) -> None:
        self.trainer = trainer
        self.transform = transform
        self.first: dict[str, Any] = {}
        self.changes: list[Difference] = []

    @property
    def learning_rate_changed(self) -> bool:
        """Whether a learning rate is not that of the checkpoint."""
        return any("learning_rate" in change.name for change in self.changes)

    def begin(self) -> None:
        """Describes what the run begins with. Its models follow when they are built."""
        self.first = self._describe()

    def get_state(self) -> dict[str, Any]:
        """Returns what the run began with, and what callbacks have made of it since."""
        if "trainable_weights" not in self.first:
            self.first |= self._describe_models() | self._describe_trained()
        # What is trained changes where a callback thaws layers.
        newest = self.first | self._describe() | self._describe_trained()
        return {"first": self.first, "newest": newest}

    def check(self, saved: dict[str, Any], accept: bool) -> None:
        """Compares the settings before the models are built: a changed one may not even run.

        Args:
            saved: A result of `get_state`.
            accept: Whether the run may continue with other settings.

        Raises:
            ValueError: If something has changed that makes another run, or was not accepted.
        """
        self._check(saved, self.first | self._describe_models(), accept)

    def check_built(self, saved: dict[str, Any], accept: bool) -> None:
        """Compares the built models, and what is trained; see `check`."""
        models = self._describe_models() | self._describe_trained()
        self._check(saved, models, accept)
        if not self.changes and saved["first"].get("python") == self.first.get("python"):
            self.first = saved["first"]  # not what callbacks have made of it meanwhile
        else:
            self.first = self.first | models

    def _check(self, saved: dict[str, Any], now: dict[str, Any], accept: bool) -> None:
        found = changes_since(saved["first"], saved["newest"], now)
        new = [each for each in found if each not in self.changes]
        check_changes(new, accept)
        self.changes += new

    def _describe(self) -> dict[str, Any]:
        names = (
            *("optimizer", "loss", "metrics", "validation_metrics"),
            *("post_process_logits", "post_process_grads"),
        )
        parts = {name: getattr(self.trainer, name) for name in names}
        models = {name.partition(".")[0] for name in self._models()}
        ignored = {*parts, *models, *NOT_SETTINGS}
        return {
            **describe_parts({**parts, "transform": self.transform}),
            "trainer": describe_object(self.trainer, "trainer", ignored),
        }

    def _describe_models(self) -> dict[str, Any]:
        models = {
            name if name.partition(".")[0] == "model" else f"trainer.{name}": model
            for name, model in self._models().items()
        }
        return describe_parts(models)

    def _describe_trained(self) -> dict[str, Any]:
        trained = canonical_paths([variable.path for variable in self.trainer.trainable_weights])
        return describe_parts({"trainable_weights": trained})

    def _models(self) -> dict[str, keras.layers.Layer]:
        """Returns what the trainer's attributes hold by name: "model", or "model.generator"."""
        found: dict[str, keras.layers.Layer] = {}
        for name, value in vars(self.trainer).items():
            if isinstance(value, Models):
                found |= {f"{name}.{part}": model for part, model in value.items()}
            elif isinstance(value, keras.layers.Layer):
                found[name] = value
        return found


def data_state(reader: DataReader, epoch: int, step: int, example: object) -> dict[str, Any]:
    """Returns what a resumed run needs to read on before a step.

    Args:
        reader: The reader of the data.
        epoch: The current epoch.
        step: The next step of it.
        example: The arguments of a batch.
    """
    state = reader.get_state(epoch, step)
    if reader.adapter.live:  # a resumed run can't make a batch before its models are there
        arrays = iterator_state.encode(map_arrays(to_host, example))
        state |= {"example": arrays, "live": reader.adapter.live_state()}
    return state


def check_state(facts: dict[str, Any], state: Any) -> None:
    """Checks a state from a file as far as that is possible without a run, and changes nothing.

    Args:
        facts: What was written with it.
        state: The state.

    Raises:
        ValueError: If it is not the state of a run.
    """
    check_layout(state, STATE_LAYOUT)
    data = state["data"]
    if data.get("iterator") is not None:
        check_layout(data["iterator"], ITERATOR_LAYOUT, "the state/data/iterator")
        iterator_state.check(data["iterator"]["state"])
    iterator_state.check(data.get("iterator_at_epoch_end"))
    if "previous_epoch" in data:
        layout = {"epoch_start": EPOCH_START_LAYOUT, "checksum": _anything}
        check_layout(data["previous_epoch"], layout, "the state/data/previous_epoch")
    for random in random_states(state):
        check_random_state(random, facts.get("backend") == keras.config.backend())
    try:
        history = History()
        history.set_state(state["history"])
        repr(history)  # reads all of it
    except Exception as error:
        raise ValueError(f"its history cannot be read: {error!r}") from error


def random_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the states of the global generators in a run's state: now, and as epochs began."""
    data = state["data"]
    generators = [data["epoch_start"]]
    if "previous_epoch" in data:
        generators.append(data["previous_epoch"]["epoch_start"])
    if data.get("iterator") is not None:
        generators.append(data["iterator"]["generators"])
    return [state["random"], *(each["random"] for each in generators)]


def use_own_generators(state: dict[str, Any]) -> None:
    """Replaces the states of another backend's generators by this one's."""
    own = random_state()["backend"]
    for random in random_states(state):
        random["backend"] = own
