"""Blocks of batches of equal shape: what one call of a compiled step takes.

The batches of a block are gathered from arrays on the device, read inside TensorFlow's graph, or
stacked by the host.
"""

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from polus.backends import backend
from polus.backends.base import GraphBlocks, as_arguments
from polus.backends.placement import Placement
from polus.data.arrays import ArrayDataset
from polus.data.batches import (
    batch_size_of,
    map_arrays,
    plain_arrays,
    signature_of,
)

T = TypeVar("T")
StepLimit = Callable[[int], int]


class StepPace(Protocol):
    """How many steps the next call is to run, which changes no result; None for all that fit."""

    steps: int | None
    known: bool


def paced(left: int, is_rest: bool, pace: StepPace | None) -> int:
    """Returns how many of the `left` batches of a group the next block takes.

    At least two where a group begins, so that it is known to be one: see `Grouping`.
    """
    if pace is None or pace.steps is None:
        return left
    return min(left, max(pace.steps, 1 if is_rest else 2))


# A slow dataset comes in shorter blocks, so that progress still moves and Ctrl-C still works.
GROUP_SECS = 0.1


@dataclass(frozen=True)
class StepBlock:
    """Batches of equal shape for one call of a compiled step.

    Attributes:
        count: The number of batches.
        batch_size: The number of examples per batch, 1 if the batches have no such axis.
        unpack: Takes the batches out of the payload inside the compiled step, stacked along a new
            first axis. None if the payload is a single batch.
        payload: The arrays that go to the device.
        capacity: The number of batches that the payload has room for. A block of one batch with a
            capacity above 1 is the rest of a longer group.
        signature: The shapes and dtypes of a batch.
    """

    count: int
    batch_size: int
    unpack: Callable[[Any], Any] | None
    payload: Any
    capacity: int
    signature: Any

    def batch(self, i: int) -> tuple[Any, ...]:
        """Returns the step's arguments from one of the batches, to look at it."""
        if self.unpack is None:
            return as_arguments(self.payload)
        return as_arguments(map_arrays(lambda rows: rows[i], self.unpack(self.payload)))


def stacked(payload: T) -> T:
    """Unpacks batches that the host or TensorFlow's graph has stacked already."""
    return payload


def gather_batches(payload: tuple[Any, Any]) -> Any:
    """Gathers batches from examples on the device; the payload is (examples, row numbers).

    All batches are gathered at once: a gather inside the loop over the steps makes XLA's loop up to
    twice as slow.
    """
    examples, rows = payload
    return map_arrays(lambda a: backend.take(a, rows), examples)


def stack(batches: list[Any], capacity: int, placement: Placement) -> Any:
    """Returns batches of equal shape along a new first axis, with room for `capacity` of them."""
    size = batch_size_of(batches[0])

    def join(*rows: Any) -> Any:
        return placement.stack(rows, capacity, size, backend.stack)

    return map_arrays(join, *batches)


def single_block(batch: object, placement: Placement) -> StepBlock:
    """Returns a block of one batch, which runs in the program for a single step."""
    size = batch_size_of(batch)
    payload = map_arrays(lambda a: backend.to_device(placement.place(a, size)), batch)
    return StepBlock(1, size, None, payload, 1, signature_of(batch))


def repeated_block(batch: object, count: int, placement: Placement) -> StepBlock:
    """Returns a block of the same batch `count` times, to time a compiled step with."""
    if count == 1:
        return single_block(batch, placement)
    payload = stack([batch] * count, count, placement)
    return StepBlock(count, batch_size_of(batch), stacked, payload, count, signature_of(batch))


