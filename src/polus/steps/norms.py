"""Gradient norms of a step, returned among its terms."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
from keras import ops

from polus.backends import backend
from polus.steps.compiled import as_terms
from polus.steps.watching import Watching
from polus.types import Tensor

NORM, CLIPPED = "gradient_norm", "clipped_gradient_norm"
Norms = bool | Literal["variables"]
CLIPS = ("clipnorm", "global_clipnorm", "clipvalue")


class GradientNorms(Watching):
    """Collects the global norms of the gradients that optimizers get, while a step runs.

    Args:
        names: The name of each optimizer by its identity: "optimizer" has no prefix in the terms.
        by_variable: Whether each variable's gradient has a norm of its own as well.

    Attributes:
        terms: The norms by name.
    """

    def __init__(self, names: Mapping[int, str], by_variable: bool = False) -> None:
        super().__init__()
        self.names = names
        self.by_variable = by_variable
        self.terms: dict[str, Tensor] = {}

    def see(
        self,
        optimizer: keras.optimizers.Optimizer,
        variables: Sequence[keras.Variable],
        taken: Sequence[Tensor | None],
        given: Sequence[Tensor | None],
        scaled: bool,
        processed: bool,
    ) -> None:
        """Adds an update.

        Args:
            optimizer: The optimizer.
            variables: The variables.
            taken: The gradients as they were taken.
            given: Those that the optimizer gets, times the scale of its loss.
            scaled: Whether those that were taken are scaled as well.
            processed: Whether a function has changed them meanwhile.
        """
        name = self.names.get(id(optimizer), "optimizer")
        prefix = "" if name == "optimizer" else f"{name}_"
        scale = optimizer.scale_loss(ops.ones(()))
        of_taken = scale if scaled else 1.0
        self.terms[prefix + NORM] = _norm(taken) / of_taken
        for variable, gradient in zip(variables, taken, strict=True) if self.by_variable else ():
            if gradient is not None:
                self.terms[f"{prefix}{NORM}/{variable.path}"] = _norm([gradient]) / of_taken
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        clips = [getattr(inner, name, None) for name in CLIPS]
        if processed or clips != [None] * len(clips):
            unscaled = [None if g is None else ops.convert_to_tensor(g) / scale for g in given]
            self.terms[prefix + CLIPPED] = _clipped_norm(unscaled, *clips)


def with_norms(
    step: Callable[..., Any], names: Mapping[int, str], by_variable: bool = False
) -> Callable[..., Any]:
    """Returns a step that also returns the norms of its gradients, each under a name of its own.

    A term that the step itself returns under such a name stays.

    Args:
        step: The step.
        names: The name of each optimizer by its identity.
        by_variable: Whether each variable's gradient has a norm of its own as well.
    """

    def measured(*inputs: Any, **named: Any) -> Any:
        with GradientNorms(names, by_variable) as norms:
            result = step(*inputs, **named)
        return {**norms.terms, **as_terms(result)} if norms.terms else result

    return measured


def _squares(gradients: Sequence[Tensor | None]) -> list[Any]:
    """Returns the sum of the squares of each gradient, in float32."""
    return [backend.squared_norm(g) for g in gradients if g is not None]


def _norm(gradients: Sequence[Tensor | None]) -> Any:
    return ops.sqrt(sum(_squares(gradients), start=ops.zeros(())))


def _clipped_norm(
    gradients: Sequence[Tensor | None],
    clipnorm: float | None,
    global_clipnorm: float | None,
    clipvalue: float | None,
) -> Any:
    """Returns the norm of gradients as Keras' optimizers clip them: by one of three arguments."""
    if clipvalue is not None:
        return _norm([g if g is None else ops.clip(g, -clipvalue, clipvalue) for g in gradients])
    squares = _squares(gradients)
    if clipnorm is not None:
        squares = [ops.minimum(square, clipnorm**2) for square in squares]
    norm = ops.sqrt(sum(squares, start=ops.zeros(())))
    return norm if global_clipnorm is None else ops.minimum(norm, global_clipnorm)
