"""The documented spelling of two methods, beside the correct one."""

from typing import Any

SPELLINGS = {
    "foward_without_grads": "forward_without_grads",
    "foward_with_grads": "forward_with_grads",
}


def unite_spellings(cls: type) -> None:
    """Makes both spellings one method of a class: either can be called and overridden.

    Raises:
        TypeError: If a class defines both.
    """
    for documented, correct in SPELLINGS.items():
        method = _newest(cls, documented, correct)
        setattr(cls, correct, method)
        setattr(cls, documented, method)


def _newest(cls: type, documented: str, correct: str) -> Any:
    """Returns the method that the newest class in the order of inheritance has."""
    for base in cls.__mro__:  # a mixin need not know of the spellings
        given = [vars(base)[name] for name in (correct, documented) if name in vars(base)]
        if len(given) == 2 and given[0] is not given[1]:
            raise TypeError(
                f"{base.__name__} defines both {correct} and {documented}, which are two "
                "spellings of one method. Keep one."
            )
        if given:
            return given[0]
    raise AttributeError(correct)
