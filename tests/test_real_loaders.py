"""Runs that read torchdata's, grain's and Hugging Face's own classes resume exactly, or warn."""

import numpy as np
import pytest
from resuming import assert_resumes_exactly

datasets = pytest.importorskip("datasets")
grain = pytest.importorskip("grain")
torch = pytest.importorskip("torch")
torchdata = pytest.importorskip("torchdata")

from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402
from torchdata.stateful_dataloader.sampler import BatchSampler, RandomSampler  # noqa: E402

pytestmark = [
    pytest.mark.once,  # batches are the same for all backends
    # torchdata 0.11 calls what PyTorch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]

EXAMPLES = 22
x = np.arange(EXAMPLES, dtype="float32")


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return EXAMPLES

    def __getitem__(self, i):
        return {"x": x[i]}


class Noisy(Examples):
    def __getitem__(self, i):
        return {"x": x[i] + np.float32(np.random.normal())}


class NoisyFromTorch(Examples):
    def __getitem__(self, i):
        return {"x": x[i] + torch.rand(()).item()}


class Stream(torch.utils.data.IterableDataset):
    """Has a state of its own, as torchdata asks for."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(2)).tolist()
        while self.position < EXAMPLES:
            self.position += 1
            yield {"x": x[order[self.position - 1]]}
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def generator():
    return torch.Generator().manual_seed(5)


def loader(examples=Examples, **arguments):
    return lambda: StatefulDataLoader(
        examples(), 4, **{key: make() for key, make in arguments.items()}
    )


def shuffled():
    return True


def hugging_face(columns=None):
    data = datasets.Dataset.from_dict(columns or {"x": x})
    return data.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=9)


def hugging_face_batches():
    return hugging_face().batch(4).with_format("numpy")


def column(batch):
    return (np.asarray(batch["x"]),)


def noisy_column(batch):
    return (np.asarray(batch["x"]) + np.float32(np.random.normal()),)


def grain_loader(workers=0):
    return grain.DataLoader(
        data_source=x,
        sampler=grain.samplers.IndexSampler(EXAMPLES, shuffle=True, seed=1, num_epochs=1),
        operations=[grain.transforms.Batch(4)],
        worker_count=workers,
    )


def grain_map():
    return grain.MapDataset.source(x).seed(1).shuffle().batch(4)


# name -> (what makes the dataset, transform, steps)
LOADERS = {
    "torchdata, in order": (loader(), column, None),
    "torchdata": (loader(shuffle=shuffled), column, None),
    "torchdata, no transform": (loader(shuffle=shuffled), None, None),
    "torchdata, random transform": (loader(shuffle=shuffled), noisy_column, None),
    "torchdata, generator": (loader(shuffle=shuffled, generator=generator), column, None),
    "torchdata, generator, less than all": (
        loader(shuffle=shuffled, generator=generator),
        column,
        5,
    ),
    "torchdata, generator, its own length said": (
        loader(shuffle=shuffled, generator=generator),
        column,
        6,
    ),
    "torchdata, sampler's generator": (
        loader(sampler=lambda: RandomSampler(x, generator=generator())),
        column,
        None,
    ),
    "torchdata, PyTorch's sampler": (
        loader(sampler=lambda: torch.utils.data.RandomSampler(x, generator=generator())),
        column,
        None,
    ),
    "torchdata, PyTorch's sampler of the global generator": (
        loader(sampler=lambda: torch.utils.data.RandomSampler(x)),
        column,
        None,
    ),
    "torchdata, batch sampler": (
        lambda: StatefulDataLoader(
            Examples(),
            batch_sampler=BatchSampler(RandomSampler(x, generator=generator()), 4, False),
        ),
        column,
        None,
    ),
    "torchdata, examples from NumPy": (loader(Noisy, shuffle=shuffled), column, None),
    "torchdata, examples from PyTorch": (
        loader(NoisyFromTorch, shuffle=shuffled, generator=generator),
        noisy_column,
        None,
    ),
    "torchdata, stream": (loader(Stream), column, None),
    "torchdata, Hugging Face": (loader(hugging_face), column, None),
    "Hugging Face": (hugging_face_batches, column, None),
    "Hugging Face, no transform": (hugging_face_batches, None, None),
    "Hugging Face, random transform": (hugging_face_batches, noisy_column, None),
    "Hugging Face, function": (
        lambda: lambda: datasets.Dataset.from_dict({"x": x}).with_format("numpy").iter(4),
        column,
        None,
    ),
    "PyTorch, Hugging Face": (
        lambda: torch.utils.data.DataLoader(hugging_face(), 4),
        column,
        None,
    ),
    "grain.DataLoader": (grain_loader, None, None),
    "grain.DataLoader, random transform": (
        grain_loader,
        lambda batch: batch + np.float32(np.random.normal()),
        None,
    ),
    "grain.MapDataset": (grain_map, None, None),
    "grain.MapDataset, random transform": (
        grain_map,
        lambda batch: batch + np.float32(np.random.normal()),
        None,
    ),
    "grain.MapDataset, endless": (lambda: grain_map().repeat(), None, 5),
    "grain.IterDataset": (lambda: grain_map().to_iter_dataset(), None, None),
    "grain.IterDataset, shuffled in a window": (
        lambda: (
            grain.MapDataset.source(x)
            .to_iter_dataset()
            .pipe(grain.experimental.WindowShuffleIterDataset, window_size=9, seed=3)
            .batch(4)
        ),
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_resumed_run_reads_the_same_batches_as_an_uninterrupted_one(tmp_path, name, caplog):
    assert_resumes_exactly(tmp_path, *LOADERS[name])
    assert "does not repeat" not in caplog.text


# JAX, where another test has imported it, warns of every fork, and a loader's workers are forks.
@pytest.mark.filterwarnings("ignore:os.fork", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("examples", "place"), [(Examples, (0, 3)), (Noisy, (1, 2))])
def test_a_loader_with_workers_resumes_exactly(tmp_path, examples, place, caplog):
    make = loader(examples, shuffle=shuffled, num_workers=lambda: 1, generator=generator)
    assert_resumes_exactly(tmp_path, make, column, places=[place])
    assert "does not repeat" not in caplog.text
