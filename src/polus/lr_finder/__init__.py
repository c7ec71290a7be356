"""The learning-rate range test."""

from polus.lr_finder.sweep import (
    MIN_STEPS,
    SUGGESTIONS,
    LRFinderResult,
    find,
    has_descent,
    highest_allowed,
    main,
    minimum,
    noise,
    remove_batch_noise,
    slide,
    smooth,
    steep,
    valley,
)

__all__ = [
    "MIN_STEPS",
    "SUGGESTIONS",
    "LRFinderResult",
    "find",
    "has_descent",
    "highest_allowed",
    "main",
    "minimum",
    "noise",
    "remove_batch_noise",
    "slide",
    "smooth",
    "steep",
    "valley",
]
