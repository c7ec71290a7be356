"""What a step does by its own hand is seen in its dry run."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from polus.backends.scopes import active_dry_run
from polus.metrics import kept_has_samples
from polus.steps.variables import MetricsOwner, held, unique


@contextlib.contextmanager
def rehearsed(owner: MetricsOwner) -> Iterator[None]:
    """Lets the dry runs in the block see updates by optimizers that a step calls itself.

    Keras would build an optimizer inside the trace, and its slots would hold nothing. What is noted
    instead builds it with all that the step updates, and is logged as what is trained.
    """
    parts = [part for part in held(owner) if isinstance(part, keras.optimizers.Optimizer)]
    optimizers = unique(parts)
    for optimizer in optimizers:
        optimizer.apply = functools.partial(_note, optimizer)
    try:
        with kept_has_samples(owner.metrics):
            yield
    finally:
        for optimizer in optimizers:
            del optimizer.apply  # the class's own again


def _note(
    optimizer: Any, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None
) -> Any:
    dry_run = active_dry_run()
    if dry_run is None or trainable_variables is None:  # which ones, a built optimizer knows
        return type(optimizer).apply(optimizer, grads, trainable_variables)
    dry_run.record_updates((optimizer, unique(trainable_variables)), by_hand=True)
    return None
