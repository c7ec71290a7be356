"""How batches reach the compiled step: in blocks of equal shape, read ahead by one thread."""

import collections
import contextlib
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import keras
import numpy as np

from polus.backends import backend
from polus.data import resume
from polus.data.adapters import DataAdapter, as_arguments
from polus.data.fingerprint import checksum, leaves_of

Due = Callable[[int], int | None]

# Slow data comes in shorter blocks: progress still moves, and Ctrl-C still works.
GROUP_SECS = 0.1


@dataclasses.dataclass(frozen=True)
class StepBlock:
    """Batches of equal shape for one dispatch.

    Attributes:
        count: how many batches. batch_size: the examples of each (1 where there is no such axis).
            One batch where `capacity` is above 1 is the rest of a longer group.
        fetch: takes the batches out of the payload inside the compiled step, stacked along a new
            first axis; None where the payload is one batch itself.
        payload: what goes to the device.
        capacity: how many batches the payload has room for.
        signature: shapes and dtypes of a batch.
    """

    count: int
    batch_size: int
    fetch: Callable[[Any], Any] | None
    payload: Any
    capacity: int
    signature: Any


def stacked(payload: Any) -> Any:
    """Batches that are stacked already."""
    return payload


def gathered(payload: tuple[Any, Any]) -> Any:
    """Batches of examples that live on the device; the payload is (examples, row numbers).

    All at once: a gather inside of the loop over steps makes XLA's loop up to twice as slow.
    """
    examples, rows = payload
    return keras.tree.map_structure(lambda a: backend.take(a, rows), examples)


class DataReader:
    """Reads a dataset epoch by epoch.

    Args:
        source: the dataset.
        transform: a Python function applied to each batch, or None.
        steps: batches per epoch at most, or None.

    Attributes:
        waited_secs: how long the loop has waited for data so far.
        num_batches: batches of an epoch, None where it isn't known.
        tracked: whether epochs remember what the way back to a position needs (a checkpoint does).
        current: the epoch that was begun last.
        lock: held while a batch is made, which may draw from the global random generators.
    """

    def __init__(
        self,
        source: DataAdapter,
        transform: Callable[[Any], Any] | None = None,
        steps: int | None = None,
    ) -> None:
        self.adapter = source
        self.transform = transform
        self.steps = steps
        self.waited_secs = 0.0
        self.tracked = False
        self.current: EpochReader | None = None
        self.lock = threading.RLock()  # a dataset of the user's may call evaluate
        self._resumed: EpochReader | None = None
        known = source.num_batches
        self.num_batches = known if steps is None else steps if known is None else min(steps, known)
        dataset = source.dataset
        self._examples = None
        if getattr(dataset, "on_device", False) and transform is None:
            self._examples = keras.tree.map_structure(backend.to_device, dataset.arrays)

    def epoch(self, epoch: int, start: int = 0) -> "EpochReader":
        """The batches of an epoch from batch `start` on."""
        resumed, self._resumed = self._resumed, None
        self.current = resumed or EpochReader(self, epoch, start)
        return self.current

    def resumed(self, epoch: int, start: int, begun: dict[str, Any]) -> "EpochReader":
        """The epoch that the next call of `epoch` gives, which began as `begun` says."""
        self._resumed = self.current = EpochReader(self, epoch, start, begun)
        return self._resumed


