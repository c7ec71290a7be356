"""An approximate index for millions of documents: a graph of neighbors (HNSW), with ids.

FOLDER/graph.usearch     or graph.faiss: the library's own file, which it opens by itself too
      /ids.json          the ids of the rows
      /index.json        the parameters, and checksums of both files

The folder appears when all of it is written.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from polus.files import atomic_write
from polus.ir.index import DenseIndex, VectorIndex, check_finite
from polus.ir.search import Floats, Ints, as_vectors, check_positive
from polus.ir.texts import check_ids

Library = Literal["usearch", "faiss"]

_ROWS = 65_536  # added at a time, so that memory-mapped vectors stay on the disk


class Parameters(NamedTuple):
    """Of a graph (Malkov and Yashunin 2016, HNSW, arXiv:1603.09320)."""

    library: Library = "usearch"
    size: int = 0
    """The length of a vector."""
    connectivity: int = 16
    """M: the number of neighbors that a vector is linked to."""
    expansion_add: int = 128
    """efConstruction: the number of candidates while a vector is added."""


class ApproximateIndex(VectorIndex):
    """Finds most of the nearest documents of a query, without comparing it with all of them.

    It is used as `DenseIndex` is. Search takes time about logarithmic in the number of documents,
    but building takes far longer than for `DenseIndex`, and the index has a copy of the vectors in
    memory. Of the k nearest documents some may be missing: `recall` measures it.

    Args:
        vectors: `(D, E)`, an array or a tensor; memory-mapped ones are read in blocks. Vectors of
            length one suit a graph best: with others, long ones hide the rest.
        ids: The D document ids: strings, all different.
        library: `"usearch"` or `"faiss"`.
        connectivity: The number of neighbors of each vector. More find more, and take more memory:
            about `8 * connectivity` bytes per vector.
        expansion_add: The number of candidates while a vector is added. More find more, and take
            longer to build.
        expansion_search: The number of candidates of a search. More find more, and take longer. It
            may be assigned at any time.
        threads: The number of threads, 0 for all cores. With one, equal input gives equal graphs.

    Raises:
        ImportError: If the library isn't installed.
        ValueError: If vectors and ids don't match, an id isn't a string or not unique, or a vector
            isn't finite.

    Example:
        ```python
        index = ApproximateIndex(corpus.vectors, corpus.ids)
        print(index.recall(sample, DenseIndex(corpus.vectors, corpus.ids)))
        index.save("graph")
        ```
    """

    def __init__(
        self,
        vectors: ArrayLike,
        ids: Sequence[str],
        *,
        library: Library = "usearch",
        connectivity: int = 16,
        expansion_add: int = 128,
        expansion_search: int = 64,
        threads: int = 0,
    ) -> None:
        array = as_vectors(vectors, "vectors")
        self.ids = list(ids)
        if array.ndim != 2 or len(array) != len(self.ids) or not self.ids:
            raise ValueError(
                "An index needs vectors (D, E) and D ids, at least one, got vectors of shape "
                f"{array.shape} and {len(self.ids)} ids."
            )
        check_ids(self.ids)
        self.parameters = Parameters(library, array.shape[1], connectivity, expansion_add)
        self.expansion_search = expansion_search
        self.threads = threads
        self._graph = _graph_of(library).empty(self.parameters)
        for start in range(0, len(self.ids), _ROWS):
            block = np.ascontiguousarray(array[start : start + _ROWS], np.float32)
            check_finite(block, self.ids[start : start + _ROWS])
            self._graph.add(start, block, threads)

    def top_k(self, queries: ArrayLike, k: int) -> tuple[Floats, Ints]:
        array = np.ascontiguousarray(as_vectors(queries), np.float32)
        check_positive(k, "k")
        if array.ndim != 2 or array.shape[1] != self.parameters.size:
            raise ValueError(
                f"Queries must have the shape (Q, {self.parameters.size}), got the shape "
                f"{array.shape}. Encode them with the documents' model; use vector[None] for a "
                "single one."
            )
        if not np.isfinite(array).all():
            raise ValueError(
                "Queries must be finite, got NaN or infinity. Look for such numbers in the "
                "encoder's weights."
            )
        k = min(int(k), len(self.ids))
        if not len(array):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        expansion = max(self.expansion_search, k)
        scores, rows = self._graph.search(array, k, expansion, self.threads)
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def recall(self, queries: ArrayLike, exact: DenseIndex, k: int = 10) -> float:
        """Returns the fraction of the k nearest documents that are found, a mean over queries.

        Args:
            queries: `(Q, E)`.
            exact: An index over the same documents.
            k: The number of documents.
        """
        found, expected = self.search(queries, k), exact.search(queries, k)
        shares = [
            len({name for name, _ in a} & {name for name, _ in b}) / len(b)
            for a, b in zip(found, expected, strict=True)
        ]
        return float(np.mean(shares))

    def save(self, folder: str | Path) -> None:
        """Writes a folder with the graph, the ids, the parameters and checksums.

        Raises:
            FileExistsError: If there is such a file or folder.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} exists. Delete it, or save to another folder.")
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            name = f"graph.{self.parameters.library}"
            self._graph.save(temporary / name)
            (temporary / "ids.json").write_text(json.dumps(self.ids), "utf-8")
            facts = {
                "parameters": self.parameters._asdict(),
                "expansion_search": self.expansion_search,
                "sha256": {each: _sha256(temporary / each) for each in (name, "ids.json")},
            }
            (temporary / "index.json").write_text(json.dumps(facts), "utf-8")

    @classmethod
    def load(
        cls, folder: str | Path, *, mapped: bool = False, threads: int = 0
    ) -> "ApproximateIndex":
        """Reads an index that `save` has written.

        Args:
            folder: The folder.
            mapped: Leave graph and vectors on the disk, and read what a search needs. Their
                checksum isn't compared then, which would read all of them. Only with usearch.
            threads: As for the class.

        Raises:
            FileNotFoundError: If there is no such folder.
            ImportError: If the library isn't installed.
            ValueError: If the folder isn't an index, or a checksum doesn't match.
        """
        folder = Path(folder)
        try:
            facts = json.loads((folder / "index.json").read_text("utf-8"))
            self = cls.__new__(cls)
            self.parameters = Parameters(**facts["parameters"])
            self.expansion_search, sums = int(facts["expansion_search"]), dict(facts["sha256"])
        except (KeyError, NotADirectoryError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / 'index.json'} must be written by ApproximateIndex.save, but it isn't."
            ) from error
        for name, expected in sums.items():
            if not (mapped and name.startswith("graph")) and _sha256(folder / name) != expected:
                raise ValueError(
                    f"{folder / name} is damaged: its checksum doesn't match. Restore it from a "
                    "copy, or save the index again."
                )
        self.ids = json.loads((folder / "ids.json").read_text("utf-8"))
        self.threads = threads
        library = self.parameters.library
        self._graph = _graph_of(library).load(folder / f"graph.{library}", mapped)
        return self


