"""A `tf.data.Dataset` whose iterators are part of checkpoints."""

import itertools
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polus.backends import backend
from polus.data.adapters import TensorFlowAdapter
from polus.data.isolated import isolated_copy

# What TensorFlow calls the files of a checkpoint with the prefix "iterator".
ITERATOR_FILE = re.compile(r"checkpoint|iterator\.(index|data-[0-9]{5}-of-[0-9]{5})")


def with_iterator_state(
    dataset: Any, every_secs: float = 60.0, *, clock: Callable[[], float] = time.monotonic
) -> "SavedIterator":
    """Saves the iterator of a `tf.data.Dataset` in checkpoints, for data that is slow to read.

    Without it, a resumed run begins the epoch again, and reads and drops the batches that it has
    seen. The state includes all buffers: after a shuffle of 10,000 images it can take hundreds of
    megabytes, and up to eight states are held in memory. Batches are stacked by a thread, not in
    TensorFlow's graph.

    ```python
    data = polus.data.with_iterator_state(dataset)
    trainer.train(data, epochs=5, callbacks=[Checkpoint("runs/a")], resume="runs/a")
    ```

    Args:
        dataset: A `tf.data.Dataset` that ends, on any backend.
        every_secs: The time between two states; what was read after a state is read again.
        clock: Returns the time in seconds.

    Raises:
        ValueError: If the dataset is endless, so that later epochs depend on how far it was read.
            While training, if TensorFlow can't save it: with `from_generator`, `py_function` or
            random numbers that have a state.
    """
    adapter = SavedIterator(dataset, every_secs, clock)
    if adapter.endless:
        raise ValueError(
            "with_iterator_state takes a tf.data.Dataset that ends, got an endless one. Leave out "
            "its repeat(): train iterates over it once per epoch."
        )
    return adapter


class SavedIterator(TensorFlowAdapter):
    """A `tf.data.Dataset` whose iterator is saved: see `with_iterator_state`."""

    def __init__(self, dataset: Any, every_secs: float, clock: Callable[[], float]) -> None:
        super().__init__(dataset)
        self.every_secs = every_secs
        self.clock = clock
        self._saved_at = -math.inf

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        self._iterator = backend.iterate(self.dataset)
        # Not the iterator itself: TensorFlow would read many batches of it in one call, unseen.
        return itertools.islice(self._iterator, skip, None)

    def restored_batches(self, epoch: int, iterator_state: dict[str, bytes]) -> Iterator[Any]:
        # A dataset of its own: the state includes the seeds of a shuffle, which all iterators of a
        # dataset share, and in this dataset they stand for a later epoch.
        self._iterator = backend.iterate(isolated_copy(self.dataset).dataset)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in iterator_state.items():
                # The names come from a checkpoint: they must not lead out of the folder.
                if not ITERATOR_FILE.fullmatch(str(name)):
                    raise ValueError(f"The iterator's state has a file named {name!r}.")
                (Path(folder) / name).write_bytes(content)
            self._checkpoint().read(f"{folder}/iterator").assert_consumed()
        return itertools.islice(self._iterator, 0, None)  # as in `batches`

    def iterator_state(self) -> dict[str, bytes] | None:
        if self.clock() - self._saved_at < self.every_secs:
            return None
        errors = sys.modules["tensorflow"].errors
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._checkpoint().write(f"{folder}/iterator")
            except (errors.FailedPreconditionError, errors.UnimplementedError) as error:
                raise ValueError(
                    "TensorFlow can't save the iterator of this dataset: "
                    f"{str(error).splitlines()[0]} Pass the dataset without with_iterator_state: "
                    "a resumed run then begins the epoch again, and drops what it has seen."
                ) from error
            self._saved_at = self.clock()
            return {file.name: file.read_bytes() for file in Path(folder).iterdir()}

    def _checkpoint(self) -> Any:
        return sys.modules["tensorflow"].train.Checkpoint(iterator=self._iterator)
