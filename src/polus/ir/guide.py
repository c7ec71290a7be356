"""A guide: vectors of another encoder, which say which negatives are probably relevant."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polus.data.fingerprint import checksum
from polus.ir.search import to_arrays

Rows = NDArray[np.int64]


class Guide:
    """Masks negatives that a guide scores above the query's positive.

    Judgements are never complete, so among a batch's other documents, and more so among mined ones,
    are some that answer the query. Solatorio 2024 (GISTEmbed, arXiv:2402.16829, section 3.1) takes
    another, better encoder's cosine as the judge. Its comparisons of queries with queries and of
    documents with documents aren't made here.

    The guide's vectors are computed once, by a `RepresentationStore` for example, so a step costs
    no encoder more. They may be memory-mapped.

    Args:
        queries: `(Q, E)`, the guide's vectors of the queries, in the order of `PairBatches`.
        documents: `(D, E)`, its vectors of the documents.
        margin: How far below the positive's cosine a negative must score.
        relative: Whether `margin` is a fraction of the positive's cosine. 0.05 then is the rule of
            `HardNegativeMining`, by the guide.

    Raises:
        ValueError: If the shapes don't match.

    Example:
        ```python
        guide = Guide(store(list(queries.values())), store(list(documents.values())))
        batches = PairBatches(queries, documents, relevant, guide=guide)
        ```
    """

    def __init__(
        self,
        queries: ArrayLike,
        documents: ArrayLike,
        margin: float = 0.0,
        relative: bool = False,
    ) -> None:
        self.queries, self.documents = to_arrays(queries), to_arrays(documents)
        shapes = [np.shape(each) for each in (self.queries, self.documents)]
        if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
            raise ValueError(
                "A guide needs vectors (Q, E) of the queries and (D, E) of the documents, got the "
                f"shapes {shapes[0]} and {shapes[1]}."
            )
        self.margin = margin
        self.relative = relative

    def check(self, num_queries: int, num_documents: int) -> None:
        """Raises unless there is a vector for each query and each document."""
        counts = len(self.queries), len(self.documents)
        if counts != (num_queries, num_documents):
            raise ValueError(
                "A guide must have one vector for each query and each document, got "
                f"{counts[0]} for {num_queries} queries and {counts[1]} for {num_documents} "
                "documents."
            )

    def facts(self) -> list[float]:
        """Returns numbers that differ from those of another guide, for a checkpoint to compare."""
        sample = checksum((self.queries, self.documents), max_bytes=2**20)
        return [self.margin, float(self.relative), sample]

    def mask(self, queries: Rows, positives: Rows, negatives: Rows) -> NDArray[np.bool_]:
        """Returns which documents are no negatives by the guide, `(B, B + k)`.

        Args:
            queries: `(B,)` rows.
            positives: `(B,)` rows, the first B columns.
            negatives: `(B, k)` rows, the other columns. Those of padding (-1) mean nothing.
        """
        query = _unit(self.queries[queries])
        in_batch = query @ _unit(self.documents[positives]).T
        # Each document once: shared hard negatives are the same in every row.
        unique, places = np.unique(np.maximum(negatives, 0), return_inverse=True)
        places = places.reshape(negatives.shape)
        hard = np.take_along_axis(query @ _unit(self.documents[unique]).T, places, axis=1)
        found = np.concatenate([in_batch, hard], axis=1)
        if not np.isfinite(found).all():
            raise ValueError(
                "A guide's vectors must be finite, but those of a batch contain NaN or infinity. "
                "Look for such numbers in the weights of the encoder that has computed them."
            )
        limit = np.diagonal(in_batch)[:, None]
        limit = limit - self.margin * (np.abs(limit) if self.relative else 1.0)
        return np.asarray(found > limit)


def _unit(vectors: Any) -> NDArray[np.float32]:
    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12))
