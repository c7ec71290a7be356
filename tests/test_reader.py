"""The reader hands every batch to the step once, in order, in blocks of equal shape."""

import contextlib
import itertools
import threading
import time
import traceback
import types
import weakref

import keras
import numpy as np
import pytest

from polus.backends import backend
from polus.backends.placement import Placement
from polus.data import DataReader, as_adapter, from_arrays
from polus.data import blocks as blocks_module
from polus.data import epoch as epoch_module

X = np.arange(44, dtype="float32").reshape(22, 2)
Y = np.arange(22, dtype="int32")


def ragged(size=4):
    """Batches (x, y), the last one smaller."""
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, 22, size)]


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return ragged()[i]


def loader():
    torch = pytest.importorskip("torch")
    examples = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    return torch.utils.data.DataLoader(examples, 4)


def tensorflow_data(arrays=(X, Y)):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays).batch(4)


def changing_shapes():
    for length in (3, 3, 3, 5, 3, 5, 5, 1):
        yield (np.full((2, length), length, "float32"),)


def growing():
    for length in (1, 1, 2, 2, 2, 1):
        yield np.ones((2, length), "float32") * length


def tensorflow_growing():
    tf = pytest.importorskip("tensorflow")
    spec = tf.TensorSpec((2, None), tf.float32)
    return tf.data.Dataset.from_generator(growing, output_signature=spec)


# Name -> makes the dataset, makes its batches.
KINDS = {
    "list": (ragged, ragged),
    "lists of lists": (lambda: [list(b) for b in ragged()], ragged),
    "generator function": (lambda: lambda: iter(ragged()), ragged),
    "iterator": (lambda: iter(ragged()), ragged),
    "PyDataset": (lambda: Sequence(), ragged),
    "DataLoader": (loader, ragged),
    "tf.data": (tensorflow_data, ragged),
    "tf.data of dicts": (
        lambda: tensorflow_data({"a": X, "b": Y}),
        lambda: [{"a": x, "b": y} for x, y in ragged()],
    ),
    "tf.data of growing shapes": (tensorflow_growing, lambda: list(growing())),
    "single arrays": (lambda: [x for x, _ in ragged()], lambda: [x for x, _ in ragged()]),
    "dicts": (
        lambda: [{"a": x, "b": y} for x, y in ragged()],
        lambda: [{"a": x, "b": y} for x, y in ragged()],
    ),
    "nested": (
        lambda: [((x, [x]), y) for x, y in ragged()],
        lambda: [((x, [x]), y) for x, y in ragged()],
    ),
    "changing shapes": (lambda: changing_shapes, lambda: list(changing_shapes())),
    "arrays on the device": (lambda: from_arrays((X, Y), 4, shuffle=False), ragged),
    "list of arrays on the device": (lambda: from_arrays([X, Y], 4, shuffle=False), ragged),
    "arrays on the host": (
        lambda: from_arrays((X, Y), 4, shuffle=False, device_bytes=0),
        ragged,
    ),
}


def rows(block) -> list:
    """Returns the batches of a block as NumPy arrays."""
    if block.unpack is None:
        found = [block.payload]
    else:
        batches = block.unpack(keras.tree.map_structure(keras.ops.convert_to_tensor, block.payload))
        found = [keras.tree.map_structure(lambda a, i=i: a[i], batches) for i in range(block.count)]
    return [keras.tree.map_structure(keras.ops.convert_to_numpy, batch) for batch in found]


def read(dataset, capacity, transform=None, steps=None, due=lambda step: None) -> tuple[list, list]:
    """Returns all batches of an epoch, and the counts of its blocks."""
    data = DataReader(as_adapter(dataset), transform, steps).epoch(0)
    with contextlib.closing(data.blocks(capacity, due)) as blocks:
        found = [(block.count, rows(block)) for block in blocks]
    return list(itertools.chain(*(batches for _, batches in found))), [count for count, _ in found]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, reference in zip(batches, expected, strict=True):
        found, wanted = keras.tree.flatten(batch), keras.tree.flatten(reference)
        assert [a.dtype for a in found] == [a.dtype for a in wanted]
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def prefetch_threads() -> list:
    return [thread for thread in threading.enumerate() if thread.name == "polus-prefetch"]


