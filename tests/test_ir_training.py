"""The retrieval trainer: trainable variables, masks, and gradients in micro-batches."""

import keras
import numpy as np
import pytest
from keras import ops

import polus.ir.models
from polus.checkpoint import Checkpoint, CheckpointError
from polus.core import function, value_and_grad
from polus.ir import losses, scores
from polus.ir.callbacks import HardNegativeMining, RetrievalValidation, mine
from polus.ir.data import Features, PairBatches, relevant_rows
from polus.ir.evaluation import evaluate
from polus.ir.guide import Guide
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
    """A late-interaction encoder of (B, L, F), with zeros for padding."""

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


class Heads(keras.Model):
    """An encoder with custom projections."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.query_projection, self.document_projection = encoder, head(), head()

    def encode_query(self, x, training=False):
        return self.encoder(x, training=training)

    encode_document = encode_query

    def call(self, inputs):
        queries, documents = (self.encoder(x) for x in inputs)
        return self.query_projection(queries), self.document_projection(documents)


def test_one_step_follows_the_gradient_of_the_formula():
    """With identity projections and k negatives, by finite differences of the loss."""
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


def test_frozen_encoders_are_never_trained():
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
    assert float(trainer.train_step(*batch)) == first, "a frozen encoder has no dropout"
    assert trainer.changing_weights == trainer.trainable_weights
    # Listed explicitly they are left out as well, before the first step too.
    before = [numpy(weight).copy() for weight in model.query_encoder.weights]
    encoded = [numpy(model.query_encoder(x)) for x in batch]
    for inputs, is_encoded in ((batch, False), (encoded, True)):
        named = trainer_of(model, trainable_weights=model.trainable_weights, encoded=is_encoded)
        assert named.trainable_weights == trainer.trainable_weights
        named.train_step(*inputs)
        assert named.trainable_weights == trainer.trainable_weights
    for weight, value in zip(model.query_encoder.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("place", ["scores", "loss"])
def test_variables_outside_encoder_and_projections_can_be_trained(encoded, place):
    model = DualEncoder(encoder())
    model.scale = model.add_weight((), initializer="ones", name="scale")

    def compute_scores(*representations):
        found = scores.cosine(*representations)
        return [x * model.scale for x in found] if place == "scores" else found

    def loss(positive, negative):
        difference = ops.mean(negative) - ops.mean(positive)
        return difference * model.scale if place == "loss" else difference

    model((normal(B, 3), normal(B, 3)))
    trainer = trainer_of(
        model,
        loss,
        compute_scores,
        encoded=encoded,
        trainable_weights=[model.scale, *model.query_encoder.trainable_weights],
    )
    trainer.train_step(*[normal(B, F if encoded else 3) for _ in range(2)])
    assert trainer.trainable_weights == [model.scale]
    assert float(numpy(model.scale)) != 1


def test_encoders_can_be_frozen_and_unfrozen_between_runs():
    model = DualEncoder(encoder())
    trainer = trainer_of(model)
    batch = normal(B, 3), normal(B, 3)
    trainer.train_step(*batch)
    before = numpy(model.query_encoder.weights[0]).copy()
    trainer.freeze_encoder, trainer.optimizer = False, keras.optimizers.SGD(1.0)
    trainer.train_step(*batch)
    assert trainer.trainable_weights == model.trainable_weights
    moved = numpy(model.query_encoder.weights[0]).copy()
    assert np.abs(moved - before).max() > 0
    trainer.freeze_encoder, trainer.optimizer = True, keras.optimizers.SGD(1.0)
    trainer.train_step(*batch)
    np.testing.assert_array_equal(numpy(model.query_encoder.weights[0]), moved)


def test_projections_run_in_training_mode_only_in_a_step():
    """Batch statistics are those of queries, and of positives and then negatives."""
    model = Heads(
        keras.layers.Identity(),
        lambda: keras.Sequential(
            [keras.layers.Input((3,)), keras.layers.BatchNormalization(momentum=0.5)]
        ),
    )
    queries, documents, negatives = normal(B, 3), normal(B, 3), normal(B, K, 3)
    trainer = trainer_of(model, optimizer=keras.optimizers.SGD(0.0))
    found = numpy(trainer.represent_queries(queries))
    np.testing.assert_allclose(found, queries / np.sqrt(1 + 1e-3), rtol=1e-5)
    assert not numpy(model.query_projection.layers[0].moving_mean).any()
    trainer.train_step(queries, documents, negatives)
    of_documents = 0.25 * documents.mean(0) + 0.5 * negatives.mean((0, 1))
    for head, mean in (
        (model.query_projection, 0.5 * queries.mean(0)),
        (model.document_projection, of_documents),
    ):
        np.testing.assert_allclose(numpy(head.layers[0].moving_mean), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["layer", "kwargs"])
def test_trained_encoders_are_called_in_training_mode(kind):
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = keras.layers.BatchNormalization(momentum=0.5)
            self.query_projection = self.document_projection = IdentityProjection()
            if kind == "layer":
                self.encode_query = self.encode_document = self.encoder
            else:
                self.encode_query = self.encode_document = self.with_kwargs

        def with_kwargs(self, x, **kwargs):
            return self.encoder(x, **kwargs)

    model, queries, documents = Mine(), normal(B, 3), normal(B, 3)
    trainer_of(model, freeze_encoder=False).train_step(queries, documents)
    mean = 0.25 * queries.mean(0) + 0.5 * documents.mean(0)
    np.testing.assert_allclose(numpy(model.encoder.moving_mean), mean, rtol=1e-4, atol=1e-6)


def test_projections_can_be_plain_methods():
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
    with pytest.raises(TypeError, match="must take an argument training"):
        trainer_of(Mine(), freeze_encoder=False).train_step(normal(B, 3), normal(B, 3))
    with pytest.raises(ValueError, match="trainable_weights="):
        trainer_of(Mine(), encoded=True).train_step(normal(B, 3), normal(B, 3))


class SeeScores:
    """A loss that returns a number computed from the scores."""

    def __init__(self, f):
        self.f = f

    def __call__(self, positive, negative, *teacher):
        return ops.sum(positive) * 0 + self.f(positive, negative, *teacher)


def test_relevant_documents_are_masked():
    positive_ids = np.array([7, 7, 3, 4, 5, 6])  # the first two pairs share a document
    relevant_ids = np.full((B, 2), -1)
    relevant_ids[2] = [3, 4]  # pair 3's document is relevant to query 2, but not vice versa
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
    mask = np.ones((B, B + K), bool)  # the diagonal, which is no negative, doesn't matter
    mask[:, :B][~np.eye(B, dtype=bool)] = expected[:, : B - 1].reshape(-1)
    mask[:, B:] = expected[:, B - 1 :]
    masked = {"relevant_mask": mask}
    assert found(negatives, masked) == pytest.approx(weights[expected].sum(), rel=1e-4)
    there = expected.copy()
    there[2, 2] = there[2, -1] = False  # known from relevant_ids only
    del ids["relevant_ids"]
    assert found(negatives, ids) == pytest.approx(weights[there].sum(), rel=1e-4)
    with pytest.raises(ValueError, match="no positive_ids"):
        found(negatives, {"relevant_ids": relevant_ids})


def test_batches_may_differ_in_the_number_of_negatives():
    trainer = trainer_of(
        DualEncoder(encoder()),
        k_negatives=K,
        loss=SeeScores(lambda positive, negative: ops.cast(negative.shape[1], "float32")),
    )
    for k in (K, 1, 4):
        value = trainer.train_step(normal(B, 3), normal(B, 3), normal(B, k, 3))
        assert float(value) == B - 1 + k
    with pytest.raises(ValueError, match="batch has no negatives"):
        trainer.train_step(normal(B, 3), normal(B, 3))


def test_matryoshka_with_a_teacher():
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


@pytest.mark.parametrize("replaced", [False, True])
def test_learned_temperature_is_trained(replaced):
    loss = losses.InfoNCE(0.05, learned=True)
    trainer = trainer_of(DualEncoder(encoder()), losses.InfoNCE() if replaced else loss)
    trainer.loss = loss
    before = float(numpy(loss.log_scale))
    trainer.train_step(normal(B, 3), normal(B, 3))
    assert float(numpy(loss.log_scale)) != before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_in_half_precision_are_masked_and_trained(dtype):
    batch = normal(B, F), normal(B, F), {"positive_ids": np.array([1, 1, 2, 3, 4, 5])}

    def rounded(*representations):
        return [ops.cast(x, dtype) for x in scores.cosine(*representations)]

    values = []
    for compute_scores in (scores.cosine, rounded):
        loss = losses.InfoNCE(1.0, learned=True)
        model = DualEncoder(keras.layers.Identity())
        trainer = trainer_of(model, loss, compute_scores, encoded=True)
        values.append([float(trainer.train_step(*batch)) for _ in range(2)])
    np.testing.assert_allclose(values[1], values[0], rtol=0.02)


# ---------------------------------------------------------------------- micro-batches


def changed(model, step):
    """Returns what one update at a learning rate of 1 subtracts: the gradients."""
    weights = model.trainable_weights
    before = [numpy(weight).copy() for weight in weights]
    step()
    return [value - numpy(weight) for value, weight in zip(before, weights, strict=True)]


def in_micro_batches(f, x, size):
    parts = [f(x[start : start + size]) for start in range(0, len(x), size)]
    return keras.tree.map_structure(lambda *rows: ops.concatenate(rows), *parts)


class Unseeded(keras.layers.Layer):
    """Dropout with Keras' global seed generator, which no model holds."""

    def call(self, x, training=False):
        return keras.random.dropout(x, 0.5) if training else x


