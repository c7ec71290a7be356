"""What a retrieval system found, and how good that is against judgements.

A *run* is `{query id: {document id: score}}`, judgements (*qrels*) are `{query id: {document id:
grade}}` with integer grades, 0 for not relevant: the two structures that `ir_measures` takes.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

MEASURES = ("nDCG@10", "MRR@10", "Recall@100")


def top_k(
    queries: Any,
    documents: Any,
    k: int,
    *,
    similarity: Callable[[Any, Any], Any] | None = None,
    block_size: int = 8192,
) -> tuple[Floats, Ints]:
    """The k best documents of each query, exactly, without ever holding all the scores.

    Args:
        queries: `(Q, E)` float32, or for late interaction the pair `(vectors (Q, L, E), mask
            (Q, L))`.
        documents: `(D, E)` float32, or such a pair `(D, M, E)`, `(D, M)`.
        k: how many; D where there are fewer documents.
        similarity: `similarity` of one of `polus.ir.scores`; the inner product if not given.
        block_size: documents scored at a time: `Q * block_size` floats are held. For late
            interaction, whose documents take `L * M` floats each, it is that much smaller.

    Returns:
        Scores `(Q, k)` in falling order and row numbers of documents `(Q, k)`.
    """
    queries, documents = _arrays(queries), _arrays(documents)
    first_queries, first_documents = _leaf(queries), _leaf(documents)
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least one document.")
    for name, shape in (("Queries", first_queries.shape), ("Documents", first_documents.shape)):
        if len(shape) < 2:
            raise ValueError(
                f"{name} have the shape {shape}; give a row for each: vector[None] for just one."
            )
    if first_queries.shape[-1] != first_documents.shape[-1]:
        raise ValueError(
            f"Queries have {first_queries.shape[-1]} numbers and documents "
            f"{first_documents.shape[-1]}; represent both by the same model."
        )
    count = len(first_documents)
    if isinstance(queries, tuple) and isinstance(documents, tuple):
        block_size = max(1, block_size // (queries[0].shape[1] * documents[0].shape[1]))
    scores = np.empty((len(first_queries), 0), np.float32)
    rows = np.empty((len(first_queries), 0), np.int64)
    for start in range(0, count, block_size):
        block = _rows(documents, slice(start, start + block_size))
        if similarity is None:
            found = queries @ block.T
        else:
            tensors = keras.tree.map_structure(ops.convert_to_tensor, (queries, block))
            found = ops.convert_to_numpy(similarity(*tensors))
        if np.isnan(found).any():
            raise ValueError(
                f"Of the scores of documents {start} to {start + found.shape[1] - 1} some are NaN; "
                "look for NaN in the representations of queries and documents."
            )
        places = np.arange(start, start + found.shape[1])
        scores = np.concatenate([scores, found], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(places, found.shape)], axis=1)
        if scores.shape[1] > k:
            best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            scores = np.take_along_axis(scores, best, axis=1)
            rows = np.take_along_axis(rows, best, axis=1)
    order = np.lexsort((rows, -scores))  # of equal scores the earlier document comes first
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _arrays(features: Any) -> Any:
    if isinstance(features, tuple):
        return tuple(_arrays(each) for each in features)
    return ops.convert_to_numpy(features) if ops.is_tensor(features) else np.asarray(features)


def _leaf(features: Any) -> Any:
    return features[0] if isinstance(features, tuple) else features


def _rows(features: Any, rows: slice) -> Any:
    if isinstance(features, tuple):
        return tuple(each[rows] for each in features)
    return features[rows]


def as_run(
    query_ids: Sequence[str], document_ids: Sequence[str], scores: ArrayLike, rows: ArrayLike
) -> dict[str, dict[str, float]]:
    """A run out of what `top_k` returns."""
    return {
        query: {document_ids[row]: float(score) for score, row in zip(values, places, strict=True)}
        for query, values, places in zip(
            query_ids, np.asarray(scores), np.asarray(rows), strict=True
        )
    }


def per_query(
    qrels: Qrels, run: Run, measures: Sequence[str] = MEASURES
) -> dict[str, dict[str, float]]:
    """Each measure of each judged query: `{measure: {query id: value}}`.

    A query without results counts as 0. Measures are named as in `ir_measures` (`nDCG@10`,
    `RR@10` or `MRR@10`, `R@100` or `Recall@100`, `P(rel=2)@5`, `AP`, ...).

    Raises:
        ImportError: `ir_measures` is not installed.
        ValueError: no such measure, no query of the run is judged, or an id is no string.
    """
    ir_measures = _ir_measures()
    if not set(qrels) & set(run):
        raise ValueError(
            f"None of the {len(run)} queries of the run (such as {next(iter(run), None)!r}) is "
            f"among the {len(qrels)} judged ones (such as {next(iter(qrels), None)!r}); "
            "use the same ids, as strings."
        )
    for where, given in (("Among the judgements", qrels), ("In the run", run)):
        for query, documents in given.items():
            for each in (query, *documents):
                if not isinstance(each, str):
                    raise ValueError(f"{where} is the id {each!r}; write {str(each)!r}.")
    return {
        name: {
            each.query_id: each.value for each in ir_measures.iter_calc([_parse(name)], qrels, run)
        }
        for name in measures
    }


def evaluate(qrels: Qrels, run: Run, measures: Sequence[str] = MEASURES) -> dict[str, float]:
    """The mean of each measure over the judged queries; see `per_query`."""
    return {
        name: float(np.mean(list(values.values())))
        for name, values in per_query(qrels, run, measures).items()
    }


def _ir_measures() -> Any:
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError("Evaluation needs ir_measures: pip install polus[ir]") from error
    return ir_measures


def _parse(name: str) -> Any:
    ir_measures = _ir_measures()
    try:
        measure = ir_measures.parse_measure(name)
    except (NameError, SyntaxError, ValueError) as error:
        stem, *rest = name.split("@")
        # Sorted, so that of NDCG and nDCG the latter, its usual spelling, stays.
        known = {each.lower(): each for each in sorted(ir_measures.measures.registry)}
        close = difflib.get_close_matches(stem.lower(), list(known), 1)
        hint = f" Did you mean {'@'.join([known[close[0]], *rest])!r}?" if close else ""
        raise ValueError(f"No measure is called {name!r}.{hint}") from error
    try:
        measure.validate_params()
    except AssertionError as error:
        raise ValueError(
            f"Measure {name!r} lacks a cutoff, or has a parameter that it does not take; "
            f"write {name.partition('(')[0].partition('@')[0] + '@10'!r}, for example."
        ) from error
    return measure


class Difference(NamedTuple):
    """Run b minus run a: the mean difference, its 95% interval, and a two-sided p-value."""

    mean: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    a: Mapping[str, float], b: Mapping[str, float], samples: int = 10_000, seed: int = 0
) -> Difference:
    """Whether run b is better than run a, by resampling queries.

    Percentile interval of the mean difference, and the p-value of the differences shifted to mean
    zero (Sakai 2006, "Evaluating evaluation metrics based on the bootstrap", section 3).

    Args:
        a: one measure of each query under run a: `per_query(...)["nDCG@10"]`.
        b: the same under run b, of the same queries.
        samples: how many times the queries are drawn anew.
        seed: of the draws.
    """
    if a.keys() != b.keys():
        raise ValueError(
            f"The runs are measured on different queries: {len(a.keys() - b.keys())} only in a, "
            f"{len(b.keys() - a.keys())} only in b; use the same judgements for both."
        )
    if not a:
        raise ValueError("The runs are measured on no query; give the values of at least one.")
    differences = np.array([b[query] - a[query] for query in a])
    rng = np.random.default_rng(seed)
    means = np.array([rng.choice(differences, len(differences)).mean() for _ in range(samples)])
    mean = float(differences.mean())
    low, high = np.quantile(means, [0.025, 0.975])
    p_value = np.mean(np.abs(means - mean) >= abs(mean) - 1e-12)
    return Difference(mean, float(low), float(high), float(p_value))


def split_by_training(qrels: Qrels, training_qrels: Qrels) -> tuple[Qrels, Qrels]:
    """Judgements of queries with a relevant document that was a training positive, and of the rest.

    A trained retriever can know the first kind of query's documents by heart. What it has learned
    about retrieval shows on the second, the *unseen*.
    """
    trained = {document for query in training_qrels.values() for document in _relevant(query)}
    seen = {query for query, judged in qrels.items() if trained & _relevant(judged)}
    return (
        {query: qrels[query] for query in qrels if query in seen},
        {query: qrels[query] for query in qrels if query not in seen},
    )


def _relevant(judged: Mapping[str, int]) -> set[str]:
    return {document for document, grade in judged.items() if grade > 0}


def reciprocal_rank_fusion(*runs: Run, constant: float = 60.0) -> dict[str, dict[str, float]]:
    """One run out of several: the sum of `1 / (constant + rank)`, ranks from 1.

    Cormack, Clarke and Büttcher 2009, whose constant is the default. Scores of different systems
    need not be comparable.
    """
    fused: dict[str, dict[str, float]] = {}
    for run in runs:
        for query, scores in run.items():
            target = fused.setdefault(query, {})
            ranked = sorted(scores, key=lambda document: -scores[document])
            for rank, document in enumerate(ranked, start=1):
                target[document] = target.get(document, 0.0) + 1 / (constant + rank)
    return fused


def write_run(path: str | Path, run: Run, tag: str = "polus") -> None:
    """Writes a run in the format of TREC: `query Q0 document rank score tag`.

    Raises:
        ValueError: an id or the tag is empty or has a space in it, which would be two fields.
    """
    lines = []
    for query, scores in run.items():
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        for rank, (document, score) in enumerate(ranked, start=1):
            fields = [str(each) for each in (query, "Q0", document, rank, float(score), tag)]
            line = " ".join(fields)
            if line.split() != fields:
                raise ValueError(
                    f"{line!r} could not be read; give ids and a tag without white space."
                )
            lines.append(f"{line}\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Reads a run in the format of TREC; blank lines are left out.

    Raises:
        ValueError: a line has other than six fields, or its score is no number.
    """
    run: dict[str, dict[str, float]] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                query, _, document, _, score, _ = line.split()
                run.setdefault(query, {})[document] = float(score)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: {line.strip()!r} is not "
                    "'query Q0 document rank score tag'."
                ) from error
    return run


