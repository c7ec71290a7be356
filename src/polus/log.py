"""Logging: one logger per class, shared handlers."""

import contextlib
import logging
import sys
from collections.abc import Iterator


class _Default(str):
    """The documented name of the log file, told apart from the same name given by the user."""


LOG_NAME = _Default("polus.log")


def logger_of(owner: object) -> logging.Logger:
    """Returns the standard logger of an object's class."""
    return logging.getLogger(f"polus.{type(owner).__name__}")


class _OwnLogger:
    """`self.logger`, unless a subclass uses this name for something else."""

    def __get__(self, owner: object, cls: type | None = None) -> logging.Logger:
        return logger_of(owner)


class BaseLogger:
    """Gives its descendants `self.logger`, a standard logger named after their class.

    All of these are children of the logger `"polus"` and share its handlers: the console, from INFO
    on and silent if the program configures logging itself, and a log file on request.

    Args:
        logging_level: The level from which on messages reach the handlers, as in `logging`.
        log_name: The file that `log_to_file` appends to. A name given here starts it at once.
    """

    logger = _OwnLogger()

    def __init__(self, logging_level: int = 10, log_name: str = LOG_NAME) -> None:
        self.log_name = log_name
        shared = logging.getLogger("polus")
        if not shared.handlers:
            shared.addHandler(_Console(logging.INFO))
            shared.setLevel(logging_level)
        if log_name is not LOG_NAME:
            self.log_to_file()

    def set_logging_level(self, level: int) -> None:
        """Sets the level of all of Polus' messages and handlers."""
        shared = logging.getLogger("polus")
        shared.setLevel(level)
        for handler in shared.handlers:
            handler.setLevel(level)

    def log_to_file(self) -> None:
        """Appends all of Polus' messages to the file `log_name` from now on."""
        shared = logging.getLogger("polus")
        handler = logging.FileHandler(self.log_name, delay=True)
        files = [h.baseFilename for h in shared.handlers if isinstance(h, logging.FileHandler)]
        if handler.baseFilename not in files:
            handler.setFormatter(
                logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
            )
            shared.addHandler(handler)


@contextlib.contextmanager
def info_from_first(first: bool) -> Iterator[None]:
    """Drops messages below WARNING in the block, except in the first of several processes."""
    shared = logging.getLogger("polus")
    level = shared.level
    shared.setLevel(level if first else max(level, logging.WARNING))
    try:
        yield
    finally:
        shared.setLevel(level)


class _Console(logging.Handler):
    """Writes to the current `sys.stderr`, which a progress bar may have replaced.

    A notebook shows that in red, so it gets only warnings there.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:  # else the program's own handlers show it
            notebook = type(sys.stdout).__module__.startswith("ipykernel")
            calm = notebook and record.levelno < logging.WARNING
            print(self.format(record), file=sys.stdout if calm else sys.stderr)
