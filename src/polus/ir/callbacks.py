"""Between epochs of retrieval training: validation by search, and mining of hard negatives."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from polus.callbacks.base import Callback
from polus.ir.data import PairBatches, Rows, as_features
from polus.ir.encoding import encode, joined
from polus.ir.evaluation import MEASURES, as_run, evaluate, top_k
from polus.ir.scores import InBatchScores, Similarity, dot_product


class _Search(Callback):
    """What both callbacks share: representations of the present model, and their similarity."""

    similarity: Similarity | None
    batch_size: int

    @property
    def _trainer(self) -> Any:
        """The trainer, an `EfficientDenseRetrievalTrainer`."""
        return self.coordinator.trainer

    def _represented(self, queries: Any, documents: Any) -> tuple[Any, Any]:
        trainer = self._trainer
        return (
            joined(encode(trainer.represent_queries, as_features(queries), self.batch_size)),
            joined(encode(trainer.represent_documents, as_features(documents), self.batch_size)),
        )

    def _similarity(self) -> Similarity:
        if self.similarity is not None:
            return self.similarity
        scores = self._trainer.compute_scores
        if not isinstance(scores, InBatchScores):
            raise ValueError(
                f"How documents are compared is not known from {scores!r}; say "
                f"{type(self).__name__}(..., similarity=polus.ir.scores.cosine.similarity)."
            )
        return scores.similarity


class RetrievalValidation(_Search):
    """Searches with the present model after an epoch, measures, and keeps the best weights.

    Before the first epoch too, so that training which makes a model worse is undone. The measures
    after an epoch are added to `shared_dict["validation"][name]` and the epoch's logs, as
    `ValidationDataCallback` does.

    Args:
        queries: features of the judged queries; see `polus.ir.data.Features`.
        documents: features of all documents.
        qrels: `{query id: {document id: grade}}`.
        query_ids: of `queries`, in order.
        document_ids: of `documents`, in order.
        measures: as for `polus.ir.evaluation.evaluate`.
        monitor: the measure that decides which model is the best.
        restore_best: whether the best model's weights are put back when training ends, those of a
            learned temperature and batch statistics as well.
        name: of this set of queries.
        every_epochs: how often.
        depth: documents that are retrieved.
        similarity: as for `polus.ir.evaluation.top_k`; that of the trainer's `compute_scores`.
        batch_size: texts represented at a time.

    Attributes:
        best: the best value so far. best_epoch: its epoch, from 0; -1 is the model before training.
    """

    def __init__(
        self,
        queries: Any,
        documents: Any,
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
        if monitor not in measures:
            raise ValueError(
                f"monitor is {monitor!r}, which is none of the measures {list(measures)}; add it."
            )
        self.queries, self.documents = queries, documents
        self.qrels, self.query_ids, self.document_ids = qrels, query_ids, document_ids
        self.measures, self.monitor, self.restore_best = measures, monitor, restore_best
        self.name, self.every_epochs, self.depth = name, every_epochs, depth
        self.similarity, self.batch_size = similarity, batch_size
        self.best = -np.inf
        self.best_epoch = -1
        self._weights: list[Any] = []

    def on_epoch_begin(self, epoch: int) -> None:
        # Here and not where training begins: a run that is resumed knows its best by now.
        if epoch == 0 and self.best == -np.inf:
            data = self.coordinator.reader.current
            assert data is not None  # an epoch has begun
            self._trainer.meet(*data.example)  # so that what may change is known
            self._keep_if_best(evaluate(self.qrels, self.run(), self.measures), epoch=-1)

    def on_epoch_end(self, epoch: int) -> None:
        if (epoch + 1) % self.every_epochs:
            return
        found = evaluate(self.qrels, self.run(), self.measures)
        values = self.coordinator.shared_dict["validation"].setdefault(self.name, {})
        for measure, value in found.items():
            values.setdefault(measure, []).append(value)
        self.coordinator.shared_dict["epoch_logs"] |= {
            f"{self.name}_{measure}": value for measure, value in found.items()
        }
        self._keep_if_best(found, epoch)

    def _keep_if_best(self, found: Mapping[str, float], epoch: int) -> None:
        if found[self.monitor] > self.best:
            self.best, self.best_epoch = found[self.monitor], epoch
            weights = self._trainer.changing_weights
            self._weights = [np.array(ops.convert_to_numpy(weight)) for weight in weights]

    def run(self) -> dict[str, dict[str, float]]:
        """What the present model finds."""
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
    """Gives each pair the documents that the present model takes for relevant, wrongly.

    Exact search over all documents before the first epoch and after every n epochs; from what is
    found for a query, whatever is judged relevant to it is left out.

    Args:
        batches: gets its `negatives`.
        k: hard negatives per pair; where fewer are left the rest is masked.
        every_epochs: how often.
        ranks: first and last rank to take from, from 0, the last not included, judged positives
            not counted.
        relative_margin: a document counts only if its score is below this part of the positive's:
            a document that scores as well is probably relevant and unjudged. 0.95 as in Moreira et
            al. 2024, NV-Retriever, arXiv:2407.15831, section 3; without it, hard negatives hurt.
            None for no limit. Below a positive score of 0 the distance is the same.
        similarity: as for `polus.ir.evaluation.top_k`; that of the trainer's `compute_scores`.
        batch_size: texts represented at a time.
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
                f"k is {k} and ranks is {ranks}: take at least one negative, from a first rank "
                "that is below the last, such as ranks=(0, 100)."
            )
        self.batches = batches
        self.k, self.every_epochs, self.ranks = k, every_epochs, ranks
        self.relative_margin = relative_margin
        self.similarity, self.batch_size = similarity, batch_size

    def on_train_begin(self) -> None:
        self._mine()

    def on_epoch_end(self, epoch: int) -> None:
        # Here and not where the next epoch begins: what a checkpoint keeps of the data is then new.
        # After the last epoch too, for a run that is continued.
        if (epoch + 1) % self.every_epochs == 0:
            self._mine()

    def _mine(self) -> None:
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
    """Hard negatives `(P, k)` of pairs `(P, 2)`, -1 where there are none left.

    See `HardNegativeMining`; `queries` and `documents` are representations, as for `top_k`.
    """
    most = max(len(rows) for rows in relevant)
    scores, rows = top_k(queries, documents, ranks[1] + most, similarity=similarity)
    negatives = np.full((len(pairs), k), -1, np.int64)
    if relative_margin is not None:
        chosen = [
            keras.tree.map_structure(
                lambda x, rows=rows: ops.convert_to_tensor(x[rows][:, None]), each
            )
            for each, rows in ((queries, pairs[:, 0]), (documents, pairs[:, 1]))
        ]
        positive = ops.convert_to_numpy(similarity(*chosen))[:, 0, 0]
        limits = positive - (1 - relative_margin) * np.abs(positive)
    for place, query in enumerate(pairs[:, 0]):
        unjudged = ~np.isin(rows[query], relevant[query])
        candidates, values = rows[query][unjudged], scores[query][unjudged]
        window = slice(*ranks)
        candidates, values = candidates[window], values[window]
        if relative_margin is not None:
            candidates = candidates[values < limits[place]]
        negatives[place, : len(candidates[:k])] = candidates[:k]
    return negatives
