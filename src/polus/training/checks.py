"""Checks of what a user gives a trainer, and of what a step returns."""

import contextlib
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from polus.metrics import IMetric
from polus.steps.variables import unique

logger = logging.getLogger("polus.training")

RESERVED_NAMES = ("loss", "epoch", "step")


def check_kinds(model: object, optimizer: object, loss: object) -> None:
    """Raises TypeError if a part of a trainer is of the wrong kind."""
    check_model(model)
    check_optimizer(optimizer)
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(
            f"loss must be a callable that returns a scalar, got {_kind(loss)}: {loss!r}. Use, "
            "for example, keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
        )


def check_model(model: object) -> None:
    """Raises TypeError if it is not a model of this Keras."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"model must be a keras.Model, got {_kind(model)}. It has to come from this Keras "
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
    if function is not None and not callable(function):
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


def loss_scaled(
    optimizer: keras.optimizers.Optimizer, model: keras.Model
) -> keras.optimizers.Optimizer:
    """Returns the optimizer, with loss scaling under mixed_float16, as `compile` adds it."""
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if not scaled and getattr(model.dtype_policy, "name", None) == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    return optimizer


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
    return terms["loss"]


def terms_of(result: object) -> dict[str, Any]:
    """Returns what a loss returned as named terms, in at least float32."""
    scalar_loss(result)
    terms = result if isinstance(result, dict) else {"loss": result}
    return {name: _at_least_float32(value) for name, value in terms.items()}


def _at_least_float32(value: Any) -> Any:
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


def check_terms(result: object, metrics: Sequence[IMetric]) -> None:
    """Raises ValueError if a term of the step is named as another column of the record."""
    scalar_loss(result, "The result of train_step")
    names = {metric.name for metric in metrics}
    for name in result if isinstance(result, dict) else ():
        if name in ("epoch", "step") or name in names:
            other = "a metric" if name in names else "a column of the history"
            raise ValueError(
                f"The step returns a term named {name!r}, which is also the name of {other}. "
                "Rename the term."
            )


@contextlib.contextmanager
def explain_argument_errors(example: Callable[[], Sequence[object] | None]) -> Iterator[None]:
    """Adds the batch's structure to a TypeError raised by an argument mismatch.

    Args:
        example: A function that returns the arguments of the first batch, or None.
    """
    try:
        yield
    except TypeError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        # The call itself failed, in our code: no frame of the user's is below.
        ours = str(frame.f_globals.get("__name__")).startswith("polus.")
        if ours and "argument" in str(error) and (batch := example()) is not None:
            error.add_note(_explanation(batch))
        raise


def _explanation(batch: Sequence[Any]) -> str:
    parts = ", ".join(map(_described, batch))
    return (
        f"The first batch has {len(batch)} part{'s' * (len(batch) != 1)}: {parts}. A tuple or list "
        "batch is unpacked into the arguments of the step; anything else (a dict, one tensor) is "
        "one argument. What forward_without_grads returns is unpacked into forward_with_grads, "
        "and what that returns into the loss. To change the form of batches: "
        "train(..., custom_data_transform_f=lambda batch: (batch['x'], batch['y'])). Arrays in "
        "memory are not batches: use polus.data.from_arrays((x, y), batch_size=32)."
    )


def _described(part: Any) -> str:
    if isinstance(part, dict):
        return f"a dict of {', '.join(map(repr, part))}"
    if hasattr(part, "shape") and hasattr(part, "dtype"):
        return f"{keras.backend.standardize_dtype(part.dtype)} {tuple(part.shape)}"
    return f"a {type(part).__name__}"
