"""Reads data as the loop does, is interrupted, and continues from a checkpoint."""

import contextlib
import random

import keras
import numpy as np
import torch

from polus.checkpoint.store import Store
from polus.data import DataReader, as_adapter
from polus.data.fingerprint import checksum
from polus.state import random_state, set_random_state
from polus.state_tree import flatten_state

EPOCHS = 3
PLACES = [(0, 1), (0, 3), (1, 0), (1, 2), (1, 5), (2, 6)]


def batch_of(block, i):
    if block.unpack is None:
        return block.payload
    return keras.tree.map_structure(lambda rows: rows[i], block.unpack(block.payload))


def read(reader, epoch=0, step=0, until=None, log=None):
    """Reads as the loop does, up to `until`, and returns the epoch and step reached."""
    reader.tracked = True
    while epoch < EPOCHS:
        data = reader.epoch(epoch, step)
        data.peek()
        with contextlib.closing(data.blocks(2)) as blocks:
            for block in blocks:
                for i in range(block.count):
                    log.append((epoch, step, checksum(batch_of(block, i))))
                    step += 1
                if until is not None and (epoch, step) >= until:
                    return epoch, step
        epoch, step = epoch + 1, 0
        if until is not None and (epoch, step) >= until:
            return epoch, step
    return epoch, step


def checkpointed(folder, epoch, step, reader):
    """What was written and read again, as after a restart."""
    state = {"data": reader.get_state(epoch, step), "random": random_state()}
    store = Store(folder)
    store.write(flatten_state(state), {}, keep=1)
    return store.read_newest().tree


def new_process(make, transform=None, steps=None, drawn=0, **arguments):
    """Returns a reader as a new process makes it, after it has drawn some random numbers."""
    keras.utils.set_random_seed(1)  # and TensorFlow's seed, which its shuffles start from
    torch.manual_seed(1)  # Keras does so only on its own backend
    for _ in range(drawn):
        random.random(), np.random.random(), torch.rand(())
    return DataReader(as_adapter(make()), transform, steps, **arguments)


def interrupted_log(folder, place, make, transform=None, steps=None):
    """Returns the batches read up to `place` and, from a checkpoint, in a new process after it."""
    log: list = []
    reader = new_process(make, transform, steps)
    epoch, step = read(reader, until=place, log=log)
    tree = checkpointed(folder, epoch, step, reader)
    again = new_process(make, transform, steps, drawn=2)
    set_random_state(again.set_state(tree["data"], epoch, step, tree["random"]))
    read(again, epoch, step, log=log)
    return log


def assert_resumes_exactly(folder, make, transform=None, steps=None, places=PLACES):
    """Asserts that interrupted runs read the same batches as an uninterrupted one."""
    expected: list = []
    read(new_process(make, transform, steps), log=expected)
    assert len({checksum for *_, checksum in expected}) > len(expected) // 3 - 1
    for place in places:
        assert interrupted_log(folder / str(place), place, make, transform, steps) == expected, (
            place
        )
