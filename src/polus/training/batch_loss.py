"""Keras' losses where each replica computes that of its own rows.

The mean over the replicas is the loss of the whole batch where a loss divides by the number of
rows, which all replicas have alike. Some divide by what a mask, `ignore_class` or weights leave of
their rows, and sums divide by nothing. Those are scaled, so that the mean over the replicas is what
one device computes. Losses that compare rows with each other are given those of all replicas.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import keras
from keras import ops

from polus.backends import backend
from polus.backends.placement import gathers
from polus.masks import mask_of, own_weights
from polus.types import Tensor

COMPARING = (keras.losses.Circle, keras.losses.Dice, keras.losses.Tversky)


def forward_and_loss(
    forward: Callable[[], tuple[Any, ...]], loss: Callable[..., Any]
) -> tuple[tuple[Any, ...], Any]:
    """Runs a forward pass and returns its outputs and their loss, as `loss_of_batch`.

    Where the forward pass has called `polus.core.gather`, the loss is that of the whole batch.
    """
    before = gathers.count
    outputs = forward()
    if gathers.count > before:
        return outputs, _called(loss, outputs)
    return outputs, loss_of_batch(loss, outputs)


def loss_of_batch(loss: Callable[..., Any], outputs: Sequence[Any]) -> Any:
    """Returns the loss of a replica's rows such that the mean over replicas is that of the batch.

    Args:
        loss: The loss. What functions return, and classes with a `__call__` of their own, and
            losses that are not scalar, stays as it is.
        outputs: Its arguments: the labels, the prediction and, maybe, weights.
    """
    placement = backend.placement()
    parts = placement.parts
    if parts > 1 and isinstance(loss, COMPARING):
        return loss(*keras.tree.map_structure(placement.gather, list(outputs)))
    value = _called(loss, outputs)
    if parts == 1 or not is_reduced_by_keras(loss) or len(getattr(value, "shape", (0,))):
        return value
    if loss.reduction == "sum":
        return value * parts
    own = _divisor(loss, *outputs)
    if own is None:
        return value
    mean = ops.mean(placement.gather(ops.reshape(own, (1,))))
    return value * ops.cast(ops.divide_no_nan(own, mean), value.dtype)


def _called(loss: Callable[..., Any], outputs: Sequence[Any]) -> Any:
    """Returns the loss of its arguments, which Keras would change in place: the weights."""
    if is_reduced_by_keras(loss) and len(outputs) == 3:
        outputs = (*outputs[:2], own_weights(outputs[2]))
    return loss(*outputs)


def is_reduced_by_keras(loss: object) -> TypeGuard[Any]:
    """Returns whether a loss is a `keras.losses.Loss` that leaves masks and weights to Keras."""
    return isinstance(loss, keras.losses.Loss) and type(loss).__call__ is keras.losses.Loss.__call__


def _divisor(loss: Any, y: Any, prediction: Any, weights: Any = None) -> Tensor | None:
    """Returns what a mean is divided by, up to a factor; None for the number of entries.

    It is that of `keras.losses.Loss`: a mean over what the mask leaves, and for the reduction
    "mean_with_sample_weight" one weighted by what is left.
    """
    mask = None if keras.tree.is_nested(prediction) else mask_of(prediction)
    if (ignored := getattr(loss, "ignore_class", None)) is not None:
        labels = ops.convert_to_tensor(y)
        if len(labels.shape) == len(prediction.shape) and labels.shape[-1] == 1:
            labels = ops.squeeze(labels, -1)
        valid = ops.not_equal(labels, ops.cast(ignored, labels.dtype))
        mask = valid if mask is None else ops.logical_and(mask, valid)
    counted = None if mask is None else ops.cast(mask, "float32")
    if loss.reduction == "mean_with_sample_weight" and weights is not None:
        weights = ops.cast(weights, "float32")
        if counted is None:
            counted = weights
        else:
            rank = max(len(counted.shape), len(weights.shape))
            counted = _of_rank(counted, rank) * _of_rank(weights, rank)
    return None if counted is None else ops.stop_gradient(ops.sum(counted))


def _of_rank(tensor: Tensor, rank: int) -> Tensor:
    return ops.expand_dims(tensor, -1) if len(tensor.shape) < rank else tensor
