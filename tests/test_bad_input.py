"""Bad input: each line is what a user may write, the error that it raises, and what that says.

A message names the argument and the value that came, says what was expected, and what to write
instead. The lines are run on each backend. Most of them train nothing: what can be told before the
first step is told then.
"""

import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import polus
from polus import core
from polus.backends import backend
from polus.callbacks import (
    Callback,
    ConsoleLogCallback,
    EarlyStop,
    LossSmoothCallback,
    SaveModelCallback,
    TimerCallback,
    ValidationDataCallback,
)
from polus.checkpoint import Checkpoint
from polus.data import from_arrays
from polus.metrics import Accuracy, IConfusionMatrix, IMetric, MacroF1Score, as_metric
from polus.training import BaseTrainer, ClassifierTrainer

WRONG = (TypeError, ValueError)  # a value of the wrong type: either says so
X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 1] > 0)
BATCHES = [(X[:16], Y[:16]), (X[16:], Y[16:])]
CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TYPES = (np.array(["a", "b"] * 8), np.array([{}] * 16), X[:16].astype("complex64"))
nan, inf = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _nothing_is_timed():
    core.set_jit_compile(keras.backend.backend() == "jax")
    yield
    core.set_jit_compile("auto")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "link").symlink_to("nowhere")


# ---------------------------------------------------------------------- what the lines are made of


def model(units=3):
    return keras.Sequential([keras.Input((4,)), layers.Dense(units)])


def overriding(name):
    """A model whose class has a method that only `fit` calls."""
    cls = type("Overriding", (keras.Model,), {name: lambda self, *args, **kwargs: None})
    inputs = keras.Input((4,))
    return cls(inputs, layers.Dense(3)(inputs))


def several(kind):
    """A model with two outputs, in a list or a dict."""
    inputs = keras.Input((4,))
    outputs = [layers.Dense(1)(inputs) for _ in range(2)]
    return keras.Model(inputs, outputs if kind is list else {"a": outputs[0], "b": outputs[1]})


MSE = keras.losses.MeanSquaredError()


def opt():
    return keras.optimizers.SGD(0.1)


def trainer(loss=CE, **arguments):
    return ClassifierTrainer(model(), opt(), loss, **arguments)


def train(tf_dataset=BATCHES, epochs=1, *args, **arguments):
    return trainer().train(tf_dataset, epochs, *args, **arguments)


def batch(*parts):
    """Trains on one batch of these parts."""
    return train([parts])


def heard(*callbacks):
    return train(callbacks=list(callbacks))


def minimized(loss):
    return trainer(loss).train(BATCHES, 1)


def step(returned, **arguments):
    """Trains by an overridden step that returns `returned(loss)`."""

    class Step(ClassifierTrainer):
        def train_step(self, x, y):
            return returned(super().train_step(x, y))

    return Step(model(), opt(), CE, **arguments).train(BATCHES, 1)


def minimizes(*arguments):
    """Calls `minimize` in a step, with what `arguments` are of the trainer."""

    class Step(ClassifierTrainer):
        def train_step(self, x, y):
            given = {"f": lambda: CE(y, self.model(x)), "w": self.model.trainable_weights}
            return self.minimize(*(given.get(a, a) if isinstance(a, str) else a for a in arguments))

    return Step(model(), opt(), CE).train(BATCHES, 1)


def forward(without=None, with_grads=None):
    """Trains a trainer with these two methods."""
    methods = {"forward_without_grads": without, "forward_with_grads": with_grads}
    methods = {name: method for name, method in methods.items() if method is not None}
    return type("Mine", (ClassifierTrainer,), methods)(model(), opt(), CE).train(BATCHES, 1)


def spelled(**methods):
    return type("Mine", (BaseTrainer,), methods)


def found(optimizer=None, **arguments):
    return ClassifierTrainer(model(), optimizer or opt(), CE).lr_finder(BATCHES, **arguments)


def measured(*samples):
    metric = Accuracy(3)
    metric.samples_from_batch(samples)
    return metric.evaluate()


def generator():
    yield from BATCHES


def endless():
    while True:
        yield BATCHES[0]


def fails():
    yield BATCHES[0]
    raise OSError("the disk is gone")


class Data(keras.utils.PyDataset):
    def __init__(self, num_batches):
        super().__init__()
        self.count = num_batches

    @property
    def num_batches(self):
        return self.count

    def __getitem__(self, i):
        return BATCHES[0]


class Table:
    """Rows by their number, as a `datasets.Dataset` has them."""

    column_names = ("x", "y")

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"x": X[i], "y": Y[i]}

    def iter(self, batch_size):
        raise NotImplementedError


def scipy_matrix():
    return pytest.importorskip("scipy.sparse").csr_matrix(X)


def frame(**columns):
    return pytest.importorskip("pandas").DataFrame(columns)


def used_optimizer():
    """An optimizer that has trained another model."""
    optimizer = keras.optimizers.Adam(0.1)
    ClassifierTrainer(model(), optimizer, CE).train(BATCHES, 1)
    return optimizer


def unfrozen():
    """Trains a head, and then all of the model with the same optimizer."""
    net = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dense(3)])
    net.layers[0].trainable = False
    trainer = ClassifierTrainer(net, keras.optimizers.Adam(0.1), CE)
    trainer.train(BATCHES, 1)
    net.layers[0].trainable = True
    return trainer.train(BATCHES, 1)


def said(name, value):
    """A callback with an attribute that a user sets."""
    callback = Callback()
    setattr(callback, name, value)
    return callback


# ---------------------------------------------------------------------- the lines

