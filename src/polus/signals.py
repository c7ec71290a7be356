"""Signals that are held back until the end of a step."""

import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """Holds signals back until the loop asks for them: none interrupts a step's bookkeeping.

    A signal that nobody asked for is raised at the end of the block. A second signal is not held
    back: the handler that was installed before gets it. Outside the main thread, where Python
    cannot set handlers, nothing is held back. A signal that the process ignores stays ignored.

    Attributes:
        arrived: The number of the signal that arrived in this process, or None.
        pending: The number of the signal to act on, or None. It is the one that arrived, unless
            several processes have to agree on it first (`shared`).
        shared: Whether somebody else sets `pending`.
        second: Whether another one arrived after it, which asks for an immediate end.
    """

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers or (signal.SIGINT,)
        self.arrived: int | None = None
        self.pending: int | None = None
        self.shared = False
        self.second = False
        self._handlers: dict[int, Any] = {}  # those that were installed before

    def listen(self, number: int) -> None:
        """Holds back this signal as well, until the end of the block."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        # A shell lets background jobs of a script ignore Ctrl-C.
        ignored = signal.getsignal(number) is signal.SIG_IGN
        if in_main_thread and not ignored and number not in self._handlers:
            self._handlers[number] = signal.signal(number, self._hold)

    def check(self) -> None:
        """Raises KeyboardInterrupt for a pending SIGINT, and SystemExit for another signal."""
        if self.pending == signal.SIGINT:
            raise KeyboardInterrupt
        if self.pending is not None:
            raise SystemExit(128 + self.pending)

    def dismiss(self) -> bool:
        """Forgets the signal that arrived, and returns whether there was one to act on."""
        there, self.arrived, self.pending = self.pending is not None, None, None
        return there

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.arrived is None:
            self.arrived = number
            if not self.shared:
                self.pending = number
            return
        self.second = True
        self._restore_handlers()
        signal.raise_signal(number)

    def _restore_handlers(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def __enter__(self) -> "Signals":
        for number in self.numbers:
            self.listen(number)
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._restore_handlers()
        if kind is None:  # otherwise this signal, or an error, has ended the block already
            self.pending = self.pending or self.arrived
            self.check()
