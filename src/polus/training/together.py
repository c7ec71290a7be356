"""Several losses of one forward pass, each minimized by weights and an optimizer of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from polus.backends import backend
from polus.backends.scopes import active_dry_run
from polus.steps.update import PostProcess, Update, apply_gradients
from polus.steps.variables import unique
from polus.training.checks import check_connected, check_minimized, scalar_loss

Group = tuple[Sequence[keras.Variable], keras.optimizers.Optimizer]


def minimize_together(
    losses_fn: Callable[[], Mapping[str, Any]],
    groups: Mapping[str, Group],
    post_process_grads: PostProcess | None,
) -> Any:
    """Does what `BaseTrainer.minimize_together` describes."""
    _check_groups(losses_fn, groups)
    chosen = {name: unique(variables) for name, (variables, _) in groups.items()}
    optimizers = {name: optimizer for name, (_, optimizer) in groups.items()}
    if (dry_run := active_dry_run()) is not None:
        with dry_run.differentiating():
            result = losses_fn()
        _scalars(result, chosen)
        dry_run.record_updates(*((optimizers[n], variables) for n, variables in chosen.items()))
        return result

    def scaled_losses(result: object) -> list[Any]:
        values = _scalars(result, chosen)
        return [optimizers[n].scale_loss(v) for n, v in zip(chosen, values, strict=True)]

    result, gradients = backend.values_and_grads(losses_fn, list(chosen.values()), scaled_losses)
    updates: dict[int, Update] = {}  # an optimizer of several groups makes one step with them all
    for (name, variables), found in zip(chosen.items(), gradients, strict=True):
        check_connected(found, variables)
        optimizer = optimizers[name]
        _, others, known = updates.get(id(optimizer), (optimizer, (), ()))
        updates[id(optimizer)] = optimizer, [*others, *found], [*known, *variables]
    loss = sum(_scalars(result, chosen))
    apply_gradients(list(updates.values()), post_process_grads, True, loss)
    return result


def _scalars(result: Any, names: Mapping[str, Any]) -> list[Any]:
    if not isinstance(result, Mapping) or not set(names) <= set(result):
        came = sorted(map(str, result)) if isinstance(result, Mapping) else type(result).__name__
        raise ValueError(
            "The function of minimize_together must return a dict with a loss for each group, "
            f"{', '.join(map(repr, names))}, got {came}."
        )
    return [scalar_loss(result[name], f"The loss {name!r}") for name in names]


def _check_groups(losses_fn: Any, groups: Any) -> None:
    form = (
        'Write minimize_together(losses, {"g_loss": (generator.trainable_weights, g_optimizer), '
        '"d_loss": (discriminator.trainable_weights, d_optimizer)}), where losses() returns '
        '{"g_loss": ..., "d_loss": ...}.'
    )
    pairs = isinstance(groups, Mapping) and all(
        isinstance(group, tuple | list) and len(group) == 2 for group in groups.values()
    )
    if not callable(losses_fn) or not groups or not pairs:
        raise TypeError(f"minimize_together got {losses_fn!r} and {groups!r}. {form}")
    known: dict[int, str] = {}
    for name, (variables, optimizer) in groups.items():
        check_minimized(losses_fn, variables, optimizer)
        for variable in variables:
            if known.setdefault(id(variable), name) != name:
                raise ValueError(
                    f"The groups {known[id(variable)]!r} and {name!r} of minimize_together share "
                    f"the variable {variable.path}. A variable is updated by one of them."
                )
