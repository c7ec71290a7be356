"""Batches that no step can take are refused by name, with the words to write instead."""

import contextlib
import logging

import keras
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from polus.backends import backend
from polus.data import DataReader, as_adapter, from_arrays
from polus.training import ClassifierTrainer

datasets = pytest.importorskip("datasets")
tf = pytest.importorskip("tensorflow")

X = np.arange(24, dtype="float32").reshape(12, 2)
Y = (np.arange(12) % 2).astype("int32")
TEXT = np.array([f"text {i}" for i in range(12)])
OBJECTS = np.array([[1], "a", None] * 4, dtype=object)
FRAME = pd.DataFrame({"age": np.arange(12.0), "city": TEXT, "since": pd.Timestamp("2020-01-01")})
without_text = pytest.mark.skipif(backend.TAKES_TEXT, reason="TensorFlow has tensors of text")


def batches(*parts, size=4):
    """Returns a list of batches, one part of which may be any sliceable."""
    return [tuple(p[i : i + size] for p in parts) for i in range(0, 12, size)]


def dict_batches(**parts):
    return [{k: p[i : i + 4] for k, p in parts.items()} for i in range(0, 12, 4)]


def read(dataset, transform=None):
    reader = DataReader(as_adapter(dataset), transform)
    with contextlib.closing(reader.epoch(0).blocks(2)) as blocks:
        return list(blocks)


def hugging_face(**columns):
    return datasets.Dataset.from_dict(columns or {"x": X, "y": Y})


def ragged():
    rows = tf.ragged.constant([[1.0] * (1 + i % 3) for i in range(12)])
    return tf.data.Dataset.from_tensor_slices((rows, Y)).batch(4)


def sparse_tensors():
    return tf.data.Dataset.from_tensor_slices({"x": tf.sparse.from_dense(X), "y": Y}).batch(4)


