"""Scores and losses, against the formulas of their papers in NumPy."""

import keras
import numpy as np
import pytest
from keras import ops

from polus.core import value_and_grad
from polus.ir import losses, scores

B, K, L, M, E = 5, 3, 4, 6, 8
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def max_sim(query, query_mask, document, document_mask):
    return sum(
        max(q @ d for d, there in zip(document, document_mask, strict=True) if there)
        for q, there in zip(query, query_mask, strict=True)
        if there
    )


SIMILARITIES = {
    "dot_product": lambda q, d: q @ d,
    "cosine": lambda q, d: unit(q) @ unit(d),
    "max_sim": lambda q, d: max_sim(*q, *d),
}


def representations(name):
    """Returns queries, positives and negatives as the scores take them."""
    if name != "max_sim":
        return normal(B, E), normal(B, E), normal(B, K, E)
    query_mask = np.arange(L) < rng.integers(1, L + 1, (B, 1))
    masks = [np.arange(M) < rng.integers(1, M + 1, shape) for shape in ((B, 1), (B, K, 1))]
    return (
        (normal(B, L, E), query_mask),
        (normal(B, M, E), masks[0]),
        (normal(B, K, M, E), masks[1]),
    )


def at(x, *index):
    return (x[0][index], x[1][index]) if isinstance(x, tuple) else x[index]


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("with_negatives", [False, True])
def test_scores_equal_their_definition(name, with_negatives):
    queries, positives, negatives = representations(name)
    similarity = SIMILARITIES[name]
    expected_positive = [similarity(at(queries, i), at(positives, i)) for i in range(B)]
    expected_negative = [
        [similarity(at(queries, i), at(positives, j)) for j in range(B) if j != i]
        + [similarity(at(queries, i), at(negatives, i, j)) for j in range(K) if with_negatives]
        for i in range(B)
    ]
    given = (queries, positives, negatives) if with_negatives else (queries, positives)
    tensors = keras.tree.map_structure(ops.convert_to_tensor, given)
    positive, negative = getattr(scores, name)(*tensors)
    np.testing.assert_allclose(ops.convert_to_numpy(positive), expected_positive, rtol=1e-4)
    np.testing.assert_allclose(
        ops.convert_to_numpy(negative), expected_negative, rtol=1e-4, atol=1e-5
    )


def test_cosine_of_a_zero_vector_has_a_finite_gradient():
    kernel = keras.Variable(np.zeros((E, E), "float32"))
    documents = ops.convert_to_tensor(normal(B, E))

    def loss():
        return losses.InfoNCE()(*scores.cosine(ops.matmul(documents, kernel), documents))

    _, (gradient,) = value_and_grad(loss, [kernel])
    assert np.isfinite(ops.convert_to_numpy(gradient)).all()


def test_document_without_tokens_scores_zero():
    (queries, mask), (documents, _), _ = representations("max_sim")
    nothing = np.zeros((B, M), bool)
    tensors = keras.tree.map_structure(
        ops.convert_to_tensor, ((queries, mask), (documents, nothing))
    )
    positive_scores, negative_scores = scores.max_sim(*tensors)
    assert not ops.convert_to_numpy(positive_scores).any()
    assert not ops.convert_to_numpy(negative_scores).any()


def test_late_interaction_multiplies_without_broadcasting(monkeypatch):
    """With broadcasting, TensorFlow 2.21 crashed or gave wrong numbers on some processors."""
    shapes = []
    matmul = ops.matmul

    def recorded(x, y):
        shapes.append((tuple(x.shape)[:-2], tuple(y.shape)[:-2]))
        return matmul(x, y)

    monkeypatch.setattr(ops, "matmul", recorded)
    tensors = keras.tree.map_structure(ops.convert_to_tensor, representations("max_sim"))
    scores.max_sim(*tensors)
    assert shapes == [((), ()), ((B,), (B,))]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


positive, negative, teacher = normal(B), normal(B, B - 1 + K), normal(B, 1 + K)
masked = rng.random(negative.shape) < 0.3
both = np.concatenate([positive[:, None], np.where(masked, -np.inf, negative)], 1)
student = np.concatenate([positive[:, None], np.where(masked, -np.inf, negative)[:, -K:]], 1)
target = np.exp(log_softmax(np.where(np.isinf(student), -np.inf, teacher)))
kept, kept_last = ~masked, ~masked[:, -K:]
ratio = np.where(np.isinf(student), 0, np.log(target + (target == 0)) - log_softmax(student / 0.05))
margins = (positive[:, None] - negative[:, -K:]) - (teacher[:, :1] - teacher[:, 1:])