MODELS = {
    # Dropout with and without a seed, in projections too; batch statistics; a shared encoder.
    "one encoder": lambda: (
        Heads(
            encoder(0.5, normalization=True),
            lambda: keras.Sequential([keras.layers.Dropout(0.5), keras.layers.Dense(4)]),
        ),
        scores.cosine,
        (3,),
    ),
    "two encoders": lambda: (
        DualEncoder(encoder(0.5), encoder(0.5, seed=1)),
        scores.cosine,
        (3,),
    ),
    "late interaction": lambda: (DualEncoder(Tokens()), scores.max_sim, (4, 3)),
    "Keras' seed": lambda: (
        DualEncoder(keras.Sequential([encoder(), Unseeded()])),
        scores.cosine,
        (3,),
    ),
}
# Relative to the largest gradient of a variable.
BOUNDS = {"float32": 1e-5, "mixed_bfloat16": 1e-3}


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, "float32") for name in MODELS), ("one encoder", "mixed_bfloat16")],
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, policy, request):
    """Compared with one gradient through all activations, encoded in the same micro-batches."""
    if name == "Keras' seed" and keras.backend.backend() == "jax":
        pytest.skip("Keras refuses such a layer on JAX")
    size = 4  # six pairs: a loop over whole micro-batches and a remainder
    keras.config.set_dtype_policy(policy)
    request.addfinalizer(lambda: keras.config.set_dtype_policy("float32"))
    model, compute_scores, shape = MODELS[name]()
    batch = [normal(B, *shape), normal(B, *shape), normal(B, K, *shape)]
    model((batch[0], batch[1]))
    start = [numpy(v).copy() for v in model.variables]
    loss = losses.InfoNCE(0.5, learned=True)

    def query(x):
        return model.query_projection(model.encode_query(x, training=True), training=True)

    def document(x):
        return model.document_projection(model.encode_document(x, training=True), training=True)

    def forward():  # in the trainer's order: queries, positives, negatives
        flat = batch[2].reshape(B * K, *shape)
        parts = ((query, batch[0]), (document, batch[1]), (document, flat))
        q, d, n = (in_micro_batches(f, x, size) for f, x in parts)
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
    keras.utils.set_random_seed(1)
    trainer.build_on(tuple(batch))
    losses_found = []
    moved = changed(model, lambda: losses_found.append(trainer.train_step(*batch)))
    assert float(losses_found[0]) == pytest.approx(float(value), rel=1e-5)
    for weight, ours, theirs in zip(model.trainable_weights, moved, gradients, strict=False):
        theirs = numpy(theirs)
        # The second term is the rounding error of weight minus gradient.
        bound = BOUNDS[policy] * np.abs(theirs).max() + 2e-7
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=weight.path)
    temperature = np.log(2) - float(numpy(loss.log_scale))
    assert temperature == pytest.approx(float(gradients[-1]), rel=1e-4)
    for variable, expected in zip(model.non_trainable_variables, after, strict=True):
        np.testing.assert_allclose(numpy(variable), expected, rtol=1e-5, err_msg=variable.path)


