"""The learning rate of an optimizer, where Keras' public property does not tell enough.

The property returns a schedule's present value instead of the schedule, and its setter takes no
variable.
"""

from typing import Any

import keras


def rate_owner(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Returns the optimizer that has the learning rate: the inner one under loss scaling."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def schedule_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """Returns an optimizer's schedule, or the variable of its rate."""
    owner = rate_owner(optimizer)
    return owner._learning_rate


def set_rate_variable(optimizer: keras.optimizers.Optimizer, rate: keras.Variable) -> None:
    """Makes a variable an optimizer's rate, in place of a schedule."""
    owner = rate_owner(optimizer)
    owner._learning_rate = rate