class EpochReader:
    """One pass over the data, from batch `start` on. Close it when done.

    Attributes:
        begun, checksum, leaves, marks: see `polus.data.resume`; kept where the reader is tracked.
    """

    def __init__(
        self, reader: DataReader, epoch: int, start: int, begun: dict[str, Any] | None = None
    ) -> None:
        self.reader = reader
        self.number = epoch
        self.start = start
        self.begun = begun or (resume.beginning(reader) if reader.tracked else None)
        self.checksum: int | None = None
        self.leaves: list[list[Any]] | None = None
        self.marks: collections.deque[tuple[int, Any]] = collections.deque(maxlen=8)
        self._head: Any = None
        self.raw_batches = reader.adapter.batches(epoch, start)
        self.batches = self._transformed()
        self._first: list[Any] = []

    def _transformed(self) -> Iterator[tuple[Any, ...]]:
        # In a generator a StopIteration of the transform is an error, and no end of the data.
        transform = self.reader.transform
        for batch in self.raw_batches:
            yield as_arguments(batch if transform is None else transform(batch))

    def _read(self) -> list[Any]:
        """The next batch; empty at the end."""
        with self.reader.lock:
            return list(itertools.islice(self.batches, 1))

    def peek(self) -> Any:
        """The first batch, which stays in its place.

        Raises:
            ValueError: if there is none.
        """
        if not self._first:
            ended = self.reader.steps is not None and self.start >= self.reader.steps
            began = time.perf_counter()
            self._first = [] if ended else self._read()
            self.reader.waited_secs += time.perf_counter() - began
        if not self._first and self.start == 0:
            raise ValueError(
                f"The dataset gave no batch in epoch {self.number + 1}: it is empty, or an "
                "iterator that was exhausted before. Check what it yields; give a re-iterable, not "
                "an iterator."
            )
        if self.reader.tracked and self.checksum is None and self.start == 0:
            self._note(self._first[0])
        return self._first[0] if self._first else None

    def drop(self) -> Any:
        """Reads the next batch and goes on behind it; None if there is none."""
        batch = self.peek()
        if self._first:
            self.start += 1
            self._first = []
        return batch

    def remember(self, batch: Any) -> None:
        """Takes this for the first batch of the epoch: one that starts later doesn't meet it."""
        self._head = as_arguments(batch)
        self._note(self._head)

    def _note(self, batch: Any) -> None:
        self.checksum, self.leaves = checksum(batch), leaves_of(batch)

    @property
    def example(self) -> tuple[Any, ...]:
        """The step's arguments out of the first batch, where that lies: to look at, not to run."""
        # A resumed epoch is compiled for what it was compiled for in the first place.
        first = self.peek() if self._head is None else self._head
        arguments: tuple[Any, ...] = keras.tree.map_structure(_plain, first)
        return arguments

    def sample(self, count: int) -> StepBlock:
        """The first batch, `count` times over, to measure with."""
        first = self.example
        if self.reader._examples is not None:
            rows = np.zeros((count, self.reader.adapter.dataset.batch_size), np.int32)
            payload = (self.reader._examples, backend.to_device(rows))
            return StepBlock(count, rows.shape[1], gathered, payload, count, rows.shape[1:])
        if count == 1:
            return _single(first)
        payload = backend.stack([first] * count, count)
        return StepBlock(count, _size(first), stacked, payload, count, signature_of(first))

    def blocks(
        self,
        capacity: int = 1,
        due: Due = lambda step: None,
        poll: Callable[[], None] = lambda: None,
    ) -> Generator[StepBlock]:
        """The batches in blocks of up to `capacity`, none longer than `due(step)` allows.

        Args:
            capacity: batches per block at most.
            due: tells how many steps may run from a step on, None for no limit.
            poll: called several times a second while data is waited for; may raise.
        """

        def want(step: int) -> int:
            left = (
                capacity if self.reader.steps is None else min(capacity, self.reader.steps - step)
            )
            allowed = due(step)
            return left if allowed is None else min(left, allowed)

        with self._letting_go(), contextlib.closing(self._made(want, capacity, poll)) as blocks:
            while True:
                began = time.perf_counter()
                block = next(blocks, None)
                self.reader.waited_secs += time.perf_counter() - began
                if block is None:
                    break
                yield block
        self.reader.adapter.end_epoch()

    @contextlib.contextmanager
    def _letting_go(self) -> Iterator[None]:
        """At its end the user's generator is closed, unless somebody else holds it."""
        try:
            yield
        finally:
            self.raw_batches = self.batches = iter(())
            self.reader.adapter._iterator = None

    def _made(
        self, want: Callable[[int], int], capacity: int, poll: Callable[[], None]
    ) -> Generator[StepBlock]:
        if self.reader._examples is not None:
            return self._gathered(want, capacity)
        graph = backend.graph_blocks(self.raw_batches) if self.reader.transform is None else None
        if graph is not None:
            return self._in_graph(graph, want, capacity, poll)
        stopped = threading.Event()
        return _ahead(self._stacked(want, capacity, stopped), poll, stopped)

    def _gathered(self, want: Callable[[int], int], capacity: int) -> Generator[StepBlock]:
        dataset, step = self.reader.adapter.dataset, self.start
        order = dataset.order(self.number)
        size, end = dataset.batch_size, len(dataset)
        whole = dataset.num_examples // size
        while step < end and (count := want(step)) > 0:
            # Of the last, smaller batch a block of its own.
            count = min(count, whole - step) if step < whole else 1
            rows = order[step * size : (step + count) * size]
            examples, width = self.reader._examples, min(size, len(rows))
            if count > 1:
                table = np.zeros((capacity, width), np.int32)
                table[:count] = rows.reshape(count, width)
            else:
                table = rows[None]
            payload = (examples, table)  # the call moves so little faster than we could
            yield StepBlock(count, width, gathered, payload, len(table), (width,))
            step += count

    # A batch runs in the program for one or in that for many by its place in the data, however slow
    # that is: the two may differ in the last bits. So what is `left` of a group that took too long
    # is still of that group, and no group is ended before it is known to have a second batch.

    def _in_graph(
        self, graph: Any, want: Callable[[int], int], capacity: int, poll: Callable[[], None]
    ) -> Generator[StepBlock]:
        step, left, signature = self.start, 0, None
        pending = self._first or self._read()
        while pending and (count := want(step)) > 0:
            first = pending.pop()
            if signature_of(first) != signature:
                left, signature = 0, signature_of(first)
            rest = left > 0
            left = min(left, count) if rest else count
            count, other = 1, None
            if left > 1 or rest:
                poll()
                count, rows, other = graph.read(first, left, GROUP_SECS)
            if count > 1 or rest:
                rows = backend.pad(rows, capacity)
                yield StepBlock(count, _size(first), stacked, rows, capacity, signature)
            else:
                yield _single(first)
            step, left = step + count, left - count
            if other is not None:
                pending = [other]
            elif want(step) > 0:
                pending = self._read()

    def _stacked(
        self, want: Callable[[int], int], capacity: int, stopped: threading.Event
    ) -> Generator[StepBlock]:
        def read() -> list[Any]:
            return [keras.tree.map_structure(_plain, batch) for batch in self._read()]

        step, left, signature = self.start, 0, None
        pending = [keras.tree.map_structure(_plain, batch) for batch in self._first]
        while (count := want(step)) > 0 and not stopped.is_set():
            self._mark(step + len(pending))
            group = pending or read()
            if not group:
                return
            if signature_of(group[0]) != signature:
                left, signature = 0, signature_of(group[0])
            rest = left > 0
            left = min(left, count) if rest else count
            pending, began = [], time.perf_counter()
            while len(group) < left and not stopped.is_set():
                if (rest or len(group) > 1) and time.perf_counter() - began > GROUP_SECS:
                    break
                following = read()
                if not following:
                    break
                if signature_of(following[0]) != signature:
                    pending = following
                    break
                group += following
            if len(group) > 1 or rest:
                payload = backend.stack(group, capacity)
                yield StepBlock(len(group), _size(group[0]), stacked, payload, capacity, signature)
            else:
                yield _single(group[0])
            step, left = step + len(group), left - len(group)

    def _mark(self, num_read: int) -> None:
        """Notes the state of the dataset's iterator, behind `num_read` batches of the epoch."""
        if self.reader.tracked and (state := self.reader.adapter.iterator_state()) is not None:
            self.marks.append((num_read, state))


