"""The learning rate that a range test sets: of one optimizer, or of a `MultiOptimizer`'s parts."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from polus.learning_rate import rate_owner, schedule_of, set_rate_variable
from polus.optimizers import MultiOptimizer, optimizer_named, rate_of

SetRate = Callable[[float], Any]


def parts_of(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """Returns the optimizers that have a learning rate: the inner ones of a `MultiOptimizer`."""
    return list(optimizer.optimizers) if isinstance(optimizer, MultiOptimizer) else [optimizer]


def chosen_optimizer(owner: object, optimizer: object) -> Any:
    """Returns the optimizer that is meant, by itself or by its name; the trainer's own for None.

    Raises:
        ValueError: If the trainer has none of this name.
    """
    if optimizer is None:
        optimizer = "optimizer"
    if not isinstance(optimizer, str):
        return optimizer
    whole = getattr(owner, optimizer, None)  # a MultiOptimizer's names are those of its parts
    return whole if isinstance(whole, MultiOptimizer) else optimizer_named(owner, optimizer)


def check_optimizer(optimizer: object, use_lr_found: bool) -> None:
    """Checks that an optimizer's learning rate can be swept and, for `use_lr_found`, be set.

    Raises:
        TypeError: If it is not an optimizer of Keras.
        ValueError: If its learning rate cannot be set.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "optimizer must be the keras.optimizers.Optimizer to sweep, one that the training step "
            f"uses, got {optimizer!r}. Pass, for example, optimizer=trainer.optimizer."
        )
    if use_lr_found and not has_rate_variable(optimizer):
        raise ValueError(
            "use_lr_found=True sets the learning rate, but the optimizer's rate is a schedule and "
            "cannot be set. Leave use_lr_found out and create a schedule from the suggestion, for "
            "example keras.optimizers.schedules.CosineDecay(result.suggestion, decay_steps=10_000)."
        )


def has_rate_variable(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether each learning rate is a variable, not a schedule or a callable."""
    return all(isinstance(part.learning_rate, keras.Variable) for part in parts_of(optimizer))


def check_used(optimizer: keras.optimizers.Optimizer, variables: Sequence[Any]) -> None:
    """Checks that a step with these variables uses the optimizer.

    Raises:
        ValueError: If it does not.
    """
    own = {id(v) for part in parts_of(optimizer) for v in part.variables}
    if not own & {id(v) for v in variables}:
        raise ValueError(
            f"The training step does not use the optimizer {optimizer.name!r}, so its rate has no "
            "effect. Pass the one to sweep: lr_finder(dataset, optimizer=trainer.d_optimizer)."
        )


def highest_rate(optimizer: keras.optimizers.Optimizer) -> float:
    """Returns the learning rate, the highest of a `MultiOptimizer`."""
    return max(rate_of(part) for part in parts_of(optimizer))


def set_rates(optimizer: keras.optimizers.Optimizer, rate: float) -> None:
    """Sets the learning rate for good, all of a `MultiOptimizer` by one factor."""
    for part, share in _shares(optimizer):
        part.learning_rate = share * rate


def _shares(
    optimizer: keras.optimizers.Optimizer,
) -> list[tuple[keras.optimizers.Optimizer, float]]:
    """Returns the parts and their present rates as shares of the highest one.

    Raises:
        ValueError: If all rates of a `MultiOptimizer` are zero.
    """
    parts = parts_of(optimizer)
    if len(parts) == 1:
        return [(parts[0], 1.0)]
    highest = highest_rate(optimizer)
    if not highest > 0:
        raise ValueError(
            f"All learning rates of the optimizer {optimizer.name!r} are 0, so there is no ratio "
            "between them to keep. Give its inner optimizers rates."
        )
    return [(part, rate_of(part) / highest) for part in parts]


@contextlib.contextmanager
def swept_rate(optimizer: keras.optimizers.Optimizer) -> Iterator[SetRate]:
    """Yields a function that sets the learning rate. A schedule is put back at the end.

    Of a `MultiOptimizer` it sets the highest rate, and the others in proportion.
    """
    with contextlib.ExitStack() as stack:
        setters = [
            (stack.enter_context(_rate_of_one(part)), share) for part, share in _shares(optimizer)
        ]

        def set_rate(rate: float) -> None:
            for assign, share in setters:
                assign(share * rate)

        yield set_rate


@contextlib.contextmanager
def _rate_of_one(optimizer: keras.optimizers.Optimizer) -> Iterator[SetRate]:
    if has_rate_variable(optimizer):
        yield optimizer.learning_rate.assign
        return
    schedule = schedule_of(optimizer)
    # With a name, so that Keras' counter of unnamed variables does not advance.
    rate = keras.Variable(0.0, dtype="float32", trainable=False, name="swept_learning_rate")
    set_rate_variable(optimizer, rate)
    try:
        yield rate.assign
    finally:
        rate_owner(optimizer).learning_rate = schedule  # the setter also untracks the variable
