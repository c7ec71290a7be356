"""The retrieval trainer: what is trained, what is masked, and gradients in micro-batches."""

import keras
import numpy as np
import pytest
from keras import ops

from polus.core import function, value_and_grad
from polus.ir import losses, scores
from polus.ir.models import DualEncoder, IdentityProjection
from polus.ir.training import EfficientDenseRetrievalTrainer

B, K, F = 6, 2, 5
rng = np.random.default_rng(0)


def numpy(x):
    return ops.convert_to_numpy(x)


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


def encoder(dropout=0.0, seed=None, normalization=False):
    layers = [keras.layers.Dense(7, activation="tanh"), keras.layers.Dropout(dropout, seed=seed)]
    layers += [keras.layers.BatchNormalization(momentum=0.5)] if normalization else []
    return keras.Sequential([*layers, keras.layers.Dense(F)])


class Tokens(keras.Model):
    """A late-interaction encoder: (B, L, F) with zeros for padding."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)
        self.dropout = keras.layers.Dropout(0.3)

    def call(self, inputs):
        return self.dropout(self.dense(inputs)), ops.any(inputs != 0, axis=-1)


def trainer_of(model, loss=None, compute_scores=scores.cosine, **kwargs):
    kwargs = {"optimizer": keras.optimizers.SGD(1.0), **kwargs}
    return EfficientDenseRetrievalTrainer(
        model, compute_scores, loss=loss or losses.InfoNCE(), **kwargs
    )


def test_one_step_is_that_of_the_formula():
    """Identity projections, k negatives: the gradient by finite differences of the loss."""
    model = DualEncoder(encoder())
    queries, documents, negatives = normal(B, 3), normal(B, 3), normal(B, K, 3)
    trainer = trainer_of(model, optimizer=keras.optimizers.SGD(0.1))
    q, d = numpy(model.query_encoder(queries)), numpy(model.query_encoder(documents))
    n = numpy(model.query_encoder(negatives.reshape(-1, 3))).reshape(B, K, F)

    def loss(query_kernel):
        unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q @ query_kernel, d, n)]
        rows = np.concatenate(
            [
                unit[0] @ unit[1].T,
                np.einsum("be,bke->bk", unit[0], unit[2]),
            ],
            axis=1,
        )
        rows = rows.astype("float64") / 0.05
        logs = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
        return (logs - np.diagonal(rows)).mean()

    value = trainer.train_step(queries, documents, negatives)
    assert float(value) == pytest.approx(loss(np.eye(F)), rel=1e-4)
    moved = (np.eye(F) - numpy(model.query_projection.kernel)) / 0.1
    step = 1e-3
    for i, j in ((0, 0), (2, 3)):
        delta = np.zeros((F, F))
        delta[i, j] = step
        slope = (loss(np.eye(F) + delta) - loss(np.eye(F) - delta)) / (2 * step)
        assert moved[i, j] == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_a_frozen_encoder_is_never_trained():
    model = DualEncoder(encoder(dropout=0.5))
    trainer = trainer_of(model, trainable_weights=None)
    batch = normal(B, 3), normal(B, 3)
    first = float(trainer.train_step(*batch))
    assert trainer.trainable_weights == [
        model.query_projection.kernel,
        model.document_projection.kernel,
    ]
    for projection in (model.query_projection, model.document_projection):
        projection.kernel.assign(np.eye(F))
    assert float(trainer.train_step(*batch)) == first, "no dropout in a frozen encoder"
    # Named among others, they are left out all the same.
    named = trainer_of(model, trainable_weights=model.trainable_weights)
    before = [numpy(weight).copy() for weight in model.query_encoder.weights]
    named.train_step(*batch)
    assert named.trainable_weights == trainer.trainable_weights
    for weight, value in zip(model.query_encoder.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)


def test_projections_that_are_plain_methods():
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = encoder(), IdentityProjection()

        def encode_query(self, x):
            return self.encoder(x)

        def query_projection(self, x):
            return self.head(x)

        encode_document, document_projection = encode_query, query_projection

        def call(self, x):
            return self.head(self.encoder(x))

    model = Mine()
    trainer = trainer_of(model)
    trainer.train_step(normal(B, 3), normal(B, 3))
    assert trainer.trainable_weights == [model.head.kernel]
    with pytest.raises(TypeError, match="takes no argument training"):
        trainer_of(Mine(), freeze_encoder=False).train_step(normal(B, 3), normal(B, 3))
    with pytest.raises(ValueError, match="trainable_weights="):
        trainer_of(Mine(), encoded=True).train_step(normal(B, 3), normal(B, 3))


class SeeScores:
    """A loss that keeps nothing and gives back one number of the scores."""

    def __init__(self, f):
        self.f = f

    def __call__(self, positive, negative, *teacher):
        return ops.sum(positive) * 0 + self.f(positive, negative, *teacher)


def test_what_is_relevant_is_masked():
    positive_ids = np.array([7, 7, 3, 4, 5, 6])  # the first two pairs share a document
    relevant_ids = np.full((B, 2), -1)
    relevant_ids[2] = [3, 4]  # pair 3's document is relevant to query 2, not the other way round
    negative_ids = rng.integers(20, 30, (B, K))
    negative_ids[5, 1], negative_ids[4, 0], negative_ids[2, 1] = 6, -1, 4
    expected = np.zeros((B, B - 1 + K), bool)
    for i in range(B):
        relevant = {positive_ids[i], *relevant_ids[i][relevant_ids[i] >= 0]}
        others = [positive_ids[j] in relevant for j in range(B) if j != i]
        expected[i] = [*others, *[n in relevant or n < 0 for n in negative_ids[i]]]
    ids = {"positive_ids": positive_ids, "relevant_ids": relevant_ids, "negative_ids": negative_ids}
    weights = normal(B, B - 1 + K)

    def code(positive, negative):
        return ops.sum(ops.where(negative <= losses.MASKED / 2, weights, 0.0))

    def found(*batch):
        trainer = trainer_of(DualEncoder(encoder()), loss=SeeScores(code))
        return float(trainer.train_step(normal(B, 3), normal(B, 3), *batch))

    negatives = normal(B, K, 3)
    assert found(negatives, ids) == pytest.approx(weights[expected].sum(), rel=1e-4)
    assert found(negatives) == 0
    with pytest.raises(ValueError, match="no 'positive_ids'"):
        found(negatives, {"relevant_ids": relevant_ids})


def test_a_batch_may_have_another_k_than_the_last():
    trainer = trainer_of(
        DualEncoder(encoder()),
        k_negatives=K,
        loss=SeeScores(lambda positive, negative: ops.cast(negative.shape[1], "float32")),
    )
    for k in (K, 1, 4):
        value = trainer.train_step(normal(B, 3), normal(B, 3), normal(B, k, 3))
        assert float(value) == B - 1 + k
    with pytest.raises(ValueError, match="without negatives"):
        trainer.train_step(normal(B, 3), normal(B, 3))


def test_a_teacher_and_matryoshka():
    teacher = normal(B, 1 + K)
    batch = (normal(B, 3), normal(B, 3), normal(B, K, 3), {"teacher_scores": teacher})
    loss = losses.Matryoshka(losses.MarginMSE(), scores.dot_product, [2, F])
    model = DualEncoder(encoder())
    metrics = [keras.metrics.SparseCategoricalAccuracy()]
    trainer = trainer_of(model, loss, loss.compute_scores, metrics=metrics)
    value = float(trainer.train_step(*batch))
    q, d = numpy(model.query_encoder(batch[0])), numpy(model.query_encoder(batch[1]))
    n = numpy(model.query_encoder(batch[2].reshape(-1, 3))).reshape(B, K, F)
    expected = 0
    for size in (2, F):
        margin = (q * d)[:, :size].sum(1)[:, None] - np.einsum(
            "be,bke->bk", q[:, :size], n[..., :size]
        )
        expected += ((margin - (teacher[:, :1] - teacher[:, 1:])) ** 2).mean()
    assert value == pytest.approx(expected, rel=1e-4)


def test_a_learned_temperature_is_trained():
    loss = losses.InfoNCE(0.05, learned=True)
    trainer = trainer_of(DualEncoder(encoder()), loss)
    before = float(numpy(loss.log_scale))
    trainer.train_step(normal(B, 3), normal(B, 3))
    assert float(numpy(loss.log_scale)) != before


# ---------------------------------------------------------------------- micro-batches


def changed(model, step):
    """What one update at a rate of 1 takes from the weights: their gradients."""
    weights = model.trainable_weights
    before = [numpy(weight).copy() for weight in weights]
    step()
    return [value - numpy(weight) for value, weight in zip(before, weights, strict=True)]


def in_portions(f, x, size):
    parts = [f(x[start : start + size]) for start in range(0, len(x), size)]
    return keras.tree.map_structure(lambda *rows: ops.concatenate(rows), *parts)


MODELS = {
    "dropout": lambda: (DualEncoder(encoder(0.5)), scores.cosine, (3,)),
    "seeded dropout": lambda: (DualEncoder(encoder(0.5, seed=1)), scores.cosine, (3,)),
    "batch statistics": lambda: (
        DualEncoder(encoder(normalization=True)),
        scores.cosine,
        (3,),
    ),
    "two encoders": lambda: (DualEncoder(encoder(0.5), encoder(0.5)), scores.cosine, (3,)),
    "late interaction": lambda: (DualEncoder(Tokens()), scores.max_sim, (4, 3)),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, size):
    """Against one gradient through all activations at once, encoded in the same portions."""
    model, compute_scores, shape = MODELS[name]()
    batch = [normal(B, *shape), normal(B, *shape), normal(B, K, *shape)]
    model((batch[0], batch[1]))
    start = [numpy(v).copy() for v in model.variables]
    loss = losses.InfoNCE(0.5, learned=True)

    def query(x):
        return model.query_projection(model.encode_query(x, training=True))

    def document(x):
        return model.document_projection(model.encode_document(x, training=True))

    def forward():  # in the order of the trainer: queries, positives, negatives
        flat = batch[2].reshape(B * K, *shape)
        parts = ((query, batch[0]), (document, batch[1]), (document, flat))
        q, d, n = (in_portions(f, x, size) for f, x in parts)
        n = keras.tree.map_structure(lambda x: ops.reshape(x, (B, K, *x.shape[1:])), n)
        return loss(*compute_scores(q, d, n))

    @function
    def reference():
        return value_and_grad(forward, [*model.trainable_weights, loss.log_scale])

    keras.utils.set_random_seed(1)
    value, gradients = reference()
    after = [numpy(v).copy() for v in model.non_trainable_variables]
    for variable, before in zip(model.variables, start, strict=True):
        variable.assign(before)
    trainer = trainer_of(
        model,
        loss,
        compute_scores,
        freeze_encoder=False,
        micro_batch_size=size,
        k_negatives=K,
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    trainer._build(tuple(batch))  # so that nothing but the step draws random numbers
    keras.utils.set_random_seed(1)
    losses_found = []
    moved = changed(model, lambda: losses_found.append(trainer.train_step(*batch)))
    assert float(losses_found[0]) == pytest.approx(float(value), rel=1e-5)
    for weight, ours, theirs in zip(model.trainable_weights, moved, gradients, strict=False):
        theirs = numpy(theirs)
        bound = 1e-5 * np.abs(theirs).max() + 2e-7  # the second: rounding of weight minus gradient
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=weight.path)
    temperature = np.log(2) - float(numpy(loss.log_scale))
    assert temperature == pytest.approx(float(gradients[-1]), rel=1e-4)
    for variable, expected in zip(model.non_trainable_variables, after, strict=True):
        np.testing.assert_allclose(numpy(variable), expected, rtol=1e-5, err_msg=variable.path)
