"""JAX on several devices: one program that sees whole batches, spread over a mesh of devices.

The mesh is that of `keras.distribution`. A batch is placed with its examples spread over the mesh's
batch axis, and the compiler does the rest: each device computes its own rows, and gradients are
those of the whole batch. A batch that does not divide by the axis is replicated, so each device
computes all of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from polus.backends.placement import (
    BackendStack,
    Placement,
    Stateful,
    report_idle,
    report_sharded,
)
from polus.sharded import ShardedArray, StoredArray, split
from polus.types import Tensor


class GlobalView(Placement):
    """The devices of a `keras.distribution`.

    Args:
        distribution: The active one. It is kept, since it is unknown in other threads.
    """

    def __init__(
        self, distribution: keras.distribution.DataParallel | keras.distribution.ModelParallel
    ) -> None:
        self.name = f"keras.distribution.{type(distribution).__name__}"
        self.index, self.count = jax.process_index(), jax.process_count()
        self.mesh = distribution.device_mesh.backend_mesh
        self.batch_axis = distribution.batch_dim_name
        self.shards_weights = isinstance(distribution, keras.distribution.ModelParallel)
        self.has_whole_weights = self.count == 1 or not self.shards_weights
        self.replicas = dict(self.mesh.shape).get(self.batch_axis, 1)
        if self.count > 1 and not distribution.auto_shard_dataset:
            raise NotImplementedError(
                f"{self.name}(auto_shard_dataset=False) says that each process reads a part of the "
                "data of its own, and Polus takes each process's part of the whole data itself. "
                "Give each process the whole dataset, and leave out auto_shard_dataset."
            )

    # ------------------------------------------------------------------ batches

    def place(self, array: Tensor, size: int) -> Tensor:
        return self._spread(array, 0)

    def stack(
        self, rows: Sequence[Tensor], capacity: int, size: int, stack: BackendStack
    ) -> Tensor:
        return self._spread(join_rows(rows, capacity), 1)

    def place_examples(self, array: Tensor) -> Tensor:
        return self._spread(array, None)

    def place_rows(self, table: Tensor) -> Tensor:
        # The rows that a sharded table gathers are sharded as it is.
        return self._spread(table, 1)

    def _spread(self, array: Any, axis: int | None) -> Tensor:
        """Returns an array on all devices, with `axis` spread over the batch axis if it divides."""
        host = array if self.count == 1 and isinstance(array, jax.Array) else np.asarray(array)
        axes: list[str | None] = [None] * host.ndim
        if axis is not None and host.ndim > axis and host.shape[axis] % self.replicas == 0:
            axes[axis] = self.batch_axis if self.replicas > 1 else None
        sharding = NamedSharding(self.mesh, PartitionSpec(*axes))
        if self.count == 1:
            placed: Tensor = jax.device_put(host, sharding)
            return placed
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    # ------------------------------------------------------------------ agreement

    def agreed(self, values: Sequence[float]) -> list[float]:
        if self.count == 1:
            return list(values)
        return list(map(float, _floats(multihost_utils.broadcast_one_to_all(_words(values)))))

    def largest(self, values: Sequence[float]) -> list[float]:
        if self.count == 1:
            return list(values)
        found = _floats(multihost_utils.process_allgather(_words(values)))
        return list(map(float, found.max(axis=0)))

    def broadcast(self, variables: Iterable[Stateful]) -> None:
        if self.count == 1:
            return
        for variable in variables:
            value = variable.value
            if value.is_fully_replicated:
                variable.assign(multihost_utils.broadcast_one_to_all(np.asarray(value)))

    def report_layouts(self, variables: Sequence[keras.Variable]) -> None:
        if not self.shards_weights:
            return
        sharded = [not v.value.sharding.is_fully_replicated for v in variables]
        report_sharded(variables, sharded, dict(self.mesh.shape))


class OneDevice(Placement):
    """JAX's first device, beside which there may be others."""

    def __init__(self) -> None:
        # XLA takes some 20 ms of processor time to compile each gather for a CPU.
        self.gathers_on_host = jax.default_backend() == "cpu"

    def report_layouts(self, variables: Sequence[keras.Variable]) -> None:
        report_idle(
            jax.local_device_count(),
            "write keras.distribution.set_distribution(keras.distribution.DataParallel()) before "
            "the model is made",
        )


def active() -> Placement:
    """Returns where steps run now.

    Raises:
        NotImplementedError: If there are several processes, and no distribution over them.
    """
    distribution = keras.distribution.distribution()
    if distribution is not None:
        return GlobalView(distribution)
    if (count := jax.process_count()) > 1:
        raise NotImplementedError(
            f"jax.distributed has {count} processes, and no distribution says how they share the "
            "work: each would train a model of its own. Write keras.distribution.set_distribution("
            "keras.distribution.DataParallel()) before the model is made."
        )
    return OneDevice()


def join_rows(rows: Sequence[Tensor], capacity: int) -> np.ndarray[Any, Any]:
    """Returns arrays of equal shape along a new first axis, filled up to `capacity` with zeros."""
    first = np.asarray(rows[0])
    joined = np.zeros((capacity, *first.shape), first.dtype)
    for i, row in enumerate(rows):
        joined[i] = row
    return joined


def output_shardings(assigned: Sequence[Any]) -> dict[str, Any]:
    """Returns the arguments of `jax.jit` that keep the layouts of variables; none on one device.

    Left alone, the compiler chooses a layout for each new value, and each assignment moves it back.

    Args:
        assigned: The values of the variables that the program assigns, its second output. The first
            is small, and replicated so that each process can read it.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return {}
    everywhere = NamedSharding(distribution.device_mesh.backend_mesh, PartitionSpec())
    layouts = [
        value.sharding if len(value.sharding.device_set) > 1 else everywhere for value in assigned
    ]
    return {"out_shardings": (everywhere, layouts)}


def on_host(array: jax.Array) -> np.ndarray[Any, Any]:
    """Returns an array as NumPy array, also one whose parts other processes have.

    All processes must call it for such an array.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def in_parts(array: jax.Array) -> ShardedArray | None:
    """Returns an array in the parts that processes have; None if this process has all of it.

    A part that several devices have belongs to one of them. Which one is known to all processes.
    """
    if array.is_fully_addressable or array.is_fully_replicated or not array.size:
        return None
    boxes: Mapping[Any, Any] = array.sharding.devices_indices_map(array.shape)
    places = {
        device: [each.indices(n)[0] for each, n in zip(boxes[device], array.shape, strict=True)]
        for device in sorted(boxes, key=lambda device: device.id)
    }
    data = {shard.device: shard.data for shard in array.addressable_shards}
    return split(array.shape, array.dtype, places, lambda device: device.process_index, data)


def from_parts(stored: StoredArray, like: jax.Array) -> jax.Array:
    """Returns an array out of files, in the layout and dtype of another one."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray[Any, Any]:
        return np.array(stored.read(index or ()), like.dtype)  # a copy for each device

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _words(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """Returns float64 numbers as words of 32 bits, which JAX leaves as they are."""
    return np.asarray(values, np.float64).view(np.uint32)


def _floats(words: Any) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(np.asarray(words, np.uint32)).view(np.float64)
