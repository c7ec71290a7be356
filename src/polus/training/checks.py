"""Checks of what a user gives a trainer, and of what a step returns."""

import contextlib
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from polus.metrics import IMetric, metrics_by_phase
from polus.metrics.adapters import as_metrics
from polus.metrics.update import RESERVED_NAMES
from polus.models import Models
from polus.steps.variables import unique

logger = logging.getLogger("polus.training")

SeenBatches = Callable[[], Iterable[tuple[str, tuple[Any, ...]]]]


def checked_model(model: object) -> keras.Model:
    """Returns a model as it is, and a dict of models as one model.

    Raises:
        TypeError: If it is neither.
    """
    if not isinstance(model, Mapping):
        check_model(model)
        return model
    if not model or not all(isinstance(name, str) for name in model):
        raise TypeError(
            f"A dict of models has their names as keys, got {dict(model)!r}. Use, for example, "
            '{"generator": generator, "discriminator": discriminator}.'
        )
    for name, part in model.items():
        check_model(part, f"model[{name!r}]")
    return Models(model)


def check_loss(loss: object, attributes: Mapping[str, Any], default_step: bool) -> None:
    """Raises TypeError if a loss is no function, or is missing where the step needs one.

    Args:
        loss: The loss.
        attributes: The trainer's own attributes.
        default_step: Whether its class has the `train_step` of `BaseTrainer`.
    """
    if loss is None and not (default_step and "train_step" not in attributes):
        return
    if not callable(loss) or isinstance(loss, type):
        hint = " A trainer that overrides train_step needs none." if loss is None else ""
        if isinstance(loss, Mapping | list | tuple):
            hint = " For several outputs, add in a function: lambda y, p: a(y[0], p[0]) + ..."
        raise TypeError(
            f"loss must be a callable that returns a scalar, got {_kind(loss)}: {loss!r}. Use, "
            f"for example, keras.losses.SparseCategoricalCrossentropy(from_logits=True).{hint}"
        )


def check_model(model: object, what: str = "model") -> None:
    """Raises TypeError if it is not a model of this Keras."""
    if isinstance(getattr(model, "module", None), keras.Model):
        raise TypeError(
            f"{what} must be a keras.Model, got it wrapped in {type(model).__name__}. Pass it "
            "unwrapped: with several processes Polus averages the gradients itself."
        )
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"{what} must be a keras.Model, got {_kind(model)}. It has to come from this Keras "
            f"(keras {keras.__version__} on {keras.config.backend()}), not from another library."
        )


def check_optimizer(optimizer: object) -> None:
    """Raises TypeError if it is not an optimizer of this Keras."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"optimizer must be a keras.optimizers.Optimizer, got {_kind(optimizer)}. Use, for "
            "example, keras.optimizers.Adam(1e-3); a backend's own optimizer can't update Keras "
            "variables on every backend."
        )


def check_function(function: object, name: str) -> None:
    """Raises TypeError if an optional argument is neither a function nor None."""
    if function is None or callable(function):
        return
    if hasattr(function, "shape"):
        raise TypeError(
            f"{name} must be a function, got {_described(function)}. Data is one argument: "
            "polus.from_arrays((x, y), batch_size=32)."
        )
    raise TypeError(f"{name} must be a function, got {function!r}.")


def one_processing(
    prediction: Callable[[Any], Any] | None, logits: Callable[[Any], Any] | None
) -> Callable[[Any], Any] | None:
    """Returns the post-processing of predictions, given under either of its names.

    Raises:
        TypeError: If it is no function, or is given under both names.
    """
    check_function(prediction, "post_process_prediction")
    check_function(logits, "post_process_logits")
    if prediction is not None and logits is not None:
        raise TypeError(
            "post_process_prediction and post_process_logits are two names of one argument. Pass "
            "one."
        )
    return prediction or logits


def check_minimized(loss_fn: object, variables: object, optimizer: object) -> None:
    """Raises TypeError if an argument of `minimize` is of the wrong kind."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function without arguments, got {loss_fn!r}.")
    what = "variables must be a list of keras.Variable"
    if isinstance(variables, keras.Variable) or not isinstance(variables, Iterable):
        raise TypeError(f"{what}, got {variables!r}.")
    for variable in variables:
        if not isinstance(variable, keras.Variable):
            raise TypeError(f"{what}, got {variable!r}.")
    check_optimizer(optimizer)


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__qualname__} instead of an object of it"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def listed(values: object, name: str) -> Sequence[Any]:
    """Returns a list, tuple or nothing as a sequence.

    Raises:
        TypeError: If it is anything else.
    """
    if values is None:
        return ()
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} must be a list, got {values!r}. Use {name}=[...].")
    return values