PARTS = [
    (
        "ClassifierTrainer(None, opt(), CE)",
        TypeError,
        "model must be a keras.Model, got .*NoneType",
    ),
    ("ClassifierTrainer('bert', opt(), CE)", TypeError, "model must be a keras.Model, got .*str"),
    ("ClassifierTrainer(3, opt(), CE)", TypeError, "model must be a keras.Model, got .*int"),
    ("ClassifierTrainer(keras.Sequential, opt(), CE)", TypeError, "got the class Sequential"),
    (
        "ClassifierTrainer(layers.Dense(3), opt(), CE)",
        TypeError,
        "must be a keras.Model, got .*Dense",
    ),
    ("ClassifierTrainer([model()], opt(), CE)", TypeError, "must be a keras.Model, got .*list"),
    (
        "ClassifierTrainer(lambda x: x, opt(), CE)",
        TypeError,
        "must be a keras.Model, got .*function",
    ),
    ("ClassifierTrainer(opt(), model(), CE)", TypeError, "must be a keras.Model, got .*SGD"),
    ("ClassifierTrainer(model(), 'adam', CE)", TypeError, "keras.optimizers.Adam"),
    (
        "ClassifierTrainer(model(), None, None, CE)",
        TypeError,
        "optimizer must be a keras.optimizers",
    ),
    ("ClassifierTrainer(model(), None, 0.1, CE)", TypeError, "optimizer must be .*got .*float"),
    ("ClassifierTrainer(model(), None, keras.optimizers.SGD, CE)", TypeError, "got the class SGD"),
    ("ClassifierTrainer(model(), None, CE, opt())", TypeError, "optimizer must be .*Crossentropy"),
    ("ClassifierTrainer(model(), None, [opt()], CE)", TypeError, "optimizer must be .*list"),
    (
        "ClassifierTrainer(model(), None, keras.optimizers.schedules.CosineDecay(0.1, 9), CE)",
        TypeError,
        "optimizer must be .*CosineDecay",
    ),
    ("ClassifierTrainer(model(), opt())", TypeError, "loss"),
    ("ClassifierTrainer(model())", TypeError, "optimizer"),
    ("ClassifierTrainer()", TypeError, "model"),
    ("BaseTrainer(model(), opt(), CE)", TypeError, "must be extended, not instantiated"),
    ("trainer('mse')", TypeError, "loss must be a callable .*'mse'"),
    ("trainer(None)", TypeError, "loss must be a callable .*None"),
    ("trainer(3)", TypeError, "loss must be a callable .*3"),
    ("trainer([CE])", TypeError, "loss must be a callable .*list"),
    ("trainer({'out': CE})", TypeError, "loss must be a callable .*dict"),
    ("trainer(keras.losses.MeanSquaredError)", TypeError, "got the class MeanSquaredError"),
    ("trainer([CE, CE])", TypeError, r"several outputs, add in a function"),
    (
        "trainer(loss_weights=[1, 2])",
        TypeError,
        r"no argument 'loss_weights'. Weigh them in the loss",
    ),
    ("trainer(jit_compile=True)", TypeError, r"no argument 'jit_compile'. Use polus.set_jit"),
    ("trainer(learning_rte=1)", TypeError, r"ClassifierTrainer takes no argument 'learning_rte'"),
    *(
        (
            f"ClassifierTrainer(overriding({name!r}), opt(), CE)",
            TypeError,
            f"overrides {name}, which .*{words}",
        )
        for name, words in {
            "train_step": r"def train_step\(self, x, y\)",
            "compute_loss": r"ClassifierTrainer\(model, optimizer, loss=",
            "compute_metrics": "metrics=",
            "test_step": "Override evaluation_step",
        }.items()
    ),
    (
        "ClassifierTrainer(overriding('predict_step'), opt(), CE).predict([X])",
        TypeError,
        "overrides predict_step.*Override prediction_step",
    ),
    *(
        (f"ClassifierTrainer(several({kind}), opt(), MSE).train([(X, {y})], 1)", TypeError, words)
        for kind, y, words in (
            ("list", "[Y, Y]", "labels are a list of 2.*adds those of all outputs"),
            (
                "dict",
                "{'a': Y, 'b': Y}",
                "labels are a dict of 2, and MeanSquaredError compares one",
            ),
            ("list", "Y", r"predictions are a list of 2.*post_process_logits=lambda"),
        )
    ),
    ("trainer(metrics='accuracy')", TypeError, "metrics must be a list, got 'accuracy'"),
    ("trainer(metrics=Accuracy(3))", TypeError, "metrics must be a list, got <Accuracy"),
    ("trainer(metrics=3)", TypeError, "metrics must be a list, got 3"),
    ("trainer(metrics={Accuracy(3)})", TypeError, "metrics must be a list, got {"),
    ("trainer(metrics=[None])", TypeError, "metric .*None"),
    ("trainer(metrics=[3])", TypeError, "metric .*3 of type int"),
    ("trainer(metrics=[print])", TypeError, "metric .*print"),
    ("trainer(metrics=[CE])", TypeError, "metric .*Crossentropy"),
    ("trainer(metrics=[[Accuracy(3)]])", TypeError, "metric .*list"),
    ("trainer(metrics=[keras.metrics.AUC])", TypeError, r"metric .*AUC\("),
    ("trainer(metrics=[Accuracy])", TypeError, r"metric .*Accuracy\("),
    ("trainer(metrics=[Accuracy(3), Accuracy(3)])", ValueError, "2 metrics are named 'accuracy'"),
    ("trainer(metrics=[keras.metrics.Mean('loss')])", ValueError, "must not be named 'loss'"),
    ("trainer(metrics=[keras.metrics.Mean('epoch')])", ValueError, "must not be named 'epoch'"),
    ("trainer(metrics=[Accuracy(3, name='step')])", ValueError, "must not be named 'step'"),
    ("trainer(post_process_prediction=3)", TypeError, "post_process_prediction must be .*got 3"),
    ("trainer(post_process_logits='softmax')", TypeError, "post_process_.*'softmax'"),
    ("trainer(post_process_grads=0.5)", TypeError, "post_process_grads must be .*got 0.5"),
    ("trainer(post_process_grads=[abs])", TypeError, r"post_process_grads must be .*got \["),
    (
        "trainer(post_process_prediction=abs, post_process_logits=abs)",
        TypeError,
        "post_process_prediction and post_process_logits are two names of one argument",
    ),
    ("trainer(trainable_weights=3)", TypeError, "trainable_weights must be a list .*got 3"),
    ("trainer(trainable_weights=[None])", TypeError, "got None at position 0"),
    ("trainer(trainable_weights=[X])", TypeError, "list of keras.Variable, got .*at position 0"),
    ("trainer(trainable_weights='head')", TypeError, "list of keras.Variable, got 'h"),
    (
        "trainer(trainable_weights=model().weights[0])",
        TypeError,
        "must be a list of keras.Variable",
    ),
    ("trainer(trainable_weights=model().layers)", TypeError, "got <Dense .*at position 0"),
    ("trainer(trainable_weights=model())", TypeError, "must be a list of keras.Variable, got <Seq"),
    ("setattr(trainer(), 'trainable_weights', 3)", TypeError, "trainable_weights must be .*got 3"),
    ("setattr(trainer(), 'trainable_weights', [None])", TypeError, "got None at position 0"),
    ("trainer(optimiser=opt())", TypeError, "optimiser"),
    ("trainer(learning_rate=0.1)", TypeError, "learning_rate"),
    ("spelled(forward_with_grads=1, foward_with_grads=2)", TypeError, "two spellings"),
    ("spelled(forward_without_grads=1, foward_without_grads=2)", TypeError, "two spellings"),
    ("spelled()(model(), opt(), CE).train(BATCHES, 1)", NotImplementedError, "forward_with_grads"),
]

COUNTS = [
    (f"train({name}={value})", error, f"{name} must be a positive integer, got {shown}")
    for name in ("epochs", "steps", "steps_per_execution")
    for value, error, shown in [
        ("0", ValueError, "0"),
        ("-1", ValueError, "-1"),
        ("1.5", WRONG, "1.5"),
        ("2.0", WRONG, "2.0"),
        ("'3'", WRONG, "'3'"),
        ("True", WRONG, "True"),
        ("nan", WRONG, "nan"),
        ("[1]", WRONG, r"\[1\]"),
        ("np.float64(2)", WRONG, r"(np.float64\()?2.0"),  # as NumPy 1 writes it, or 2
        ("print", WRONG, "<built-in"),
    ]
]