class _Graph(Protocol):
    """What a library does."""

    @classmethod
    def empty(cls, parameters: Parameters) -> "_Graph": ...
    @classmethod
    def load(cls, path: Path, mapped: bool) -> "_Graph": ...

    def add(self, first: int, vectors: Floats, threads: int) -> None: ...
    def search(
        self, queries: Floats, k: int, expansion: int, threads: int
    ) -> tuple[Floats, Ints]: ...
    def save(self, path: Path) -> None: ...


class _Usearch:
    def __init__(self, index: Any) -> None:
        self.index = index

    @classmethod
    def empty(cls, parameters: Parameters) -> "_Usearch":
        _, size, connectivity, expansion_add = parameters
        return cls(
            _usearch().Index(
                ndim=size,
                metric="ip",
                dtype="f32",
                connectivity=connectivity,
                expansion_add=expansion_add,
            )
        )

    @classmethod
    def load(cls, path: Path, mapped: bool) -> "_Usearch":
        return cls(_usearch().Index.restore(str(path), view=mapped))

    def add(self, first: int, vectors: Floats, threads: int) -> None:
        self.index.add(np.arange(first, first + len(vectors)), vectors, threads=threads)

    def search(self, queries: Floats, k: int, expansion: int, threads: int) -> tuple[Floats, Ints]:
        self.index.expansion_search = expansion
        found = self.index.search(queries, k, threads=threads)
        shape = (len(queries), k)
        scores = np.full(shape, -np.inf, np.float32)
        rows = np.full(shape, -1, np.int64)
        # Of a single query it returns one axis, and as many columns as it has found.
        distances, keys = np.atleast_2d(found.distances), np.atleast_2d(found.keys)
        counts = np.asarray(getattr(found, "counts", [keys.shape[1]]))
        there = np.arange(keys.shape[1]) < counts[:, None]
        scores[:, : keys.shape[1]][there] = 1 - distances[there]
        rows[:, : keys.shape[1]][there] = keys[there].astype(np.int64)
        return scores, rows

    def save(self, path: Path) -> None:
        self.index.save(str(path))


class _Faiss:
    def __init__(self, index: Any) -> None:
        self.index = index

    @classmethod
    def empty(cls, parameters: Parameters) -> "_Faiss":
        faiss = _faiss()
        _, size, connectivity, expansion_add = parameters
        index = faiss.IndexHNSWFlat(size, connectivity, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = expansion_add
        return cls(index)

    @classmethod
    def load(cls, path: Path, mapped: bool) -> "_Faiss":
        if mapped:
            raise ValueError("mapped=True is for indexes of usearch, but this one is of faiss.")
        return cls(_faiss().read_index(str(path)))

    def add(self, first: int, vectors: Floats, threads: int) -> None:
        with _faiss_threads(threads):
            self.index.add(vectors)

    def search(self, queries: Floats, k: int, expansion: int, threads: int) -> tuple[Floats, Ints]:
        self.index.hnsw.efSearch = expansion
        with _faiss_threads(threads):
            scores, rows = self.index.search(queries, k)
        return scores, rows

    def save(self, path: Path) -> None:
        _faiss().write_index(self.index, str(path))


def _graph_of(library: str) -> type[_Graph]:
    graphs: dict[str, type[_Graph]] = {"usearch": _Usearch, "faiss": _Faiss}
    if library not in graphs:
        raise ValueError(f"library must be one of {list(graphs)}, got {library!r}.")
    return graphs[library]


def _usearch() -> Any:
    try:
        from usearch import index
    except ImportError as error:
        raise ImportError(
            "This ApproximateIndex needs usearch. Use: pip install usearch"
        ) from error
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "This ApproximateIndex needs FAISS. Use: pip install faiss-cpu"
        ) from error
    return faiss


@contextlib.contextmanager
def _faiss_threads(count: int) -> Iterator[None]:
    """Sets the number of threads, which FAISS has for the whole process, and sets it back."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or os.cpu_count() or 1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
