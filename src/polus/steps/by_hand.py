"""Optimizers that a step calls itself, in place of `minimize`."""

import contextlib
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from polus.backends.scopes import active_dry_run
from polus.steps.update import apply_gradients
from polus.steps.variables import held, unique

logger = logging.getLogger("polus.training")


class _Applying(threading.local):
    """Whether this thread is in the midst of an update: it then calls Keras' own `apply`."""

    value = False


_applying = _Applying()
_lock = threading.Lock()
_followers: Counter[int] = Counter()  # of each optimizer: replicas run side by side, in threads


@contextlib.contextmanager
def followed(owner: object) -> Iterator[None]:
    """Treats updates by the optimizers of `owner` as `minimize` treats its own.

    A dry run notes them: Keras would build an optimizer inside the trace, and its slots would hold
    nothing. Otherwise they are checked and applied in the way that this backend needs.
    """
    optimizers = _outer_optimizers(owner)
    for optimizer in optimizers:
        _follow(optimizer, 1)
    try:
        yield
    finally:
        for optimizer in optimizers:
            _follow(optimizer, -1)


def _follow(optimizer: Any, more: int) -> None:
    with _lock:
        before = _followers[id(optimizer)]
        _followers[id(optimizer)] += more
        if not before:
            optimizer.apply = functools.partial(_apply, optimizer)
            optimizer.scale_loss = functools.partial(_scale_loss, optimizer)
        elif not before + more:  # the class's own again
            del optimizer.apply, optimizer.scale_loss, _followers[id(optimizer)]


def following(step: Callable[..., Any], owner: object) -> Callable[..., Any]:
    """Returns a step in which updates by `owner`'s optimizers are treated so."""

    def followed_step(*inputs: Any, **named: Any) -> Any:
        with followed(owner):
            return step(*inputs, **named)

    return followed_step


def _outer_optimizers(owner: object) -> list[Any]:
    parts = unique(part for part in held(owner) if isinstance(part, keras.optimizers.Optimizer))
    inner = [each for part in parts for each in getattr(part, "optimizers", ())]
    inner += [getattr(part, "inner_optimizer", None) for part in parts]
    return [part for part in parts if not any(part is each for each in inner)]


def _apply(
    optimizer: Any, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None
) -> None:
    variables = trainable_variables
    if _applying.value:
        type(optimizer).apply(optimizer, grads, variables)
        return
    if (dry_run := active_dry_run()) is not None and variables is not None:
        dry_run.record_updates((optimizer, unique(variables)), by_hand=True)
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if scales and _name_of(optimizer) not in dry_run.settings:
            logger.warning(
                "%s divides its gradients by the scale of the loss, and the step applies some of a "
                "loss that it has not scaled: such updates are far too small. Differentiate "
                "optimizer.scale_loss(loss), or use minimize, which does.",
                optimizer.name,
            )
        return
    _applying.value = True
    try:
        if variables is None or len(variables) != len(grads):  # Keras knows, or says what is wrong
            optimizer.apply(grads, variables)
        else:
            apply_gradients([(optimizer, grads, variables)], scaled=True)
    finally:
        _applying.value = False


def _scale_loss(optimizer: Any, loss: Any) -> Any:
    if (dry_run := active_dry_run()) is not None:
        dry_run.settings.add(_name_of(optimizer))
    return type(optimizer).scale_loss(optimizer, loss)


def _name_of(optimizer: Any) -> str:
    return f"scale_loss of {id(optimizer)}"
