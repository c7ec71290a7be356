"""Vectors in a quarter or a 32nd of their memory, and search over them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polus.ir.index import VectorIndex, check_finite, load_index, save_index
from polus.ir.search import Floats, Ints, as_vectors, check_positive, top_k
from polus.ir.texts import check_ids

Precision = Literal["int8", "binary"]
Codes = NDArray[np.int8] | NDArray[np.uint8]
_ROWS = 8192  # decoded at a time
_SAMPLE = 64
_TOLERANCE = 0.03  # of a code's range, or of the signs: originals in half precision are far below


def int8_ranges(vectors: ArrayLike) -> Floats:
    """Returns the smallest and the largest value of each dimension, `(2, E)`, to quantize with.

    Args:
        vectors: `(N, E)`, those to quantize or a sample of them.
    """
    found = np.asarray(as_vectors(vectors, "vectors"), np.float32)
    return np.stack([found.min(axis=0), found.max(axis=0)])


def quantize(vectors: ArrayLike, precision: Precision, ranges: Floats | None = None) -> Codes:
    """Quantizes vectors `(N, E)`.

    "int8" divides each dimension's range into 255 steps, and rounds to the nearest of the 256
    borders: int8 `(N, E)`. Values out of range become its ends. "binary" keeps the signs, 8 in a
    byte: uint8 `(N, E / 8)`, rounded up. Sentence-transformers' `quantize_embeddings` calls them
    "int8", whose codes differ by at most 1 since it doesn't round, and "ubinary".

    Args:
        vectors: `(N, E)`.
        precision: See above.
        ranges: `(2, E)`, for "int8"; those of the vectors themselves by default.

    Raises:
        ValueError: If the precision is unknown, or a vector isn't finite: no code says so.
    """
    _check_precision(precision)
    found = np.asarray(as_vectors(vectors, "vectors"), np.float32)
    if not np.isfinite(found).all():
        raise ValueError("vectors must be finite, got NaN or infinity.")
    if precision == "binary":
        return np.packbits(found > 0, axis=-1)
    start, step = _grid(int8_ranges(found) if ranges is None else ranges)
    codes: Codes = np.clip(np.rint((found - start) / step) - 128, -128, 127).astype(np.int8)
    return codes


def dequantize(codes: Codes, precision: Precision, size: int, ranges: Floats | None = None) -> Any:
    """Returns approximations of quantized vectors, float32 `(N, size)`; of signs 1 or -1.

    Args:
        codes: The result of `quantize`.
        precision: That of the codes.
        size: The length of a vector.
        ranges: `(2, E)`, for "int8": those it was quantized with.

    Raises:
        ValueError: If the precision is unknown, or "int8" has no ranges.
    """
    _check_precision(precision)
    if precision == "binary":
        return np.unpackbits(codes.view(np.uint8), axis=-1, count=size) * np.float32(2) - 1
    if ranges is None:
        raise ValueError(
            "ranges must be those that the vectors were quantized with, got None. Give the same "
            "int8_ranges(vectors) to quantize and dequantize."
        )
    start, step = _grid(ranges)
    return (codes.astype(np.float32) + 128) * step + start


def _grid(ranges: Floats) -> tuple[Floats, Floats]:
    low, high = np.asarray(ranges, np.float32)
    step = (high - low) / np.float32(255)
    return low, np.where(step > 0, step, np.float32(1))  # a dimension may be constant


class QuantizedIndex(VectorIndex):
    """Quantized document vectors and their ids: search with a query's full vector.

    Scores are inner products of a query and the approximate vectors. With `originals`, the best
    `rescore * k` documents are scored again by their original vectors, which may stay on the disk:
    only these rows are read.

    Args:
        vectors: `(D, E)`, an array, which may be memory-mapped, or a tensor.
        ids: The D document ids.
        precision: "int8" takes a quarter of the memory of float32, "binary" a 32nd.
        ranges: `(2, E)`, for "int8"; see `int8_ranges`. Defaults to that of the vectors.
        originals: Vectors `(D, E)` to score again with, such as `vectors` themselves.
        rescore: How many times k documents are scored again.

    Raises:
        ValueError: If vectors and ids don't match, an id isn't a string or not unique, a vector
            isn't finite, or the precision is unknown.

    Example:
        >>> index = QuantizedIndex([[1.0, -0.5], [-0.5, 1.0]], ["north", "east"], "binary")
        >>> index.search([[0.75, 0.25]], k=1)
        [[('north', 0.5)]]
    """

    def __init__(
        self,
        vectors: ArrayLike,
        ids: Sequence[str],
        precision: Precision,
        *,
        ranges: Floats | None = None,
        originals: ArrayLike | None = None,
        rescore: int = 4,
    ) -> None:
        found = as_vectors(vectors, "vectors")
        self.ids = list(ids)
        _check(found, self.ids, precision, ranges, rescore)
        check_ids(self.ids)
        starts = range(0, len(found), _ROWS)
        for start in starts:
            block = np.asarray(found[start : start + _ROWS], np.float32)
            check_finite(block, self.ids[start : start + _ROWS])
        self.precision: Precision = precision
        self.size = found.shape[1]
        self.originals = _checked_originals(originals, found.shape)
        self.rescore = rescore
        self.ranges = int8_ranges(found) if precision == "int8" and ranges is None else ranges
        self.codes: Codes = np.concatenate(
            [quantize(found[i : i + _ROWS], precision, self.ranges) for i in starts]
        )

    def top_k(self, queries: ArrayLike, k: int) -> tuple[Floats, Ints]:
        found = np.asarray(as_vectors(queries), np.float32)
        check_positive(k, "k")
        if self.originals is None:
            return self._best(found, k)
        _, rows = self._best(found, k * self.rescore)
        rows.sort(axis=1)  # so that of equal scores the first in the index comes first
        scores = np.empty(rows.shape, np.float32)
        for query, places, target in zip(found, rows, scores, strict=True):
            # In float64, as exact search computes them: equal vectors have equal scores.
            target[:] = self.originals[places].astype(np.float64) @ query
        if not np.isfinite(scores).all():
            row, column = np.argwhere(~np.isfinite(scores))[0]
            raise ValueError(
                "originals must be finite, and as large as float32 can hold, but the score of "
                f"{self.ids[rows[row, column]]!r} is {scores[row, column]}."
            )
        return _first(scores, rows, k)

    def save(self, path: str | Path) -> None:
        """Writes codes, ids and a checksum to one safetensors file, which replaces an older one.

        `originals` are not written. An interrupted `save` leaves the older file as it was.
        """
        arrays = {"codes": self.codes} | ({} if self.ranges is None else {"ranges": self.ranges})
        facts = {"precision": self.precision, "size": str(self.size), "rescore": str(self.rescore)}
        save_index(path, arrays, self.ids, **facts)

    @classmethod
    def load(cls, path: str | Path, originals: ArrayLike | None = None) -> "QuantizedIndex":
        """Reads an index that `save` has written.

        Args:
            path: The file.
            originals: Vectors `(D, E)` to score again with: those that were quantized.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file isn't an index, its checksum doesn't match, or the originals
                have another shape or, in a sample, other codes.
        """
        arrays, ids, facts = load_index(path, {"codes"}, "QuantizedIndex.save")
        if "precision" not in facts:
            raise ValueError(f"{path} must be a file written by QuantizedIndex.save.")
        self = cls.__new__(cls)
        self.ids, self.codes, self.ranges = ids, arrays["codes"], arrays.get("ranges")
        self.precision = cast(Precision, facts["precision"])
        self.size, self.rescore = int(facts["size"]), int(facts["rescore"])
        self.originals = _checked_originals(originals, (len(ids), self.size))
        if self.originals is not None:
            self._check_codes_of_originals()
        return self

    def _check_codes_of_originals(self) -> None:
        # A file is loaded beside vectors that may have been encoded again since, in another order.
        rows = np.unique(np.linspace(0, len(self.ids) - 1, _SAMPLE).astype(int))
        expected = quantize(self.originals[rows], self.precision, self.ranges)
        found = self.codes[rows]
        if self.precision == "int8":
            distance = np.abs(found.astype(int) - expected).mean() / 255
        else:
            distance = np.unpackbits(found ^ expected, axis=1, count=self.size).mean()
        if distance > _TOLERANCE:
            raise ValueError(
                "originals must be the vectors that were quantized, in the same order, but in a "
                f"sample of {len(rows)} their codes differ from the file's. Take both from the "
                "same corpus, or build the index anew."
            )

    def _best(self, queries: Floats, k: int) -> tuple[Floats, Ints]:
        scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), int)
        for start in range(0, len(self.codes), _ROWS):
            codes = self.codes[start : start + _ROWS]
            vectors = dequantize(codes, self.precision, self.size, self.ranges)
            more, places = top_k(queries, vectors, k)
            scores = np.concatenate([scores, more], axis=1)
            scores, rows = _first(scores, np.concatenate([rows, places + start], axis=1), k)
        return scores, rows


def _check_precision(precision: object) -> None:
    if precision not in ("int8", "binary"):
        raise ValueError(f"precision must be 'int8' or 'binary', got {precision!r}.")


def _check(vectors: Any, ids: Sequence[str], precision: str, ranges: Any, rescore: int) -> None:
    _check_precision(precision)
    if vectors.ndim != 2 or len(vectors) != len(ids) or not ids:
        raise ValueError(
            "An index needs vectors (D, E) and D ids, at least one, got vectors of shape "
            f"{vectors.shape} and {len(ids)} ids."
        )
    if ranges is not None and np.shape(ranges) != (2, vectors.shape[1]):
        raise ValueError(
            "ranges must be the smallest and the largest value of each dimension, "
            f"(2, {vectors.shape[1]}), got the shape {np.shape(ranges)}."
        )
    check_positive(rescore, "rescore")


def _checked_originals(originals: ArrayLike | None, shape: tuple[int, ...]) -> Any:
    if originals is None:
        return None
    found = as_vectors(originals, "originals")
    if found.shape != shape:
        raise ValueError(
            f"originals must have the shape of the vectors, {shape}, got {found.shape}."
        )
    return found


def _first(scores: Floats, rows: Ints, k: int) -> tuple[Floats, Ints]:
    """Returns the k highest of the scores `(Q, N)` and their rows, of equal ones the first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
