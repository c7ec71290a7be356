"""Reads one epoch of a dataset in blocks."""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from polus.backends import backend
from polus.backends.base import as_arguments
from polus.data.arrays import ArrayDataset
from polus.data.base_adapter import DataAdapter
from polus.data.batches import plain_arrays
from polus.data.blocks import (
    DeviceExamples,
    GraphSource,
    Grouping,
    HostSource,
    StepBlock,
    StepPace,
    check_not_empty,
    repeated_block,
)
from polus.data.fingerprint import RunningChecksum, checksum, leaves_of
from polus.data.prefetch import PREFETCH, prefetch
from polus.data.resume import (
    IteratorSnapshot,
    IteratorSnapshots,
)
from polus.errors import AnotherRunError
from polus.state import random_state, set_random_state

logger = logging.getLogger("polus.data")

Due = Callable[[int], int | None]
Callback = Callable[[], None]
Transform = Callable[[Any], Any]
Check = Callable[[tuple[Any, ...], str], None]
State = dict[str, Any]

SECS_BETWEEN_LOGS = 5


def do_nothing() -> None:
    """Handles no signal."""


def accept_all(batch: tuple[Any, ...], where: str) -> None:
    """Checks nothing."""


class BatchReader:
    """Reads the batches of a dataset; what all its epochs have in common.

    Args:
        adapter: The dataset.
        transform: A Python function applied to each batch, or None.
        steps: The number of batches per epoch at most, or None.
        first_epoch: The number that the dataset knows epoch 0 by: how many epochs of it were
            trained before. `set_state` restores it.
        check: Called with the step's arguments from a batch in host memory, and with the words for
            where it is; may raise. Batches that only the device sees are not checked.
        prefetch: How many blocks of batches a thread reads ahead; 0 for no thread.

    Attributes:
        adapter: The dataset.
        transform: The function applied to each batch, or None.
        steps: The number of batches per epoch at most, or None.
        first_epoch: The number that the dataset knows epoch 0 by.
        num_batches: The number of batches per epoch, None if it is not known.
        waited_secs: How long the loop has waited for data so far.
        tracked: Whether epochs record what `get_state` needs; a checkpoint sets it.
        device_examples: The examples of `from_arrays` on the device, or None.
        placement: The devices of the batches.
    """

    def __init__(
        self,
        adapter: DataAdapter,
        transform: Transform | None = None,
        steps: int | None = None,
        first_epoch: int = 0,
        check: Check = accept_all,
        prefetch: int = PREFETCH,
    ) -> None:
        self.prefetch = prefetch
        self.adapter = adapter
        self.check = check
        self.transform = transform
        self.steps = steps
        self.first_epoch = first_epoch
        self.waited_secs = 0.0
        self.tracked = False
        known = adapter.num_batches
        self.num_batches = known if steps is None else steps if known is None else min(steps, known)
        if transform is None:
            adapter.check_untransformed()
        # Here, in the caller's thread: others don't know which engine is active.
        self.placement = backend.placement()
        self.device_examples: DeviceExamples | None = None
        dataset = adapter.dataset
        if isinstance(dataset, ArrayDataset) and dataset.on_device and transform is None:
            self.device_examples = DeviceExamples(dataset, self.placement)
        self._arrays_checked = False
        self._lock = threading.RLock()  # reentrant: the user's dataset may call evaluate
        self._length_warned = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Reads no batch for the length of the block.

        Evaluation restores the states of the global random generators, and the prefetch thread must
        not draw from them meanwhile.
        """
        with self._lock:
            yield

    def check_ends(self, caller: str) -> None:
        """Raises a ValueError if an epoch has no end.

        Args:
            caller: The function whose argument `steps` the message recommends.
        """
        if self.adapter.endless and self.steps is None:
            raise ValueError(
                f"The dataset is endless. Say how many batches to read: {caller}(..., steps=1000)."
            )

    def check_length(self, count: int) -> None:
        """Warns once if an epoch has another number of batches than the dataset told."""
        told = self.adapter.num_batches
        if self.steps is None and told not in (None, count) and not self._length_warned:
            self._length_warned = True
            logger.warning(
                "len(dataset) is %d, and an epoch had %d batches. All of them were used, but "
                "progress and whatever else relies on the length are wrong. Correct the __len__ of "
                "%s.",
                told,
                count,
                type(self.adapter.dataset).__name__,
            )

    def check_arrays(self) -> None:
        """Checks all examples of `from_arrays` at once: the device gathers batches of them."""
        if not self._arrays_checked and self.device_examples is not None:
            self.check(as_arguments(self.device_examples.dataset.arrays), "The dataset")
            self._arrays_checked = True

    def arguments(self, batch: object) -> tuple[Any, ...]:
        """Returns the step's arguments from a batch of the dataset.

        Raises:
            TypeError: If there is no batch.
        """
        if batch is None:
            raise TypeError("The dataset yielded None as a batch. Yield arrays: (x, y).")
        if self.transform is not None and (batch := self.transform(batch)) is None:
            raise TypeError(
                "custom_data_transform_f returned None for a batch. It must return the batch that "
                "the step takes: return x, y."
            )
        return as_arguments(batch)

    def generators(self) -> State:
        """Returns the states of the generators that the order of an epoch depends on."""
        return {"random": random_state(), "adapter": self.adapter.get_state()}

    def restore_generators(self, generators: State) -> None:
        """Restores what `generators` returned."""
        self.adapter.set_state(generators["adapter"])
        set_random_state(generators["random"])


class EpochReader:
    """One pass over the data, from batch `start` on.

    Args:
        reader: The reader of the dataset.
        number: The number of the epoch.
        start: The number of batches that are skipped.
        snapshot: The state of the dataset's iterator behind them, which spares reading them; None
            to skip them.

    Attributes:
        number: The number of the epoch.
        start: The place of the next batch in the epoch.
        epoch_start: The states of the generators when the epoch began, if the reader is tracked.
        checksum: The checksum of the epoch's first batch, if the reader is tracked.
        leaves: The dtypes and numbers of axes of that batch, if the reader is tracked.
    """

    def __init__(
        self,
        reader: BatchReader,
        number: int,
        start: int,
        snapshot: IteratorSnapshot | None = None,
    ) -> None:
        self.number = number
        self.start = start
        self.epoch_start = reader.generators() if reader.tracked else None
        self.checksum: int | None = None
        self.leaves: list[list[Any]] | None = None
        # Of an epoch that is read from its first batch on.
        self._seen = RunningChecksum() if reader.tracked and not start else None
        self._reader = reader
        self._snapshots = IteratorSnapshots(snapshot)
        self._example: Any = None
        self._first: list[Any] = []
        self._read_in_graph = 0  # batches that did not pass through `_transformed`
        number += reader.first_epoch
        if snapshot is None:
            self._raw_batches = reader.adapter.batches(number, start)
        else:
            self._raw_batches = reader.adapter.restored_batches(number, snapshot.state)
        self._batches = self._transformed()

    def _transformed(self) -> Iterator[tuple[Any, ...]]:
        # In a generator, a StopIteration that the transform raises is an error, not the data's end.
        for step, batch in enumerate(self._raw_batches, self.start):
            self._snapshots.see(batch)
            arguments = self._reader.arguments(batch)
            self._see(arguments, self._read_in_graph + step)
            yield arguments

    def _see(self, arguments: Any, step: int) -> None:
        self._check(arguments, step)
        if self._seen is not None:
            self._seen.add(arguments)

    def _see_read(self, arguments: Any, step: int) -> None:
        self._read_in_graph += 1
        self._see(arguments, step)

    def seen(self, count: int) -> int | None:
        """Returns a checksum of the first `count` batches of the epoch; None if it is not known."""
        return None if self._seen is None else self._seen.after(count)

    def _check(self, batch: tuple[Any, ...], step: int) -> None:
        self._reader.check(batch, f"Batch {step + 1} of epoch {self.number + 1}")

    def _read(self) -> list[Any]:
        """Returns the next batch in a list, an empty list at the end."""
        with self._reader.paused():
            return list(itertools.islice(self._batches, 1))

    # ------------------------------------------------------------------ looking at a batch

    def peek(self) -> Any:
        """Returns the next batch and leaves it in its place; None at the end.

        Raises:
            ValueError: If the epoch has no batch at all.
        """
        reader = self._reader
        if not self._first:
            ended = reader.steps is not None and self.start >= reader.steps
            began = time.perf_counter()
            self._first = [] if ended else self._read()
            reader.waited_secs += time.perf_counter() - began
        if not self._first and self.start == 0:
            raise ValueError(
                f"The dataset yielded no batch in epoch {self.number + 1}: it is empty, or an "
                "iterator that was exhausted before, such as a generator that a validation has "
                "read. Check what it yields, and pass a re-iterable instead of an iterator: the "
                "function that makes a generator, not the generator."
            )
        if self._first:
            check_not_empty(self._first[0], self.start)
        if reader.tracked and self.checksum is None and self.start == 0:
            self._record(self._first[0])
        return self._first[0] if self._first else None

    def skip(self) -> Any:
        """Drops the next batch and returns it; None at the end."""
        batch = self.peek()
        if self._first:
            self.start += 1
            self._first = []
        return batch

    def skip_to(self, step: int, handle_signals: Callback) -> None:
        """Drops batches up to `step`, and calls `handle_signals` before each.

        Raises:
            AnotherRunError: If the epoch ends before.
        """
        count, logged = step - self.start, time.monotonic()
        for i in range(count):
            handle_signals()
            if time.monotonic() - logged > SECS_BETWEEN_LOGS:
                logged = time.monotonic()
                logger.info("Skipping the batches that the run has seen: %d of %d.", i, count)
            if self.skip() is None:
                raise AnotherRunError(
                    f"The dataset is another one: it ended after {self.start} batches of epoch "
                    f"{self.number + 1}, and the run had done {step} steps in it."
                )

    def set_example(self, batch: object) -> None:
        """Sets the first batch of the epoch, which an epoch that starts later does not read."""
        self._example = as_arguments(batch)
        self._record(self._example)

    def _record(self, batch: Any) -> None:
        self.checksum, self.leaves = checksum(batch), leaves_of(batch)

    @property
    def example(self) -> tuple[Any, ...]:
        """The step's arguments from the first batch of the epoch, to look at, not to train on."""
        # A resumed epoch is compiled for the same batch as the epoch that it continues.
        first = self.peek() if self._example is None else self._example
        arguments: tuple[Any, ...] = plain_arrays(first)
        return arguments

    def sample(self, count: int) -> StepBlock:
        """Returns a block of the example `count` times, to time a compiled step with."""
        example = self.example
        if self._reader.device_examples is not None:
            return self._reader.device_examples.sample(count)
        return repeated_block(example, count, self._reader.placement)

    # ------------------------------------------------------------------ reading

    def blocks(
        self,
        capacity: int = 1,
        due: Due = lambda step: None,
        handle_signals: Callback = do_nothing,
        pace: StepPace | None = None,
    ) -> Generator[StepBlock]:
        """Yields the batches in blocks. Close the generator when done.

        Args:
            capacity: The number of batches per block at most.
            due: Returns how many steps may run from a step on; None for no limit.
            handle_signals: Called several times a second while waiting for data; may raise.
            pace: How many batches of those the next block takes; by default all.
        """
        reader = self._reader
        with (
            self._released(),
            contextlib.closing(
                self._made(self._limit(capacity, due), capacity, handle_signals, pace)
            ) as blocks,
        ):
            count = self.start
            while True:
                began = time.perf_counter()
                block = next(blocks, None)
                reader.waited_secs += time.perf_counter() - began
                if block is None:
                    break
                count += block.count
                yield block
        reader.adapter.end_epoch()
        reader.check_length(count)

    def _limit(self, capacity: int, due: Due) -> Callable[[int], int]:
        steps = self._reader.steps

        def limit(step: int) -> int:
            left = capacity if steps is None else min(capacity, steps - step)
            allowed = due(step)
            return left if allowed is None else min(left, allowed)

        return limit

    @contextlib.contextmanager
    def _released(self) -> Iterator[None]:
        """Closes the user's generator at the end, unless somebody else holds it."""
        try:
            yield
        finally:
            self._raw_batches = self._batches = iter(())
            self._reader.adapter.close()

    def _made(
        self,
        limit: Callable[[int], int],
        capacity: int,
        handle_signals: Callback,
        pace: StepPace | None,
    ) -> Generator[StepBlock]:
        reader, start = self._reader, self.start
        if self._first:  # it was read before the model was built
            self._check(self._first[0], start)
        if reader.device_examples is not None:
            reader.check_arrays()
            number = reader.first_epoch + self.number
            return reader.device_examples.blocks(number, start, limit, capacity, pace)
        # Of several processes each takes its part, on the host, and none may follow its clock.
        in_graph = reader.transform is None and reader.placement.count == 1
        graph = backend.graph_blocks(self._raw_batches) if in_graph else None
        if graph is not None:
            batches = GraphSource(graph, self._read, self._first, handle_signals, self._see_read)
            return Grouping(batches, limit, capacity, reader.placement, pace).blocks(start)
        stopped = threading.Event()
        placement = reader.placement
        source = HostSource(self._read, self._first, self._take_snapshot, stopped, placement)
        blocks = Grouping(source, limit, capacity, placement, pace).blocks(start)
        if not reader.prefetch:
            return blocks
        settled = (lambda: True) if pace is None else (lambda: pace.known)
        return prefetch(blocks, handle_signals, stopped, reader.prefetch, settled)

    # ------------------------------------------------------------------ resuming

    def follows(self, snapshot: IteratorSnapshot) -> bool:
        """Returns whether the next batch is the one that followed the snapshot it was opened at."""
        self.peek()
        return self._snapshots.begin_as(snapshot)

    def _take_snapshot(self, num_read: int) -> None:
        """Records the state of the dataset's iterator behind `num_read` batches of the epoch."""
        reader = self._reader
        if not reader.tracked:
            return
        with reader.paused():  # an evaluation may be about to restore the generators
            if (state := reader.adapter.iterator_state()) is not None:
                self._snapshots.add(IteratorSnapshot(num_read, state, reader.generators()))

    def get_state(self, step: int) -> State:
        """Returns what a new process needs to continue this epoch before `step`."""
        snapshot = self._snapshots.before(step)
        return {
            "epoch_start": self.epoch_start,
            "checksum": self.checksum,
            "seen": self.seen(step),
            "iterator": None if snapshot is None else snapshot.to_tree(),
        }
