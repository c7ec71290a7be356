"""What a dataset may be, how its batches are fed, and where in the data a run stands."""

from polus.data.adapters import DataAdapter, as_adapter, as_arguments
from polus.data.arrays import ArrayDataset, from_arrays
from polus.data.reader import DataReader, StepBlock
from polus.data.tf_iterator import with_iterator_state

__all__ = [
    "ArrayDataset",
    "DataAdapter",
    "DataReader",
    "StepBlock",
    "as_adapter",
    "as_arguments",
    "from_arrays",
    "with_iterator_state",
]
