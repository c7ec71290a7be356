"""The first batches of a dataset, for a model that is to overfit them."""

import itertools

from polus.data.adapters import as_adapter
from polus.data.base_adapter import DataAdapter
from polus.data.isolated import isolated_copy
from polus.data.live_data import NoDataAdapter
from polus.state import random_state_kept


def first_batches(dataset: object, count: int) -> DataAdapter:
    """Returns a dataset of the first batches of another one, which are the same in each epoch.

    They are read once, now, and kept in memory.

    Args:
        dataset: Anything that `as_adapter` takes. An iterator is read on; of anything else a copy
            is read, which leaves its later epochs as they are.
        count: The number of batches at most.

    Raises:
        ValueError: If its batches are made by the training itself, or there are none.
    """
    adapter = as_adapter(dataset)
    if adapter.live or isinstance(adapter, NoDataAdapter):
        raise ValueError("overfit_batches takes batches of a dataset, and this run has none.")
    if not hasattr(adapter.dataset, "__next__"):
        adapter = isolated_copy(adapter)
    with random_state_kept():
        batches = list(itertools.islice(adapter.batches(0), count))
    if not batches:
        raise ValueError("overfit_batches found no batch in the dataset.")
    return as_adapter(batches)
