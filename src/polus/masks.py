"""The masks that Keras attaches to tensors, such as those of `Embedding(mask_zero=True)`.

Layers pass masks on, and losses and metrics read them from the prediction. An operation outside a
layer returns a tensor without its mask, which has to be carried over.
"""

from typing import Any, TypeVar

import keras

# Private to Keras. Its public way is a layer with a `mask` argument, and to call one takes as long
# as a small training step on PyTorch. tests/test_metrics.py shows that both return the same.
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

from polus.types import Tensor

T = TypeVar("T")


def mask_of(tensor: Tensor) -> Tensor | None:
    """Returns the mask of a tensor, True where it counts, or None if it has none."""
    result: Tensor | None = get_keras_mask(tensor)
    return result


def carry_mask(source: object, target: T) -> T:
    """Attaches the masks of `source` to `target` and returns it.

    Args:
        source: A tensor, or a structure of tensors.
        target: The same structure, computed from `source` by operations that keep the masked axes.
    """
    keras.tree.map_structure(_carry, source, target)
    return target


def stop_gradient(tensor: Tensor | None) -> Tensor | None:
    """Returns a tensor without its gradient, but with its mask, unlike `keras.ops`.

    None stays None.
    """
    if tensor is None:
        return None
    stopped: Tensor = keras.ops.stop_gradient(tensor)
    _carry(tensor, stopped)
    return stopped


def own_weights(weights: object) -> Any:
    """Returns a copy of sample weights, for one loss or metric; None stays None.

    On PyTorch, Keras multiplies them by the mask in place: it would change the user's arrays, which
    share their memory with the batch, and weights that a gradient is still computed from.
    """
    return None if weights is None else keras.ops.copy(weights)


def _carry(source: Any, target: Any) -> None:
    if (mask := get_keras_mask(source)) is not None:
        set_keras_mask(target, mask)
