"""The variables of a step, and what a compiled step depends on besides them."""

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import ismethod
from typing import Any, Protocol

import keras

from polus.backends.placement import ReplicaState
from polus.backends.scopes import DryRun
from polus.metrics import IMetric, as_metric
from polus.optimizers import optimizers_of
from polus.state import layers_of

Variables = list[keras.Variable]

CONVOLUTIONS = (
    *(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D),
    *(keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose),
    *(keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D),
    *(keras.layers.SeparableConv1D, keras.layers.SeparableConv2D),
)


def unique(variables: Iterable[Any]) -> list[Any]:
    """Returns the variables in their order, each once."""
    return list({id(variable): variable for variable in variables}.values())


@dataclass(frozen=True)
class Update:
    """What one optimizer of a step updates."""

    optimizer: keras.optimizers.Optimizer
    variables: Variables


@dataclass(frozen=True)
class StepVariables:
    """What one dry run of a step has seen.

    Attributes:
        used: All variables that the step reads or assigns, in first-use order, the optimizers' too.
        assigned: Those that it assigns, and those of the backend's own, which may be assigned.
        differentiated: Those that it reads where gradients flow.
        updates: What each optimizer updates.
        num_decisions: How often updates were made, of which several may go together.
        by_hand: Whether the step called an optimizer itself.
        settings: The names of settings of the trainer that it has used.
        result: What the step returned: tensors, or descriptions of them.
    """

    used: Variables
    assigned: Variables
    differentiated: Variables
    updates: list[Update]
    num_decisions: int
    by_hand: bool
    settings: set[str]
    result: Any

    @classmethod
    def of(cls, seen: DryRun) -> "StepVariables":
        """Collects what a dry run recorded; its optimizers are built."""
        updates = [Update(optimizer, weights) for optimizer, weights in seen.merged_updates()]
        updated = [v for u in updates for v in (*u.variables, *u.optimizer.variables)]
        return cls(
            used=unique([*seen.variables, *updated]),
            assigned=unique([*seen.assigned.values(), *updated, *seen.backend_variables]),
            differentiated=unique(seen.differentiated),
            updates=updates,
            num_decisions=seen.num_decisions,
            by_hand=seen.by_hand,
            settings=seen.settings,
            result=seen.result,
        )

    def known(self, more: Iterable[Any] = ()) -> tuple[Variables, Variables]:
        """Returns the variables that the step assigns, and `more`, and those it only reads."""
        assigned = unique([*self.assigned, *more])
        ids = set(map(id, assigned))
        return assigned, [v for v in self.used if id(v) not in ids]

    @property
    def untrained(self) -> Variables:
        """The trainable variables that gradients reach and no optimizer updates."""
        updated = {id(v) for update in self.updates for v in update.variables}
        updated |= set(map(id, self.assigned))  # such as the average of weights
        return [v for v in self.differentiated if v.trainable and id(v) not in updated]


def held(owner: object) -> Iterator[Any]:
    """Yields what the attributes of an object hold, lists, tuples and dicts of them too."""
    for value in vars(owner).values():
        if isinstance(value, list | tuple | Mapping):
            yield from keras.tree.flatten(value)
        else:
            yield value


