"""Computes the vectors of a frozen encoder once, and keeps them on disk."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from polus.core import BaseLogger, function
from polus.ir.data import Features
from polus.ir.encoding import encode_batches, stack_vectors
from polus.ir.fingerprint import fingerprint
from polus.ir.models import TextTokenizer
from polus.ir.shards import VectorShards
from polus.ir.texts import as_texts, check_unicode


class RepresentationStore(BaseLogger):
    """Maps texts to an encoder's vectors; a text seen before is read from disk, not encoded.

    Called with N texts, it returns `(N, E)` float32, or for late interaction a pair `(vectors
    (N, L, E), mask (N, L))` with L the number of tokens of the longest text.

    There is a folder per encoder and tokenizer, named after a fingerprint of weights,
    configuration, precision and tokenizer (see `polus.ir.fingerprint`), so that vectors of
    different encoders never mix. It is the same for all backends. Changed code in a `call` of yours
    isn't noticed: delete the folder then.

    Each batch is written when it was encoded, so an interrupted call goes on where it was. Vectors
    have checksums; damaged ones are encoded again.

    Args:
        folder: Where vectors are kept. It may be deleted at any time.
        encoder: A Keras model, such as the `query_encoder` of a `DualEncoder`.
        tokenizer: Maps texts to the encoder's input. Anything but a `TextTokenizer` needs its
            `lengths` and `fingerprint` too.
        batch_size: The number of texts encoded at a time.

    Attributes:
        encoded: The number of texts that this object has encoded.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: keras.Model,
        tokenizer: TextTokenizer,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        missing = [name for name in ("lengths", "fingerprint") if not hasattr(tokenizer, name)]
        if missing:
            raise TypeError(
                "tokenizer must have __call__(texts), lengths(texts) for the number of tokens of "
                "each, and fingerprint, a string that differs if tokens may differ, got a "
                f"{type(tokenizer).__name__} without {' and '.join(missing)}. Use a TextTokenizer."
            )
        self.folder = Path(folder)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.encoded = 0
        self._shards: VectorShards | None = None
        self._encode: Callable[[Any], Any] | None = None

    def __call__(self, texts: Iterable[str]) -> Any:
        texts = as_texts(texts)
        if not texts:
            raise ValueError("texts must have at least one text, got none.")
        if not self.encoder.built:  # it has no weights to compare yet
            self.encoder(self.tokenizer(texts[:1]), training=False)
        shards, encode = self._opened()
        check_unicode(texts)
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        damaged = shards.damaged
        known = shards.get(list(dict.fromkeys(keys)))
        if shards.damaged > damaged:
            self.logger.warning(
                "%d vectors in %s are damaged: their texts are encoded again.",
                shards.damaged - damaged,
                shards.folder,
            )
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if new:
            self.logger.info("Encoding %d texts; %d are in %s", len(new), len(known), shards.folder)
        new_keys, new_texts = list(new), list(new.values())
        # By descending length, which saves most of the padding.
        order = np.argsort([-n for n in self.tokenizer.lengths(new_texts)], kind="stable")
        features = Features.of_texts(new_texts, self.tokenizer)
        for rows, vectors in encode_batches(encode, features, order, self.batch_size):
            _check_finite(vectors, [new_texts[row] for row in rows])
            batch = {new_keys[row]: each for row, each in zip(rows, vectors, strict=True)}
            shards.append(batch)
            known |= batch
            self.encoded += len(batch)
        return stack_vectors([known[key] for key in keys])

    def _opened(self) -> tuple[VectorShards, Callable[[Any], Any]]:
        """Returns the shards of the encoder as it is, and the encoder compiled."""
        folder = self.folder / self.fingerprint
        if self._shards is None or self._encode is None or self._shards.folder != folder:
            self._shards = VectorShards(folder)
            # Compiled again: the program of a changed encoder would compute as before.
            self._encode = function(lambda tokens: self.encoder(tokens, training=False))
        return self._shards, self._encode

    @property
    def fingerprint(self) -> str:
        """A digest that differs if the vectors of any text may differ."""
        both = self.tokenizer.fingerprint + fingerprint(self.encoder)
        return hashlib.sha256(both.encode()).hexdigest()[:32]


def _check_finite(vectors: list[Any], texts: list[str]) -> None:
    """Raises if a vector isn't finite: stored, it would outlive the cause."""
    broken = [
        text for text, each in zip(texts, vectors, strict=True) if not np.isfinite(each).all()
    ]
    if broken:
        raise ValueError(
            f"The encoder returned NaN or infinity for {len(broken)} of {len(texts)} texts, such "
            f"as {broken[0][:80]!r}; this batch is not stored. Look for such numbers in the "
            "encoder's weights, and check that it takes texts of that length."
        )