def checked_variables(variables: object) -> list[keras.Variable]:
    """Returns trainable weights as a list.

    Raises:
        TypeError: If it is not a list of Keras variables.
    """
    if isinstance(variables, keras.Variable) or not isinstance(variables, Sequence):
        raise TypeError(
            f"trainable_weights must be a list of keras.Variable, got {variables!r}. Use, for "
            "example, head.trainable_weights."
        )
    for i, variable in enumerate(variables):
        if not isinstance(variable, keras.Variable):
            raise TypeError(
                f"trainable_weights must be a list of keras.Variable, got {variable!r} at "
                f"position {i}. Use, for example, head.trainable_weights."
            )
    distinct = unique(variables)
    if len(distinct) < len(variables):
        counts = Counter(map(id, variables))
        repeated = [variable.path for variable in distinct if counts[id(variable)] > 1]
        logger.warning(
            "trainable_weights lists %d variables more than once (%s); each is updated once.",
            len(repeated),
            ", ".join(repeated),
        )
    return distinct


def add_penalties(result: object, penalties: Sequence[Any]) -> Any:
    """Adds the losses of the model itself to what the loss returned."""
    if not penalties or (isinstance(result, dict) and "loss" not in result):
        return result  # which `scalar_loss` refuses
    if isinstance(result, dict):
        return {**result, "loss": result["loss"] + sum(penalties)}
    return result + sum(penalties)


def scalar_loss(result: object, what: str = "The loss") -> Any:
    """Returns the loss out of a scalar, or out of a dict of scalars.

    Raises:
        ValueError: If it is neither.
    """
    terms = result if isinstance(result, dict) else {"loss": result}
    if "loss" not in terms:
        raise ValueError(
            f"{what} must have a term named 'loss', got the terms {sorted(map(str, terms))}. "
            'Return {"loss": total, ...}: that one is minimized, the others are recorded.'
        )
    _check_scalars(terms, what)
    return terms["loss"]


def _check_scalars(terms: Mapping[str, Any], what: str) -> None:
    for name, value in terms.items():
        term = "" if name == "loss" else f" as its term {name!r}"
        shape = getattr(value, "shape", None)
        if shape is None:
            raise ValueError(
                f"{what} must be a scalar tensor, got a {type(value).__name__}{term}. Return a "
                'tensor, or a dict of tensors: {"loss": total, ...}.'
            )
        if len(shape):
            raise ValueError(
                f"{what} must be a scalar tensor, got a tensor of shape {tuple(shape)}{term}. "
                "Reduce it, for example with keras.ops.mean(...). Keras' loss classes, such as "
                "keras.losses.MeanSquaredError(), reduce; the functions of the same name return "
                "one value per example."
            )


def terms_of(result: object) -> dict[str, Any]:
    """Returns what a loss returned as named terms, in at least float32."""
    scalar_loss(result)
    terms = result if isinstance(result, dict) else {"loss": result}
    return {name: at_least_float32(value) for name, value in terms.items()}


