"""Metrics that are counted inside the compiled step and read when an epoch or a validation ends.

A metric takes samples batch by batch and keeps what it needs in Keras variables, so that no
prediction leaves the device and none is kept::

    metric = MacroF1Score(num_classes=10)
    for x, y in dataset:
        metric.samples_from_batch((y, model(x)))
    print(metric.evaluate())  # the measure over all batches; starts anew
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops


class MetricLike(Protocol):
    """An `IMetric` or a `keras.metrics.Metric`, for type checkers, which find no types in Keras."""

    name: Any

    def update_state(self, *args: Any, **kwargs: Any) -> object: ...
    def result(self) -> Any: ...
    def reset_state(self) -> object: ...


class IMetric(keras.metrics.Metric, ABC):
    """What a metric of Polus is: batches of samples go in, one measure comes out.

    It is extended, not instantiated. A metric of one's own says what it keeps (Keras variables,
    as attributes or by `add_variable`), how a batch changes it and what the measure is, in
    `keras.ops`::

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

    It is a `keras.metrics.Metric` as well: `update_state(*samples)`, `result()` and
    `reset_state()` are the same three things under the names that Keras calls.

    Attributes:
        has_samples: Whether a batch was ever added, be it in a step that is only being compiled.

    Args:
        reduce_f: Applied to the samples of a batch first. It takes the tuple of samples and
            returns the tuple that `_samples_from_batch` takes, e.g. `lambda s: (s[0],
            s[1]["start"])`.
        name: The name in logs; by default the class's, in snake case.
    """

    def __init__(
        self, reduce_f: Callable[[Any], tuple[Any, ...]] | None = None, name: str | None = None
    ) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"The name of a metric must be a string, got {name!r}.")
        if reduce_f is not None and not callable(reduce_f):
            raise TypeError(f"reduce_f must be a function of the samples, got {reduce_f!r}.")
        super().__init__(name=name)
        self.reduce_f = reduce_f
        self.has_samples = False

    @abstractmethod
    def _samples_from_batch(self, *samples: Any, **named: Any) -> None:
        """Adds a batch to what is kept in variables; may run inside a compiled step."""

    @abstractmethod
    def _evaluate(self) -> Any:
        """Gives the measure over all samples since the last reset, and changes nothing."""

    def samples_from_batch(self, samples: tuple[Any, ...]) -> None:
        """Adds a batch.

        Args:
            samples: The tuple `(y_true, y_pred)` of tensors, or whatever tuple `reduce_f` takes.
        """
        self.has_samples = True
        if self.reduce_f is not None:
            samples = self.reduce_f(samples)
        if not isinstance(samples, tuple | list):
            raise TypeError(
                f"Metric '{self.name}' got a {type(samples).__name__} as the samples of a batch; a "
                "tuple (y_true, y_pred) was expected. Return a tuple from reduce_f, or pass one."
            )
        self._samples_from_batch(*samples)

    def evaluate(self) -> Any:
        """Gives the measure as a Python float (a NumPy array where it is no scalar), and resets."""
        try:
            return keras.tree.map_structure(_to_host, self._evaluate())
        finally:
            self.reset()

    def reset(self) -> None:
        """Forgets all samples."""
        self.reset_state()

    def reset_state(self) -> None:
        """`reset` as Keras calls it: all variables are zero again."""
        for variable in self.variables:
            variable.assign(np.zeros(variable.shape))  # not ops.zeros, which JAX compiles

    def update_state(self, *samples: Any, sample_weight: Any = None) -> None:
        """`samples_from_batch` as Keras calls it."""
        self.samples_from_batch(samples if sample_weight is None else (*samples, sample_weight))

    def result(self) -> Any:
        """`evaluate` as Keras calls it: a tensor, and nothing is reset."""
        return self._evaluate()


class IConfusionMatrix(IMetric):
    """A metric that is a function of the confusion matrix.

    Descendants write `_evaluate` from `self.confusion_matrix`, an integer variable of shape
    `(num_classes, num_classes)`: `[i, j]` counts the labels of class i that were taken for class
    j. It is exact up to 2**31 - 1 labels in one cell (on TensorFlow 2**63 - 1), where a float32
    count stands still at 2**24.

    What `y_true` and `y_pred` may be, with C classes and any leading shape `(...)`, such as
    `(N,)` or `(N, T)`:

    ========== ============ ======================================================================
    `y_true`   `y_pred`     read as
    ========== ============ ======================================================================
    `(...)`    `(..., C)`   scores, logits or probabilities: the class of the highest one counts
    `(..., 1)` `(..., C)`   the same, as Keras shapes labels
    `(..., C)` `(..., C)`   one-hot labels, where `y_pred` holds floats
    `(..., C)` `(...)`      one-hot labels, predicted classes
    `(...)`    `(...)`      classes; with C = 2 and floats: probabilities of class 1, more than 0.5
                            is class 1 (pass logits through a sigmoid first)
    ========== ============ ======================================================================

    A last axis of length 1 counts as absent. What is shaped otherwise is for `reduce_f` to bring
    into one of these. Labels may be integers or floats of integer value.

    Args:
        num_classes: The number of classes C, at least 2; labels are 0 to C - 1.
        reduce_f: See `IMetric`.
        ignore_class: Where `y_true` is this number, nothing is counted, such as padding marked
            -100 or -1. It may lie outside of 0 to C - 1.
        name: The name in logs.

    Raises:
        ValueError: At once where shapes cannot be read as above; by `evaluate` where a label
            outside of 0 to C - 1 was met (a compiled step can count such labels but not raise;
            `result` is NaN then).
    """

    def __init__(
        self,
        num_classes: int,
        reduce_f: Callable[[Any], tuple[Any, ...]] | None = None,
        *,
        ignore_class: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(reduce_f, name)
        for argument, value in {"num_classes": num_classes, "ignore_class": ignore_class}.items():
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole and not (argument == "ignore_class" and value is None):
                raise TypeError(f"{argument} must be an integer, got {value!r}.")
        if num_classes < 2:
            raise ValueError(
                f"Metric '{self.name}' got num_classes={num_classes}; at least 2 was expected. "
                "A yes-or-no label has two classes: write num_classes=2."
            )
        self.num_classes = num_classes
        self.ignore_class = ignore_class
        # "int" is int64 on TensorFlow, which keeps int32 off the GPU, and int32 elsewhere.
        self.confusion_matrix = self.add_variable(
            (num_classes, num_classes), "zeros", dtype="int", name="confusion_matrix"
        )
        self.num_invalid = self.add_variable((), "zeros", dtype="int", name="num_invalid")

    def _samples_from_batch(self, y_true: Any, y_pred: Any) -> None:
        y_true, y_pred = self._labels(ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred))
        # Each pair of labels is added to its cell: for two thousand labels of fifty classes that
        # takes a fortieth of the product of one-hot matrices.
        true, is_true = self._index(y_true)
        predicted, is_predicted = self._index(y_pred)
        known = is_true & is_predicted
        if self.ignore_class is None:
            invalid = ~known
        else:
            counted = y_true != self.ignore_class
            known, invalid = known & counted, counted & ~known
        dtype = self.confusion_matrix.dtype
        cells = ops.where(known[:, None], ops.stack([true, predicted], axis=1), 0)
        self.confusion_matrix.assign(
            ops.scatter_update(
                self.confusion_matrix, cells, ops.cast(known, dtype), reduction="add"
            )
        )
        self.num_invalid.assign_add(ops.sum(ops.cast(invalid, dtype)))

    def _index(self, labels: Any) -> tuple[Any, Any]:
        """Labels as int32, and where they are one of the classes."""
        if keras.backend.standardize_dtype(labels.dtype) == "int32":
            return labels, (labels >= 0) & (labels < self.num_classes)
        index = ops.cast(labels, "int32")
        whole = ops.cast(index, labels.dtype) == labels  # unlike 1.5, NaN or 2**32
        return index, whole & (index >= 0) & (index < self.num_classes)

    def _labels(self, y_true: Any, y_pred: Any) -> tuple[Any, Any]:
        """Gives both as labels of shape (N,), by the table in the class's docstring."""
        true_shape, pred_shape = tuple(y_true.shape), tuple(y_pred.shape)
        floats = "float" in keras.backend.standardize_dtype(y_pred.dtype)
        scores = pred_shape[-1:] == (self.num_classes,) and (
            len(pred_shape) == len(true_shape) + 1
            or (
                floats
                and len(pred_shape) == len(true_shape) > 1
                and true_shape[-1] in (1, self.num_classes)
            )
        )
        one_hot = true_shape[-1:] == (self.num_classes,) and (
            len(true_shape) == len(pred_shape) + 1
            or (scores and len(true_shape) == len(pred_shape))
        )
        if scores:
            y_pred = ops.argmax(y_pred, axis=-1)
        elif floats and self.num_classes == 2:
            y_pred = y_pred > 0.5
        if one_hot:
            y_true = ops.argmax(y_true, axis=-1)
        if not _same_labels(tuple(y_true.shape), tuple(y_pred.shape)):
            raise ValueError(
                f"Metric '{self.name}' with num_classes={self.num_classes} got y_true of shape "
                f"{true_shape} and y_pred of shape {pred_shape}, {y_pred.dtype}. Expected y_pred "
                "to have the shape of y_true (classes), or one more axis of length num_classes "
                "(scores). Use reduce_f to select or reshape what a step returns."
            )
        return _flat(y_true), _flat(y_pred)

    def evaluate(self) -> Any:
        invalid = int(self.num_invalid)
        measure = super().evaluate()
        if invalid:
            raise ValueError(
                f"Metric '{self.name}' met {invalid} labels where y_true or "
                f"y_pred is not a whole number from 0 to {self.num_classes - 1}. Check num_classes="
                f"{self.num_classes}, or pass ignore_class= for padding."
            )
        return measure

    def result(self) -> Any:
        """The measure as a tensor: NaN where invalid labels were met, since it cannot raise."""
        return ops.where(self.num_invalid > 0, float("nan"), self._evaluate())


