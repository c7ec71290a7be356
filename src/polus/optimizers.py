"""Several optimizers of one trainer: their names, rates, and groups of weights."""

import fnmatch
import glob
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import keras

from polus.host import did_you_mean, to_host
from polus.learning_rate import schedule_of
from polus.models import named_parts
from polus.schedules import Schedule


class _Missing:
    """Stands for a class of Keras 3.15 in versions before."""

    def __init__(self, *arguments: object) -> None:
        raise NotImplementedError(
            f"Keras {keras.__version__} has no MultiOptimizer. Install 3.15 or later."
        )


MultiOptimizer: Any = getattr(keras.optimizers, "MultiOptimizer", _Missing)
OptimizerMap: Any = getattr(keras.optimizers, "OptimizerMap", _Missing)


def optimizers_of(owner: object) -> dict[str, keras.optimizers.Optimizer]:
    """Returns the optimizers that an object's attributes hold, by name.

    The name is the attribute's, with the key behind a dot for those in a dict or list, and the
    inner optimizer's name for those of a `MultiOptimizer`: "d_optimizer", "optimizers.actor",
    "optimizer.adam". An optimizer that is held twice has its first name.
    """
    found: dict[str, keras.optimizers.Optimizer] = {}
    known: set[int] = set()
    for name, optimizer in _held(owner):
        if id(optimizer) not in known:
            known.add(id(optimizer))
            found[name] = optimizer
    return found


def _held(owner: object) -> Iterator[tuple[str, keras.optimizers.Optimizer]]:
    for name, part in named_parts(owner):
        if isinstance(part, MultiOptimizer):
            yield from inner_optimizers(name, part)
        elif isinstance(part, keras.optimizers.Optimizer):
            yield name, part


def inner_optimizers(
    name: str, optimizer: keras.optimizers.Optimizer
) -> Iterator[tuple[str, keras.optimizers.Optimizer]]:
    """Yields the optimizers of a `MultiOptimizer` by name; a repeated one has a number."""
    seen: dict[str, int] = {}
    for inner in optimizer.optimizers:
        kind = re.sub(r"_\d+$", "", inner.name)  # Keras counts the optimizers of a process
        seen[kind] = seen.get(kind, 0) + 1
        number = f"_{seen[kind] - 1}" if seen[kind] > 1 else ""
        yield f"{name}.{kind}{number}", inner


