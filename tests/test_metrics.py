"""Metrics equal scikit-learn's and Keras' for all shapes, weights, masks and compilers."""

import keras
import numpy as np
import pytest
from keras import ops
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from polus.data import from_arrays
from polus.masks import carry_mask, mask_of, stop_gradient
from polus.metrics import (
    Accuracy,
    IConfusionMatrix,
    IMetric,
    KerasMetric,
    MacroF1Score,
    OutputMetric,
    WeightedSamples,
    as_metric,
    as_metrics,
    update_metrics,
)
from polus.training import ClassifierTrainer

C = 4
REFERENCES = {
    Accuracy: accuracy_score,
    MacroF1Score: lambda *args, **kwargs: f1_score(*args, average="macro", **kwargs),
}
every_metric = pytest.mark.parametrize("cls", REFERENCES)


def random_labels(n=200, num_classes=C, seed=0):
    rng = np.random.default_rng(seed)
    y_true = rng.integers(0, num_classes, n)
    return y_true, np.where(rng.random(n) < 0.6, y_true, rng.integers(0, num_classes, n))


def compiled(fn):
    """Compiles an update with the backend's own compiler and handles variables as Keras does."""
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            return tf.function(fn, jit_compile=True)
        case "jax":
            import jax

            metric = fn.__self__
            pure = jax.jit(lambda state, *args: metric.stateless_update_state(state, *args))

            def stateful(samples):
                state = pure([v.value for v in metric.variables], *samples)
                for variable, value in zip(metric.variables, state, strict=True):
                    variable.assign(value)

            return stateful
        case _:
            return fn


LABELS = {
    "random": random_labels(),
    "a class that never occurs": (np.array([0, 0, 2, 2]), np.array([0, 2, 2, 2])),
    "a class that is only predicted": (np.array([0, 0, 2]), np.array([0, 1, 2])),
    "a class that is never predicted": (np.array([0, 1, 2]), np.array([0, 0, 2])),
    "one class": (np.zeros(5, int), np.zeros(5, int)),
    "one sample": (np.array([3]), np.array([3])),
    "all wrong": (np.array([0, 1, 2]), np.array([1, 2, 3])),
}


@every_metric
@pytest.mark.parametrize("case", LABELS)
def test_equals_scikit_learn(cls, case):
    y_true, y_pred = LABELS[case]
    metric = cls(C)
    metric.samples_from_batch((ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)))
    measure = metric.evaluate()
    assert type(measure) is float
    assert measure == pytest.approx(REFERENCES[cls](y_true, y_pred), abs=1e-6)


@every_metric
def test_compiled_updates_accumulate_over_batches_and_evaluate_resets(cls):
    y_true, y_pred = random_labels()
    metric = cls(C)
    update = compiled(metric.samples_from_batch)
    for round_ in range(2):
        part = slice(100 * round_)  # the second time another number comes out
        for start in range(0, len(y_true[part]), 32):
            batch = slice(start, start + 32)
            y = (
                ops.convert_to_tensor(y_true[part][batch]),
                ops.convert_to_tensor(y_pred[part][batch]),
            )
            update(y)
        if round_:
            expected = REFERENCES[cls](y_true[part], y_pred[part])
            assert metric.evaluate() == pytest.approx(expected, abs=1e-6)
        else:
            assert np.isnan(metric.evaluate())


def one_hot(y):
    return np.eye(C)[y]


def scores(y):
    return np.random.default_rng(1).normal(size=(*y.shape, C)) + 20 * one_hot(y)


