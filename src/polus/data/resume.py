"""Four ways for a new process to continue an epoch in its middle.

- `Seek`: the order is a function of the epoch's number (`from_arrays`), so nothing is read again.
- `RestoreIterator`: the iterator has a state (`get_state`/`set_state` as in grain, or the dataset
  has one, `state_dict`/`load_state_dict` as in torchdata's `StatefulDataLoader`). The state is
  restored, and what was read after it was taken is read again.
- `Continue`: the run makes its data itself, so there is nothing to read again.
- `Replay`: everything else. The epoch begins again with the generators as they were when it first
  began, and the batches that the run has seen are read again and dropped.

The adapter of a dataset chooses the way: see `DataAdapter.resume_strategy`.
"""

import collections
import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Protocol

from polus.data import iterator_state
from polus.data.fingerprint import checksum, same
from polus.errors import AnotherRunError, RefusedStateError
from polus.state import random_state

logger = logging.getLogger("polus.data")

# Of each array of a batch, to recognise the batch: all of a batch of images takes too long.
MAX_CHECKED_BYTES = 2**20

Callback = Callable[[], None]
State = dict[str, Any]


@dataclasses.dataclass
class IteratorSnapshot:
    """The state of a dataset's iterator between two batches of an epoch.

    Attributes:
        num_read: The number of batches of the epoch that were read before.
        state: The state of the iterator.
        generators: The states of the random generators then.
        next_checksum: The checksum of the batch that followed, by which a new process can tell
            that the state brings it back; None before it is read.
    """

    num_read: int
    state: Any
    generators: State
    next_checksum: int | None = None

    def to_tree(self) -> State:
        """Returns the snapshot in types that a checkpoint can hold."""
        return vars(self) | {"state": iterator_state.encode(self.state)}

    @classmethod
    def from_tree(cls, tree: State) -> "IteratorSnapshot":
        """Returns the snapshot that `to_tree` was called on."""
        return cls(**tree | {"state": iterator_state.decode(tree["state"])})


class IteratorSnapshots:
    """The newest snapshots of an epoch.

    Args:
        first: The snapshot that the epoch was opened at, if any.
    """

    def __init__(self, first: IteratorSnapshot | None = None) -> None:
        # A checkpoint is a few blocks behind the prefetch thread; a state can be large.
        self._newest: collections.deque[IteratorSnapshot] = collections.deque(maxlen=8)
        self._first = None if first is None else dataclasses.replace(first, next_checksum=None)
        if self._first is not None:
            self._newest.append(self._first)

    def add(self, snapshot: IteratorSnapshot) -> None:
        self._newest.append(snapshot)

    def see(self, batch: object) -> None:
        """Tells which batch was read next."""
        if self._newest and self._newest[-1].next_checksum is None:
            self._newest[-1].next_checksum = checksum(batch, MAX_CHECKED_BYTES)

    def begin_as(self, snapshot: IteratorSnapshot) -> bool:
        """Returns whether the first batch read is the one that once followed the snapshot."""
        return self._first is not None and self._first.next_checksum == snapshot.next_checksum

    def before(self, step: int) -> IteratorSnapshot | None:
        """Returns the newest snapshot from which `step` can be reached, None if there is none."""
        found = None
        for snapshot in list(self._newest):
            # One whose next batch is not known could not be verified.
            if 0 < snapshot.num_read <= step and snapshot.next_checksum is not None:
                found = snapshot
        return found


class Epoch(Protocol):
    """The part of an `EpochReader` that is needed here."""

    checksum: int | None

    def peek(self) -> Any: ...

    def set_example(self, batch: object) -> None: ...

    def seen(self, count: int) -> int | None: ...

    def skip_to(self, step: int, handle_signals: Callback) -> None: ...

    def follows(self, snapshot: IteratorSnapshot) -> bool: ...


class LiveState(Protocol):
    """The part of an adapter that is needed here."""

    def set_live_state(self, state: object) -> None: ...


class Reader(Protocol):
    """The part of a `DataReader` that is needed here."""

    @property
    def adapter(self) -> LiveState: ...

    def first_batch(self, epoch: int) -> Any: ...

    def restore_generators(self, generators: State) -> None: ...

    def open_epoch(
        self, epoch: int, start: int = 0, snapshot: IteratorSnapshot | None = None
    ) -> Epoch: ...


class ResumeStrategy(Protocol):
    """A way to continue an epoch before one of its steps."""

    def resume(
        self, reader: Reader, epoch: int, step: int, saved: State, handle_signals: Callback
    ) -> State:
        """Opens `epoch` before `step`, and warns if the data are not those of the saved run.

        Args:
            reader: Opens epochs. Dataset and generators are as they were when the epoch began.
            epoch: The number of the epoch.
            step: The number of steps that the run has done in it.
            saved: What `DataReader.get_state` returned there.
            handle_signals: Called before each batch that is read and dropped; may raise.

        Returns:
            The states of the global random generators that each batch is drawn from, as the next
            batch leaves them.
        """
        ...


class Seek:
    """Begins at the batch itself."""

    def resume(
        self, reader: Reader, epoch: int, step: int, saved: State, handle_signals: Callback
    ) -> State:
        example = reader.first_batch(epoch)
        data = reader.open_epoch(epoch, step)
        data.set_example(example)
        warn_if_another(epoch, saved.get("checksum"), data.checksum)
        return {}


