"""Datasets: adapters for each kind, the reader of batches, and the way back after a restart."""

from polus.data.adapters import as_adapter
from polus.data.arrays import ArrayDataset, from_arrays
from polus.data.base_adapter import DataAdapter, SeekableAdapter
from polus.data.blocks import StepBlock
from polus.data.epoch import EpochReader
from polus.data.reader import DataReader
from polus.data.tf_iterator import with_iterator_state

__all__ = [
    "ArrayDataset",
    "DataAdapter",
    "DataReader",
    "EpochReader",
    "SeekableAdapter",
    "StepBlock",
    "as_adapter",
    "from_arrays",
    "with_iterator_state",
]
