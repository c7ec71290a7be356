"""Pools the vectors of a text's tokens to one vector, in the modes of sentence-transformers."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from keras import ops

from polus.types import Tensor

Pooling = Literal["mean", "first", "last", "max", "mean_sqrt_length", "weighted_mean"]


def pool(vectors: Tensor, mask: Tensor, modes: Pooling | Sequence[Pooling]) -> Any:
    """Returns one vector per text, float32 `(B, E)`; of several modes, one after the other.

    Args:
        vectors: `(B, L, E)`.
        mask: `(B, L)`, 0 for padding, which comes last.
        modes: "mean"; "first" or "last" for one token's vector; "max" of each dimension;
            "mean_sqrt_length", the sum divided by the square root of the number of tokens;
            "weighted_mean", whose weights are 1, 2, 3 and so on (Muennighoff 2022,
            arXiv:2202.08904).
    """
    # In float32: in half precision the mean of a long text loses digits.
    vectors, weights = ops.cast(vectors, "float32"), ops.cast(mask, "float32")
    modes = [modes] if isinstance(modes, str) else modes
    return ops.concatenate([_pool(vectors, weights, mode) for mode in modes], axis=-1)


def _pool(vectors: Any, weights: Any, mode: Pooling) -> Any:
    if mode == "first":
        return vectors[:, 0]
    if mode == "max":
        return ops.max(ops.where(weights[..., None] > 0, vectors, -float("inf")), axis=1)
    if mode in ("last", "weighted_mean"):
        weights = weights * (positions(weights) + 1)
    if mode == "last":
        last = ops.max(weights, axis=1, keepdims=True)
        weights = ops.cast(weights == ops.maximum(last, 1.0), "float32")
    total = ops.sum(vectors * weights[..., None], axis=1)
    divisor = ops.maximum(ops.sum(weights, axis=1, keepdims=True), 1.0)
    return total / (ops.sqrt(divisor) if mode == "mean_sqrt_length" else divisor)


def positions(tokens: Tensor) -> Any:
    """Returns 0, 1, 2 and so on for the L columns of `(B, L)`, in its dtype.

    A function of the tensor, not of its shape: exporters that trace a call would take the length
    for a constant.
    """
    return ops.cumsum(ops.ones_like(tokens[0])) - 1


def table_rows(ids: Tensor, offset: int) -> Any:
    """Returns the rows of token ids `(B, L)` in a table of positions that begins at `offset`.

    With an offset, as in RoBERTa and MPNet, the token `offset - 1` is padding. Its row is that one,
    and it isn't counted, even where a text spells it out: "<pad>".
    """
    if not offset:
        return positions(ids)
    real = ops.cast(ops.not_equal(ids, offset - 1), ids.dtype)
    return ops.cumsum(real, axis=1) * real + (offset - 1)


def check_pooling(modes: object) -> None:
    """Raises a ValueError unless `modes` is None, a mode or a sequence of modes."""
    given = [modes] if isinstance(modes, str) else modes
    known = get_args(Pooling)
    if modes is not None and not (
        isinstance(given, list | tuple) and given and set(known).issuperset(given)
    ):
        raise ValueError(
            f"pooling must be None, one of {', '.join(map(repr, known))}, or a list of these, got "
            f"{modes!r}."
        )