class Continue:
    """Goes on with new batches: of data that the run itself makes, none can be read again."""

    def resume(
        self, reader: Reader, epoch: int, step: int, saved: State, handle_signals: Callback
    ) -> State:
        reader.adapter.set_live_state(saved.get("live"))
        data = reader.open_epoch(epoch, step)
        data.set_example(iterator_state.decode(saved["example"]))
        return {}


class Replay:
    """Begins at the start of the epoch and drops batches up to the step."""

    def resume(
        self, reader: Reader, epoch: int, step: int, saved: State, handle_signals: Callback
    ) -> State:
        data = reader.open_epoch(epoch)
        if (example := data.peek()) is not None:
            data.set_example(example)
        warn_if_another(epoch, saved.get("checksum"), data.checksum)
        # What the first batch moved, the order of the epoch may have been drawn from.
        drawn = _skip_to(data, step, random_state(), handle_signals)
        if saved.get("checksum") == data.checksum:  # else it was said already
            _warn_if_changed(epoch, step, saved.get("seen"), data.seen(step))
        return drawn


class RestoreIterator:
    """Begins where the state of an iterator was taken, if the state brings the next batch back.

    It may not: a state can leave out a buffer, or the generators of worker processes. Then the
    epoch is replayed.

    Args:
        snapshot: The state.

    Attributes:
        error: What the dataset raised when it was given the state, if it did.
    """

    def __init__(self, snapshot: IteratorSnapshot) -> None:
        self.snapshot = snapshot
        self.error: Exception | None = None

    def resume(
        self, reader: Reader, epoch: int, step: int, saved: State, handle_signals: Callback
    ) -> State:
        example = reader.first_batch(epoch)
        data = self._open_exactly(reader, epoch, example, saved)
        if data is None:
            if self._can_replay(reader, epoch, saved):
                logger.info(
                    "The state of the dataset's iterator does not bring back the batch that "
                    "followed it%s. The epoch is read again from its start instead.",
                    f": {self.error!r}" if self.error is not None else "",
                )
                reader.restore_generators(saved["epoch_start"])
                return Replay().resume(reader, epoch, step, saved, handle_signals)
            if self.error is not None:
                raise RefusedStateError(
                    f"The dataset does not take the state of its iterator ({self.error!r})."
                ) from self.error
            logger.warning(
                "The order of the data does not repeat: the state of the dataset's iterator does "
                "not bring back the batch that followed it, in epoch %d after %d batches. Training "
                "continues, but not as it would have: some examples may come more often than "
                "others. Does the state include all buffers and random generators?",
                epoch + 1,
                self.snapshot.num_read,
            )
            data = self._open(reader, epoch, example, saved)
        return _skip_to(data, step, self.snapshot.generators["random"], handle_signals)

    def _open_exactly(self, reader: Reader, epoch: int, example: Any, saved: State) -> Epoch | None:
        """Opens the epoch at the snapshot; None if its next batch is not the one that followed."""
        try:
            data = self._open(reader, epoch, example, saved)
            return data if data.follows(self.snapshot) else None
        except Exception as error:  # whatever the dataset's library raises for a state it refuses
            self.error = error
            return None

    def _open(self, reader: Reader, epoch: int, example: Any, saved: State) -> Epoch:
        # A sampler without a state draws the order of the epoch again.
        reader.restore_generators(saved["epoch_start"])
        data = reader.open_epoch(epoch, self.snapshot.num_read, self.snapshot)
        data.set_example(example)
        # A new process may not know how the epoch began, and may find another first batch.
        data.checksum = saved["checksum"]
        # Only now: to make an iterator may draw random numbers.
        reader.restore_generators(self.snapshot.generators)
        return data

    def _can_replay(self, reader: Reader, epoch: int, saved: State) -> bool:
        """Returns whether the epoch begins as it did before."""
        reader.restore_generators(saved["epoch_start"])
        data = reader.open_epoch(epoch)
        data.set_example(data.peek())
        return bool(data.checksum == saved["checksum"])


def _skip_to(data: Epoch, step: int, before: State, handle_signals: Callback) -> State:
    """Drops batches up to a step, and returns the states of the generators that differ then."""
    data.skip_to(step, handle_signals)
    data.peek()
    return {k: v for k, v in random_state().items() if not same(v, before[k])}


def _warn_if_changed(epoch: int, step: int, saved: Any, now: int | None) -> None:
    """Warns if batches behind the first one of an epoch are not what they were."""
    if now is not None and saved not in (None, now):
        logger.warning(
            "The data are not what they were before the interruption: the first batch of epoch %d "
            "is the same, and others of its first %d batches are not. Training continues with "
            "what the dataset yields now. Has a file or a label changed, or do batches depend on "
            "a generator that is not restored?",
            epoch + 1,
            step,
        )


def check_same_dataset(saved: State, now: State) -> None:
    """Raises an AnotherRunError that names what differs, if the dataset is another one."""
    differing = [
        f"{name}: it was {value!r}, and is {now[name]!r}"
        for name, value in saved.items()
        if name in now and now[name] != value
    ]
    if differing:
        raise AnotherRunError("The dataset is another one. " + "; ".join(differing) + ".")


def check_same_leaves(saved: object, now: object) -> None:
    """Raises an AnotherRunError if the arrays of a batch have other dtypes or numbers of axes."""
    if now is not None and saved not in (None, now):
        raise AnotherRunError(
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