SHAPES = {
    "(N,) and (N, C)": lambda t, p: (t, scores(p)),
    "(N, 1) and (N, C)": lambda t, p: (t[:, None], scores(p)),
    "(N, 1) and (N, 1)": lambda t, p: (t[:, None], p[:, None]),
    "(N,) and (N, 1)": lambda t, p: (t, p[:, None]),
    "(N, T) and (N, T)": lambda t, p: (t.reshape(-1, 5), p.reshape(-1, 5)),
    "(N, T) and (N, T, C)": lambda t, p: (t.reshape(-1, 5), scores(p.reshape(-1, 5))),
    "(N, T, 1) and (N, T, C)": lambda t, p: (t.reshape(-1, 5, 1), scores(p.reshape(-1, 5))),
    "(N, T) and (N, T), T = C": lambda t, p: (t.reshape(-1, C), p.reshape(-1, C)),
    "(N, T) and (N, T, C), T = C": lambda t, p: (t.reshape(-1, C), scores(p.reshape(-1, C))),
    "one-hot and (N, C)": lambda t, p: (one_hot(t), scores(p)),
    "one-hot integers and (N, C)": lambda t, p: (one_hot(t).astype("int32"), scores(p)),
    "one-hot and (N, T, C)": lambda t, p: (
        one_hot(t.reshape(-1, 5)),
        scores(p.reshape(-1, 5)),
    ),
    "one-hot and classes": lambda t, p: (one_hot(t), p),
    "floats": lambda t, p: (t.astype("float32"), p.astype("float32")),
    "uint8": lambda t, p: (t.astype("uint8"), p.astype("uint8")),
    "int64": lambda t, p: (t.astype("int64"), p.astype("int64")),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_of_labels_and_predictions(case):
    y_true, y_pred = random_labels()
    metric = Accuracy(C)
    metric.samples_from_batch(SHAPES[case](y_true, y_pred))
    expected = confusion_matrix(y_true, y_pred, labels=range(C))
    np.testing.assert_array_equal(ops.convert_to_numpy(metric.confusion_matrix), expected)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (3, 2)])
def test_probabilities_of_two_classes_are_split_at_one_half(shape):
    y_true = np.array([0, 0, 1, 1, 1, 0])
    probability = np.array([0.1, 0.6, 0.9, 0.4, 0.51, 0.5], "float32").reshape(shape)
    metric = MacroF1Score(2)
    if shape == (3, 2):  # one-hot labels look the same
        y_true = y_true.reshape(3, 2)
        metric.reduce_f = lambda samples: [ops.reshape(s, (-1,)) for s in samples]
    metric.samples_from_batch((y_true, probability))
    expected = f1_score(y_true.ravel(), probability.ravel() > 0.5, average="macro")
    assert metric.evaluate() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("true_shape", "pred_shape"), [((8,), (8, 3)), ((8,), (7,)), ((8, 2), (8,)), ((8,), (8, 2, C))]
)
def test_other_shapes_raise(true_shape, pred_shape):
    with pytest.raises(ValueError, match=r"num_classes=4 .*got y_true of shape .*Use reduce_f"):
        Accuracy(C).samples_from_batch((np.zeros(true_shape, "int32"), np.zeros(pred_shape)))


@pytest.mark.parametrize(
    ("y_true", "y_pred"),
    [([0, -1], [0, 0]), ([0, 4], [0, 0]), ([0, 0], [0, 7]), ([0, 1.5], [0, 1])],
)
def test_labels_out_of_range_raise_and_are_not_counted(y_true, y_pred):
    metric = Accuracy(C)
    compiled(metric.samples_from_batch)((np.array(y_true), np.array(y_pred)))
    assert np.isnan(ops.convert_to_numpy(metric.result()))
    with pytest.raises(ValueError, match=r"got 1 invalid label, .* integers from 0 to 3"):
        metric.evaluate()
    metric.samples_from_batch(([1], [1]))
    assert metric.evaluate() == 1.0  # the error does not stay


def test_error_of_labels_out_of_range_names_the_first_batch():
    metric = Accuracy(C)
    update = compiled(metric.samples_from_batch)
    for labels in ([0, 1], [2, 3], [1, 4], [0, 1], [-1, 9]):
        update((np.array(labels), np.array([0, 0])))
    with pytest.raises(ValueError, match=r"got 3 invalid labels, the first in batch 2 \(counting"):
        metric.evaluate()


def test_error_of_validation_labels_out_of_range_names_the_batch():
    x, y = np.zeros((12, 2), "float32"), np.array([0] * 9 + [C] + [0] * 2)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(C)])
    trainer = ClassifierTrainer(model, keras.optimizers.SGD(), lambda y, p: ops.mean(p))
    trainer.metrics = [Accuracy(C)]
    with pytest.raises(ValueError, match="got 1 invalid label, the first in batch 4 "):
        trainer.evaluate(from_arrays((x, y), 2, shuffle=False))


@pytest.mark.parametrize("padding", [-100, 0])
def test_ignored_class_is_not_counted(padding):
    metric = Accuracy(C, ignore_class=padding)
    metric.samples_from_batch((np.array([1, 2, padding, padding]), np.array([1, 1, 3, 1])))
    assert metric.evaluate() == 0.5


