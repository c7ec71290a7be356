"""From representations to scores: what a trainer takes as `compute_scores`.

A representation is one vector per text, `(B, E)`, or, for late interaction, one vector per token
with the mask that tells tokens from padding: `(vectors (B, L, E), mask (B, L))`.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

Representation = Any
"""A tensor `(..., E)`, or a pair `(vectors (..., L, E), mask (..., L))`."""

Similarity = Callable[[Representation, Representation], Any]
"""`similarity(queries, documents)`: `(..., Q, E)` and `(..., D, E)` give `(..., Q, D)`."""


def _dot_product(queries: Any, documents: Any) -> Any:
    _check_sizes(queries, documents)
    return ops.matmul(queries, ops.swapaxes(documents, -1, -2))


def _cosine(queries: Any, documents: Any) -> Any:
    return _dot_product(_unit(queries), _unit(documents))


def _unit(vectors: Any) -> Any:
    # The maximum stands under the root: a vector of zeros, which dropout can make, has then a
    # gradient of zero, where that of its length would be NaN.
    squared = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    return vectors * ops.rsqrt(ops.maximum(squared, 1e-12))


def _max_sim(queries: Representation, documents: Representation) -> Any:
    (query, query_mask), (document, document_mask) = queries, documents
    _check_sizes(query, document)
    # (..., Q, 1, L, E) x (..., 1, D, E, M): every query token against every document token.
    tokens = ops.matmul(
        ops.expand_dims(query, -3), ops.expand_dims(ops.swapaxes(document, -1, -2), -4)
    )
    present = ops.cast(document_mask, "bool")[..., None, :, None, :]
    best = ops.max(ops.where(present, tokens, -1e9), axis=-1)
    # A text without a single token must not score -1e9 per query token.
    best = ops.where(ops.any(present, axis=-1), best, 0.0)
    return ops.sum(best * ops.cast(ops.expand_dims(query_mask, -2), best.dtype), axis=-1)


def _check_sizes(queries: Any, documents: Any) -> None:
    sizes = queries.shape[-1], documents.shape[-1]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"A query's vector has {sizes[0]} numbers and a document's {sizes[1]}, and the two are "
            "multiplied number by number. Project both to one length: "
            f"polus.ir.models.DualEncoder(..., projection_size={min(sizes)})."
        )


def without_diagonal(matrix: Any) -> Any:
    """The `(B, B)` matrix without its diagonal, `(B, B - 1)`; each row keeps its order."""
    size = ops.shape(matrix)[0]
    # Behind the first element, the diagonal stands in every (B + 1)-th place.
    rest = ops.reshape(ops.reshape(matrix, (-1,))[1:], (size - 1, size + 1))[:, :-1]
    return ops.reshape(rest, (size, size - 1))


class InBatchScores:
    """Scores of each query against its document, the batch's other documents and its own negatives.

    Args:
        similarity: see `Similarity`; it must broadcast over leading axes.
        name: what it is called in messages.

    Calling it with queries `(B, E)`, positives `(B, E)` and, if there are any, one or more tensors
    of negatives `(B, k, E)` gives, in float32, `(positive_scores (B,), negative_scores
    (B, B - 1 + k))`. The columns are the other documents in the batch's order, then the query's
    own negatives. For late interaction each of the three is a pair of vectors and mask.
    """

    def __init__(self, similarity: Similarity, name: str) -> None:
        self.similarity = similarity
        self.name = name

    def __call__(
        self, queries: Representation, positives: Representation, *negatives: Representation
    ) -> tuple[Any, Any]:
        batch = ops.cast(self.similarity(queries, positives), "float32")
        columns = [without_diagonal(batch)]
        if negatives:
            alone = keras.tree.map_structure(lambda x: ops.expand_dims(x, 1), queries)
            columns += [
                ops.cast(ops.squeeze(self.similarity(alone, each), 1), "float32")
                for each in negatives
            ]
        return ops.diagonal(batch), ops.concatenate(columns, axis=1)

    def __repr__(self) -> str:
        return f"<scores {self.name}>"


dot_product = InBatchScores(_dot_product, "dot_product")
"""The inner product of two vectors: the length of a vector counts."""

cosine = InBatchScores(_cosine, "cosine")
"""The inner product of two vectors of length one: between -1 and 1, so divide by a temperature."""

max_sim = InBatchScores(_max_sim, "max_sim")
"""Late interaction: each query token's best document token, summed over the query's tokens
(Khattab and Zaharia 2020, ColBERT, arXiv:2004.12832, section 3.3). Holds `B * B * L * M` floats."""