def _single(batch: Any) -> StepBlock:
    payload = keras.tree.map_structure(backend.to_device, batch)
    return StepBlock(1, _size(batch), None, payload, 1, signature_of(batch))


def _plain(leaf: Any) -> Any:
    """A tensor of the backend as it is, else a NumPy array; float64 becomes Keras' float."""
    if keras.ops.is_tensor(leaf):
        return leaf
    array = np.asarray(leaf)
    return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array


def signature_of(batch: Any) -> list[Any]:
    """The shapes and dtypes of a batch; of what has none, the value itself."""
    return [
        (tuple(shape), str(leaf.dtype))
        if (shape := getattr(leaf, "shape", None)) is not None
        else leaf
        for leaf in keras.tree.flatten(batch)
    ]


def _size(batch: Any) -> int:
    """The number of examples: the length of the first axis of the first array, else 1."""
    for leaf in keras.tree.flatten(batch):
        shape: tuple[int, ...] = getattr(leaf, "shape", ())
        return int(shape[0]) if len(shape) else 1
    return 1


def _ahead(
    blocks: Generator[StepBlock], poll: Callable[[], None], stopped: threading.Event, depth: int = 2
) -> Generator[StepBlock]:
    """`blocks`, made by a thread that is `depth` ahead at most and ends with this generator.

    It sets `stopped` then, so that `blocks` reads no further either.
    """
    made: queue.Queue[Any] = queue.Queue(maxsize=depth)

    def put(item: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            with contextlib.closing(blocks):
                for block in blocks:
                    put(block)
                    if stopped.is_set():
                        return
            put(None)
        except BaseException as exception:  # raised again where the block is asked for
            put(exception)

    thread = threading.Thread(target=work, name="polus-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            poll()
            try:
                item = made.get(timeout=0.1)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=10)  # a dataset that hangs must not hang the end of the run
