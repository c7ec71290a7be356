"""A moving average of a model's weights."""

import copy
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops


class Average:
    """The exponential moving average of a model's weights: a model of its own.

    Keep it in an attribute of the trainer. It is then part of the run, saved and resumed with it,
    and updated after each step, unless the step calls `update` itself. (A `ValidationDataCallback`
    that validates it keeps it as `trainer.average`, if that name is free.)

    ```python
    trainer.average = polus.Average(model, decay=0.999)
    validation = ValidationDataCallback(data, name="average", model=trainer.average)
    saving = SaveModelCallback("end", "average.keras", models=["average"])
    ```

    The first update takes the weights as they are; each later one is
    `average = decay * average + (1 - decay) * weight`, as with Keras' `use_ema`. Weights that are
    not trained, such as batch norm's statistics, are copied. Calling it calls the averaged model:
    a teacher, or a target network.

    Args:
        model: The model to follow, which is built.
        decay: The share of the average that an update keeps: a number from 0 to 1, or a variable.
        average: A second model of the same architecture to hold the average. By default a copy of
            `model` is made; a class that Keras can't copy needs it.

    Attributes:
        source: The model that it follows.
        model: The averaged model.

    Raises:
        ValueError: If the model is not built, or `average` is of another architecture.
    """

    def __init__(
        self,
        model: keras.Model,
        decay: float | keras.Variable = 0.999,
        average: keras.Model | None = None,
    ) -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(f"Average follows a keras.Model, got {model!r}.")
        if not model.built or not model.variables:
            raise ValueError(
                f"Average follows a model that is built, and {model.name!r} has no weights yet. "
                "Begin it with keras.Input(shape), or call it on a batch before."
            )
        if not isinstance(decay, keras.Variable) and not 0 <= decay <= 1:
            raise ValueError(f"decay must be a number from 0 to 1, got {decay!r}.")
        self.source = model
        self.decay = decay
        self.model = copy.deepcopy(model) if average is None else average
        self.count = keras.Variable(0, dtype="int32", trainable=False, name="average_count")
        shapes = [[tuple(v.shape) for v in each.variables] for each in (model, self.model)]
        if shapes[0] != shapes[1]:
            raise ValueError("The model and its average must have the same variables in order.")
        for weight, average_weight in self.pairs():
            average_weight.assign(ops.convert_to_numpy(weight))

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables of the averaged model, and the number of updates."""
        return [*self.model.variables, self.count]

    def pairs(self) -> Iterator[tuple[keras.Variable, keras.Variable]]:
        """Yields each floating point variable of the model with that of the average."""
        for pair in zip(self.source.variables, self.model.variables, strict=True):
            if keras.backend.is_float_dtype(pair[0].dtype):
                yield pair

    def update(self) -> None:
        """Moves the average towards the weights. The trainer does it where a step does not."""
        started = ops.cast(ops.not_equal(self.count.value, 0), "float32")
        keep = started * ops.cast(ops.convert_to_tensor(self.decay), "float32")
        for weight, average in self.pairs():
            if weight.trainable:
                kept = ops.cast(keep, average.dtype)
                average.assign(kept * average.value + (1 - kept) * weight.value)
            else:
                average.assign(weight.value)
        self.count.assign_add(1)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.model(*inputs, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Average":
        source, model = (copy.deepcopy(each, memo) for each in (self.source, self.model))
        new = Average(source, self.decay, model)
        memo[id(self)] = new
        for own, copied in zip(self.variables, new.variables, strict=True):
            copied.assign(ops.convert_to_numpy(own))
        return new


def averages_of(owner: object) -> list[Average]:
    """Returns the averages that an object's attributes hold, in dicts and lists too."""
    found: list[Average] = []
    for value in vars(owner).values():
        parts = value.values() if isinstance(value, dict) else value
        parts = parts if isinstance(value, list | tuple | dict) else (value,)
        found += [part for part in parts if isinstance(part, Average) and part not in found]
    return found


def weights_for(
    trained: keras.Model, model: "keras.Model | Average"
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Returns pairs of a variable and the one whose value it takes for an evaluation.

    Args:
        trained: The trainer's model.
        model: An average, or a model of the same architecture as `trained`.

    Raises:
        ValueError: If the model has other variables.
    """
    if isinstance(model, Average):
        return list(model.pairs())
    shapes = [[tuple(v.shape) for v in each.variables] for each in (trained, model)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The model to evaluate must have the variables of the trainer's, got "
            f"{len(shapes[1])} variables for {len(shapes[0])} or other shapes."
        )
    return list(zip(trained.variables, model.variables, strict=True))
