"""Loops over the batches of a payload, as graphs."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import keras
import tensorflow as tf

from polus.backends.base import Unpack, as_arguments

Tree = Any
T = TypeVar("T")


class Tracing(threading.local):
    """Whether what is traced in this thread is compiled by XLA."""

    for_xla = False

    @contextlib.contextmanager
    def by_xla(self, for_xla: bool) -> Iterator[None]:
        """Says it of what is traced in the block."""
        self.for_xla = for_xla
        try:
            yield
        finally:
            self.for_xla = False


tracing = Tracing()


def batches_of(unpack: Unpack | None, payload: object) -> tuple[Any, ...]:
    """Returns the step's arguments, with an axis for the batches."""
    return as_arguments(payload if unpack is None else unpack(payload))


def first_batch(unpack: Unpack | None, payload: object) -> tuple[Any, ...]:
    """Returns the shapes and dtypes of the step's arguments."""
    batches = tf.function(batches_of, autograph=False).get_concrete_function(unpack, payload)
    specs: Any = row_specs(batches.structured_outputs)
    return tuple(specs)


def row_specs(rows: object) -> object:
    """Returns the shape and dtype of a batch out of stacked batches."""
    return map_arrays(lambda rows: tf.TensorSpec(rows.shape[1:], rows.dtype), rows)


def only_step(step: Any, unpack: Unpack | None) -> Callable[..., Tree]:
    """Returns a function that runs `step` on the only batch of a payload."""
    return lambda payload: step(*row_at(batches_of(unpack, payload), 0))


def row_at(batches: T, i: object) -> T:
    """Returns a batch out of stacked batches."""
    return map_arrays(lambda rows: rows[i], batches)


def map_arrays(fn: Callable[[Any], Any], batch: T) -> T:
    """Maps the arrays of a batch. Parts that are None stay None."""
    mapped: T = keras.tree.map_structure(fn, batch, none_is_leaf=False)
    return mapped


def loop_of(
    step: Any, outputs: Tree, unpack: Unpack | None, scalars_only: bool = False
) -> Callable[..., Tree]:
    """Returns a function that runs `step`, which returns `outputs`, on each batch of a payload.

    The number of steps is an argument of a `while` loop, so that one compiled program serves every
    count up to the capacity. Outputs are stacked to (capacity, ...); rows past `count` are zero.
    With `scalars_only`, the last one is returned of any other output, such as samples to draw.
    """

    def loop(count: Any, capacity: int, payload: Any) -> Tree:
        batches = batches_of(unpack, payload)
        last = [bool(scalars_only and output.shape.rank) for output in tf.nest.flatten(outputs)]
        stacks = [
            tf.TensorArray(
                o.dtype, 1 if only else capacity, element_shape=o.shape, clear_after_read=False
            )
            for o, only in zip(tf.nest.flatten(outputs), last, strict=True)
        ]

        def body(i: Any, stacks: list[Any]) -> tuple[Any, list[Any]]:
            values = tf.nest.flatten(step(*row_at(batches, i)))
            written = [
                stack.write(0 if only else i, value)
                for stack, value, only in zip(stacks, values, last, strict=True)
            ]
            return i + 1, written

        _, stacks = tf.while_loop(
            lambda i, _: i < count,
            body,
            (tf.constant(0), stacks),
            parallel_iterations=1,  # a step reads what the last one assigned
        )
        stacked = [
            stack.read(0) if only else stack.stack()
            for stack, only in zip(stacks, last, strict=True)
        ]
        return tf.nest.pack_sequence_as(outputs, stacked)

    return loop
