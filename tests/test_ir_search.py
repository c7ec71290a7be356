"""Exact search and the index: against sorting all scores, with ties, damage and little memory."""

import sys
import tracemalloc

import keras
import numpy as np
import pytest
from keras import ops

from polus.ir import scores, search
from polus.ir.callbacks import mine
from polus.ir.index import DenseIndex
from polus.ir.search import as_run, top_k

rng = np.random.default_rng(0)
SIMILARITIES = [None, scores.dot_product.similarity]


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


@pytest.mark.parametrize("block_size", [1, 7, 1000])
@pytest.mark.parametrize("k", [1, 10, 60])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_top_k_equals_sorting_all_scores(k, block_size, similarity, monkeypatch):
    monkeypatch.setattr(search, "MAX_SCORES", 200)  # queries in blocks, too
    queries, documents = normal(9, 5), normal(50, 5)
    products = queries @ documents.T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :k]
    values, rows = top_k(queries, documents, k, block_size=block_size, similarity=similarity)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(values, np.take_along_axis(products, expected, 1), atol=1e-5)
    assert (values.dtype, rows.dtype) == (np.float32, np.int64)


def test_top_k_of_nothing():
    values, rows = top_k(normal(0, 3), normal(4, 3), 2)
    assert values.shape == rows.shape == (0, 2)
    values, rows = top_k(normal(2, 3), normal(0, 3), 2)
    assert values.shape == rows.shape == (2, 0)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("block_size", [3, 16, 50, 8192])
def test_of_equal_scores_the_earlier_document_ranks_first(similarity, block_size):
    """Whole numbers, whose products are exact in any order of summation."""
    queries = rng.integers(-2, 3, (7, 4)).astype("float32")
    documents = rng.integers(-1, 2, (300, 4)).astype("float32")  # few different scores
    order = np.argsort(-(queries @ documents.T), axis=1, kind="stable")
    for k in (1, 4, 100, 300):
        _, rows = top_k(queries, documents, k, similarity=similarity, block_size=block_size)
        np.testing.assert_array_equal(rows, order[:, :k])


def test_of_equal_documents_the_earlier_one_ranks_first():
    """Their products in float32 differ in the last bit by their place in a block."""
    different = normal(400, 384)
    documents = np.concatenate([different, different[::-1]])
    for count in (1, 3, 64):
        queries = normal(count, 384)
        products = queries.astype("float64") @ different.astype("float64").T
        order = np.argsort(-products, axis=1)
        expected = np.stack([order, 799 - order], -1).reshape(count, -1)[:, :25]
        for block_size in (7, 64, 999):
            _, rows = top_k(queries, documents, 25, block_size=block_size)
            np.testing.assert_array_equal(rows, expected)


def test_index_and_mining_take_the_earlier_of_equal_documents():
    documents = np.concatenate([np.zeros((50, 4)), np.ones((10, 4)), np.zeros((50, 4))])
    documents = documents.astype("float32")
    index = DenseIndex(documents, [str(row) for row in range(len(documents))])
    (found,) = index.search(np.ones((1, 4)), 4)
    assert [each for each, _ in found] == ["50", "51", "52", "53"]
    negatives = mine(
        np.ones((1, 4), "float32"),
        documents,
        [np.array([51])],
        np.array([[0, 51]]),
        4,
        (0, 5),
        None,
    )
    assert negatives.tolist() == [[50, 52, 53, 54]]


def test_top_k_with_infinite_scores():
    queries = np.ones((1, 2), "float32")
    documents = np.array([[-np.inf, 0], [1, 1], [np.inf, 0], [0, 0]], "float32")
    for block_size in (1, 4):
        values, rows = top_k(queries, documents, 4, block_size=block_size)
        assert rows.tolist() == [[2, 1, 3, 0]]
        assert values.tolist() == [[np.inf, 2, 0, -np.inf]]


def token_vectors(count, tokens, size):
    vectors = normal(count, tokens, size)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("block_size", [5, 8192])