# ---------------------------------------------------------------------- batches and blocks


@pytest.mark.parametrize("capacity", [1, 3, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_dataset_yields_its_batches_in_order(kind, capacity):
    make, expected = KINDS[kind]
    batches, counts = read(make(), capacity)
    assert_same(batches, expected())
    assert max(counts) == 1 if capacity == 1 else 1 < max(counts) <= capacity
    assert not prefetch_threads()


@pytest.mark.parametrize("gathers_on_host", [False, True])
def test_batches_of_arrays_are_gathered_in_the_step_or_outside_of_it(gathers_on_host, monkeypatch):
    placement = Placement()
    placement.gathers_on_host = gathers_on_host
    monkeypatch.setattr(backend, "placement", lambda: placement)
    reader = DataReader(as_adapter(from_arrays((X, Y), 4, seed=3)))
    with contextlib.closing(reader.epoch(1).blocks(4, lambda step: None)) as blocks:
        found = list(blocks)
    # The batches themselves in the payload, or the rows of all examples and which of them to take.
    first = keras.tree.flatten(found[0].payload)[0]
    assert tuple(first.shape) == ((4, 4, 2) if gathers_on_host else X.shape)
    order = from_arrays((X, Y), 4, seed=3).order(1)
    expected = [(X[order[i : i + 4]], Y[order[i : i + 4]]) for i in range(0, 22, 4)]
    assert_same([batch for block in found for batch in rows(block)], expected)
    assert [block.capacity for block in found] == [4, 1, 1]


def test_a_block_holds_batches_of_one_shape():
    _, counts = read(changing_shapes, 64)
    assert counts == [3, 1, 1, 2, 1]


@pytest.mark.parametrize("kind", ["generator function", "tf.data", "arrays on the device"])
def test_no_block_is_longer_than_callbacks_allow(kind):
    _, counts = read(KINDS[kind][0](), 64, due=lambda step: 2 - step % 2)
    assert counts == [2, 2, 1, 1]  # the last batch is smaller


@pytest.mark.parametrize("kind", ["generator function", "tf.data"])
def test_slow_data_comes_in_shorter_blocks_for_the_same_programs(kind, monkeypatch):
    def programs():
        data = DataReader(as_adapter(KINDS[kind][0]())).epoch(0)
        with contextlib.closing(data.blocks(4)) as blocks:
            return [(block.count, block.capacity) for block in blocks]

    assert programs() == [(4, 4), (1, 1), (1, 1)]
    monkeypatch.setattr(blocks_module, "GROUP_SECS", 0.0)
    slow = programs()
    assert len(slow) > 3
    assert [capacity for count, capacity in slow for _ in range(count)] == [4, 4, 4, 4, 1, 1]
    assert_same(read(KINDS[kind][0](), 4)[0], ragged())


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="others have no such graph")
def test_a_few_batches_of_tf_data_are_read_without_a_graph(monkeypatch):
    monkeypatch.setattr("polus.backends.tensorflow_blocks._read", None)
    for make, expected in (KINDS["tf.data"], KINDS["tf.data of growing shapes"]):
        assert_same(read(make(), 8)[0], expected())


@pytest.mark.parametrize("kind", ["list", "tf.data", "arrays on the device"])
def test_steps_limits_an_epoch(kind):
    batches, _ = read(KINDS[kind][0](), 3, steps=4)
    assert_same(batches, ragged()[:4])


def test_a_transform_receives_the_batches_as_the_dataset_yields_them():
    def double(batch):
        assert isinstance(batch, tuple)
        return batch[0] * 2, batch[1]

    batches, _ = read(ragged(), 3, transform=double)
    assert_same(batches, [(2 * x, y) for x, y in ragged()])


# ---------------------------------------------------------------------- the order of arrays


@pytest.mark.parametrize("transform", [None, lambda batch: batch], ids=["device", "host"])
def test_an_epoch_opened_in_its_middle_keeps_its_order(transform):
    reader = DataReader(as_adapter(from_arrays(np.arange(10), 3, seed=7)), transform)
    with contextlib.closing(reader.epoch(3, start=2).blocks(2)) as blocks:
        found = [keras.tree.flatten(batch) for block in blocks for batch in rows(block)]
    assert [batch.tolist() for (batch,) in found] == [[6, 8, 4], [1]]


class ToldTheEpoch:
    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield np.full(2, self.epoch)


@pytest.mark.parametrize("transform", [None, lambda batch: batch], ids=["plain", "transformed"])
@pytest.mark.parametrize("make", [lambda: from_arrays(np.arange(10), 3), ToldTheEpoch])
def test_the_first_epoch_is_an_offset_to_the_number_that_the_dataset_sees(make, transform):
    def epochs(numbers, **arguments):
        reader = DataReader(as_adapter(make()), transform, **arguments)
        for number in numbers:
            reader.epoch(number).peek()
            with contextlib.closing(reader.current.blocks(2)) as blocks:
                yield [
                    batch.tolist() for block in blocks for (batch,) in map(as_tuple, rows(block))
                ]

    def as_tuple(batch):
        return batch if isinstance(batch, tuple) else (batch,)

    expected = list(epochs(range(3)))
    assert expected[0] != expected[1] != expected[2]
    assert [*epochs([0]), *epochs([0], first_epoch=1), *epochs([0], first_epoch=2)] == expected


@pytest.mark.parametrize("endless", ["tf.data", "PyDataset"])
def test_an_endless_dataset_without_steps_raises(endless):
    if endless == "tf.data":
        dataset = tensorflow_data().repeat()
    else:
        dataset = Sequence()
        dataset.__class__ = type("Endless", (Sequence,), {"num_batches": None})
    with pytest.raises(
        ValueError, match=r"endless\. Say how many .*: evaluate\(\.\.\., steps=1000"
    ):
        DataReader(as_adapter(dataset)).check_ends("evaluate")
    DataReader(as_adapter(dataset), steps=3).check_ends("evaluate")
    DataReader(as_adapter(ragged())).check_ends("evaluate")


@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [
        (0, 0, [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]),
        (0, 3, [5, 4, 6, 7, 9, 0, 1, 2, 3, 8]),
        (7, 0, [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]),
    ],
)
def test_a_seed_fixes_the_order_on_every_platform(seed, epoch, order):
    dataset = from_arrays(np.arange(10), 3, seed=seed)
    assert dataset.order(epoch).tolist() == order


