"""A thread that makes blocks ahead of the loop."""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

from polus.data.blocks import StepBlock

THREAD_NAME = "polus-prefetch"
PREFETCH = 2  # finished blocks that wait for the loop
FIRST_BLOCKS = 4


def prefetch(
    blocks: Generator[StepBlock],
    handle_signals: Callable[[], None],
    stopped: threading.Event,
    depth: int = PREFETCH,
    settled: Callable[[], bool] = lambda: True,
) -> Generator[StepBlock]:
    """Yields `blocks`, which a thread makes up to `depth` ahead.

    The thread ends with this generator. Exceptions of `blocks` are raised where the block is asked
    for. Before the length of blocks is settled, one is made ahead, since they are short.

    Args:
        blocks: The blocks, closed by the thread.
        handle_signals: Called several times a second while a block is waited for; may raise.
        stopped: Set when this generator ends, so that `blocks` stops reading.
        depth: The number of finished blocks that may wait.
        settled: Whether blocks have the length that they keep. Slow data may never let it settle,
            so it is asked for the first blocks only.
    """
    made: queue.Queue[Any] = queue.Queue()
    wanted = threading.Semaphore(1)  # one ahead
    thread = threading.Thread(
        target=_make_blocks, args=(blocks, made, wanted, stopped), name=THREAD_NAME, daemon=True
    )
    thread.start()
    ahead = 1
    try:
        for asked in itertools.count():
            if ahead < depth and (settled() or asked == FIRST_BLOCKS):
                wanted.release(depth - ahead)
                ahead = depth
            wanted.release()
            item = _next(made, handle_signals)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=10)  # a dataset that hangs must not hang the end of the run


def _next(made: "queue.Queue[Any]", handle_signals: Callable[[], None]) -> Any:
    while True:
        handle_signals()
        with contextlib.suppress(queue.Empty):
            return made.get(timeout=0.1)


def _make_blocks(
    blocks: Generator[StepBlock],
    made: "queue.Queue[Any]",
    wanted: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    """Puts each block that is wanted into `made`, at the end None, or the exception."""
    try:
        with contextlib.closing(blocks):
            while not stopped.is_set():
                if not wanted.acquire(timeout=0.1):
                    continue
                block = next(blocks, None)
                made.put(block)
                if block is None:
                    return
    except BaseException as exception:
        made.put(exception)
