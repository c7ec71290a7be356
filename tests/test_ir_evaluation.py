"""Search and evaluation against brute force, SciPy, and figures published by others."""

import json
import os
import sys

import ir_measures
import keras
import numpy as np
import pytest
import scipy.stats
from keras import ops

from polus.ir import scores
from polus.ir.data import read_beir
from polus.ir.evaluation import (
    DenseIndex,
    as_run,
    evaluate,
    paired_bootstrap,
    per_query,
    read_run,
    reciprocal_rank_fusion,
    split_by_training,
    top_k,
    write_run,
)

rng = np.random.default_rng(0)


@pytest.mark.parametrize("block_size", [1, 7, 1000])
@pytest.mark.parametrize("k", [1, 10, 60])
def test_top_k_equals_sorting_all_scores(k, block_size):
    queries = rng.normal(size=(9, 5)).astype("float32")
    documents = rng.normal(size=(50, 5)).astype("float32")
    everything = queries @ documents.T
    expected = np.argsort(-everything, axis=1, kind="stable")[:, :k]
    values, rows = top_k(queries, documents, k, block_size=block_size)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(values, np.take_along_axis(everything, expected, 1), atol=1e-5)


def test_top_k_takes_late_interaction_few_documents_at_a_time():
    queries = (rng.normal(size=(3, 2, 4)).astype("float32"), np.ones((3, 2), bool))
    documents = (rng.normal(size=(8, 5, 4)).astype("float32"), np.ones((8, 5), bool))
    everything = np.einsum("qle,dme->qdlm", queries[0], documents[0]).max(-1).sum(-1)
    held = []

    def similarity(queries, documents):
        held.append(len(documents[0]) * 2 * 5)  # floats for each query
        return scores.max_sim.similarity(queries, documents)

    _, rows = top_k(queries, documents, 8, similarity=similarity, block_size=30)
    np.testing.assert_array_equal(rows, np.argsort(-everything, axis=1))
    assert held == [30, 30, 20]


# Judgements and run of the documentation of ir_measures, with its figures worked out by hand:
# nDCG = (3/log2(2) + 1/log2(4)) / (3/log2(2) + 1/log2(3)), and 0 for a query with no results.
QRELS = {"1": {"a": 3, "b": 0, "c": 1}, "2": {"d": 1}, "3": {"e": 1}}
RUN = {"1": {"a": 3.0, "b": 2.0, "c": 1.0}, "2": {"x": 2.0, "d": 1.0}}


