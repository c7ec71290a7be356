"""Adapters: each kind of dataset, read epoch by epoch through one interface."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from polus.backends import backend
from polus.data.arrays import ArrayDataset
from polus.data.fingerprint import checksum, leaves_of, same
from polus.data.resume import Replay, RestoreIterator, ResumeStrategy, Seek
from polus.state import random_state

MAX_CHECKED_BYTES = 2**26


class DataAdapter:
    """A re-iterable dataset as the loop reads it; subclasses adapt other kinds.

    Args:
        dataset: The user's dataset.

    Attributes:
        dataset: The user's dataset.
        num_batches: The number of batches per epoch; None if the dataset is endless or can't tell.
        endless: Whether an epoch has no end.
        state_depends_on_reads: Whether stopping an epoch early changes later epochs.
        unrepeatable: The reason why a new process can't bring the dataset back to where it was;
            empty if it can.
    """

    state_depends_on_reads = False
    unrepeatable = ""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.num_batches: int | None = _length(dataset)
        self.endless = False
        self._iterator: Any = None

    def facts(self) -> dict[str, Any]:
        """Returns what tells this dataset from others of its kind, as values that JSON can hold."""
        return {}

    # ------------------------------------------------------------------ reading

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """Returns the batches of an epoch from batch `skip` on."""
        return itertools.islice(self._begin(epoch), skip, None)

    def end_epoch(self) -> None:
        """Called when all batches of an epoch that the run asks for were read."""

    def close(self) -> None:
        """Drops the iterator of the epoch."""
        self._iterator = None

    def _begin(self, epoch: int) -> Any:
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

    def resume_strategy(self, saved: tuple[int, Any] | None, transformed: bool) -> ResumeStrategy:
        """Returns the way in which a new process continues an epoch.

        Args:
            saved: The number of batches that were read and `iterator_state()` behind them; None if
                there is no state.
            transformed: Whether batches pass through a function of the user's, which may draw
                random numbers.
        """
        return Replay() if saved is None else RestoreIterator(*saved)

    def iterator_state(self) -> Any:
        """Returns the state of the iterator behind its last batch; None if it has none."""
        return self._iterator.get_state() if hasattr(self._iterator, "set_state") else None

    def restored_batches(self, epoch: int, iterator_state: Any) -> Iterator[Any]:
        """Returns the batches of an epoch that follow where `iterator_state()` was taken."""
        iterator = self._begin(epoch)
        iterator.set_state(iterator_state)
        return iter(iterator)

    def epoch_end_state(self) -> Any:
        """Returns the state of the dataset between two epochs; None if it has none."""
        return None

    def restore_epoch_end(self, epoch: int, state: Any) -> None:
        """Restores `epoch_end_state()`, taken before `epoch`."""
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

    def get_state(self) -> dict[str, Any]:
        """Returns the states of the dataset's own generators as NumPy arrays."""
        return {name: g.get_state().numpy().copy() for name, g in self._generators().items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores `get_state()`."""
        for name, generator in self._generators().items():
            # PyTorch's generators take a tensor, and this package does not import PyTorch.
            generator.set_state(generator.get_state().new_tensor(state[name]))

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

    _pending: Any = None  # a state to begin the next epoch with

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        state, self._pending = self._pending, None
        return (
            super().batches(epoch, skip) if state is None else self.restored_batches(epoch, state)
        )

    def resume_strategy(self, saved: tuple[int, Any] | None, transformed: bool) -> ResumeStrategy:
        # A new process may not know how the epoch began: it may find another first batch.
        return Replay() if saved is None else RestoreIterator(*saved, checks_first_batch=False)

    def iterator_state(self) -> Any:
        return self.dataset.state_dict()

    def restored_batches(self, epoch: int, iterator_state: Any) -> Iterator[Any]:
        self._set_epoch(epoch)
        self.dataset.load_state_dict(iterator_state)
        return self._iterate()

    def epoch_end_state(self) -> Any:
        return self.dataset.state_dict()

    def restore_epoch_end(self, epoch: int, state: Any) -> None:
        # Given the state at an epoch's end, most loaders end that epoch once more: no batch comes.
        # Others begin the next epoch right away, and then they are to do so when it is read.
        if next(self.restored_batches(epoch, state), None) is not None:
            self._pending = state


class SeekableAdapter(DataAdapter):
    """A dataset whose epochs are a function of their number, and skip batches without reading."""

    def resume_strategy(self, saved: tuple[int, Any] | None, transformed: bool) -> ResumeStrategy:
        return Replay() if transformed else Seek()


class ArraysAdapter(SeekableAdapter):
    """What `from_arrays` returns."""

    _facts: dict[str, Any] | None = None

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        return map(self.dataset.batch, self.dataset.rows(epoch, skip))

    def facts(self) -> dict[str, Any]:
        if self._facts is None:
            data = self.dataset
            names = ("num_examples", "batch_size", "shuffle", "seed", "drop_remainder")
            # Large arrays are checksummed on a sample of rows; reading all would take seconds.
            nbytes = sum(leaf.nbytes for leaf in keras.tree.flatten(data.arrays))
            rows = slice(None, None, 1 + nbytes // MAX_CHECKED_BYTES)
            sample = keras.tree.map_structure(lambda array: array[rows], data.arrays)
            self._facts = {name: getattr(data, name) for name in names}
            self._facts["arrays"] = leaves_of(data.arrays)
            self._facts["checksum of the arrays"] = checksum(sample)
        return self._facts


class TensorFlowAdapter(DataAdapter):
    """A `tf.data.Dataset`, on any backend: tensors on TensorFlow, NumPy arrays elsewhere."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        cardinality = int(dataset.cardinality())
        self.endless = cardinality == -1  # tf.data.INFINITE_CARDINALITY
        self.num_batches = cardinality if cardinality >= 0 else None
        # Each iterator takes the next seeds of a shuffle. If the dataset repeats itself, it takes
        # more of them the further it is read.
        self.state_depends_on_reads = self.endless or _has(dataset, "_RepeatDataset")

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        dataset = self.dataset.skip(skip) if skip else self.dataset
        return backend.iterate(dataset)  # type: ignore[no-any-return]

    def rewind(self, epoch: int, steps: int | None) -> None:
        cut_short = steps not in (None, self.num_batches)
        if self.state_depends_on_reads and cut_short and _has(self.dataset, "_ShuffleDataset"):
            # TensorFlow also adds a prefetch at the end of a pipeline on its own.
            self.unrepeatable = (
                "this tf.data.Dataset repeats itself and is shuffled, and TensorFlow reads an "
                f"unknown number of batches ahead of the {steps} steps of an epoch. Leave out "
                "repeat: train iterates over the dataset once per epoch."
            )
        for _ in range(epoch):
            passed = self.dataset if steps is None else self.dataset.take(steps)
            for _ in passed if self.state_depends_on_reads else [iter(self.dataset)]:
                pass


class PyDatasetAdapter(DataAdapter):
    """A `keras.utils.PyDataset`. One thread reads it ahead; its own `workers` are not used."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self.num_batches = dataset.num_batches
        self.endless = self.num_batches is None
        self._is_open = False

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        self._open()
        count = self.dataset.num_batches
        for i in itertools.count(skip) if count is None else range(skip, count):
            yield self.dataset[i]

    def end_epoch(self) -> None:
        if self._is_open:
            self._end()

    def rewind(self, epoch: int, steps: int | None) -> None:
        for _ in range(epoch):
            self._open()
            self._end()

    def _open(self) -> None:
        self.end_epoch()  # of an epoch that was cut short
        self._is_open = True
        self.dataset.on_epoch_begin()

    def _end(self) -> None:
        self._is_open = False
        before = random_state()
        self.dataset.on_epoch_end()
        if not same(before, random_state()):
            self.unrepeatable = (
                f"{type(self.dataset).__name__}.on_epoch_end draws from a global random generator, "
                "whose state at the end of earlier epochs is not known any more. Let it draw from "
                "a generator of its own: self.generator = np.random.default_rng(seed) in __init__, "
                "and self.generator.shuffle(...) here."
            )


class FunctionAdapter(DataAdapter):
    """A generator function, called once per epoch."""

    def __init__(self, dataset: Callable[[], Any]) -> None:
        super().__init__(dataset)
        self.num_batches = None

    def _iterate(self) -> Iterator[Any]:
        return iter(self.dataset())


class IteratorAdapter(DataAdapter):
    """A bare iterator: what was read is gone, and an epoch continues where the last one stopped."""

    state_depends_on_reads = True

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        first = next(self.dataset, _END)
        if first is _END and epoch:
            raise ValueError(
                f"The dataset is a {type(self.dataset).__name__}, which can be read only once, "
                f"and it was exhausted before epoch {epoch + 1}. Pass the function that makes it "
                "(without calling it: train(batches, ...), not train(batches(), ...)), a list of "
                "batches, or polus.data.from_arrays(...)."
            )
        if first is not _END:
            yield first
            # Not `yield from`, which would close the user's iterator at the end of an epoch.
            for batch in self.dataset:  # noqa: UP028
                yield batch

    def rewind(self, epoch: int, steps: int | None) -> None:
        if steps is not None:
            next(itertools.islice(self.dataset, epoch * steps, epoch * steps), None)

    def can_reread(self, steps: int | None) -> bool:
        return steps is not None


_END = object()


def _has(dataset: Any, operation: str) -> bool:
    """Returns whether a `tf.data` pipeline contains an operation."""
    # Not public, but the only way to ask: `element_spec` and `cardinality` don't tell.
    inputs = dataset._inputs()
    return type(dataset).__name__ == operation or any(_has(i, operation) for i in inputs)


def as_adapter(dataset: Any) -> DataAdapter:
    """Returns the adapter for a dataset.

    Args:
        dataset: A `tf.data.Dataset`, what `from_arrays` returns, a `keras.utils.PyDataset`, any
            re-iterable of batches (a list, a PyTorch `DataLoader`), a generator function, or a bare
            iterator, which lasts for one pass.

    Raises:
        TypeError: If it is anything else, bare arrays included: their rows are not batches.
    """
    if isinstance(dataset, DataAdapter):
        return dataset
    if isinstance(dataset, ArrayDataset):
        return ArraysAdapter(dataset)
    if hasattr(dataset, "as_numpy_iterator") and hasattr(dataset, "element_spec"):
        return TensorFlowAdapter(dataset)
    if isinstance(dataset, keras.utils.PyDataset):
        return PyDatasetAdapter(dataset)
    bare = isinstance(dataset, np.ndarray | str | bytes | dict) or hasattr(dataset, "__array__")
    if isinstance(dataset, tuple) and any(hasattr(item, "__array__") for item in dataset):
        bare = True
    if not bare and callable(dataset) and not hasattr(dataset, "__iter__"):
        return FunctionAdapter(dataset)
    if not bare and hasattr(dataset, "__next__"):
        return IteratorAdapter(dataset)
    if not bare and hasattr(dataset, "load_state_dict"):
        return StatefulAdapter(dataset)
    if not bare and (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        return DataAdapter(dataset)
    raise TypeError(
        f"A dataset must yield batches, got a {type(dataset).__name__}. For arrays in memory write "
        "polus.data.from_arrays((x, y), batch_size=32). A tf.data.Dataset, a "
        "keras.utils.PyDataset, a DataLoader, a list of batches and a generator function work too."
    )


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:  # no __len__, or one that does not know
        return None
