"""An isolated copy of a dataset can be read without changing later epochs of the dataset."""

import itertools

import keras
import numpy as np
import pytest

from polus.data import from_arrays
from polus.data.isolated import isolated_copy
from polus.state import random_state_kept

tf = pytest.importorskip("tensorflow")
torch = pytest.importorskip("torch")
DataLoader = torch.utils.data.DataLoader
RandomSampler = torch.utils.data.RandomSampler
TensorDataset = torch.utils.data.TensorDataset

NUMBERS = tf.data.Dataset.range(12)

TENSORFLOW_DATA = {
    "shuffle": lambda: NUMBERS.shuffle(12, seed=1).batch(4),
    "shuffle once": lambda: NUMBERS.shuffle(12, seed=1, reshuffle_each_iteration=False).batch(4),
    "map, prefetch": lambda: NUMBERS.shuffle(12, seed=1).map(lambda x: x + 1).batch(4).prefetch(2),
    "repeat": lambda: NUMBERS.shuffle(12, seed=1).repeat(2).batch(4),
    "cache of what NumPy drew": lambda: (
        tf.data.Dataset.from_generator(
            lambda: iter(np.random.permutation(12)), output_signature=tf.TensorSpec((), tf.int64)
        )
        .cache()
        .batch(4)
    ),
    "cache after shuffle": lambda: NUMBERS.shuffle(12, seed=1).cache().batch(4),
    "cache before shuffle": lambda: NUMBERS.cache().shuffle(12, seed=1).batch(4),
    "two shuffles": lambda: NUMBERS.shuffle(12, seed=1).batch(4).shuffle(3, seed=2),
    "zip": lambda: (
        tf.data.Dataset.zip(NUMBERS.shuffle(12, seed=1), NUMBERS.shuffle(12, seed=2))
        .map(lambda a, b: 100 * a + b)
        .batch(4)
    ),
    "interleave": lambda: (
        NUMBERS.shuffle(12, seed=1)
        .interleave(lambda x: tf.data.Dataset.range(x, x + 3).shuffle(3, seed=2), cycle_length=2)
        .batch(4)
    ),
    "random map": lambda: (
        NUMBERS.map(lambda x: x + tf.random.uniform((), 0, 99, tf.int64, seed=1))
        .shuffle(12, seed=1)
        .batch(4)
    ),
    "sampled": lambda: tf.data.Dataset.sample_from_datasets(
        [NUMBERS, NUMBERS.map(lambda x: -x)], seed=1, rerandomize_each_iteration=True
    ).batch(4),
    "slices, options": lambda: (
        tf.data.Dataset.from_tensor_slices(np.arange(12))
        .shuffle(12, seed=1)
        .batch(4)
        .with_options(tf.data.Options())
    ),
    "generator": lambda: (
        tf.data.Dataset.from_generator(
            lambda: iter(range(12)), output_signature=tf.TensorSpec((), tf.int64)
        )
        .shuffle(12, seed=1)
        .batch(4)
    ),
}


def loader(**arguments):
    return DataLoader(TensorDataset(torch.arange(12)), batch_size=4, **arguments)


def generator():
    return torch.Generator().manual_seed(1)


LOADERS = {
    "global generator": lambda: loader(shuffle=True),
    "own generator": lambda: loader(shuffle=True, generator=generator()),
    "own sampler": lambda: loader(sampler=RandomSampler(range(12), generator=generator())),
}


class Shuffled(keras.utils.PyDataset):
    """Shuffles at the end of each epoch, as Keras' guide has it."""

    def __init__(self):
        super().__init__()
        self.order, self.generator = np.arange(12), np.random.default_rng(0)

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.order[4 * i : 4 * i + 4]

    def on_epoch_end(self):
        self.generator.shuffle(self.order)


