"""Similarities of representations, and the scores that a trainer takes as `compute_scores`.

A representation is one vector per text, `(B, E)`, or, for late interaction, one vector per token
with a padding mask: `(vectors (B, L, E), mask (B, L))`.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from polus.types import Tensor

Representation = Tensor | tuple[Tensor, Tensor]
"""A tensor `(..., E)`, or a pair `(vectors (..., L, E), mask (..., L))`."""

Similarity = Callable[[Representation, Representation], Any]
"""`similarity(queries, documents)` maps `(..., Q, E)` and `(..., D, E)` to `(..., Q, D)`."""


def _dot_product(queries: Any, documents: Any) -> Any:
    _check_pairs(False, queries, documents)
    _check_sizes(queries, documents)
    return ops.matmul(queries, ops.swapaxes(documents, -1, -2))


def _cosine(queries: Any, documents: Any) -> Any:
    _check_pairs(False, queries, documents)
    return _dot_product(_unit(queries), _unit(documents))


def _unit(vectors: Any) -> Any:
    # The maximum is taken before the root: the gradient at a vector of zeros, which dropout can
    # make, is then zero, where that of its norm would be NaN.
    squared = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    return vectors * ops.rsqrt(ops.maximum(squared, 1e-12))


def _max_sim(queries: Any, documents: Any) -> Any:
    _check_pairs(True, queries, documents)
    (query, query_mask), (document, document_mask) = queries, documents
    _check_sizes(query, document)
    *_, num_queries, query_tokens, size = ops.shape(query)
    *leading, num_documents, document_tokens, _ = ops.shape(document)
    # One product (..., Q * L, E) x (..., E, D * M) of all tokens. With Q and D as leading axes to
    # broadcast it is slower, and TensorFlow 2.21 with oneDNN crashed on it or gave wrong numbers.
    query = ops.reshape(query, (*ops.shape(query)[:-3], num_queries * query_tokens, size))
    document = ops.reshape(document, (*leading, num_documents * document_tokens, size))
    tokens = ops.matmul(query, ops.swapaxes(document, -1, -2))
    tokens = ops.reshape(
        tokens,
        (*ops.shape(tokens)[:-2], num_queries, query_tokens, num_documents, document_tokens),
    )
    present = ops.cast(document_mask, "bool")[..., None, None, :, :]
    best = ops.max(ops.where(present, tokens, -1e9), axis=-1)
    # A document without tokens must not score -1e9 per query token.
    best = ops.where(ops.any(present, axis=-1), best, 0.0)
    return ops.sum(best * ops.cast(query_mask, best.dtype)[..., None], axis=-2)


def _check_pairs(wanted: bool, *representations: Any) -> None:
    """Raises unless all representations, or none, are pairs of token vectors and mask."""
    if any(isinstance(each, tuple | list) is not wanted for each in representations):
        raise ValueError(
            "max_sim compares vectors of tokens with their mask, got one vector per text. Use an "
            "encoder with pooling=None, or another similarity."
            if wanted
            else "dot_product and cosine compare one vector per text, got those of tokens with "
            "their mask. Use polus.ir.scores.max_sim, or an encoder with pooling."
        )


def _check_sizes(queries: Any, documents: Any) -> None:
    sizes = queries.shape[-1], documents.shape[-1]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "Query and document vectors must have the same size, got sizes "
            f"{sizes[0]} and {sizes[1]}. Use polus.ir.models.DualEncoder(..., "
            f"projection_size={min(sizes)}) to project both to one size."
        )


def without_diagonal(matrix: Tensor) -> Tensor:
    """Removes the diagonal of a `(B, B)` matrix, giving `(B, B - 1)`; each row keeps its order."""
    size = ops.shape(matrix)[0]
    # After the first element, the diagonal is every (B + 1)-th element.
    rest = ops.reshape(ops.reshape(matrix, (-1,))[1:], (size - 1, size + 1))[:, :-1]
    result: Tensor = ops.reshape(rest, (size, size - 1))
    return result


class InBatchScores:
    """Scores each query against its positive, the batch's other documents and its hard negatives.

    Call it with queries `(B, E)`, positives `(B, E)` and any number of hard negatives `(B, k, E)`.
    It returns, in float32, `(positive_scores (B,), negative_scores (B, B - 1 + k))`. The columns
    are the other documents in batch order, then the query's hard negatives. For late interaction
    each argument is a pair of vectors and mask.

    Args:
        similarity: See `Similarity`. It must broadcast over leading axes.
        name: Its name in messages.
        share_negatives: Score each query against the hard negatives of all queries: B * k columns
            in place of k, those of the first query first.
    """

    def __init__(self, similarity: Similarity, name: str, share_negatives: bool = False) -> None:
        self.similarity = similarity
        self.name = name
        self.share_negatives = share_negatives

    def sharing_negatives(self) -> "InBatchScores":
        """Returns these scores with the hard negatives of all queries for each query.

        The batches must have masks of that size: `PairBatches(..., share_negatives=True)`.
        """
        return InBatchScores(self.similarity, f"{self.name}.sharing_negatives()", True)

    def __call__(
        self, queries: Representation, positives: Representation, *negatives: Representation
    ) -> tuple[Any, Any]:
        batch = ops.cast(self.similarity(queries, positives), "float32")
        columns = [without_diagonal(batch)]
        if negatives and self.share_negatives:
            for each in negatives:
                flat = keras.tree.map_structure(
                    lambda x: ops.reshape(x, (-1, *ops.shape(x)[2:])), each
                )
                columns.append(ops.cast(self.similarity(queries, flat), "float32"))
        elif negatives:
            alone = keras.tree.map_structure(lambda x: ops.expand_dims(x, 1), queries)
            columns += [
                ops.cast(ops.squeeze(self.similarity(alone, each), 1), "float32")
                for each in negatives
            ]
        return ops.diagonal(batch), ops.concatenate(columns, axis=1)

    def __repr__(self) -> str:
        return f"<scores {self.name}>"


dot_product = InBatchScores(_dot_product, "dot_product")
"""The inner product, which depends on the norms of the vectors."""

cosine = InBatchScores(_cosine, "cosine")
"""The inner product of unit vectors: between -1 and 1, so divide it by a temperature."""

max_sim = InBatchScores(_max_sim, "max_sim")
"""Late interaction: the best document token of each query token, summed over the query's tokens
(Khattab and Zaharia 2020, ColBERT, arXiv:2004.12832, section 3.3). Holds `B * B * L * M` floats."""