# name -> (makes the dataset, the error, what it says)
REFUSED = {
    "sparse matrix in from_arrays": (
        lambda: from_arrays((scipy.sparse.csr_matrix(X), Y), 4),
        r"scipy.sparse csr_matrix of shape \(12, 2\). Convert it: x.toarray\(\)",
    ),
    "sparse matrix in a batch": (
        lambda: batches(scipy.sparse.csr_array(X), Y),
        r"Part \[0\] of a batch is a scipy.sparse csr_array, .* "
        r"custom_data_transform_f=lambda batch: \(batch\[0\].toarray\(\), batch\[1\]\)",
    ),
    "objects in a batch": (
        lambda: batches(X, OBJECTS),
        r"Part \[1\] of a batch is an array of objects \(NoneType, list, str\)",
    ),
    "objects in from_arrays": (
        lambda: from_arrays((X, OBJECTS), 4),
        r"Part \[1\] of a batch is an array of objects",
    ),
    "dates in a dict": (
        lambda: dict_batches(x=X, day=np.array(["2020-01-01"] * 12, "datetime64[D]")),
        r"Part \['day'\] of a batch is dates .*: "
        r"\{\*\*batch, 'day': batch\['day'\].astype\('float32'\)\}",
    ),
    "columns of a frame": (
        lambda: from_arrays((FRAME, Y), 4),
        r"these columns of the data frame hold something else: 'city' .*, 'since' .*"
        r"frame.drop\(columns=\['city', 'since'\]\)",
    ),
    "frame in a batch": (
        lambda: [(FRAME[:4], Y[:4])],
        r"columns that are not numbers \('city' is .*drop\(columns",
    ),
    "Hugging Face's Dataset": (
        hugging_face,
        r"single examples, not batches\. Pass a function .*with_format\('numpy'\).iter\(batch_size",
    ),
    "Hugging Face's DatasetDict": (
        lambda: datasets.DatasetDict(train=hugging_face()),
        r"holds several datasets: pass batches of one of \['train'\]",
    ),
    "Hugging Face's IterableDataset of examples": (
        lambda: hugging_face().to_iterable_dataset(),
        r"single examples, not batches\. Write dataset\.batch\(32\)\.with_format\('numpy'\)",
    ),
    "ragged tf.data": (ragged, r"Part \[0\] of the batches is a ragged tensor.*x\.to_tensor\(\)"),
    "sparse tf.data": (
        sparse_tensors,
        r"Part \['x'\] of the batches is a sparse tensor.*tf\.sparse\.to_dense\(x\)",
    ),
}
TEXTS = {
    "text in a batch": (lambda: batches(TEXT, Y), r"Part \[0\] of a batch is text \(dtype <U7\)"),
    "text in one array": (lambda: [TEXT[:4]], r"A batch is text .*=lambda batch: encode\(batch\)"),
    "text as objects": (
        lambda: dict_batches(x=TEXT.astype(object), y=Y),
        r"Part \['x'\] of a batch is text .*\{\*\*batch, 'x': encode\(batch\['x'\]\)\}",
    ),
    "text in from_arrays": (
        lambda: from_arrays((TEXT, Y), 4),
        r"custom_data_transform_f=lambda batch: \(encode\(batch\[0\]\), batch\[1\]\)",
    ),
    "text in tf.data": (
        lambda: tf.data.Dataset.from_tensor_slices((TEXT, Y)).batch(4),
        r"Part \[0\] of a batch is text",
    ),
    "nested text": (
        lambda: [((x, [t]), y) for x, t, y in batches(X, TEXT, Y)],
        r"Part \[0\]\[1\]\[0\] of a batch is text",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_batches_that_are_no_arrays_of_numbers_raise(name):
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=f"(?s){message}"):
        read(make())


@without_text
@pytest.mark.parametrize("name", TEXTS)
def test_text_names_its_part_and_the_transform_to_write(name):
    make, message = TEXTS[name]
    with pytest.raises(TypeError, match=f"(?s){message}"):
        read(make())


@pytest.mark.skipif(not backend.TAKES_TEXT, reason="only TensorFlow has tensors of text")
@pytest.mark.parametrize("name", TEXTS)
def test_tensorflow_reads_text(name):
    assert sum(block.count for block in read(TEXTS[name][0]())) in (1, 3)


@pytest.mark.parametrize("make", [lambda: from_arrays((TEXT, Y), 4), lambda: batches(TEXT, Y)])
def test_a_transform_encodes_text(make):
    def encode(batch):
        return np.array([int(text.split()[1]) for text in batch[0]]), batch[1]

    assert sum(block.count for block in read(make(), encode)) == 3


def test_a_transform_converts_sparse_and_ragged_tensors():
    if backend.TAKES_TEXT:  # on TensorFlow batches of tf.data are tensors
        assert len(read(ragged(), lambda batch: (batch[0].to_tensor(), batch[1])))
        with pytest.raises(TypeError, match=r"Part \['x'\] of a batch is a sparse tensor"):
            read(sparse_tensors(), lambda batch: batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shuffle": "no"}, "shuffle must be True or False, got 'no'"),
        ({"shuffle": None}, "shuffle must be True or False, got None"),
        ({"drop_remainder": 1}, "drop_remainder must be True or False, got 1"),
        ({"batch_size": True}, "batch_size must be a positive integer, got True"),
        ({"device_bytes": "1 GB"}, "device_bytes must be a number of bytes, got '1 GB'"),
        ({"device_bytes": -1}, "device_bytes must be a number of bytes, got -1"),
    ],
)
def test_invalid_arguments_of_from_arrays_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(X, **{"batch_size": 4} | arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [(X[:4], Y[:4]), (X[:0], Y[:0])],
        lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).map(lambda x, y: (x[:0], y)),
    ],
    ids=["list", "tf.data"],
)
def test_an_empty_batch_raises(make):
    with pytest.raises(ValueError, match=r"Batch \d of the epoch has no examples.*Skip empty"):
        read(make())


# ---------------------------------------------------------------------- lengths


class Told:
    def __init__(self, told, count):
        self.told, self.count = told, count

    def __len__(self):
        return self.told

    def __iter__(self):
        return iter(batches(X, Y)[: self.count])


@pytest.mark.parametrize(("told", "count"), [(5, 3), (2, 3), (10, 1)])
def test_a_length_that_is_wrong_warns_once(told, count, caplog):
    reader = DataReader(as_adapter(Told(told, count)))
    for epoch in range(2):
        with contextlib.closing(reader.epoch(epoch).blocks(2)) as blocks:
            assert sum(block.count for block in blocks) == count
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"len(dataset) is {told}, and an epoch had {count} batches" in record.getMessage()
    assert "__len__ of Told" in record.getMessage()


def test_a_length_that_is_right_or_not_reached_does_not_warn(caplog):
    assert len(read(Told(3, 3)))
    reader = DataReader(as_adapter(Told(5, 3)), steps=2)
    with contextlib.closing(reader.epoch(0).blocks()) as blocks:
        list(blocks)
    with contextlib.closing(DataReader(as_adapter(Told(5, 3))).epoch(0).blocks()) as blocks:
        next(blocks)
    assert not caplog.records


# ---------------------------------------------------------------------- parts that are None


def without_weights(size=4):
    return [(x, y, None) for x, y in batches(X, Y, size=size)]


