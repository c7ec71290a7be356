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
from polus.backends.scopes import active_dry_run
from polus.masks import mask_of, own_weights
from polus.types import Tensor

COMPARING = (keras.losses.Circle, keras.losses.Dice, keras.losses.Tversky)


def batch_loss(loss: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a loss of Keras in a step of your own, where replicas may share the batch.

    The mean over the replicas of what it returns is the loss of the whole batch, also if that
    divides by what a mask, `ignore_class` or weights leave, or is a sum, or compares examples
    (`Dice`, `Tversky`, `Circle`). On one device, and on JAX, it is `loss(*arguments)`. The default
    step uses it. All replicas have to call it.

    ```python
    def train_step(self, x, y):
        def loss():
            return polus.core.batch_loss(self.loss, y, self.model(x, training=True))

        return self.minimize(loss, self.trainable_weights)
    ```

    Args:
        loss: A `keras.losses.Loss`. Functions, classes with a `__call__` of their own, and losses
            that are not scalar are called as they are.
        arguments: The replica's labels and predictions, and weights if there are any.

    Returns:
        The loss, a scalar.
    """
    return of_whole_batch(loss, arguments, loss(*own_arguments(loss, arguments)))


def of_whole_batch(
    loss: Callable[..., Any], arguments: Sequence[Any], value: Any, gathered: bool = False
) -> Any:
    """Returns what a loss returned, scaled as `batch_loss` says.

    Args:
        loss: The loss.
        arguments: What it was given.
        value: What it returned.
        gathered: Whether its arguments are those of the whole batch already.
    """
    if (dry_run := active_dry_run()) is not None:
        dry_run.settings.add("batch_loss")
    placement = backend.placement()
    parts = placement.parts
    if gathered or parts == 1 or not is_reduced_by_keras(loss) or _rank(value):
        return value
    if isinstance(loss, COMPARING):
        return loss(*keras.tree.map_structure(placement.gather, list(arguments)))
    if loss.reduction == "sum":
        return value * parts
    own = _divisor(loss, *arguments)
    if own is None:
        return value
    mean = ops.mean(placement.gather(ops.reshape(own, (1,))))
    return value * ops.cast(ops.divide_no_nan(own, mean), value.dtype)


def own_arguments(loss: Callable[..., Any], arguments: Sequence[Any]) -> Sequence[Any]:
    """Returns the arguments of a loss, with a copy of the weights, which Keras changes in place.

    Raises:
        TypeError: If the labels or predictions are several tensors and the loss is one of Keras,
            which would stack them and take the mean where `fit` adds the losses of all outputs.
    """
    if type(loss).__module__.startswith("keras.") and is_reduced_by_keras(loss):
        for part, what in zip(arguments[:2], ("labels", "predictions"), strict=False):
            if keras.tree.is_nested(part) and len(part):
                keys = [f"[{key!r}]" for key in (part if isinstance(part, dict) else range(2))]
                terms = [f"loss(y{key}, p{key})" for key in keys[:2]]
                raise TypeError(
                    f"The {what} are a {type(part).__name__} of {len(part)}, and "
                    f"{type(loss).__name__} compares one tensor with one. Write a function as the "
                    "loss, which adds those of all outputs as fit does: lambda y, p: "
                    f"{' + '.join(terms)}. To compare one output only: "
                    f"post_process_logits=lambda outputs: outputs{keys[0]}."
                )
    if is_reduced_by_keras(loss) and len(arguments) == 3:
        return [*arguments[:2], own_weights(arguments[2])]
    return arguments


def _rank(value: Any) -> int:
    return len(getattr(value, "shape", (0,)))


def is_reduced_by_keras(loss: object) -> TypeGuard[Any]:
    """Returns whether a loss is a `keras.losses.Loss` that leaves masks and weights to Keras."""
    return isinstance(loss, keras.losses.Loss) and type(loss).__call__ is keras.losses.Loss.__call__


def ignored_class(loss: Any) -> int | None:
    """Returns the label that a loss leaves out, if any."""
    if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        found: int | None = loss.get_config().get("ignore_class")  # no attribute from 3.16 on
        return found
    return getattr(loss, "ignore_class", None)


def uneven_mean(loss: object, masked: bool) -> bool:
    """Returns whether the mean over replicas of a loss may be another one than that of the batch.

    Args:
        loss: The loss.
        masked: Whether the prediction has a mask.
    """
    if not is_reduced_by_keras(loss):
        return False
    other = loss.reduction in ("sum", "mean_with_sample_weight") or isinstance(loss, COMPARING)
    return other or masked or ignored_class(loss) is not None


def _divisor(loss: Any, y: Any, prediction: Any, weights: Any = None) -> Tensor | None:
    """Returns what a mean is divided by, up to a factor; None for the number of entries.

    It is that of `keras.losses.Loss`: a mean over what the mask leaves, and for the reduction
    "mean_with_sample_weight" one weighted by what is left.
    """
    mask = None if keras.tree.is_nested(prediction) else mask_of(prediction)
    if (ignored := ignored_class(loss)) is not None:
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