class DenseIndex:
    """Document vectors and their ids: exact search, saved as one file.

    Args:
        vectors: `(D, E)`, an array or a tensor; kept as float32.
        ids: D document ids, strings, each another.

    Example:
        >>> index = DenseIndex([[1.0, 0.0], [0.0, 1.0]], ["north", "east"])
        >>> index.search([[0.9, 0.1]], k=1)
        [[('north', 0.8999999761581421)]]
    """

    def __init__(self, vectors: Any, ids: Sequence[str]) -> None:
        self.vectors: Floats = np.ascontiguousarray(_arrays(vectors), np.float32)
        self.ids = list(ids)
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.ids):
            raise ValueError(
                f"Vectors of shape {self.vectors.shape} with {len(self.ids)} ids; "
                "give (D, E) vectors and D ids."
            )
        met: set[str] = set()
        for each in self.ids:
            if not isinstance(each, str):
                raise ValueError(f"{each!r} is among the ids; write {str(each)!r}.")
            if each in met:
                raise ValueError(f"{each!r} stands for two documents; give each an id of its own.")
            met.add(each)

    def search(self, queries: Any, k: int = 10) -> list[list[tuple[str, float]]]:
        """For each of the query vectors `(Q, E)` its k best documents, `(id, inner product)`."""
        scores, rows = self._top_k(queries, k)
        return [
            [(self.ids[row], float(score)) for score, row in zip(values, places, strict=True)]
            for values, places in zip(scores, rows, strict=True)
        ]

    def run(
        self, queries: Any, query_ids: Sequence[str], k: int = 100
    ) -> dict[str, dict[str, float]]:
        """The k best documents of each query as a run."""
        return as_run(query_ids, self.ids, *self._top_k(queries, k))

    def _top_k(self, queries: Any, k: int) -> tuple[Floats, Ints]:
        return top_k(np.asarray(_arrays(queries), np.float32), self.vectors, k)

    def save(self, path: str | Path) -> None:
        """Writes vectors and ids to one safetensors file."""
        save_file({"vectors": self.vectors}, str(path), metadata={"ids": json.dumps(self.ids)})

    @classmethod
    def load(cls, path: str | Path) -> "DenseIndex":
        """Reads what `save` has written."""
        with safe_open(str(path), "numpy") as file:
            return cls(file.get_tensor("vectors"), json.loads(file.metadata()["ids"]))

    def to_faiss(self) -> Any:
        """A `faiss.IndexFlatIP` over the vectors, row numbers as ids; needs `faiss-cpu`."""
        try:
            import faiss  # type: ignore[import-not-found]  # optional
        except ImportError as error:
            raise ImportError("to_faiss() needs FAISS: pip install faiss-cpu") from error
        index = faiss.IndexFlatIP(self.vectors.shape[1])
        index.add(self.vectors)
        return index

    def to_usearch(self) -> Any:
        """A `usearch.index.Index` by inner product, row numbers as keys; needs `usearch`."""
        try:
            from usearch.index import Index  # type: ignore[import-not-found]  # optional
        except ImportError as error:
            raise ImportError("to_usearch() needs usearch: pip install usearch") from error
        index = Index(ndim=self.vectors.shape[1], metric="ip", dtype="f32")
        index.add(np.arange(len(self.vectors)), self.vectors)
        return index
