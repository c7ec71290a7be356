"""Copies of datasets that can be read without changing the order of later epochs."""

import copy
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from polus.data.adapters import as_adapter
from polus.data.base_adapter import DataAdapter


def isolated_copy(dataset: object) -> DataAdapter:
    """Returns a copy of a dataset, whose reading does not change later epochs of the original.

    What a dataset remembers from epoch to epoch (the seed generator of a shuffle, a cache, a
    sampler's generator) belongs to the copy; the examples are shared. The global random generators,
    which a PyTorch `DataLoader` draws from, are left to the caller to restore.

    State that Polus can't see inside the user's iterable or function (a file position, a generator)
    is shared and moves. So does what a `PyDataset` changes in `on_epoch_begin` inside an object
    that it holds, except for generators, lists and arrays of one axis.

    Args:
        dataset: Anything that `as_adapter` takes, except for a bare iterator.

    Raises:
        ValueError: If it is a bare iterator, whose batches can't be put back.
    """
    adapter = as_adapter(dataset)
    dataset = adapter.dataset
    if hasattr(dataset, "__next__"):
        raise ValueError(
            f"What is read from a {type(dataset).__name__} is gone, and training would miss it. "
            "Pass the function that makes it (without calling it: batches, not batches()), a list "
            "of batches, or polus.data.from_arrays(...)."
        )
    if hasattr(dataset, "as_numpy_iterator") and hasattr(dataset, "element_spec"):
        return as_adapter(_copy_tensorflow_data(dataset))
    if isinstance(dataset, keras.utils.PyDataset):
        return as_adapter(_copy_pydataset(dataset))
    # Who uses a DataLoader has imported PyTorch.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dataset, torch.utils.data.DataLoader):
        return as_adapter(_copy_loader(dataset))
    return adapter


def _copy_tensorflow_data(dataset: Any) -> Any:
    """Returns the same pipeline with its own seed generators and caches.

    A shuffle keeps its seeds, and a cache its elements, in a resource that all iterators of the
    dataset share. In the graph of the pipeline this resource is a constant. With a dummy in its
    place, as in TensorFlow's own rewriters, the operation makes a new resource. The examples of
    `from_tensor_slices` are copied and live as long as the copy.
    """
    import tensorflow as tf

    serialized = tf.raw_ops.DatasetToGraphV2(
        input_dataset=tf.data.experimental.to_variant(dataset),
        external_state_policy=1,  # share lookup tables and tf.random.Generator without a warning
    )
    if not (content := serialized.numpy()):
        warnings.warn(
            "The tf.data.Dataset holds more than the 2 GB in memory that a copy of its graph may "
            "have, so the dataset itself is read. If it is shuffled, the order of its later epochs "
            "changes. Read the examples from files, or use polus.data.from_arrays(...).",
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


def _copy_pydataset(dataset: Any) -> Callable[[], Iterator[Any]]:
    """Returns a function that yields its batches by number.

    `on_epoch_begin` is called with generators and orders of the copy; `on_epoch_end`, where such a
    dataset usually shuffles, is not called.
    """
    own = copy.copy(dataset)
    memo: dict[int, Any] = {}  # a generator with two names is copied once
    for name, value in vars(dataset).items():
        if isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
            setattr(own, name, copy.deepcopy(value, memo))
        elif type(value) is list or (type(value) is np.ndarray and value.ndim == 1):
            setattr(own, name, copy.copy(value))  # an order; more axes mean examples

    def batches() -> Iterator[Any]:
        own.on_epoch_begin()
        count = own.num_batches
        for i in itertools.count() if count is None else range(count):
            yield own[i]

    return batches


def _copy_loader(loader: Any) -> Any:
    """Returns the same loader with its own sampler, generators and workers."""
    shared = [loader.dataset, loader.collate_fn, loader.worker_init_fn]
    memo: dict[int, Any] = {id(item): item for item in shared}
    if (workers := loader._iterator) is not None:  # persistent workers: processes can't be copied
        memo[id(workers)] = None
    return copy.deepcopy(loader, memo)