class DeviceExamples:
    """The examples of an `ArrayDataset` on the device, where the compiled step gathers batches.

    Where the device reads host memory, NumPy gathers them as fast, and there is less to compile.

    Args:
        dataset: The arrays and their order.
        placement: The devices. Each has all examples.
    """

    def __init__(self, dataset: ArrayDataset, placement: Placement) -> None:
        self.dataset = dataset
        self.placement = placement
        self.arrays = dataset.arrays
        if not placement.gathers_on_host:
            self.arrays = map_arrays(
                lambda a: backend.to_device(placement.place_examples(a), shared=True),
                dataset.arrays,
            )

    def blocks(
        self,
        epoch: int,
        start: int,
        limit: StepLimit,
        capacity: int,
        pace: StepPace | None = None,
    ) -> Generator[StepBlock]:
        """Yields the batches of an epoch from batch `start` on."""
        step, size, end = start, self.dataset.batch_size, len(self.dataset)
        order = self.dataset.order(epoch)
        whole = self.dataset.num_examples // size
        left = 0
        while step < end and (allowed := limit(step)) > 0:
            # The last batch, if it is smaller, is a block of its own.
            is_rest = left > 0 and step < whole
            left = min(left if is_rest else allowed, allowed, whole - step) if step < whole else 1
            count = paced(left, is_rest, pace)
            left -= count
            rows = order[step * size : (step + count) * size]
            width = min(size, len(rows))
            yield self._block(rows.reshape(count, width), capacity if count > 1 or is_rest else 1)
            step += count

    def sample(self, count: int) -> StepBlock:
        """Returns a block of the first example only, `count` batches of it, to time a step with."""
        return self._block(np.zeros((count, self.dataset.batch_size), np.int32), count)

    def _block(self, rows: np.ndarray[Any, Any], capacity: int) -> StepBlock:
        """Returns a block of the batches of some row numbers, (batches, batch size)."""
        count, width = rows.shape
        if self.placement.gathers_on_host:
            payload = map_arrays(lambda a: _padded(a[rows], capacity), self.arrays)
            return StepBlock(count, width, stacked, payload, capacity, (width,))
        # Left in host memory: the compiled call moves so little faster than we could.
        table = self.placement.place_rows(_padded(rows.astype(np.int32), capacity))
        return StepBlock(count, width, gather_batches, (self.arrays, table), capacity, (width,))


