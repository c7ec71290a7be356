"""The seam to the backends: one module per backend, each with the functions of `Backend`.

The rest of Polus imports `backend` from here and knows no other.
"""

import keras

from polus.backends.base import Backend


def load(name: str) -> Backend:
    """Imports the module of the backend called `name`.

    Raises:
        ValueError: If Polus has no such backend.
    """
    if name == "tensorflow":
        from polus.backends import tensorflow

        return tensorflow
    if name == "jax":
        from polus.backends import jax

        return jax
    if name == "torch":
        from polus.backends import torch

        return torch
    raise ValueError(
        f"Polus runs on the Keras backends tensorflow, jax, torch, and KERAS_BACKEND is {name!r}. "
        "Set the environment variable KERAS_BACKEND to one of them before Keras is imported."
    )


backend = load(keras.config.backend())
"""The backend that Keras runs on."""