def test_measures_are_graded_and_count_queries_without_results():
    values = per_query(QRELS, RUN, ["nDCG@10", "MRR@10", "RR@10", "Recall@100"])
    assert values["nDCG@10"]["1"] == pytest.approx((3 + 1 / 2) / (3 + 1 / np.log2(3)))
    assert values["nDCG@10"]["2"] == pytest.approx(1 / np.log2(3))
    assert values["MRR@10"] == values["RR@10"] == {"1": 1.0, "2": 0.5, "3": 0.0}
    assert evaluate(QRELS, RUN, ["Recall@100"]) == {"Recall@100": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: evaluate(QRELS, RUN, ["nDGC@10"]), "Did you mean 'nDCG@10'"),
        (lambda: evaluate(QRELS, {1: {"a": 1.0}}), "use the same ids, as strings"),
        (lambda: evaluate(QRELS, RUN, ["ndcg@10"]), "Did you mean 'nDCG@10'"),
        (lambda: evaluate(QRELS, RUN, ["Recall"]), "lacks a cutoff.*write 'Recall@10'"),
        (lambda: evaluate({1: {"a": 1}}, {1: {"a": 1.0}}), "judgements is the id 1; write '1'"),
        (lambda: evaluate(QRELS, {"1": {7: 1.0}}), "run is the id 7; write '7'"),
        (lambda: paired_bootstrap({}, {}), "on no query"),
        (lambda: paired_bootstrap({"1": 1.0}, {"2": 1.0}), "1 only in a, 1 only in b"),
        (lambda: top_k(np.ones((1, 2)), np.ones((1, 3)), 1), "by the same model"),
        (lambda: top_k(np.ones((1, 2)), np.ones((1, 2)), 0), "at least one"),
        (lambda: top_k(np.ones((1, 2)), [[1.0, 2.0], [3.0, np.nan]], 1), "0 to 1 some are NaN"),
        (lambda: top_k(np.ones((1, 2)), np.ones(2), 1), "Documents have the shape \\(2,\\)"),
        (lambda: DenseIndex([[1.0]], ["a", "b"]), "D ids"),
        (lambda: DenseIndex([[1.0]], ["a"]).search([1.0]), "Queries have.*vector\\[None\\]"),
        (lambda: DenseIndex([[1.0]], [7]), "7 is among the ids; write '7'"),
        (lambda: DenseIndex([[1.0], [2.0]], ["a", "a"]), "'a' stands for two documents"),
        (lambda: write_run(os.devnull, {"q 1": {"a": 1.0}}), "'q 1 Q0 a 1 1.0 polus'"),
        (lambda: write_run(os.devnull, {"": {"a b": 1.0}}), "without white space"),
    ],
)
def test_bad_input_says_what_to_write(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_evaluation_without_ir_measures_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(ImportError, match=r"polus\[ir\]"):
        evaluate(QRELS, RUN)


def test_bootstrap_agrees_with_scipy():
    a = {str(i): value for i, value in enumerate(rng.normal(0, 1, 80))}
    b = {query: value + rng.normal(0.2, 0.6) for query, value in a.items()}
    difference = np.array([b[query] - a[query] for query in a])
    expected = scipy.stats.bootstrap(
        (difference,), np.mean, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    found = paired_bootstrap(a, b)
    assert found.mean == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found.p_value == pytest.approx(scipy.stats.ttest_1samp(difference, 0).pvalue, abs=0.01)
    assert paired_bootstrap(a, a).p_value == 1


def test_a_run_file_is_read_by_us_and_by_ir_measures(tmp_path):
    path = tmp_path / "run.txt"
    write_run(path, {q: {d: np.float32(x) for d, x in found.items()} for q, found in RUN.items()})
    assert read_run(path) == RUN
    read = {}
    for each in ir_measures.read_trec_run(str(path)):
        read.setdefault(each.query_id, {})[each.doc_id] = each.score
    assert read == RUN
    path.write_text(path.read_text() + "\n")
    assert read_run(path) == RUN, "a blank line is none"
    path.write_text("1 Q0 a 1\n")
    with pytest.raises(ValueError, match="line 1"):
        read_run(path)


def test_fusion_adds_reciprocal_ranks():
    fused = reciprocal_rank_fusion({"1": {"a": 9.0, "b": 8.0}}, {"1": {"b": 0.2}})
    assert fused == {"1": {"a": pytest.approx(1 / 61), "b": pytest.approx(1 / 62 + 1 / 61)}}


def test_a_query_is_seen_if_one_relevant_document_was_a_training_positive():
    training = {"9": {"c": 1, "d": 0}}
    seen, unseen = split_by_training(QRELS, training)
    assert (list(seen), list(unseen)) == (["1"], ["2", "3"])


def test_an_index_is_saved_and_searched(tmp_path):
    index = DenseIndex(rng.normal(size=(20, 4)), [f"ä{i}" for i in range(20)])
    index.save(tmp_path / "index.safetensors")
    loaded = DenseIndex.load(tmp_path / "index.safetensors")
    queries = rng.normal(size=(3, 4))
    assert loaded.search(queries, 5) == index.search(queries, 5)
    expected = np.argsort(-(queries @ index.vectors.T), axis=1)[:, :5]
    assert [[document for document, _ in each] for each in loaded.search(queries, 5)] == [
        [index.ids[row] for row in rows] for rows in expected
    ]
    run = index.run(queries, ["1", "2", "3"], 5)
    assert list(run["2"]) == [index.ids[row] for row in expected[1]]


def test_tensors_that_a_model_gives_are_searched():
    model = keras.Sequential([keras.layers.Dense(4)])
    tensors = model(rng.normal(size=(6, 3)).astype("float32"))  # PyTorch's require a gradient
    arrays = ops.convert_to_numpy(tensors)
    index = DenseIndex(tensors, list("abcdef"))
    assert index.search(tensors, 3) == DenseIndex(arrays, list("abcdef")).search(arrays, 3)
    assert index.run(tensors[:1], ["1"], 1)["1"].keys() == {index.search(arrays, 1)[0][0][0]}


class FakeLibrary:
    """Stands for FAISS and usearch, which are no test dependencies: records what it is given."""

    def __init__(self, *args, **kwargs):
        self.added = []

    def add(self, *arrays):
        self.added += arrays

    IndexFlatIP = Index = property(lambda self: FakeLibrary)


@pytest.mark.parametrize(
    ("method", "module"), [("to_faiss", "faiss"), ("to_usearch", "usearch.index")]
)
def test_an_index_is_handed_on(monkeypatch, method, module):
    index = DenseIndex([[1.0, 2.0]], ["a"])
    monkeypatch.setitem(sys.modules, module.split(".")[0], FakeLibrary())
    monkeypatch.setitem(sys.modules, module, FakeLibrary())
    np.testing.assert_array_equal(getattr(index, method)().added[-1], [[1.0, 2.0]])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install"):
        getattr(index, method)()


def test_beir_folders_are_read(tmp_path):
    documents = [{"_id": "a", "title": "T", "text": "x\u2028y"}, {"_id": "b", "text": "z"}]
    documents.append({"_id": "c", "title": None, "text": "n"})
    queries = [{"_id": "1", "text": "q"}, {"_id": "2", "text": "unjudged"}]
    for name, lines in (("corpus", documents), ("queries", queries)):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(each, ensure_ascii=False) for each in lines), encoding="utf-8"
        )
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t2\n")
    found = read_beir(tmp_path)
    assert found == ({"a": "T x\u2028y", "b": "z", "c": "n"}, {"1": "q"}, {"1": {"a": 2}})
    with pytest.raises(FileNotFoundError, match="splits found: \\['test'\\]"):
        read_beir(tmp_path, "train")
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t2\n9\ta\t1\n")
    with pytest.raises(ValueError, match=r"judges 1 queries that queries.jsonl .*'9'"):
        read_beir(tmp_path, "dev")


def test_as_run_names_rows():
    assert as_run(["q"], ["a", "b"], [[2.0, 1.0]], [[1, 0]]) == {"q": {"b": 2.0, "a": 1.0}}
