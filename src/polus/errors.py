"""Errors that several parts of the package raise or tell apart."""

from collections.abc import Sequence


class AnotherRunError(ValueError):
    """A saved state is not of the present run: its data, model or settings are other ones."""


class RefusedStateError(ValueError):
    """A part of the run, such as a callback or a dataset, does not take its saved state."""


class NonFiniteError(FloatingPointError):
    """A step's loss, gradients or update were not finite. The weights are those before it.

    Args:
        message: The message.
        epoch: The epoch, from 0.
        step: The step of the epoch, from 0; the number of its batch.
        terms: The names of the step's terms that were not finite.
        gradients: The paths of the variables whose gradients were not finite.
        variables: The paths of the variables that the update would have made not finite.
    """

    def __init__(
        self,
        message: str,
        epoch: int = 0,
        step: int = 0,
        terms: Sequence[str] = (),
        gradients: Sequence[str] = (),
        variables: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step
        self.terms = list(terms)
        self.gradients = list(gradients)
        self.variables = list(variables)
