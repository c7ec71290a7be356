"""Many batches of a `tf.data` pipeline, read and stacked in one call of TensorFlow's graph."""

import time
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

T = TypeVar("T")

FEW = 8  # batches, which Python reads sooner than TensorFlow traces the graph for it

# The dtypes whose memory NumPy can share: not text, and not bfloat16.
_SHARED = {np.dtype(kind).type for kind in "?bBhHiIlLqQefd"}


def padded(rows: Any, capacity: int) -> Any:
    """Fills the first axis of a tensor up to `capacity` with zeros."""
    missing = capacity - rows.shape[0]
    return tf.pad(rows, [[0, missing]] + [[0, 0]] * (rows.shape.rank - 1)) if missing else rows


class GraphBlocks:
    """Takes batches out of a dataset's iterator in graph: no Python between two of them."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator
        self.specs = tf.nest.flatten(iterator.element_spec)

    def read(self, first: T, want: int, secs: float) -> tuple[int, T, T | None]:
        if want <= FEW:
            return self._read_few(first, want, secs)
        count, stacked, other, left = _read(
            self.iterator,
            tf.nest.flatten(first),
            tf.constant(want),
            tf.constant(secs, tf.float64),
        )
        pack = tf.nest.pack_sequence_as
        return int(count), pack(first, stacked), pack(first, left) if bool(other) else None

    def _read_few(self, first: T, want: int, secs: float) -> tuple[int, T, T | None]:
        rows, left, ends = [tf.nest.flatten(first)], None, time.perf_counter() + secs
        while len(rows) < want and left is None:
            batch = next(self.iterator, None)
            if batch is None:
                break
            tensors = tf.nest.flatten(batch)
            if [t.shape for t in tensors] == [t.shape for t in rows[0]]:
                rows.append(tensors)
            else:
                left = tf.nest.pack_sequence_as(first, tensors)
            if time.perf_counter() >= ends:
                break
        stacked = [tf.stack(each) for each in zip(*rows, strict=True)]
        return len(rows), tf.nest.pack_sequence_as(first, stacked), left

    def pad(self, batches: T, capacity: int) -> T:
        filled: T = tf.nest.map_structure(lambda rows: padded(rows, capacity), batches)
        return filled

    def on_host(self, batches: T) -> T | None:
        tensors = tf.nest.flatten(batches)
        if not all("CPU" in t.device and t.dtype.as_numpy_dtype in _SHARED for t in tensors):
            return None
        arrays: T = tf.nest.map_structure(lambda t: np.asarray(memoryview(t)), batches)
        return arrays


@tf.function(autograph=False, reduce_retracing=True)
def _read(iterator: Any, first: list[Any], want: Any, secs: Any) -> Any:
    began = tf.timestamp()  # in here: the first call takes longer, to trace this
    specs = tf.nest.flatten(iterator.element_spec)
    rows = [
        tf.TensorArray(spec.dtype, want, infer_shape=False, element_shape=spec.shape)
        for spec in specs
    ]
    rows = _written(rows, 0, first)

    def body(i: object, more: object, other: object, rows: list[Any], left: list[Any]) -> Any:
        item = iterator.get_next_as_optional()

        def take() -> Any:
            values = tf.nest.flatten(item.get_value())
            same = _same_shapes(values, first)
            written = tf.cond(same, lambda: _written(rows, i, values), lambda: rows)
            with tf.control_dependencies(values):
                early = tf.timestamp() - began < secs
            return tf.cast(same, tf.int32), same & early, ~same, written, values

        def end() -> Any:
            no = tf.constant(False)
            return tf.constant(0), no, no, rows, left

        added, more, other, rows, left = tf.cond(item.has_value(), take, end)
        return i + added, more, other, rows, left

    count, _, other, rows, left = tf.while_loop(
        lambda i, more, *_: more & (i < want),
        body,
        (tf.constant(1), tf.constant(True), tf.constant(False), rows, first),
        shape_invariants=(
            *[tf.TensorShape(())] * 3,
            [tf.TensorShape(None)] * len(rows),
            [spec.shape for spec in specs],
        ),
        parallel_iterations=1,
    )
    return count, [row.gather(tf.range(count)) for row in rows], other, left


def _written(rows: list[Any], i: Any, values: list[Any]) -> list[Any]:
    """Writes each value into row `i` of its `tf.TensorArray`."""
    return [row.write(i, value) for row, value in zip(rows, values, strict=True)]


def _same_shapes(values: list[Any], references: list[Any]) -> Any:
    same = tf.constant(True)
    for value, reference in zip(values, references, strict=True):
        same &= tf.reduce_all(tf.shape(value) == tf.shape(reference))
    return same


def graph_blocks(iterator: object) -> GraphBlocks | None:
    """Returns a reader for the iterator of a dataset of plain tensors, else None."""
    if not isinstance(iterator, tf.data.Iterator):
        return None
    plain = all(isinstance(spec, tf.TensorSpec) for spec in tf.nest.flatten(iterator.element_spec))
    return GraphBlocks(iterator) if plain else None
