"""What was measured of a step, for the next step of the same kind: in this process and the next.

A wrong entry costs speed and no more: which ways there are is decided where they are used.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import keras

from polus.core import get_tuning_cache
from polus.data.batches import signature_of
from polus.environment import describe_machine
from polus.files import atomic_write, open_regular
from polus.optimizers import optimizers_of
from polus.state import layers_of
from polus.steps.autotune import Timing, Timings, Tuning
from polus.steps.variables import MetricsOwner, StepVariables, held_layers, plain_attributes

VERSION = 1
MAX_STEPS = 1000  # of which the file keeps timings
MAX_BYTES = 2**24  # of a file that is read

logger = logging.getLogger("polus.steps")


class TuningCache:
    """The timings of steps by their kind. What is new goes into a file.

    Args:
        path: The file. One that is damaged, or of another version, counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._timings: dict[str, Timings] = {}

    def timings(self, key: str) -> Timings:
        """Returns the timings of one kind of step, to which the caller may add."""
        if key not in self._timings:
            timings = self._timings[key] = _parsed(self._read().get(key))
            timings.save = functools.partial(self._save, key)
        return self._timings[key]

    def _save(self, key: str) -> None:
        """Adds a kind of step to the file. Where that is not possible, nothing happens."""
        steps = self._read()
        steps.pop(key, None)
        steps[key] = [[*tuning, *cost] for tuning, cost in self._timings[key].costs.items()]
        content = {"version": VERSION, "steps": dict(list(steps.items())[-MAX_STEPS:])}
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(content))
        except OSError as error:
            logger.debug("The timings of steps can't be written to %s: %s", self.path, error)

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            with open_regular(self.path) as file:
                content = json.loads(file.read(MAX_BYTES))
            if isinstance(content, dict) and content.get("version") == VERSION:
                steps = content.get("steps")
                return steps if isinstance(steps, dict) else {}
        return {}


def active_cache() -> TuningCache | None:
    """Returns the cache that `polus.core.set_tuning_cache` chose; None if it is off."""
    path = get_tuning_cache()
    return None if path is None else _cache(path)


@functools.cache
def _cache(path: Path) -> TuningCache:
    return TuningCache(path)


def kind_of_step(
    owner: MetricsOwner, variables: StepVariables, example: Any, settings: Sequence[Any]
) -> str:
    """Returns a key that is the same for steps that take the same time on this machine.

    Rates and other numbers of the trainer, and the names of layers, do not count.

    Args:
        owner: The trainer.
        variables: What the step's dry run has seen.
        example: A first batch.
        settings: How it may run.
    """
    layers = [part for layer in held_layers(owner) for part in layers_of(layer)]
    losses = getattr(owner, "loss", None)
    parts = [
        describe_machine(),
        [_code(part) for part in (owner, *layers, *optimizers_of(owner).values(), *owner.metrics)],
        [_code(loss) for loss in keras.tree.flatten(losses)],
        list(_architecture(owner)),
        [(tuple(v.shape), v.dtype, v.trainable) for v in variables.used],
        signature_of(example),
        settings,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _architecture(owner: MetricsOwner) -> Iterator[tuple[str, Any]]:
    """Yields the whole numbers, flags and texts among the attributes of layers."""
    for path, value in plain_attributes(owner).items():
        _, of_layer, name = path.rpartition("#")
        if of_layer and not name.endswith(".name") and not isinstance(value, float):
            yield name, value


def _code(part: object) -> list[Any]:
    """Describes what a part computes by its classes, and by the code of those that users wrote."""
    classes = [part] if isinstance(part, FunctionType) else type(part).__mro__
    found: list[Any] = []
    for each in classes:
        functions = [each, *vars(each).values()]
        own = not each.__module__.startswith(("builtins", "keras.", "polus."))
        found += each.__module__, each.__qualname__
        found += [f.__code__.co_code for f in functions if own and isinstance(f, FunctionType)]
    return found


def _parsed(entry: object) -> Timings:
    """Returns the timings of a step as they stand in a file; those that are none are left out."""
    timings = Timings()
    with contextlib.suppress(TypeError, ValueError):
        for jit_compile, steps, *cost in entry if isinstance(entry, list) else []:
            secs, compile_secs = map(float, cost)
            if 0 < secs < math.inf and 0 <= compile_secs < math.inf:
                timings.costs[Tuning(jit_compile, steps)] = Timing(secs, compile_secs)
    return timings
