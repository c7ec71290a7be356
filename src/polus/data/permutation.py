"""A shuffled order that takes no memory: row i is computed where it is read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

CHUNK = 2**16  # places that are computed at once
ROUNDS = 8

Places = np.ndarray[Any, np.dtype[np.uint64]]


class Permutation:
    """A permutation of the numbers below `size`, as a sequence that is computed in parts.

    A Feistel network with the given round keys permutes the numbers of `size`'s bits (Luby and
    Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions"). A
    number that is too large is permuted again, until it is not (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains"): the network is less than twice as large as `size`, so that
    takes two turns on average at most. The round function is the output function of SplitMix64
    (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").

    Args:
        size: How many numbers there are.
        keys: The key of each round, an even number of 64-bit integers; none for the numbers in
            their order.
    """

    def __init__(self, size: int, keys: Sequence[np.uint64] | Places = ()) -> None:
        self.size = size
        self.keys = keys
        self.dtype = np.int32 if size <= 2**31 else np.int64
        bits = max(2, (size - 1).bit_length())
        self._widths = bits - bits // 2, bits // 2
        self._first = 0
        self._chunk: np.ndarray[Any, Any] = np.zeros(0, self.dtype)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, places: slice) -> np.ndarray[Any, Any]:
        """Returns the numbers at some places that follow each other."""
        start, stop, _ = places.indices(self.size)
        if start < self._first or stop > self._first + len(self._chunk):
            end = min(self.size, max(stop, start + CHUNK))
            numbers = self._permuted(np.arange(start, end, dtype=np.uint64))
            while len(outside := np.flatnonzero(numbers >= self.size)):
                numbers[outside] = self._permuted(numbers[outside])
            self._first, self._chunk = start, numbers.astype(self.dtype)
        return self._chunk[start - self._first : stop - self._first]

    def _permuted(self, numbers: Places) -> Places:
        if not len(self.keys):
            return numbers
        wide, narrow = map(np.uint64, self._widths)
        one = np.uint64(1)
        left, right = numbers >> narrow, numbers & ((one << narrow) - one)
        for key in self.keys:
            left, right = right, left ^ (_mixed(right + key) & ((one << wide) - one))
            wide, narrow = narrow, wide
        return (left << narrow) | right


def _mixed(x: Places) -> Places:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
