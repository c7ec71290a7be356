"""How large batches and variables are, for what may be kept or run at once."""

import logging
from typing import Any

import numpy as np

from polus.backends.placement import Placement
from polus.data.batches import arrays_of, map_arrays, name_of
from polus.steps.variables import StepVariables

logger = logging.getLogger("polus.steps")


def kinds_of(example: Any) -> str:
    """Describes a batch without its sizes: bucketed batches begin each epoch with another one."""
    return str(map_arrays(lambda a: (name_of(a.dtype), len(a.shape)), example))


def warn_of_whole_batches(placement: Placement, size: int) -> None:
    """Warns if several devices can't share a batch."""
    if not placement.divides(size):
        logger.warning(
            "A batch of %d examples does not divide by the %d devices that share it, so each of "
            "them computes all of it: right, but no faster than one. Choose a multiple of %d.",
            size,
            placement.replicas,
            placement.replicas,
        )


def num_bytes(batch: Any) -> int:
    """Returns the bytes that one more step adds to a call."""
    return sum(int(np.prod(leaf.shape)) * 8 for leaf in arrays_of(batch))


def num_state_bytes(variables: StepVariables) -> int:
    """Returns the bytes of the variables that a step assigns, of which each may take 8."""
    return sum(int(np.prod(v.shape)) * 8 for v in variables.assigned)
