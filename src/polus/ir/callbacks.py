"""Callbacks for retrieval training: validation by search, and hard-negative mining."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from polus.callbacks.base import Callback
from polus.host import to_host
from polus.ir.data import Features, PairBatches, Rows, as_features
from polus.ir.encoding import encode, stack_vectors
from polus.ir.evaluation import MEASURES, check_judged, evaluate
from polus.ir.scores import InBatchScores, Similarity, dot_product
from polus.ir.search import as_run, check_positive, take_rows, to_arrays, top_k
from polus.ir.texts import as_texts, check_ids

_QUERIES = 1024  # mined at a time


class _Search(Callback):
    """Base of the callbacks that search with the current model."""

    similarity: Similarity | None
    batch_size: int

    @property
    def _trainer(self) -> Any:
        """The trainer, an `EfficientDenseRetrievalTrainer`."""
        return self.coordinator.trainer

    def _represented(self, queries: Any, documents: Any) -> tuple[Any, Any]:
        trainer = self._trainer
        return (
            stack_vectors(encode(trainer.represent_queries, as_features(queries), self.batch_size)),
            stack_vectors(
                encode(trainer.represent_documents, as_features(documents), self.batch_size)
            ),
        )

    def _similarity(self) -> Similarity:
        if self.similarity is not None:
            return self.similarity
        scores = self._trainer.compute_scores
        if not isinstance(scores, InBatchScores):
            raise ValueError(
                f"{type(self).__name__} needs a similarity if compute_scores isn't one of "
                f"polus.ir.scores, got compute_scores={scores!r}. Use {type(self).__name__}(..., "
                "similarity=polus.ir.scores.cosine.similarity)."
            )
        return scores.similarity


class RetrievalValidation(_Search):
    """Evaluates search with the current model after each epoch, and keeps the best weights.

    It evaluates before the first epoch as well, so that training which makes the model worse is
    undone. The results of an epoch are recorded as those of `ValidationDataCallback` are.

    Args:
        queries: The features of the judged queries; see `polus.ir.data.Features`.
        documents: The features of all documents.
        qrels: The judgements, `{query id: {document id: grade}}`, of these queries alone.
        query_ids: The ids of `queries`, in order.
        document_ids: The ids of `documents`, in order.
        measures: The measures, as for `polus.ir.evaluation.evaluate`.
        monitor: The measure by which the best model is chosen.
        restore_best: Whether to restore the weights of the best model when training ends, including
            a learned temperature and batch statistics.
        name: The name of this validation set.
        every_epochs: Evaluate after every n-th epoch.
        depth: The number of documents retrieved.
        similarity: As for `polus.ir.search.top_k`. Defaults to that of the trainer's
            `compute_scores`.
        batch_size: The number of texts encoded at a time.

    Attributes:
        best: The best value so far.
        best_epoch: Its epoch, counted from 0; -1 is the model before training.
    """

    def __init__(
        self,
        queries: object,
        documents: object,
        qrels: Mapping[str, Mapping[str, int]],
        query_ids: Sequence[str],
        document_ids: Sequence[str],
        measures: Sequence[str] = MEASURES,
        monitor: str = "nDCG@10",
        restore_best: bool = True,
        name: str = "validation",
        every_epochs: int = 1,
        depth: int = 100,
        similarity: Similarity | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        measures = as_texts(measures, "measures")
        if monitor not in measures:
            raise ValueError(f"monitor must be one of the measures {measures}, got {monitor!r}.")
        check_positive(every_epochs, "every_epochs")
        check_positive(depth, "depth")
        check_positive(batch_size, "batch_size")
        self.queries, self.documents = as_features(queries), as_features(documents)
        self.query_ids = _ids_of(self.queries, query_ids, "query_ids")
        check_judged(qrels, set(self.query_ids))
        self.qrels = qrels
        self.document_ids = _ids_of(self.documents, document_ids, "document_ids")
        self.measures, self.monitor, self.restore_best = measures, monitor, restore_best
        self.name, self.every_epochs, self.depth = name, every_epochs, depth
        self.similarity, self.batch_size = similarity, batch_size
        self.best = -np.inf
        self.best_epoch = -1
        self._weights: list[Any] = []

    def on_epoch_begin(self, epoch: int) -> None:
        # Not in on_train_begin: a resumed run has restored its best by now.
        if epoch == 0 and self.best == -np.inf:
            data = self.coordinator.run.reader.current
            assert data is not None  # an epoch has begun
            self._trainer.build_on(data.example)  # so that changing_weights is known
            self._keep_if_best(evaluate(self.qrels, self.run(), self.measures), epoch=-1)

    def on_epoch_end(self, epoch: int) -> None:
        if (epoch + 1) % self.every_epochs:
            return
        found = evaluate(self.qrels, self.run(), self.measures)
        self.coordinator.run.validated(self.name, dict(found))
        self._keep_if_best(found, epoch)

    def _keep_if_best(self, found: Mapping[str, float], epoch: int) -> None:
        if found[self.monitor] > self.best:
            self.best, self.best_epoch = found[self.monitor], epoch
            weights = self._trainer.changing_weights
            self._weights = [np.array(to_host(weight)) for weight in weights]

    def run(self) -> dict[str, dict[str, float]]:
        """Returns the run of the current model."""
        queries, documents = self._represented(self.queries, self.documents)
        found = top_k(queries, documents, self.depth, similarity=self._similarity())
        return as_run(self.query_ids, self.document_ids, *found)

    def on_train_end(self) -> None:
        if self.restore_best and self._weights:
            weights = self._trainer.changing_weights
            for weight, value in zip(weights, self._weights, strict=True):
                weight.assign(value)

    def get_state(self) -> dict[str, Any]:
        weights = {f"weight_{i}": value for i, value in enumerate(self._weights)}
        return {"best": float(self.best), "best_epoch": self.best_epoch, **weights}

    def set_state(self, state: dict[str, Any]) -> None:
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self._weights = [state[f"weight_{i}"] for i in range(len(state) - 2)]


class HardNegativeMining(_Search):
    """Mines hard negatives with the current model: high-ranked documents not judged relevant.

    Searches all documents exactly, before the first epoch and after every n-th one.

    Args:
        batches: The batches, whose `negatives` are assigned.
        k: The number of hard negatives per pair. If there are fewer, the rest is masked.
        every_epochs: Mine after every n-th epoch.
        ranks: The first and last rank to take, counted from 0 without relevant documents, the last
            excluded.
        relative_margin: Take only documents that score below this fraction of the positive's score;
            one that scores higher is probably relevant but unjudged. 0.95 as in Moreira et al.
            2024, NV-Retriever, arXiv:2407.15831, section 3; without it, hard negatives hurt. None
            for no limit. If the positive's score is negative, the distance to it is the same.
        similarity: As for `polus.ir.search.top_k`. Defaults to that of the trainer's
            `compute_scores`.
        batch_size: The number of texts encoded at a time.
    """

    def __init__(
        self,
        batches: PairBatches,
        k: int = 1,
        every_epochs: int = 1,
        ranks: tuple[int, int] = (0, 100),
        relative_margin: float | None = 0.95,
        similarity: Similarity | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        if not 0 <= ranks[0] < ranks[1] or k < 1:
            raise ValueError(
                "k must be positive and ranks must be (first, last) with 0 <= first < last, got "
                f"k={k} and ranks={ranks}. Use, for example, ranks=(0, 100)."
            )
        check_positive(every_epochs, "every_epochs")
        check_positive(batch_size, "batch_size")
        self.batches = batches
        self.k, self.every_epochs, self.ranks = k, every_epochs, ranks
        self.relative_margin = relative_margin
        self.similarity, self.batch_size = similarity, batch_size

    def on_train_begin(self) -> None:
        self._mine()

    def on_epoch_end(self, epoch: int) -> None:
        # Not in on_epoch_begin: a checkpoint at the epoch's end must save the new negatives. After
        # the last epoch too, for a run that is resumed with more epochs.
        if (epoch + 1) % self.every_epochs == 0:
            self._mine()

    def _mine(self) -> None:
        if self.batches.teacher_scores is not None:
            raise ValueError(
                "teacher_scores are of the negatives that they were computed for, which mining "
                "replaces. Leave out HardNegativeMining, or teacher_scores."
            )
        represented = self._represented(self.batches.queries, self.batches.documents)
        self.batches.negatives = mine(
            *represented,
            self.batches.relevant,
            self.batches.pairs,
            self.k,
            self.ranks,
            self.relative_margin,
            self._similarity(),
        )
        found = self.batches.negatives >= 0
        self.logger.info("Mined %d hard negatives for %d pairs", found.sum(), len(found))


def mine(
    queries: Any,
    documents: Any,
    relevant: Sequence[Rows],
    pairs: Rows,
    k: int,
    ranks: tuple[int, int] = (0, 100),
    relative_margin: float | None = 0.95,
    similarity: Similarity = dot_product.similarity,
) -> Rows:
    """Returns hard negatives `(P, k)` for pairs `(P, 2)`, padded with -1.

    See `HardNegativeMining`. `queries` and `documents` are representations, as for `top_k`.
    """
    queries, documents = to_arrays(queries), to_arrays(documents)
    negatives = np.full((len(pairs), k), -1, np.int64)
    depth = ranks[1] + max(len(rows) for rows in relevant)
    by_query = np.argsort(pairs[:, 0], kind="stable")
    for start in range(0, len(relevant), _QUERIES):
        block = range(start, min(start + _QUERIES, len(relevant)))
        first, last = np.searchsorted(pairs[by_query, 0], [block.start, block.stop])
        places = by_query[first:last]
        scores, rows = top_k(
            take_rows(queries, slice(start, block.stop)), documents, depth, similarity=similarity
        )
        limits = np.full(len(places), np.inf)
        if relative_margin is not None:
            positive = _pair_scores(queries, documents, pairs[places], similarity)
            limits = positive - (1 - relative_margin) * np.abs(positive)
        for place, limit in zip(places, limits, strict=True):
            query = pairs[place, 0]
            unjudged = ~np.isin(rows[query - start], relevant[query])
            window = np.flatnonzero(unjudged)[slice(*ranks)]
            chosen = window[scores[query - start, window] < limit][:k]
            negatives[place, : len(chosen)] = rows[query - start, chosen]
    return negatives


def _pair_scores(queries: Any, documents: Any, pairs: Rows, similarity: Similarity) -> Any:
    """Returns the score of each pair, `(P,)`."""
    found = []
    for start in range(0, len(pairs), _QUERIES):
        part = pairs[start : start + _QUERIES].T
        pair = [
            take_rows(each, rows) for each, rows in zip((queries, documents), part, strict=True)
        ]
        tensors = keras.tree.map_structure(lambda x: ops.convert_to_tensor(x[:, None]), pair)
        found.append(to_host(similarity(*tensors))[:, 0, 0])
    return np.concatenate(found)


def _ids_of(features: Features, ids: Sequence[str], what: str) -> list[str]:
    """Returns the ids of texts as a list, and raises unless each text has one of its own."""
    found = list(ids)
    check_ids(found, what)
    if len(found) != len(features):
        raise ValueError(f"{what} must be those of {len(features)} texts, got {len(found)} ids.")
    return found
