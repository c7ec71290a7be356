"""A resumed run reads the same batches as an uninterrupted one.

Each dataset is read for three epochs, and again with an interruption: then everything is made anew,
as in a new process, with random generators in other states, and continues from a checkpoint.
"""

import contextlib
import itertools
import random
import threading

import keras
import numpy as np
import pytest
from resuming import assert_resumes_exactly, batch_of, checkpointed, interrupted_log, read

from polus.data import DataReader, as_adapter, from_arrays, with_iterator_state
from polus.data.fingerprint import checksum
from polus.errors import RefusedStateError

torch = pytest.importorskip("torch")

EXAMPLES = 22
x = np.arange(EXAMPLES, dtype="float32")


def batches(order, noise=lambda: 0.0):
    for i in range(0, EXAMPLES, 4):
        yield (x[order[i : i + 4]] + np.float32(noise()),)


def drawn_at_the_start():
    yield from batches(np.random.permutation(EXAMPLES))


def drawn_for_each_batch():
    yield from batches(np.random.permutation(EXAMPLES), random.random)


def tensorflow_data(shuffled_again=True, repeat=False):
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices(x)
    dataset = dataset.shuffle(9, seed=3, reshuffle_each_iteration=shuffled_again)
    return (dataset.repeat() if repeat else dataset).batch(4)


def loader(**kwargs):
    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return EXAMPLES

        def __getitem__(self, i):
            return torch.tensor(x[i]) + torch.rand(()) if kwargs.get("noisy") else x[i]

    generator = torch.Generator().manual_seed(5) if kwargs.get("own_generator") else None
    if kwargs.get("batch_sampler"):
        sampler = torch.utils.data.RandomSampler(x, generator=generator)
        sampler = torch.utils.data.BatchSampler(sampler, 4, drop_last=False)
        return torch.utils.data.DataLoader(Examples(), batch_sampler=sampler)
    return torch.utils.data.DataLoader(Examples(), 4, shuffle=True, generator=generator)


