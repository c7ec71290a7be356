"""A dataset read without a trace: its order in later epochs is what it would have been."""

import copy
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from polus.data.adapters import DataAdapter, as_adapter


def isolated_copy(dataset: Any) -> DataAdapter:
    """The batches of `dataset`, read so that a later epoch of `dataset` itself does not notice.

    What a dataset remembers from epoch to epoch (the seed generator of a shuffle, a cache, a
    sampler's generator) is the copy's own; the examples are shared. The global generators, from
    which a PyTorch `DataLoader` draws, are the caller's to keep. What hides in an iterable or a
    function of the user's (a file position, a generator of its own) is known to nobody and moves;
    so does what a `PyDataset` changes in `on_epoch_begin` inside of an object that it holds, but
    for generators, lists and arrays of one axis.

    Args:
        dataset: anything that `as_adapter` takes, but for a bare iterator.

    Raises:
        ValueError: for a bare iterator, whose batches nobody could put back.
    """
    source = as_adapter(dataset)
    dataset = source.dataset
    if hasattr(dataset, "__next__"):
        raise ValueError(
            f"What is read from a {type(dataset).__name__} is gone, and training would miss it. "
            "Give the function that makes it (without calling it: batches, not batches()), a list "
            "of batches, or polus.data.from_arrays(...)."
        )
    if hasattr(dataset, "as_numpy_iterator") and hasattr(dataset, "element_spec"):
        return as_adapter(_of_tensorflow_data(dataset))
    if isinstance(dataset, keras.utils.PyDataset):
        return as_adapter(_of_pydataset(dataset))
    # A user of a DataLoader has imported PyTorch.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dataset, torch.utils.data.DataLoader):
        return as_adapter(_of_loader(dataset))
    return source


def _of_tensorflow_data(dataset: Any) -> Any:
    """The same pipeline, with its own seed generators and caches.

    A shuffle keeps its seeds, and a cache its elements, in a resource that every iterator of the
    dataset shares. In the graph of the pipeline it is a constant; with a dummy in its place the
    operation makes a resource of its own, as TensorFlow's own rewriters do. The examples of
    `from_tensor_slices` are copied for as long as the copy lives.
    """
    import tensorflow as tf

    serialized = tf.raw_ops.DatasetToGraphV2(
        input_dataset=tf.data.experimental.to_variant(dataset),
        external_state_policy=1,  # lookup tables, tf.random.Generator: shared, without a warning
    )
    if not (content := serialized.numpy()):
        warnings.warn(
            "The tf.data.Dataset holds more than the 2 GB in memory that its graph could be copied "
            "with, so it is read itself: a shuffled one gives its later epochs in another order "
            "than without this reading. Read from files, or use polus.data.from_arrays(...).",
            stacklevel=2,
        )
        return dataset
    graph = tf.compat.v1.GraphDef.FromString(content)
    dummies = {"SeedGenerator": "DummySeedGenerator", "MemoryCache": "DummyMemoryCache"}
    for node in graph.node:
        if node.op == "Const" and (handles := node.attr["value"].tensor.resource_handle_val):
            for kind, dummy in dummies.items():
                if kind in handles[0].maybe_type_name:
                    node.op = dummy
                    node.attr.clear()
    variant = tf.raw_ops.DatasetFromGraph(graph_def=graph.SerializeToString())
    return tf.data.experimental.from_variant(variant, dataset.element_spec)


def _of_pydataset(dataset: Any) -> Callable[[], Iterator[Any]]:
    """Its batches by number, with generators and orders of its own for `on_epoch_begin`.

    `on_epoch_end`, where such a dataset usually shuffles, is not called.
    """
    own = copy.copy(dataset)
    memo: dict[int, Any] = {}  # of a generator that has two names
    for name, value in vars(dataset).items():
        if isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
            setattr(own, name, copy.deepcopy(value, memo))
        elif type(value) is list or (type(value) is np.ndarray and value.ndim == 1):
            setattr(own, name, copy.copy(value))  # an order; what has more axes are examples

    def batches() -> Iterator[Any]:
        own.on_epoch_begin()
        count = own.num_batches
        for i in itertools.count() if count is None else range(count):
            yield own[i]

    return batches


def _of_loader(loader: Any) -> Any:
    """The same loader with its own sampler and generators, and with workers of its own."""
    shared = [loader.dataset, loader.collate_fn, loader.worker_init_fn]
    memo: dict[int, Any] = {id(item): item for item in shared}
    if (workers := loader._iterator) is not None:  # persistent workers: processes have no copy
        memo[id(workers)] = None
    return copy.deepcopy(loader, memo)