def test_micro_batches_in_bfloat16():
    """Compared with encoding the batch at once, which rounds elsewhere: 2% of the largest."""
    batch = normal(B, 3), normal(B, 3)
    moved = {}
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        for size in (None, 2):
            keras.utils.set_random_seed(0)
            model = DualEncoder(encoder())
            model(batch)
            trainer = trainer_of(model, freeze_encoder=False, micro_batch_size=size)
            moved[size] = changed(model, lambda trainer=trainer: trainer.train_step(*batch))
    finally:
        keras.config.set_dtype_policy("float32")
    for ours, theirs in zip(moved[2], moved[None], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02 * np.abs(theirs).max())


def test_micro_batches_record_the_loss_if_a_gradient_overflows():
    """In float16, where the first loss scales may overflow: the update is skipped."""
    batch = normal(B, 3), normal(B, 3)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = DualEncoder(encoder())
        expected = float(numpy(losses.InfoNCE()(*scores.cosine(*model(batch)))))
        before = [numpy(weight).copy() for weight in model.trainable_weights]
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(1.0), initial_scale=2.0**40
        )
        trainer = trainer_of(model, freeze_encoder=False, micro_batch_size=2, optimizer=optimizer)
        assert float(trainer.train_step(*batch)) == pytest.approx(expected, rel=0.01)
    finally:
        keras.config.set_dtype_policy("float32")
    for weight, value in zip(model.trainable_weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)