@pytest.mark.parametrize("seed", [3, 2**53 + 1, 2**63, 2**64 - 2, 2**64 - 1, np.uint64(2**64 - 1)])
def test_each_bit_of_a_seed_counts(seed):
    raw = np.random.Philox(key=int(seed) + (5 << 64)).random_raw(10)  # one number of 128 bits
    order = from_arrays(np.arange(10), 3, seed=seed).order(5)
    assert order.tolist() == np.argsort(raw, kind="stable").tolist()


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True, None, "a"])
def test_invalid_seeds_raise(seed):
    with pytest.raises(ValueError, match=rf"integer from 0 to 2\*\*64 - 1, got {seed!r}"):
        from_arrays(X, 4, seed=seed)


@pytest.mark.parametrize("batch_size", [0, 2.0, True, None])
def test_invalid_batch_sizes_raise(batch_size):
    with pytest.raises(ValueError, match=r"batch_size must be a positive integer, got"):
        from_arrays(X, batch_size)


def test_a_list_of_numbers_in_place_of_an_array_raises():
    with pytest.raises(ValueError, match=r"single value 0\. A list .* np\.array\(values\)"):
        from_arrays((X, Y.tolist()), 4)


def test_float64_becomes_floatx_and_integers_stay():
    data = [(np.float64([1.0]), np.int64([2]))]
    for dataset in (data, from_arrays((np.float64([1.0]), np.int64([2])), 1)):
        ((x, y),), _ = read(dataset, 1)
        assert x.dtype == keras.config.floatx()
        assert y.dtype.kind == "i"


