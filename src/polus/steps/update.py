"""From gradients to weights: unscale, post-process, apply."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from polus.backends import backend
from polus.steps.guard import Watch
from polus.steps.norms import GradientNorms
from polus.steps.variables import unique

Gradients = list[Any]
Update = tuple[keras.optimizers.Optimizer, Sequence[Any], Sequence[keras.Variable]]
PostProcess = Callable[[Gradients], Gradients]


def apply_gradients(
    updates: Sequence[Update],
    post_process_grads: PostProcess | None = None,
    scaled: bool = False,
    loss: Any = None,
) -> None:
    """Updates variables by their gradients: all of the updates, or none if a guard says so.

    Args:
        updates: For each update the optimizer, which is built if it is not, one gradient per
            variable, None for a variable without one, and the variables.
        post_process_grads: Takes and returns the list of an update's gradients, unscaled.
        scaled: Whether the gradients are those of a scaled loss, as the optimizers expect them.
        loss: The loss that was minimized, or the sum of several, unscaled. It has to be finite.

    Raises:
        ValueError: If `post_process_grads` returns another number of gradients.
    """
    watch = Watch.active()
    given = [_processed(update, post_process_grads, scaled) for update in updates]
    if watch is not None:
        for (optimizer, _, variables), gradients in zip(updates, given, strict=True):
            watch.see(optimizer, gradients, variables)
    finite = None if watch is None else watch.decide(loss)

    def update() -> None:
        for (optimizer, _, variables), gradients in zip(updates, given, strict=True):
            _apply(optimizer, gradients, variables)

    if finite is None:
        update()
    else:
        changed = [v for o, _, variables in updates for v in (*variables, *o.variables)]
        backend.only_if(finite, update, unique(changed))


def _processed(update: Update, post_process_grads: PostProcess | None, scaled: bool) -> Gradients:
    """Returns the gradients that the optimizer of an update gets."""
    optimizer, taken, variables = update
    gradients = taken = list(taken)
    scale = loss_scale(optimizer.scale_loss)
    if post_process_grads is not None:
        if scaled and scale is not None:
            gradients = times(gradients, 1 / scale)
        gradients = _post_processed(gradients, post_process_grads)
    if scale is not None and (post_process_grads is not None or not scaled):
        gradients = times(gradients, scale)
    if not optimizer.built:
        optimizer.build(variables)
    if (norms := GradientNorms.active()) is not None:
        processed = post_process_grads is not None
        norms.see(optimizer, variables, taken, gradients, scaled, processed)
    return gradients


def _apply(
    optimizer: keras.optimizers.Optimizer,
    gradients: Gradients,
    variables: Sequence[keras.Variable],
) -> None:
    try:
        backend.apply_gradients(optimizer, gradients, variables)
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


def loss_scale(scale_loss: Callable[[Any], Any]) -> Any:
    """Returns the factor by which a loss is scaled; None if it isn't.

    A product by one would be a copy of each gradient, as large as the weights.
    """
    one = ops.ones(())
    scale = scale_loss(one)
    return None if scale is one else scale


def times(gradients: Gradients, scale: Any) -> Gradients:
    """Returns the products of gradients, of which some may be None, and a scalar."""
    return [None if g is None else g * ops.cast(scale, g.dtype) for g in gradients]
