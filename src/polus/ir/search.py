"""Exact search: the k best documents of each query, in bounded memory."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike, NDArray

from polus.host import to_host
from polus.ir.scores import InBatchScores, Representation, Similarity
from polus.ir.texts import check_ids

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Scores, or for late interaction products of two tokens, computed at a time. With the copies that
# NumPy and the backends make of them, either takes less than 100 MB.
MAX_SCORES = 2**21
# Numbers of representations that are on the device, or in float64, at a time.
MAX_NUMBERS = 2**22


def top_k(
    queries: Representation,
    documents: Representation,
    k: int,
    *,
    similarity: Similarity | None = None,
    block_size: int = 8192,
) -> tuple[Floats, Ints]:
    """Finds the k best documents of each query exactly, in blocks of queries and of documents.

    It takes at most 200 MB above the arguments and the result. Of documents with equal scores, the
    earlier one ranks first, also at the cut.

    Without a similarity, the inner product is computed in float64 and rounded to float32. Equal
    vectors have equal scores then, which in float32 depend on where in a block they are.

    Args:
        queries: `(Q, E)`, or for late interaction a pair `(vectors (Q, L, E), mask (Q, L))`.
        documents: `(D, E)`, or a pair `(vectors (D, M, E), mask (D, M))`.
        k: The number of documents. If there are fewer, all are returned.
        similarity: The `similarity` of one of `polus.ir.scores`. Defaults to the inner product.
        block_size: The largest number of documents scored at a time. Fewer are, if that takes too
            much memory.

    Returns:
        Scores `(Q, k)`, the highest first, and row numbers of documents `(Q, k)`.

    Raises:
        TypeError: If the similarity isn't a function.
        ValueError: If k or block_size is less than 1, the shapes don't match, a score is NaN, or
            late interaction has no similarity.
    """
    queries, documents = to_arrays(queries), to_arrays(documents)
    _check_similarity(similarity, queries)
    _check(queries, documents, k, block_size)
    num_queries, num_documents = len(_vectors(queries)), len(_vectors(documents))
    k = min(k, num_documents)
    query_block, document_block = _block_sizes(queries, documents, k, block_size)
    scores = np.empty((num_queries, k), np.float32)
    rows = np.empty((num_queries, k), np.int64)
    for start in range(0, num_queries, query_block):
        block = take_rows(queries, slice(start, start + query_block))
        best = _Best(len(_vectors(block)), k)
        for first in range(0, num_documents, document_block):
            candidates = take_rows(documents, slice(first, first + document_block))
            found = _scores(block, candidates, similarity, document_block)
            if np.isnan(found).any():
                raise ValueError(
                    f"Scores must not be NaN, but those of documents {first} to "
                    f"{first + found.shape[1] - 1} contain NaN. Look for NaN in the "
                    "representations of queries and documents."
                )
            best.add(found, first)
        scores[start : start + query_block] = best.scores
        rows[start : start + query_block] = best.rows
    return scores, rows


class _Best:
    """The best documents of some queries so far, by descending score and then by row.

    Args:
        num_queries: The number of queries.
        k: The number of documents to keep for each.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self.scores = np.empty((num_queries, 0), np.float32)
        self.rows = np.empty((num_queries, 0), np.int64)

    def add(self, scores: Floats, first_row: int) -> None:
        """Adds the scores `(Q, n)` of the next n documents, which start at `first_row`."""
        columns = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        if self.scores.shape[1] == self.k:
            # A later document with the same score as the k-th best is no better.
            scores, columns = _compress(scores, scores > self.scores[:, -1:])
        # The columns are in the order of rows among equal scores, and stay so.
        scores = np.concatenate([self.scores, scores], axis=1)
        rows = np.concatenate([self.rows, columns + first_row], axis=1)
        if scores.shape[1] > self.k:
            kept = _largest(scores, self.k)
            scores = scores[kept].reshape(-1, self.k)
            rows = rows[kept].reshape(-1, self.k)
        order = np.argsort(-scores, axis=1, kind="stable")
        self.scores = np.take_along_axis(scores, order, axis=1)
        self.rows = np.take_along_axis(rows, order, axis=1)


def _compress(scores: Floats, wanted: NDArray[np.bool_]) -> tuple[Floats, Ints]:
    """Moves the wanted scores of each row to its left, padded with -inf; and their columns."""
    counts = wanted.sum(axis=1)
    query, column = np.nonzero(wanted)
    place = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
    left = np.full((len(scores), counts.max(initial=0)), -np.inf, np.float32)
    columns = np.zeros(left.shape, np.int64)
    left[query, place] = scores[query, column]
    columns[query, place] = column
    return left, columns


def _largest(scores: Floats, k: int) -> NDArray[np.bool_]:
    """Marks exactly the k largest scores in each row, of equal ones the first."""
    cut = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    above, tied = scores > cut, scores == cut
    free = k - above.sum(axis=1, keepdims=True)
    kept: NDArray[np.bool_] = above | (tied & (np.cumsum(tied, axis=1, dtype=np.int32) <= free))
    return kept