@pytest.mark.parametrize("kind", ["generator function", "tf.data"])
def test_an_endless_dataset_is_read_up_to_steps(kind):
    def endless():
        for i in itertools.count():
            yield (np.full((2,), i, "float32"),)

    def tensors():
        tf = pytest.importorskip("tensorflow")
        return tf.data.Dataset.range(5).repeat().map(lambda i: tf.cast([i, i], tf.float32))

    dataset = endless if kind == "generator function" else tensors()
    batches, counts = read(dataset, 3, steps=7)
    assert [keras.tree.flatten(b)[0][0] for b in batches] == [
        i % 5 if kind == "tf.data" else i for i in range(7)
    ]
    assert counts == [3, 3, 1]
    assert not prefetch_threads()


# ---------------------------------------------------------------------- the prefetch thread


def broken_after(count):
    yield from ragged()[:count]
    raise OSError("the disk is gone")


def test_an_exception_of_the_dataset_follows_its_batches_and_shows_its_line():
    seen: list = []
    data = DataReader(as_adapter(lambda: broken_after(3))).epoch(0)
    blocks = data.blocks(1)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        seen.extend(batch for block in blocks for batch in rows(block))
    assert_same(seen, ragged()[:3])
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert 'raise OSError("the disk is gone")' in lines
    assert not prefetch_threads()


def test_an_exception_of_the_transform_shows_its_line():
    def transform(batch):
        return batch[2]

    with pytest.raises(IndexError) as caught:
        read(ragged(), 4, transform)
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "return batch[2]" in lines


def test_a_stop_iteration_in_the_transform_does_not_end_the_data():
    with pytest.raises(RuntimeError, match="StopIteration"):
        read(ragged(), 4, lambda batch: next(iter([])))


