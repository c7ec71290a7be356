"""Data that come into being while a model trains: made by it, pushed by a loop, or none at all."""

import collections
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from polus.data import iterator_state
from polus.data.base_adapter import DataAdapter
from polus.data.resume import Continue, IteratorSnapshot, ResumeStrategy


class LiveData:
    """Batches that a function makes between two steps; see `live`.

    Args:
        make_batch: The function.
    """

    def __init__(self, make_batch: Callable[[Any], Any]) -> None:
        if not callable(make_batch):
            raise TypeError(
                f"live takes a function of the trainer that returns a batch, got {make_batch!r}."
            )
        self.make_batch = make_batch


def live(make_batch: Callable[[Any], Any]) -> LiveData:
    """Returns a dataset whose batches are made by the model that trains on them.

    `make_batch(trainer)` is called in the main thread, right before the step that takes its batch,
    so it sees the weights that all steps before have made. Nothing is read ahead, and each call of
    the backend runs one step. The dataset is endless: say `train(..., steps=...)`.

    ```python
    def play(trainer):
        actions = policy(trainer.model, environment)
        return environment.step(actions)


    trainer.train(polus.data.live(play), epochs=10, steps=100)
    ```

    A resumed run calls `make_batch` with the weights and the random generators of that moment. If
    it keeps a state of its own (an environment, a replay buffer), let it be an object with
    `get_state()` and `set_state(state)`, in lists, dicts, numbers and NumPy arrays.

    Args:
        make_batch: Takes the trainer, and returns the batch.
    """
    return LiveData(make_batch)


class MadeBetweenSteps(DataAdapter):
    """Batches that come into being between two steps, and are never read again."""

    live = True

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        iterator: Iterator[Any] = self.begin(epoch)
        return iterator

    def resume_strategy(
        self, snapshot: IteratorSnapshot | None, transformed: bool
    ) -> ResumeStrategy:
        return Continue()

    def can_reread(self, steps: int | None) -> bool:
        return False


class LiveAdapter(MadeBetweenSteps):
    """What `live` returns."""

    dataset: LiveData

    def __init__(self, dataset: LiveData) -> None:
        super().__init__(dataset)
        self.endless = True
        self._trainer: Any = None

    def bind(self, trainer: object) -> None:
        self._trainer = trainer

    def _iterate(self) -> Iterator[Any]:
        if self._trainer is None:
            raise ValueError(
                "Live data are made by a trainer while it trains: pass them to train. For an "
                "evaluation, pass a list of batches."
            )
        while True:
            yield self.dataset.make_batch(self._trainer)

    def live_state(self) -> Any:
        get_state = getattr(self.dataset.make_batch, "get_state", None)
        return None if get_state is None else iterator_state.encode(get_state())

    def set_live_state(self, state: object) -> None:
        if state is not None:
            self.dataset.make_batch.set_state(iterator_state.decode(state))  # type: ignore[attr-defined]


class PushedAdapter(MadeBetweenSteps):
    """Batches that somebody pushes one by one; an epoch ends when there is none."""

    def __init__(self) -> None:
        super().__init__(())
        self.num_batches = None
        self._batches: collections.deque[tuple[Any, ...]] = collections.deque()

    def push(self, batch: tuple[Any, ...]) -> None:
        """Adds a batch: the step's arguments."""
        self._batches.append(batch)

    def _iterate(self) -> Iterator[Any]:
        while self._batches:
            yield self._batches.popleft()


class NoDataAdapter(DataAdapter):
    """No data: a step without arguments, as often as `steps` says."""

    def __init__(self) -> None:
        super().__init__(())
        self.num_batches, self.endless = None, True

    def _iterate(self) -> Iterator[Any]:
        return itertools.repeat(())