def test_micro_batches_equal_whole_batches_in_train():
    """With post_process_grads, several steps per execution and a smaller last batch."""
    relevant = [[row, (row + 1) % 10] for row in range(10)]
    weights = {}
    for size in (None, 3):
        keras.utils.set_random_seed(0)
        model = DualEncoder(encoder())
        model((np.zeros((1, 3)), np.zeros((1, 3))))
        data = PairBatches(FEATURES[:10], FEATURES[10:], relevant, batch_size=7)
        data.negatives = np.arange(40).reshape(20, 2) % 20 - 1
        trainer = trainer_of(
            model,
            freeze_encoder=False,
            micro_batch_size=size,
            optimizer=keras.optimizers.Adam(1e-2),
            post_process_grads=lambda gradients: [g * 0.5 for g in gradients],
        )
        trainer.train(data, epochs=2, steps_per_execution=2)
        weights[size] = [numpy(weight) for weight in model.trainable_weights]
    for ours, theirs in zip(weights[3], weights[None], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- data and callbacks

FEATURES = normal(30, 3)


def test_batches_hold_pairs_and_mask_what_is_relevant():
    relevant = [[0, 1], [2], [], [3, 0]]
    documents = FEATURES[10:]
    data = PairBatches(FEATURES[:4], documents, relevant, batch_size=2)
    data.negatives = np.array([[4, 5], [6, -1], [7, 1], [9, 9], [5, 0]])
    assert data.num_batches == 3

    def row_of(features, text):
        return int(np.flatnonzero((features == text).all(1))[0])

    seen = []
    for queries, positives, negatives, extras in data.batches(0):
        rows = [row_of(documents, text) for text in positives]
        for i, text in enumerate(queries):
            query = row_of(FEATURES[:4], text)
            seen.append((query, rows[i]))
            hard = data.negatives[data.pairs.tolist().index([query, rows[i]])]
            np.testing.assert_array_equal(negatives[i][hard >= 0], documents[hard[hard >= 0]])
            expected = [row in relevant[query] for row in rows]
            expected += [row in relevant[query] or row < 0 for row in hard]
            assert extras["relevant_mask"][i].tolist() == expected
    assert sorted(seen) == [(0, 0), (0, 1), (1, 2), (3, 0), (3, 3)]
    first, again, other = (list(data.order(epoch)) for epoch in (0, 0, 1))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))
    _, skipped, *_ = next(data.batches(0, skip=2))
    np.testing.assert_array_equal(skipped, documents[data.pairs[first[2]][:, 1]])


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_shared_hard_negatives_are_masked_as_by_ids(micro_batch_size):
    """The sampler's masks give the loss that ids give, and that a loop over all scores gives."""
    relevant = [[0, 1], [2], [3, 5], [4]]
    data = PairBatches(FEATURES[:4], FEATURES, relevant, batch_size=6, share_negatives=True)
    data.negatives = np.array([[2, 9], [8, -1], [1, 7], [5, 4], [0, 6], [3, 0]])
    (batch,) = data.batches(0)
    pairs, hard = data.pairs[next(data.order(0))], data.negatives[next(data.order(0))]
    ids = {
        "positive_ids": pairs[:, 1].astype("int32"),
        "relevant_ids": np.array([(relevant[q] * 2)[:2] for q, _ in pairs], "int32"),
        "negative_ids": hard.astype("int32"),
    }
    model = DualEncoder(encoder())
    found = []
    for given in (batch, (*batch[:-1], ids)):
        trainer = trainer_of(
            model,
            compute_scores=scores.cosine.sharing_negatives(),
            optimizer=keras.optimizers.SGD(0.0),
            freeze_encoder=micro_batch_size is None,
            micro_batch_size=micro_batch_size,
        )
        history = trainer.train([given], epochs=1)
        found.append(history.steps["loss"][-1])
    queries, documents = (numpy(x) for x in model((FEATURES[:4], FEATURES)))
    table = (
        queries @ documents.T / np.outer(*(np.linalg.norm(x, axis=1) for x in (queries, documents)))
    )
    expected = []
    for query, positive in pairs:
        rows = [
            row for row in [*pairs[:, 1], *hard.reshape(-1)] if row not in [*relevant[query], -1]
        ]
        logits = table[query, [positive, *rows]] / 0.05
        expected.append(np.log(np.exp(logits - logits[0]).sum()))
    assert found == pytest.approx([np.mean(expected)] * 2, rel=1e-4)