def test_an_empty_batch_changes_nothing_and_no_labels_are_nan():
    metric = MacroF1Score(C)
    assert np.isnan(metric.evaluate())
    metric.samples_from_batch(([1, 1], [1, 1]))
    metric.samples_from_batch((np.zeros(0, "int32"), np.zeros((0, C), "float32")))
    assert metric.evaluate() == 1.0


def test_counts_are_exact_beyond_the_integers_of_float32():
    metric = Accuracy(2)
    metric.confusion_matrix.assign([[2**24, 0], [0, 0]])
    for _ in range(3):
        metric.samples_from_batch(([0], [0]))
    assert int(metric.confusion_matrix[0, 0]) == 2**24 + 3


def test_reduce_f_selects_samples():
    metric = Accuracy(C, lambda samples: (samples[0]["labels"], samples[1][0]))
    metric.samples_from_batch(({"labels": np.array([1, 2])}, [np.array([1, 1]), "unused"]))
    assert metric.evaluate() == 0.5
    metric.reduce_f = lambda samples: samples[0]
    with pytest.raises(TypeError, match=r"samples of a batch as a tuple .*got a dict"):
        metric.samples_from_batch(({}, None))


@pytest.mark.parametrize("cls", [IMetric, IConfusionMatrix])
def test_interfaces_cannot_be_instantiated(cls):
    with pytest.raises(TypeError, match="abstract"):
        cls()


def test_fewer_than_two_classes_raise():
    with pytest.raises(ValueError, match=r"must be at least 2, got 1.* use num_classes=2"):
        Accuracy(1)


class MeanError(IMetric):
    def __init__(self):
        super().__init__()
        self.total = keras.Variable(0.0, trainable=False)
        self.count = self.add_variable((), "zeros")

    def _samples_from_batch(self, y_true, y_pred):
        self.total.assign_add(ops.sum(ops.abs(y_true - y_pred)))
        self.count.assign_add(ops.cast(ops.size(y_true), "float32"))

    def _evaluate(self):
        return self.total / self.count


def test_a_custom_metric():
    metric = MeanError()
    assert metric.name == "mean_error"
    assert {id(v) for v in metric.variables} == {id(metric.total), id(metric.count)}
    metric.samples_from_batch((np.array([1.0, 2.0]), np.array([1.0, 5.0])))
    assert metric.evaluate() == 1.5
    assert float(metric.total) == 0.0


def test_keras_accepts_our_metrics():
    model = keras.Sequential([keras.layers.Dense(C)])
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=[Accuracy(C)]
    )
    y_true, _ = random_labels(32)
    x = one_hot(y_true)
    logs = model.evaluate(x, y_true, batch_size=16, verbose=0, return_dict=True)
    assert logs["accuracy"] == pytest.approx(
        np.mean(model.predict(x, verbose=0).argmax(-1) == y_true)
    )


def test_keras_metrics_are_wrapped():
    metric = as_metric(keras.metrics.SparseCategoricalAccuracy(name="acc"))
    assert isinstance(metric, KerasMetric)
    assert metric.name == "acc"
    assert metric.variables == metric.metric.variables
    y_true, probabilities = np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    metric.samples_from_batch((y_true, probabilities))
    assert metric.evaluate() == pytest.approx(2 / 3)
    metric.samples_from_batch((y_true, probabilities, np.array([1.0, 1.0, 2.0])))
    assert metric.evaluate() == pytest.approx(2 / 4)  # the third are weights
    assert metric.evaluate() == 0.0  # it was reset


def test_keras_metrics_may_return_arrays():
    metric = KerasMetric(keras.metrics.F1Score(), name="f1")
    y_true = np.array([0, 1, 2, 2])
    metric.samples_from_batch((one_hot(y_true), one_hot(np.array([0, 1, 1, 2]))))
    expected = f1_score(y_true, [0, 1, 1, 2], average=None, labels=range(C), zero_division=0)
    np.testing.assert_allclose(metric.evaluate(), expected, atol=1e-6)


def test_as_metric_rejects_everything_else():
    metric = Accuracy(C)
    assert as_metric(metric) is metric
    with pytest.raises(TypeError, match=r"got 'accuracy' of type str"):
        as_metric("accuracy")
    with pytest.raises(TypeError, match=r"Write MacroF1Score\(\.\.\.\)"):
        as_metric(MacroF1Score)


