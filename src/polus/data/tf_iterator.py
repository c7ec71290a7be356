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
from polus.data.adapters import TensorFlowData
from polus.data.isolated import isolated_copy

# What TensorFlow calls the files of a checkpoint with the prefix "iterator".
ITERATOR_FILE = re.compile(r"checkpoint|iterator\.(index|data-[0-9]{5}-of-[0-9]{5})")


def with_iterator_state(
    dataset: Any, every_secs: float = 60.0, *, clock: Callable[[], float] = time.monotonic
) -> "SavedIterator":
    """Lets checkpoints hold the state of a `tf.data.Dataset`, for data that is slow to read again.

    Otherwise a resumed run begins the epoch again and drops what it has seen, which reads it. The
    state has all buffers in it: behind a shuffle of 10,000 images that can be hundreds of
    megabytes, of which up to eight are held in memory. Batches are stacked by a thread, not in
    TensorFlow's graph.

    ```python
    data = polus.data.with_iterator_state(dataset)
    trainer.train(data, epochs=5, callbacks=[Checkpoint("runs/a")], resume="runs/a")
    ```

    Args:
        dataset: a `tf.data.Dataset` that ends, on any backend.
        every_secs: how often the state is taken; what was read after it is read again.
        clock: tells the time in seconds.

    Raises:
        ValueError: for an endless dataset, whose later epochs depend on how far it was read; while
            training, for one that TensorFlow can't save: with `from_generator`, `py_function` or
            random numbers that have a state.
    """
    source = SavedIterator(dataset, every_secs, clock)
    if source.endless:
        raise ValueError(
            "with_iterator_state takes a tf.data.Dataset that ends, and got an endless one. Leave "
            "out its repeat(): train goes through it once in each epoch."
        )
    return source


class SavedIterator(TensorFlowData):
    """See `with_iterator_state`."""

    def __init__(self, dataset: Any, every_secs: float, clock: Callable[[], float]) -> None:
        super().__init__(dataset)
        self.every_secs = every_secs
        self.clock = clock
        self._saved_at = -math.inf

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        state, self._resume_from = self._resume_from, None
        if state is None:
            self._iterator = backend.iterate(self.dataset)
        else:
            skip = 0
            # A dataset of its own: what is put back are also the seeds of a shuffle, which all
            # iterators of a dataset share, and there they stand for a later epoch.
            self._iterator = backend.iterate(isolated_copy(self.dataset).dataset)
            with tempfile.TemporaryDirectory() as folder:
                for name, content in state.items():
                    # The names come from a checkpoint: they must not lead out of the folder.
                    if not ITERATOR_FILE.fullmatch(str(name)):
                        raise ValueError(f"The iterator's state has a file named {name!r}.")
                    (Path(folder) / name).write_bytes(content)
                self._checkpoint().read(f"{folder}/iterator").assert_consumed()
        # Not the iterator itself: TensorFlow would read many batches of it in one call, unseen.
        return itertools.islice(self._iterator, skip, None)

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
                    f"{str(error).splitlines()[0]} Give the dataset without with_iterator_state: "
                    "a resumed run then begins the epoch again, and drops what it has seen."
                ) from error
            self._saved_at = self.clock()
            return {file.name: file.read_bytes() for file in Path(folder).iterdir()}

    def _checkpoint(self) -> Any:
        return sys.modules["tensorflow"].train.Checkpoint(iterator=self._iterator)
