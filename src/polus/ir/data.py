"""Where texts, queries and judgements come from, and how pairs become batches."""

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

Rows = NDArray[np.int64]


class Collection(NamedTuple):
    """A test collection: `{id: text}` of documents and of the judged queries, and judgements."""

    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: str | Path, split: str = "test") -> Collection:
    """Reads a folder in the layout of BEIR (Thakur et al. 2021, arXiv:2104.08663).

    That is `corpus.jsonl` and `queries.jsonl` (either may be gzipped) and `qrels/<split>.tsv`.
    A document's text is its title and its text; an unjudged query is left out.

    Raises:
        FileNotFoundError: there is no such split; the message names those that are there.
        ValueError: a query is judged that `queries.jsonl` does not have.
    """
    folder = Path(folder)
    path = folder / "qrels" / f"{split}.tsv"
    if not path.exists():
        found = sorted(each.stem for each in path.parent.glob("*.tsv"))
        raise FileNotFoundError(f"{path} is not there; splits found: {found or 'none'}.")
    qrels: dict[str, dict[str, int]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    documents = {  # a title may also be null
        each["_id"]: f"{each.get('title') or ''} {each['text']}".strip()
        for each in _json_lines(folder / "corpus.jsonl")
    }
    queries = {each["_id"]: each["text"] for each in _json_lines(folder / "queries.jsonl")}
    missing = [query for query in qrels if query not in queries]
    if missing:
        raise ValueError(
            f"{path} judges {len(missing)} queries that queries.jsonl does not have, such as "
            f"{missing[0]!r}; add them there or take them out of the judgements."
        )
    return Collection(documents, {query: queries[query] for query in qrels}, qrels)


def _json_lines(path: Path) -> list[dict[str, str]]:
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        with gzip.open(f"{path}.gz", "rt", encoding="utf-8") as file:
            text = file.read()
    # Not splitlines(): that breaks at Unicode line separators inside a text.
    return [json.loads(line) for line in text.split("\n") if line]


def relevant_rows(
    qrels: Mapping[str, Mapping[str, int]], query_ids: Sequence[str], document_ids: Sequence[str]
) -> list[Rows]:
    """For each query the row numbers of the documents judged relevant (graded above 0)."""
    row_of = {document: row for row, document in enumerate(document_ids)}
    return [
        np.array(
            [row_of[d] for d, grade in qrels.get(query, {}).items() if grade > 0 and d in row_of],
            np.int64,
        )
        for query in query_ids
    ]


class Features:
    """What the encoders take, by row number.

    Args:
        rows: an array with a row per text, a dict (any structure) of such arrays, or a function
            from row numbers (n,) to one; a function can tokenize just the texts it is asked for.
        count: the number of texts; needed for a function.
    """

    def __init__(self, rows: Any, count: int | None = None) -> None:
        self._rows = rows
        if count is None:
            if callable(rows):
                raise ValueError(
                    "Features(function) does not know how many texts there are; "
                    "write Features(function, count=len(texts))."
                )
            count = len(keras.tree.flatten(rows)[0])
        self.count = count

    @classmethod
    def of_texts(
        cls, texts: Sequence[str], tokenizer: Callable[[Sequence[str]], Any]
    ) -> "Features":
        """The tokens of texts, made when they are asked for."""
        return cls(lambda rows: tokenizer([texts[row] for row in rows]), len(texts))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Rows) -> Any:
        """The features of rows of any shape; theirs is that shape and then the text's own."""
        if callable(self._rows):
            flat = self._rows(rows.reshape(-1))
            return keras.tree.map_structure(lambda x: x.reshape(*rows.shape, *x.shape[1:]), flat)
        return keras.tree.map_structure(lambda x: x[rows], self._rows)


def as_features(features: Any) -> Features:
    """`features`, or `Features(features)` where they are something else."""
    return features if isinstance(features, Features) else Features(features)


