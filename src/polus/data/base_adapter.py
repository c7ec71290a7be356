"""The interface through which the loop reads a dataset, and what several adapters share."""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from polus.data.resume import IteratorSnapshot, Replay, RestoreIterator, ResumeStrategy, Seek
from polus.errors import AnotherRunError, RefusedStateError

_END = object()


class DataAdapter:
    """A re-iterable dataset as the loop reads it; subclasses adapt other kinds.

    Args:
        dataset: The user's dataset.

    Attributes:
        dataset: The user's dataset.
        num_batches: The number of batches per epoch; None if the dataset is endless or can't tell.
        endless: Whether an epoch has no end.
        live: Whether batches are made between two steps, so that none can be read ahead.
        state_depends_on_reads: Whether stopping an epoch early changes later epochs.
        unrepeatable: The reason why a new process can't bring the dataset back to where it was;
            empty if it can.
    """

    state_depends_on_reads = False
    unrepeatable = ""
    live = False

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        length = _length(dataset)
        self.endless = length is not None and length >= sys.maxsize  # grain's for repeat()
        self.num_batches: int | None = None if self.endless else length
        self._iterator: Any = None

    def facts(self) -> dict[str, Any]:
        """Returns what tells this dataset from others of its kind, as values that JSON can hold."""
        return {}

    def check_untransformed(self) -> None:
        """Raises a TypeError if no step can take the batches as they are, without a transform."""

    def bind(self, trainer: Any) -> None:
        """Tells the dataset which trainer it trains."""

    # ------------------------------------------------------------------ reading

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """Returns the batches of an epoch from batch `skip` on."""
        return itertools.islice(self.begin(epoch), skip, None)

    def end_epoch(self) -> None:
        """Called when all batches of an epoch that the run asks for were read."""

    def close(self) -> None:
        """Drops the iterator of the epoch."""
        self._iterator = None

    def begin(self, epoch: int) -> Any:
        """Begins an epoch, and returns the iterator of its batches."""
        self._set_epoch(epoch)
        self._iterator = self._iterate()
        return self._iterator

    def _set_epoch(self, epoch: int) -> None:
        for part in self._parts().values():
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def _iterate(self) -> Iterator[Any]:
        return iter(self.dataset)

    # ------------------------------------------------------------------ resuming

    def resume_strategy(
        self, snapshot: IteratorSnapshot | None, transformed: bool
    ) -> ResumeStrategy:
        """Returns the way in which a new process continues an epoch.

        Args:
            snapshot: The newest state of the iterator before that place, None if there is none.
            transformed: Whether batches pass through a function of the user's, which may draw
                random numbers.
        """
        return Replay() if snapshot is None else RestoreIterator(snapshot)

    def iterator_state(self) -> object:
        """Returns the state of the iterator behind its last batch; None if it has none."""
        return self._iterator.get_state() if hasattr(self._iterator, "set_state") else None

    def restored_batches(self, epoch: int, iterator_state: Any) -> Iterator[Any]:
        """Returns the batches of an epoch that follow where `iterator_state()` was taken."""
        iterator = self.begin(epoch)
        iterator.set_state(iterator_state)
        return iter(iterator)

    def epoch_end_state(self) -> object:
        """Returns the state of the dataset between two epochs; None if it has none."""
        return None

    def restore_epoch_end(self, epoch: int, state: object) -> None:
        """Restores `epoch_end_state()`, taken before `epoch`. May draw random numbers."""
        raise NotImplementedError(f"{type(self).__name__} has no state between epochs.")

    def rewind(self, epoch: int, steps: int | None) -> None:
        """Brings the dataset of a new process to where it was before `epoch`.

        By default earlier epochs leave nothing behind but the states of generators.

        Args:
            epoch: The number of earlier epochs.
            steps: The number of batches that each of them read; None for all.
        """

    def can_reread(self, steps: int | None) -> bool:
        """Returns whether an earlier epoch of `steps` batches (None for all) can be read again."""
        return True

    def live_state(self) -> Any:
        """Returns the state of what makes the batches between two steps; None if it has none."""
        return None

    def set_live_state(self, state: Any) -> None:
        """Restores `live_state()`."""

    def get_state(self) -> dict[str, Any]:
        """Returns the states of the dataset's own generators as NumPy arrays."""
        return {name: g.get_state().numpy().copy() for name, g in self._generators().items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores `get_state()`.

        Raises:
            AnotherRunError: If the dataset had other generators.
            RefusedStateError: If a generator does not take its state.
        """
        for name, generator in self._generators().items():
            if name not in state:
                raise AnotherRunError(f"The dataset is another one: its {name} had no generator.")
            try:
                # PyTorch's generators take a tensor, and this package does not import PyTorch.
                generator.set_state(generator.get_state().new_tensor(state[name]))
            except Exception as error:  # whatever PyTorch raises
                raise RefusedStateError(
                    f"The generator of the dataset's {name} does not take its saved state: {error}"
                ) from error

    def _generators(self) -> dict[str, Any]:
        """Returns the generators of a PyTorch loader."""
        found = {name: getattr(part, "generator", None) for name, part in self._parts().items()}
        return {name: g for name, g in found.items() if type(g).__module__.startswith("torch")}

    def _parts(self) -> dict[str, Any]:
        """Returns the dataset and the samplers that a PyTorch loader takes its order from."""
        batch_sampler = getattr(self.dataset, "batch_sampler", None)
        return {
            "loader": self.dataset,
            "sampler": getattr(self.dataset, "sampler", None),
            "batch_sampler": batch_sampler,
            "batch_sampler.sampler": getattr(batch_sampler, "sampler", None),
        }


class StatefulAdapter(DataAdapter):
    """A dataset that itself has a state, such as torchdata's `StatefulDataLoader`."""

    _at_epoch_end = False

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        batches = super().batches(epoch, skip)
        if not self._at_epoch_end:
            return batches
        self._at_epoch_end = False
        return self._next_epoch(batches, skip)

    def _next_epoch(self, batches: Iterator[Any], skip: int) -> Iterator[Any]:
        first = next(batches, _END)
        if first is _END:
            # Given its state at an epoch's end, the dataset has ended that epoch once more.
            self._iterator = self._iterate()
            yield from itertools.islice(self._iterator, skip, None)
        else:
            yield first
            yield from batches

    def iterator_state(self) -> object:
        return self.dataset.state_dict()

    def restored_batches(self, epoch: int, iterator_state: Any) -> Iterator[Any]:
        self._set_epoch(epoch)
        self.dataset.load_state_dict(iterator_state)
        self._iterator = self._iterate()
        return iter(self._iterator)

    def epoch_end_state(self) -> object:
        return self.dataset.state_dict()

    def restore_epoch_end(self, epoch: int, state: object) -> None:
        self._set_epoch(epoch)
        self.dataset.load_state_dict(state)
        # torchdata takes the state over, and draws random numbers, when an iterator is made.
        self._iterate()
        self._at_epoch_end = True


class SeekableAdapter(DataAdapter):
    """A dataset whose epochs are a function of their number, and skip batches without reading."""

    def resume_strategy(
        self, snapshot: IteratorSnapshot | None, transformed: bool
    ) -> ResumeStrategy:
        return Replay() if transformed else Seek()


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:  # no __len__, or one that does not know
        return None
