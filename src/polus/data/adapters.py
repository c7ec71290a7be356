"""What a dataset may be: everything that gives batches, read epoch by epoch in one way."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from polus.backends import backend
from polus.backends.base import as_arguments as as_arguments
from polus.data.arrays import ArrayDataset
from polus.data.fingerprint import checksum, leaves_of, same
from polus.state import random_state


class DataAdapter:
    """A dataset as the loop reads it.

    Attributes:
        dataset: what the user gave.
        num_batches: of one epoch; None where the dataset can't tell, or is endless.
        endless: whether an epoch never ends by itself.
        seekable: whether an epoch is a function of its number, and skipping reads nothing.
        has_state: whether it is the dataset itself, not its iterator, that has a state.
        reads_once: whether there is one pass, which later epochs go on with.
        read_through: whether what an epoch leaves behind depends on how far it was read.
        unrepeatable: why a new process can't bring the dataset to where it was, if it can't.
    """

    seekable = False
    reads_once = False
    read_through = False
    unrepeatable = ""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.num_batches: int | None = _length(dataset)
        self.endless = False
        self.has_state = hasattr(dataset, "load_state_dict")
        self._iterator: Any = None
        self._resume_from: Any = None

    def facts(self) -> dict[str, Any]:
        """What else tells this dataset from another of its kind, in values that JSON can write."""
        return {}

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """The batches of an epoch, from batch `skip` on."""
        for part in self._parts().values():
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        state, self._resume_from = self._resume_from, None
        if state is not None and self.has_state:
            self.dataset.load_state_dict(state)
        self._iterator = self._iterate()
        if state is not None and hasattr(self._iterator, "set_state"):
            self._iterator.set_state(state)
        return itertools.islice(self._iterator, skip if state is None else 0, None)

    def _iterate(self) -> Iterator[Any]:
        return iter(self.dataset)

    def rewind(self, epoch: int, steps: int | None) -> None:
        """Brings the dataset of a new process to where it was before `epoch`.

        Earlier epochs had `steps` batches, all of them where it is None. By default they left
        nothing behind but the state of generators.
        """

    def end_epoch(self) -> None:
        """Called when all batches of an epoch that the run asks for were read."""

    def get_state(self) -> dict[str, Any]:
        """The states of generators that belong to the dataset, as NumPy arrays."""
        return {name: g.get_state().numpy().copy() for name, g in self._generators().items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Puts `get_state()` back."""
        for name, generator in self._generators().items():
            # What PyTorch's generators take is a tensor of its own.
            generator.set_state(generator.get_state().new_tensor(state[name]))

    def _generators(self) -> dict[str, Any]:
        """A PyTorch loader's own generators."""
        found = {name: getattr(part, "generator", None) for name, part in self._parts().items()}
        return {name: g for name, g in found.items() if type(g).__module__.startswith("torch")}

    def _parts(self) -> dict[str, Any]:
        """The dataset, and what a PyTorch loader takes its order from."""
        batch_sampler = getattr(self.dataset, "batch_sampler", None)
        return {
            "loader": self.dataset,
            "sampler": getattr(self.dataset, "sampler", None),
            "batch_sampler": batch_sampler,
            "batch_sampler.sampler": getattr(batch_sampler, "sampler", None),
        }

    def iterator_state(self) -> Any:
        """The state of the iterator behind the batch that it gave last; None if it has none."""
        if self.has_state:
            return self.dataset.state_dict()
        return self._iterator.get_state() if hasattr(self._iterator, "set_state") else None

    def resume_from(self, state: Any) -> None:
        """Lets the next `batches` go on where `iterator_state()` gave this, and skip nothing."""
        self._resume_from = state


