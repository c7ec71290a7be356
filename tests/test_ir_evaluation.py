"""Evaluation, against SciPy and the figures of ir_measures' documentation; files of runs."""

import json
import sys
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import scipy.stats

from polus.ir.data import read_beir
from polus.ir.evaluation import (
    as_run,
    evaluate,
    paired_bootstrap,
    per_query,
    read_run,
    reciprocal_rank_fusion,
    split_by_training,
    write_run,
)

rng = np.random.default_rng(0)


# Judgements and run from the documentation of ir_measures, whose figures are, by hand:
# nDCG = (3/log2(2) + 1/log2(4)) / (3/log2(2) + 1/log2(3)), and 0 for a query without results.
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
        (lambda: evaluate(QRELS, RUN, ["ndcg@10"]), "Did you mean 'nDCG@10'"),
        (lambda: evaluate(QRELS, RUN, ["Recall"]), "lacks a cutoff.*'Recall@10'"),
        (lambda: evaluate(QRELS, {1: {"a": 1.0}}), "Use the same ids in both, as strings"),
        (lambda: evaluate({1: {"a": 1}}, {1: {"a": 1.0}}), "got 1 in the judgements. Use '1'"),
        (lambda: evaluate(QRELS, {"1": {7: 1.0}}), "got 7 in the run. Use '7'"),
        (lambda: evaluate({"1": {"a": 0.5}}, RUN), "whole numbers, got 0.5 for query '1' in the j"),
        (lambda: evaluate({"1": {"a": "1"}}, RUN), "whole numbers, got '1' for query '1'"),
        (
            lambda: evaluate(QRELS, {"1": {"a": np.nan}}),
            "got nan for query '1' in the run",
        ),
        (lambda: reciprocal_rank_fusion({"1": {"a": np.nan}}), "got nan for document 'a'"),
        (lambda: write_run("run", {"1": {"a": np.nan}}), "got nan for document 'a'"),
        (lambda: paired_bootstrap({"1": 1.0}, {"1": np.nan}), "got 1.0 and nan for query '1'"),
        (lambda: paired_bootstrap({}, {}), "at least one query, got none"),
        (lambda: paired_bootstrap({"1": 1.0}, {"2": 1.0}), "1 only in a and 1 only in b"),
        (lambda: write_run("run", {"q 1": {"a": 1.0}}), "'q 1 Q0 a 1 1.0 polus'"),
        (lambda: write_run("run", {"": {"a b": 1.0}}), "must not be empty or contain white space"),
    ],
)
def test_bad_input_raises(wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        wrong()


def test_documents_and_measures_are_collections():
    with pytest.raises(TypeError, match=r"must be a dict .* got a list for '1' in the judgements"):
        evaluate({"1": ["a"]}, RUN)
    with pytest.raises(TypeError, match=r"measures must be a collection .* got 'nDCG@10'"):
        evaluate(QRELS, RUN, "nDCG@10")


def test_numbers_of_numpy_and_whole_floats_are_numbers():
    qrels = {q: {d: np.int64(x) for d, x in found.items()} for q, found in QRELS.items()}
    run = {q: {d: np.float32(x) for d, x in found.items()} for q, found in RUN.items()}
    assert evaluate(qrels, run) == evaluate(QRELS, RUN)
    qrels["1"] = {d: float(x) for d, x in QRELS["1"].items()}
    assert evaluate(qrels, run) == evaluate(QRELS, RUN)


def test_a_query_with_empty_judgements_counts_as_0_in_every_measure():
    values = per_query({"1": {"a": 1}, "2": {}}, RUN, ["nDCG@10", "RR@10", "Recall@10"])
    assert all(each == {"1": 1, "2": 0} for each in values.values())


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(ImportError, match="pip install ir_measures"):
        evaluate(QRELS, RUN)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        paired_bootstrap({"1": 1.0}, {"1": 2.0})


def test_bootstrap_equals_resampling_by_hand():
    a = {str(i): value for i, value in enumerate(rng.normal(0, 1, 80))}
    b = {query: value + rng.normal(0.2, 0.6) for query, value in a.items()}
    difference = np.array([b[query] - a[query] for query in a])
    means = rng.choice(difference, (10_000, 80)).mean(1)
    found = paired_bootstrap(a, b)
    assert found.mean == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    shifted = means - difference.mean()
    assert found.p_value == pytest.approx((abs(shifted) >= abs(found.mean)).mean(), abs=0.01)
    assert found.p_value == pytest.approx(scipy.stats.ttest_1samp(difference, 0).pvalue, abs=0.01)
    assert paired_bootstrap(a, b) == found
    assert paired_bootstrap(a, b, seed=1) != found


def test_bootstrap_of_equal_runs_and_of_one_query():
    a = {str(i): value for i, value in enumerate(rng.normal(0, 1, 80))}
    assert paired_bootstrap(a, a).p_value == 1
    assert paired_bootstrap({"1": 1.0}, {"1": 3.0}) == (2, 2, 2, 0)


def test_a_run_file_is_written_and_read_as_trec_has_it(tmp_path):
    path = tmp_path / "run.txt"
    write_run(path, {q: {d: np.float32(x) for d, x in found.items()} for q, found in RUN.items()})
    assert read_run(path) == RUN
    read = {}
    for each in ir_measures.read_trec_run(str(path)):
        read.setdefault(each.query_id, {})[each.doc_id] = each.score
    assert read == RUN
    path.write_text(path.read_text() + "\n")
    assert read_run(path) == RUN, "blank lines are skipped"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert read_run(path) == RUN, "a byte order mark is no part of an id"
    for wrong in ("1 Q0 a 1", "1 Q0 a 1 high polus", "1 Q0 a 1 nan polus", "1 Q0 ä 2 1.0 polus"):
        path.write_text(f"1 Q0 ä 1 2.0 polus\n\n{wrong}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"run.txt must be .* but line 2"):
            read_run(path)


def test_an_interrupted_write_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "run.txt"
    write_run(path, RUN)
    before = path.read_bytes()
    write_text = Path.write_text

    def interrupted(self, text, **kwargs):
        write_text(self, text[:5], **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_run(path, {"1": {"other": 1.0}})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_fusion_adds_reciprocal_ranks():
    fused = reciprocal_rank_fusion({"1": {"a": 9.0, "b": 8.0}}, {"1": {"b": 0.2}})
    assert fused == {"1": {"a": pytest.approx(1 / 61), "b": pytest.approx(1 / 62 + 1 / 61)}}


def test_a_query_is_seen_if_one_relevant_document_was_a_training_positive():
    training = {"9": {"c": 1, "d": 0}}
    seen, unseen = split_by_training(QRELS, training)
    assert (list(seen), list(unseen)) == (["1"], ["2", "3"])


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
    with pytest.raises(FileNotFoundError, match="Splits found: \\['test'\\]"):
        read_beir(tmp_path, "train")
    for content, message in (
        (
            "1\ta\t2\n",
            r"test\.tsv must begin with a line of the names query-id.* got \['1', 'a', '2'",
        ),
        ("query-id\tcorpus-id\tscore\n1\ta\t0.5\n", "whole numbers, got '0.5' in line 2 of"),
        ("query-id\tcorpus-id\tscore\n1\ta\n", "whole numbers, got None in line 2 of"),
    ):
        (tmp_path / "qrels" / "test.tsv").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_beir(tmp_path)
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t2.0\n")
    assert read_beir(tmp_path).qrels == found.qrels
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t2\n9\ta\t1\n")
    with pytest.raises(ValueError, match=r"every query judged in .*'9'"):
        read_beir(tmp_path, "dev")


def test_as_run_names_rows():
    assert as_run(["q"], ["a", "b"], [[2.0, 1.0]], [[1, 0]]) == {"q": {"b": 2.0, "a": 1.0}}