TRAIN = [
    ("trainer().train()", ValueError, "train needs tf_dataset"),
    ("trainer().train(BATCHES)", ValueError, "train needs epochs"),
    ("trainer().train(epochs=1)", ValueError, "train needs tf_dataset"),
    ("train(epochs=None)", ValueError, "train needs epochs"),
    ("train(learning_rate=-0.1)", ValueError, "learning_rate must be .*got -0.1"),
    ("train(learning_rate=nan)", ValueError, "learning_rate must be .*got nan"),
    ("train(learning_rate=inf)", ValueError, "learning_rate must be .*got inf"),
    ("train(learning_rate='0.1')", WRONG, "learning_rate must be .*got '0.1'"),
    ("train(learning_rate='auto')", WRONG, "learning_rate must be .*got 'auto'"),
    ("train(learning_rate=True)", WRONG, "learning_rate must be .*got True"),
    ("train(learning_rate=[0.1])", WRONG, r"learning_rate must be .*got \[0.1\]"),
    ("train(learning_rate=opt())", WRONG, "learning_rate must be .*got <.*SGD"),
    (
        "train(learning_rate=keras.optimizers.schedules.CosineDecay(0.1, 9))",
        WRONG,
        "learning_rate must be .*schedule",
    ),
    ("train(callbacks=EarlyStop())", TypeError, "callbacks must be a list, got a single EarlyStop"),
    (
        "train(callbacks=keras.callbacks.History())",
        TypeError,
        "callbacks must be a list, got a sing",
    ),
    ("train(callbacks=3)", TypeError, "callbacks must be a list, got 3"),
    ("train(callbacks=EarlyStop)", TypeError, "callbacks must be a list"),
    ("train(callbacks='tensorboard')", TypeError, "callbacks must be a list, got 'tensorboard'"),
    ("train(callbacks=[print])", TypeError, "callback must be .*write a class"),
    ("train(callbacks=[EarlyStop])", TypeError, r"callback must be .*EarlyStop\(\.\.\.\)"),
    ("train(callbacks=[keras.callbacks.CSVLogger])", TypeError, r"must be .*CSVLogger\(\.\.\.\)"),
    ("train(callbacks=['early'])", TypeError, "callback must be .*'early'"),
    ("train(callbacks=[None])", TypeError, "callback must be .*None"),
    ("train(callbacks=[opt()])", TypeError, "callback must be .*SGD"),
    ("train(callbacks=[[EarlyStop()]])", TypeError, "callback must be .*list"),
    ("train(callbacks=2 * [EarlyStop()])", ValueError, "the same EarlyStop twice"),
    ("train(callbacks=2 * [keras.callbacks.History()])", ValueError, "the same History twice"),
    ("train(custom_data_transform_f=3)", TypeError, "custom_data_transform_f must be .*got 3"),
    ("train(custom_data_transform_f='x')", TypeError, "custom_data_transform_f must be .*got 'x'"),
    ("train(train_map_f=[abs])", TypeError, r"must be a function of one batch, got \["),
    ("train(train_map_f=abs, custom_data_transform_f=abs)", TypeError, "two names of one argument"),
    ("train(train_map_f=lambda: 1)", TypeError, "positional argument"),
    ("train(train_map_f=lambda x, y: (x, y))", TypeError, "missing 1 required .*'y'"),
    ("train(train_map_f=lambda b: None)", WRONG, "custom_data_transform_f returned None"),
    ("train(train_map_f=lambda b: b[7])", IndexError, "out of range"),
    ("train(resume=3)", TypeError, "resume must be the path of a folder, got 3"),
    ("train(resume=True)", TypeError, "resume must be the path of a folder, got True"),
    ("train(resume=[])", TypeError, r"resume must be the path of a folder, got \[\]"),
    ("train(resume='')", ValueError, "resume must be the path of a folder, got ''"),
    ("train(resume='a\\0b')", ValueError, "resume must be the path of a folder"),
    ("train(resume='file')", ValueError, "resume must be a folder, got 'file'.*is not a folder"),
    ("train(resume='file/below')", ValueError, "resume must be a folder, got 'file/below'"),
    ("train(resume='link')", ValueError, "resume must be a folder, got 'link'.*does not exist"),
    ("train(resume_changes='maybe')", ValueError, "resume_changes must be .*got 'maybe'"),
    ("train(resume_changes=True)", WRONG, "resume_changes must be .*got True"),
    ("train(epoch=3)", TypeError, "'epoch'"),
    ("train(validation_data=(X, Y))", TypeError, "ValidationDataCallback"),
    ("train(validation_split=0.2)", TypeError, "ValidationDataCallback"),
    ("train(batch_size=16)", TypeError, "from_arrays"),
    ("train(shuffle=True)", TypeError, "from_arrays"),
    ("train(verbose=0)", TypeError, "ConsoleLogCallback"),
    ("train(class_weight={0: 2.0})", TypeError, "class_weight"),
    ("train(sample_weight=Y)", TypeError, r"\(x, y, sample_weight\)"),
    ("train(initial_epoch=3)", TypeError, "resume"),
    ("train(steps_per_epoch=3)", TypeError, "Did you mean 'steps"),
    ("train(BATCHES, 1, None, None, None, None, 4)", TypeError, "positional argument"),
    ("trainer().changing_train_config(epoch=3)", TypeError, "Did you mean 'epochs'"),
    ("trainer().changing_train_config(data=BATCHES)", TypeError, "train takes no argument 'data'"),
    ("trainer().changing_train_config(optimizer=opt())", TypeError, "no argument 'optimizer'"),
    ("trainer().changing_train_config(calbacks=[])", TypeError, "Did you mean 'callbacks'"),
]

