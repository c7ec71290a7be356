"""Encodes many texts, batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from polus.core import function
from polus.host import to_host
from polus.ir.data import Features, Rows
from polus.ir.search import check_positive
from polus.ir.texts import as_texts

Vectors = NDArray[np.float32]


def encode(fn: Callable[[Any], Any], features: Features, batch_size: int = 64) -> list[Vectors]:
    """Applies an encoder to all features, and returns one array per text.

    Args:
        fn: Maps the features of a batch to `(B, E)`, or for late interaction to
            `(vectors (B, L, E), mask (B, L))`.
        features: The features of N texts.
        batch_size: The number of texts encoded at a time.

    Returns:
        N arrays `(E,)`, or for late interaction `(tokens, E)` without padding.
    """
    batches = encode_batches(fn, features, np.arange(len(features)), batch_size)
    return [each for _, vectors in batches for each in vectors]


def encode_batches(
    fn: Callable[[Any], Any], features: Features, order: Rows, batch_size: int = 64
) -> Iterator[tuple[Rows, list[Vectors]]]:
    """Applies an encoder batch by batch; yields the row numbers of each batch and its arrays.

    Args:
        fn: As for `encode`.
        features: As for `encode`.
        order: The row numbers, in the order to encode them.
        batch_size: The number of texts encoded at a time.

    Raises:
        ValueError: If `batch_size` isn't a positive integer.
    """
    check_positive(batch_size, "batch_size")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # Padded to a power of two or a whole batch, so that few shapes are compiled and a single
        # query doesn't cost as much as a batch.
        padded = min(1 << (len(rows) - 1).bit_length(), batch_size)
        result = fn(features[np.resize(rows, padded)])
        if isinstance(result, (tuple, list)):
            found, mask = (to_host(each)[: len(rows)] for each in result)
            vectors = [each[there > 0] for each, there in zip(found, mask, strict=True)]
        else:
            vectors = list(to_host(result)[: len(rows)])
        yield rows, [each.astype("float32") for each in vectors]


class TextEncoder:
    """Maps N texts to an encoder's vectors `(N, E)`, and keeps nothing.

    For the queries of a search: a `RepresentationStore` writes each text to the disk, and reads all
    weights at each call to notice a change.

    Args:
        encoder: A Keras model whose code and settings don't change any more.
        tokenizer: Maps texts to the encoder's input.
        batch_size: The number of texts encoded at a time.
    """

    def __init__(
        self,
        encoder: keras.Model,
        tokenizer: Callable[[Sequence[str]], Any],
        batch_size: int = 64,
    ) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._encode = function(lambda tokens: self.encoder(tokens, training=False))

    def __call__(self, texts: Sequence[str]) -> Any:
        texts = as_texts(texts)
        if not texts:
            raise ValueError("texts must have at least one text, got none.")
        # By length, which saves most of the padding.
        order = np.argsort([-len(text) for text in texts], kind="stable")
        features = Features.of_texts(texts, self.tokenizer)
        vectors: list[Any] = [None] * len(texts)
        for rows, found in encode_batches(self._encode, features, order, self.batch_size):
            for row, each in zip(rows, found, strict=True):
                vectors[row] = each
        return stack_vectors(vectors)


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