# Weights

WEIGHTS = np.random.default_rng(2).integers(0, 4, 200).astype("float32") / 2  # some are zero


@every_metric
@pytest.mark.parametrize("shape", ["(N,)", "(N, 1)", "(N, T)", "(N, T), (N,)", "(N, T), (N, T, 1)"])
def test_weighted_metrics_equal_scikit_learn(cls, shape):
    y_true, y_pred = random_labels()
    weights, given = WEIGHTS, WEIGHTS
    if shape == "(N, 1)":
        y_true, given = y_true[:, None], given[:, None]
    elif shape != "(N,)":
        y_true, y_pred, given = (a.reshape(-1, 5) for a in (y_true, y_pred, given))
    if shape == "(N, T), (N,)":
        given = given[:, 0]
        weights = given.repeat(5)
    elif shape == "(N, T), (N, T, 1)":
        given = given[..., None]
    metric = cls(C)
    update = compiled(metric.samples_from_batch)
    for rows in np.array_split(np.arange(len(y_true)), 3):
        update((y_true[rows], scores(y_pred[rows]), given[rows]))
    expected = REFERENCES[cls](y_true.ravel(), y_pred.ravel(), sample_weight=weights)
    assert metric.evaluate() == pytest.approx(expected, abs=1e-6)


@every_metric
def test_batches_without_weights_count_with_weight_one(cls):
    y_true, y_pred = random_labels()
    metric = cls(C)
    metric.samples_from_batch((y_true[:80], y_pred[:80]))
    metric.samples_from_batch((y_true[80:140], y_pred[80:140], WEIGHTS[80:140]))
    metric.samples_from_batch((y_true[140:], y_pred[140:]))
    weights = np.r_[np.ones(80), WEIGHTS[80:140], np.ones(60)]
    expected = REFERENCES[cls](y_true, y_pred, sample_weight=weights)
    assert metric.evaluate() == pytest.approx(expected, abs=1e-6)


def test_an_example_of_weight_zero_is_as_if_it_were_absent():
    metric = MacroF1Score(C)
    metric.samples_from_batch(([0, 1, 3, -1], [0, 0, 2, 0], [1.0, 2.0, 0.0, 0.0]))
    expected = f1_score([0, 1], [0, 0], sample_weight=[1, 2], average="macro")
    assert metric.evaluate() == pytest.approx(expected)


def test_weights_are_exact_beyond_the_integers_of_float32():
    metric = Accuracy(2)
    update = compiled(metric.samples_from_batch)
    update((np.array([0, 1]), np.array([0, 0]), np.array([2.0**24, 2.0**24], "float32")))
    for _ in range(64):
        update((np.array([0]), np.array([0]), np.ones(1, "float32")))
    matrix = ops.convert_to_numpy(metric.confusion_matrix)
    np.testing.assert_array_equal(matrix, [[2**24 + 64, 0], [2**24, 0]])


def test_weights_of_another_shape_raise():
    with pytest.raises(ValueError, match=r"expected sample_weight .* \(4, 5\).* got \(5,\)"):
        Accuracy(C).samples_from_batch((np.zeros((4, 5)), np.zeros((4, 5)), np.ones(5)))


def dense_model(outputs=C):
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(outputs)])


def test_keras_metrics_that_are_assigned_later_are_those_of_the_argument():
    x, y = np.eye(3, dtype="float32"), np.array([0, 1, 2])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = ClassifierTrainer(dense_model(), keras.optimizers.SGD(0.0), loss, [Accuracy(C)])
    data = from_arrays((x, y), 3)
    accuracy = trainer.train(data, 1).epochs[0]["accuracy"]
    trainer.metrics.append(keras.metrics.SparseCategoricalAccuracy(name="of_keras"))
    assert trainer.train(data, 1, dry_run=True).epochs[0]["of_keras"] == pytest.approx(accuracy)
    later = keras.metrics.SparseCategoricalAccuracy(name="later")
    trainer.metrics = {"train": [later], "validation": [Accuracy(C, name="held_out")]}
    assert trainer.train(data, 1).epochs[0]["later"] == pytest.approx(accuracy)
    assert trainer.evaluate(data)["held_out"] == pytest.approx(accuracy)
    trainer.metrics = ["accuracy"]
    with pytest.raises(TypeError, match=r"A metric must be a polus\.metrics\.IMetric or"):
        trainer.train(data, 1)


