"""The interface of a metric, and samples with weights."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

from polus.host import to_host
from polus.types import Tensor

PER_OUTPUT = (
    'For a model with several outputs use metrics={"<output>": [metric, ...]}, or select one with '
    'reduce_f: Accuracy(3, reduce_f=lambda s: (s[0]["a"], s[1]["a"])).'
)


class WeightedSamples(NamedTuple):
    """Samples with weights, for `update_metrics`, where a plain tuple of three has no such meaning.

    Attributes:
        y_true: The labels.
        y_pred: The predictions.
        sample_weight: The weight of each example, or of each label, as in `fit`. None for none.
    """

    y_true: Any
    y_pred: Any
    sample_weight: Any


class MetricLike(Protocol):
    """An `IMetric` or a `keras.metrics.Metric`, for type checkers, which find no types in Keras."""

    name: Any

    def update_state(self, *args: Any, **kwargs: Any) -> object: ...
    def result(self) -> object: ...
    def reset_state(self) -> object: ...


class IMetric(keras.metrics.Metric, ABC):
    """The interface of a metric: batches of samples go in, one value comes out.

    It must be subclassed. A subclass creates the variables that it accumulates, by `add_variable`,
    and implements an update and the value in `keras.ops`::

        class MeanError(IMetric):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.total = self.add_variable((), "zeros")
                self.count = self.add_variable((), "zeros")

            def _samples_from_batch(self, y_true, y_pred):
                self.total.assign_add(ops.sum(ops.abs(y_true - y_pred)))
                self.count.assign_add(ops.cast(ops.size(y_true), "float32"))

            def _evaluate(self):
                return self.total / self.count

    An `IMetric` is a `keras.metrics.Metric` as well, so `model.compile` accepts it.

    Args:
        reduce_f: Takes the samples of a batch, as the trainer passes them, and returns the tuple
            that `_samples_from_batch` takes, e.g. `lambda s: (s[0], s[1]["start"])`.
        name: The name in logs. Defaults to the name of the class in snake case.
    """

    def __init__(
        self, reduce_f: Callable[[Any], tuple[Any, ...]] | None = None, name: str | None = None
    ) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r}.")
        if reduce_f is not None and not callable(reduce_f):
            raise TypeError(f"reduce_f must be a function of the samples, got {reduce_f!r}.")
        super().__init__(name=name)
        self.reduce_f = reduce_f
        self.has_samples = False

    @abstractmethod
    def _samples_from_batch(self, *samples: Any, **named: Any) -> None:
        """Adds a batch to the variables. May run inside a compiled step.

        Overrides name their arguments, `(self, y_true, y_pred)`, and may take `sample_weight=None`.
        """

    @abstractmethod
    def _evaluate(self) -> Any:
        """Returns the value over all samples since the last reset, and changes nothing."""

    def samples_from_batch(self, samples: tuple[Any, ...]) -> None:
        """Adds a batch.

        Args:
            samples: The tuple `(y_true, y_pred)` or `(y_true, y_pred, sample_weight)` of tensors,
                or the tuple that `reduce_f` takes.

        Raises:
            TypeError: If the samples, or what `reduce_f` returned, are not a tuple.
        """
        self.has_samples = True
        if self.reduce_f is not None:
            samples = self.reduce_f(samples)
        if not isinstance(samples, tuple | list):
            raise TypeError(
                f"Metric {self.name!r} expected the samples of a batch as a tuple "
                f"(y_true, y_pred), got {kind(samples)}. Pass a tuple, or return one from reduce_f."
            )
        self._samples_from_batch(*samples)

    def sample_parameters(self) -> list[inspect.Parameter]:
        """Returns the parameters that the samples of a batch are passed to."""
        return list(inspect.signature(self._samples_from_batch).parameters.values())

    def evaluate(self) -> Any:
        """Returns the value as a Python float (a NumPy array if it is no scalar) and resets."""
        try:
            return keras.tree.map_structure(_python_value, self._evaluate())
        finally:
            self.reset()

    def reset(self) -> None:
        """Discards all samples."""
        self.reset_state()

    def reset_state(self) -> None:
        """Does what `reset` does, under Keras' name for it: sets all variables to zero."""
        for variable in self.variables:
            variable.assign(np.zeros(variable.shape))  # not ops.zeros, which JAX compiles

    def update_state(self, *samples: Any, sample_weight: Any = None) -> None:
        """Does what `samples_from_batch` does, with Keras' signature."""
        self.samples_from_batch(samples if sample_weight is None else (*samples, sample_weight))

    def result(self) -> object:
        """Returns the value as a tensor, as Keras expects it, without a reset."""
        result: Tensor = self._evaluate()
        return result


def kind(value: object) -> str:
    """Describes the type of a value that was not expected."""
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(repr, value))}"
    return f"a {type(value).__name__}"


def _python_value(value: Any) -> Any:
    array = to_host(value)
    return float(array) if array.ndim == 0 else array
