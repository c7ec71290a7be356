"""The approximate index, beside the exact one and the libraries themselves."""

import shutil
import sys

import keras
import numpy as np
import pytest

from polus.ir.approximate import ApproximateIndex
from polus.ir.index import DenseIndex

pytest.importorskip("usearch")
faiss = pytest.importorskip("faiss")
LIBRARIES = ("usearch", "faiss")

rng = np.random.default_rng(0)
CENTERS = rng.normal(size=(40, 16))
VECTORS = (CENTERS[rng.integers(0, 40, 2000)] + rng.normal(size=(2000, 16)) / 2).astype("float32")
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
IDS = [f"d{row}" for row in range(len(VECTORS))]
QUERIES = VECTORS[::100] + rng.normal(size=(20, 16)).astype("float32") / 10


@pytest.fixture(scope="module", params=LIBRARIES)
def index(request):
    return ApproximateIndex(VECTORS, IDS, library=request.param, threads=1)


@pytest.mark.once
def test_most_of_the_nearest_are_found_with_their_scores(index):
    exact = DenseIndex(VECTORS, IDS)
    found, expected = index.search(QUERIES, 5), exact.search(QUERIES, 5)
    shared = [len(dict(a).keys() & dict(b).keys()) for a, b in zip(found, expected, strict=True)]
    assert index.recall(QUERIES, exact, 5) == pytest.approx(np.mean(shared) / 5)
    assert np.mean(shared) / 5 > 0.95
    for query, results in zip(QUERIES, found, strict=True):
        names, scores = zip(*results, strict=True)
        assert list(scores) == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, VECTORS[[IDS.index(n) for n in names]] @ query, 1e-4)
    run = index.run(QUERIES, [str(i) for i in range(20)], 5)
    assert run == {str(i): dict(each) for i, each in enumerate(found)}
    assert index.search(QUERIES[:1], 5) == found[:1]
    assert index.search(QUERIES[:0], 5) == []


@pytest.mark.once
def test_more_candidates_find_more(index):
    exact = DenseIndex(VECTORS, IDS)
    before = index.expansion_search
    recalls = []
    for index.expansion_search in (1, 400):
        recalls.append(index.recall(QUERIES, exact, 1))
    index.expansion_search = before
    assert recalls[1] >= recalls[0]
    assert recalls[1] == 1


@pytest.mark.once
def test_it_is_saved_with_its_parameters_and_loaded(tmp_path, index):
    index.expansion_search = 77
    index.save(tmp_path / "index")
    mapped = (False, True) if index.parameters.library == "usearch" else (False,)
    for each in mapped:
        loaded = ApproximateIndex.load(tmp_path / "index", mapped=each, threads=1)
        assert (loaded.parameters, loaded.expansion_search) == (index.parameters, 77)
        assert loaded.search(QUERIES) == index.search(QUERIES)
    with pytest.raises(FileExistsError, match="Delete it, or save to another folder"):
        index.save(tmp_path / "index")
    if len(mapped) == 1:
        with pytest.raises(ValueError, match="this one is of faiss"):
            ApproximateIndex.load(tmp_path / "index", mapped=True)


@pytest.mark.once
def test_damage_is_noticed(tmp_path, index):
    index.save(tmp_path / "index")
    for path in sorted((tmp_path / "index").iterdir()):
        damaged = tmp_path / "damaged"
        shutil.copytree(tmp_path / "index", damaged)
        data = bytearray(path.read_bytes())
        data[len(data) // 2 if path.name != "index.json" else 1] ^= 1
        (damaged / path.name).write_bytes(data)
        with pytest.raises(ValueError, match=r"is damaged|must be written by ApproximateIndex"):
            ApproximateIndex.load(damaged)
        shutil.rmtree(damaged)
    with pytest.raises(FileNotFoundError):
        ApproximateIndex.load(tmp_path / "nothing")


@pytest.mark.once
def test_the_number_of_threads_of_faiss_stays_what_it_was():
    before = faiss.omp_get_max_threads()
    ApproximateIndex(VECTORS[:10], IDS[:10], library="faiss", threads=1).search(QUERIES)
    assert faiss.omp_get_max_threads() == before


@pytest.mark.once
@pytest.mark.once
def test_a_number_of_numpy_is_a_number_of_documents(index):
    assert index.search(QUERIES, np.int64(3)) == index.search(QUERIES, 3)


@pytest.mark.once
def test_a_file_is_no_folder(tmp_path):
    DenseIndex([[1.0]], ["a"]).save(tmp_path / "index")
    with pytest.raises(ValueError, match=r"must be written by ApproximateIndex\.save"):
        ApproximateIndex.load(tmp_path / "index")
    ApproximateIndex([[1.0]], ["a"]).save(tmp_path / "graph")
    with pytest.raises(ValueError, match=r"is a folder\. ApproximateIndex.load reads"):
        DenseIndex.load(tmp_path / "graph")


@pytest.mark.parametrize("library", LIBRARIES)
def test_fewer_documents_than_asked_for(library):
    index = ApproximateIndex(VECTORS[:3], IDS[:3], library=library)
    assert [len(each) for each in index.search(QUERIES[:2], 10)] == [3, 3]


@pytest.mark.once
@pytest.mark.parametrize("library", LIBRARIES)
def test_of_equal_vectors_the_earlier_one_comes_first(library):
    index = ApproximateIndex(np.ones((4, 2), "float32"), list("abcd"), library=library)
    assert [name for name, _ in index.search(np.ones((1, 2)), 4)[0]] == list("abcd")


def test_it_takes_the_tensors_of_a_model():
    tensors = keras.layers.Dense(16)(VECTORS[:50])  # PyTorch's require a gradient
    index = ApproximateIndex(tensors, IDS[:50])
    assert index.search(tensors[:1], 1) == index.search(keras.ops.convert_to_numpy(tensors)[:1], 1)


@pytest.mark.once
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ApproximateIndex(VECTORS, IDS[:-1]), r"\(2000, 16\) and 1999 ids"),
        (lambda: ApproximateIndex(VECTORS[:0], []), "at least one"),
        (lambda: ApproximateIndex(VECTORS[:2], ["a", "a"]), "must be unique, got 'a' twice"),
        (lambda: ApproximateIndex([[np.nan], [1]], ["a", "b"]), "that of 'a' contains NaN"),
        (lambda: ApproximateIndex([[1.0]], ["a"], library="annoy"), r"one of .*got 'annoy'"),
        (lambda: ApproximateIndex([[1.0]], ["a"]).search([[1.0, 2.0]]), r"\(Q, 1\).*\(1, 2\)"),
        (
            lambda: ApproximateIndex([[1.0]], ["a"]).search([[1.0]], 0),
            "k must be a positive integer",
        ),
        (lambda: ApproximateIndex([[1.0]], ["a"]).search([[np.nan]]), "Queries must be finite"),
        (
            lambda: ApproximateIndex([[1.0]], ["a"], library="faiss").search([[np.inf]]),
            "Queries must be finite",
        ),
    ],
)
def test_bad_input_raises(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.once
@pytest.mark.parametrize(("library", "package"), [("usearch", "usearch"), ("faiss", "faiss-cpu")])
def test_a_missing_library_is_named(monkeypatch, library, package):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        ApproximateIndex([[1.0]], ["a"], library=library)
