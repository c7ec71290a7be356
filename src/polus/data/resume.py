"""Where in the data a run stands, and the way back there in a new process.

Three ways, the first that is possible:

- the order is a function of the epoch (`from_arrays`): nothing is read;
- the iterator has a state (`get_state`/`set_state` as in grain, `state_dict`/`load_state_dict` as
  in torchdata's `StatefulDataLoader`): it is put back, and what was read after it is read again;
- anything else: the epoch begins again with the generators as they were when it began, and the
  batches that the run has seen are read again, and dropped.

The first batch of the epoch tells whether the data is the same as before; between two epochs it is
that of the earlier one, which is begun once more for that.
"""

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from polus.data.fingerprint import same
from polus.state import random_state, set_random_state

if TYPE_CHECKING:
    from polus.data.adapters import DataAdapter
    from polus.data.reader import DataReader, EpochReader

logger = logging.getLogger("polus.data")


def get_state(reader: "DataReader", epoch: int, step: int) -> dict[str, Any]:
    """What `resume` needs to come back to before `step` of `epoch`, for a checkpoint to hold."""
    current = reader.current
    state: dict[str, Any] = {"dataset": _facts(reader)}
    if current is not None:
        state |= {"leaves": current.leaves, "checksum": None, "mark": None}
    if current is not None and current.number == epoch:  # else the epoch has not begun
        marks = [mark for mark in list(current.marks) if mark[0] <= step]
        if reader.num_batches in (None, step) and len(marks) > 1:
            # A loader whose state is that behind the last batch may begin the next epoch.
            marks = [mark for mark in marks if mark[0] < step]
        state |= {
            "begun": current.begun,
            "checksum": current.checksum,
            "mark": [marks[-1][0], _encoded(marks[-1][1])] if marks else None,
        }
    else:
        state["begun"] = beginning(reader)
        if current is not None and not (reader.adapter.reads_once and reader.steps is None):
            state["before"] = {"begun": current.begun, "checksum": current.checksum}
        whole = reader.steps is None or reader.steps == reader.adapter.num_batches
        if reader.adapter.has_state and whole:
            state["ended"] = _encoded(reader.adapter.iterator_state())
    return state


def beginning(reader: "DataReader") -> dict[str, Any]:
    """The generators that the order of an epoch depends on, before it begins."""
    return {"random": random_state(), "source": reader.adapter.get_state()}


def resume(
    reader: "DataReader",
    epoch: int,
    step: int,
    state: dict[str, Any],
    random: dict[str, Any],
    poll: Callable[[], None] = lambda: None,
) -> tuple["EpochReader", dict[str, Any]]:
    """Makes `reader` go on before `step` of `epoch`.

    Args:
        reader: the data, not read yet.
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
    now = _facts(reader)
    differing = [
        f"{name}: it was {value!r}, and is {now[name]!r}"
        for name, value in state["dataset"].items()
        if name in now and now[name] != value
    ]
    if differing:
        raise ValueError("The dataset is another one. " + "; ".join(differing) + ".")
    source = reader.adapter
    mark, ended = state.get("mark") if step else None, state.get("ended")
    # What has its state put back needs no look at how it came there.
    before = state.get("before") if ended is None else None
    source.rewind(epoch if before is None else epoch - 1, reader.steps)
    if before is not None:
        _put_back(source, before["begun"])
        earlier = reader.resumed(epoch - 1, 0, before["begun"])
        earlier.remember(earlier.peek())
        _say_if_other(earlier, before["checksum"])
        while source.read_through and earlier.drop() is not None:
            pass
        source.end_epoch()
    if source.unrepeatable:
        logger.warning("The order of the data may not repeat: %s", source.unrepeatable)
    _put_back(source, state["begun"])
    if ended is not None:
        source.resume_from(_decoded(ended))
        if next(source.batches(epoch), None) is not None:  # it begins the next epoch by itself
            source.resume_from(_decoded(ended))
        set_random_state(state["begun"]["random"])
    drawn = {}
    if mark is not None or (source.seekable and reader.transform is None):
        head = next(iter(source.batches(epoch)), None)
        if mark is not None:
            source.resume_from(_decoded(mark[1]))
        data = reader.resumed(epoch, step if mark is None else mark[0], state["begun"])
        data.remember(head)
        _skip(data, step, poll)
    else:
        data = reader.resumed(epoch, 0, state["begun"])
        if (head := data.peek()) is not None:
            data.remember(head)
        first = random_state()
        _skip(data, step, poll)
        data.peek()
        # A generator from which each batch is drawn is where the data has it now.
        drawn = {k: v for k, v in random_state().items() if not same(v, first[k])}
    if data.leaves is not None and state.get("leaves") not in (None, data.leaves):
        raise ValueError(
            f"The dataset is another one. The arrays of a batch (dtype, number of axes) were "
            f"{state['leaves']}, and are {data.leaves}."
        )
    if mark is not None and source.has_state:
        # How this epoch began, a new process may not know; what it goes on with was put back.
        data.checksum = state["checksum"]
    _say_if_other(data, state.get("checksum"))
    # At the start of an epoch reading the first batch moved the generators, as it would have.
    return data, random | drawn if step else random_state()


def _put_back(source: "DataAdapter", begun: dict[str, Any]) -> None:
    """The generators as they were before an epoch began."""
    source.set_state(begun["source"])
    set_random_state(begun["random"])


def _say_if_other(data: "EpochReader", checksum: int | None) -> None:
    if checksum not in (None, data.checksum):
        logger.warning(
            "The order of the data does not repeat: the first batch of epoch %d is not the one "
            "that it was before the interruption. The run goes on, but not as it would have: some "
            "examples may come more often than others. Give every shuffle a seed, let the order "
            "of an epoch depend on nothing that earlier epochs left behind (a dataset with a "
            "set_epoch(epoch) is told the number), or use polus.data.from_arrays(...).",
            data.number + 1,
        )


def _facts(reader: "DataReader") -> dict[str, Any]:
    """What tells the dataset from others."""
    kind = type(reader.adapter.dataset)
    # What tf.data's datasets are called depends on their last operation.
    name = "tf.data.Dataset" if kind.__module__.startswith("tensorflow.") else kind.__qualname__
    return {"kind": name, "num_batches": reader.num_batches, **reader.adapter.facts()}


def _skip(data: "EpochReader", step: int, poll: Callable[[], None]) -> None:
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
