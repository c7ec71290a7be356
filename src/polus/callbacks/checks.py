"""Checks of the arguments of callbacks."""

import numpy as np

SET_PRIMARY = (
    'To say which term is the loss, give the trainer its name: primary="g_loss", as an argument or '
    "an attribute of the class."
)


def check_count(name: str, value: object, hint: str = "") -> None:
    """Raises unless `value` is a positive integer.

    Args:
        name: The name of the argument.
        value: Its value.
        hint: A sentence that says what to write instead.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a positive integer, got {value!r}.{_sentence(hint)}")
    if value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.{_sentence(hint)}")


def check_name(name: str, value: object, hint: str = "") -> None:
    """Raises unless `value` is a string that is not empty."""
    if hasattr(value, "shape"):
        raise TypeError(
            f"{name} must be a string, got an array of shape {tuple(value.shape)}. Data is one "
            "argument: polus.from_arrays((x, y), batch_size=32)."
        )
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}.{_sentence(hint)}")
    if not value:
        raise ValueError(f"{name} must not be empty.{_sentence(hint)}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raises unless `value` is a number with low <= value < high, which NaN never is."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not low <= value < high:
        limit = "finite" if high == float("inf") else f"less than {high:g}"
        raise ValueError(f"{name} must be at least {low:g} and {limit}, got {value!r}.")


def check_callable(name: str, value: object, hint: str = "") -> None:
    """Raises unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}.{_sentence(hint)}")


def _sentence(hint: str) -> str:
    return f" {hint}" if hint else ""
