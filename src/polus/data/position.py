"""Where in the data a run stands, and the way back there in a new process.

Three ways, the first that is possible:

- the order is a function of the epoch (`from_arrays`): nothing is read;
- the iterator has a state (`get_state`/`set_state` as in grain, `state_dict`/`load_state_dict` as
  in torchdata's `StatefulDataLoader`): it is put back, and what was read after it is read again;
- anything else: the epoch begins again with the generators as they were when it began, and the
  batches that the run has seen are read again, and dropped.

The first batch of the epoch tells whether the data is the same as before.
"""

import logging
import sys
import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from polus.state import random_state, set_random_state

if TYPE_CHECKING:
    from polus.data.feed import Epoch, Feed

logger = logging.getLogger("polus.data")


def get_state(feed: "Feed", epoch: int, step: int) -> dict[str, Any]:
    """What `resume` needs to come back to before `step` of `epoch`, for a checkpoint to hold."""
    current = feed.current
    state: dict[str, Any] = {"kind": _kind(feed), "num_batches": feed.num_batches}
    if current is not None:
        state |= {"leaves": current.leaves, "checksum": None, "mark": None}
    if current is not None and current.number == epoch:  # else the epoch has not begun
        marks = [mark for mark in list(current.marks) if mark[0] <= step]
        state |= {
            "begun": current.begun,
            "checksum": current.checksum,
            "mark": [marks[-1][0], _encoded(marks[-1][1])] if marks else None,
        }
    else:
        state["begun"] = beginning(feed)
    return state


def beginning(feed: "Feed") -> dict[str, Any]:
    """The generators that the order of an epoch depends on, before it begins."""
    return {"random": random_state(), "source": feed.source.get_state()}


def resume(
    feed: "Feed",
    epoch: int,
    step: int,
    state: dict[str, Any],
    random: dict[str, Any],
    poll: Callable[[], None] = lambda: None,
) -> tuple["Epoch", dict[str, Any]]:
    """Makes `feed` go on before `step` of `epoch`.

    Args:
        feed: the data, not read yet.
        epoch: where to go on.
        step: where to go on.
        state: what `get_state` gave there.
        random: `random_state()` there. It may be ahead of the data: batches are read in advance.
        poll: called before each batch that is read and dropped; may raise.

    Returns:
        The epoch, with its next batch read, and the random state to train on with.

    Raises:
        ValueError: if the dataset is of another kind or shape, or ends before that step.
    """
    differing = [
        f"{name}: it was {state[name]!r}, and is {now!r}"
        for name, now in (("kind", _kind(feed)), ("num_batches", feed.num_batches))
        if state[name] != now
    ]
    if differing:
        raise ValueError("The dataset is another one. " + "; ".join(differing) + ".")
    source = feed.source
    source.rewind(epoch, feed.steps)
    source.set_state(state["begun"]["source"])
    set_random_state(state["begun"]["random"])
    mark = state.get("mark") if step else None
    drawn = {}
    if mark is not None or (source.seekable and feed.transform is None):
        head = next(iter(source.batches(epoch)), None)
        if mark is not None:
            source.resume_from(_decoded(mark[1]))
        data = feed.resumed(epoch, step if mark is None else mark[0], state["begun"])
        data.remember(head)
        _skip(data, step, poll)
    else:
        data = feed.resumed(epoch, 0, state["begun"])
        if (head := data.peek()) is not None:
            data.remember(head)
        first = random_state()
        _skip(data, step, poll)
        data.peek()
        # A generator from which each batch is drawn is where the data has it now.
        drawn = {k: v for k, v in random_state().items() if not _same(v, first[k])}
    if data.leaves is not None and state.get("leaves") not in (None, data.leaves):
        raise ValueError(
            f"The dataset is another one. The arrays of a batch (dtype, number of axes) were "
            f"{state['leaves']}, and are {data.leaves}."
        )
    if state.get("checksum") not in (None, data.checksum):
        logger.warning(
            "The order of the data does not repeat: the first batch of epoch %d is not the one "
            "that it was before the interruption. The run goes on, but not as it would have: some "
            "examples come twice in this epoch, others not at all. Give every shuffle a seed, let "
            "the order of an epoch depend on nothing that earlier epochs left behind, or use "
            "polus.data.from_arrays(...).",
            epoch + 1,
        )
    # At the start of an epoch reading the first batch moved the generators, as it would have.
    return data, random | drawn if step else random_state()


def _kind(feed: "Feed") -> str:
    """The kind of dataset. What tf.data's datasets are called depends on their last operation."""
    kind = type(feed.source.dataset)
    return "tf.data.Dataset" if kind.__module__.startswith("tensorflow.") else kind.__qualname__


def _skip(data: "Epoch", step: int, poll: Callable[[], None]) -> None:
    """Reads batches and drops them, up to `step`."""
    count, told = step - data.start, time.monotonic()
    for done in range(count):
        poll()
        if time.monotonic() - told > 5:
            told = time.monotonic()
            logger.info("Reading up to where the run stood: batch %d of %d.", done, count)
        if data.drop() is None:
            raise ValueError(
                f"The dataset is another one: it ended after {data.start} batches of epoch "
                f"{data.number + 1}, in which the run stood after {step}."
            )


def checksum(batch: Any) -> int:
    """A CRC-32 of everything in a batch."""
    value = 0
    for leaf in keras.tree.flatten(batch):
        array = _array(leaf)
        value = zlib.crc32(array.tobytes() if array.dtype != object else repr(leaf).encode(), value)
    return value


def leaves_of(batch: Any) -> list[list[Any]]:
    """The dtype and the number of axes of each array of a batch."""
    arrays = [_array(leaf) for leaf in keras.tree.flatten(batch)]
    return [[array.dtype.name, array.ndim] for array in arrays]


def _array(leaf: Any) -> np.ndarray[Any, Any]:
    return keras.ops.convert_to_numpy(leaf) if keras.ops.is_tensor(leaf) else np.asarray(leaf)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return all(map(_same, a, b))
    return bool(np.array_equal(a, b))


def _encoded(state: Any) -> Any:
    """The state of somebody else's iterator, in what a checkpoint can hold."""
    if isinstance(state, dict):
        return {"dict": [[_encoded(k), _encoded(v)] for k, v in state.items()]}
    if isinstance(state, list | tuple):
        return {type(state).__name__: [_encoded(item) for item in state]}
    if isinstance(state, bytes):
        return {"bytes": np.frombuffer(state, np.uint8)}
    if type(state).__module__ == "torch":
        return {"tensor": state.numpy().copy()}
    return state


def _decoded(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    ((kind, value),) = state.items()
    if kind == "dict":
        return {_decoded(k): _decoded(v) for k, v in value}
    if kind == "bytes":
        return value.tobytes()
    if kind == "tensor":
        return sys.modules["torch"].from_numpy(value.copy())
    items = [_decoded(item) for item in value]
    return items if kind == "list" else tuple(items)
