"""Signals that wait for the end of a step."""

import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """Holds signals back until the loop asks: none falls between a step and its bookkeeping.

    A second signal is not held back: it goes to whoever handled signals before. Where handlers
    can't be set (outside the main thread) nothing is held back at all.

    Attributes:
        pending: the number of the signal that came, or None.
    """

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers or (signal.SIGINT,)
        self.pending: int | None = None
        self._before: dict[int, Any] = {}

    def listen(self, number: int) -> None:
        """Holds back this signal too, until the end of the block."""
        if threading.current_thread() is threading.main_thread() and number not in self._before:
            self._before[number] = signal.signal(number, self._hold)

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C came."""
        if self.pending == signal.SIGINT:
            raise KeyboardInterrupt

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.pending is None:
            self.pending = number
            return
        self.__exit__()
        signal.raise_signal(number)

    def __enter__(self) -> "Signals":
        for number in self.numbers:
            self.listen(number)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
