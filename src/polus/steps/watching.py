"""Objects that watch a step while it runs or is traced."""

import threading
from typing import Self

from polus.backends import backend
from polus.backends.scopes import active_dry_run

_local = threading.local()


class Watching:
    """A context in which `active` of its class finds the object, in this thread.

    Made where the step is called, and not inside what it calls.
    """

    def __init__(self) -> None:
        self._trace = backend.trace_id()

    def __enter__(self) -> Self:
        self._outer = getattr(_local, type(self).__name__, None)
        setattr(_local, type(self).__name__, self)
        return self

    def __exit__(self, *exception: object) -> None:
        setattr(_local, type(self).__name__, self._outer)

    @classmethod
    def active(cls) -> Self | None:
        """Returns what watches the step that runs; None in a dry run and in a nested trace."""
        found: Self | None = getattr(_local, cls.__name__, None)
        if found is None or active_dry_run() is not None or found._trace != backend.trace_id():
            return None
        return found