class Begun(keras.utils.PyDataset):
    """Shuffles at the beginning of each epoch, in place."""

    def __init__(self, order):
        super().__init__()
        self.order, self.generator = order, np.random.default_rng(0)
        self.same_generator = self.generator

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return np.array(self.rows[4 * i : 4 * i + 4])

    def on_epoch_begin(self):
        self.generator.shuffle(self.order)
        self.rows = self.order
        self.same_generator.random()


class Endless(Begun):
    @property
    def num_batches(self):
        return None


def elements(batches) -> list[int]:
    return [
        int(x) for batch in batches for x in np.ravel(batch[0] if type(batch) is list else batch)
    ]


def epoch(dataset, number: int) -> list[int]:
    from polus.data import as_adapter

    return elements(as_adapter(dataset).batches(number))


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, id=f"tf.data {name}") for name, make in TENSORFLOW_DATA.items()),
        *(pytest.param(make, id=f"DataLoader {name}") for name, make in LOADERS.items()),
        pytest.param(Shuffled, id="PyDataset"),
        pytest.param(lambda: Begun(np.arange(12)), id="PyDataset that begins an epoch"),
        pytest.param(lambda: Begun(list(range(12))), id="PyDataset of a list"),
        pytest.param(lambda: from_arrays(np.arange(12), 4), id="arrays"),
        pytest.param(lambda: [np.arange(4), np.arange(4, 8)], id="list"),
        pytest.param(lambda: lambda: iter([np.arange(4), np.arange(4, 8)]), id="function"),
    ],
)
def test_reading_a_copy_does_not_change_later_epochs(make):
    def started():
        tf.random.set_seed(0)
        torch.manual_seed(0)
        np.random.seed(0)
        return make()

    dataset = started()
    expected = [[*epoch(dataset, i), np.random.random()] for i in range(3)]
    dataset = started()
    seen = []
    for i in range(3):
        with random_state_kept():
            copied = isolated_copy(dataset)
            whole = elements(copied.batches(0))  # to the end
            next(iter(copied.batches(1)))  # and not to the end
        assert len(whole) == len(expected[i]) - 1
        seen.append([*epoch(dataset, i), np.random.random()])
    assert seen == expected


def test_a_copy_has_the_examples_of_its_dataset():
    dataset = NUMBERS.shuffle(12, seed=1).batch(4)
    assert sorted(elements(isolated_copy(dataset).batches(0))) == list(range(12))
    data = loader(shuffle=True)
    assert isolated_copy(data).dataset.dataset is data.dataset  # shared, not copied


def test_a_copy_of_an_endless_pydataset_yields_as_many_batches_as_asked():
    batches = isolated_copy(Endless(np.arange(24))).batches(0)
    assert len(elements(itertools.islice(batches, 4))) == 16


# JAX, where another test has imported it, warns of every fork, and a loader's workers are forks.
@pytest.mark.filterwarnings("ignore:os.fork", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_persistent_workers_stay_with_their_loader():
    data = loader(shuffle=True, num_workers=1, persistent_workers=True)
    epoch(data, 0)
    workers = data._iterator
    assert sorted(epoch(isolated_copy(data).dataset, 0)) == list(range(12))
    assert data._iterator is workers


def test_a_copy_of_a_bare_iterator_raises():
    batches = iter([np.arange(4)])
    with pytest.raises(ValueError, match=r"What is read from a list_iterator is gone.*function"):
        isolated_copy(batches)
    assert next(batches) is not None


def test_a_dataset_too_large_to_copy_is_read_itself_with_a_warning(monkeypatch):
    # A graph of more than 2 GB comes out of TensorFlow as no bytes at all, and without an error.
    monkeypatch.setattr(tf.raw_ops, "DatasetToGraphV2", lambda **arguments: tf.constant(b""))
    dataset = NUMBERS.batch(4)
    with pytest.warns(UserWarning, match=r"more than the 2 GB.*from_arrays"):
        assert isolated_copy(dataset).dataset is dataset
