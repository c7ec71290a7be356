"""Loops over many steps inside a compiled JAX program, and the rows of what they read and write."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import keras
import numpy as np

from polus.backends.scopes import VariableRecorder, current_scope
from polus.types import Tensor

Tree = Any
T = TypeVar("T")
Values = list[Any]
MANY_NUMBERS = 2**20  # from so many on, what XLA copies takes longer than a branch to compile


def row_at(batches: T, i: Tensor | int) -> T:
    """Returns row `i` of each array; of stacked batches, a batch."""
    batch: T = jax.tree_util.tree_map(
        # An index that may be negative is one more kernel to compile.
        lambda rows: jax.lax.dynamic_index_in_dim(
            rows, i, keepdims=False, allow_negative_indices=False
        ),
        batches,
    )
    return batch


def output_buffers(outputs: Tree, capacity: int) -> Tree:
    """Returns room for scalars of `capacity` steps, and for arrays of the last, on the host."""

    def room(output: Any) -> Any:
        return np.zeros(output.shape if output.ndim else capacity, output.dtype)

    return jax.tree_util.tree_map(room, outputs)


def written(stacks: Tree, outputs: Tree, i: Any) -> Tree:
    """Writes the outputs of step i into row i; where there is room for one, the last is kept."""

    def write(rows: Any, new: Any) -> Any:
        if rows.ndim == new.ndim:
            return new
        return jax.lax.dynamic_update_index_in_dim(rows, new, i, 0, allow_negative_indices=False)

    return jax.tree_util.tree_map(write, stacks, outputs)


def run_loop(
    body: Callable[[Any, Values], tuple[Tree, Values]],
    count: Tensor | int,
    values: Values,
    stacks: Tree,
) -> tuple[Tree, Values]:
    """Runs `body(i, values) -> (outputs, new values)` and writes the outputs into row i."""

    def turn(carry: tuple[Any, Values, Tree]) -> tuple[Any, Values, Tree]:
        i, values, stacks = carry
        outputs, values = body(i, values)
        return i + 1, values, written(stacks, outputs, i)

    start = (jnp.int32(0), values, stacks)
    _, values, stacks = jax.lax.while_loop(lambda carry: carry[0] < count, turn, start)
    return stacks, values


def branched(
    finite: Tensor, update: Callable[[], None], variables: Sequence[keras.Variable]
) -> bool:
    """Runs `update` in a branch of the program if `finite`, or returns False and does nothing.

    On a CPU XLA updates large variables in place there. To select each value, it copies the old
    ones: Adam's update of 12 million weights took 52 ms for 11. A GPU would wait for the host.
    """
    outer = current_scope()
    small = sum(math.prod(v.shape) for v in variables) < MANY_NUMBERS
    if (
        outer is None
        or small
        or jax.default_backend() != "cpu"
        or keras.distribution.distribution()
    ):
        return False
    known, assigned = set(map(id, variables)), set[int]()

    def updated(values: Values) -> Values:
        with VariableRecorder(zip(variables, values, strict=True), outer, None, False) as scope:
            update()
            assigned.update(scope.assigned)
            return [
                scope.get_current_value(v) if id(v) in assigned else old
                for v, old in zip(variables, values, strict=True)
            ]

    new = jax.lax.cond(finite, updated, lambda values: values, [v.value for v in variables])
    if not assigned <= known:  # a value from inside the branch would be lost
        return False
    for variable, value in zip(variables, new, strict=True):
        if id(variable) in assigned:
            variable.assign(value)
    return True