DATASETS = [
    ("train(X)", TypeError, "polus.data.from_arrays"),
    ("train((X, Y))", TypeError, "polus.data.from_arrays"),
    ("train({'x': X})", TypeError, "dataset must yield batches, got a dict.*from_arrays"),
    ("train(ops.ones((8, 4)))", TypeError, "polus.data.from_arrays"),
    ("train(frame(a=[1.0], b=[2.0]))", TypeError, "got a DataFrame.*from_arrays"),
    ("train(scipy_matrix())", TypeError, r"from_arrays.*\.toarray\(\)"),
    ("train(3)", TypeError, "dataset must yield batches, got a int"),
    ("train(np.float32(3))", TypeError, "dataset must yield batches, got a float32"),
    ("train('data.csv')", TypeError, "dataset must yield batches, got a str"),
    ("train(b'data')", TypeError, "dataset must yield batches, got a bytes"),
    ("train(True)", TypeError, "dataset must yield batches, got a bool"),
    ("train(object())", TypeError, "dataset must yield batches, got a object"),
    ("train([])", ValueError, "no batch in epoch 1"),
    ("train(())", ValueError, "no batch in epoch 1"),
    ("train(iter([]))", ValueError, "no batch in epoch 1"),
    ("train(lambda: iter([]))", ValueError, "no batch in epoch 1"),
    ("train(lambda: None)", TypeError, "must return batches, got None"),
    ("train(lambda: 3)", TypeError, "must return batches, got 3"),
    ("train(lambda n: iter(BATCHES))", TypeError, "missing 1 required .*'n'"),
    ("train(Data)", TypeError, r"Data\("),
    ("train(Data(0))", ValueError, "no batch in epoch 1"),
    ("train(Data(None))", ValueError, "endless"),
    ("train(generator(), epochs=2)", ValueError, "exhausted before epoch 2.*without calling it"),
    ("train(iter(BATCHES), epochs=3)", ValueError, "exhausted before epoch 2"),
    ("train(fails)", OSError, "the disk is gone"),
    ("train(Table())", TypeError, r"\.iter\(batch_size"),
    ("train(set())", ValueError, "no batch in epoch 1"),
    ("train(range(8))", TypeError, "from_arrays"),
    ("train([1, 2, 3])", TypeError, "from_arrays"),
    ("train(['a', 'b'])", TypeError, "A batch is text.*custom_data_transform_f"),
    ("train([X, Y])", TypeError, "polus.data.from_arrays"),
    ("train([None])", TypeError, "yielded None as a batch"),
    ("train([()])", TypeError, "first batch has 0 parts"),
    ("train([[]])", TypeError, "first batch has 0 parts"),
    ("batch(X)", TypeError, r"(?s)argument: .y.*1 part: float32 \(32, 4\)"),
    ("batch(X, Y, Y, Y)", TypeError, "(?s)5 were given.* 4 parts"),
    ("batch(None, None)", ValueError, "not optional, but None was passed"),
    ("batch(None, Y)", ValueError, "not optional, but None was passed"),
    ("train([{'x': X, 'y': Y}])", TypeError, "a dict of 'x', 'y'.*custom_data_transform_f"),
    ("train([BATCHES[0], BATCHES[0][:1]])", TypeError, "Batch 2 of epoch 1 has 1 part: float32"),
    ("train([BATCHES[0], None])", TypeError, "batch"),
    ("batch(X[:0], Y[:0])", ValueError, "Batch 1 of the epoch has no examples"),
    ("batch(X, Y[:3])", ValueError, r"\(32, 4\).*\(3,\)|32.*3"),
    ("batch(TYPES[0], Y[:16])", TypeError, "part 0|first part|custom_data_transform_f"),
    ("batch(X[:16], TYPES[0])", TypeError, "part 1|second part|custom_data_transform_f"),
    ("batch(TYPES[1], Y[:16])", TypeError, "object.*custom_data_transform_f"),
    ("batch('text', Y)", TypeError, "custom_data_transform_f"),
    ("batch(['a', 'b'], [0, 1])", TypeError, "custom_data_transform_f"),
    ("batch(X.astype('datetime64[D]'), Y)", TypeError, "datetime64.*custom_data_transform_f"),
    ("batch(scipy_matrix(), Y)", TypeError, r"\.toarray\(\)"),
    ("batch(frame(a=['x'] * 32), Y)", TypeError, "'a'"),
    ("batch(X[:, :2], Y)", ValueError, "shape"),
    (
        "batch(X, np.full(32, 7, 'int32'))",
        ValueError,
        "Batch 1 of epoch 1 has the label 7, .* 0 to 2",
    ),
    ("batch(X, np.full(32, -1, 'int32'))", ValueError, "Batch 1 .*the label -1,.*ignore_class=-1"),
    ("batch(X, np.full(32, 1.0), np.ones(32), 3)", TypeError, "were given.*4 parts"),
    ("train([*BATCHES, (X, Y + 1)])", ValueError, "Batch 3 of epoch 1 has the label 3"),
    ("train(from_arrays((X, Y + 1), 8))", ValueError, "has the label 3, and the model has 3 out"),
    ("train(BATCHES, train_map_f=lambda b: (b[0], b[1] - 1))", ValueError, "has the label -1"),
    ("from_arrays(X)", TypeError, "batch_size"),
    ("from_arrays(batch_size=8)", TypeError, "arrays"),
    ("from_arrays((X, Y), 0)", ValueError, "batch_size must be a positive integer, got 0"),
    ("from_arrays((X, Y), -1)", ValueError, "batch_size must be a positive integer, got -1"),
    ("from_arrays((X, Y), 1.5)", WRONG, "batch_size must be a positive integer, got 1.5"),
    ("from_arrays((X, Y), '8')", WRONG, "batch_size must be a positive integer, got '8'"),
    ("from_arrays((X, Y), None)", WRONG, "batch_size must be a positive integer, got None"),
    ("from_arrays((X, Y), True)", WRONG, "batch_size must be a positive integer, got True"),
    ("from_arrays(X, Y)", TypeError, r"from_arrays\(\(x, y\), batch_size=32\)"),
    ("from_arrays((X, Y), 100, drop_remainder=True)", ValueError, "no batch is left"),
    ("from_arrays((X, Y), 8, shuffle='no')", WRONG, "shuffle must be True or False, got 'no'"),
    ("from_arrays((X, Y), 8, shuffle=None)", WRONG, "shuffle must be True or False, got None"),
    ("from_arrays((X, Y), 8, shuffle=1000)", WRONG, "shuffle must be True or False, got 1000"),
    ("from_arrays((X, Y), 8, drop_remainder='no')", WRONG, "drop_remainder must be .*got 'no'"),
    ("from_arrays((X, Y), 8, seed=-1)", ValueError, "seed must be an integer .*got -1"),
    ("from_arrays((X, Y), 8, seed=2**64)", ValueError, "seed must be an integer .*got 184"),
    ("from_arrays((X, Y), 8, seed=1.5)", WRONG, "seed must be an integer .*got 1.5"),
    ("from_arrays((X, Y), 8, seed=None)", WRONG, "seed must be an integer .*got None"),
    ("from_arrays((X, Y), 8, seed=True)", WRONG, "seed must be an integer .*got True"),
    ("from_arrays((X, Y), 8, seed='0')", WRONG, "seed must be an integer .*got '0'"),
    ("from_arrays((X, Y), 8, device_bytes='1GB')", WRONG, "device_bytes must be .*got '1GB'"),
    ("from_arrays((X, Y), 8, device_bytes=-1)", ValueError, "device_bytes must be .*got -1"),
    ("from_arrays((X, Y), 8, device_bytes=nan)", WRONG, "device_bytes must be .*got nan"),
    ("from_arrays((), 8)", ValueError, "no array"),
    ("from_arrays([], 8)", ValueError, "no array"),
    ("from_arrays({}, 8)", ValueError, "no array"),
    ("from_arrays(None, 8)", WRONG, "got no array"),
    ("from_arrays(3, 8)", WRONG, "arrays of examples, got .*3"),
    ("from_arrays('text', 8)", WRONG, "arrays of examples, got .*'text'"),
    ("from_arrays((X, 3), 8)", WRONG, "arrays of examples, got .*3"),
    ("from_arrays((X, 'text'), 8)", WRONG, "arrays of examples, got .*'text'"),
    ("from_arrays([1, 2, 3], 8)", WRONG, r"np.array\("),
    ("from_arrays((X, Y[:3]), 8)", ValueError, r"\[3, 32\]"),
    ("from_arrays({'x': X, 'y': (Y, Y[:2])}, 8)", ValueError, r"\[2, 32\]"),
    ("from_arrays(X[:0], 8)", ValueError, r"\[0\]"),
    ("from_arrays((generator(), Y), 8)", WRONG, "arrays of examples, got .*generator"),
    ("from_arrays(({1, 2}, Y), 8)", WRONG, "arrays of examples, got .*{1, 2}"),
    ("from_arrays((scipy_matrix(), Y), 8)", WRONG, r"\.toarray\(\)"),
]

