"""Encodes many texts, batch by batch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray

from polus.ir.data import Features, Rows

Vectors = NDArray[np.float32]


def encode(
    fn: Callable[[Any], Any],
    features: Features,
    batch_size: int = 64,
    order: Rows | None = None,
) -> list[Vectors]:
    """Applies an encoder to all features, and returns one array per text.

    Args:
        fn: Maps the features of a batch to `(B, E)`, or for late interaction to
            `(vectors (B, L, E), mask (B, L))`.
        features: The features of N texts.
        batch_size: The number of texts encoded at a time.
        order: All row numbers, in the order to encode them. Defaults to the order of the rows.

    Returns:
        N arrays `(E,)`, or for late interaction `(tokens, E)` without padding.
    """
    order = np.arange(len(features)) if order is None else order
    vectors: dict[int, Vectors] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # Padded to a power of two or a whole batch, so that few shapes are compiled and a single
        # query doesn't cost as much as a batch.
        filled = min(1 << (len(rows) - 1).bit_length(), batch_size)
        result = fn(features[np.resize(rows, filled)])
        if isinstance(result, (tuple, list)):
            found, mask = (ops.convert_to_numpy(each) for each in result)
            vectors |= {int(row): found[i][mask[i] > 0] for i, row in enumerate(rows)}
        else:
            vectors |= dict(zip(rows.tolist(), ops.convert_to_numpy(result), strict=False))
    return [vectors[row].astype("float32") for row in range(len(features))]


def stack_vectors(vectors: Sequence[Vectors]) -> Any:
    """Stacks vectors to `(N, E)`, or token vectors to `(vectors (N, L, E), mask (N, L))`."""
    if vectors[0].ndim == 1:
        return np.stack(vectors)
    longest = max(len(each) for each in vectors)
    padded = np.zeros((len(vectors), longest, vectors[0].shape[-1]), np.float32)
    mask = np.zeros((len(vectors), longest), np.int32)
    for row, each in enumerate(vectors):
        padded[row, : len(each)] = each
        mask[row, : len(each)] = 1
    return padded, mask