WITH_NONE = {
    "list": without_weights,
    "list of one shape less": lambda: [*without_weights(4), *without_weights(3)],
    "arrays on the device": lambda: from_arrays((X, Y, None), 4, shuffle=False),
    "arrays on the host": lambda: from_arrays((X, Y, None), 4, shuffle=False, device_bytes=0),
    "tf.data": lambda: (
        tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).map(lambda x, y: (x, y, None))
    ),
}


@pytest.mark.parametrize("steps_per_execution", [1, 3])
@pytest.mark.parametrize("name", WITH_NONE)
def test_a_part_that_is_none_trains_as_in_fit(name, steps_per_execution):
    def model():
        keras.utils.set_random_seed(3)
        made = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        return made, keras.optimizers.SGD(0.01), loss

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    fitted, optimizer, _ = model()
    fitted.compile(optimizer, loss)
    pairs = [batch[:2] for batch in ([*without_weights(4), *without_weights(3)])]
    for x, y in pairs if "less" in name else pairs[:3]:
        fitted.train_on_batch(x, y)
    trainer = ClassifierTrainer(*model())
    trainer.train(WITH_NONE[name](), 1, steps_per_execution=steps_per_execution)
    for ours, theirs in zip(trainer.model.get_weights(), fitted.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    trainer.evaluate(WITH_NONE[name]())


def test_a_step_receives_none_in_its_place():
    seen = []

    class Own(ClassifierTrainer):
        def train_step(self, *inputs):
            seen.append([part is None for part in inputs])
            return super().train_step(*inputs)

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    Own(model, keras.optimizers.SGD(0.01), loss).train(from_arrays((X, Y, None), 4), 1)
    assert set(map(tuple, seen)) == {(False, False, True)}


# ---------------------------------------------------------------------- labels


def test_labels_that_the_loss_leaves_out_or_that_cannot_be_counted_are_accepted():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    wrong = np.where(np.arange(12) < 2, -1, Y)
    ClassifierTrainer(model, keras.optimizers.SGD(0.1), ignoring).train(batches(X, wrong), 1)

    class Wrapped(ClassifierTrainer):
        def forward_without_grads(self, x, y):
            return x, y % 2

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    Wrapped(model, keras.optimizers.SGD(0.1), loss).train(batches(X, Y + 6), 1)


class Subclassed(keras.Model):
    """Keras does not know the shape of its output."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, x):
        return self.dense(x)


def as_tensors(*parts):
    return [tuple(map(keras.ops.convert_to_tensor, batch)) for batch in batches(*parts)]


WRONG = np.where(np.arange(12) == 9, 2, Y)  # in the third batch
FIRST = "(The first batch|Batch 1 of epoch 1)"
WITH_WRONG_LABELS = {
    "in the first batch": (lambda: batches(X, Y + 1), FIRST),
    "in a later batch": (lambda: batches(X, WRONG), "Batch 3 of epoch 1"),
    "arrays on the device": (lambda: from_arrays((X, WRONG), 4), f"({FIRST}|The dataset)"),
    "tensors on the host": (lambda: as_tensors(X, WRONG), "Batch 3 of epoch 1"),
}


@pytest.mark.parametrize("name", WITH_WRONG_LABELS)
@pytest.mark.parametrize("method", ["train", "evaluate"])
def test_labels_that_are_no_class_of_a_subclassed_model_raise(method, name):
    make, message = WITH_WRONG_LABELS[name]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = ClassifierTrainer(Subclassed(), keras.optimizers.SGD(0.1), loss)
    message = f"{message} has the label 2, and the model has 2 outputs"
    # PyTorch's own loss refuses those of the first batch before.
    with pytest.raises((ValueError, IndexError), match=f"{message}|Target 2 is out of bounds"):
        getattr(trainer, method)(make(), *([1] if method == "train" else []))


def test_classes_along_another_axis_are_not_counted_along_the_last_one():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, axis=1)
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(6), keras.layers.Reshape((3, 2))]
    )
    labels = np.arange(24).reshape(12, 2) % 3  # of each example two, of three classes
    trainer = ClassifierTrainer(model, keras.optimizers.SGD(0.1), loss)
    trainer.check_batch((X, labels), "Batch 1")


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_labels_in_tf_data_that_are_no_class_raise(steps_per_execution):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = ClassifierTrainer(Subclassed(), keras.optimizers.SGD(0.1), loss)
    data = tf.data.Dataset.from_tensor_slices((X, WRONG)).batch(4)
    with pytest.raises(ValueError, match="Batch 3 of epoch 1 has the label 2"):
        trainer.train(data, 1, steps_per_execution=steps_per_execution)