def _padded(rows: np.ndarray[Any, Any], capacity: int) -> np.ndarray[Any, Any]:
    """Returns an array with zeros after its rows, up to `capacity` of them."""
    if len(rows) == capacity:
        return rows
    padded = np.zeros((capacity, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded


def check_not_empty(batch: object, step: int) -> None:
    """Raises a ValueError if a batch has no examples."""
    if batch_size_of(batch) == 0:
        raise ValueError(
            f"Batch {step + 1} of the epoch has no examples: the first axis of its first array has "
            "length 0, so its loss would be NaN. Skip empty batches in the dataset."
        )


class BatchSource(Protocol):
    """Batches to be grouped, one after the other."""

    def next_batch(self, step: int) -> list[Any]:
        """Returns the batch of `step` in a list, an empty list at the end."""
        ...

    def read_group(self, first: object, size: int, is_rest: bool) -> tuple[int, Any]:
        """Reads up to `size` batches of equal shape; fewer if the data is slow.

        Args:
            first: The first batch of the group.
            size: The number of batches at most.
            is_rest: Whether the beginning of this group was yielded before. If not, a slow group
                is not ended before it has a second batch.

        Returns:
            The number of batches, and the batches in the form that `stack` takes.
        """
        ...

    def stack(self, group: object, capacity: int) -> Any:
        """Returns the payload of a block: the batches along a new first axis."""
        ...


class Grouping:
    """Groups consecutive batches of equal shape into blocks.

    A batch runs in the program for one step or in the one for many steps by its place in the data,
    however slow the data is: the two programs may differ in the last bits. So what is left of a
    group that took too long, or that the pace has divided, still belongs to that group, and no
    group is ended before it is known to have a second batch.

    Args:
        source: The batches.
        limit: Returns how many batches a block may have that begins at a step; 0 ends the epoch.
        capacity: The number of batches per block at most.
        placement: The devices of the batches.
        pace: How many of a group's batches the next block takes.
    """

    def __init__(
        self,
        source: BatchSource,
        limit: StepLimit,
        capacity: int,
        placement: Placement,
        pace: StepPace | None = None,
    ) -> None:
        self.source = source
        self.limit = limit
        self.capacity = capacity
        self.pace = pace
        self.placement = placement

    def blocks(self, start: int) -> Generator[StepBlock]:
        """Yields the batches in blocks, from step `start` on."""
        step, left, signature = start, 0, None
        while (allowed := self.limit(step)) > 0:
            batch = self.source.next_batch(step)
            if not batch:
                return
            first = batch.pop()
            check_not_empty(first, step)
            if signature_of(first) != signature:
                left, signature = 0, signature_of(first)
            is_rest = left > 0
            left = min(left, allowed) if is_rest else allowed
            block = self._block(first, paced(left, is_rest, self.pace), is_rest, signature)
            yield block
            step, left = step + block.count, left - block.count

    def _block(self, first: Any, size: int, is_rest: bool, signature: Any) -> StepBlock:
        if size > 1 or is_rest:
            count, group = self.source.read_group(first, size, is_rest)
            if count > 1 or is_rest:
                payload = self.source.stack(group, self.capacity)
                size = batch_size_of(first)
                return StepBlock(count, size, stacked, payload, self.capacity, signature)
        return single_block(first, self.placement)


class GraphSource:
    """Batches that TensorFlow's graph reads and stacks: no Python runs between two of them.

    Args:
        graph: What `backend.graph_blocks` returns for the dataset's iterator.
        read: Returns the next batch in a list, an empty list at the end.
        first: Batches that were read already.
        handle_signals: Called before each group; may raise.
        see: Called with each batch that the graph reads into host memory, and with its step.
    """

    def __init__(
        self,
        graph: GraphBlocks,
        read: Callable[[], list[Any]],
        first: list[Any],
        handle_signals: Callable[[], None],
        see: Callable[[Any, int], None],
    ) -> None:
        self._graph = graph
        self._read = read
        self._see = see
        self._step = 0
        self._pending = first
        self._handle_signals = handle_signals

    def next_batch(self, step: int) -> list[Any]:
        batch, self._pending = self._pending or self._read(), []
        self._step = step
        return batch

    def read_group(self, first: object, size: int, is_rest: bool) -> tuple[int, Any]:
        self._handle_signals()
        count, rows, other = self._graph.read(first, size, GROUP_SECS)
        if (arrays := self._graph.on_host(rows)) is not None:
            for i in range(1, count):  # the first one was seen when it was read
                self._see(map_arrays(lambda array, i=i: array[i], arrays), self._step + i)
        if other is not None:
            self._see(other, self._step + count)
        self._pending = [] if other is None else [other]
        return count, rows

    def stack(self, group: object, capacity: int) -> Any:
        return self._graph.pad(group, capacity)


class HostSource:
    """Batches that the host stacks.

    Args:
        read: Returns the next batch in a list, an empty list at the end.
        first: Batches that were read already.
        before_batch: Called with the number of batches read so far, before a group is begun.
        stopped: Once it is set, no more batches are read.
        placement: The devices of the batches.
    """

    def __init__(
        self,
        read: Callable[[], list[Any]],
        first: list[Any],
        before_batch: Callable[[int], None],
        stopped: threading.Event,
        placement: Placement,
    ) -> None:
        self._placement = placement
        self._read = read
        self._pending = [plain_arrays(batch) for batch in first]
        self._before_batch = before_batch
        self._stopped = stopped

    def next_batch(self, step: int) -> list[Any]:
        if self._stopped.is_set():
            return []
        self._before_batch(step + len(self._pending))
        batch, self._pending = self._pending or self._read_plain(), []
        return batch

    def read_group(self, first: object, size: int, is_rest: bool) -> tuple[int, Any]:
        group, began = [first], time.perf_counter()
        # Several processes have to make the same blocks, whatever their clocks say.
        may_end = self._placement.count == 1
        while len(group) < size and not self._stopped.is_set():
            has_two = is_rest or len(group) > 1
            if may_end and has_two and time.perf_counter() - began > GROUP_SECS:
                break
            following = self._read_plain()
            if not following:
                break
            if signature_of(following[0]) != signature_of(first):
                self._pending = following
                break
            group += following
        return len(group), group

    def stack(self, group: Any, capacity: int) -> Any:
        return stack(group, capacity, self._placement)

    def _read_plain(self) -> list[Any]:
        return [plain_arrays(batch) for batch in self._read()]