@keras.saving.register_keras_serializable(package="polus")
class Groups(MultiOptimizer):
    """A Keras `MultiOptimizer` of groups of weights by their names; see `by_name`, `layerwise`.

    Its optimizers are known before it is built, and it is saved, copied and made again like any
    other optimizer.

    Args:
        patterns: Pairs of a pattern of paths and the index of an optimizer. The first that matches
            a variable's path counts.
        optimizers: The optimizers.
        name: The name of the optimizer.
        loss_scale_factor: As for `MultiOptimizer`.
    """

    def __init__(
        self,
        patterns: Sequence[tuple[str, int]],
        optimizers: Sequence[keras.optimizers.Optimizer],
        name: str | None = None,
        loss_scale_factor: float | None = None,
    ) -> None:
        super().__init__(_Patterns(patterns, optimizers), loss_scale_factor, name)
        self.patterns = tuple((pattern, int(index)) for pattern, index in patterns)

    def get_config(self) -> dict[str, Any]:
        optimizers = [keras.saving.serialize_keras_object(each) for each in self.optimizers]
        return {
            "patterns": self.patterns,
            "optimizers": optimizers,
            "name": self.name,
            "loss_scale_factor": self.loss_scale_factor,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        optimizers = [
            keras.saving.deserialize_keras_object(each, custom_objects)
            for each in config["optimizers"]
        ]
        return cls(**{**config, "optimizers": optimizers})


class _Patterns(OptimizerMap):
    """Chooses an optimizer by the first pattern that a variable's path matches."""

    def __init__(
        self,
        patterns: Sequence[tuple[str, int]],
        optimizers: Sequence[keras.optimizers.Optimizer],
    ) -> None:
        super().__init__(optimizers[0], {str(i): each for i, each in enumerate(optimizers)})
        self.patterns = patterns

    def __call__(self, variable: keras.Variable) -> keras.optimizers.Optimizer:
        for pattern, index in self.patterns:
            if fnmatch.fnmatchcase(variable.path, pattern):
                return self[str(index)]
        raise ValueError(
            f"No pattern matches the variable {variable.path!r}, only "
            f"{', '.join(pattern for pattern, _ in self.patterns)} are there. Add one for the "
            'rest: "*".'
        )


def rebuilt(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> keras.optimizers.Optimizer:
    """Returns the same optimizer for other variables, with what it knows of those it had.

    Args:
        optimizer: The optimizer. If it is not built, the new one is not either.
        variables: The variables to train.

    Raises:
        ValueError: If it is a `MultiOptimizer` that chooses by a function.
    """
    new = of_same_config(optimizer)
    pairs = list(zip(_inner(optimizer), _inner(new), strict=True))
    for old, own in pairs:
        rate = schedule_of(old)
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            own.learning_rate = rate  # the schedule itself: it may know where its run began
    if not optimizer.built:
        return new
    new.build(list(variables))
    for old, own in [(optimizer, new), *pairs]:
        known = {(slot.path, tuple(slot.shape)): slot for slot in old.variables}
        for slot in own.variables:
            if (same := known.get((slot.path, tuple(slot.shape)))) is not None:
                slot.assign(to_host(same))
    return new


# Where Keras keeps what `exclude_from_weight_decay` was told; its configuration leaves it out.
EXCLUDED, EXCLUDED_NAMES = "_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"
KEY = "_var_key"  # the method that names a variable in it


def of_same_config(
    optimizer: keras.optimizers.Optimizer,
    copies: Sequence[tuple[keras.Variable, keras.Variable]] = (),
) -> keras.optimizers.Optimizer:
    """Returns a new optimizer of the same settings, which is not built.

    Args:
        optimizer: The optimizer.
        copies: Pairs of a variable and the one that takes its place, for an optimizer of others.

    Raises:
        ValueError: If it is a `MultiOptimizer` that chooses by a function.
    """
    if isinstance(optimizer, Groups):  # whose optimizers may be of classes that Keras doesn't know
        parts = [of_same_config(each, copies) for each in optimizer.optimizers]
        return Groups(optimizer.patterns, parts, optimizer.name, optimizer.loss_scale_factor)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a function that is not saved: it raises below
            rate = schedule_of(optimizer)
            config = optimizer.get_config()
            if isinstance(config.get("learning_rate"), dict):
                # Of a schedule: Keras finds only schedules that are registered by their names.
                config |= {"learning_rate": type(rate).from_config(rate.get_config())}
            new = type(optimizer).from_config(config)
    except (TypeError, ValueError):  # a function is not found again by its name
        if not isinstance(optimizer, MultiOptimizer):
            raise
        new = None
    if new is None or len(_inner(new)) != len(_inner(optimizer)):
        raise ValueError(
            "A MultiOptimizer that chooses by a function can't be made again for other weights, "
            "such as thawed ones. Choose by the names of weights: "
            'polus.optimizers.by_name({"backbone/*": keras.optimizers.Adam(1e-5), "*": '
            "keras.optimizers.Adam(1e-3)}), polus.optimizers.layerwise(model, 1e-3) or a "
            "keras.optimizers.OptimizerMap."
        )
    for old, own in zip(_inner(optimizer), _inner(new), strict=True):
        if hasattr(old, EXCLUDED):
            key = getattr(old, KEY)
            excluded = set(getattr(old, EXCLUDED))
            excluded |= {key(copied) for variable, copied in copies if key(variable) in excluded}
            setattr(own, EXCLUDED, excluded)
            setattr(own, EXCLUDED_NAMES, getattr(old, EXCLUDED_NAMES))
    return new


def _inner(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    if isinstance(optimizer, MultiOptimizer):
        return list(optimizer.optimizers)
    return [getattr(optimizer, "inner_optimizer", optimizer)]


def layerwise(
    model: keras.Model,
    learning_rate: float,
    decay: float = 0.9,
    make: Callable[[float], keras.optimizers.Optimizer] = keras.optimizers.AdamW,
) -> keras.optimizers.Optimizer:
    """Returns an optimizer whose rate falls from layer to layer, from the last to the first.

    Args:
        model: The model, which is built. Its layers are those of `model.layers` with weights, and
            of the models among these, in their order. Frozen ones count as well.
        learning_rate: The rate of the last layer.
        decay: The factor from each layer to the one before it.
        make: Makes the optimizer of a layer from its rate.

    Raises:
        ValueError: If it has no weights yet, or two layers have weights of one path.
    """
    layers = list(_layers_with_weights(model))
    if not layers:
        raise ValueError(f"The model {model.name!r} has no weights yet. Build it before.")
    depths: dict[str, int] = {}
    known: dict[str, keras.Variable] = {}
    for depth, layer in enumerate(reversed(layers)):
        for variable in layer.weights:
            depths.setdefault(variable.path, depth)
            if known.setdefault(variable.path, variable) is not variable:
                raise ValueError(
                    f"Two layers of {model.name!r} have a weight of the path {variable.path!r}, by "
                    "which layerwise tells them apart. Give the layers names of their own."
                )
    patterns = [(glob.escape(path), depth) for path, depth in depths.items()]
    optimizers = [make(learning_rate * decay**depth) for depth in range(len(layers))]
    return Groups([*patterns, ("*", 0)], optimizers)


def _layers_with_weights(model: keras.Model) -> Iterator[keras.layers.Layer]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers_with_weights(layer)
        elif layer.weights:
            yield layer


def by_name(
    optimizers: Mapping[str, keras.optimizers.Optimizer],
) -> keras.optimizers.Optimizer:
    """Returns an optimizer that trains groups of weights by their names.

    ```python
    by_name({
        "*/bias": keras.optimizers.AdamW(1e-3, weight_decay=0.0),
        "*": keras.optimizers.AdamW(1e-3, weight_decay=0.01),
    })
    ```

    Args:
        optimizers: Patterns of paths, as in `variable.path`, to optimizers. The first that matches
            counts. (Without weight decay alone, Keras' `optimizer.exclude_from_weight_decay(
            var_names=["bias", "gamma", "beta"])` does it too.)
    """
    distinct = list({id(each): each for each in optimizers.values()}.values())
    index = {id(each): i for i, each in enumerate(distinct)}
    return Groups([(p, index[id(each)]) for p, each in optimizers.items()], distinct)


def optimizer_named(owner: object, name: str) -> keras.optimizers.Optimizer:
    """Returns the optimizer that an object holds under a name.

    Raises:
        ValueError: If it holds none of this name.
    """
    found = optimizers_of(owner)
    if name not in found:
        hint = did_you_mean(name, found)
        unknown = [
            each
            for each in vars(owner).values()
            if isinstance(each, MultiOptimizer) and not each.optimizers
        ]
        later = (
            " Those of a MultiOptimizer that chooses by a function are known when it is built: "
            "optimizer.build(model.trainable_variables)."
        )
        raise ValueError(
            f"There is no optimizer named {name!r}. {hint + ' ' * bool(hint)}The trainer's are "
            f"{', '.join(map(repr, found)) or 'none'}.{later * bool(unknown)}"
        )
    return found[name]


def begin_schedules(owner: object, total_steps: int, resumed: bool) -> None:
    """Tells the schedules of an object's optimizers the length of the run that begins.

    Args:
        owner: The trainer.
        total_steps: The steps of the run; 0 if they are not known.
        resumed: Whether it continues a run, whose first step the schedules know.

    Raises:
        ValueError: If a schedule needs the number of steps, and it is not known.
    """
    for optimizer in optimizers_of(owner).values():
        if isinstance(schedule := schedule_of(optimizer), Schedule):
            first = schedule.first if resumed else optimizer.iterations
            schedule.begin(int(to_host(first)), total_steps)


def rate_of(optimizer: keras.optimizers.Optimizer) -> float:
    """Returns the present learning rate, of a schedule too. Waits for the device."""
    return float(to_host(optimizer.learning_rate))


def rates_of(owner: object, always: bool = False) -> dict[str, float]:
    """Returns the learning rates of an object's optimizers as logs name them, if it has several.

    "learning_rate" is that of the attribute `optimizer`; others are "d_optimizer_learning_rate".

    Args:
        owner: The object.
        always: Whether that of a single optimizer is returned as well.
    """
    found = optimizers_of(owner)
    return {
        "learning_rate" if name == "optimizer" else f"{name}_learning_rate": rate_of(optimizer)
        for name, optimizer in (found.items() if always or len(found) > 1 else ())
    }