class _Arrays(DataAdapter):
    seekable = True
    _facts: dict[str, Any] | None = None

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        return map(self.dataset.batch, self.dataset.rows(epoch, skip))

    def facts(self) -> dict[str, Any]:
        if self._facts is None:
            data = self.dataset
            names = ("num_examples", "batch_size", "shuffle", "seed", "drop_remainder")
            # Of much data some rows: a second or two for a look at all of it is too long.
            nbytes = sum(leaf.nbytes for leaf in keras.tree.flatten(data.arrays))
            rows = slice(None, None, 1 + nbytes // MAX_CHECKED_BYTES)
            sample = keras.tree.map_structure(lambda array: array[rows], data.arrays)
            self._facts = {name: getattr(data, name) for name in names}
            self._facts["arrays"] = leaves_of(data.arrays)
            self._facts["checksum of the arrays"] = checksum(sample)
        return self._facts


class TensorFlowData(DataAdapter):
    """A `tf.data.Dataset`, on any backend: tensors on TensorFlow, NumPy arrays elsewhere."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        cardinality = int(dataset.cardinality())
        self.endless = cardinality == -1  # tf.data.INFINITE_CARDINALITY
        self.num_batches = cardinality if cardinality >= 0 else None
        # Each iterator takes the next seeds of a shuffle. Where the dataset repeats itself the
        # number of those that it takes depends on how far it is read.
        self.read_through = self.endless or _has(dataset, "_RepeatDataset")

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        dataset = self.dataset.skip(skip) if skip else self.dataset
        return backend.iterate(dataset)  # type: ignore[no-any-return]

    def rewind(self, epoch: int, steps: int | None) -> None:
        cut_short = steps not in (None, self.num_batches)
        if self.read_through and cut_short and _has(self.dataset, "_ShuffleDataset"):
            # It puts a prefetch at the end by itself, too.
            self.unrepeatable = (
                "this tf.data.Dataset repeats itself and is shuffled, and TensorFlow reads it "
                f"further ahead than the {steps} steps of an epoch, nobody knows how far. Leave "
                "out repeat: train goes through the dataset once in each epoch."
            )
        for _ in range(epoch):
            passed = self.dataset if steps is None else self.dataset.take(steps)
            for _ in passed if self.read_through else [iter(self.dataset)]:
                pass


class _PyDataset(DataAdapter):
    """A `keras.utils.PyDataset`, whose own `workers` are not used: one thread reads it ahead."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self.num_batches = dataset.num_batches
        self.endless = self.num_batches is None
        self._begun = False

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        self._begin()
        count = self.dataset.num_batches
        for i in itertools.count(skip) if count is None else range(skip, count):
            yield self.dataset[i]

    def end_epoch(self) -> None:
        if self._begun:
            self._end()

    def rewind(self, epoch: int, steps: int | None) -> None:
        for _ in range(epoch):
            self._begin()
            self._end()

    def _begin(self) -> None:
        self.end_epoch()  # of one that was cut short
        self._begun = True
        self.dataset.on_epoch_begin()

    def _end(self) -> None:
        self._begun = False
        before = random_state()
        self.dataset.on_epoch_end()
        if not same(before, random_state()):
            self.unrepeatable = (
                f"{type(self.dataset).__name__}.on_epoch_end draws from a global random generator, "
                "whose state at the end of each epoch nobody knows any more. Let it draw from a "
                "generator of its own: self.generator = np.random.default_rng(seed) in __init__, "
                "and self.generator.shuffle(...) here."
            )


class _Function(DataAdapter):
    """A generator function: called anew for each epoch."""

    def __init__(self, dataset: Callable[[], Any]) -> None:
        super().__init__(dataset)
        self.num_batches = None

    def _iterate(self) -> Iterator[Any]:
        return iter(self.dataset())


class _Once(DataAdapter):
    """A bare iterator: what was read is gone, and an epoch goes on where the last one stopped."""

    reads_once = True
    read_through = True

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        first = next(self.dataset, _END)
        if first is _END and epoch:
            raise ValueError(
                f"The dataset is a {type(self.dataset).__name__}, which can be read only once, "
                f"and it was exhausted before epoch {epoch + 1}. Give the function that makes it "
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


_END = object()
MAX_CHECKED_BYTES = 2**26


def _has(dataset: Any, operation: str) -> bool:
    """Whether there is such an operation in a pipeline of `tf.data`."""
    # Not public, but the only way to ask: `element_spec` and `cardinality` don't tell.
    inputs = dataset._inputs()
    return type(dataset).__name__ == operation or any(_has(i, operation) for i in inputs)


def as_adapter(dataset: Any) -> DataAdapter:
    """`dataset` as the loop reads it.

    Args:
        dataset: a `tf.data.Dataset`, what `from_arrays` returns, a `keras.utils.PyDataset`, any
            re-iterable of batches (a list, a PyTorch `DataLoader`), a generator function, or a bare
            iterator, which lasts for one pass.

    Raises:
        TypeError: for anything else, also for bare arrays, whose rows are no batches.
    """
    if isinstance(dataset, DataAdapter):
        return dataset
    if isinstance(dataset, ArrayDataset):
        return _Arrays(dataset)
    if hasattr(dataset, "as_numpy_iterator") and hasattr(dataset, "element_spec"):
        return TensorFlowData(dataset)
    if isinstance(dataset, keras.utils.PyDataset):
        return _PyDataset(dataset)
    bare = isinstance(dataset, np.ndarray | str | bytes | dict) or hasattr(dataset, "__array__")
    if isinstance(dataset, tuple) and any(hasattr(item, "__array__") for item in dataset):
        bare = True
    if not bare and callable(dataset) and not hasattr(dataset, "__iter__"):
        return _Function(dataset)
    if not bare and hasattr(dataset, "__next__"):
        return _Once(dataset)
    if not bare and (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        return DataAdapter(dataset)
    raise TypeError(
        f"A dataset gives batches one after the other, and got a {type(dataset).__name__}. For "
        "arrays in memory write polus.data.from_arrays((x, y), batch_size=32); a "
        "tf.data.Dataset, a keras.utils.PyDataset, a DataLoader, a list of batches or a "
        "generator function will do too."
    )


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:  # no __len__, or one that says it doesn't know
        return None