def test_shared_masks_need_shared_scores():
    data = PairBatches(FEATURES[:4], FEATURES, [[0], [1], [2], [3]], share_negatives=True)
    data.negatives = np.array([[9], [8], [7], [6]])
    (batch,) = data.batches(0)
    with pytest.raises(ValueError, match=r"here 7, got 4.*goes with cosine\.sharing_negatives"):
        one_step(*batch)


@pytest.mark.once
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("margin", "relative"), [(0.0, False), (0.1, False), (0.3, True)])
def test_a_guide_masks_what_it_scores_above_the_positive(share, margin, relative):
    relevant = [[0, 1], [2], [3, 5], [4]]
    guiding = normal(4, 8), normal(30, 8)
    data = PairBatches(
        FEATURES[:4],
        FEATURES,
        relevant,
        batch_size=6,
        share_negatives=share,
        guide=Guide(*guiding, margin, relative),
    )
    data.negatives = np.array([[2, 9], [8, -1], [1, 7], [5, 4], [0, 6], [3, 0]])
    (batch,) = data.batches(0)
    pairs, hard = data.pairs[next(data.order(0))], data.negatives[next(data.order(0))]
    masked = by_guide = 0
    for i, (query, positive) in enumerate(pairs):
        columns = [*pairs[:, 1], *(hard.reshape(-1) if share else hard[i])]

        def cosine(row, query=query):
            a, b = guiding[0][query].astype("float64"), guiding[1][row].astype("float64")
            return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)

        limit = cosine(positive)
        limit -= margin * abs(limit) if relative else margin
        judged = [row in relevant[query] or row < 0 for row in columns]
        above = [row != positive and cosine(row) > limit for row in columns]
        found = batch[-1]["relevant_mask"][i].tolist()
        assert found == [a or b for a, b in zip(judged, above, strict=True)]
        masked, by_guide = masked + sum(found), by_guide + sum(found) - sum(judged)
    assert 0 < by_guide < masked


def test_a_run_is_not_resumed_with_another_guide(tmp_path):
    def run(epochs, *guide):
        data = PairBatches(FEATURES[:4], FEATURES, [[0], [1], [2], [3]], guide=Guide(*guide))
        trainer_of(DualEncoder(keras.layers.Identity()), encoded=True).train(
            data, epochs=epochs, callbacks=[Checkpoint(tmp_path)], resume=tmp_path
        )

    guiding = normal(4, 8), normal(30, 8)
    run(1, *guiding)
    run(2, *guiding)
    with pytest.raises(CheckpointError, match="guide: it was"):
        run(3, *guiding, 0.1)


def test_avoid_clashes_drops_no_pair():
    relevant = [rng.choice(12, rng.integers(1, 4), replace=False).tolist() for _ in range(30)]
    data = PairBatches(
        Features.of_texts(["text"] * 30, lambda texts: {"ids": np.zeros((len(texts), 2))}),
        FEATURES,
        relevant,
        batch_size=6,
        avoid_clashes=True,
    )
    for epoch in range(3):
        order = list(data.order(epoch))
        assert sorted(np.concatenate(order).tolist()) == list(range(len(data.pairs)))
        for places in order:
            for one in places:
                for other in places:
                    query, document = data.pairs[one][0], data.pairs[other][1]
                    assert one == other or document not in relevant[query]
    assert len(order[0]) > 1
    tokens, *_ = next(data.batches(0))
    assert tokens["ids"].shape == (len(next(data.order(0))), 2)