STEPS = [
    ("minimized(keras.losses.sparse_categorical_crossentropy)", ValueError, r"shape \(16,\)"),
    ("minimized(lambda y, p: p)", ValueError, r"scalar tensor, got .*shape \(16, 3\)"),
    ("minimized(lambda y, p: 1.0)", ValueError, "scalar tensor, got a float"),
    ("minimized(lambda y, p: None)", ValueError, "scalar tensor, got a NoneType"),
    ("minimized(lambda y, p: 'mse')", ValueError, "scalar tensor, got a str"),
    ("minimized(lambda y, p: [ops.mean(p)])", ValueError, "scalar tensor, got a list"),
    ("minimized(lambda y, p: (ops.mean(p), p))", ValueError, "scalar tensor, got a tuple"),
    ("minimized(lambda y, p: {})", ValueError, "must have a term named 'loss'"),
    ("minimized(lambda y, p: {'total': ops.mean(p)})", ValueError, r"'loss'.*\['total'\]"),
    ("minimized(lambda y, p: {1: ops.mean(p)})", ValueError, "must have a term named 'loss'"),
    ("minimized(lambda y, p: {'loss': ops.mean(p), 'p': p})", ValueError, "as its term 'p'"),
    (
        "minimized(lambda y, p: {'loss': ops.mean(p), 'p': 3})",
        ValueError,
        "got a int as its term 'p'",
    ),
    ("minimized(lambda y, p: {'loss': None})", ValueError, "scalar tensor, got a NoneType"),
    ("minimized(lambda y, p: {'loss': ops.mean(p), 'step': ops.mean(p)})", ValueError, "'step'"),
    ("minimized(lambda y, p: {'loss': ops.mean(p), 'epoch': ops.mean(p)})", ValueError, "'epoch'"),
    ("minimized(lambda y, p: ops.sum(ops.ones(2)))", ValueError, "depends on none of the 2"),
    ("minimized(lambda y, p: ops.mean(ops.stop_gradient(p)))", ValueError, "depends on none"),
    ("minimized(lambda y, p: 1 / 0)", ZeroDivisionError, "division"),
    ("minimized(lambda y: y)", TypeError, "(?s)2 were given.*first batch"),
    ("minimized(lambda y, p, w: p)", TypeError, "(?s)argument: 'w'.*first batch"),
    ("minimized(lambda: 0)", TypeError, "2 were given"),
    ("step(lambda loss: None)", ValueError, "result of train_step must be .*got a NoneType"),
    ("step(lambda loss: 'loss')", ValueError, "result of train_step must be .*got a str"),
    ("step(lambda loss: 1.0)", ValueError, "result of train_step must be .*got a float"),
    ("step(lambda loss: (loss, loss))", ValueError, "result of train_step must be .*got a tuple"),
    ("step(lambda loss: [loss])", ValueError, "result of train_step must be .*got a list"),
    ("step(lambda loss: {})", ValueError, "got an empty dict"),
    ("step(lambda loss: {1: loss})", ValueError, "strings as names, got 1"),
    ("step(lambda loss: {'loss': ops.ones(4)})", ValueError, r"tensor of shape \(4,\)"),
    ("step(lambda loss: {'v': ops.ones(4)})", ValueError, "at least one scalar.*only .* 'v'"),
    ("step(lambda loss: {'loss': loss, 'epoch': loss})", ValueError, "named 'epoch'"),
    ("step(lambda loss: {'loss': loss, 'step': loss})", ValueError, "named 'step'"),
    (
        "step(lambda loss: {'loss': loss, 'accuracy': loss}, metrics=[Accuracy(3)])",
        ValueError,
        "named 'accuracy'.*a metric",
    ),
    ("minimizes(3, 'w')", TypeError, "loss_fn must be a function.*got 3"),
    ("minimizes(None, 'w')", TypeError, "loss_fn must be a function.*got None"),
    ("minimizes(lambda x: x, 'w')", TypeError, "missing 1 required .*'x'"),
    ("minimizes('f', 3)", TypeError, "variables must be a list of keras.Variable, got 3"),
    ("minimizes('f', None)", TypeError, "variables must be a list of keras.Variable, got None"),
    ("minimizes('f', [None])", TypeError, "variables must be a list of keras.Variable, got None"),
    ("minimizes('f', [X])", TypeError, "variables must be a list of keras.Variable, got "),
    (
        "minimizes('f', 'w', 3)",
        TypeError,
        "optimizer must be a keras.optimizers.Optimizer, got .*int",
    ),
    ("minimizes('f', 'w', keras.optimizers.SGD)", TypeError, "optimizer must be .*the class SGD"),
    ("minimizes('f')", TypeError, "variables"),
    (
        "trainer(post_process_grads=lambda g: None).train(BATCHES, 1)",
        WRONG,
        "post_process_grads .*None",
    ),
    (
        "trainer(post_process_grads=lambda g: g[:1]).train(BATCHES, 1)",
        ValueError,
        "took 2 and returned 1",
    ),
    ("trainer(post_process_grads=lambda g: 3).train(BATCHES, 1)", WRONG, "post_process_grads .*3"),
    ("trainer(post_process_grads=lambda: 3).train(BATCHES, 1)", TypeError, "1 was given"),
    ("trainer(post_process_prediction=lambda: 3).train(BATCHES, 1)", TypeError, "1 was given"),
    ("forward(with_grads=lambda self, x, y: None)", TypeError, "forward_with_grads|first batch"),
    ("forward(with_grads=lambda self, x: x)", TypeError, "(?s)3 were given.*2 parts"),
    ("forward(with_grads=lambda self, x, y: (y,))", TypeError, "(?s)argument.*first batch"),
    ("forward(without=lambda self, x, y: None)", TypeError, "(?s)argument: 'y'.*first batch"),
    ("forward(without=lambda self, x, y: (x, y, y, y))", TypeError, "(?s)were given.*first batch"),
    ("forward(without=lambda self, x: x)", TypeError, "(?s)3 were given.*2 parts"),
    ("forward(with_grads=lambda self, x, y: y.no_such_thing)", AttributeError, "no_such_thing"),
    (
        "ClassifierTrainer(model(), keras.optimizers.SGD("
        "keras.optimizers.schedules.CosineDecay(0.1, 9)), CE).train(BATCHES, 1, learning_rate=0.1)",
        ValueError,
        "is a schedule",
    ),
    (
        "ClassifierTrainer(model(), used_optimizer(), CE).train(BATCHES, 1)",
        ValueError,
        r"optimizer.*another model.*keras.optimizers.Adam\(",
    ),
    ("unfrozen()", ValueError, r"trainer.optimizer = keras.optimizers.Adam\("),
    ("trainer().train_step()", TypeError, "argument"),
    ("trainer().train_step(X)", TypeError, "argument: 'y'"),
    ("trainer().train_step(X, Y, Y, Y, Y)", TypeError, "were given"),
]

