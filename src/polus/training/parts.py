"""What a run uses of its trainer."""

from typing import Any, Protocol

import keras

from polus.callbacks.base import TrainerView


class TrainerParts(TrainerView, Protocol):
    """What a run uses of its trainer."""

    loss: Any
    primary: str | None

    @property
    def trainable_weights(self) -> list[keras.Variable]: ...
    def check_batch(self, inputs: tuple[Any, ...], where: str) -> None: ...
