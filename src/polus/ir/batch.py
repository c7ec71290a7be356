"""The parts of a training batch, and the mask of documents that must not count as negatives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from polus.ir.scores import without_diagonal
from polus.types import Tensor

EXTRAS = ("relevant_mask", "positive_ids", "relevant_ids", "negative_ids", "teacher_scores")
"""The keys of the dict that may come last in a batch."""


def split_batch(
    inputs: Sequence[Any], require_negatives: bool = False, parts: int = 1
) -> tuple[list[Any], dict[str, Any]]:
    """Splits a batch into its texts and its extras, and checks their shapes.

    Args:
        inputs: `(query, positive)` or `(query, positive, negatives)`, then any extras.
        require_negatives: Raise if there are no negatives.
        parts: How many parts of this size the whole batch has; see `polus.core.gather`.

    Returns:
        The list of two or three texts, and the dict of extras, empty if the batch has none.

    Raises:
        ValueError: If the number of parts, a shape or an id is wrong.
    """
    extras = extras_of(inputs)
    texts = list(inputs[:-1] if extras else inputs)
    if len(texts) not in (2, 3):
        raise ValueError(
            "A retrieval batch must be (query, positive) or (query, positive, negatives), with an "
            f"optional last dict of {_listed(EXTRAS)}, got {len(texts)} parts."
        )
    if require_negatives and len(texts) == 2:
        raise ValueError(
            "k_negatives is set, but the batch has no negatives. Use batches (query, positive, "
            "negatives), or leave out k_negatives."
        )
    _check_text_shapes(texts)
    check_ids(extras)
    _check_extra_shapes(extras, texts, parts)
    return texts, extras


def extras_of(inputs: Sequence[Any]) -> dict[str, Any]:
    """Returns the dict of extras that ends a batch, or an empty dict."""
    last = inputs[-1] if inputs else None
    return last if isinstance(last, dict) and set(EXTRAS).issuperset(last) else {}


def first_rows(inputs: Sequence[Any], count: int) -> tuple[Any, ...]:
    """Returns the first `count` examples of a batch."""
    size = len_of(inputs[0])
    first = [keras.tree.map_structure(lambda x: x[:count], each) for each in inputs]
    if "relevant_mask" in extras_of(inputs) and count < size:
        mask = first[-1]["relevant_mask"]
        hard = mask[:, size:]
        if len(inputs) == 4 and hard.shape[1] == size * len_of_axis(inputs[2], 1):  # shared
            hard = hard[:, : count * len_of_axis(inputs[2], 1)]
        columns = [mask[:, :count], hard]
        first[-1] = {**first[-1], "relevant_mask": ops.concatenate(columns, axis=1)}
    return tuple(first)


def len_of(features: object) -> int:
    """Returns the size of the first axis of a tensor or of a structure of tensors."""
    return len_of_axis(features, 0)


def len_of_axis(features: object, axis: int) -> int:
    """Returns the size of an axis of a tensor or of a structure of tensors."""
    return keras.tree.flatten(features)[0].shape[axis]  # type: ignore[no-any-return]


def check_ids(extras: Mapping[str, Any]) -> None:
    """Raises unless all document ids are arrays or tensors of 32-bit integers.

    Call it on NumPy arrays where possible: JAX has truncated larger ids by the time a step runs.
    """
    for name, value in extras.items():
        if not hasattr(value, "dtype"):
            raise ValueError(
                f"{name} must be an array or a tensor, got a {type(value).__name__}. Use "
                f"np.array({name})."
            )
        if name in ("teacher_scores", "relevant_mask"):
            continue
        dtype, found = getattr(value.dtype, "name", str(value.dtype)), None
        if "int" not in dtype:
            found = f"the dtype {dtype}"
        elif isinstance(value, np.ndarray) and value.size:  # a tensor in a step has no values yet
            low, high = int(value.min()), int(value.max())
            if low < -(2**31) or high >= 2**31:
                found = f"values from {low} to {high}"
        if found is not None:
            raise ValueError(
                f"{name} must be 32-bit integers, which is all that JAX compares, got {found}. Use "
                "row numbers ({id: row for row, id in enumerate(document_ids)} maps ids to them), "
                "or polus.ir.data.PairBatches, which makes such batches."
            )


def _check_text_shapes(texts: Sequence[Any]) -> None:
    shapes = [tuple(keras.tree.flatten(text)[0].shape) for text in texts]
    if any(shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            "Queries, positives and negatives must have the same batch size (one positive per "
            f"query), got the shapes {_listed(shapes)}."
        )
    if len(texts) == 3 and len(shapes[2]) != len(shapes[1]) + 1:
        raise ValueError(
            "Negatives must have one axis more than positives, (B, k, ...), got the shape "
            f"{shapes[2]} with positives of shape {shapes[1]}. If the third part is a dict of "
            f"extras, its keys must be among {_listed(EXTRAS)}."
        )


def _check_extra_shapes(extras: Mapping[str, Any], texts: Sequence[Any], parts: int) -> None:
    size = len_of(texts[0])
    k = len_of_axis(texts[2], 1) if len(texts) == 3 else 0
    columns, shared = size * parts + k, (size, size * parts * (1 + k))
    expected = {"positive_ids": f"({size},)", "relevant_mask": f"({size}, {columns})"}
    for name, value in extras.items():
        shape = tuple(value.shape)
        if name in expected:
            fits = str(shape) == expected[name] or (name == "relevant_mask" and shape == shared)
        else:
            fits = len(shape) == 2 and shape[0] == size
        if not fits:
            raise ValueError(
                f"{name} must have the shape {expected.get(name, f'({size}, n)')} in a batch of "
                f"{size} queries with {k} hard negatives each, got {shape}."
            )


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def relevant_mask(
    extras: Mapping[str, Any], columns: int, num_hard_negatives: int
) -> Tensor | None:
    """Returns which negative scores belong to relevant documents, `(B, B - 1 + k)` bool.

    Where hard negatives are shared by all queries it is `(B, B - 1 + B * k)`.

    Args:
        extras: The batch's extras.
        columns: The number of negative scores per query.
        num_hard_negatives: k, the number of hard negatives per query.

    Returns:
        The mask, or None if the batch has neither a mask nor document ids.

    Raises:
        ValueError: If `positive_ids` is missing, or `columns` isn't the mask's number.
    """
    if "relevant_mask" in extras:
        mask = ops.cast(extras["relevant_mask"], "bool")
        in_batch, hard = mask[:, : mask.shape[0]], mask[:, mask.shape[0] :]
    elif "positive_ids" in extras:
        in_batch, hard = _compare_ids(extras, num_hard_negatives, columns)
    elif {"relevant_ids", "negative_ids"} & extras.keys():
        raise ValueError(
            f"The batch has {_listed(sorted(extras))} but no positive_ids, so its documents can't "
            "be identified. Add positive_ids."
        )
    else:
        return None
    size = in_batch.shape[0]
    if columns != size - 1 + hard.shape[1]:
        raise ValueError(
            "compute_scores must return B - 1 + k negative scores per query, here "
            f"{size - 1 + hard.shape[1]}, got {columns}: the scores of the other documents in "
            "batch order, then those of the query's hard negatives. "
            "polus.ir.scores.InBatchScores does so. PairBatches(..., share_negatives=True) goes "
            "with cosine.sharing_negatives()."
        )
    result: Tensor | None = ops.concatenate([without_diagonal(in_batch), hard], axis=1)
    return result


def teacher_scores(
    extras: Mapping[str, Any], columns: int, num_hard_negatives: int
) -> list[Tensor]:
    """Returns the teacher's scores, if the batch has any, in a list.

    Raises:
        ValueError: If the hard negatives are shared: the last columns aren't the query's then.
    """
    if "teacher_scores" not in extras:
        return []
    size = extras["teacher_scores"].shape[0]
    if columns > size - 1 + num_hard_negatives:
        raise ValueError(
            "teacher_scores belong to a query's own hard negatives, but compute_scores returns "
            f"{columns} negative scores for {size} queries with {num_hard_negatives} hard "
            "negatives each. Use scores without sharing_negatives()."
        )
    return [extras["teacher_scores"]]


def _compare_ids(
    extras: Mapping[str, Any], num_hard_negatives: int, columns: int
) -> tuple[Any, Any]:
    """Returns which positives `(B, B)` and hard negatives are relevant, or padding.

    Hard negatives are `(B, k)`, or `(B, B * k)` if there are scores of all of them.
    """
    positive = extras["positive_ids"]
    size = positive.shape[0]
    shared = columns == size * (1 + num_hard_negatives) - 1
    width = num_hard_negatives * (size if shared else 1)
    relevant = positive[:, None]
    if "relevant_ids" in extras:
        others = ops.cast(extras["relevant_ids"], relevant.dtype)
        relevant = ops.concatenate([relevant, others], axis=1)
    in_batch = ops.any(ops.equal(relevant[:, None, :], positive[None, :, None]), axis=-1)
    if "negative_ids" not in extras:
        return in_batch, ops.zeros((size, width), "bool")
    ids = ops.cast(extras["negative_ids"], relevant.dtype)
    if shared:
        ids = ops.broadcast_to(ops.reshape(ids, (1, -1)), (size, width))
    hard = ops.any(ops.equal(relevant[:, None, :], ids[:, :, None]), axis=-1)
    return in_batch, ops.logical_or(hard, ids < 0)


def flatten_negatives(inputs: object) -> tuple[Any, tuple[Any, Any]]:
    """Reshapes negatives (B, k, ...) to (B * k, ...), and returns (B, k) as well."""
    size, k = ops.shape(keras.tree.flatten(inputs)[0])[:2]
    flat = keras.tree.map_structure(lambda x: ops.reshape(x, (size * k, *ops.shape(x)[2:])), inputs)
    return flat, (size, k)


def unflatten_negatives(vectors: object, shape: tuple[Any, Any]) -> Any:
    """Reshapes (B * k, ...) back to (B, k, ...)."""
    return keras.tree.map_structure(lambda x: ops.reshape(x, (*shape, *ops.shape(x)[1:])), vectors)


def on_negatives(fn: Callable[[Any], Any], inputs: object) -> Any:
    """Applies `fn`, a function of (N, ...), to negatives (B, k, ...)."""
    flat, shape = flatten_negatives(inputs)
    return unflatten_negatives(fn(flat), shape)