METRICS = [
    ("IMetric()", TypeError, "abstract"),
    ("IConfusionMatrix(3)", TypeError, "abstract"),
    ("Accuracy()", TypeError, "num_classes"),
    ("Accuracy(1)", ValueError, "num_classes.*2"),
    ("Accuracy(0)", ValueError, "num_classes.*2"),
    ("Accuracy(-3)", ValueError, "num_classes.*-3"),
    ("Accuracy('3')", WRONG, "num_classes.*'3'"),
    ("Accuracy(2.5)", WRONG, "num_classes.*2.5"),
    ("Accuracy(None)", WRONG, "num_classes.*None"),
    ("Accuracy(True)", WRONG, "num_classes.*True"),
    ("MacroF1Score('3')", WRONG, "num_classes.*'3'"),
    ("MacroF1Score(1)", ValueError, "num_classes.*2"),
    ("Accuracy(3, 3)", TypeError, "reduce_f must be a function.*got 3"),
    ("Accuracy(3, reduce_f='first')", TypeError, "reduce_f must be a function.*'first'"),
    ("Accuracy(3, ignore_class='pad')", WRONG, "ignore_class must be an integer.*'pad'"),
    ("Accuracy(3, ignore_class=1.5)", WRONG, "ignore_class must be an integer.*1.5"),
    ("Accuracy(3, name=3)", WRONG, "name.*3"),
    ("Accuracy(3, ignore=0)", TypeError, "ignore"),
    ("as_metric('auc')", TypeError, "metric .*'auc'"),
    ("as_metric(keras.metrics.AUC)", TypeError, r"AUC\("),
    ("Accuracy(3).samples_from_batch(3)", TypeError, r"tuple \(y_true, y_pred\)"),
    ("Accuracy(3).samples_from_batch(Y)", TypeError, r"tuple \(y_true, y_pred\)"),
    ("Accuracy(3).samples_from_batch({'y': Y})", TypeError, r"tuple \(y_true, y_pred\)"),
    ("Accuracy(3, lambda s: s[0]).samples_from_batch((Y, Y))", TypeError, "from reduce_f"),
    ("measured(Y)", TypeError, "y_pred"),
    ("measured()", TypeError, "y_true"),
    ("measured(Y, Y[:5])", ValueError, r"\(32,\) and y_pred of shape \(5,\)"),
    ("measured(Y, X)", ValueError, r"y_pred of shape \(32, 4\)"),
    ("measured(Y, X[None])", ValueError, r"y_pred of shape \(1, 32, 4\)"),
    ("measured(Y + 5, Y)", ValueError, "invalid labels.*0 to 2"),
    ("measured(Y - 1, Y)", ValueError, "invalid labels.*0 to 2"),
    ("measured(Y, Y + 0.5)", ValueError, "must be integers"),
]

