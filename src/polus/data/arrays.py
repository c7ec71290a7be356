"""In-memory data whose order is a function of a seed and the number of the epoch."""

import copy
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from polus.data.batches import arrays_of, columns_without_numbers, is_frame, map_arrays
from polus.data.permutation import ROUNDS, Permutation

MAX_SORTED = 2**20  # examples; the order of more takes long to sort, and much memory


def from_arrays(
    arrays: object,
    batch_size: int,
    shuffle: bool = True,
    seed: int = 0,
    drop_remainder: bool = False,
    device_bytes: int = 2**30,
) -> "ArrayDataset":
    """Returns batches of in-memory arrays, shuffled each epoch in an order that a seed fixes.

    ```python
    data = polus.data.from_arrays((x, y), batch_size=32)
    ```

    The order is the same on every backend and platform. The order of an epoch sorts the raw 64-bit
    outputs of a Philox generator with the key (seed, epoch) (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"), so that any epoch's order is known without running the earlier
    ones. Above 2**20 examples eight such outputs are the round keys of a permutation that computes
    each place when it is read (`polus.data.permutation`): an epoch of any length begins at once.

    Args:
        arrays: An array, or a structure of arrays with an equal first axis: the examples. A tuple
            (x, y) yields batches (x, y). float64 becomes `keras.config.floatx()`. Text needs a
            `custom_data_transform_f` that encodes it. A part that is None stays None.
        batch_size: The number of examples per batch.
        shuffle: Whether each epoch has its own order. If not, examples come in the order given.
        seed: The seed of the order, 0 to 2**64 - 1.
        drop_remainder: Whether to leave out a last batch that is smaller.
        device_bytes: Arrays up to this size are kept on the device, and batches are gathered there
            inside the compiled loop. Larger ones are gathered in host memory, and all of them on
            JAX's CPU, which compiles the step sooner so.

    Raises:
        ValueError: If there are no arrays or no examples, if the arrays differ in length, or if
            another argument is out of range.
        TypeError: If a part is a sparse matrix, or a data frame with columns that are no numbers,
            or if labels stand in the place of the batch size.
    """
    return ArrayDataset(arrays, batch_size, shuffle, seed, drop_remainder, device_bytes)


class ArrayDataset:
    """In-memory batches, made by `from_arrays`. Iterating yields the batches of epoch 0."""

    def in_order(self) -> "ArrayDataset":
        """Returns the same examples, all of them, in the order they were given."""
        new = copy.copy(self)
        new.shuffle, new.drop_remainder = False, False
        return new

    def __init__(
        self,
        arrays: object,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_remainder: bool,
        device_bytes: int,
    ) -> None:
        self.arrays = map_arrays(_array, arrays)
        leaves = arrays_of(self.arrays)
        lengths = sorted({len(leaf) for leaf in leaves})
        if len(lengths) != 1 or lengths[0] == 0:
            raise ValueError(
                "from_arrays takes arrays with the same positive number of examples along the "
                f"first axis, got {f'lengths {lengths}' if lengths else 'no array'}."
            )
        _check_batch_size(batch_size, lengths[0], drop_remainder)
        if not _is_integer(seed) or not 0 <= seed < 2**64:
            raise ValueError(
                f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}. Each epoch has its "
                "own order under one seed; shuffle=False keeps the order given."
            )
        for name, value in (("shuffle", shuffle), ("drop_remainder", drop_remainder)):
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"{name} must be True or False, got {value!r}.")
        if not isinstance(device_bytes, int | float | np.number) or not device_bytes >= 0:
            raise ValueError(f"device_bytes must be a number of bytes, got {device_bytes!r}.")
        self.num_examples = lengths[0]
        self.batch_size = min(int(batch_size), self.num_examples)
        self.shuffle = shuffle
        self.seed = int(seed)
        self.drop_remainder = drop_remainder
        fits = self.num_examples <= 2**31  # the numbers of rows there have 32 bits
        self.on_device = fits and sum(leaf.nbytes for leaf in leaves) <= device_bytes

    def __len__(self) -> int:
        """Returns the number of batches per epoch."""
        whole, rest = divmod(self.num_examples, self.batch_size)
        return whole + (rest > 0 and not self.drop_remainder)

    def order(self, epoch: int) -> np.ndarray[Any, Any] | Permutation:
        """Returns the examples' indices in the order of an epoch; slices of it are integers."""
        if not self.shuffle:
            return Permutation(self.num_examples)
        # NumPy keeps raw outputs and a stable sort the same in every version and on every platform,
        # which it does not promise for Generator.permutation.
        philox = np.random.Philox(key=np.array([self.seed, epoch], np.uint64))
        if self.num_examples > MAX_SORTED:
            return Permutation(self.num_examples, philox.random_raw(ROUNDS))
        raw = philox.random_raw(self.num_examples)
        return np.argsort(raw, kind="stable").astype(np.int32)

    def rows(self, epoch: int, skip: int = 0) -> Iterator[np.ndarray[Any, Any]]:
        """Yields the indices of each batch of an epoch, from batch `skip` on."""
        order = self.order(epoch)
        for i in range(skip, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]

    def batch(self, rows: np.ndarray[Any, Any]) -> Any:
        """Returns the batch of the examples `rows`, in host memory."""
        return map_arrays(lambda array: array[rows], self.arrays)

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch, self.rows(0))


def _check_batch_size(batch_size: Any, num_examples: int, drop_remainder: object) -> None:
    if isinstance(batch_size, list | tuple) or np.ndim(batch_size):
        raise TypeError(
            "from_arrays takes the arrays of an example as one tuple, and then the batch size: "
            "from_arrays((x, y), batch_size=32)."
        )
    if not _is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
    if drop_remainder and num_examples < batch_size:
        raise ValueError(
            f"drop_remainder=True leaves out a batch of fewer than {batch_size} examples, and "
            f"there are {num_examples}: no batch is left. Use a smaller batch_size, or leave "
            "drop_remainder out."
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _array(values: Any) -> np.ndarray[Any, Any]:
    if type(values).__module__.startswith("scipy.sparse"):
        raise TypeError(
            f"from_arrays takes dense arrays, got a scipy.sparse {type(values).__name__} of shape "
            f"{values.shape}. Convert it: x.toarray(). If that does not fit into memory, pass a "
            "generator function that yields batches such as (x[i : i + 32].toarray(), ...)."
        )
    if is_frame(values):
        _check_columns(values)
    array = np.asarray(values)
    if array.ndim == 0:
        raise ValueError(
            f"from_arrays takes arrays of examples, got the single value {values!r}. A list is a "
            "structure of arrays; make it one array: np.array(values)."
        )
    return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array


def _check_columns(frame: Any) -> None:
    """Raises a TypeError that names the columns of a data frame that don't hold numbers."""
    if columns := columns_without_numbers(frame):
        kinds = ", ".join(f"{name!r} ({dtype})" for name, dtype in columns.items())
        raise TypeError(
            f"from_arrays takes numbers, and these columns of the data frame hold something else: "
            f"{kinds}. Encode them, for example with "
            f"frame[{next(iter(columns))!r}].astype('category').cat.codes, or leave them out: "
            f"frame.drop(columns={list(columns)})."
        )