LOSSES = {
    "InfoNCE": (losses.InfoNCE(), -log_softmax(both / 0.05)[:, 0].mean()),
    "InfoNCE learned": (
        losses.InfoNCE(0.5, learned=True),
        -log_softmax(both / 0.5)[:, 0].mean(),
    ),
    "PairwiseHinge": (
        losses.PairwiseHinge(0.2),
        np.maximum(0.2 - positive[:, None] + negative, 0)[kept].mean(),
    ),
    "PairwiseLogistic": (
        losses.PairwiseLogistic(0.5),
        np.log1p(np.exp((negative - positive[:, None]) / 0.5))[kept].mean(),
    ),
    "MarginMSE": (losses.MarginMSE(), (margins**2)[kept_last].mean()),
    "TeacherKL": (losses.TeacherKL(), (target * ratio).sum(1).mean()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_their_formula_and_ignore_masked_scores(name):
    loss, expected = LOSSES[name]
    given = [positive, np.where(masked, losses.MASKED, negative).astype("float32")]
    if isinstance(loss, losses.MarginMSE | losses.TeacherKL):
        given.append(teacher)
    value = ops.convert_to_numpy(loss(*map(ops.convert_to_tensor, given)))
    assert value.shape == ()
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_matryoshka_sums_the_loss_of_each_size():
    queries, documents, negatives = normal(B, E), normal(B, E), normal(B, K, E)
    loss = losses.Matryoshka(losses.InfoNCE(), scores.cosine, [2, E], weights=[0.5, 1])
    tensors = [ops.convert_to_tensor(x) for x in (queries, documents, negatives)]
    expected = sum(
        weight * losses.InfoNCE()(*scores.cosine(*[x[..., :length] for x in tensors]))
        for weight, length in ((0.5, 2), (1, E))
    )
    value = loss(*loss.compute_scores(*tensors))
    np.testing.assert_allclose(
        ops.convert_to_numpy(value), ops.convert_to_numpy(expected), rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"must not exceed .* 8, got"):
        losses.Matryoshka(losses.InfoNCE(), scores.cosine, [16]).compute_scores(*tensors)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: losses.InfoNCE(0), "must be positive, got 0"),
        (lambda: losses.PairwiseLogistic(float("nan")), "temperature must be positive, got nan"),
        (lambda: losses.TeacherKL(teacher_temperature=0), "teacher_temperature must be positive"),
        (lambda: losses.Matryoshka(None, None, []), r"sizes to train, .* got \[\]"),
        (lambda: losses.Matryoshka(None, None, [0, 4]), r"sizes to train, .* got \[0, 4\]"),
        (
            lambda: losses.Matryoshka(None, None, [4])(positive, negative),
            r"a column for each size, got the shape \(.*compute_scores=matryoshka",
        ),
        (lambda: scores.max_sim(positive, positive), "encoder with pooling=None"),
        (lambda: scores.cosine((negative, negative), (negative, negative)), "scores.max_sim, or"),
        (lambda: scores.dot_product(negative, (negative, negative)), "scores.max_sim, or"),
        (lambda: losses.Matryoshka(None, None, [2, 4], [1.0]), "one weight for each"),
        (lambda: losses.MarginMSE()(positive, negative, teacher[:, :1]), "the positive first"),
    ],
)
def test_invalid_settings_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_hard_negatives_are_shared_by_all_queries():
    queries, positives, negatives = (
        rng.normal(size=shape).astype("float32") for shape in ((3, 4), (3, 4), (3, 2, 4))
    )
    separate = scores.dot_product(queries, positives, negatives)
    shared_scores = scores.dot_product.sharing_negatives()
    positive, own = map(ops.convert_to_numpy, separate)
    same, shared = map(ops.convert_to_numpy, shared_scores(queries, positives, negatives))
    np.testing.assert_array_equal(positive, same)
    expected = np.concatenate([own[:, :2], queries @ negatives.reshape(6, 4).T], axis=1)
    np.testing.assert_allclose(shared, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extra", [0, 2])
def test_symmetric_is_the_mean_of_both_directions(extra):
    """The cross-entropy of rows and of columns, of which one is masked."""
    matrix = rng.normal(size=(4, 4)).astype("float32")
    matrix[1, 2] = losses.MASKED
    hard = rng.normal(size=(4, extra)).astype("float32")
    off = ~np.eye(4, dtype=bool)
    negative = np.concatenate([matrix[off].reshape(4, 3), hard], axis=1)

    def cross_entropy(table):
        table = table.astype("float64")
        return (np.log(np.exp(table).sum(1)) - table[np.arange(4), np.arange(4)]).mean()

    rows, columns = np.concatenate([matrix, hard], axis=1), matrix.T
    expected = (cross_entropy(rows) + cross_entropy(columns)) / 2
    loss = losses.Symmetric(losses.InfoNCE(temperature=1.0))
    found = loss(*map(ops.convert_to_tensor, (np.diagonal(matrix).copy(), negative)))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    learned = losses.InfoNCE(learned=True)
    assert losses.Symmetric(learned).trainable_variables == learned.trainable_variables
    with pytest.raises(ValueError, match=r"got the shapes \(4,\) and \(4, 2\)"):
        loss(np.ones(4), np.ones((4, 2)))
