"""What a step does besides what its user wrote: it counts, and moves the averages of weights."""

from collections.abc import Callable
from typing import Any

import keras

from polus.average import averages_of
from polus.backends.placement import Placement
from polus.backends.scopes import DryRun
from polus.steps.by_hand import following
from polus.steps.compiled import as_terms


def finished_step(
    step: Callable[..., Any],
    owner: object,
    counter: keras.Variable,
    placement: Placement,
    seen: DryRun,
) -> Callable[..., Any]:
    """Returns a step that also does what the user's step leaves to Polus.

    Of several replicas, each has its own rows of what the step returns: all get those of all.
    Optimizers that the step calls itself are followed.

    Args:
        step: The step as its user wrote it.
        owner: The trainer.
        counter: Its step counter.
        placement: The devices.
        seen: A dry run of the step, which learns what is assigned besides.
    """
    if seen.by_hand:
        step = following(step, owner)
    gather = placement.gather
    counts = id(counter) in seen.assigned
    averages = [a for a in averages_of(owner) if id(a.count) not in seen.assigned]
    arrays = array_terms(seen.result) if placement.replicas > 1 else set()
    if counts and not averages and not arrays:
        return step

    def finished(*inputs: Any, **named: Any) -> Any:
        result = step(*inputs, **named)
        if not counts:
            counter.assign_add(1)
        for average in averages:
            average.update()
        if not arrays:
            return result
        return {n: gather(value) if n in arrays else value for n, value in result.items()}

    seen.record_assigned([] if counts else [counter])
    for average in averages:
        seen.record_assigned(average.variables)
    return finished


def array_terms(result: object) -> set[str]:
    """Returns the names of a step's results that are no scalars."""
    return {n for n, value in as_terms(result).items() if len(getattr(value, "shape", ()))}