def one_step(*batch, model=None, **kwargs):
    return trainer_of(model or DualEncoder(encoder()), **kwargs).train_step(*batch)


class OfDicts(keras.Model):
    def call(self, x):
        return {"sequence_output": x[:, None], "pooled_output": x}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: PairBatches(FEATURES, FEATURES, [[0]]), "one list per query"),
        (lambda: PairBatches(FEATURES[:1], FEATURES, [[30]]), "row numbers from 0 to 29, got 30"),
        (lambda: Guide(FEATURES, FEATURES[0]), r"got the shapes \(30, 3\) and \(3,\)"),
        (
            lambda: PairBatches(FEATURES[:1], FEATURES, [[0]], guide=Guide(FEATURES[:2], FEATURES)),
            "got 2 for 1 queries and 30 for 30 documents",
        ),
        (lambda: Features(lambda rows: rows), "count=len"),
        (lambda: HardNegativeMining(None, ranks=(5, 5)), "ranks="),
        (lambda: RetrievalValidation(0, 0, {}, [], [], ["AP"]), "one of the measures"),
        (lambda: trainer_of(DualEncoder(encoder()), micro_batch_size=2), "encoders are trained"),
        (
            lambda: trainer_of(DualEncoder(encoder()), encoded=True, freeze_encoder=False),
            "Leave one of them out",
        ),
        (
            lambda: PairBatches(FEATURES[:1], FEATURES, [[0]], batch_size=0),
            "positive integer, got 0",
        ),
        (lambda: one_step(FEATURES), "got 1 parts"),
        (lambda: one_step(FEATURES, FEATURES[:4]), "same batch size"),
        (lambda: one_step(FEATURES, FEATURES, FEATURES), r"one axis more than positives, \(B, k"),
        (
            lambda: one_step(FEATURES, FEATURES, {"positive_id": np.arange(30)}),
            "among relevant_mask, positive_ids",
        ),
        (
            lambda: one_step(FEATURES, FEATURES, {"relevant_mask": np.ones((30, 31), bool)}),
            r"must have the shape \(30, 30\) .* got \(30, 31\)",
        ),
        (
            lambda: one_step(FEATURES, FEATURES, {"relevant_ids": np.arange(30)}),
            r"must have the shape \(30, n\)",
        ),
        (lambda: one_step(FEATURES, FEATURES, loss=losses.TeacherKL()), "needs teacher_scores"),
        (
            lambda: one_step(FEATURES, FEATURES, {"positive_ids": np.arange(30) + 2**32}),
            r"positive_ids must be .* got values from 4294967296 .* Use row numbers",
        ),
        (
            lambda: one_step(FEATURES, FEATURES, {"positive_ids": list(range(30))}),
            r"got a list. Use np.array\(positive_ids\)",
        ),
        (
            lambda: one_step(
                FEATURES,
                FEATURES,
                model=DualEncoder(keras.layers.Dense(6), keras.layers.Dense(4)),
            ),
            "got sizes 6 and 4.*projection_size=4",
        ),
        (
            lambda: one_step(FEATURES, FEATURES, model=DualEncoder(OfDicts())),
            r"\['sequence_output', 'pooled_output'\].*def encode_query",
        ),
        (
            lambda: one_step(FEATURES, FEATURES, compute_scores=lambda q, d: q),
            "must return a pair",
        ),
        (
            lambda: one_step(
                FEATURES,
                FEATURES,
                {"positive_ids": np.arange(30)},
                compute_scores=lambda q, d: (ops.sum(q * d, -1), ops.matmul(q, ops.transpose(d))),
            ),
            "here 29, got 30",
        ),
    ],
)
def test_bad_input_raises(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_encoders_that_do_not_fit_together_raise():
    with pytest.raises(TypeError, match=r"got a DualEncoder\. Use its query_encoder"):
        DualEncoder(DualEncoder(encoder()))
    with pytest.raises(TypeError, match=r"such as polus\.ir\.scores\.cosine, got 'cosine'"):
        trainer_of(DualEncoder(encoder()), compute_scores="cosine")
    model = DualEncoder(keras.layers.Dense(6), keras.layers.Dense(4), shared_projection=True)
    with pytest.raises(
        ValueError, match=r"vectors of size 6, as at first, got 4.*leave out shared"
    ):
        one_step(FEATURES, FEATURES, model=model)


def test_the_dtype_of_projections_is_kept(tmp_path):
    model = DualEncoder(keras.layers.Dense(6), dtype="bfloat16")
    model((FEATURES[:2], FEATURES[:2]))
    model.save(tmp_path / "model.keras")
    for each in (model, keras.saving.load_model(tmp_path / "model.keras")):
        dtypes = [each.query_projection.kernel.dtype, each.document_projection.kernel.dtype]
        assert dtypes == ["bfloat16", "bfloat16"]


def test_a_model_without_the_methods_is_told_the_class_to_write(tmp_path):
    with pytest.raises(TypeError, match="class MyDualEncoder") as error:
        trainer_of(encoder())
    message = str(error.value)
    written = {"keras": keras, "polus": polus, "__name__": __name__}
    exec(message[message.index("@keras") :], written)
    model = written["MyDualEncoder"](encoder())
    batch = normal(B, 3), normal(B, 3)
    trainer_of(model, freeze_encoder=False).train_step(*batch)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(loaded(batch), model(batch), strict=True):
        np.testing.assert_allclose(numpy(ours), numpy(theirs), rtol=1e-6)


def test_mined_negatives_are_the_best_unjudged_documents_below_the_margin():
    queries, documents = normal(4, 5), normal(40, 5)
    relevant = [np.array([0, 1]), np.array([2]), np.array([3]), np.array([4])]
    pairs = np.array([(q, d) for q, rows in enumerate(relevant) for d in rows])
    everything = queries @ documents.T
    for ranks, margin in (((0, 40), 0.95), ((2, 6), None)):
        found = mine(queries, documents, relevant, pairs, 3, ranks, margin)
        for (query, document), row in zip(pairs, found, strict=True):
            order = [d for d in np.argsort(-everything[query]) if d not in relevant[query]]
            expected = order[slice(*ranks)]
            if margin is not None:
                limit = everything[query, document]
                limit -= 0.05 * abs(limit)
                expected = [d for d in expected if everything[query, d] < limit]
            expected = (expected + [-1] * 3)[:3]
            assert row.tolist() == expected


def collection():
    """Returns documents, and queries that are noisy rotated copies of some of them."""
    documents = normal(40, 8)
    rotation = np.linalg.qr(normal(8, 8))[0]
    queries = documents[:30] @ rotation + 0.1 * normal(30, 8)
    ids = [f"d{row}" for row in range(40)]
    qrels = {f"q{row}": {f"d{row}": 1} for row in range(30)}
    return queries.astype("float32"), documents, ids, qrels


def test_training_with_validation_and_mining_learns_to_retrieve():
    queries, documents, document_ids, qrels = collection()
    query_ids = list(qrels)
    relevant = relevant_rows(qrels, query_ids, document_ids)
    data = PairBatches(queries, documents, relevant, batch_size=15)
    validation = RetrievalValidation(queries, documents, qrels, query_ids, document_ids)
    mining = HardNegativeMining(data, k=2, every_epochs=2)
    model = DualEncoder(keras.layers.Identity())
    trainer = trainer_of(model, encoded=True, optimizer=keras.optimizers.Adam(0.05))
    history = trainer.train(data, epochs=8, callbacks=[mining, validation])
    values = [epoch["validation_nDCG@10"] for epoch in history.epochs]
    assert values[0] < 0.8 < validation.best
    assert validation.best == max(values)
    assert validation.best_epoch == int(np.argmax(values))
    assert (data.negatives >= 0).any()
    for row, (query, _) in zip(data.negatives, data.pairs, strict=True):
        assert not set(row.tolist()) & set(relevant[query].tolist())
    model.query_projection.kernel.assign(np.zeros((8, 8)))
    validation.on_train_end()
    # The best weights are restored, also by a resumed run.
    ids = [document_ids[row] for row in range(40)]
    found = evaluate(qrels, validation.run(), ["nDCG@10"])["nDCG@10"]
    assert found == pytest.approx(validation.best)
    other = RetrievalValidation(queries, documents, qrels, query_ids, ids)
    other.set_state(validation.get_state())
    assert (other.best, other.best_epoch) == (validation.best, validation.best_epoch)


def test_the_best_weights_are_restored_with_batch_statistics():
    queries, documents = normal(12, 6), normal(12, 6)
    ids = [str(row) for row in range(12)]
    qrels = {each: {each: 1} for each in ids}
    validation = RetrievalValidation(
        queries, documents, qrels, ids, ids, measures=["MRR@10"], monitor="MRR@10"
    )
    model = DualEncoder(encoder(normalization=True))
    trainer = trainer_of(model, freeze_encoder=False)
    data = PairBatches(queries, documents, [[row] for row in range(12)], batch_size=4)
    trainer.train(data, epochs=2, callbacks=[validation], steps_per_execution=1)
    best = validation.run()
    assert evaluate(qrels, best, ["MRR@10"])["MRR@10"] == validation.best
    for weight in model.weights:
        weight.assign(weight + 1)
    assert validation.run() != best
    validation.on_train_end()
    assert validation.run() == best


def test_training_that_makes_the_model_worse_is_undone():
    queries = normal(12, 6)
    documents = queries + 0.1 * normal(12, 6)
    ids = [str(row) for row in range(12)]
    validation = RetrievalValidation(
        queries,
        documents,
        {each: {each: 1} for each in ids},
        ids,
        ids,
        measures=["MRR@10"],
        monitor="MRR@10",
    )
    model = DualEncoder(keras.layers.Identity())
    trainer = trainer_of(model, encoded=True, optimizer=keras.optimizers.SGD(30.0))
    data = PairBatches(queries, documents, [[(row + 1) % 12] for row in range(12)], batch_size=4)
    history = trainer.train(data, epochs=2, callbacks=[validation])
    assert (validation.best, validation.best_epoch) == (1, -1)
    assert [epoch["validation_MRR@10"] < 1 for epoch in history.epochs] == [True, True]
    np.testing.assert_array_equal(numpy(model.query_projection.kernel), np.eye(6))


def test_evaluate_computes_in_batch_accuracy():
    queries, documents, *_ = collection()
    relevant = [[row] for row in range(30)]
    data = PairBatches(queries, documents, relevant, batch_size=15)
    trainer = trainer_of(
        DualEncoder(keras.layers.Identity()),
        compute_scores=scores.dot_product,
        loss=losses.InfoNCE(1.0),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="first")],
    )
    results = trainer.evaluate(data)
    products = queries @ documents.T
    order = list(data.order(0))
    first = [
        products[row, row] >= products[row, data.pairs[places][:, 1]].max()
        for places in order
        for row in data.pairs[places][:, 0]
    ]
    assert results["first"] == pytest.approx(np.mean(first))