def test_the_wait_for_the_first_batch_is_counted(monkeypatch):
    now = [0.0]

    def slow():
        now[0] += 7.0
        yield from ragged()

    monkeypatch.setattr(epoch_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    data = DataReader(as_adapter(slow))
    data.epoch(0).peek()
    assert data.waited_secs == 7.0


@pytest.mark.parametrize("capacity", [1, 100])
def test_closing_the_blocks_stops_reading_in_the_middle_of_a_block(monkeypatch, capacity):
    reading, stopped, join = threading.Event(), threading.Event(), threading.Thread.join
    taken, ended = [], []

    def endless():
        try:
            for i in itertools.count():
                if i == 2:
                    reading.set()
                    stopped.wait(60)
                taken.append(i)
                yield np.zeros((1,), "float32")
        finally:
            ended.append(True)

    def joined(thread, timeout=None):
        stopped.set()
        join(thread, timeout)

    data = DataReader(as_adapter(endless))
    blocks = data.epoch(0).blocks(capacity, due=lambda step: None if step else 1)
    next(blocks)
    assert reading.wait(60)
    monkeypatch.setattr(threading.Thread, "join", joined)
    blocks.close()
    assert taken == [0, 1, 2]
    assert ended == [True]  # while `data` is still there


def test_a_bare_iterator_continues_in_the_next_epoch():
    def batches():
        yield from ragged()

    data = DataReader(as_adapter(batches()), steps=2)
    found = []
    for epoch in range(3):
        with contextlib.closing(data.epoch(epoch).blocks()) as blocks:
            found += [batch for block in blocks for batch in rows(block)]
    assert_same(found, ragged())


def test_prefetching_is_bounded_and_ends_with_the_blocks():
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield np.zeros((1,), "float32")

    blocks = DataReader(as_adapter(endless)).epoch(0).blocks(capacity=5)
    next(blocks)
    assert len(prefetch_threads()) == 1
    ends = time.monotonic() + 0.5
    while len(taken) <= 5 * 3 + 1 and time.monotonic() < ends:
        time.sleep(0.01)  # without a bound it would read thousands meanwhile
    blocks.close()
    assert not prefetch_threads()
    # The block that was taken, two that wait, and the first batch behind them.
    assert len(taken) <= 5 * 3 + 1


def test_short_blocks_are_not_read_far_ahead():
    pace = types.SimpleNamespace(steps=2, known=False)
    batches = [np.zeros((1,), "float32")] * 200
    reader = DataReader(as_adapter(batches)).epoch(0)
    with contextlib.closing(reader.blocks(64, pace=pace)) as blocks:
        counts = [next(blocks).count for _ in range(2)]
        pace.steps, pace.known = 64, True
        counts += [block.count for block in blocks]
    assert counts in ([2, 2, 60, 64, 64, 8], [2, 2, 2, 58, 64, 64, 8])  # one may be made ahead


def test_data_is_read_ahead_although_its_pace_never_settles():
    pace = types.SimpleNamespace(steps=2, known=False)
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield np.zeros((1,), "float32")

    blocks = DataReader(as_adapter(endless)).epoch(0).blocks(64, pace=pace)
    for _ in range(5):
        next(blocks)
    ends = time.monotonic() + 5
    while len(taken) < 14 and time.monotonic() < ends:  # five blocks of two, and two that wait
        time.sleep(0.01)
    blocks.close()
    assert 14 <= len(taken) <= 15


def test_a_wait_for_data_can_be_interrupted():
    released = threading.Event()

    def slow():
        yield np.zeros((1,), "float32")
        released.wait()
        yield np.zeros((1,), "float32")

    def handle_signals():
        if released.is_set():
            raise KeyboardInterrupt

    blocks = DataReader(as_adapter(slow)).epoch(0).blocks(1, handle_signals=handle_signals)
    next(blocks)
    released.set()
    with pytest.raises(KeyboardInterrupt):
        next(blocks)
    assert not prefetch_threads()


def test_an_iterator_of_tf_data_is_dropped_in_a_thread(monkeypatch):
    # TensorFlow waits for its own threads there, 0 to 600 ms: no epoch is to wait for that.
    made, dropped, iterate = [], [], backend.iterate

    def watched(dataset):
        iterator = iterate(dataset)
        weakref.finalize(iterator, lambda: dropped.append(threading.current_thread().name))
        made.append(weakref.ref(iterator))
        return iterator

    monkeypatch.setattr(backend, "iterate", watched)
    reader = DataReader(as_adapter(tensorflow_data()))
    for number in range(2):
        with contextlib.closing(reader.epoch(number).blocks(4)) as blocks:
            assert sum(block.count for block in blocks) == 6
    for thread in threading.enumerate():
        if thread.name == "polus-drop":
            thread.join()
    assert dropped == ["polus-drop"] * 2
    assert not any(ref() for ref in made)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="others gather or copy")
@pytest.mark.parametrize("writeable", [True, False])
def test_examples_share_memory_on_a_cpu_unless_they_are_read_only(writeable):
    x = np.arange(12, dtype="float32").reshape(6, 2)
    x.flags.writeable = writeable
    device = blocks_module.DeviceExamples(from_arrays(x, 2, shuffle=False), Placement())
    assert np.shares_memory(device.arrays.cpu().numpy(), x) is writeable
    np.testing.assert_array_equal(device.arrays.cpu().numpy(), x)