class Accuracy(IConfusionMatrix):
    """The share of labels that were predicted right, from 0 to 1; NaN of no label.

    Equal to scikit-learn's `accuracy_score`. What it takes is in `IConfusionMatrix`.

    >>> metric = Accuracy(num_classes=3)
    >>> metric.samples_from_batch(([0, 1, 2, 2], [0, 1, 2, 1]))
    >>> metric.evaluate()
    0.75
    """

    def __init__(
        self,
        num_classes: int,
        reduce_f: Callable[[Any], tuple[Any, ...]] | None = None,
        *,
        ignore_class: int | None = None,
        name: str = "accuracy",
    ) -> None:
        super().__init__(num_classes, reduce_f, ignore_class=ignore_class, name=name)

    def _evaluate(self) -> Any:
        matrix = ops.cast(self.confusion_matrix, "float32")
        # Not ops.trace, which takes as long as the rest of an epoch's end on TensorFlow.
        right = ops.multiply(matrix, np.eye(self.num_classes, dtype="float32"))
        return ops.sum(right) / ops.sum(matrix)


class MacroF1Score(IConfusionMatrix):
    """The mean over classes of the F1 score, 2 TP / (2 TP + FP + FN), from 0 to 1; NaN of no label.

    As in scikit-learn's `f1_score(average="macro")`, the mean is over the classes that are
    present, in `y_true` or in `y_pred`: a class that never occurs and is never predicted doesn't
    lower it. What it takes is in `IConfusionMatrix`.

    >>> metric = MacroF1Score(num_classes=3)
    >>> metric.samples_from_batch(([0, 0, 1, 1], [0, 0, 1, 0]))  # F1 of 0.8 and 2/3
    >>> round(metric.evaluate(), 4)
    0.7333
    """

    def __init__(
        self,
        num_classes: int,
        reduce_f: Callable[[Any], tuple[Any, ...]] | None = None,
        *,
        ignore_class: int | None = None,
        name: str = "macro_f1",
    ) -> None:
        super().__init__(num_classes, reduce_f, ignore_class=ignore_class, name=name)

    def _evaluate(self) -> Any:
        matrix = ops.cast(self.confusion_matrix, "float32")
        labelled_or_predicted = ops.sum(matrix, axis=0) + ops.sum(matrix, axis=1)
        present = labelled_or_predicted > 0
        f1 = 2 * ops.diagonal(matrix) / ops.where(present, labelled_or_predicted, 1.0)
        return ops.sum(f1) / ops.sum(ops.cast(present, "float32"))