def _scores(
    queries: Any, documents: Any, similarity: Similarity | None, document_block: int
) -> Floats:
    """Scores a block of queries against a block of documents, `(Q, D)`."""
    if similarity is None:
        product = queries.astype(np.float64) @ documents.astype(np.float64).T
        return product.astype(np.float32)  # type: ignore[no-any-return]
    count = len(_vectors(documents))
    # The last block is padded to the size of the others: JAX compiles each shape.
    documents = take_rows(documents, np.minimum(np.arange(document_block), count - 1))
    tensors = keras.tree.map_structure(ops.convert_to_tensor, (queries, documents))
    return to_host(similarity(*tensors))[:, :count].astype(np.float32)


def _block_sizes(queries: Any, documents: Any, k: int, block_size: int) -> tuple[int, int]:
    """Returns how many queries and how many documents to score at a time."""
    query, document = _vectors(queries), _vectors(documents)
    size = query.shape[-1]
    if query.ndim == 2 or document.ndim == 2:
        document_block = max(1, min(block_size, len(document), MAX_NUMBERS // size))
        query_block = min(MAX_SCORES // (document_block + k), MAX_NUMBERS // size)
    else:
        query_tokens, document_tokens = query.shape[1], document.shape[1]
        # A product of matrices is efficient from a hundred rows or so on.
        query_block = min(len(query), 256 // query_tokens)
        pairs = MAX_SCORES // (query_tokens * document_tokens)
        fitting = min(pairs // max(query_block, 1), MAX_NUMBERS // (document_tokens * size))
        document_block = min(block_size, len(document), fitting)
    return max(query_block, 1), max(document_block, 1)


def _check_similarity(similarity: object, queries: object) -> None:
    if isinstance(similarity, InBatchScores) or not (similarity is None or callable(similarity)):
        raise TypeError(
            "similarity must be a function of queries and documents, got "
            f"{similarity!r}. Use, for example, polus.ir.scores.cosine.similarity."
        )
    if similarity is None and isinstance(queries, tuple):
        raise ValueError(
            "Vectors of tokens have no inner product with a mask. Use "
            "similarity=polus.ir.scores.max_sim.similarity."
        )


def check_positive(number: object, what: str) -> None:
    """Raises a ValueError unless `number` is a positive integer, of Python or of NumPy."""
    if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{what} must be a positive integer, got {number!r}.")


def _check(queries: Any, documents: Any, k: int, block_size: int) -> None:
    check_positive(k, "k")
    check_positive(block_size, "block_size")
    shapes = _vectors(queries).shape, _vectors(documents).shape
    for name, shape in zip(("Queries", "Documents"), shapes, strict=True):
        if len(shape) < 2:
            raise ValueError(
                f"{name} must have one row each, got the shape {shape}. Use vector[None] for a "
                "single one."
            )
    if shapes[0][-1] != shapes[1][-1]:
        raise ValueError(
            f"Queries and documents must have vectors of the same size, got {shapes[0][-1]} and "
            f"{shapes[1][-1]}. Encode both with the same model."
        )


def to_arrays(representation: object) -> Any:
    """Returns a representation as a NumPy array, or as a tuple of vectors and mask."""
    if isinstance(representation, tuple):
        return tuple(to_host(each) for each in representation)
    return to_host(representation)


def as_vectors(vectors: object, what: str = "queries") -> Any:
    """Returns vectors as an array of any kind of number, without a copy if they are one.

    Raises:
        TypeError: If they are texts, tokens, or token vectors with a mask.
    """
    found = to_arrays(vectors)
    if isinstance(found, tuple):
        raise TypeError(
            f"{what} must have one vector for each text, got a tuple, as late interaction has. Use "
            "polus.ir.search.top_k(queries, documents, k, similarity=max_sim.similarity)."
        )
    if found.dtype.kind in "USOc":
        raise TypeError(
            f"{what} must be vectors of real numbers, got {vectors!r:.80}. Encode texts first: "
            "TextEncoder(encoder, tokenizer)(texts)."
        )
    return found


def take_rows(representation: Any, rows: slice | NDArray[np.integer[Any]]) -> Any:
    """Returns some rows of a representation of NumPy arrays."""
    if isinstance(representation, tuple):
        return tuple(each[rows] for each in representation)
    return representation[rows]


def _vectors(representation: Any) -> Any:
    return representation[0] if isinstance(representation, tuple) else representation


def as_run(
    query_ids: Sequence[str], document_ids: Sequence[str], scores: ArrayLike, rows: ArrayLike
) -> dict[str, dict[str, float]]:
    """Returns the result of `top_k` as a run, `{query id: {document id: score}}`.

    A row -1, where an index found nothing more, is left out.

    Raises:
        ValueError: If there are not as many ids as queries, or they aren't different strings.
    """
    scores, rows = np.asarray(scores), np.asarray(rows)
    query_ids = list(query_ids)
    if not len(query_ids) == len(scores) == len(rows):
        raise ValueError(
            f"Each query must have an id, got {len(query_ids)} ids, and the results of "
            f"{len(scores)} queries."
        )
    check_ids(query_ids, "query_ids")
    return {
        query: {
            document_ids[row]: float(score)
            for score, row in zip(values, places, strict=True)
            if row >= 0
        }
        for query, values, places in zip(query_ids, scores, rows, strict=True)
    }
