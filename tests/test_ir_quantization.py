"""Quantized vectors, beside sentence-transformers' own."""

import warnings

import numpy as np
import pytest

from polus.ir.index import DenseIndex
from polus.ir.quantization import QuantizedIndex, dequantize, int8_ranges, quantize

pytestmark = pytest.mark.once

rng = np.random.default_rng(0)
VECTORS = rng.normal(size=(300, 20)).astype("float32")
VECTORS[:, 3] = 0.5  # a dimension that is constant
QUERIES = rng.normal(size=(7, 20)).astype("float32")
IDS = [f"d{i}" for i in range(300)]


def test_ids_and_vectors_are_checked_as_by_the_exact_index():
    with pytest.raises(ValueError, match="NaN or infinity"):
        QuantizedIndex([[1.0, np.nan]], ["a"], "binary")
    with pytest.raises(ValueError, match=r"twice|unique|more than once"):
        QuantizedIndex([[1.0], [2.0]], ["a", "a"], "int8")


def test_codes_are_those_of_sentence_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("sentence_transformers")
        from sentence_transformers.util.quantization import quantize_embeddings
    assert library
    np.testing.assert_array_equal(
        quantize(VECTORS, "binary"), quantize_embeddings(VECTORS, "ubinary")
    )
    varying = np.delete(VECTORS, 3, axis=1)
    ranges = int8_ranges(varying)
    expected = quantize_embeddings(varying, "int8", ranges=ranges)
    found = quantize(varying, "int8", ranges)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_int8_is_off_by_half_a_step_at_most_and_clips():
    ranges = int8_ranges(VECTORS)
    codes = quantize(VECTORS, "int8", ranges)
    assert codes.dtype == np.int8
    assert (codes.min(), codes.max()) == (-128, 127)
    error = np.abs(dequantize(codes, "int8", 20, ranges) - VECTORS)
    assert (error <= (ranges[1] - ranges[0]) / 255 * 0.501 + 1e-6).all()
    np.testing.assert_array_equal(
        quantize(ranges * 3 - ranges.mean(0) * 2, "int8", ranges)[1][:3], 127
    )


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_scores_are_products_with_the_approximate_vectors(monkeypatch, precision):
    """In blocks, with the equal scores of signs in the order of rows."""
    monkeypatch.setattr("polus.ir.quantization._ROWS", 64)
    index = QuantizedIndex(VECTORS, IDS, precision)
    assert index.codes.nbytes == {"int8": 300 * 20, "binary": 300 * 3}[precision]
    ranges = int8_ranges(VECTORS)
    approximate = dequantize(quantize(VECTORS, precision, ranges), precision, 20, ranges)
    expected = DenseIndex(approximate, IDS)
    assert index.search(QUERIES, k=9) == expected.search(QUERIES, k=9)
    names = [f"q{i}" for i in range(7)]
    assert index.run(QUERIES, names, k=9) == expected.run(QUERIES, names, k=9)


def test_rescoring_reads_a_few_originals_and_finds_more(tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    exact = DenseIndex(VECTORS, IDS).search(QUERIES, k=5)
    found = {}
    for rescore in (0, 1, 60):
        originals = mapped if rescore else None
        index = QuantizedIndex(mapped, IDS, "binary", originals=originals, rescore=rescore or 1)
        found[rescore] = index.search(QUERIES, k=5)
    for ours, theirs in zip(found[60], exact, strict=True):  # all documents are scored again
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        np.testing.assert_allclose(
            [score for _, score in ours], [score for _, score in theirs], rtol=1e-5
        )
    for first, again in zip(found[0], found[1], strict=True):
        assert {name for name, _ in first} == {name for name, _ in again}


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_a_saved_index_searches_as_before(tmp_path, precision):
    path = tmp_path / "index.safetensors"
    for originals in (None, VECTORS):
        index = QuantizedIndex(VECTORS, IDS, precision, originals=originals, rescore=2)
        index.save(path)
        loaded = QuantizedIndex.load(path, originals)
        assert loaded.search(QUERIES, k=9) == index.search(QUERIES, k=9)
        assert vars(loaded).keys() == vars(index).keys()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match="damaged"):
        QuantizedIndex.load(path)
    DenseIndex(VECTORS, IDS).save(path)
    with pytest.raises(ValueError, match=r"a file written by QuantizedIndex\.save"):
        QuantizedIndex.load(path)


@pytest.mark.once
@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_originals_of_another_order_raise_when_loaded(tmp_path, precision):
    path = tmp_path / "index.safetensors"
    index = QuantizedIndex(VECTORS, IDS, precision)
    index.save(path)
    with pytest.raises(ValueError, match="in the same order, but in a sample of 64 their codes"):
        QuantizedIndex.load(path, VECTORS[::-1])
    QuantizedIndex.load(path, VECTORS.astype("float16"))


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match=r"originals must have the shape.*\(300, 20\)"):
        QuantizedIndex(VECTORS, IDS, "int8", originals=VECTORS[:4])
    with pytest.raises(ValueError, match="precision must be 'int8' or 'binary', got 'int4'"):
        QuantizedIndex(VECTORS, IDS, "int4")
    with pytest.raises(ValueError, match=r"shape \(300, 20\) and 2 ids"):
        QuantizedIndex(VECTORS, IDS[:2], "int8")
    with pytest.raises(ValueError, match=r"ranges must be.*\(2, 20\), got the shape \(2, 3\)"):
        QuantizedIndex(VECTORS, IDS, "int8", ranges=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="rescore must be a positive integer, got 0"):
        QuantizedIndex(VECTORS, IDS, "binary", originals=VECTORS, rescore=0)
    with pytest.raises(ValueError, match="precision must be 'int8' or 'binary', got 'float8'"):
        quantize(VECTORS, "float8")
    with pytest.raises(ValueError, match="vectors must be finite"):
        quantize(VECTORS * np.nan, "binary")
    with pytest.raises(ValueError, match=r"ranges must be .* got None"):
        dequantize(quantize(VECTORS, "int8"), "int8", 20)
    with (
        pytest.raises(ValueError, match="'d0' contains NaN or infinity"),
        np.errstate(over="ignore"),
    ):
        QuantizedIndex(VECTORS.astype("float64") * 1e60, IDS, "binary")
    index = QuantizedIndex(VECTORS, IDS, "binary", originals=VECTORS * np.nan)
    with pytest.raises(ValueError, match=r"originals must be finite.* score of 'd"):
        index.search(QUERIES, 2)
    with pytest.raises(ValueError, match="k must be a positive integer, got -1"):
        index.search(QUERIES, -1)


def test_rescoring_no_queries_and_equal_originals():
    index = QuantizedIndex(VECTORS, IDS, "binary", originals=np.ones((300, 20), "float16"))
    assert index.search(np.empty((0, 20)), 3) == []
    found = index.top_k(QUERIES, 5)[1]
    assert (np.diff(found, axis=1) > 0).all(), "of equal scores the first in the index comes first"
