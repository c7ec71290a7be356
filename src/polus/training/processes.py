"""What several processes that train one model have to have in common."""

import zlib
from collections.abc import Iterable, Iterator

from polus.backends.placement import Placement, check_same
from polus.data import DataReader, StepBlock
from polus.data.fingerprint import checksum
from polus.training.config import TrainConfig


def check_same_programs(placement: Placement, config: TrainConfig) -> None:
    """Checks that all processes train with the same arguments.

    Raises:
        RuntimeError: If they differ; one process would wait for the others forever.
    """
    if placement.count == 1:
        return
    names = [type(callback).__name__ for callback in config.callbacks]
    given = (config.epochs, config.steps, config.steps_per_execution, names)
    check_same(
        placement,
        zlib.crc32(repr(given).encode()),
        "The processes of this run call train with different arguments: epochs, steps, "
        "steps_per_execution and the kinds of callbacks have to be the same, and here they are "
        f"{given}. Give a callback that only one process needs to all of them, and let it ask "
        "self.coordinator.run.placement.is_first.",
    )


def check_same_length(reader: DataReader, steps: int | None = None) -> None:
    """Checks that all processes have data for as many steps.

    Args:
        reader: The data.
        steps: The steps of the next call, 0 at the end of an epoch, where the length of the data is
            not known beforehand; nothing is checked where it is. None compares the known length.

    Raises:
        RuntimeError: If they differ; one process would wait for the others.
    """
    known = reader.adapter.num_batches
    if reader.placement.count == 1 or (steps is None) != (known is not None):
        return
    have = known if steps is None else steps
    more = "" if steps is None else " for the next call"
    check_same(
        reader.placement,
        have or 0,
        "The datasets of the processes have different lengths: "
        + (f"this one has {have} batches{more}. " if have else "this one has ended first. ")
        + "Each process takes its own rows of each batch, so give all of them the whole dataset.",
    )


def same_blocks(reader: DataReader, blocks: Iterable[StepBlock]) -> Iterator[StepBlock]:
    """Yields the blocks of an epoch, and checks that all processes have data for as many steps."""
    check_same_length(reader)
    for block in blocks:
        check_same_length(reader, block.count)
        yield block
    check_same_length(reader, 0)


def check_same_batch(placement: Placement, batch: object) -> None:
    """Checks that all processes read the same first batch, of which each takes its part.

    Raises:
        RuntimeError: If they differ: some examples would be used twice and others never.
    """
    if placement.count == 1:
        return
    check_same(
        placement,
        checksum(batch),
        "The processes of this run read different batches. Each takes its own part of the same "
        "batch, so give all of them the whole dataset in the same order: the same seed for its "
        "shuffle (or keras.utils.set_random_seed(0) at the start of the program), and no "
        "DistributedSampler or shard(...).",
    )