def test_weighted_metrics_that_are_assigned_later_are_those_of_the_argument():
    x, y = np.eye(3, dtype="float32"), np.array([0, 1, 2])
    weights = np.array([1.0, 0.0, 2.0], "float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy
    arguments = dense_model(), keras.optimizers.SGD(0.0), loss, [Accuracy(C)]
    data = from_arrays((x, y, weights), 3)
    logs = []
    for later in (False, True):
        trainer = ClassifierTrainer(*arguments, weighted_metrics=[accuracy(name="first")])
        if later:
            trainer.train(data, 1)
            trainer.weighted_metrics = [accuracy(name="second")]
        else:
            trainer.weighted_metrics.append(accuracy(name="second"))
        logs.append(trainer.train(data, 1).epochs[0] | trainer.evaluate(data))
    assert logs[0]["second"] == pytest.approx(logs[0]["first"])
    assert logs[1]["second"] == pytest.approx(logs[0]["second"])
    assert "first" not in logs[1]


def test_weights_reach_weighted_metrics_only_as_in_fit():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)).astype("float32"), rng.integers(0, C, 40)
    weights = rng.random(40).astype("float32")

    def metrics():
        return [
            keras.metrics.SparseCategoricalAccuracy(name="a"),
            keras.metrics.SparseCategoricalCrossentropy(name="b", from_logits=True),
        ]

    def weighted():
        return [
            keras.metrics.SparseCategoricalAccuracy(name="wa"),
            keras.metrics.SparseCategoricalCrossentropy(name="wb", from_logits=True),
        ]

    model = dense_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=metrics(), weighted_metrics=weighted())
    expected = model.evaluate(x, y, 16, sample_weight=weights, verbose=0, return_dict=True)
    ours = as_metrics([*metrics(), Accuracy(C, name="acc")])
    ours_weighted = as_metrics([*weighted(), Accuracy(C, name="wacc")], weighted=True)
    for i in range(0, 40, 16):
        batch = slice(i, i + 16)
        samples = WeightedSamples(y[batch], model(x[batch]), weights[batch])
        update_metrics([*ours, *ours_weighted], ours_weighted, samples)
    results = {m.name: m.evaluate() for m in (*ours, *ours_weighted)}
    assert (results.pop("acc"), results.pop("wacc")) == pytest.approx(
        (expected["a"], expected["wa"]), abs=1e-6
    )
    del expected["loss"]
    assert results == pytest.approx(expected, abs=1e-5)
    assert abs(results["a"] - results["wa"]) > 1e-3


def test_keras_weights_our_metrics():
    y_true, _ = random_labels(32)
    model = dense_model()
    model.compile(loss=lambda y, p: ops.mean(p, -1), weighted_metrics=[MacroF1Score(C)])
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    logs = model.evaluate(x, y_true, 16, sample_weight=WEIGHTS[:32], verbose=0, return_dict=True)
    y_pred = model.predict(x, verbose=0).argmax(-1)
    expected = f1_score(y_true, y_pred, average="macro", sample_weight=WEIGHTS[:32])
    assert logs["macro_f1"] == pytest.approx(expected, abs=1e-6)


def test_no_weights_are_as_in_metrics():
    metric = Accuracy(C)
    update_metrics([metric], [metric], WeightedSamples(np.array([1, 2]), np.array([1, 1]), None))
    assert metric.evaluate() == 0.5


def test_other_tuples_reach_all_metrics_as_they_are():
    class Sum(IMetric):
        def __init__(self):
            super().__init__()
            self.total = self.add_variable((), "zeros")

        def _samples_from_batch(self, a, b, c):
            self.total.assign_add(a + b + c)

        def _evaluate(self):
            return self.total

    metric = Sum()
    update_metrics([metric], [], (1.0, 2.0, 4.0))
    assert metric.evaluate() == 7.0
    assert metric.evaluate() == 0.0  # it was reset


# Masks


def masked_model(outputs=C):
    """Predicts each token's class from the token. Token 0 is padding."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Embedding(9, 8, mask_zero=True), keras.layers.Dense(outputs)]
    return keras.Sequential([keras.Input((6,), dtype="int32"), *layers])


def padded():
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 9, (20, 6)), rng.integers(0, C, (20, 6))
    x[np.arange(6) >= rng.integers(1, 7, (20, 1))] = 0
    return x.astype("int32"), y


class MaskArgument(keras.layers.Layer):
    """Records its mask argument, Keras' public way to a mask."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, inputs, mask=None):
        self.seen = mask
        return inputs


