"""Several optimizers of one trainer: their names, rates, and groups of weights."""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras

from polus.host import did_you_mean, to_host
from polus.learning_rate import schedule_of
from polus.schedules import Schedule

# Keras has it since 3.15; before that nothing is an instance of it.
MultiOptimizer: Any = getattr(keras.optimizers, "MultiOptimizer", type("MultiOptimizer", (), {}))


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
    for name, value in vars(owner).items():
        if isinstance(value, Mapping):
            parts = {f"{name}.{key}": part for key, part in value.items()}
        elif isinstance(value, list | tuple):
            parts = {f"{name}.{i}": part for i, part in enumerate(value)}
        else:
            parts = {name: value}
        for part_name, part in parts.items():
            if isinstance(part, MultiOptimizer):
                yield from inner_optimizers(part_name, part)
            elif isinstance(part, keras.optimizers.Optimizer):
                yield part_name, part


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


def rebuilt(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> keras.optimizers.Optimizer:
    """Returns the same optimizer for other variables, with what it knows of those it had.

    Args:
        optimizer: The optimizer. If it is not built, the new one is not either.
        variables: The variables to train.

    Raises:
        ValueError: If it is a `MultiOptimizer`, whose parts were made for their variables.
    """
    if isinstance(optimizer, MultiOptimizer):
        raise ValueError(
            "A MultiOptimizer can't be made again for other variables. Thaw the layers before "
            "training, with learning rates of 0 for those that wait, or use a single optimizer."
        )
    new = type(optimizer).from_config(optimizer.get_config())
    rate = schedule_of(optimizer)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        new.learning_rate = rate  # the schedule itself: it may know where its run began
    if not optimizer.built:
        return new
    new.build(list(variables))
    known = {(slot.path, tuple(slot.shape)): slot for slot in optimizer.variables}
    for slot in new.variables:
        if (old := known.get((slot.path, tuple(slot.shape)))) is not None:
            slot.assign(to_host(old))
    return new


def layerwise(
    model: keras.Model,
    learning_rate: float,
    decay: float = 0.9,
    make: Callable[[float], keras.optimizers.Optimizer] = keras.optimizers.AdamW,
) -> keras.optimizers.Optimizer:
    """Returns an optimizer whose rate falls from layer to layer, from the last to the first.

    Args:
        model: The model, which is built. Its layers are those of `model.layers` with weights, and
            of the models among these, in their order.
        learning_rate: The rate of the last layer.
        decay: The factor from each layer to the one before it.
        make: Makes the optimizer of a layer from its rate.
    """
    layers = list(_layers_with_weights(model))
    if not layers:
        raise ValueError(f"The model {model.name!r} has no weights yet. Build it before.")
    by_variable: dict[int, keras.optimizers.Optimizer] = {}
    for depth, layer in enumerate(reversed(layers)):
        optimizer = make(learning_rate * decay**depth)
        for variable in layer.variables:
            by_variable.setdefault(id(variable), optimizer)
    last = by_variable[id(layers[-1].variables[0])]
    return _multi_optimizer(lambda variable: by_variable.get(id(variable), last))


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

    def choose(variable: keras.Variable) -> keras.optimizers.Optimizer:
        for pattern, optimizer in optimizers.items():
            if fnmatch.fnmatchcase(variable.path, pattern):
                return optimizer
        raise ValueError(
            f"No pattern matches the variable {variable.path!r}, only {', '.join(optimizers)} are "
            'there. Add one for the rest: "*".'
        )

    return _multi_optimizer(choose)


def _multi_optimizer(
    choose: Callable[[keras.Variable], keras.optimizers.Optimizer],
) -> keras.optimizers.Optimizer:
    if not issubclass(MultiOptimizer, keras.optimizers.Optimizer):
        raise NotImplementedError(
            f"Keras {keras.__version__} has no MultiOptimizer. Install 3.15 or later."
        )
    return MultiOptimizer(choose)


def optimizer_named(owner: object, name: str) -> keras.optimizers.Optimizer:
    """Returns the optimizer that an object holds under a name.

    Raises:
        ValueError: If it holds none of this name.
    """
    found = optimizers_of(owner)
    if name not in found:
        hint = did_you_mean(name, found)
        raise ValueError(
            f"There is no optimizer named {name!r}. {hint + ' ' * bool(hint)}The trainer's are "
            f"{', '.join(map(repr, found)) or 'none'}."
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
