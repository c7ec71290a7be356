"""What a trainer says of itself, and of what its step trains."""

import math
from collections.abc import Sequence
from typing import Any

import keras

from polus.host import to_host
from polus.steps.variables import StepVariables, Update
from polus.training.checks import check_terms


def check_step(trainer: Any, variables: StepVariables) -> None:
    """Checks what a dry run of the step has seen, logs what is trained, and warns.

    Raises:
        ValueError: If a term of the step has the name of another column of the record.
    """
    check_terms(variables.result, trainer.metrics)
    updates = [update for update in variables.updates if update.variables]
    if not updates:
        trainer.logger.warning(
            "The step updates nothing: no optimizer has a variable to train. Is the model frozen "
            "(model.trainable = False), or was the list of trainable weights made before the "
            "layers were built?"
        )
        return
    trainer.logger.info("Training %s.", _trained(trainer, updates))
    untrained = variables.untrained
    if untrained and trainer.explicit_trainable_weights is None:
        names = ", ".join(variable.path for variable in untrained[:5])
        trainer.logger.warning(
            "%d trainable variables take part in the loss and no optimizer updates them: %s%s. "
            "To train them, pass trainable_weights=[*model.trainable_weights, "
            "*other.trainable_weights]; if they are meant to stay as they are, set "
            "other.trainable = False.",
            len(untrained),
            names,
            ", ..." if len(untrained) > 5 else "",
        )


def _trained(trainer: Any, updates: Sequence[Update]) -> str:
    """Describes what the optimizers of a step update."""
    model = {id(variable) for variable in trainer.model.trainable_variables}
    update = updates[0]
    if len(updates) == 1 and {id(variable) for variable in update.variables} == model:
        return f"all {_counted(update.variables, 'trainable variable', ' of the model')}"
    return "; ".join(
        _counted(update.variables, "variable", f" with {update.optimizer.name}")
        for update in updates
    )


def _counted(variables: Sequence[keras.Variable], noun: str, rest: str = "") -> str:
    parameters = sum(math.prod(variable.shape) for variable in variables)
    plural = "s" * (len(variables) != 1)
    return f"{len(variables)} {noun}{plural}{rest} ({parameters:,} parameters)"


def describe_trainer(trainer: Any) -> str:
    """Returns a trainer's parts: model, optimizers, loss, metrics, what is trained."""
    attributes = vars(trainer)
    if "model" not in attributes:  # its __init__ has not come so far
        return f"<{type(trainer).__name__}, not initialized>"
    others = {
        name: value
        for name, value in attributes.items()
        if name != "optimizer" and isinstance(value, keras.optimizers.Optimizer)
    }
    parts = {
        "model": f"{type(trainer.model).__name__} {trainer.model.name!r}",
        "optimizer": _optimizer(trainer.optimizer),
        **{name: _optimizer(value) for name, value in others.items()},
        "loss": getattr(trainer.loss, "__name__", type(trainer.loss).__name__),
        "metrics": f"[{', '.join(metric.name for metric in trainer.metrics)}]",
        "trained": _trained_weights(trainer),
    }
    described = ", ".join(f"{name}={value}" for name, value in parts.items())
    return f"{type(trainer).__name__}({described})"


def _optimizer(optimizer: Any) -> str:
    rate = optimizer.learning_rate
    if isinstance(rate, keras.Variable):
        shown = f"{float(to_host(rate)):.4g}"
    else:
        shown = optimizer.get_config()["learning_rate"]["class_name"]
    return f"{type(optimizer).__name__}(learning_rate={shown})"


def _trained_weights(trainer: Any) -> str:
    if trainer.explicit_trainable_weights is None and not trainer.model.built:
        return "all of the model, which is not built yet"
    weights, total = trainer.trainable_weights, len(trainer.model.trainable_variables)
    parameters = sum(math.prod(variable.shape) for variable in weights)
    return f"{len(weights)} of {total} variables ({parameters:,} parameters)"
