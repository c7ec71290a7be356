"""From gradients to weights: unscale, post-process, apply."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from polus.backends import backend
from polus.steps.guard import active_watch
from polus.steps.norms import active_norms

Gradients = list[Any]
PostProcess = Callable[[Gradients], Gradients]


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    variables: Sequence[keras.Variable],
    post_process_grads: PostProcess | None = None,
    scaled: bool = False,
    loss: Any = None,
) -> None:
    """Updates variables by their gradients.

    Args:
        optimizer: The optimizer. It is built if it is not.
        gradients: One gradient per variable; None for a variable without one.
        variables: The variables to update.
        post_process_grads: Takes and returns the list of gradients, unscaled.
        scaled: Whether the gradients are those of a scaled loss, as the optimizer expects them.
        loss: The loss that was minimized, unscaled, which has to be finite.

    Raises:
        ValueError: If `post_process_grads` returns another number of gradients.
    """
    gradients = taken = list(gradients)
    if post_process_grads is not None:
        if scaled:
            gradients = _times(gradients, 1 / optimizer.scale_loss(ops.ones(())))
        gradients = _post_processed(gradients, post_process_grads)
    if post_process_grads is not None or not scaled:
        gradients = _times(gradients, optimizer.scale_loss(ops.ones(())))
    if not optimizer.built:
        optimizer.build(variables)
    if (norms := active_norms()) is not None:
        norms.see(optimizer, taken, gradients, scaled, post_process_grads is not None)
    watch = active_watch()
    finite = None if watch is None else watch.see(optimizer, gradients, variables, loss)
    try:
        backend.apply_gradients(optimizer, gradients, variables, finite)
    except (ValueError, KeyError) as error:
        if "nknown variable" not in str(error) and not isinstance(error, KeyError):
            raise
        # Keras' own message prints the weights.
        name = type(optimizer).__name__
        raise ValueError(
            f"The optimizer {optimizer.name!r} was made for other variables: it has trained "
            "another model, or fewer variables than are trained now. Give the trainer a new one: "
            f"trainer.optimizer = keras.optimizers.{name}(...)."
        ) from None


def _post_processed(gradients: Gradients, post_process_grads: PostProcess) -> Gradients:
    processed = post_process_grads(gradients)
    if not isinstance(processed, list | tuple):
        raise TypeError(f"post_process_grads must return the list of gradients, got {processed!r}.")
    processed = list(processed)
    if len(processed) != len(gradients):
        raise ValueError(
            f"post_process_grads must return one gradient for each that it takes, in the same "
            f"order: it took {len(gradients)} and returned {len(processed)}."
        )
    return processed


def _times(gradients: Gradients, scale: Any) -> Gradients:
    return [None if g is None else g * ops.cast(scale, g.dtype) for g in gradients]
