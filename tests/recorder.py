"""The callback that the tests listen with."""

from collections.abc import Callable
from typing import Any

from polus.callbacks import Callback


def do_nothing(*event: Any) -> None:
    """Stands for a function that is called with each event."""


class Recorder(Callback):
    """Records each event that it hears: its name, its numbers, and of a step its loss.

    Args:
        then: Called with each event after it was recorded, `then("step_end", epoch, step, loss)`:
            what a test wants done in the middle of a run.
        every_steps: How often it needs to run between two steps; None to take the steps as they
            come.

    Attributes:
        events: `("train_begin",)`, `("epoch_begin", 0)`, `("step_begin", 0, 0)`,
            `("step_end", 0, 0, 1.25)`, `("epoch_end", 0)`, `("train_end",)`, in their order.
        blocks: How many steps ran in each call of the backend.
    """

    def __init__(
        self, then: Callable[..., object] = do_nothing, every_steps: int | None = 1
    ) -> None:
        super().__init__()
        self.then = then
        self.every_steps = every_steps
        self.events: list[tuple[Any, ...]] = []
        self.blocks: list[int] = []

    def record(self, *event: Any) -> None:
        self.events.append(event)
        self.then(*event)

    @property
    def names(self) -> list[str]:
        """The names of the events."""
        return [name for name, *_ in self.events]

    @property
    def steps(self) -> list[tuple[int, int]]:
        """The epoch and number of each step that ended."""
        return [(epoch, step) for name, epoch, step, _ in self._of("step_end")]

    @property
    def losses(self) -> list[float]:
        """The loss of each step that ended."""
        return [loss for *_, loss in self._of("step_end")]

    def _of(self, name: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == name]

    def on_train_begin(self) -> None:
        self.record("train_begin")

    def on_epoch_begin(self, epoch: int) -> None:
        self.record("epoch_begin", epoch)

    def on_train_batch_begin(self, epoch: int, step: int) -> None:
        self.record("step_begin", epoch, step)

    def on_train_batch_end(self, epoch: int, step: int, loss: Any) -> None:
        self.record("step_end", epoch, step, float(loss))

    def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
        self.blocks.append(len(steps))
        super().on_steps_end(epoch, steps, losses)

    def on_epoch_end(self, epoch: int) -> None:
        self.record("epoch_end", epoch)

    def on_train_end(self) -> None:
        self.record("train_end")