def at_least_float32(value: Any) -> Any:
    """Returns a tensor as float32 unless it is float64."""
    double = keras.backend.standardize_dtype(value.dtype) == "float64"
    return value if double else ops.cast(value, "float32")


def check_connected(gradients: Sequence[Any], variables: Sequence[keras.Variable]) -> None:
    """Raises ValueError if a loss depends on none of the variables."""
    if variables and all(gradient is None for gradient in gradients):
        names = ", ".join(variable.path for variable in variables[:5])
        raise ValueError(
            f"The loss depends on none of the {len(variables)} trainable variables ({names}"
            f"{', ...' if len(variables) > 5 else ''}). Is the model called in "
            "forward_with_grads, is its output passed to the loss, and is everything between "
            "made of keras.ops?"
        )


def check_extended(extended: bool) -> None:
    """Raises TypeError if `BaseTrainer` itself is instantiated."""
    if not extended:
        raise TypeError(
            "BaseTrainer must be extended, not instantiated. Write a class with "
            "forward_with_grads, or use ClassifierTrainer for (x, y) batches."
        )


def checked_metrics(
    given: object, weighted_metrics: Sequence[IMetric]
) -> tuple[list[IMetric], list[IMetric] | None]:
    """Returns the metrics of training, and those of validation if these are others.

    Args:
        given: The argument `metrics` of a trainer.
        weighted_metrics: Metrics of both.

    Raises:
        ValueError: If two metrics of a phase share a name, or one has a reserved name.
    """
    train, validation = metrics_by_phase(given)
    train = [*train, *weighted_metrics]
    check_metric_names(train)
    if validation is not None:
        validation = [*validation, *weighted_metrics]
        check_metric_names(validation)
    return train, validation


def adapt_assigned_metrics(trainer: Any, weighted: Sequence[IMetric]) -> list[IMetric]:
    """Makes metrics that were assigned to a trainer since it was made what its arguments mean.

    Args:
        trainer: The trainer.
        weighted: Its `weighted_metrics` when it was last seen.

    Returns:
        Its `weighted_metrics` now.

    Raises:
        TypeError: If one is not a metric.
        ValueError: As `checked_metrics`.
    """
    if not _are_adapted(trainer.weighted_metrics):
        trainer.weighted_metrics = as_metrics(trainer.weighted_metrics, weighted=True)
    now = list(trainer.weighted_metrics)
    if not _are_adapted(trainer.metrics):
        trainer.metrics, validation = checked_metrics(trainer.metrics, now)
        trainer.validation_metrics = validation or trainer.validation_metrics
    if trainer.validation_metrics is not None and not _are_adapted(trainer.validation_metrics):
        trainer.validation_metrics, _ = checked_metrics(trainer.validation_metrics, now)
    if list(map(id, now)) != list(map(id, weighted)):
        known = set(map(id, (*weighted, *now)))
        phases = trainer.metrics, trainer.validation_metrics
        trainer.metrics, trainer.validation_metrics = (
            None if phase is None else [*(m for m in phase if id(m) not in known), *now]
            for phase in phases
        )
    return now


def _are_adapted(metrics: object) -> bool:
    return isinstance(metrics, list | tuple) and all(isinstance(m, IMetric) for m in metrics)


def check_metric_names(metrics: Sequence[IMetric]) -> None:
    """Raises ValueError if metrics share a name, or one has a reserved name."""
    names = [metric.name for metric in metrics]
    for metric in metrics:
        make = f"{type(getattr(metric, 'metric', metric)).__name__}(..., name=...)"
        if names.count(metric.name) > 1:
            raise ValueError(
                f"{names.count(metric.name)} metrics are named {metric.name!r}, and results are "
                f"told apart by name. Give each its own: {make}."
            )
        if metric.name in RESERVED_NAMES:
            raise ValueError(
                f"A metric must not be named {metric.name!r}, which is a column of the history "
                f"already. Give it another name: {make}."
            )


