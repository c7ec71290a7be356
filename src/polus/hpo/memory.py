"""Memory between two trials: freed, and whether it ran out."""

import sys

import keras

# Where the message, or the name of the class, has one of these, a backend's memory was exhausted.
EXHAUSTED = ("out of memory", "resource_exhausted", "outofmemory", "resourceexhausted")


def free_memory() -> None:
    """Frees what a trainer leaves behind that nothing refers to any more."""
    policy = keras.config.dtype_policy()
    distribution = keras.distribution.distribution()
    keras.utils.clear_session()
    # It resets settings of the user's as well.
    keras.config.set_dtype_policy(policy)
    keras.distribution.set_distribution(distribution)
    if (jax := sys.modules.get("jax")) is not None:
        jax.clear_caches()  # it keeps each compiled program: 11 MB per trial of a small model


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error says that the memory of the host or of a device is exhausted."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(word in text for word in EXHAUSTED)
