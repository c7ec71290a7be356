"""What a frozen encoder gives is computed once and kept on disk."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from safetensors import safe_open
from safetensors.numpy import save_file

from polus.core import BaseLogger, function
from polus.files import atomic_write
from polus.ir.data import Features
from polus.ir.encoding import Vectors, encode, joined
from polus.ir.models import TextTokenizer

TEXTS_PER_FILE = 10_000  # what a crash can cost


class RepresentationStore(BaseLogger):
    """Calling it with texts gives the encoder's vectors; a text it has seen is read, not encoded.

    A folder per encoder: its name is made from weights, configuration, precision and tokenizer, so
    that vectors of a changed encoder are never mixed up with those of the former. In it is one
    or more safetensors files per call that met new texts.

    Args:
        folder: where vectors are kept; it can be deleted at any time.
        encoder: a Keras model; `model.query_encoder` of a `DualEncoder`, for example.
        tokenizer: what makes the encoder's input of texts.
        batch_size: texts encoded at a time.

    Calling it gives `(N, E)` float32, or for an encoder of pairs (late interaction) the pair
    `(vectors (N, L, E), mask (N, L))` with L the longest text's number of tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: keras.Model,
        tokenizer: TextTokenizer,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        # Once, not at each call: a compiled program is kept with the function that it is of.
        self._run = function(lambda tokens: encoder(tokens, training=False))
        self.encoded = 0
        """How many texts have been encoded by this object."""

    def __call__(self, texts: Sequence[str]) -> Any:
        if not texts:
            raise ValueError("No texts were given; there is nothing to represent.")
        if not self.encoder.built:  # its weights do not exist, so they can't be compared yet
            self.encoder(self.tokenizer(texts[:1]), training=False)
        folder = self.folder / self.fingerprint
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        known = {key: vector for each in _files(folder) for key, vector in _read(each, set(keys))}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if new:
            self.logger.info("Encoding %d texts, %d are in %s", len(new), len(known), folder)
        for start in range(0, len(new), TEXTS_PER_FILE):
            part = dict(list(new.items())[start : start + TEXTS_PER_FILE])
            vectors = self._encode(list(part.values()))
            _write(folder, list(part), vectors)
            known |= dict(zip(part, vectors, strict=True))
            self.encoded += len(part)
        return joined([known[key] for key in keys])

    def _encode(self, texts: list[str]) -> list[Vectors]:
        # By falling length, which saves most of the padding.
        order = np.argsort([-length for length in self.tokenizer.lengths(texts)], kind="stable")
        return encode(self._run, Features.of_texts(texts, self.tokenizer), self.batch_size, order)

    @property
    def fingerprint(self) -> str:
        """Differs where the vectors of a text may differ."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        digest.update(_description(self.encoder).encode())
        for weight in self.encoder.weights:
            value = ops.convert_to_numpy(weight)
            digest.update(str(value.shape).encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()[:32]


def _description(encoder: keras.Model) -> str:
    """What, beside the weights, decides on a vector: class, precision and configuration."""
    try:
        config = {key: value for key, value in encoder.get_config().items() if key != "name"}
        described = json.dumps(config, sort_keys=True)
    except (NotImplementedError, TypeError):  # a subclassed model may have none
        described = ""
    return f"{type(encoder).__name__} {encoder.dtype_policy.name} {described}"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.safetensors"))


def _read(path: Path, wanted: set[str]) -> Iterator[tuple[str, Vectors]]:
    with safe_open(str(path), "numpy") as file:
        keys = [row.tobytes().hex() for row in file.get_tensor("keys")]
        if wanted.isdisjoint(keys):
            return
        vectors, lengths = file.get_tensor("vectors"), file.get_tensor("lengths")
    ends = np.cumsum(np.maximum(lengths, 1))
    for key, length, end in zip(keys, lengths, ends, strict=True):
        if key in wanted:
            # Length 0 stands for a text that is one vector, without an axis of tokens.
            yield key, vectors[end - length : end] if length else vectors[end - 1]


def _write(folder: Path, keys: list[str], vectors: list[Vectors]) -> None:
    rows = [np.frombuffer(bytes.fromhex(key), np.uint8) for key in keys]
    lengths = [len(each) if each.ndim == 2 else 0 for each in vectors]
    # Named after its content: two processes that write at once do not meet.
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
    with atomic_write(folder / f"{name}.safetensors") as temporary:
        save_file(
            {
                "keys": np.stack(rows),
                "vectors": np.concatenate([np.atleast_2d(each) for each in vectors]),
                "lengths": np.array(lengths, np.int32),
            },
            str(temporary),
        )