def test_custom_scores_need_a_similarity():
    queries, documents, ids, qrels = collection()
    validation = RetrievalValidation(queries, documents, qrels, list(qrels), ids)
    data = PairBatches(queries, documents, [[row] for row in range(30)])
    trainer = trainer_of(
        DualEncoder(keras.layers.Identity()), compute_scores=lambda *x: scores.cosine(*x)
    )
    with pytest.raises(ValueError, match="similarity=polus"):
        trainer.train(data, epochs=1, callbacks=[validation])


def test_trained_models_are_saved_and_loaded(tmp_path):
    """Even though training calls the layers, and never the model itself."""
    model = DualEncoder(encoder())
    trainer = trainer_of(model)
    trainer.train_step(normal(B, 3), normal(B, 3))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    inputs = (normal(2, 3), normal(2, 3))
    expected = [numpy(x) for x in model(inputs)]
    assert np.abs(expected[0] - numpy(model.query_encoder(inputs[0]))).max() > 0.1, "trained"
    for ours, theirs in zip(loaded(inputs), expected, strict=True):
        np.testing.assert_allclose(numpy(ours), theirs, rtol=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """With mined negatives, also mined again in the next epoch, and a learned temperature."""
    queries, documents, ids, qrels = collection()

    def run(epochs, folder):
        keras.utils.set_random_seed(0)
        data = PairBatches(queries, documents, [[row] for row in range(30)], batch_size=12)
        trainer = trainer_of(
            DualEncoder(keras.layers.Identity()),
            losses.InfoNCE(0.1, learned=True),
            encoded=True,
            optimizer=keras.optimizers.Adam(1e-2),
        )
        callbacks = [
            HardNegativeMining(data, k=1, every_epochs=2),
            RetrievalValidation(queries, documents, qrels, list(qrels), ids, restore_best=False),
            Checkpoint(tmp_path / folder),
        ]
        trainer.train(data, epochs=epochs, callbacks=callbacks, resume=tmp_path / folder)
        best = callbacks[1].best, callbacks[1].best_epoch
        return [numpy(weight) for weight in trainer.trainable_weights], best

    expected = run(3, "whole")
    run(2, "parts")
    found = run(3, "parts")
    assert found[1] == expected[1]
    for ours, theirs in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
