"""A thread that makes blocks ahead of the loop."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

from polus.data.blocks import StepBlock

THREAD_NAME = "polus-prefetch"
PREFETCH = 2  # finished blocks that wait for the loop


def prefetch(
    blocks: Generator[StepBlock],
    handle_signals: Callable[[], None],
    stopped: threading.Event,
    depth: int = PREFETCH,
) -> Generator[StepBlock]:
    """Yields `blocks`, which a thread makes up to `depth` ahead.

    The thread ends with this generator. Exceptions of `blocks` are raised where the block is asked
    for.

    Args:
        blocks: The blocks, closed by the thread.
        handle_signals: Called several times a second while a block is waited for; may raise.
        stopped: Set when this generator ends, so that `blocks` stops reading.
        depth: The number of finished blocks that may wait.
    """
    made: queue.Queue[Any] = queue.Queue(maxsize=depth)
    thread = threading.Thread(
        target=_make_blocks, args=(blocks, made, stopped), name=THREAD_NAME, daemon=True
    )
    thread.start()
    try:
        while True:
            handle_signals()
            try:
                item = made.get(timeout=0.1)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=10)  # a dataset that hangs must not hang the end of the run


def _make_blocks(
    blocks: Generator[StepBlock], made: "queue.Queue[Any]", stopped: threading.Event
) -> None:
    """Puts each block into `made`, then None, or the exception that ended `blocks`."""

    def put(item: StepBlock | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
                return

    try:
        with contextlib.closing(blocks):
            for block in blocks:
                put(block)
                if stopped.is_set():
                    return
        put(None)
    except BaseException as exception:
        put(exception)
