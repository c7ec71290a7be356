"""Where a run stands, in variables that a compiled step can read."""

from typing import Any

import keras


class Progress:
    """The epoch and the length of a run, set by the loop between two epochs.

    Attributes:
        epoch: The current epoch, from 0; an int32 variable.
        total_steps: The steps of the whole run; an int32 variable, 0 until they are known.
    """

    def __init__(self) -> None:
        self.epoch = _counter("epoch")
        self.total_steps = _counter("total_steps")
        self._values = (0, 0)

    def set(self, epoch: int, total_steps: int) -> None:
        """Sets both; what has not changed costs nothing."""
        variables = (self.epoch, self.total_steps)
        values = (epoch, min(total_steps, 2**31 - 1))
        for variable, before, value in zip(variables, self._values, values, strict=True):
            if before != value:
                variable.assign(value)
        self._values = values

    def forget(self) -> None:
        """Makes the next `set` assign both: a checkpoint may have restored others."""
        self._values = (-1, -1)


class ProgressVariable:
    """An attribute of a trainer that is one of its run's progress variables.

    A subclass may use the name for something else.

    Args:
        name: The name of the variable.
        progress: Returns the progress of a trainer.
    """

    def __init__(self, name: str, progress: Any) -> None:
        self.name = name
        self.progress = progress

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        return self if trainer is None else getattr(self.progress(trainer), self.name)


def _counter(name: str) -> keras.Variable:
    return keras.Variable(0, dtype="int32", trainable=False, name=name)