CALLBACKS = [
    ("EarlyStop(3)", TypeError, r"EarlyStop\(patience=3\)"),
    ("EarlyStop('')", ValueError, "monitor must not be empty"),
    ("EarlyStop(None)", TypeError, "monitor must be a string, got None"),
    ("EarlyStop(['loss'])", TypeError, r"monitor must be a string, got \['loss'\]"),
    ("EarlyStop('loss', 0)", ValueError, "patience must be a positive integer, got 0"),
    ("EarlyStop('loss', -1)", ValueError, "patience must be a positive integer, got -1"),
    ("EarlyStop('loss', 1.5)", WRONG, "patience must be a positive integer, got 1.5"),
    ("EarlyStop('loss', '3')", WRONG, "patience must be a positive integer, got '3'"),
    ("EarlyStop('loss', True)", WRONG, "patience must be a positive integer, got True"),
    ("EarlyStop('loss', None)", WRONG, "patience must be a positive integer, got None"),
    ("EarlyStop('loss', min_delta='0')", WRONG, "min_delta must be a number, got '0'"),
    ("EarlyStop('loss', min_delta=-0.1)", ValueError, "min_delta must be at least 0.*got -0.1"),
    ("EarlyStop('loss', min_delta=nan)", ValueError, "min_delta must be .*got nan"),
    ("EarlyStop('loss', min_delta=inf)", ValueError, "min_delta must be .*got inf"),
    ("EarlyStop('loss', mode='lowest')", ValueError, "mode must be .*got 'lowest'"),
    ("EarlyStop('loss', mode=None)", WRONG, "mode must be .*got None"),
    ("EarlyStop(best_weights=True)", TypeError, "best_weights"),
    ("EarlyStop(restore_best_weights=3)", TypeError, "must be True or False, got 3"),
    ("SaveModelCallback(path='{epoch}.keras', keep=0)", ValueError, "keep must be .*got 0"),
    ("SaveModelCallback(models='a')", TypeError, "models must be a list of names, got 'a'"),
    (
        "heard(EarlyStop('val_loss'))",
        ValueError,
        "no value named 'val_loss'.*ValidationDataCallback",
    ),
    ("heard(EarlyStop('los'))", ValueError, "Did you mean 'loss'"),
    ("SaveModelCallback('bset')", ValueError, "strategy must be .*got 'bset'"),
    ("SaveModelCallback(None)", WRONG, "strategy must be .*got None"),
    ("SaveModelCallback('m.keras')", ValueError, r"SaveModelCallback\(path='m.keras'\)"),
    ("SaveModelCallback('best', 'm')", ValueError, "path must end .*got 'm'"),
    ("SaveModelCallback('best', 'm.h5')", ValueError, "path must end .*got 'm.h5'"),
    ("SaveModelCallback('best', '')", ValueError, "path must .*got ''"),
    ("SaveModelCallback('best', None)", WRONG, "path must .*got None"),
    ("SaveModelCallback('best', 3)", WRONG, "path must .*got 3"),
    ("SaveModelCallback('best', 'a\\0.keras')", ValueError, "path must "),
    ("SaveModelCallback('every', 'm.keras')", ValueError, "path must contain the epoch"),
    ("SaveModelCallback('best', 'm.keras', '')", ValueError, "monitor must not be empty"),
    ("SaveModelCallback('best', 'm.keras', 3)", TypeError, "monitor must be a string, got 3"),
    ("SaveModelCallback('best', 'm.keras', mode='up')", ValueError, "mode must be .*got 'up'"),
    ("heard(SaveModelCallback('best', 'm.keras'))", ValueError, "no value named 'val_loss'"),
    ("ValidationDataCallback()", TypeError, "dataset"),
    ("ValidationDataCallback(BATCHES, '')", ValueError, "name must not be empty"),
    ("ValidationDataCallback(BATCHES, 3)", TypeError, "name must be a string, got 3"),
    (
        "ValidationDataCallback(BATCHES, abs, 'v')",
        TypeError,
        "name must be a string, got <built-in",
    ),
    ("ValidationDataCallback(BATCHES, every_steps=0)", ValueError, "every_steps must be .*got 0"),
    ("ValidationDataCallback(BATCHES, every_steps='x')", WRONG, "every_steps must be .*got 'x'"),
    ("ValidationDataCallback(BATCHES, every_steps=1.5)", WRONG, "every_steps must be .*got 1.5"),
    ("ValidationDataCallback(BATCHES, steps=0)", ValueError, "steps must be .*got 0"),
    ("ValidationDataCallback(BATCHES, steps='all')", WRONG, "steps must be .*got 'all'"),
    ("ValidationDataCallback(BATCHES, every_epochs=0)", ValueError, "every_epochs must be .*got 0"),
    (
        "ValidationDataCallback(BATCHES, every_steps=2, every_epochs=2)",
        ValueError,
        "either every_steps or every_epochs",
    ),
    (
        "ValidationDataCallback(BATCHES, custom_data_transform_f=3)",
        TypeError,
        "custom_data_transform_f must be a function, got 3",
    ),
    (
        "heard(ValidationDataCallback(BATCHES), ValidationDataCallback(BATCHES))",
        ValueError,
        "named 'val'",
    ),
    ("heard(ValidationDataCallback((X, Y)))", TypeError, "from_arrays"),
    ("heard(ValidationDataCallback(3))", TypeError, "must yield batches, got a int"),
    ("heard(ValidationDataCallback(None))", TypeError, "must yield batches, got a NoneType"),
    ("heard(ValidationDataCallback([]))", ValueError, "no batch"),
    ("heard(ValidationDataCallback(Data(None)))", ValueError, "endless"),
    ("heard(ValidationDataCallback([(X,)]))", NotImplementedError, "evaluation_step takes"),
    ("LossSmoothCallback(1.0)", ValueError, "beta must be .*less than 1, got 1.0"),
    ("LossSmoothCallback(-0.1)", ValueError, "beta must be .*got -0.1"),
    ("LossSmoothCallback(nan)", ValueError, "beta must be .*got nan"),
    ("LossSmoothCallback('0.9')", WRONG, "beta must be .*got '0.9'"),
    ("LossSmoothCallback(None)", WRONG, "beta must be .*got None"),
    ("TimerCallback(clock=3)", TypeError, "clock must be a function, got 3"),
    ("ConsoleLogCallback(clock=3)", TypeError, "clock must be a function, got 3"),
    ("ConsoleLogCallback(console='stdout')", TypeError, "console must be .*got 'stdout'"),
    ("heard(said('every_steps', 0))", ValueError, "every_steps must be a positive integer.*got 0"),
    ("heard(said('every_steps', 'all'))", WRONG, "every_steps must be .*got 'all'"),
    ("heard(said('every_steps', 1.5))", WRONG, "every_steps must be .*got 1.5"),
    ("heard(said('every_steps', True))", WRONG, "every_steps must be .*got True"),
    ("Checkpoint()", TypeError, "directory"),
    ("Checkpoint(None)", TypeError, "directory must be the path of a folder, got None"),
    ("Checkpoint(3)", TypeError, "directory must be the path of a folder, got 3"),
    ("Checkpoint('')", ValueError, "directory must be the path of a folder, got ''"),
    ("Checkpoint('a\\0b')", ValueError, "directory must be the path of a folder"),
    ("Checkpoint('file')", ValueError, "directory must be a folder, got 'file'"),
    ("Checkpoint('link')", ValueError, "directory must be a folder, got 'link'"),
    ("Checkpoint('a', every_steps=0)", ValueError, "every_steps must be .*got 0"),
    ("Checkpoint('a', every_steps='x')", WRONG, "every_steps must be .*got 'x'"),
    ("Checkpoint('a', every_steps=True)", WRONG, "every_steps must be .*got True"),
    ("Checkpoint('a', every_secs=nan)", ValueError, "every_secs must be .*got nan"),
    ("Checkpoint('a', every_secs=-1)", ValueError, "every_secs must be .*got -1"),
    ("Checkpoint('a', every_secs='60')", WRONG, "every_secs must be .*got '60'"),
    ("Checkpoint('a', every_secs=inf)", ValueError, "every_secs must be .*got inf"),
    ("Checkpoint('a', every_epochs=0)", ValueError, "every_epochs must be .*got 0"),
    ("Checkpoint('a', every_epochs=1.5)", WRONG, "every_epochs must be .*got 1.5"),
    ("Checkpoint('a', keep=0)", ValueError, "keep must be .*got 0"),
    ("Checkpoint('a', keep=None)", WRONG, "keep must be .*got None"),
    ("Checkpoint('a', keep='all')", WRONG, "keep must be .*got 'all'"),
]

EVALUATION = [
    ("trainer().evaluate()", TypeError, "dataset"),
    ("trainer().evaluate(None)", TypeError, "must yield batches, got a NoneType"),
    ("trainer().evaluate(X)", TypeError, "from_arrays"),
    ("trainer().evaluate((X, Y))", TypeError, "from_arrays"),
    ("trainer().evaluate(3)", TypeError, "must yield batches, got a int"),
    ("trainer().evaluate([])", ValueError, "no batch"),
    ("trainer().lr_finder(X, Y)", TypeError, r"Data is one argument: polus.from_arrays"),
    ("trainer(metrics=['accuracy'])", TypeError, r"Write polus\.Accuracy\(10\)"),
    ("ValidationDataCallback(X, Y)", TypeError, r"name must be a string, got an array"),
    ("trainer().evaluate(X, Y)", TypeError, r"Data is one argument: polus.from_arrays"),
    ("trainer().evaluate([], verbose=0)", TypeError, "'verbose'. It prints nothing"),
    ("trainer().predict([], batch_size=8)", TypeError, "'batch_size'. The data says it"),
    ("trainer().fit(X, Y)", AttributeError, r"'fit'. Write train\(polus.from_arrays"),
    ("trainer().compile()", AttributeError, "are arguments of the trainer"),
    ("train([(X[0], Y[0])])", ValueError, r"it is a single example. Batch the dataset"),
    ("trainer().evaluate(Data(0))", ValueError, "no batch"),
    ("trainer().evaluate(Data(None))", ValueError, r"endless.*evaluate\(\.\.\., steps="),
    ("trainer().evaluate(BATCHES, steps=0)", ValueError, "steps must be a positive integer, got 0"),
    ("trainer().evaluate(BATCHES, steps=-1)", ValueError, "steps must be .*got -1"),
    ("trainer().evaluate(BATCHES, steps='x')", WRONG, "steps must be .*got 'x'"),
    ("trainer().evaluate(BATCHES, steps=1.5)", WRONG, "steps must be .*got 1.5"),
    ("trainer().evaluate(BATCHES, 3)", TypeError, "custom_data_transform_f must be .*got 3"),
    ("trainer().evaluate([(X,)])", NotImplementedError, "evaluation_step takes"),
    ("trainer().evaluate([{'x': X}])", NotImplementedError, "evaluation_step takes"),
    ("trainer().evaluate([(X[:, :2], Y)])", ValueError, "shape"),
    ("trainer().evaluate([(X[:0], Y[:0])])", ValueError, "Batch 1 of the epoch has no examples"),
    ("trainer().evaluate([(X, Y), (X, Y + 9)])", ValueError, "Batch 2 .*has the label (9|1[01])"),
    ("trainer().evaluate(BATCHES, batch_size=8)", TypeError, "batch_size"),
]

