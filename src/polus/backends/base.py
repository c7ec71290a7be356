"""What the three backends have in common."""

from typing import Any


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """Returns the step's arguments: a tuple or list is unpacked, anything else is one argument."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)