def test_mask_of_returns_the_mask_that_keras_passes_to_layers():
    layer, prediction = MaskArgument(), masked_model()(padded()[0])
    layer(prediction)
    np.testing.assert_array_equal(mask_of(prediction), layer.seen)
    np.testing.assert_array_equal(mask_of(prediction), padded()[0] != 0)
    layer(carry_mask(prediction, 2 * prediction))
    np.testing.assert_array_equal(layer.seen, padded()[0] != 0)
    assert mask_of(2 * prediction) is None
    assert mask_of(np.zeros(3)) is None


def test_masks_are_carried_over_in_structures():
    prediction = masked_model()(padded()[0])
    source = {"a": prediction, "b": ops.ones(3)}
    target = keras.tree.map_structure(lambda x: x * 1, source)
    assert carry_mask(source, target) is target
    assert mask_of(target["a"]) is mask_of(prediction)
    assert mask_of(target["b"]) is None
    assert mask_of(stop_gradient(prediction)) is mask_of(prediction)


def metrics_of_keras():
    return [
        keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="crossentropy"),
        keras.metrics.SparseTopKCategoricalAccuracy(2, name="top_k"),
    ]


def test_training_and_validation_metrics_count_masks_as_in_fit():
    """Keras' `fit` on JAX loses masks before training metrics: there a plain sum is the reference.

    The rate of the optimizer is zero then, so that one pass over the data after training has the
    predictions of each step.
    """
    x, y = padded()
    loses_masks = keras.backend.backend() == "jax"
    rate = 0.0 if loses_masks else 0.5
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = masked_model()
    model.compile(keras.optimizers.SGD(rate), loss, metrics=metrics_of_keras())
    options = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    expected = model.fit(x, y, validation_data=(x, y), **options).history
    if loses_masks:
        for metric in metrics_of_keras():
            metric.update_state(y, model(x), sample_weight=x != 0)
            expected[metric.name] = [float(metric.result())] * 2
    trainer = ClassifierTrainer(
        masked_model(), keras.optimizers.SGD(rate), loss, metrics=metrics_of_keras()
    )
    logs = trainer.train(from_arrays((x, y), 8, shuffle=False), epochs=2).to_dict()
    validation = trainer.evaluate(from_arrays((x, y), 8, shuffle=False))
    for name in ("accuracy", "crossentropy", "top_k"):
        np.testing.assert_allclose(logs[name], expected[name], rtol=1e-4)
        assert validation[name] == pytest.approx(expected[f"val_{name}"][-1], rel=1e-4)


@every_metric
@pytest.mark.parametrize("weighted", [False, True])
def test_masked_labels_are_not_counted(cls, weighted):
    x, y = padded()
    model, metric, mask = masked_model(), cls(C), x != 0
    weights = WEIGHTS[:120].reshape(20, 6)
    prediction = ops.convert_to_numpy(model(x)).argmax(-1)
    for batch in (slice(8), slice(8, 20)):
        samples = (np.where(mask, y, -1)[batch], model(x[batch]))  # -1 is invalid
        metric.samples_from_batch((*samples, weights[batch]) if weighted else samples)
    expected = REFERENCES[cls](
        y[mask], prediction[mask], sample_weight=weights[mask] if weighted else None
    )
    assert metric.evaluate() == pytest.approx(expected, abs=1e-6)


def test_trainer_counts_masks_in_our_metrics():
    x, y = padded()
    trainer = ClassifierTrainer(
        masked_model(), keras.optimizers.SGD(0.0), lambda y, p: ops.mean(p), metrics=[Accuracy(C)]
    )
    history = trainer.train(from_arrays((x, y), 8), epochs=1)
    y_pred = ops.convert_to_numpy(trainer.model(x)).argmax(-1)
    expected = accuracy_score(y[x != 0], y_pred[x != 0])
    assert history.epochs[0]["accuracy"] == pytest.approx(expected, abs=1e-6)
    assert trainer.evaluate([(x, y)])["accuracy"] == pytest.approx(expected, abs=1e-6)