def test_late_interaction_search_equals_its_definition(block_size):
    """At the sizes of ColBERT, where a broadcast product ranked wrongly on TensorFlow."""
    queries, documents = token_vectors(8, 32, 64), token_vectors(20, 180, 64)
    masks = np.ones((8, 32), "int32"), np.ones((20, 180), "int32")
    masks[1][3, 100:] = 0
    tokens = np.einsum("qle,dme->qdlm", queries, documents)
    tokens = np.where(masks[1][None, :, None, :] > 0, tokens, -np.inf)
    expected = tokens.max(-1).sum(-1)
    values, rows = top_k(
        (queries, masks[0]),
        (documents, masks[1]),
        10,
        similarity=scores.max_sim.similarity,
        block_size=block_size,
    )
    np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1)[:, :10])
    np.testing.assert_allclose(values, np.take_along_axis(expected, rows, 1), rtol=1e-5)


def test_late_interaction_holds_few_products_at_a_time(monkeypatch):
    monkeypatch.setattr(search, "MAX_SCORES", 60)
    held = []

    def similarity(queries, documents):
        held.append(len(queries[0]) * len(documents[0]) * 2 * 5)
        return scores.max_sim.similarity(queries, documents)

    queries, documents = (
        (normal(count, tokens, 4), np.ones((count, tokens), bool))
        for count, tokens in ((3, 2), (8, 5))
    )
    _, rows = top_k(queries, documents, 8, similarity=similarity)
    expected = np.einsum("qle,dme->qdlm", queries[0], documents[0]).max(-1).sum(-1)
    np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1))
    assert max(held) <= 60


def peak_mib(fn):
    tracemalloc.start()
    try:
        fn()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_search_and_mining_take_little_memory():
    """Of NumPy's. All scores with their rows, in one block of documents, are 280 MiB."""
    queries, documents = normal(1000, 8), normal(16_384, 8)
    assert peak_mib(lambda: top_k(queries, documents, 100)) < 120
    assert peak_mib(lambda: top_k(queries[:100], documents, 16_384)) < 120
    relevant = [np.array([row]) for row in range(len(queries))]
    pairs = np.array([(row, row) for row in range(len(queries))])
    assert peak_mib(lambda: mine(queries, documents, relevant, pairs, 2)) < 120


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: top_k(np.ones((1, 2)), np.ones((1, 3)), 1), "same size, got 2 and 3"),
        (lambda: top_k(np.ones((1, 2)), np.ones((1, 2)), 0), "k must be a positive integer"),
        (lambda: top_k(np.ones((1, 2)), [[1, 2], [3, np.nan]], 1), "documents 0 to 1 contain NaN"),
        (lambda: top_k(np.ones((1, 2)), np.ones(2), 1), r"Documents must have .* \(2,\)"),
        (lambda: DenseIndex([[1.0]], ["a", "b"]), "2 ids"),
        (lambda: DenseIndex([[1.0]], ["a"]).search([1.0]), r"Queries must .*vector\[None\]"),
        (lambda: DenseIndex([[1.0]], ["a"]).run([[1.0]], ["q", "r"]), "got 2 ids, .* 1 queries"),
        (lambda: DenseIndex([[1.0]], ["a"]).run([[1.0]] * 2, ["q", "q"]), "unique, got 'q' twice"),
        (lambda: DenseIndex([[1.0]], ["a"]).run([[1.0]], [7]), "strings, got 7. Use '7'"),
        (lambda: DenseIndex([[1.0]], ["a"]).search([[1.0]], 1.5), "positive integer, got 1.5"),
        (lambda: DenseIndex([[1.0]], [7]), "must be strings, got 7. Use '7'"),
        (lambda: DenseIndex([[1.0], [2.0]], ["a", "a"]), "must be unique, got 'a' twice"),
        (lambda: DenseIndex([[1.0], [np.nan]], ["a", "b"]), "finite, but that of 'b' contains NaN"),
        (lambda: DenseIndex([[1.0], [np.inf]], ["a", "b"]), "finite, but that of 'b'"),
    ],
)
def test_bad_input_raises(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda index: index.search("a text"), r"got 'a text'. Encode texts first: TextEncoder"),
        (lambda index: index.search([{"input_ids": [1]}]), "Encode texts first"),
        (lambda index: index.search((np.ones((1, 2, 1)), np.ones((1, 2)))), "late interaction"),
        (lambda _: DenseIndex(["a text"], ["a"]), "vectors must be vectors of real numbers"),
        (lambda _: DenseIndex([[1j]], ["a"]), "vectors of real numbers"),
    ],
)
def test_texts_and_tokens_are_no_vectors(wrong, message):
    with pytest.raises(TypeError, match=message):
        wrong(DenseIndex([[1.0]], ["a"]))


