"""Folders of BEIR as people write them, ids and rows that don't match, texts in place of arrays."""

import gzip
import json

import numpy as np
import pytest

from polus.ir.callbacks import HardNegativeMining, RetrievalValidation
from polus.ir.data import Features, PairBatches, read_beir, read_documents, relevant_rows
from polus.ir.guide import Guide

pytestmark = pytest.mark.once

HEADER = "query-id\tcorpus-id\tscore\n"
ROWS = np.eye(3, dtype="float32")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    write(tmp_path, "corpus.jsonl", '{"_id": "a", "text": "x"}\n')
    write(tmp_path, "queries.jsonl", '{"_id": "1", "text": "q"}\n')
    write(tmp_path, "qrels/test.tsv", f"{HEADER}1\ta\t1\n")
    return tmp_path


def write(folder, name, text):
    (folder / name).write_bytes(text.encode())


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_byte_order_marks_blank_lines_and_windows_line_ends_are_read(folder, name):
    expected = read_beir(folder)
    text = (folder / name).read_text()
    write(folder, name, "\ufeff" + text.replace("\n", "\r\n\r\n"))
    assert read_beir(folder) == expected == ({"a": "x"}, {"1": "q"}, {"1": {"a": 1}})


def test_ids_that_are_numbers_are_those_of_the_judgements(folder):
    write(folder, "corpus.jsonl", '{"_id": 7, "text": "x"}\n')
    write(folder, "queries.jsonl", '{"_id": 1, "text": "q"}\n')
    write(folder, "qrels/test.tsv", f"{HEADER}1\t7\t1\n")
    assert read_beir(folder) == ({"7": "x"}, {"1": "q"}, {"1": {"7": 1}})


@pytest.mark.parametrize(
    "line",
    [
        '{"_id": "b", "text": null}',
        '{"_id": "b", "title": "t"}',
        '{"id": "b", "text": "x"}',
        '{"_id": true, "text": "x"}',
        '{"_id": "b", "text": "x"',
        '["b", "x"]',
    ],
)
@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_a_line_without_id_and_text_is_named(folder, name, line):
    write(folder, name, (folder / name).read_text() + f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"Line 3 of .*{name} must be a JSON object") as error:
        read_beir(folder)
    assert line in str(error.value)


def test_an_id_with_two_texts_or_two_grades_raises(folder):
    line = '{"_id": "a", "text": "x"}\n'
    write(folder, "corpus.jsonl", line * 2)
    assert read_documents(folder) == {"a": "x"}, "the same line twice is harmless"
    write(folder, "corpus.jsonl", line + line.replace('"x"', '"y"'))
    with pytest.raises(ValueError, match=r"Line 2 of .*corpus.jsonl has another text for .* 'a'"):
        read_documents(folder)
    write(folder, "corpus.jsonl", line)
    write(folder, "qrels/test.tsv", f"{HEADER}1\ta\t1\n1\ta\t0\n")
    with pytest.raises(ValueError, match=r"one grade for a query.* for 'a' and '1' in line 3"):
        read_beir(folder)


def test_a_missing_or_foreign_file_is_named(folder):
    write(folder, "qrels/test.tsv", "1 0 a 1\n")
    with pytest.raises(ValueError, match=r"read by ir_measures.read_trec_qrels"):
        read_beir(folder)
    text = (folder / "corpus.jsonl").read_bytes()
    (folder / "corpus.jsonl").write_bytes('{"_id": "a", "text": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"corpus.jsonl must be UTF-8"):
        read_documents(folder)
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"must have corpus.jsonl or corpus.jsonl.gz"):
        read_documents(folder)
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(text))
    assert read_documents(folder) == {"a": json.loads(text)["text"]}


def batches(relevant=((0,), (1,), (2,)), **settings):
    return PairBatches(ROWS, ROWS, relevant, batch_size=3, **settings)


def mined(**assigned):
    data = batches()
    for name, value in assigned.items():
        setattr(data, name, value)
    return list(data.batches(0))


QRELS = {"1": {"a": 1}}
WRONG = [
    (lambda: relevant_rows(QRELS, [1], ["a"]), "query_ids must be strings, got 1. Use '1'"),
    (lambda: relevant_rows(QRELS, ["1"], ["a", "a"]), "document_ids must be unique, got 'a'"),
    (lambda: Features(["a text", "another"]), r"list with the shapes \[\(\)\].*of_texts"),
    (lambda: Features({"x": ROWS, "y": ROWS[:2]}), r"shapes \[\(2, 3\), \(3, 3\)\]"),
    (lambda: batches(QRELS), "got '1'. Use relevant_rows"),
    (lambda: batches(np.eye(3, dtype=bool)), "must have a list of row numbers"),
    (lambda: batches([[0.5], [1], [2]]), r"got \[0.5\]"),
    (lambda: mined(negatives=np.zeros((2, 1), int)), r"rows \(3, k\) .* got int64 \(2, 1\)"),
    (lambda: mined(negatives=np.full((3, 1), 3)), "from 0 to 2, .* from 0 to 3"),
    (lambda: mined(negatives=np.full((3, 1), -2)), "or -1 for padding, got .* from -2"),
    (lambda: mined(negatives=np.zeros((3, 1))), r"got float64 \(3, 1\)"),
    (lambda: mined(teacher_scores=np.ones((3, 2))), r"must be \(3, 1\), .* shape \(3, 2\)"),
    (lambda: list(batches(guide=Guide(ROWS * np.nan, ROWS)).batches(0)), "guide's vectors must be"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_rows_that_do_not_match_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_negatives_and_scores_may_be_lists():
    ((_, _, found, extras),) = mined(negatives=[[1], [2], [-1]], teacher_scores=[[2, 1]] * 3)
    assert found.shape == (3, 1, 3)
    assert extras["teacher_scores"].tolist() == [[2, 1]] * 3


def validation(**changed):
    settings = {"query_ids": ["1", "2", "3"], "document_ids": ["a", "b", "c"], **changed}
    return RetrievalValidation(ROWS, ROWS, QRELS, **settings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query_ids": ["1"]}, "query_ids must be those of 3 texts, got 1"),
        ({"query_ids": ["1", "1", "2"]}, "query_ids must be unique, got '1' twice"),
        ({"document_ids": [0, 1, 2]}, "document_ids must be strings, got 0. Use '0'"),
        ({"query_ids": ["7", "8", "9"]}, "but 1 others are judged, such as '1', and would count"),
        ({"every_epochs": 0}, "every_epochs must be a positive integer, got 0"),
        ({"depth": 0}, "depth must be a positive integer, got 0"),
    ],
)
def test_validation_checks_its_ids_and_rhythm_before_training(changed, message):
    with pytest.raises(ValueError, match=message):
        validation(**changed)


def test_mining_does_not_replace_the_negatives_that_a_teacher_scored():
    data = batches()
    with pytest.raises(ValueError, match="every_epochs must be a positive integer"):
        HardNegativeMining(data, every_epochs=0)
    data.teacher_scores = np.ones((3, 2))
    with pytest.raises(ValueError, match="Leave out HardNegativeMining"):
        HardNegativeMining(data).on_train_begin()


def test_one_measure_in_place_of_a_list_raises():
    with pytest.raises(TypeError, match="measures must be a collection of strings"):
        validation(measures="nDCG@10")
    with pytest.raises(TypeError, match=r"got 'abc'. Use \[text\]"):
        Features.of_texts("abc", None)