class Shuffled(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()
        self.order, self.generator = np.arange(EXAMPLES), np.random.default_rng(1)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return x[self.order[4 * i : 4 * i + 4]]

    def on_epoch_end(self):
        self.generator.shuffle(self.order)


class ToldTheEpoch:
    """Has the interface of PyTorch's samplers; its iterator has a state, as grain's."""

    def set_epoch(self, epoch):
        self.order = np.random.default_rng((5, epoch)).permutation(EXAMPLES)

    def __iter__(self):
        return StatefulIterator(x[self.order])


class CountsItsEpochs:
    """Has all of its state in the dataset, also of what it drew itself."""

    def __init__(self):
        self.state = {"epoch": -1, "position": 6}

    def __iter__(self):
        if self.state["position"] == 6:
            self.state = {"epoch": self.state["epoch"] + 1, "position": 0}
        order = np.random.default_rng(self.state["epoch"]).permutation(EXAMPLES)
        for i in range(self.state["position"], 6):
            self.state = {**self.state, "position": i + 1}
            yield x[order[4 * i : 4 * i + 4]]

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class StatefulLoader:
    """Has the interface of torchdata's StatefulDataLoader."""

    def __init__(self):
        self.position, self.resumed, self.num_read = 0, False, 0

    def __len__(self):
        return 6

    def __iter__(self):
        if not self.resumed:
            self.position = 0
            self.order = torch.randperm(EXAMPLES)
        self.resumed = False
        while self.position < len(self):
            self.position += 1
            self.num_read += 1
            yield x[self.order[4 * self.position - 4 : 4 * self.position].numpy()]

    def state_dict(self):
        return {"position": self.position, "sampler": (self.order, None, b"\0\1")}

    def load_state_dict(self, state):
        self.order, none, binary = state["sampler"]
        assert (none, binary) == (None, b"\0\1")
        self.position, self.resumed = state["position"], True


class StatefulIterable:
    """Has the interface of grain's datasets: the iterator has the state."""

    def __iter__(self):
        return StatefulIterator()


class StatefulIterator:
    position = 0

    def __init__(self, examples=x):
        self.examples = examples

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == 6:
            raise StopIteration
        self.position += 1
        return self.examples[4 * self.position - 4 : 4 * self.position]

    def get_state(self):
        return b"%d" % self.position

    def set_state(self, state):
        self.position = int(state)


class RefusesItsState(StatefulIterator):
    """Has been changed since: its state lacks what it looks for."""

    def set_state(self, state):
        raise KeyError("position")


class RefusingData:
    def __iter__(self):
        return RefusesItsState()


def test_an_epoch_is_read_again_if_the_iterator_refuses_its_state(tmp_path, caplog):
    caplog.set_level("INFO", "polus.data")
    assert_resumes_exactly(tmp_path, RefusingData, places=[(0, 3), (1, 2)])
    assert "KeyError('position'). The epoch is read again" in caplog.text


def test_a_state_that_is_refused_where_nothing_else_brings_the_batch_back_raises(tmp_path):
    class Drawn(RefusingData):  # from a generator that nobody restores
        generator = np.random.default_rng(0)

        def __iter__(self):
            return RefusesItsState(self.generator.permutation(x))

    with pytest.raises(RefusedStateError, match="does not take the state of its iterator"):
        interrupted_log(tmp_path, (0, 3), Drawn)


def noisy(batch):
    (batch,) = batch if isinstance(batch, tuple) else (batch,)
    return np.asarray(batch) + np.float32(np.random.normal())


# name -> (what makes the dataset, transform, steps)
SOURCES = {
    "from_arrays": (lambda: from_arrays((x,), 4, seed=1), None, None),
    "from_arrays, less than all": (lambda: from_arrays((x,), 4, seed=1), None, 5),
    "from_arrays, random transform": (lambda: from_arrays((x,), 4, seed=1), noisy, None),
    "list": (lambda: [x[i : i + 4] for i in range(0, EXAMPLES, 4)], None, None),
    "function, order from NumPy": (lambda: drawn_at_the_start, None, None),
    "function, every batch from Python": (lambda: drawn_for_each_batch, None, None),
    "iterator": (lambda: iter([x[i : i + 1] for i in range(EXAMPLES)]), None, 6),
    "PyDataset": (Shuffled, None, None),
    "PyDataset, less than all": (Shuffled, None, 5),
    "PyDataset, its own length said": (Shuffled, None, 6),
    "tf.data": (tensorflow_data, None, None),
    "tf.data, random transform": (tensorflow_data, noisy, None),
    "tf.data, one order": (lambda: tensorflow_data(False), None, None),
    "tf.data, endless": (lambda: tensorflow_data(repeat=True), None, 7),
    "tf.data, repeated": (lambda: tensorflow_data().unbatch().repeat(2).batch(4), None, None),
    "tf.data, repeated, length unknown": (
        lambda: tensorflow_data(repeat=True).filter(lambda x: x[0] < 99.0),
        None,
        7,
    ),
    "tf.data, iterator saved": (lambda: with_iterator_state(tensorflow_data(), 0), None, None),
    "tf.data, iterator saved once": (
        lambda: with_iterator_state(tensorflow_data(), 2, clock=itertools.count().__next__),
        None,
        None,
    ),
    "DataLoader": (loader, None, None),
    "DataLoader, own generator": (lambda: loader(own_generator=True), None, None),
    "DataLoader, own batch sampler": (
        lambda: loader(own_generator=True, batch_sampler=True),
        None,
        None,
    ),
    "DataLoader, random examples": (lambda: loader(noisy=True), None, None),
    "StatefulDataLoader": (StatefulLoader, None, None),
    "own loader with a state": (CountsItsEpochs, None, None),
    "grain": (StatefulIterable, None, None),
    "told the epoch": (ToldTheEpoch, None, None),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_resumed_run_reads_the_same_batches_as_an_uninterrupted_one(tmp_path, name, caplog):
    assert_resumes_exactly(tmp_path, *SOURCES[name])
    assert "does not repeat" not in caplog.text
    assert "not what they were" not in caplog.text


def test_a_loader_with_a_state_does_not_read_the_epoch_again(tmp_path):
    reader = DataReader(as_adapter(StatefulLoader()))
    epoch, step = read(reader, until=(1, 4), log=[])
    tree = checkpointed(tmp_path, epoch, step, reader)
    dataset = StatefulLoader()
    DataReader(as_adapter(dataset)).set_state(tree["data"], epoch, step, tree["random"])
    assert dataset.num_read <= 1 + 2  # the first of the epoch, and what was read in advance


def test_a_saved_tf_data_iterator_includes_its_shuffle_buffer(tmp_path):
    def make(seed):
        tf = pytest.importorskip("tensorflow")
        dataset = tf.data.Dataset.from_tensor_slices(x).shuffle(9, seed=seed).batch(1)
        return DataReader(as_adapter(with_iterator_state(dataset, 0)))

    def rest(data):
        with contextlib.closing(data.blocks()) as blocks:
            return [float(block.payload[0][0]) for block in blocks]

    reader = make(seed=1)
    epoch, step = read(reader, until=(0, 8), log=[])
    tree = checkpointed(tmp_path, epoch, step, reader)
    rests = []
    for seed in (1, 2):  # the second one's own order is another one
        again = make(seed)
        again.set_state(tree["data"], epoch, step, tree["random"])
        rests.append(rest(again.epoch(epoch, step)))
    assert rests[0] == rests[1]


@pytest.mark.parametrize("num_read", [1, 5, 6])  # of 6 batches; by 5 the shuffle has read all
def test_later_epochs_keep_their_order_after_a_restored_tf_data_iterator(num_read):
    def source():
        keras.utils.set_random_seed(1)
        return with_iterator_state(tensorflow_data(), 0)

    def order(epochs):
        return [[checksum(batch) for batch in epoch] for epoch in epochs]

    whole = source()
    expected = order(whole.batches(epoch) for epoch in range(3))
    first = source()
    first.rewind(1, None)
    read = list(itertools.islice(first.batches(1), num_read))
    again = source()
    again.rewind(1, None)
    next(iter(again.batches(1)))  # as the reader looks at the first batch
    epochs = [[*read, *again.restored_batches(1, first.iterator_state())], again.batches(2)]
    assert order(epochs) == expected[1:]


def test_tf_data_iterators_that_cannot_be_saved_raise():
    tf = pytest.importorskip("tensorflow")
    with pytest.raises(ValueError, match=r"that ends, .* Leave out its repeat"):
        with_iterator_state(tensorflow_data(repeat=True))
    spec = tf.TensorSpec((2,), tf.float32)
    dataset = tf.data.Dataset.from_generator(lambda: iter([[0.0, 1.0]]), output_signature=spec)
    reader = DataReader(as_adapter(with_iterator_state(dataset)))
    reader.tracked = True
    with (
        pytest.raises(ValueError, match=r"can't save the iterator .* without with_iterator_state"),
        contextlib.closing(reader.epoch(0).blocks()) as blocks,
    ):
        next(blocks)


def test_the_iterator_state_counts_the_batch_that_was_peeked_at(tmp_path):
    """The batch that was looked at first had been read when the state was noted."""
    reader, read_on = DataReader(as_adapter(StatefulLoader())), threading.Event()
    reader.tracked = True
    data = reader.epoch(0)
    data.peek()

    def due(step):
        assert step < 2 or read_on.wait(60)  # so no state is noted behind the first two

    with contextlib.closing(data.blocks(2, due)) as blocks:
        next(blocks)
        tree = checkpointed(tmp_path, 0, 2, reader)
        read_on.set()
        expected = checksum(batch_of(next(blocks), 0))
    again = DataReader(as_adapter(StatefulLoader()))
    again.set_state(tree["data"], 0, 2, tree["random"])
    assert checksum(again.epoch(0, 2).peek()) == expected


class OwnGenerator:
    def __init__(self):
        self.generator = np.random.default_rng(3)

    def __iter__(self):
        return batches(self.generator.permutation(EXAMPLES))


class DrawsAtTheEnd(Shuffled):
    def on_epoch_end(self):
        np.random.shuffle(self.order)


class ForgetsItsOrder(StatefulLoader):
    """Leaves the order of the epoch out of its state."""

    def __iter__(self):
        if self.resumed:
            self.order = torch.arange(EXAMPLES)
        return super().__iter__()

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position, self.resumed = state["position"], True


class KeepsItsOldState(ForgetsItsOrder):
    """Begins all later epochs in the state that it was given once."""

    given = None

    def __iter__(self):
        if self.given is not None:
            self.position, self.resumed = self.given, True
        return super().__iter__()

    def load_state_dict(self, state):
        self.given = state["position"]


def test_a_state_that_does_not_bring_the_next_batch_back_is_not_used(tmp_path, caplog):
    caplog.set_level("INFO", "polus.data")
    assert_resumes_exactly(tmp_path, ForgetsItsOrder, noisy, places=[(0, 3), (1, 2)])
    assert "read again from its start instead" in caplog.text
    assert "does not repeat" not in caplog.text


def test_a_state_that_neither_continues_nor_begins_again_warns(tmp_path, caplog):
    log = interrupted_log(tmp_path, (0, 3), KeepsItsOldState)
    assert len(log) >= 6
    assert "does not bring back the batch that followed it, in epoch 1 after" in caplog.text


FIRST = "The order of the data does not repeat: the first batch of epoch 2"


@pytest.mark.parametrize(
    ("make", "place", "message"),
    [
        (lambda: lambda: batches(np.random.default_rng().permutation(EXAMPLES)), (1, 2), FIRST),
        (lambda: lambda: batches(np.random.default_rng().permutation(EXAMPLES)), (2, 0), FIRST),
        (OwnGenerator, (1, 2), FIRST),
        (OwnGenerator, (2, 0), FIRST),
        (DrawsAtTheEnd, (1, 0), "DrawsAtTheEnd.on_epoch_end draws from a global random generator"),
        (DrawsAtTheEnd, (1, 2), "self.generator.shuffle"),
        (lambda: tensorflow_data(repeat=True), (1, 0), "batches ahead of the 7 steps"),
    ],
)
def test_an_order_that_does_not_repeat_warns(tmp_path, make, place, message, caplog):
    steps = 7 if "7 steps" in message else None
    reader = DataReader(as_adapter(make()), steps=steps)
    epoch, step = read(reader, until=place, log=[])
    tree = checkpointed(tmp_path, epoch, step, reader)
    reader = DataReader(as_adapter(make()), steps=steps)
    reader.set_state(tree["data"], epoch, step, tree["random"])
    assert message in caplog.text


@pytest.mark.parametrize("transform", [None, lambda batch: (batch[0] + 1, batch[1])])
@pytest.mark.parametrize(("changed", "warns"), [(9, True), (20, False)])
@pytest.mark.parametrize("kind", ["generators", "tf.data"])
def test_labels_that_changed_behind_the_first_batch_warn(
    tmp_path, transform, changed, warns, kind, caplog
):
    labels = np.arange(EXAMPLES) % 2

    def pairs():
        return ((x[i : i + 4], labels[i : i + 4].copy()) for i in range(0, EXAMPLES, 4))

    def make():
        if kind == "generators":
            return as_adapter(pairs)
        tf = pytest.importorskip("tensorflow")
        return as_adapter(tf.data.Dataset.from_tensor_slices((x, labels)).batch(4))

    reader = DataReader(make(), transform)
    epoch, step = read(reader, until=(1, 3), log=[])
    assert (epoch, step) == (1, 4)
    tree = checkpointed(tmp_path, epoch, step, reader)
    labels[changed] = 7  # in the batch with number 2, or in one that the run has not read yet
    reader = DataReader(make(), transform)
    reader.tracked = True
    reader.set_state(tree["data"], epoch, step, tree["random"])
    message = "the first batch of epoch 2 is the same, and others of its first 4 batches are not"
    assert (message in caplog.text) is warns


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: from_arrays((x,), 5), r"num_batches: it was 6, and is 5"),
        (lambda: [x[i : i + 4] for i in range(0, EXAMPLES, 4)], "kind: it was 'ArrayDataset'"),
        (lambda: from_arrays((x.astype("int32"),), 4), r"arrays: it was \[\['float32', 1\]\]"),
        (lambda: from_arrays((x[::-1],), 4), r"checksum of the arrays: it was \d+, and is"),
        (lambda: from_arrays((x,), 4, seed=1), "seed: it was 0, and is 1"),
        (lambda: from_arrays((x,), 4, shuffle=False), "shuffle: it was True, and is False"),
        (lambda: from_arrays((x[:-1],), 4), "num_examples: it was 22, and is 21"),
    ],
)
@pytest.mark.parametrize("place", [(1, 0), (1, 2)])
def test_resuming_with_another_dataset_raises(tmp_path, place, other, message):
    reader = DataReader(as_adapter(from_arrays((x,), 4)))
    epoch, step = read(reader, until=place, log=[])
    tree = checkpointed(tmp_path, epoch, step, reader)
    with pytest.raises(ValueError, match=message):
        DataReader(as_adapter(other())).set_state(tree["data"], epoch, step, tree["random"])