class KerasMetric(IMetric):
    """A metric of Keras as one of Polus: `KerasMetric(keras.metrics.AUC())`.

    The samples go to `metric.update_state` as they are, so a third one, as in `(y_true, y_pred,
    weights)`, is the sample weights.

    Args:
        metric: The `keras.metrics.Metric`; it must not be updated by anything else.
        reduce_f: See `IMetric`.
        name: The name in logs; by default the metric's own.
    """

    def __init__(
        self,
        metric: keras.metrics.Metric,
        reduce_f: Callable[[Any], tuple[Any, ...]] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(reduce_f, name or metric.name)
        self.metric = metric

    def _samples_from_batch(self, *samples: Any) -> None:
        self.metric.update_state(*samples)

    def _evaluate(self) -> Any:
        return self.metric.result()

    def reset_state(self) -> None:
        self.metric.reset_state()


@contextlib.contextmanager
def kept_has_samples(metrics: Iterable[IMetric]) -> Iterator[None]:
    """Restores `has_samples` of each metric at the end: an evaluation or a dry run changes it."""
    before = [(metric, metric.has_samples) for metric in metrics]
    try:
        yield
    finally:
        for metric, had in before:
            metric.has_samples = had


def as_metric(metric: Any) -> IMetric:
    """Gives an `IMetric` as it is, and any other `keras.metrics.Metric` adapted.

    Raises:
        TypeError: Where it is neither.
    """
    if isinstance(metric, IMetric):
        return metric
    if isinstance(metric, keras.metrics.Metric):
        return KerasMetric(metric)
    hint = f" Write {metric.__name__}(...)." if isinstance(metric, type) else ""
    raise TypeError(
        "A metric is a polus.metrics.IMetric or a keras.metrics.Metric, but got "
        f"{metric!r} of type {type(metric).__name__}.{hint}"
    )


def _same_labels(true_shape: tuple[int | None, ...], pred_shape: tuple[int | None, ...]) -> bool:
    """Says whether two shapes hold the same labels, as far as they are known when traced."""
    shapes = [list(true_shape), list(pred_shape)]
    for shape in shapes:
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
    return len(shapes[0]) == len(shapes[1]) and all(
        a is None or b is None or a == b for a, b in zip(*shapes, strict=True)
    )


def _flat(labels: Any) -> Any:
    return labels if len(labels.shape) == 1 else ops.reshape(labels, (-1,))


def _to_host(measure: Any) -> Any:
    array = ops.convert_to_numpy(measure)
    return float(array) if array.ndim == 0 else array
