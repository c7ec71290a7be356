"""Signals that wait for the end of a step."""

import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """Holds signals back until the loop asks: none falls between a step and its bookkeeping.

    One that nobody asked for is raised at the end of the block. A second signal is not held back:
    it goes to whoever handled signals before. Where handlers can't be set (outside the main thread)
    nothing is held back at all, and a signal that the process ignores stays ignored.

    Attributes:
        pending: the number of the signal that came, or None.
        second: whether another one came after it: the end is wanted at once.
    """

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers or (signal.SIGINT,)
        self.pending: int | None = None
        self.second = False
        self._before: dict[int, Any] = {}

    def listen(self, number: int) -> None:
        """Holds back this signal too, until the end of the block."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        # Shells set that for Ctrl-C in what a script starts in the background.
        ignored = signal.getsignal(number) is signal.SIG_IGN
        if in_main_thread and not ignored and number not in self._before:
            self._before[number] = signal.signal(number, self._hold)

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C came, and SystemExit for another signal."""
        if self.pending == signal.SIGINT:
            raise KeyboardInterrupt
        if self.pending is not None:
            raise SystemExit(128 + self.pending)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.pending is None:
            self.pending = number
            return
        self.second = True
        self._give_back()
        signal.raise_signal(number)

    def _give_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def __enter__(self) -> "Signals":
        for number in self.numbers:
            self.listen(number)
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._give_back()
        if kind is None:  # else the block has ended early, by this signal or by an error
            self.check()
