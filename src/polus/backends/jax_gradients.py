"""Gradients: which of them exist, and those of one loss out of several; JAX gives zeros."""

from typing import Any

import jax
import jax.numpy as jnp


def watched(values: list[Any], connected: list[bool]) -> list[Any]:
    """Returns the values, and sets `connected` where a gradient came back through them.

    JAX gives zeros where there is no path; the other backends give None, and Keras' optimizers skip
    None. Symbolic zeros tell the two apart.
    """

    @jax.custom_vjp
    def identity(values: list[Any]) -> list[Any]:
        return values

    def forward(values: list[Any]) -> tuple[list[Any], None]:
        return [v.value for v in values], None

    def backward(_: None, cotangents: list[Any]) -> tuple[list[Any]]:
        def used(i: int, cotangent: object) -> Any:
            if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
                return jnp.zeros(cotangent.shape, cotangent.dtype)
            connected[i] = True
            return cotangent

        return ([used(i, c) for i, c in enumerate(cotangents)],)

    identity.defvjp(forward, backward, symbolic_zeros=True)
    return identity(values)


def one_by_one(losses: list[Any], current: list[int]) -> list[Any]:
    """Returns the losses, of which a backward pass follows the one that `current` names.

    Zeros passed to the backward pass would be followed, and reach `watched` as connections.
    """

    @jax.custom_vjp
    def identity(losses: list[Any]) -> list[Any]:
        return losses

    def forward(losses: list[Any]) -> tuple[list[Any], None]:
        return losses, None

    def backward(_: None, cotangents: list[Any]) -> tuple[list[Any]]:
        return ([c if i == current[0] else None for i, c in enumerate(cotangents)],)

    identity.defvjp(forward, backward)
    return identity(losses)
