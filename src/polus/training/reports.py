"""What a trainer says of itself, and of what its step trains."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from polus.backends import backend
from polus.host import counted, to_host
from polus.log import logger_of
from polus.models import describe_model, models_of, named_parts
from polus.optimizers import MultiOptimizer, optimizers_of
from polus.state import layers_of
from polus.steps.variables import StepVariables, Update
from polus.training.checks import check_terms
from polus.training.config import OPEN_END
from polus.whole_batch import uneven_mean


def check_step(trainer: Any, variables: StepVariables) -> None:
    """Checks what a dry run of the step has seen, logs what is trained, and warns.

    Raises:
        ValueError: If a term of the step has the name of another column of the record.
    """
    check_terms(variables.result, trainer.metrics, trainer.primary)
    updates = [update for update in variables.updates if update.variables]
    if not updates:
        logger_of(trainer).warning(
            "The step updates nothing: no optimizer has a variable to train. Is the model frozen "
            "(model.trainable = False), or was the list of trainable weights made before the "
            "layers were built?"
        )
        return
    logger_of(trainer).info("Training %s.", _trained(trainer, updates))
    _warn_of_uneven_means(trainer, variables)
    untrained = variables.untrained
    if untrained and trainer.explicit_trainable_weights is None:
        names = ", ".join(variable.path for variable in untrained[:5])
        logger_of(trainer).warning(
            "%d trainable variables take part in the loss and no optimizer updates them: %s%s. "
            "To train them, pass trainable_weights=[*model.trainable_weights, "
            "*other.trainable_weights]; if they are meant to stay as they are, set "
            "other.trainable = False.",
            len(untrained),
            names,
            ", ..." if len(untrained) > 5 else "",
        )


def _warn_of_uneven_means(trainer: Any, variables: StepVariables) -> None:
    """Warns of a step that calls a loss itself where the mean over replicas is another loss."""
    masked = any(
        isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False)
        for layer in layers_of(trainer.model)
    )
    splits = backend.placement().splits_steps and "batch_loss" not in variables.settings
    if splits and uneven_mean(trainer.loss, masked):
        logger_of(trainer).warning(
            "Each replica computes the loss of its own rows, and %s.train_step calls the loss "
            "itself: if that is a sum, or divides by what a mask, ignore_class or weights leave, "
            "the mean over the replicas is not the loss of the whole batch. Write "
            "polus.core.batch_loss(self.loss, y, prediction) in place of self.loss(y, prediction).",
            type(trainer).__name__,
        )


def _trained(trainer: Any, updates: Sequence[Update]) -> str:
    """Describes what the optimizers of a step update."""
    model = {id(variable) for variable in trainer.model.trainable_variables}
    update = updates[0]
    models = models_of(trainer.model)
    whole = "the model" if len(models) == 1 else f"the models {', '.join(models)}"
    if len(updates) == 1 and {id(variable) for variable in update.variables} == model:
        return f"all {_counted(update.variables, 'trainable variable', f' of {whole}')}"
    return "; ".join(
        _counted(
            update.variables, "variable", f"{_owner(update, models)} with {update.optimizer.name}"
        )
        for update in updates
    )


def _owner(update: Update, models: Mapping[str, keras.Model]) -> str:
    """Returns " of <name>" if an update is that of all weights of one of several models."""
    updated = {id(variable) for variable in update.variables}
    for name, model in models.items() if len(models) > 1 else ():
        if updated == {id(variable) for variable in model.trainable_variables}:
            return f" of {name}"
    return ""


def _counted(variables: Sequence[keras.Variable], noun: str, rest: str = "") -> str:
    parameters = sum(math.prod(variable.shape) for variable in variables)
    return f"{counted(len(variables), noun)}{rest} ({counted(parameters, 'parameter')})"


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
        "model": describe_model(trainer.model),
        "optimizer": _optimizer(trainer.optimizer),
        **{name: _optimizer(value) for name, value in others.items()},
        **_loss(trainer.loss),
        "metrics": f"[{', '.join(metric.name for metric in trainer.metrics)}]",
        "trained": _trained_weights(trainer),
    }
    described = ", ".join(f"{name}={value}" for name, value in parts.items())
    return f"{type(trainer).__name__}({described})"


def summarize(trainer: Any, variables: StepVariables | None) -> str:
    """Returns a trainer's parts as a table, and what each optimizer trains.

    Args:
        trainer: The trainer.
        variables: What a trace of its step has seen; None before that.
    """
    models = {**models_of(trainer.model)}
    others = {n: p for n, p in named_parts(trainer) if isinstance(p, keras.Model)}
    known = {id(model) for model in (trainer.model, *models.values())}
    models |= {name: model for name, model in others.items() if id(model) not in known}
    updates = [] if variables is None else [each for each in variables.updates if each.variables]
    updated = {id(variable) for update in updates for variable in update.variables}
    rows = [(type(trainer).__name__, keras.backend.backend(), "")]
    for name, model in models.items():
        trained = [v for v in model.trainable_variables if id(v) in updated]
        size = _counted(model.weights, "variable") if model.built else "not built yet"
        rows.append((name, type(model).__name__, size + _share(trained, variables)))
    for name, optimizer in optimizers_of(trainer).items():
        own = [v for update in updates if update.optimizer is optimizer for v in update.variables]
        trains = "known after a step" if variables is None else _counted(own, "variable")
        rows.append((name, _optimizer(optimizer), f"trains {trains}"))
    rows += [("loss", shown, "") for shown in _loss(trainer.loss).values()]
    for name in ("metrics", "validation_metrics"):
        rows.append((name, ", ".join(m.name for m in getattr(trainer, name) or ()), ""))
    shown = [row for row in rows if any(row[1:])]
    widths = [max(len(row[i]) for row in shown) for i in range(2)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in shown)


def _share(trained: Sequence[keras.Variable], variables: StepVariables | None) -> str:
    return "" if variables is None else f", trained: {_counted(trained, 'variable')}"


def _loss(loss: Any) -> dict[str, str]:
    return {} if loss is None else {"loss": getattr(loss, "__name__", type(loss).__name__)}


def _optimizer(optimizer: Any) -> str:
    if isinstance(optimizer, MultiOptimizer):
        return f"MultiOptimizer({', '.join(map(_optimizer, optimizer.optimizers))})"
    rate = optimizer.learning_rate
    if isinstance(rate, keras.Variable):
        shown = f"{float(to_host(rate)):.4g}"
    else:
        shown = optimizer.get_config()["learning_rate"]["class_name"]
    return f"{type(optimizer).__name__}(learning_rate={shown})"


def _trained_weights(trainer: Any) -> str:
    built = all(model.built for model in models_of(trainer.model).values())
    if trainer.explicit_trainable_weights is None and not built:
        return "all of the model, which is not built yet"
    weights, total = trainer.trainable_weights, len(trainer.model.trainable_variables)
    parameters = sum(math.prod(variable.shape) for variable in weights)
    return f"{len(weights)} of {total} variables ({parameters:,} parameters)"


def warn_of_non_finite(logger: logging.Logger, columns: Mapping[str, Any], epoch: int) -> None:
    """Warns of each column of an epoch's steps that has a value which is not finite."""
    for name, losses in columns.items():
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            logger.warning(
                "The %s is not finite from step %d of epoch %d on (%s). Try a smaller learning "
                "rate (trainer.lr_finder finds one), or clip gradients: "
                "keras.optimizers.Adam(clipnorm=1.0).",
                name,
                bad[0],
                epoch + 1,
                losses[bad[0]],
            )