def check_terms(result: object, metrics: Sequence[IMetric], primary: str | None) -> None:
    """Raises ValueError if a step's result can't be recorded.

    Args:
        result: What `train_step` returned: a scalar, or a dict of any names. What is no scalar in
            it is not recorded, but kept for callbacks.
        metrics: The trainer's metrics, whose names are columns of the record.
        primary: The name of the term that is recorded as "loss" too.
    """
    terms = result if isinstance(result, dict) else {"loss": result}
    if not terms:
        raise ValueError(
            "train_step must return a scalar or a dict of named scalars to record, got an empty "
            'dict. Return at least one: {"norm": ops.norm(x)}.'
        )
    for name in terms:
        if not isinstance(name, str):
            raise ValueError(f"The terms of train_step have strings as names, got {name!r}.")
    is_array = {name: len(getattr(value, "shape", ())) > 0 for name, value in terms.items()}
    recorded = {n: v for n, v in terms.items() if n in ("loss", primary) or not is_array[n]}
    _check_scalars(recorded, "The result of train_step")
    if not recorded:
        raise ValueError(
            "train_step must return at least one scalar to record, got only the arrays "
            f"{', '.join(map(repr, terms))}."
        )
    if primary is not None and primary not in terms:
        raise ValueError(
            f"primary is {primary!r}, and the step returns {', '.join(map(repr, terms))}. Set "
            "primary to one of these names, or leave it out."
        )
    if primary not in (None, "loss") and "loss" in terms:
        raise ValueError(
            f"primary is {primary!r}, which would be recorded as 'loss', and the step returns a "
            "term named 'loss' as well. Rename that term, or leave primary out."
        )
    names = {metric.name for metric in metrics}
    for name in terms if isinstance(result, dict) else ():
        if name in ("epoch", "step") or name in names:
            other = "a metric" if name in names else "a column of the history"
            raise ValueError(
                f"The step returns a term named {name!r}, which is also the name of {other}. "
                "Rename the term."
            )


@contextlib.contextmanager
def explain_argument_errors(seen_batches: SeenBatches) -> Iterator[None]:
    """Adds the structure of batches to a TypeError raised by an argument mismatch.

    Args:
        seen_batches: Returns the words for the batches that the step has been given, and their
            parts: the first, and the last if there were more.
    """
    try:
        yield
    except TypeError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        # The call itself failed, in our code: no frame of the user's is below.
        ours = str(frame.f_globals.get("__name__")).startswith("polus.")
        if ours and "argument" in str(error) and (batches := dict(seen_batches())):
            error.add_note(_explanation(batches))
        raise


def _explanation(batches: dict[str, tuple[Any, ...]]) -> str:
    described = "".join(
        f"{where} has {_counted(batch)}: {', '.join(map(_described, batch))}. "
        for where, batch in batches.items()
    )
    return (
        f"{described}A tuple or list batch is unpacked into the arguments of the step; anything "
        "else (a dict, one tensor) is one argument. What forward_without_grads returns is unpacked "
        "into forward_with_grads, and what that returns into the loss. ClassifierTrainer gives a "
        "loss the weights of the examples, from class_weight or the third part of a batch, as its "
        "third argument. To change the form of "
        "batches: train(..., custom_data_transform_f=lambda batch: (batch['x'], batch['y'])). "
        "Arrays in memory are not batches: use polus.data.from_arrays((x, y), batch_size=32)."
    )


def _counted(batch: tuple[Any, ...]) -> str:
    return f"{len(batch)} part{'s' * (len(batch) != 1)}"


def _described(part: Any) -> str:
    if part is None:
        return "None"
    if isinstance(part, dict):
        return f"a dict of {', '.join(map(repr, part))}"
    if hasattr(part, "shape") and hasattr(part, "dtype"):
        return f"{keras.backend.standardize_dtype(part.dtype)} {tuple(part.shape)}"
    return f"a {type(part).__name__}"
