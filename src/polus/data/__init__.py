"""What a dataset may be, how its batches are fed, and where in the data a run stands."""

from polus.data.arrays import ArrayDataset, from_arrays
from polus.data.feed import Block, Feed
from polus.data.saved_iterator import with_iterator_state
from polus.data.source import Source, as_arguments, as_source

__all__ = [
    "ArrayDataset",
    "Block",
    "Feed",
    "Source",
    "as_arguments",
    "as_source",
    "from_arrays",
    "with_iterator_state",
]
