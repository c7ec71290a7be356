"""Measures retrieval runs against judgements, compares and combines them.

A *run* is `{query id: {document id: score}}`. Judgements (*qrels*) are `{query id: {document id:
grade}}` with integer grades, 0 for not relevant. Both are the structures that `ir_measures` takes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polus.files import atomic_write
from polus.host import as_number, did_you_mean
from polus.ir.index import DenseIndex
from polus.ir.search import as_run, top_k
from polus.ir.texts import as_texts

__all__ = [
    "MEASURES",
    "DenseIndex",
    "Difference",
    "Qrels",
    "Run",
    "as_run",
    "check_judged",
    "evaluate",
    "paired_bootstrap",
    "per_query",
    "ranked",
    "read_run",
    "reciprocal_rank_fusion",
    "split_by_training",
    "top_k",
    "write_run",
]

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]

MEASURES = ("nDCG@10", "MRR@10", "Recall@100")


def per_query(
    qrels: Qrels, run: Run, measures: Sequence[str] = MEASURES
) -> dict[str, dict[str, float]]:
    """Computes measures for each judged query: `{measure: {query id: value}}`.

    Args:
        qrels: The judgements.
        run: The run. A judged query without results counts as 0, and so does one whose judgements
            are an empty dict.
        measures: Names as in `ir_measures`: `nDCG@10`, `RR@10` or `MRR@10`, `R@100` or
            `Recall@100`, `P(rel=2)@5`, `AP`, ...

    Raises:
        ImportError: If `ir_measures` isn't installed.
        TypeError: If the measures are a single name, or the documents of a query aren't a dict.
        ValueError: If there is no such measure, no query of the run is judged, an id isn't a
            string, a grade isn't a whole number or a score isn't a number.
    """
    ir_measures = _ir_measures()
    measures = as_texts(measures, "measures")
    if not set(qrels) & set(run):
        raise ValueError(
            f"The run and the judgements must share queries, got {len(run)} in the run (such as "
            f"{next(iter(run), None)!r}) and {len(qrels)} judged ones (such as "
            f"{next(iter(qrels), None)!r}). Use the same ids in both, as strings."
        )
    judged, found = _plain(qrels, "judgements", _grade), _plain(run, "run", _score)
    values = {}
    for name in measures:
        measure = _parse(name)
        # Some of the libraries below ir_measures leave out queries without any judgement.
        values[name] = dict.fromkeys(judged, measure.DEFAULT)
        for each in ir_measures.iter_calc([measure], judged, found):
            values[name][each.query_id] = each.value
    return values


def check_judged(qrels: Qrels, queries: Collection[str]) -> None:
    """Raises a ValueError if there are judgements of queries that nobody will search for.

    They would count as 0.
    """
    others = [query for query in qrels if query not in queries]
    if others:
        raise ValueError(
            f"Judgements must be those of the {len(queries)} queries that are searched, but "
            f"{len(others)} others are judged, such as {others[0]!r}, and would count as 0. Use "
            "{query: qrels[query] for query in queries if query in qrels}."
        )


def _plain(
    given: Mapping[str, Mapping[str, Any]], where: str, convert: Callable[[Any], Any]
) -> dict[str, dict[str, Any]]:
    """Returns judgements or a run as plain numbers, and raises unless that is what they are."""
    plain = {}
    for query, documents in given.items():
        if not isinstance(documents, Mapping):
            raise TypeError(
                f"The documents of a query must be a dict with a number for each, got a "
                f"{type(documents).__name__} for {query!r} in the {where}. Use {{document id: 1}}."
            )
        for each in (query, *documents):
            if not isinstance(each, str):
                raise ValueError(
                    f"Ids must be strings, got {each!r} in the {where}. Use {str(each)!r}."
                )
        try:
            plain[query] = {each: convert(value) for each, value in documents.items()}
        except ValueError as error:
            raise ValueError(f"{error} for query {query!r} in the {where}.") from None
    return plain


def _grade(value: Any) -> int:
    number = as_number(value)
    if number is None or not number.is_integer():
        raise ValueError(f"Grades must be whole numbers, got {value!r}")
    return int(number)


def _score(value: Any) -> float:
    number = value if type(value) is float else as_number(value)
    if number is None or number != number:
        raise ValueError(f"Scores must be numbers, got {value!r}")
    return number


def evaluate(qrels: Qrels, run: Run, measures: Sequence[str] = MEASURES) -> dict[str, float]:
    """Computes the mean of each measure over the judged queries; see `per_query`."""
    return {
        name: float(np.mean(list(values.values())))
        for name, values in per_query(qrels, run, measures).items()
    }


def _ir_measures() -> Any:
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError("Evaluation needs ir_measures. Use: pip install ir_measures") from error
    return ir_measures


def _parse(name: str) -> Any:
    ir_measures = _ir_measures()
    try:
        measure = ir_measures.parse_measure(name)
    except (NameError, SyntaxError, ValueError) as error:
        cutoff = name.partition("@")[1:]
        # Sorted, so that nDCG, the usual spelling, wins over NDCG.
        names = ["".join([each, *cutoff]) for each in sorted(ir_measures.measures.registry)]
        usual = {each.lower(): each for each in names}
        hint = did_you_mean(usual.get(name.lower(), name), names)
        raise ValueError(f"No measure is named {name!r}. {hint}".rstrip()) from error
    try:
        measure.validate_params()
    except AssertionError as error:
        raise ValueError(
            f"The measure {name!r} lacks a cutoff, or has a parameter that it doesn't take. Use, "
            f"for example, {name.partition('(')[0].partition('@')[0] + '@10'!r}."
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
    """Tests whether run b is better than run a, by resampling the queries.

    The interval is the percentile interval of the mean difference. The p-value is that of the
    differences shifted to mean zero (Sakai 2006, "Evaluating evaluation metrics based on the
    bootstrap", section 3).

    Args:
        a: One measure for each query of run a: `per_query(...)["nDCG@10"]`.
        b: The same for run b, with the same queries.
        samples: The number of bootstrap samples.
        seed: The seed of the samples.

    Raises:
        ImportError: If `scipy` isn't installed.
        ValueError: If the runs have no or not the same queries, or a value is NaN.
    """
    if a.keys() != b.keys():
        raise ValueError(
            f"Both runs must have the same queries, got {len(a.keys() - b.keys())} only in a and "
            f"{len(b.keys() - a.keys())} only in b. Use the same judgements for both."
        )
    if not a:
        raise ValueError("The runs must have values for at least one query, got none.")
    try:
        import scipy.stats
    except ImportError as error:
        raise ImportError("paired_bootstrap needs SciPy. Use: pip install scipy") from error
    differences = np.array([b[query] - a[query] for query in a])
    if np.isnan(differences).any():
        query = list(a)[int(np.isnan(differences).argmax())]
        raise ValueError(
            f"Values must be numbers, got {a[query]} and {b[query]} for query {query!r}."
        )
    mean = float(differences.mean())
    if len(differences) == 1:  # SciPy wants two
        differences = np.repeat(differences, 2)
    found = scipy.stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=samples,
        batch=max(1, 10**6 // len(differences)),
        method="percentile",
        rng=seed,
    )
    low, high = found.confidence_interval
    p_value = np.mean(np.abs(found.bootstrap_distribution - mean) >= abs(mean) - 1e-12)
    return Difference(mean, float(low), float(high), float(p_value))


def split_by_training(qrels: Qrels, training_qrels: Qrels) -> tuple[Qrels, Qrels]:
    """Splits judgements by whether a relevant document of the query was a training positive.

    A trained retriever may have memorized the documents of the first kind of query. What it has
    learned about retrieval shows on the second kind, the *unseen* queries.

    Returns:
        The judgements of seen and of unseen queries.
    """
    trained = {document for query in training_qrels.values() for document in _relevant(query)}
    seen = {query for query, judged in qrels.items() if trained & _relevant(judged)}
    return (
        {query: qrels[query] for query in qrels if query in seen},
        {query: qrels[query] for query in qrels if query not in seen},
    )


def _relevant(judged: Mapping[str, int]) -> set[str]:
    return {document for document, grade in judged.items() if grade > 0}


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Returns the documents of a query, the best first.

    Raises:
        ValueError: If a score is NaN, which has no rank.
    """
    for document, score in scores.items():
        if score != score:
            raise ValueError(f"Scores must be numbers, got {score} for document {document!r}.")
    return sorted(scores, key=lambda document: -scores[document])


def reciprocal_rank_fusion(*runs: Run, constant: float = 60.0) -> dict[str, dict[str, float]]:
    """Fuses runs by the sum of `1 / (constant + rank)`, with ranks from 1.

    Cormack, Clarke and Büttcher 2009, whose constant is the default. The scores of the runs don't
    have to be comparable.
    """
    fused: dict[str, dict[str, float]] = {}
    for run in runs:
        for query, scores in run.items():
            target = fused.setdefault(query, {})
            for rank, document in enumerate(ranked(scores), start=1):
                target[document] = target.get(document, 0.0) + 1 / (constant + rank)
    return fused


def write_run(path: str | Path, run: Run, tag: str = "polus") -> None:
    """Writes a run in TREC's format: `query Q0 document rank score tag`.

    An interrupted call leaves an older file as it was.

    Raises:
        ValueError: If an id or the tag is empty or contains white space, which would be two fields,
            or a score is NaN.
    """
    lines = []
    for query, scores in run.items():
        for rank, document in enumerate(ranked(scores), start=1):
            score = float(scores[document])
            fields = [str(each) for each in (query, "Q0", document, rank, score, tag)]
            line = " ".join(fields)
            if line.split() != fields:
                raise ValueError(
                    f"Ids and tag must not be empty or contain white space, got the line {line!r}."
                )
            lines.append(f"{line}\n")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Reads a run in TREC's format; blank lines are skipped.

    Raises:
        ImportError: If `ir_measures` isn't installed.
        ValueError: If a line doesn't have six fields, its score isn't a number, or a query has a
            document twice.
    """
    run: dict[str, dict[str, float]] = {}
    count = 0
    with open(path, encoding="utf-8-sig") as file:  # some editors write a byte order mark
        try:
            for found in _ir_measures().read_trec_run(file):
                scores = run.setdefault(found.query_id, {})
                if found.doc_id in scores or found.score != found.score:
                    raise ValueError
                scores[found.doc_id] = found.score
                count += 1
        except ValueError as error:
            raise ValueError(
                f"Each line of {path} must be 'query Q0 document rank score tag', with each "
                f"document once for a query, but line {count + 1} (blank ones not counted) isn't."
            ) from error
    return run