def is_built(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer and all layers in it are built."""
    # A Sequential with a wrapped PyTorch module says it is built before the layers behind it are.
    return all(part.built for part in layers_of(layer))


def held_layers(owner: object) -> list[keras.layers.Layer]:
    """Returns the layers and models that the attributes of an object hold."""
    return unique(value for value in held(owner) if isinstance(value, keras.layers.Layer))


def held_parts(owner: object) -> list[Any]:
    """Returns what the attributes of an object hold, and the layers in it."""
    layers = [part for layer in held_layers(owner) for part in layers_of(layer)]
    return [*held(owner), *layers]


def held_variables(owner: object) -> Variables:
    """Returns the variables of the layers, optimizers and metrics that an object holds."""
    found = [
        [value] if isinstance(value, keras.Variable) else getattr(value, "variables", [])
        for value in held(owner)
    ]
    return unique(itertools.chain.from_iterable(each for each in found if isinstance(each, list)))


class MetricsOwner(Protocol):
    """Something with metrics: a trainer."""

    @property
    def metrics(self) -> Sequence[IMetric]: ...
    @property
    def validation_metrics(self) -> Sequence[IMetric] | None: ...


def fed_metrics(owner: MetricsOwner, variables: StepVariables) -> list[IMetric]:
    """Returns the metrics that a step updates: the owner's, and those in attributes and layers.

    A metric in an attribute or a layer is left out if the step returns a term of its name: then it
    is recorded already.
    """
    terms = variables.result if isinstance(variables.result, dict) else {"loss": None}
    assigned = {id(variable) for variable in variables.assigned}
    found = [*owner.metrics, *more_metrics(owner, owner.metrics, assigned, terms)]
    return [m for m in found if any(id(v) in assigned for v in m.variables)]


def more_metrics(
    owner: object, own: Sequence[IMetric], assigned: Container[int], terms: Container[str]
) -> list[IMetric]:
    """Returns the metrics in attributes and layers that a step updates.

    Args:
        owner: What has the attributes.
        own: The metrics that are known already.
        assigned: The ids of the variables that the step assigns.
        terms: The names of what the step returns.
    """
    names = {metric.name for metric in own}
    known = {id(v) for metric in own for v in metric.variables}
    more: dict[str, IMetric] = {}
    for metric in _held_metrics(owner):
        ids = set(map(id, metric.variables))
        taken = metric.name in names or metric.name in terms or metric.name in more
        if not taken and not ids & known and any(each in assigned for each in ids):
            more[metric.name] = as_metric(metric)
    return list(more.values())


def _held_metrics(owner: object) -> list[keras.metrics.Metric]:
    """Returns the metrics in the attributes of an object, and in those of the layers it holds."""
    parts = [part for layer in held_layers(owner) for part in layers_of(layer)]
    values = [each for part in parts for value in vars(part).values() for each in _items(value)]
    found = [*held(owner), *values]
    return [value for value in unique(found) if isinstance(value, keras.metrics.Metric)]


def _items(value: object) -> Iterable[Any]:
    """Returns what a list, tuple or dict holds, and anything else itself.

    `keras.tree` would sort a dict, and Keras has some whose keys are layers.
    """
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else [value]


def replica_state(owner: MetricsOwner, variables: StepVariables) -> ReplicaState:
    """Returns the variables of a step that replicas change by their own part of a batch.

    What an optimizer updates is not among them: its gradients are those of the whole batch.
    """
    updated = {id(v) for u in variables.updates for v in (*u.variables, *u.optimizer.variables)}
    metrics = {id(v) for m in (*owner.metrics, *_held_metrics(owner)) for v in m.variables}
    used = {id(v) for v in variables.used}  # all but scratch, which no later step reads
    summed, averaged, seeds = [], [], []
    for variable in variables.assigned:
        if id(variable) in updated or id(variable) not in used:
            continue
        if id(variable) in metrics and getattr(variable, "aggregation", "sum") != "mean":
            summed.append(variable)
        elif variable.path.endswith("seed_generator_state"):
            seeds.append(variable)
        elif keras.backend.is_float_dtype(variable.dtype):
            averaged.append(variable)
    optimizers = [*optimizers_of(owner).values(), *(u.optimizer for u in variables.updates)]
    every = unique([*variables.used, *variables.assigned])
    return ReplicaState(summed, averaged, seeds, optimizers, every)


def plain_attributes(owner: object, ignored: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the numbers, strings and flags among an object's attributes and its layers'.

    A compiled step has read them as constants, so a change of one needs another compilation.
    """
    ignored = set(ignored)
    plain = {
        name: value
        for name, value in vars(owner).items()
        if name not in ignored and _is_plain(value)
    }
    for root in held_layers(owner):
        for i, layer in enumerate(layers_of(root)):
            for name, value in _layer_attributes(layer):
                plain[f"{root.name}/{layer.name}#{i}.{name}"] = value
    return plain


def _layer_attributes(layer: keras.layers.Layer) -> Iterator[tuple[str, Any]]:
    yield "trainable", layer.trainable
    for name, value in vars(layer).items():
        if not name.startswith("_") and name not in _KERAS_LOOP and _is_plain(value):
            yield name, value


# What Keras' own loops and callbacks set on a model.
_KERAS_LOOP = {"built", "stop_training", "stop_evaluating", "stop_predicting", "seed"}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def has_convolutions(layers: Iterable[keras.layers.Layer]) -> bool:
    """Returns whether one of the layers is a convolution of Keras', or has one in it."""
    return any(isinstance(part, CONVOLUTIONS) for layer in layers for part in layers_of(layer))


def build_optimizers(updates: Iterable[tuple[keras.optimizers.Optimizer, Variables]]) -> None:
    """Builds the optimizers that are not built yet for the weights that they update."""
    for optimizer, weights in updates:
        if weights and not optimizer.built:
            optimizer.build(unique(weights))


def plain_parts(owner: object) -> dict[str, Any]:
    """Returns the attributes that a compiled step has as constants."""
    return plain_attributes(owner, ignored=("early_stop", "log_name"))


def same_objects(parts: Sequence[Any], others: Sequence[Any]) -> bool:
    """Returns whether these are the same objects. A method is another each time it is looked up."""
    same = (a is b or (ismethod(a) and a == b) for a, b in zip(parts, others, strict=False))
    return len(parts) == len(others) and all(same)