def test_resuming_with_other_arrays_in_a_batch_raises(tmp_path):
    reader = DataReader(as_adapter([x[:4], x[4:8]]))
    epoch, step = read(reader, until=(1, 0), log=[])
    tree = checkpointed(tmp_path, epoch, step, reader)
    other = DataReader(as_adapter([x[:4].astype("int32"), x[4:8]]))
    with pytest.raises(ValueError, match=r"were \[\['float32', 1\]\]"):
        other.set_state(tree["data"], epoch, step, tree["random"])


def test_large_arrays_are_checksummed_on_a_sample_of_rows(monkeypatch):
    monkeypatch.setattr("polus.data.adapters.MAX_CHECKED_BYTES", 40)  # of 88

    def facts(example):
        changed = x.copy()
        changed[example] = 99
        return as_adapter(from_arrays((changed,), 4)).facts()

    assert facts(3) != facts(6)
    assert facts(4) == facts(5)


def test_resuming_with_a_shorter_dataset_raises(tmp_path):
    reader = DataReader(as_adapter(lambda: batches(np.arange(EXAMPLES))))
    epoch, step = read(reader, until=(1, 4), log=[])
    tree = checkpointed(tmp_path, epoch, step, reader)
    reader = DataReader(as_adapter(lambda: list(batches(np.arange(EXAMPLES)))[:3]))
    with pytest.raises(ValueError, match="it ended after 3 batches of epoch 2"):
        reader.set_state(tree["data"], epoch, step, tree["random"])


@pytest.mark.parametrize("name", ["../stolen", "{folder}/stolen", "iterator.index/../../stolen", 3])
def test_names_in_a_saved_iterator_cannot_leave_its_folder(tmp_path, monkeypatch, name):
    adapter = with_iterator_state(tensorflow_data(), 0)
    list(zip(range(2), adapter.batches(0), strict=False))
    state = adapter.iterator_state()
    name = name.format(folder=tmp_path) if isinstance(name, str) else name
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="has a file named"):
        adapter.restored_batches(0, state | {name: b"content"})
    assert not list(tmp_path.rglob("*stolen*"))
