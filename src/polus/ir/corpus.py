"""Encodes a corpus larger than memory to a folder of memory-mapped vectors.

    FOLDER/vectors.f32      float32 numbers, one vector of E after the other
          /ids.jsonl        for each of them a line: [id, digest of the text]
          /progress.json    how much of both is complete, and what has encoded it

Both files are appended to in shards. `progress.json` is replaced after each shard, so a process
that is killed loses at most one shard: the next call goes on where that file says.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from polus.core import BaseLogger, function
from polus.files import atomic_write
from polus.ir.data import Features
from polus.ir.encoding import encode_batches
from polus.ir.fingerprint import fingerprint
from polus.ir.models import TextTokenizer
from polus.ir.search import check_positive


class Corpus(NamedTuple):
    """Vectors `(D, E)` of float32, mapped into memory from a file, and the D ids."""

    vectors: NDArray[np.float32]
    ids: list[str]


def encode_corpus(
    folder: str | Path,
    documents: Iterable[tuple[str, str]] | Mapping[str, str],
    encoder: keras.Model,
    tokenizer: TextTokenizer,
    *,
    batch_size: int = 64,
    shard_size: int = 8192,
) -> Corpus:
    """Encodes documents to a folder, shard by shard, and returns their memory-mapped vectors.

    Only one shard of texts and vectors is in memory at a time. Called again, after an interruption
    or with more documents at the end, it compares the documents that are encoded already with the
    given ones, and encodes the others.

    Args:
        folder: Where the vectors are kept. One process may write to it at a time.
        documents: Pairs of an id and a text, from a generator for example, or `{id: text}`.
        encoder: A Keras model that returns `(B, E)`.
        tokenizer: Maps texts to the encoder's input.
        batch_size: The number of texts encoded at a time. Texts of similar length in a shard share
            a batch.
        shard_size: The number of texts encoded between two writes.

    Raises:
        TypeError: If an id or a text isn't a string.
        ValueError: If the folder is of another encoder or tokenizer, or of other documents, an id
            comes twice, or a vector isn't one finite vector per text.

    Example:
        ```python
        corpus = encode_corpus("vectors", documents.items(), encoder, tokenizer)
        index = DenseIndex(corpus.vectors, corpus.ids)
        ```
    """
    check_positive(batch_size, "batch_size")
    check_positive(shard_size, "shard_size")
    remaining = _checked(documents)
    first = next(remaining, None)
    if first is None:
        raise ValueError("documents must have at least one document, got none.")
    remaining = itertools.chain([first], remaining)
    if not encoder.built:
        encoder(tokenizer([first[1]]), training=False)
    writer = _Writer(Path(folder), tokenizer.fingerprint + fingerprint(encoder))
    writer.skip(remaining)
    encode = function(lambda tokens: encoder(tokens, training=False))
    while shard := list(itertools.islice(remaining, shard_size)):
        texts = [text for _, text in shard]
        order = np.argsort([-n for n in tokenizer.lengths(texts)], kind="stable")
        features = Features.of_texts(texts, tokenizer)
        vectors: list[Any] = [None] * len(shard)
        for rows, found in encode_batches(encode, features, order, batch_size):
            for row, each in zip(rows, found, strict=True):
                vectors[row] = each
        if len(shapes := {each.shape for each in vectors}) > 1:
            raise ValueError(
                f"The encoder must return one vector (E,) per text, got the shapes "
                f"{sorted(shapes)[:3]}. Use an encoder with pooling."
            )
        writer.append(shard, np.stack(vectors))
    return open_corpus(folder)


def _checked(documents: Iterable[tuple[str, str]] | Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if isinstance(documents, Mapping):
        documents = documents.items()
    seen: set[str] = set()
    for row, pair in enumerate(documents):
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not is_pair or not all(isinstance(part, str) for part in pair):
            raise TypeError(
                f"documents must be pairs of strings, an id and a text, got {pair!r} at row {row}."
            )
        name, text = pair
        if name in seen:
            raise ValueError(f"ids must be unique, got {name!r} again at row {row}.")
        seen.add(name)
        yield name, text


def open_corpus(folder: str | Path) -> Corpus:
    """Opens what `encode_corpus` has written, as far as it is complete.

    Raises:
        FileNotFoundError: If the folder has no corpus.
        ValueError: If a file is shorter than it was.
    """
    folder = Path(folder)
    if not (folder / "progress.json").exists():
        raise FileNotFoundError(
            f"{folder} must be a folder that encode_corpus has written, but it has no "
            "progress.json."
        )
    progress = _Progress(**json.loads((folder / "progress.json").read_text("utf-8")))
    _check_length(folder, progress)
    shape = (progress.rows, progress.size)
    vectors = np.memmap(folder / "vectors.f32", "<f4", "r", shape=shape)
    return Corpus(vectors, [name for name, _ in _read_lines(folder, progress)])


class _Progress(NamedTuple):
    fingerprint: str
    size: int = 0
    """The length of a vector."""
    rows: int = 0
    id_bytes: int = 0


class _Writer(BaseLogger):
    """Appends shards to a corpus.

    Args:
        folder: The corpus' folder.
        encoded_by: A digest of encoder and tokenizer.
    """

    def __init__(self, folder: Path, encoded_by: str) -> None:
        super().__init__()
        self.folder = folder
        self.progress = _Progress(encoded_by)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "progress.json").exists():
            found = _Progress(**json.loads((folder / "progress.json").read_text("utf-8")))
            if found.fingerprint != encoded_by:
                raise ValueError(
                    f"{folder} has vectors of another encoder or tokenizer. Use another folder, or "
                    "delete this one."
                )
            self.progress = found
            _check_length(folder, found)
        for name, size in _lengths(self.progress).items():
            with open(folder / name, "ab") as file:
                file.truncate(size)  # what a killed process had begun

    def skip(self, documents: Iterator[tuple[str, str]]) -> None:
        """Reads the documents that are encoded, which must be the same ones."""
        if self.progress.rows:
            self.logger.info("%d documents are in %s", self.progress.rows, self.folder)
            for row, known in enumerate(_read_lines(self.folder, self.progress)):
                given, text = next(documents, ("nothing", ""))
                if [given, _digest(text)] != known:
                    raise ValueError(
                        f"Document {row} must be {known[0]!r} with the text that was encoded to "
                        f"{self.folder}, got {given!r}: {text[:80]!r}. Give the same documents in "
                        "the same order, new ones last, or use another folder."
                    )

    def append(self, documents: list[tuple[str, str]], vectors: NDArray[np.float32]) -> None:
        """Writes a shard to the disk, then says so in `progress.json`."""
        ids = [name for name, _ in documents]
        size = self.progress.size or vectors.shape[-1]
        if vectors.ndim != 2 or vectors.shape[1] != size:
            raise ValueError(
                f"The encoder must return one vector (E,) per text, got the shape {vectors.shape} "
                f"for {len(ids)} texts."
            )
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"The vector of {ids[int(np.argmin(finite))]!r} contains NaN or infinity; its "
                "shard is not written. Look for such numbers in the encoder's weights."
            )
        lines = [json.dumps([name, _digest(text)]) for name, text in documents]
        data = "".join(f"{line}\n" for line in lines).encode()
        for name, content in (
            ("vectors.f32", vectors.astype("<f4").tobytes()),
            ("ids.jsonl", data),
        ):
            with open(self.folder / name, "ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        rows, id_bytes = self.progress.rows + len(ids), self.progress.id_bytes + len(data)
        self.progress = _Progress(self.progress.fingerprint, size, rows, id_bytes)
        with atomic_write(self.folder / "progress.json") as temporary:
            temporary.write_text(json.dumps(self.progress._asdict()), "utf-8")


def _lengths(progress: _Progress) -> dict[str, int]:
    return {"vectors.f32": 4 * progress.size * progress.rows, "ids.jsonl": progress.id_bytes}


def _check_length(folder: Path, progress: _Progress) -> None:
    for name, size in _lengths(progress).items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found < size:
            raise ValueError(
                f"{folder / name} must have {size} bytes, but it has {found}. Delete the folder "
                "and encode the documents again."
            )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_lines(folder: Path, progress: _Progress) -> Iterator[list[str]]:
    with open(folder / "ids.jsonl", encoding="utf-8") as file:
        for line in itertools.islice(file, progress.rows):
            yield json.loads(line)