def test_a_similarity_is_a_function_of_scores():
    for wrong in ("cosine", scores.cosine):
        with pytest.raises(TypeError, match=r"polus\.ir\.scores\.cosine\.similarity"):
            top_k(np.ones((1, 2)), np.ones((1, 2)), 1, similarity=wrong)
    late = np.ones((1, 2, 1)), np.ones((1, 2))
    with pytest.raises(ValueError, match=r"similarity=polus\.ir\.scores\.max_sim"):
        top_k(late, late, 1)


def test_a_row_that_was_not_found_has_no_document():
    assert as_run(["q"], ["a", "b"], [[2.0, 0.0]], [[0, -1]]) == {"q": {"a": 2.0}}


IDS = ["é", "日本語 id", "a\tb", "x" * 1000, "\u2028", "😀", "null", '"q"', "\ud800"]


def test_index_is_saved_and_loaded(tmp_path):
    index = DenseIndex(normal(len(IDS), 4), IDS)
    index.save(tmp_path / "folder" / "index.safetensors")
    loaded = DenseIndex.load(tmp_path / "folder" / "index.safetensors")
    assert loaded.ids == IDS
    np.testing.assert_array_equal(loaded.vectors, index.vectors)
    queries = normal(3, 4)
    order = np.argsort(-(queries @ index.vectors.T), axis=1)[:, :5]
    assert [[each for each, _ in found] for found in loaded.search(queries, 5)] == [
        [IDS[row] for row in rows] for rows in order
    ]
    assert list(loaded.run(queries, ["1", "2", "3"], 5)["2"]) == [IDS[row] for row in order[1]]


def test_every_flipped_byte_of_an_index_is_noticed(tmp_path):
    path = tmp_path / "index.safetensors"
    DenseIndex(normal(3, 2), ["a", "b", "c"]).save(path)
    written = path.read_bytes()
    for place in range(len(written)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 4]) + written[place + 1 :])
        with pytest.raises(ValueError, match=r"index.safetensors (is|must)"):
            DenseIndex.load(path)
    for damaged in (written[:-1], b"", written + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"index.safetensors (is|must)"):
            DenseIndex.load(path)
    with pytest.raises(FileNotFoundError):
        DenseIndex.load(tmp_path / "absent")


def test_an_interrupted_save_leaves_the_index_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "index.safetensors"
    DenseIndex(normal(3, 2), ["a", "b", "c"]).save(path)
    before = path.read_bytes()

    def interrupted(arrays, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("polus.ir.index.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DenseIndex(normal(3, 2), ["a", "b", "c"]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_index_takes_the_tensors_of_a_model():
    model = keras.Sequential([keras.layers.Dense(4)])
    tensors = model(normal(6, 3))  # PyTorch's require a gradient
    arrays = ops.convert_to_numpy(tensors)
    index = DenseIndex(tensors, list("abcdef"))
    assert index.search(tensors, 3) == DenseIndex(arrays, list("abcdef")).search(arrays, 3)
    assert index.run(tensors[:1], ["1"], 1)["1"].keys() == {index.search(arrays, 1)[0][0][0]}


class FakeLibrary:
    """Stands in for FAISS and usearch, which the tests don't install, and records its input."""

    def __init__(self, *args, **kwargs):
        self.added = []

    def add(self, *arrays):
        self.added += arrays

    IndexFlatIP = Index = property(lambda self: FakeLibrary)


@pytest.mark.parametrize(
    ("method", "module"), [("to_faiss", "faiss"), ("to_usearch", "usearch.index")]
)
def test_index_is_converted_to_other_libraries(monkeypatch, method, module):
    index = DenseIndex([[1.0, 2.0]], ["a"])
    monkeypatch.setitem(sys.modules, module.split(".")[0], FakeLibrary())
    monkeypatch.setitem(sys.modules, module, FakeLibrary())
    np.testing.assert_array_equal(getattr(index, method)().added[-1], [[1.0, 2.0]])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install"):
        getattr(index, method)()