def test_masks_and_a_weight_for_each_token_train_as_in_fit():
    """On PyTorch, Keras multiplies the weights by the mask in place."""
    x, y = padded()
    weights = WEIGHTS[:120].reshape(20, 6).astype("float32")
    before, loss = weights.copy(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = masked_model()
    model.compile(keras.optimizers.SGD(0.5), loss)
    options = {"batch_size": 10, "epochs": 2, "shuffle": False, "verbose": 0}
    expected = model.fit(x, y, sample_weight=weights.copy(), **options).history["loss"]
    metric = metrics_of_keras()[:1]
    trainer = ClassifierTrainer(
        masked_model(), keras.optimizers.SGD(0.5), loss, weighted_metrics=metric
    )
    batches = [(x[i : i + 10], y[i : i + 10], weights[i : i + 10]) for i in (0, 10)]
    history = trainer.train(batches, epochs=2)
    np.testing.assert_allclose(history.to_dict()["loss"], expected, rtol=1e-5)
    validation = trainer.evaluate(batches)
    np.testing.assert_array_equal(weights, before)
    right = ops.convert_to_numpy(trainer.model(x)).argmax(-1) == y
    counted = before * (x != 0)
    assert validation["accuracy"] == pytest.approx(
        (right * counted).sum() / counted.sum(), rel=1e-5
    )
    trainer.optimizer.learning_rate = 0.0
    trained = trainer.train(batches, epochs=1).epochs[0]["accuracy"]
    assert trained == pytest.approx(validation["accuracy"], rel=1e-6)


# Several metrics


def test_metrics_by_output_as_in_compile():
    inputs = keras.Input((3,))
    outputs = {"a": keras.layers.Dense(C)(inputs), "b": keras.layers.Dense(2)(inputs)}
    model = keras.Model(inputs, outputs)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)).astype("float32")
    y = {"a": rng.integers(0, C, 20), "b": rng.normal(size=(20, 2)).astype("float32")}

    def metrics():
        mae, mse = keras.metrics.MeanAbsoluteError("mae"), keras.metrics.MeanSquaredError("mse")
        return {"a": keras.metrics.SparseCategoricalAccuracy("acc"), "b": [mae, mse]}

    model.compile(
        loss={"a": lambda y, p: ops.mean(p, -1), "b": "mse"}, metrics=metrics(), optimizer="sgd"
    )
    expected = model.evaluate(x, y, 8, verbose=0, return_dict=True)
    ours = as_metrics({**metrics(), "a": [metrics()["a"], Accuracy(C)]})
    for i in range(0, 20, 8):
        batch = slice(i, i + 8)
        samples = (keras.tree.map_structure(lambda a, b=batch: a[b], y), model(x[batch]))
        update_metrics(ours, [], samples)
    results = {metric.name: metric.evaluate() for metric in ours}
    assert list(results) == ["a_acc", "a_accuracy", "b_mae", "b_mse"]
    assert results.pop("a_accuracy") == pytest.approx(expected["a_acc"], abs=1e-6)
    assert results == pytest.approx({name: expected[name] for name in results}, abs=1e-5)
    assert ours[1].evaluate() is not None
    assert all(not float(ops.max(v)) for metric in ours for v in metric.variables)


def test_metrics_of_an_unknown_output_or_without_one_raise():
    y, prediction = {"a": np.zeros(2)}, {"a": np.zeros((2, C), "float32")}
    with pytest.raises(ValueError, match="with the key 'b', got a dict with the keys 'a'"):
        OutputMetric(Accuracy(C), "b").samples_from_batch((y, prediction))
    with pytest.raises(TypeError, match=r"expected y_true to be a tensor, got a dict .*metrics=\{"):
        Accuracy(C).samples_from_batch((y, prediction))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the backend's own
        KerasMetric(metrics_of_keras()[0]).samples_from_batch((y, prediction))
    assert "use metrics={" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("accuracy", "metrics must be a list, got 'accuracy'"),
        (Accuracy(2), "metrics must be a list, got <Accuracy"),
        (["accuracy"], "got 'accuracy' of type str"),
        ({"a": ["accuracy"]}, "got 'accuracy' of type str"),
    ],
)
def test_arguments_that_are_not_metrics_raise(given, seen):
    with pytest.raises(TypeError, match=seen):
        as_metrics(given)
    assert as_metrics(None) == []


def test_metrics_that_take_no_weights_cannot_be_weighted():
    with pytest.raises(TypeError, match=r"takes no weights.*sample_weight=None"):
        as_metrics([MeanError()], weighted=True)
