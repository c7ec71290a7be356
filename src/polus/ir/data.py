"""Reads test collections, and makes training batches from judged pairs."""

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from polus.data import SeekableAdapter
from polus.data.fingerprint import checksum
from polus.ir.guide import Guide
from polus.ir.search import check_positive
from polus.ir.texts import as_texts, check_ids

Rows = NDArray[np.int64]


class Collection(NamedTuple):
    """A test collection: documents and judged queries as `{id: text}`, and judgements (qrels)."""

    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: str | Path, split: str = "test") -> Collection:
    """Reads a folder in the layout of BEIR (Thakur et al. 2021, arXiv:2104.08663).

    Such a folder has `corpus.jsonl` and `queries.jsonl` (either may be gzipped) and
    `qrels/<split>.tsv`. A document's title is prepended to its text. Queries without judgements
    are left out.

    Args:
        folder: The folder.
        split: The name of a file in `qrels`.

    Raises:
        FileNotFoundError: If there is no such split. The message lists the splits found.
        ValueError: If `queries.jsonl` lacks a judged query, the judgements have no header, a grade
            that isn't a whole number or two grades for a document, or as for `read_documents`.
    """
    folder = Path(folder)
    path = folder / "qrels" / f"{split}.tsv"
    if not path.exists():
        found = sorted(each.stem for each in path.parent.glob("*.tsv"))
        raise FileNotFoundError(f"{path} doesn't exist. Splits found: {found or 'none'}.")
    qrels = _read_qrels(path)
    documents = read_documents(folder)
    queries = {name: text for name, _, text in _json_lines(folder / "queries.jsonl")}
    missing = [query for query in qrels if query not in queries]
    if missing:
        raise ValueError(
            f"queries.jsonl must have every query judged in {path}, but {len(missing)} are "
            f"missing, such as {missing[0]!r}. Add them, or remove their judgements."
        )
    return Collection(documents, {query: queries[query] for query in qrels}, qrels)


def read_documents(folder: str | Path) -> dict[str, str]:
    """Reads `corpus.jsonl` or `corpus.jsonl.gz` in a folder in the layout of BEIR.

    A document's title, which may be null, is prepended to its text. An id that is a whole number
    becomes a string, as it is in the judgements.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line isn't a JSON object with `_id` and `text`, or an id has two texts.
    """
    return {
        name: f"{title} {text}".strip()
        for name, title, text in _json_lines(Path(folder) / "corpus.jsonl")
    }


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        if not {"query-id", "corpus-id", "score"}.issubset(rows.fieldnames or ()):
            raise ValueError(
                f"{path} must begin with a line of the names query-id, corpus-id and score, with "
                f"tabs between them, got {rows.fieldnames}. Add that line. (TREC's format, without "
                "names, is read by ir_measures.read_trec_qrels.)"
            )
        for row in rows:
            try:
                grade = float(row["score"])  # some files have 1.0
                if not grade.is_integer():
                    raise ValueError
            except (TypeError, ValueError):
                raise ValueError(
                    f"Grades must be whole numbers, got {row['score']!r} in line {rows.line_num} "
                    f"of {path}. Measures such as nDCG take no others."
                ) from None
            judged = qrels.setdefault(row["query-id"], {})
            if judged.setdefault(row["corpus-id"], int(grade)) != grade:
                raise ValueError(
                    f"A document must have one grade for a query, got another one for "
                    f"{row['corpus-id']!r} and {row['query-id']!r} in line {rows.line_num} of "
                    f"{path}. Remove one of them."
                )
    return qrels