def log_stop(logger: logging.Logger, epoch: int, epochs: int | None, reason: str) -> None:
    """Reports that a run was stopped after some of its epochs, if their number is known."""
    done = counted(epoch, "epoch") if epochs is None else f"{epoch} of {counted(epochs, 'epoch')}"
    logger.info("Training was stopped after %s: %s.", done, reason or "early_stop was set")


def warn_of_missing_steps(
    logger: logging.Logger, count: int, wanted: int | None, epoch: int
) -> None:
    """Warns if an epoch had fewer steps, `count`, than were asked for."""
    if wanted is not None and count < wanted:
        logger.warning(
            "The dataset ended after %d of the %d steps of epoch %d. Give it more batches, repeat "
            "it, or lower steps.",
            count,
            wanted,
            epoch + 1,
        )


def warn_of_unsaved(logger: logging.Logger, name: str) -> None:
    """Warns that a signal ends a run before it continues: a save would be of half a run."""
    logger.warning(
        "%s: the run has not continued yet, and nothing is saved. Start the program again to "
        "continue from the same checkpoint.",
        name,
    )


def stays_ended(logger: logging.Logger, progress: Mapping[str, Any], epochs: int) -> bool:
    """Returns whether a run that was stopped early has nothing left to train, and logs it.

    It continues if more epochs are asked for than before.
    """
    if epochs > progress["epochs"]:
        logger.info(
            "The saved run was stopped early in epoch %d (%s) and %d epochs are asked for instead "
            "of %d: training continues.",
            progress["epoch"],
            progress["stop_reason"] or "early_stop",
            epochs,
            progress["epochs"],
        )
        return False
    logger.warning(
        "The saved run was stopped early in epoch %d (%s), so nothing is left to train. %s",
        progress["epoch"],
        progress["stop_reason"] or "early_stop",
        "Its session ends at the next step. To train on, begin in another folder."
        if progress["epochs"] == OPEN_END
        else f"To train on, ask for more than its {progress['epochs']} epochs.",
    )
    return True
