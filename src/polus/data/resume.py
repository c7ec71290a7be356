"""Three ways for a new process to continue an epoch in its middle.

- `Seek`: the order is a function of the epoch's number (`from_arrays`), so nothing is read again.
- `RestoreIterator`: the iterator has a state (`get_state`/`set_state` as in grain, or the dataset
  has one, `state_dict`/`load_state_dict` as in torchdata's `StatefulDataLoader`). The state is
  restored, and what was read after it was taken is read again.
- `Replay`: everything else. The epoch begins again with the generators as they were when it first
  began, and the batches that the run has seen are read again and dropped.

The adapter of a dataset chooses the way: see `DataAdapter.resume_strategy`.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from polus.data.fingerprint import same
from polus.state import random_state

logger = logging.getLogger("polus.data")

State = dict[str, Any]


class Epoch(Protocol):
    """The part of an `EpochReader` that is needed here."""

    def peek(self) -> Any: ...

    def set_example(self, batch: Any) -> None: ...

    def skip_to(self, step: int, handle_signals: Callable[[], None]) -> None: ...


class Reader(Protocol):
    """The part of a `DataReader` that is needed here."""

    def first_batch(self, epoch: int) -> Any: ...

    def open_epoch(self, epoch: int, start: int, iterator_state: Any = None) -> Epoch: ...


class ResumeStrategy(Protocol):
    """A way to continue an epoch before one of its steps.

    Attributes:
        checks_first_batch: Whether a new process finds the epoch's first batch again, so that its
            checksum tells whether the order repeats.
    """

    checks_first_batch: bool

    def resume(
        self, reader: Reader, epoch: int, step: int, handle_signals: Callable[[], None]
    ) -> State:
        """Opens `epoch` before `step`, with the dataset as it was when the epoch began.

        Args:
            reader: Opens epochs.
            epoch: The number of the epoch.
            step: The number of steps that the run has done in it.
            handle_signals: Called before each batch that is read and dropped; may raise.

        Returns:
            The states of the global random generators that the data is drawn from, as the next
            batch leaves them.
        """
        ...


class Seek:
    """Begins at the batch itself."""

    checks_first_batch = True

    def resume(
        self, reader: Reader, epoch: int, step: int, handle_signals: Callable[[], None]
    ) -> State:
        example = reader.first_batch(epoch)
        reader.open_epoch(epoch, step).set_example(example)
        return {}


class RestoreIterator:
    """Begins where the state of an iterator was taken.

    Args:
        num_read: The number of batches of the epoch that had been read then.
        iterator_state: The state.
        checks_first_batch: See `ResumeStrategy`.
    """

    def __init__(self, num_read: int, iterator_state: Any, checks_first_batch: bool = True) -> None:
        self.num_read = num_read
        self.iterator_state = iterator_state
        self.checks_first_batch = checks_first_batch

    def resume(
        self, reader: Reader, epoch: int, step: int, handle_signals: Callable[[], None]
    ) -> State:
        example = reader.first_batch(epoch)
        data = reader.open_epoch(epoch, self.num_read, self.iterator_state)
        data.set_example(example)
        data.skip_to(step, handle_signals)
        return {}


class Replay:
    """Begins at the start of the epoch and drops batches up to the step."""

    checks_first_batch = True

    def resume(
        self, reader: Reader, epoch: int, step: int, handle_signals: Callable[[], None]
    ) -> State:
        data = reader.open_epoch(epoch, 0)
        if (example := data.peek()) is not None:
            data.set_example(example)
        before = random_state()
        data.skip_to(step, handle_signals)
        data.peek()
        # A generator that each batch is drawn from now stands where the data needs it.
        return {k: v for k, v in random_state().items() if not same(v, before[k])}


def check_same_dataset(saved: State, now: State) -> None:
    """Raises a ValueError that names what differs, if the dataset is another one."""
    differing = [
        f"{name}: it was {value!r}, and is {now[name]!r}"
        for name, value in saved.items()
        if name in now and now[name] != value
    ]
    if differing:
        raise ValueError("The dataset is another one. " + "; ".join(differing) + ".")


def check_same_leaves(saved: Any, now: Any) -> None:
    """Raises a ValueError if the arrays of a batch have other dtypes or numbers of axes."""
    if now is not None and saved not in (None, now):
        raise ValueError(
            "The dataset is another one. The arrays of a batch (dtype, number of axes) were "
            f"{saved}, and are {now}."
        )


def warn_if_another(epoch: int, saved: int | None, now: int | None) -> None:
    """Warns if the first batch of an epoch has another checksum than before."""
    if saved not in (None, now):
        logger.warning(
            "The order of the data does not repeat: the first batch of epoch %d is not the one "
            "that it was before the interruption. Training continues, but not as it would have: "
            "some examples may come more often than others. Give every shuffle a seed, let the "
            "order of an epoch depend on nothing that earlier epochs left behind (a dataset with a "
            "set_epoch(epoch) method is told the number), or use polus.data.from_arrays(...).",
            epoch + 1,
        )