FINDER = [
    ("trainer().lr_finder()", ValueError, "lr_finder needs a dataset"),
    ("trainer().lr_finder(X)", TypeError, "from_arrays"),
    ("trainer().lr_finder(3)", TypeError, "must yield batches, got a int"),
    ("trainer().lr_finder([])", ValueError, "no batch"),
    ("trainer().lr_finder(iter(BATCHES))", WRONG, "iterator"),
    ("found(start_lr=0)", ValueError, "start_lr must be positive.*start_lr=0"),
    ("found(start_lr=-1.0)", ValueError, "start_lr must be positive.*start_lr=-1.0"),
    ("found(start_lr=nan)", ValueError, "start_lr must be positive.*start_lr=nan"),
    ("found(start_lr='a')", WRONG, "start_lr must be .*start_lr='a'"),
    ("found(start_lr=1.0, end_lr=0.1)", ValueError, "less than end_lr.*end_lr=0.1"),
    ("found(end_lr=inf)", ValueError, "end_lr=inf"),
    ("found(end_lr=None)", WRONG, "end_lr must be a number, got end_lr=None"),
    ("found(num_steps=3)", ValueError, "num_steps must be an integer of at least 16, got 3"),
    ("found(num_steps=0)", ValueError, "num_steps must be .*got 0"),
    ("found(num_steps='100')", WRONG, "num_steps must be .*got '100'"),
    ("found(num_steps=20.5)", WRONG, "num_steps must be .*got 20.5"),
    ("found(stop_factor=1)", ValueError, "stop_factor must be greater than 1, got 1"),
    ("found(stop_factor=nan)", ValueError, "stop_factor must be .*got nan"),
    ("found(stop_factor='4')", WRONG, "stop_factor must be .*'4'"),
    ("found(suggestion='steepest')", ValueError, "Did you mean 'steep'"),
    ("found(suggestion=None)", ValueError, "no suggestion None.*'steep', 'valley'"),
    ("trainer().lr_finder(BATCHES, optimizer='adam')", ValueError, "no optimizer named 'adam'"),
    ("trainer().lr_finder(BATCHES, optimizer=opt())", ValueError, "does not use the optimizer"),
    (
        "found(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 9)), "
        "use_lr_found=True)",
        ValueError,
        "rate is a schedule",
    ),
    ("found(steps=5)", TypeError, "steps"),
]

CORE = [
    ("core.set_jit_compile('always')", ValueError, "mode must be True, False or 'auto', got"),
    ("core.set_jit_compile(None)", ValueError, "mode must be True, False or 'auto', got"),
    ("core.set_jit_compile('True')", ValueError, "mode must be True, False or 'auto', got"),
    ("core.set_jit_compile(2)", ValueError, "mode must be True, False or 'auto', got"),
    ("core.set_jit_compile()", TypeError, "mode"),
    ("core.function(3)", TypeError, "function must be .*got 3|takes a function.*got 3"),
    ("core.function('f')", TypeError, "'f'"),
    ("core.function(abs, jit_compile='yes')", WRONG, "jit_compile must be .*got 'yes'"),
    ("core.value_and_grad(3, [])", TypeError, "function.*got 3"),
    ("core.value_and_grad(lambda: 3.0, model().weights)", ValueError, "a float"),
    ("core.value_and_grad(lambda: None, model().weights)", ValueError, "a NoneType"),
    ("core.value_and_grad(lambda: ops.ones(3), model().weights)", ValueError, r"shape \(3,\)"),
    ("core.value_and_grad(lambda x: x, model().weights)", TypeError, "missing 1 required .*'x'"),
    (
        "core.value_and_grad(lambda: ops.ones(()), None)",
        TypeError,
        "list of keras.Variable, got None",
    ),
    ("core.value_and_grad(lambda: ops.ones(()), 3)", TypeError, "list of keras.Variable, got 3"),
    ("core.value_and_grad(lambda: ops.ones(()), [3])", TypeError, "list of keras.Variable, got 3"),
    (
        "core.value_and_grad(lambda: ops.ones(()), [], has_aux=True)",
        WRONG,
        "has_aux.*pair",
    ),
    ("polus.BaseTrianer", AttributeError, "Did you mean 'BaseTrainer'"),
    ("polus.EarlyStopping", AttributeError, "EarlyStop"),
    ("polus.nothing_of_the_kind", AttributeError, "nothing_of_the_kind"),
    ("train().to_dict('steps')", ValueError, "level .*'steps'"),
    ("train().to_dict(3)", ValueError, "level .*3"),
    ("train().to_frame('batch')", ValueError, "level .*'batch'"),
    ("polus.History().plot()", ValueError, "no step has been recorded"),
]

ROWS = [
    *PARTS,
    *COUNTS,
    *TRAIN,
    *DATASETS,
    *STEPS,
    *METRICS,
    *CALLBACKS,
    *EVALUATION,
    *FINDER,
    *CORE,
]


# TensorFlow has tensors of text, which go as far as the first layer or loss that takes numbers.
TEXT_ON_TENSORFLOW = {
    "train(['a', 'b'])": (ValueError, "Invalid dtype: str"),
    "batch(TYPES[0], Y[:16])": (ValueError, "Invalid input shape.*shape=.16,., dtype=string"),
    "batch(X[:16], TYPES[0])": (Exception, "Cast string to float is not supported"),
    "batch('text', Y)": (ValueError, "Invalid input shape.*dtype=string"),
    "batch(['a', 'b'], [0, 1])": (Exception, "The structure of `inputs` doesn't match"),
}


def lines():
    for source, error, phrase in ROWS:
        if backend.TAKES_TEXT and source in TEXT_ON_TENSORFLOW:
            error, phrase = TEXT_ON_TENSORFLOW[source]
        yield pytest.param(source, error, phrase, id=source)


@pytest.mark.parametrize(("source", "error", "phrase"), list(lines()))
def test_bad_input_raises(source, error, phrase):
    with pytest.raises(error) as caught:
        eval(source)
    notes = getattr(caught.value, "__notes__", [])
    text = "\n".join([str(caught.value), *notes])
    assert re.search(phrase, text, re.DOTALL), text


def test_the_table_is_long_and_has_no_line_twice():
    sources = [source for source, *_ in ROWS]
    assert len(sources) > 300
    assert len(set(sources)) == len(sources)
    assert set(sources) >= set(TEXT_ON_TENSORFLOW)
