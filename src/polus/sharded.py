"""Arrays that are split over processes or files.

An array is cut along each axis, so that its parts form a grid. That is all that a sharding of JAX
can be, and no two cells of a grid overlap or leave a gap between them.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from polus.types import Tensor

Array = np.ndarray[Any, Any]
K = TypeVar("K")
Box = tuple[slice, ...]  # of an array, with a begin and an end for each axis


@dataclasses.dataclass(frozen=True)
class Grid:
    """An array's shape, and where each axis is cut: the begins of the parts, from 0.

    >>> Grid((4, 3), ((0, 2), (0,))).boxes()
    [(slice(0, 2, None), slice(0, 3, None)), (slice(2, 4, None), slice(0, 3, None))]
    """

    shape: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]

    @property
    def num_parts(self) -> int:
        """The number of parts."""
        return math.prod(map(len, self.cuts))

    def boxes(self) -> list[Box]:
        """Returns where each part is, in C order."""
        return list(itertools.product(*map(self._spans, range(len(self.shape)))))

    def overlapping(self, box: Box) -> Iterator[tuple[int, Box]]:
        """Yields the number and the place of each part that shares an element with a box."""
        for number, part in enumerate(self.boxes()):
            if all(a.start < b.stop and b.start < a.stop for a, b in zip(part, box, strict=True)):
                yield number, part

    def _spans(self, axis: int) -> list[slice]:
        cuts = self.cuts[axis]
        return [slice(*span) for span in zip(cuts, (*cuts[1:], self.shape[axis]), strict=True)]


class ShardedArray:
    """An array of which each process has some parts.

    Args:
        grid: Its shape and its parts.
        dtype: Its dtype.
        owners: For each part the process that writes it.
        own: The parts of this process by their numbers, on the device or as NumPy arrays.
    """

    def __init__(
        self, grid: Grid, dtype: Any, owners: Sequence[int], own: Mapping[int, Tensor]
    ) -> None:
        self.grid, self.shape, self.dtype = grid, grid.shape, np.dtype(dtype)
        self.owners, self.own = list(owners), own

    @property
    def nbytes(self) -> int:
        """The size of the whole array in bytes."""
        return int(math.prod(self.shape) * self.dtype.itemsize)


def split(
    shape: Sequence[int],
    dtype: Any,
    places: Mapping[K, Sequence[int]],
    process_of: Callable[[K], int],
    data: Mapping[K, Tensor],
) -> ShardedArray:
    """Returns an array that lies on several devices. A part that several have belongs to one.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        places: For each device the begin of its part along each axis, in the same order in all
            processes.
        process_of: Returns the process of a device.
        data: The parts on the devices of this process.
    """
    cuts = tuple(tuple(sorted(set(begins))) for begins in zip(*places.values(), strict=True))
    grid = Grid(tuple(shape), cuts)
    devices: dict[tuple[int, ...], list[K]] = {}
    for device, begins in places.items():
        devices.setdefault(tuple(begins), []).append(device)
    owners, own = [], {}
    for number, box in enumerate(grid.boxes()):
        copies = devices[tuple(each.start for each in box)]
        owner = copies[number % len(copies)]
        owners.append(process_of(owner))
        if owner in data:
            own[number] = data[owner]
    return ShardedArray(grid, dtype, owners, own)


class StoredArray:
    """An array whose parts are in files, and are read when they are needed.

    Args:
        grid: Its shape and its parts.
        dtype: Its dtype.
        read_part: Returns a part by its number.
    """

    def __init__(self, grid: Grid, dtype: Any, read_part: Callable[[int], Array]) -> None:
        self.grid, self.shape, self.dtype = grid, grid.shape, np.dtype(dtype)
        self._read_part = read_part

    def read(self, index: Sequence[slice] = ()) -> Array:
        """Returns the values of a box, reading only the parts that overlap it.

        Args:
            index: A slice for each axis, without a step; axes that are left out are whole.
        """
        whole = (slice(None),) * (len(self.shape) - len(index))
        pairs = zip((*index, *whole), self.shape, strict=True)
        box = tuple(slice(*each.indices(size)[:2]) for each, size in pairs)
        found = list(self.grid.overlapping(box))
        if [part for _, part in found] == [box]:
            return self._read_part(found[0][0])
        array = np.empty([each.stop - each.start for each in box], self.dtype)
        for number, part in found:
            shared = [(a, b, _shared(a, b)) for a, b in zip(part, box, strict=True)]
            target = tuple(_moved(each, b.start) for _, b, each in shared)
            source = tuple(_moved(each, a.start) for a, _, each in shared)
            array[target] = self._read_part(number)[source]
        return array


def _shared(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _moved(span: slice, origin: int) -> slice:
    return slice(span.start - origin, span.stop - origin)
