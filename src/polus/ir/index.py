"""A searchable index of document vectors, saved as one file."""

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from polus.files import atomic_write
from polus.ir.search import Floats, Ints, as_run, as_vectors, top_k
from polus.ir.texts import check_ids

Array = np.ndarray[Any, Any]

_ROWS = 8192  # checked at a time, so that a check takes little memory


class VectorIndex:
    """Document ids, and the search of query vectors that indexes have in common.

    Attributes:
        ids: The document ids.
    """

    ids: list[str]

    def top_k(self, queries: ArrayLike, k: int) -> tuple[Floats, Ints]:
        """Returns scores `(Q, k)` of query vectors `(Q, E)`, best first, and the documents' rows.

        A row is -1 where nothing more was found. Of documents with equal scores, the one that is
        first in the index comes first.
        """
        raise NotImplementedError

    def search(self, queries: ArrayLike, k: int = 10) -> list[list[tuple[str, float]]]:
        """Returns the k best documents of each query vector `(Q, E)` as `(id, score)`.

        A score is an inner product.
        """
        return [
            [
                (self.ids[row], float(score))
                for score, row in zip(values, places, strict=True)
                if row >= 0
            ]
            for values, places in zip(*self.top_k(queries, k), strict=True)
        ]

    def run(
        self, queries: ArrayLike, query_ids: Sequence[str], k: int = 100
    ) -> dict[str, dict[str, float]]:
        """Returns the k best documents of each query as a run.

        Raises:
            ValueError: If there are not as many ids as queries, or they aren't different strings.
        """
        return as_run(query_ids, self.ids, *self.top_k(queries, k))


class DenseIndex(VectorIndex):
    """Document vectors and their ids: exact search, saved as one file.

    Args:
        vectors: `(D, E)`, an array or a tensor, kept as float32.
        ids: The D document ids: strings, all different.

    Raises:
        ValueError: If vectors and ids don't match, an id isn't a string or not unique, or a vector
            isn't finite.

    Example:
        >>> index = DenseIndex([[1.0, 0.0], [0.0, 1.0]], ["north", "east"])
        >>> index.search([[0.75, 0.25]], k=1)
        [[('north', 0.75)]]
    """

    def __init__(self, vectors: ArrayLike, ids: Sequence[str]) -> None:
        self.vectors: Floats = np.ascontiguousarray(as_vectors(vectors, "vectors"), np.float32)
        self.ids = list(ids)
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.ids):
            raise ValueError(
                "An index needs vectors (D, E) and D ids, got vectors of shape "
                f"{self.vectors.shape} and {len(self.ids)} ids."
            )
        check_ids(self.ids)
        for start in range(0, len(self.ids), _ROWS):
            rows = slice(start, start + _ROWS)
            check_finite(self.vectors[rows], self.ids[rows])

    def top_k(self, queries: ArrayLike, k: int) -> tuple[Floats, Ints]:
        return top_k(np.asarray(as_vectors(queries), np.float32), self.vectors, k)

    def save(self, path: str | Path) -> None:
        """Writes vectors, ids and a checksum to one safetensors file, which replaces an older one.

        An interrupted `save` leaves the older file as it was.
        """
        save_index(path, {"vectors": self.vectors}, self.ids)

    @classmethod
    def load(cls, path: str | Path) -> "DenseIndex":
        """Reads an index that `save` has written.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file isn't an index, or its checksum doesn't match.
        """
        arrays, ids, _ = load_index(path, {"vectors"}, "DenseIndex.save")
        return cls(arrays["vectors"], ids)

    def to_faiss(self) -> Any:
        """Returns a `faiss.IndexFlatIP` over the vectors, with row numbers as ids."""
        try:
            import faiss
        except ImportError as error:
            raise ImportError("to_faiss() needs FAISS. Use: pip install faiss-cpu") from error
        index = faiss.IndexFlatIP(self.vectors.shape[1])
        index.add(self.vectors)
        return index

    def to_usearch(self) -> Any:
        """Returns a `usearch.index.Index` by inner product, with row numbers as keys."""
        try:
            from usearch.index import Index
        except ImportError as error:
            raise ImportError("to_usearch() needs usearch. Use: pip install usearch") from error
        index = Index(ndim=self.vectors.shape[1], metric="ip", dtype="f32")
        index.add(np.arange(len(self.vectors)), self.vectors)
        return index


def check_finite(vectors: Floats, ids: Sequence[str]) -> None:
    """Raises a ValueError unless all vectors `(D, E)` are finite."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        bad = ids[int(np.argmin(finite))]
        raise ValueError(
            f"Vectors must be finite, but that of {bad!r} contains NaN or infinity. Look for such "
            "numbers in the encoder's weights, and at the text of that document."
        )


def save_index(
    path: str | Path, arrays: Mapping[str, Array], ids: Sequence[str], **facts: str
) -> None:
    """Writes arrays, ids, facts and a checksum to one safetensors file, by replacing it."""
    # Ids as a tensor: the header, where metadata is, can't be longer than 100 MB.
    written = {**arrays, "ids": np.frombuffer(json.dumps(list(ids)).encode(), np.uint8)}
    with atomic_write(path) as temporary:
        metadata = {**facts, "sha256": _checksum(written, facts)}
        save_file(written, str(temporary), metadata=metadata)


def load_index(
    path: str | Path, names: Set[str], writer: str
) -> tuple[dict[str, Array], list[str], dict[str, str]]:
    """Returns the arrays, the ids and the facts that `save_index` has written.

    Args:
        path: The file.
        names: The arrays that it must have, beside the ids.
        writer: The method that writes such files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, or damaged.
    """
    arrays, facts = {}, {}
    if Path(path).is_dir():
        raise ValueError(
            f"{path} must be a file written by {writer}, but it is a folder. "
            "ApproximateIndex.load reads a folder."
        )
    try:
        with safe_open(str(path), "numpy") as file:
            facts = dict(file.metadata() or {})
            if {*names, "ids"} <= set(file.keys()):
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged: {error}.") from error
    if not arrays or "sha256" not in facts:
        raise ValueError(f"{path} must be a file written by {writer}, but it isn't one.")
    expected = facts.pop("sha256")
    if _checksum(arrays, facts) != expected:
        raise ValueError(
            f"{path} is damaged: its checksum doesn't match. Restore it from a copy, or save the "
            "index again."
        )
    ids = json.loads(arrays.pop("ids").tobytes())
    return arrays, ids, facts


def _checksum(arrays: Mapping[str, Array], facts: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()
