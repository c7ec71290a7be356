"""Searches texts by words (BM25), by vectors, and by both."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from polus.ir.evaluation import Qrels, Run, check_judged, evaluate, ranked, reciprocal_rank_fusion
from polus.ir.index import VectorIndex
from polus.ir.search import check_positive
from polus.ir.texts import check_ids, check_texts_by_id

Results = list[tuple[str, float]]


class Engine(Protocol):
    """Anything that searches."""

    def run(self, queries: Mapping[str, str], k: int = 100) -> dict[str, dict[str, float]]:
        """Returns the k best documents of each query `{id: text}` as a run."""
        ...


class BM25:
    """Search by words, computed by `bm25s` with its defaults.

    Args:
        documents: `{id: text}`.

    Raises:
        ImportError: If `bm25s` isn't installed.
        TypeError: If a text, of a document or later of a query, isn't a string.
        ValueError: If there are no documents, none has a word, or an id isn't a string.
    """

    def __init__(self, documents: Mapping[str, str]) -> None:
        check_texts_by_id(documents, "documents")
        if not documents:
            raise ValueError("documents must have at least one document, got none.")
        self.ids = list(documents)
        check_ids(self.ids, "ids of documents")
        self._library = _bm25s()
        self._engine = self._library.BM25()
        tokens = self._tokens(documents, "documents")
        if not tokens.vocab:
            raise ValueError(
                f"At least one of the {len(documents)} documents must have a word of two letters "
                "that isn't a stop word of bm25s, such as 'the'."
            )
        self._engine.index(tokens, show_progress=False)

    def run(self, queries: Mapping[str, str], k: int = 100) -> dict[str, dict[str, float]]:
        """Returns the documents, k at most, that share words with each query, as a run."""
        check_positive(k, "k")
        if not queries:
            return {}
        k = min(k, len(self.ids))
        tokens = self._tokens(queries, "queries")
        rows, scores = self._engine.retrieve(tokens, k=k, show_progress=False)
        return {
            query: {
                self.ids[row]: float(score)
                for row, score in zip(found, values, strict=True)
                if score > 0
            }
            for query, found, values in zip(queries, rows, scores, strict=True)
        }

    def _tokens(self, texts: Mapping[str, str], what: str) -> Any:
        check_texts_by_id(texts, what)
        return self._library.tokenize(list(texts.values()), show_progress=False)


class Dense:
    """Search by vectors.

    Args:
        index: The vectors of the documents: a `DenseIndex`, `ApproximateIndex` or `QuantizedIndex`.
        encode: Maps N texts of queries to `(N, E)`, such as a `TextEncoder`.
    """

    def __init__(self, index: VectorIndex, encode: Callable[[Sequence[str]], Any]) -> None:
        self.index = index
        self.encode = encode

    def run(self, queries: Mapping[str, str], k: int = 100) -> dict[str, dict[str, float]]:
        """Returns the k documents whose vectors have the largest inner products, as a run."""
        check_texts_by_id(queries, "queries")
        check_positive(k, "k")
        if not queries:
            return {}
        return self.index.run(self.encode(list(queries.values())), list(queries), k)


class Hybrid:
    """Fuses what several engines find.

    Without a weight the fusion is reciprocal rank fusion, which needs no tuning. With one, it is
    the weighted sum of the scores of two engines, each scaled to 0 to 1 among what that engine
    found for the query (Bruch et al. 2022, arXiv:2210.11934, section 4).

    Args:
        engines: A `BM25` and a `Dense`, or others; two if there is a weight.
        weight: The weight of the last engine, 0 to 1. The first one has the rest.
        depth: How many documents each engine contributes.

    Example:
        ```python
        search = Hybrid(BM25(documents), Dense(index, TextEncoder(encoder, tokenizer)))
        search.search("throw away a folder", k=3)
        ```
    """

    def __init__(self, *engines: Engine, weight: float | None = None, depth: int = 100) -> None:
        if not engines or (weight is not None and (len(engines) != 2 or not 0 <= weight <= 1)):
            raise ValueError(
                "Hybrid must have at least one engine, and exactly two with a weight from 0 to 1, "
                f"got {len(engines)} engines and weight={weight}."
            )
        for engine in engines:
            if isinstance(engine, VectorIndex):
                name = type(engine).__name__
                raise TypeError(
                    f"A {name} searches vectors, and Hybrid gives its engines texts. Write "
                    f"Dense({name}(...), TextEncoder(encoder, tokenizer))."
                )
        check_positive(depth, "depth")
        self.engines = engines
        self.weight = weight
        self.depth = depth

    def search(self, query: str, k: int = 10) -> Results:
        """Returns the k best documents of a query as `(id, score)`, the best first."""
        if not isinstance(query, str):
            raise TypeError(
                f"search takes one query, a string, got {query!r}. For several use "
                "run({id: text})."
            )
        return list(self.run({"": query}, k)[""].items())

    def run(self, queries: Mapping[str, str], k: int = 100) -> dict[str, dict[str, float]]:
        """Returns the k best documents of each query `{id: text}` as a run, the best first."""
        check_texts_by_id(queries, "queries")
        check_positive(k, "k")
        return _cut(self._fuse(self._found(queries, k), self.weight), queries, k)

    def tune(
        self, queries: Mapping[str, str], qrels: Qrels, measure: str = "nDCG@10"
    ) -> dict[float | None, float]:
        """Sets the weight that is best on judged queries, which shouldn't be those of a test.

        Returns:
            The measure of each weight tried: 0, 0.1 and so on to 1, and None for reciprocal rank
            fusion, which stays unless a weight is better.
        """
        check_texts_by_id(queries, "queries")
        check_judged(qrels, queries)
        found = self._found(queries, self.depth)
        weights = [None, *(np.arange(11) / 10).tolist()] if len(self.engines) == 2 else [None]
        values = {each: evaluate(qrels, self._fuse(found, each), [measure]) for each in weights}
        measured = {each: value[measure] for each, value in values.items()}
        self.weight = max(measured, key=lambda each: measured[each])
        return measured

    def _found(self, queries: Mapping[str, str], k: int) -> list[dict[str, dict[str, float]]]:
        return [engine.run(queries, max(k, self.depth)) for engine in self.engines]

    @staticmethod
    def _fuse(runs: Sequence[Run], weight: float | None) -> dict[str, dict[str, float]]:
        if weight is None:
            return reciprocal_rank_fusion(*runs)
        fused: dict[str, dict[str, float]] = {}
        for run, share in zip(runs, (1 - weight, weight), strict=True):
            for query, scores in run.items():
                target = fused.setdefault(query, {})
                for document, score in _scaled(scores).items():
                    target[document] = target.get(document, 0.0) + share * score
        return fused


def _scaled(scores: Mapping[str, float]) -> dict[str, float]:
    """Scales the scores of a query linearly, the lowest to 0 and the highest to 1."""
    low, high = min(scores.values(), default=0.0), max(scores.values(), default=0.0)
    return {
        document: (score - low) / (high - low) if high > low else 1.0
        for document, score in scores.items()
    }


def _cut(run: Run, queries: Iterable[str], k: int) -> dict[str, dict[str, float]]:
    found = {query: run.get(query, {}) for query in queries}
    return {
        query: {each: scores[each] for each in ranked(scores)[:k]}
        for query, scores in found.items()
    }


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("BM25 needs bm25s. Use: pip install bm25s") from error
    return bm25s
