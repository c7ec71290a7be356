"""Metrics equal scikit-learn's, whatever the shapes, the batches and the compiler."""

import keras
import numpy as np
import pytest
from keras import ops
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from polus.metrics import Accuracy, IConfusionMatrix, IMetric, KerasMetric, MacroF1Score, as_metric

C = 4
REFERENCES = {
    Accuracy: accuracy_score,
    MacroF1Score: lambda y_true, y_pred: f1_score(y_true, y_pred, average="macro"),
}
every_metric = pytest.mark.parametrize("cls", REFERENCES)


def random_labels(n=200, num_classes=C, seed=0):
    rng = np.random.default_rng(seed)
    y_true = rng.integers(0, num_classes, n)
    return y_true, np.where(rng.random(n) < 0.6, y_true, rng.integers(0, num_classes, n))


def compiled(fn):
    """The backend's own compiler, with variables handled as Keras' trainers do it."""
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
def test_batches_add_up_inside_a_compiled_step_and_evaluate_resets(cls):
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
def test_shapes(case):
    y_true, y_pred = random_labels()
    metric = Accuracy(C)
    metric.samples_from_batch(SHAPES[case](y_true, y_pred))
    expected = confusion_matrix(y_true, y_pred, labels=range(C))
    np.testing.assert_array_equal(ops.convert_to_numpy(metric.confusion_matrix), expected)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (3, 2)])
def test_two_classes_are_told_apart_at_one_half(shape):
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
def test_other_shapes_are_refused(true_shape, pred_shape):
    with pytest.raises(ValueError, match=r"num_classes=4 got y_true of shape .*Use reduce_f"):
        Accuracy(C).samples_from_batch((np.zeros(true_shape, "int32"), np.zeros(pred_shape)))


@pytest.mark.parametrize(
    ("y_true", "y_pred"),
    [([0, -1], [0, 0]), ([0, 4], [0, 0]), ([0, 0], [0, 7]), ([0, 1.5], [0, 1])],
)
def test_labels_out_of_range_never_count_silently(y_true, y_pred):
    metric = Accuracy(C)
    compiled(metric.samples_from_batch)((np.array(y_true), np.array(y_pred)))
    assert np.isnan(ops.convert_to_numpy(metric.result()))
    with pytest.raises(ValueError, match=r"met 1 labels .* whole number from 0 to 3"):
        metric.evaluate()
    metric.samples_from_batch(([1], [1]))
    assert metric.evaluate() == 1.0  # the error doesn't stay


@pytest.mark.parametrize("padding", [-100, 0])
def test_ignored_class(padding):
    metric = Accuracy(C, ignore_class=padding)
    metric.samples_from_batch((np.array([1, 2, padding, padding]), np.array([1, 1, 3, 1])))
    assert metric.evaluate() == 0.5


def test_empty_batch_changes_nothing_and_nothing_gives_nan():
    metric = MacroF1Score(C)
    assert np.isnan(metric.evaluate())
    metric.samples_from_batch(([1, 1], [1, 1]))
    metric.samples_from_batch((np.zeros(0, "int32"), np.zeros((0, C), "float32")))
    assert metric.evaluate() == 1.0


def test_counts_go_on_where_float32_stands_still():
    metric = Accuracy(2)
    metric.confusion_matrix.assign([[2**24, 0], [0, 0]])
    for _ in range(3):
        metric.samples_from_batch(([0], [0]))
    assert int(metric.confusion_matrix[0, 0]) == 2**24 + 3


def test_reduce_f_gives_what_the_metric_takes():
    metric = Accuracy(C, lambda samples: (samples[0]["labels"], samples[1][0]))
    metric.samples_from_batch(({"labels": np.array([1, 2])}, [np.array([1, 1]), "unused"]))
    assert metric.evaluate() == 0.5
    metric.reduce_f = lambda samples: samples[0]
    with pytest.raises(TypeError, match="got a dict as the samples"):
        metric.samples_from_batch(({}, None))


@pytest.mark.parametrize("cls", [IMetric, IConfusionMatrix])
def test_interfaces_are_not_instantiated(cls):
    with pytest.raises(TypeError, match="abstract"):
        cls()


def test_too_few_classes():
    with pytest.raises(ValueError, match=r"num_classes=1; .* write num_classes=2"):
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


def test_a_metric_of_ones_own():
    metric = MeanError()
    assert metric.name == "mean_error"
    assert {id(v) for v in metric.variables} == {id(metric.total), id(metric.count)}
    metric.samples_from_batch((np.array([1.0, 2.0]), np.array([1.0, 5.0])))
    assert metric.evaluate() == 1.5
    assert float(metric.total) == 0.0


def test_keras_takes_ours_too():
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


def test_keras_metric_adapted():
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


def test_keras_metric_that_is_no_scalar():
    metric = KerasMetric(keras.metrics.F1Score(), name="f1")
    y_true = np.array([0, 1, 2, 2])
    metric.samples_from_batch((one_hot(y_true), one_hot(np.array([0, 1, 1, 2]))))
    expected = f1_score(y_true, [0, 1, 1, 2], average=None, labels=range(C), zero_division=0)
    np.testing.assert_allclose(metric.evaluate(), expected, atol=1e-6)


def test_as_metric_keeps_ours_and_refuses_the_rest():
    metric = Accuracy(C)
    assert as_metric(metric) is metric
    with pytest.raises(TypeError, match=r"but got 'accuracy' of type str"):
        as_metric("accuracy")
    with pytest.raises(TypeError, match=r"Write MacroF1Score\(\.\.\.\)"):
        as_metric(MacroF1Score)