def _json_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields id, title and text of each line; the title may be empty."""
    texts: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            name, title, text = found["_id"], found.get("title") or "", found["text"]
        except (ValueError, TypeError, KeyError, AttributeError):
            name = title = text = None
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if not all(isinstance(each, str) for each in (name, title, text)):
            raise ValueError(
                f'Line {number} of {path} must be a JSON object with strings "_id" and "text", '
                f"got {line.strip()!r:.100}."
            )
        if texts.setdefault(name, (title, text)) != (title, text):
            raise ValueError(
                f"Line {number} of {path} has another text for the id {name!r} of an earlier "
                "line. Remove one of them, or rename it."
            )
        yield name, title, text


def _lines(path: Path) -> Iterator[str]:
    # Lines end with "\n" alone: a text may have Unicode's line separators. Some editors write a
    # byte order mark.
    settings: Any = {"mode": "rt", "encoding": "utf-8-sig", "newline": "\n"}
    zipped = path.with_name(f"{path.name}.gz")
    if not path.exists() and not zipped.exists():
        raise FileNotFoundError(
            f"{path.parent} must have {path.name} or {zipped.name}, with a JSON object in each "
            "line, as in the layout of BEIR."
        )
    try:
        with open(path, **settings) if path.exists() else gzip.open(zipped, **settings) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, but it isn't: {error}.") from error


def relevant_rows(
    qrels: Mapping[str, Mapping[str, int]], query_ids: Sequence[str], document_ids: Sequence[str]
) -> list[Rows]:
    """Returns, for each query, the row numbers of the relevant documents (graded above 0).

    Documents and queries without a row are left out.

    Raises:
        ValueError: If an id of a row isn't a string, or not unique.
    """
    query_ids, document_ids = list(query_ids), list(document_ids)
    check_ids(query_ids, "query_ids")
    check_ids(document_ids, "document_ids")
    row_of = {document: row for row, document in enumerate(document_ids)}
    return [
        np.array(
            [row_of[d] for d, grade in qrels.get(query, {}).items() if grade > 0 and d in row_of],
            np.int64,
        )
        for query in query_ids
    ]


class Features:
    """The encoder inputs of some texts, indexed by row number.

    Args:
        rows: An array with a row per text, a structure (such as a dict) of such arrays, or a
            function that maps row numbers (n,) to one. A function can tokenize on demand.
        count: The number of texts. Required for a function.
    """

    def __init__(self, rows: object, count: int | None = None) -> None:
        self._rows = rows
        if count is None:
            if callable(rows):
                raise ValueError(
                    "Features of a function need the number of texts. Use Features(function, "
                    "count=len(texts))."
                )
            shapes = [np.shape(each) for each in keras.tree.flatten(rows)]
            if not all(shapes) or len({shape[0] for shape in shapes}) != 1:
                raise ValueError(
                    "Features must be arrays with a row for each text, got "
                    f"{type(rows).__name__} with the shapes {sorted(set(shapes))}. For texts use "
                    "Features.of_texts(texts, tokenizer)."
                )
            count = shapes[0][0]
        self.count = count

    @classmethod
    def of_texts(
        cls, texts: Sequence[str], tokenizer: Callable[[Sequence[str]], Any]
    ) -> "Features":
        """Returns the tokens of texts, tokenized on demand."""
        found = as_texts(texts)
        return cls(lambda rows: tokenizer([found[row] for row in rows]), len(found))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Rows) -> Any:
        """Returns the features of `rows`: their shape is that of `rows`, then that of one text."""
        if callable(self._rows):
            flat = self._rows(rows.reshape(-1))
            return keras.tree.map_structure(lambda x: x.reshape(*rows.shape, *x.shape[1:]), flat)
        return keras.tree.map_structure(lambda x: x[rows], self._rows)


def as_features(features: object) -> Features:
    """Returns `features` as `Features`."""
    return features if isinstance(features, Features) else Features(features)


class PairBatches(SeekableAdapter):
    """Batches of judged pairs for `EfficientDenseRetrievalTrainer`, reshuffled each epoch.

    A batch is `(query, positive, [negatives,] {"relevant_mask"})`, whose mask tells the trainer
    which documents are no negatives. The order of an epoch depends on nothing but `seed` and the
    epoch's number.

    Args:
        queries: The features of Q queries; see `Features`.
        documents: The features of D documents.
        relevant: The rows of the relevant documents of each query, as `relevant_rows` returns them.
        batch_size: The number of pairs per batch.
        seed: The seed of the order.
        avoid_clashes: Compose batches in which no document is relevant to another pair's query, so
            that nothing is masked. A pair that would clash is moved to a later batch of the epoch.
            No pair is dropped, but the last batches are smaller. If most queries share documents,
            this costs more than masking.
        share_negatives: Make masks for scores with `sharing_negatives()`, where the hard negatives
            of each query are negatives of all.
        guide: Also masks the negatives that another encoder scores above the positive.

    Attributes:
        pairs: `(P, 2)` rows of query and positive document.
        negatives: `(P, k)` rows of the hard negatives of each pair, -1 for padding, or None.
            Assigning it takes effect with the next epoch. Checkpoints save it.
        teacher_scores: `(P, 1 + k)` scores of the positive and the hard negatives of each pair, for
            distillation, or None. Assigned and saved likewise.
    """

    def __init__(
        self,
        queries: object,
        documents: object,
        relevant: Sequence[Any],
        batch_size: int = 32,
        *,
        seed: int = 0,
        avoid_clashes: bool = False,
        share_negatives: bool = False,
        guide: Guide | None = None,
    ) -> None:
        self.queries, self.documents = as_features(queries), as_features(documents)
        self.relevant = [_row_numbers(rows) for rows in relevant]
        pairs = [(query, row) for query, rows in enumerate(self.relevant) for row in rows]
        if len(self.relevant) != len(self.queries) or not pairs:
            raise ValueError(
                "relevant must have one list per query and at least one relevant document, got "
                f"{len(self.relevant)} lists for {len(self.queries)} queries and {len(pairs)} "
                "relevant documents."
            )
        self.pairs: Rows = np.array(pairs, np.int64)
        if self.pairs[:, 1].max() >= len(self.documents) or self.pairs.min() < 0:
            raise ValueError(
                f"relevant must hold row numbers from 0 to {len(self.documents) - 1}, got "
                f"{self.pairs[:, 1].min()} to {self.pairs[:, 1].max()}."
            )
        check_positive(batch_size, "batch_size")
        if guide is not None:
            guide.check(len(self.queries), len(self.documents))
        self.guide = guide
        self.batch_size, self.seed = batch_size, seed
        self.avoid_clashes, self.share_negatives = avoid_clashes, share_negatives
        self.negatives: Rows | None = None
        self.teacher_scores: NDArray[np.float32] | None = None
        self._checksum = checksum(self.pairs)
        super().__init__(self)
        if not avoid_clashes:
            self.num_batches = -(-len(self.pairs) // batch_size)

    def facts(self) -> dict[str, Any]:
        names = ("batch_size", "seed", "avoid_clashes", "share_negatives")
        found = {name: getattr(self, name) for name in names}
        if self.guide is not None:
            found["guide"] = self.guide.facts()
        return {
            **found,
            "number of pairs": len(self.pairs),
            "checksum of the pairs": self._checksum,
        }

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """Yields the batches of an epoch, from batch `skip` on.

        Raises:
            ValueError: If the shape of negatives or teacher's scores is wrong, or negatives aren't
                row numbers.
        """
        negatives, teacher = self._mined()
        for number, places in enumerate(self.order(epoch)):
            if number >= skip:
                *parts, extras = self._batch(places, negatives)
                if teacher is not None:
                    extras = {**extras, "teacher_scores": teacher[places]}
                yield *parts, extras

    def _mined(self) -> tuple[Rows | None, NDArray[np.float32] | None]:
        """Returns negatives and teacher's scores, which may have been assigned by anybody."""
        negatives = None if self.negatives is None else np.asarray(self.negatives)
        teacher = None if self.teacher_scores is None else np.asarray(self.teacher_scores)
        count, last = len(self.pairs), len(self.documents) - 1
        if negatives is not None and (
            negatives.ndim != 2
            or len(negatives) != count
            or negatives.dtype.kind not in "iu"
            or not -1 <= negatives.min(initial=-1) <= negatives.max(initial=-1) <= last
        ):
            raise ValueError(
                f"negatives must be rows ({count}, k) from 0 to {last}, or -1 for padding, got "
                f"{negatives.dtype} {negatives.shape} from {negatives.min(initial=0)} to "
                f"{negatives.max(initial=0)}."
            )
        wanted = count, 1 + (0 if negatives is None else negatives.shape[1])
        if teacher is not None and teacher.shape != wanted:
            raise ValueError(
                f"teacher_scores must be {wanted}, one for the positive and for each of the "
                f"negatives of a pair, got the shape {teacher.shape}. "
                "polus.ir.cross_encoder.score_candidates makes them."
            )
        return negatives, teacher

    def get_state(self) -> dict[str, Any]:
        state = {"negatives": self.negatives, "teacher_scores": self.teacher_scores}
        return {name: value for name, value in state.items() if value is not None}

    def set_state(self, state: dict[str, Any]) -> None:
        self.negatives = state.get("negatives")
        self.teacher_scores = state.get("teacher_scores")

    def order(self, epoch: int) -> Iterator[Rows]:
        """Yields the indices of the pairs in each batch of an epoch."""
        waiting = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        while len(waiting):
            chosen = (
                self._without_clash(waiting)
                if self.avoid_clashes
                else np.arange(min(self.batch_size, len(waiting)))
            )
            yield waiting[chosen]
            waiting = np.delete(waiting, chosen)

    def _without_clash(self, waiting: Rows) -> list[int]:
        chosen: list[int] = []
        present: set[int] = set()
        excluded: set[int] = set()  # relevant to a query already in the batch
        for place, pair in enumerate(waiting):
            query, document = self.pairs[pair]
            relevant = self.relevant[query]
            if document not in excluded and present.isdisjoint(relevant.tolist()):
                chosen.append(place)
                present.add(int(document))
                excluded.update(relevant.tolist())
            if len(chosen) == self.batch_size:
                break
        return chosen

    def _batch(self, places: Rows, negatives: Rows | None) -> tuple[Any, ...]:
        queries, documents = self.pairs[places].T
        hard = np.empty((len(places), 0), np.int64) if negatives is None else negatives[places]
        seen = np.tile(hard.reshape(-1), (len(places), 1)) if self.share_negatives else hard
        mask = self._relevant_mask(queries, documents, seen)
        if self.guide is not None:
            mask |= self.guide.mask(queries, documents, seen)
        extras = {"relevant_mask": mask}
        parts = (self.queries[queries], self.documents[documents])
        if negatives is None:
            return *parts, extras
        # Padding is masked, so any document may fill its place.
        return *parts, self.documents[np.maximum(hard, 0)], extras

    def _relevant_mask(self, queries: Rows, documents: Rows, hard: Rows) -> NDArray[np.bool_]:
        """Marks the relevant documents among the positives and hard negatives, and padding."""
        mask = np.empty((len(queries), len(documents) + hard.shape[1]), bool)
        is_relevant = np.zeros(len(self.documents), bool)
        for i, query in enumerate(queries):
            is_relevant[self.relevant[query]] = True
            mask[i, : len(documents)] = is_relevant[documents]
            mask[i, len(documents) :] = is_relevant[hard[i]] | (hard[i] < 0)
            is_relevant[self.relevant[query]] = False
        return mask


def _row_numbers(rows: object) -> Rows:
    found = np.asarray(rows)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(
            f"relevant must have a list of row numbers for each query, got {rows!r:.80}. Use "
            "relevant_rows(qrels, query_ids, document_ids)."
        )
    return found.astype(np.int64)
