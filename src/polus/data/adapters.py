"""Adapters: each kind of dataset, read epoch by epoch through one interface."""

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from polus.backends import backend
from polus.data.arrays import ArrayDataset
from polus.data.base_adapter import DataAdapter, SeekableAdapter, StatefulAdapter
from polus.data.batches import COMPOSITES, arrays_of, check_numbers, map_arrays
from polus.data.fingerprint import checksum, leaves_of, same
from polus.data.live_data import LiveAdapter, LiveData
from polus.state import random_state

MAX_CHECKED_BYTES = 2**26
_END = object()


class ArraysAdapter(SeekableAdapter):
    """What `from_arrays` returns."""

    _facts: dict[str, Any] | None = None

    def check_untransformed(self) -> None:
        check_numbers(self.dataset.arrays)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        return map(self.dataset.batch, self.dataset.rows(epoch, skip))

    def facts(self) -> dict[str, Any]:
        if self._facts is None:
            data = self.dataset
            names = ("num_examples", "batch_size", "shuffle", "seed", "drop_remainder")
            # Large arrays are checksummed on a sample of rows; reading all would take seconds.
            nbytes = sum(array.nbytes for array in arrays_of(data.arrays))
            rows = slice(None, None, 1 + nbytes // MAX_CHECKED_BYTES)
            sample = map_arrays(lambda array: array[rows], data.arrays)
            self._facts = {name: getattr(data, name) for name in names}
            self._facts["arrays"] = leaves_of(data.arrays)
            self._facts["checksum of the arrays"] = checksum(sample)
        return self._facts


class HuggingFaceAdapter(DataAdapter):
    """A `datasets.IterableDataset`, alone or in a PyTorch loader.

    Its `state_dict` leaves out the buffer of a shuffle, so it is not used.
    """

    def _iterate(self) -> Iterator[Any]:
        # A loader makes batches of examples.
        return self._checked() if _is_streamed(self.dataset) else iter(self.dataset)

    def _checked(self) -> Iterator[Any]:
        for batch in self.dataset:
            if isinstance(batch, dict) and any(map(np.isscalar, batch.values())):
                raise TypeError(
                    "A datasets.IterableDataset yields single examples, not batches. Write "
                    "dataset.batch(32).with_format('numpy')."
                )
            yield batch


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

    def check_untransformed(self) -> None:
        for path, spec in keras.tree.flatten_with_path(self.dataset.element_spec):
            name = type(spec).__name__.removesuffix("Spec")
            if name in COMPOSITES:
                kind, conversion = COMPOSITES[name]
                part = "".join(f"[{key!r}]" for key in path) or "itself"
                raise TypeError(
                    f"Part {part} of the batches is {kind}, and steps take dense tensors. Convert "
                    f"it where the dataset is made: dataset.map(...) with {conversion.format('x')}."
                )

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        dataset = self.dataset.skip(skip) if skip else self.dataset
        iterator = self._iterator = backend.iterate(dataset)
        return iterator

    def close(self) -> None:
        """Drops the iterator in a thread: TensorFlow waits for its own, up to half a second."""
        held = [self._iterator]
        super().close()
        if held[0] is not None:
            threading.Thread(target=held.clear, name="polus-drop").start()

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
        batches = self.dataset()
        if not hasattr(batches, "__iter__"):
            name = getattr(self.dataset, "__name__", type(self.dataset).__name__)
            raise TypeError(
                f"A function that is passed as the dataset must return batches, got {batches!r} "
                f"from {name}. Write a generator function (yield x, y), or return an iterable."
            )
        return iter(batches)


class IteratorAdapter(DataAdapter):
    """A bare iterator: what was read is gone, and an epoch continues where the last one stopped."""

    state_depends_on_reads = True
    _rewound = 0
    _first_epoch: int | None = None

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        if self._first_epoch is None:
            self._first_epoch = epoch - self._rewound
        epoch -= self._first_epoch  # earlier calls of `train` had iterators of their own
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
        self._rewound = epoch
        if steps is not None:
            next(itertools.islice(self.dataset, epoch * steps, epoch * steps), None)

    def can_reread(self, steps: int | None) -> bool:
        return steps is not None


def _has(dataset: Any, operation: str) -> bool:
    """Returns whether a `tf.data` pipeline contains an operation."""
    # Not public, but the only way to ask: `element_spec` and `cardinality` don't tell.
    inputs = dataset._inputs()
    return type(dataset).__name__ == operation or any(_has(i, operation) for i in inputs)


def as_adapter(dataset: object) -> DataAdapter:
    """Returns the adapter for a dataset.

    Args:
        dataset: A `tf.data.Dataset`, what `from_arrays` or `live` returns, a
            `keras.utils.PyDataset`, any re-iterable of batches (a list, a PyTorch `DataLoader`), a
            generator function, or a bare iterator, which lasts for one pass.

    Raises:
        TypeError: If it is anything else, bare arrays included: their rows are not batches.
    """
    if isinstance(dataset, DataAdapter):
        return dataset
    if isinstance(dataset, ArrayDataset):
        return ArraysAdapter(dataset)
    if isinstance(dataset, LiveData):
        return LiveAdapter(dataset)
    _check_has_batches(dataset)
    if hasattr(dataset, "as_numpy_iterator") and hasattr(dataset, "element_spec"):
        return TensorFlowAdapter(dataset)
    if isinstance(dataset, keras.utils.PyDataset):
        return PyDatasetAdapter(dataset)
    if any(map(_is_streamed, (dataset, getattr(dataset, "dataset", None)))):
        return HuggingFaceAdapter(dataset)
    if callable(dataset) and not hasattr(dataset, "__iter__"):
        return FunctionAdapter(dataset)
    if hasattr(dataset, "__next__"):
        return IteratorAdapter(dataset)
    return StatefulAdapter(dataset) if hasattr(dataset, "load_state_dict") else DataAdapter(dataset)


def _check_has_batches(dataset: Any) -> None:
    """Raises a TypeError for what yields no batches."""
    name = type(dataset).__name__
    if _library_of(dataset) == "datasets" and name == "DatasetDict":
        raise TypeError(
            f"A DatasetDict holds several datasets: pass batches of one of {list(dataset)}, for "
            "example lambda: data['train'].with_format('numpy').iter(batch_size=32)."
        )
    if name in ("DistributedDataset", "DistributedDatasetsFromFunction"):
        raise TypeError(
            f"A {name} has batches that are split over replicas already, and Polus splits them "
            "itself. Pass the tf.data.Dataset of whole batches that it was made of."
        )
    if isinstance(dataset, type):
        raise TypeError(
            f"A dataset must yield batches, got the class {dataset.__name__}. Pass an instance: "
            f"{dataset.__name__}(...)."
        )
    if hasattr(dataset, "column_names") and hasattr(dataset, "iter") and not _is_streamed(dataset):
        raise TypeError(
            f"A {_library_of(dataset)}.{name} yields single examples, not batches. Pass a function "
            "that yields batches: lambda: data.with_format('numpy').iter(batch_size=32). A batch "
            "is then a dict of arrays by column."
        )
    parts = dataset if isinstance(dataset, tuple) else (dataset,)
    is_array = any(hasattr(part, "__array__") or hasattr(part, "toarray") for part in parts)
    iterable = callable(dataset) or hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
    if is_array or isinstance(dataset, str | bytes | dict) or not iterable:
        raise TypeError(
            f"A dataset must yield batches, got a {name}. For arrays in memory write "
            "polus.data.from_arrays((x, y), batch_size=32), with x.toarray() if x is sparse. A "
            "tf.data.Dataset, a keras.utils.PyDataset, a DataLoader, a list of batches and a "
            "generator function work too."
        )


def _library_of(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _is_streamed(dataset: Any) -> bool:
    """Returns whether this is an `IterableDataset` of Hugging Face."""
    return _library_of(dataset) == "datasets" and type(dataset).__name__ == "IterableDataset"
