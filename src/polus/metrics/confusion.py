"""Metrics that are functions of the confusion matrix."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from polus.host import to_host
from polus.masks import mask_of
from polus.metrics.base import PER_OUTPUT, IMetric, kind
from polus.types import Tensor

MAX_KEPT_CLASSES = 100


class IConfusionMatrix(IMetric):
    """A metric that is a function of the confusion matrix.

    Subclasses implement `_evaluate` from `self.confusion_matrix`, of shape
    `(num_classes, num_classes)`: `[i, j]` counts the labels of class i that were predicted as class
    j. Without sample weights it is an integer variable, exact up to 2**31 - 1 labels per cell
    (2**63 - 1 on TensorFlow), where a float32 count would stop at 2**24. With sample weights it is
    a float32 tensor, the sum of the weights.

    Shapes of `y_true` and `y_pred`, with C classes and any leading shape `(...)`, such as `(N,)` or
    `(N, T)`:

    ========== ============ ======================================================================
    `y_true`   `y_pred`     interpreted as
    ========== ============ ======================================================================
    `(...)`    `(..., C)`   scores, logits or probabilities: the class with the highest one
    `(..., 1)` `(..., C)`   the same, with labels in Keras' shape
    `(..., C)` `(..., C)`   one-hot labels, if `y_pred` is floating point
    `(..., C)` `(...)`      one-hot labels, predicted classes
    `(...)`    `(...)`      classes; if C = 2 and `y_pred` is floating point, probabilities of class
                            1, which is predicted above 0.5 (apply a sigmoid to logits first)
    ========== ============ ======================================================================

    A last axis of length 1 is ignored. `reduce_f` can reshape anything else. Labels may be integers
    or floats with integer values.

    Labels are not counted where the prediction is masked (see Keras' masking guide) or the sample
    weight is zero. Weights have the shape of the labels or of their leading axes, e.g. `(N,)`.

    Args:
        num_classes: The number of classes C, at least 2. Labels are 0 to C - 1.
        reduce_f: See `IMetric`.
        ignore_class: A value of `y_true` that is not counted, e.g. -100 or -1 for padding. It may
            be outside 0 to C - 1.
        name: The name in logs.

    Attributes:
        evaluated: The matrix of the last `evaluate`; None if there was none or it has more than 100
            classes.

    Raises:
        ValueError: Immediately for shapes that are not in the table; in `evaluate` for labels
            outside 0 to C - 1, which a compiled step can count but not report (`result` is NaN).
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
        _check_integer("num_classes", num_classes)
        if ignore_class is not None:
            _check_integer("ignore_class", ignore_class)
        if num_classes < 2:
            raise ValueError(
                f"num_classes of metric {self.name!r} must be at least 2, got {num_classes!r}. For "
                "yes-or-no labels use num_classes=2."
            )
        self.num_classes = num_classes
        self.ignore_class = ignore_class
        self.is_weighted = False  # whether there was a batch with weights
        self.evaluated: np.ndarray[Any, Any] | None = None
        shape = (num_classes, num_classes)
        # "int" is int64 on TensorFlow, which does not put int32 on a GPU, and int32 elsewhere.
        self.counts = self.add_variable(shape, "zeros", dtype="int", name="confusion_matrix")
        self.weights = self.add_variable(shape, "zeros", dtype="float32", name="weights")
        self.rounding = self.add_variable(shape, "zeros", dtype="float32", name="rounding")
        self.num_invalid = self.add_variable((), "zeros", dtype="int", name="num_invalid")
        self.num_valid_batches = self.add_variable(
            (), "zeros", dtype="int", name="num_valid_batches"
        )

    @property
    def confusion_matrix(self) -> Tensor:
        """The confusion matrix of all samples since the last reset."""
        result: Tensor = (
            ops.cast(self.counts, "float32") + self.weights if self.is_weighted else self.counts
        )
        return result

    def _samples_from_batch(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        mask = mask_of(y_pred)
        y_true, y_pred = self._labels(y_true, y_pred)
        shape = ops.shape(y_true)
        y_true, y_pred = _flat(y_true), _flat(y_pred)
        if mask is not None:
            mask = self._per_label(ops.cast(mask, "bool"), shape, "mask")
        if sample_weight is not None:
            weights = ops.cast(ops.convert_to_tensor(sample_weight), "float32")
            weights = self._per_label(weights, shape, "sample_weight")
        true, is_true = self._index(y_true)
        predicted, is_predicted = self._index(y_pred)
        valid = is_true & is_predicted
        counted = [] if self.ignore_class is None else [y_true != self.ignore_class]
        counted += [] if mask is None else [mask]
        counted += [] if sample_weight is None else [weights != 0]
        invalid = functools.reduce(operator.and_, counted, ~valid)
        valid = functools.reduce(operator.and_, counted, valid)
        # Scattering each pair of labels into its cell takes, for two thousand labels of fifty
        # classes, a fortieth of the time of a product of one-hot matrices.
        cells = ops.where(valid[:, None], ops.stack([true, predicted], axis=1), 0)
        if sample_weight is None:
            ones = ops.cast(valid, self.counts.dtype)
            self.counts.assign(ops.scatter_update(self.counts, cells, ones, reduction="add"))
        else:
            self._add_weights(cells, ops.where(valid, weights, 0.0))
        self.num_invalid.assign_add(ops.sum(ops.cast(invalid, self.num_invalid.dtype)))
        none_yet = ops.cast(self.num_invalid == 0, self.num_valid_batches.dtype)
        self.num_valid_batches.assign_add(none_yet)

    def _add_weights(self, cells: Any, weights: Any) -> None:
        """Adds weights to cells by compensated summation (Kahan 1965, doi:10.1145/363707.363723).

        A plain float32 sum of ones would stop at 2**24.
        """
        self.is_weighted = True
        zeros = ops.zeros(self.weights.shape, self.weights.dtype)
        batch = ops.scatter_update(zeros, cells, weights, reduction="add")
        batch = batch - self.rounding
        total = self.weights + batch
        self.rounding.assign((total - self.weights) - batch)
        self.weights.assign(total)

    def _per_label(self, values: Any, shape: Any, argument: str) -> Any:
        """Broadcasts values of examples, or of leading axes, to all labels and flattens them."""
        rank, given = len(shape), tuple(values.shape)
        while len(values.shape) > max(rank, 1) and values.shape[-1] == 1:
            values = ops.squeeze(values, axis=-1)
        fits = len(values.shape) <= rank and all(
            a in (None, 1) or b is None or not isinstance(b, int) or a == b
            for a, b in zip(values.shape, shape, strict=False)
        )
        if not fits:
            raise ValueError(
                f"Metric {self.name!r} expected {argument} to have the shape of the labels, "
                f"{tuple(shape)}, or of their leading axes, got {given}. Reshape it in reduce_f."
            )
        for _ in range(rank - len(values.shape)):
            values = ops.expand_dims(values, axis=-1)
        return _flat(ops.broadcast_to(values, shape))

    def _index(self, labels: Any) -> tuple[Any, Any]:
        """Returns labels as int32, and whether each is one of the classes."""
        if keras.backend.standardize_dtype(labels.dtype) == "int32":
            return labels, (labels >= 0) & (labels < self.num_classes)
        index = ops.cast(labels, "int32")
        whole = ops.cast(index, labels.dtype) == labels  # unlike 1.5, NaN or 2**32
        return index, whole & (index >= 0) & (index < self.num_classes)

    def _labels(self, y_true: Any, y_pred: Any) -> tuple[Any, Any]:
        """Returns both as labels of equal shape, by the table in the docstring of the class."""
        y_true, y_pred = self._tensor(y_true, "y_true"), self._tensor(y_pred, "y_pred")
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
        y_true, y_pred = _squeezed(y_true), _squeezed(y_pred)
        if not _equal_shapes(y_true.shape, y_pred.shape):
            raise ValueError(
                f"Metric {self.name!r} with num_classes={self.num_classes} expected y_pred to have "
                "the shape of y_true (classes), or one more axis of length num_classes (scores), "
                f"got y_true of shape {true_shape} and y_pred of shape {pred_shape}, "
                f"{y_pred.dtype}. Use reduce_f to select or reshape what the step returns."
            )
        return y_true, y_pred

    def _tensor(self, value: Any, argument: str) -> Any:
        if isinstance(value, Mapping):
            raise TypeError(
                f"Metric {self.name!r} expected {argument} to be a tensor, got {kind(value)}. "
                f"{PER_OUTPUT}"
            )
        return ops.convert_to_tensor(value)

    def evaluate(self) -> Any:
        invalid, batch = int(to_host(self.num_invalid)), int(to_host(self.num_valid_batches))
        if self.num_classes <= MAX_KEPT_CLASSES:
            self.evaluated = np.array(to_host(self.confusion_matrix))  # the variable is reset
        value = super().evaluate()
        if invalid:
            labels = f"{invalid} invalid label{'s' * (invalid != 1)}"
            raise ValueError(
                f"Metric {self.name!r} got {labels}, the first in batch {batch} (counting from 0): "
                f"y_true and y_pred must be integers from 0 to {self.num_classes - 1}. Check "
                f"num_classes={self.num_classes}, or set ignore_class= for padding."
            )
        return value

    def result(self) -> Tensor:
        """Returns the value as a tensor, NaN after invalid labels, since it cannot raise."""
        result: Tensor = ops.where(self.num_invalid > 0, float("nan"), self._evaluate())
        return result


class Accuracy(IConfusionMatrix):
    """The fraction of labels that are predicted correctly, from 0 to 1. NaN without labels.

    Equals scikit-learn's `accuracy_score`. See `IConfusionMatrix` for the arguments and shapes.

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
        # ops.trace takes as long as the rest of the end of an epoch on TensorFlow.
        correct = ops.multiply(matrix, np.eye(self.num_classes, dtype="float32"))
        return ops.sum(correct) / ops.sum(matrix)


class MacroF1Score(IConfusionMatrix):
    """The mean over classes of the F1 score, 2 TP / (2 TP + FP + FN). NaN without labels.

    Equals scikit-learn's `f1_score(average="macro")`: the mean is over the classes that occur in
    `y_true` or `y_pred`, so a class that never occurs and is never predicted does not lower it.
    Unlike there, an example of weight zero does not occur. See `IConfusionMatrix` for the arguments
    and shapes.

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
        labeled_or_predicted = ops.sum(matrix, axis=0) + ops.sum(matrix, axis=1)
        present = labeled_or_predicted > 0
        f1 = 2 * ops.diagonal(matrix) / ops.where(present, labeled_or_predicted, 1.0)
        return ops.sum(f1) / ops.sum(ops.cast(present, "float32"))


def _squeezed(labels: Any) -> Any:
    """Returns labels without last axes of length 1."""
    while len(labels.shape) > 1 and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, axis=-1)
    return labels


def _equal_shapes(shape: Sequence[int | None], other: Sequence[int | None]) -> bool:
    """Returns whether two shapes are equal, as far as they are known while tracing."""
    return len(shape) == len(other) and all(
        a is None or b is None or a == b for a, b in zip(shape, other, strict=True)
    )


def _flat(labels: Any) -> Any:
    return labels if len(labels.shape) == 1 else ops.reshape(labels, (-1,))


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