class PairBatches(SeekableAdapter):
    """Batches of judged pairs for `EfficientDenseRetrievalTrainer`, shuffled anew each epoch.

    A batch is `(query, positive, [negatives,] {"positive_ids", "relevant_ids"[, "negative_ids"]})`.
    Ids are row numbers of documents; the trainer masks scores by them. The order of an epoch
    depends on `seed` and its number alone.

    Args:
        queries: features of Q queries; see `Features`.
        documents: features of D documents.
        relevant: for each query the rows of its relevant documents, as `relevant_rows` gives.
        batch_size: pairs per batch.
        seed: of the order.
        avoid_clashes: no document in a batch is relevant to another query of it, so that nothing
            has to be masked. A pair that would clash waits for a later batch of the epoch: none is
            dropped, and instead the last batches are smaller. Where most queries share documents
            that costs more than masking.

    Attributes:
        pairs: `(P, 2)` rows of query and positive document.
        negatives: `(P, k)` rows of each pair's hard negatives, -1 for none; None for no negatives.
            Replaced, it counts from the next epoch on; a checkpoint keeps it.
    """

    def __init__(
        self,
        queries: Any,
        documents: Any,
        relevant: Sequence[Any],
        batch_size: int = 32,
        *,
        seed: int = 0,
        avoid_clashes: bool = False,
    ) -> None:
        self.queries, self.documents = as_features(queries), as_features(documents)
        self.relevant = [np.asarray(rows, np.int64) for rows in relevant]
        pairs = [(query, row) for query, rows in enumerate(self.relevant) for row in rows]
        if len(self.relevant) != len(self.queries) or not pairs:
            raise ValueError(
                f"{len(self.queries)} queries with {len(self.relevant)} relevant lists and "
                f"{len(pairs)} pairs; give one list per query and at least one pair."
            )
        self.pairs: Rows = np.array(pairs, np.int64)
        if self.pairs[:, 1].max() >= len(self.documents) or self.pairs.min() < 0:
            raise ValueError(
                f"Relevant documents are numbered up to {self.pairs[:, 1].max()}, of "
                f"{len(self.documents)}; give row numbers from 0."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give a positive number of pairs.")
        self.batch_size = batch_size
        self.seed = seed
        self.avoid_clashes = avoid_clashes
        self.negatives: Rows | None = None
        most = max(len(rows) for rows in self.relevant)
        self._padded = np.full((len(self.relevant), most), -1, np.int64)
        for query, rows in enumerate(self.relevant):
            self._padded[query, : len(rows)] = rows
        super().__init__(self)
        if not avoid_clashes:
            self.num_batches = -(-len(self.pairs) // batch_size)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """The batches of an epoch, from batch `skip` on."""
        negatives = self.negatives
        for number, places in enumerate(self.order(epoch)):
            if number >= skip:
                yield self._batch(places, negatives)

    def get_state(self) -> dict[str, Any]:
        return {} if self.negatives is None else {"negatives": self.negatives}

    def set_state(self, state: dict[str, Any]) -> None:
        self.negatives = state.get("negatives")

    def order(self, epoch: int) -> Iterator[Rows]:
        """Which pairs make each batch of an epoch."""
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
        there: set[int] = set()
        unwelcome: set[int] = set()  # what is relevant to a query that is in
        for place, pair in enumerate(waiting):
            query, document = self.pairs[pair]
            own = self.relevant[query]
            if document not in unwelcome and there.isdisjoint(own.tolist()):
                chosen.append(place)
                there.add(int(document))
                unwelcome.update(own.tolist())
            if len(chosen) == self.batch_size:
                break
        return chosen

    def _batch(self, places: Rows, negatives: Rows | None) -> tuple[Any, ...]:
        queries, documents = self.pairs[places].T
        ids = {
            "positive_ids": documents.astype(np.int32),
            "relevant_ids": self._padded[queries].astype(np.int32),
        }
        parts = (self.queries[queries], self.documents[documents])
        if negatives is None:
            return *parts, ids
        rows = negatives[places]
        ids["negative_ids"] = rows.astype(np.int32)
        # A missing negative is masked by its id; any document may stand in its place.
        return *parts, self.documents[np.maximum(rows, 0)], ids
