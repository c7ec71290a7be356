"""PyTorch with sharded weights: a program in each process, whose tensors are `DTensor`s.

The mesh of devices and the layouts of weights are those of `keras.distribution.ModelParallel`,
which Keras has on PyTorch from 3.16 on. A batch is a `DTensor` with its examples spread over the
mesh's batch axis. An operation on it means the whole batch, and PyTorch moves what it takes. A
batch that does not divide by the axis is replicated.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from polus.backends.placement import (
    BackendStack,
    Program,
    ReplicaState,
    Stateful,
    report_sharded,
)
from polus.backends.torch_agreement import Agreement, lost_processes_explained
from polus.sharded import ShardedArray, StoredArray, split
from polus.types import Tensor


class GlobalView(Agreement):
    """The processes of a `keras.distribution.ModelParallel`.

    Args:
        distribution: The active one. It is kept, since it is unknown in other threads.
    """

    has_whole_weights = False

    def __init__(self, distribution: keras.distribution.ModelParallel) -> None:
        super().__init__()
        self.name = "keras.distribution.ModelParallel"
        self.mesh: Any = distribution.device_mesh.backend_mesh
        self.batch_axis = self.mesh.mesh_dim_names.index(distribution.batch_dim_name)
        self.replicas = self.mesh.size(self.batch_axis)
        self.place_in_batch = self.mesh.get_local_rank(self.batch_axis)

    # ------------------------------------------------------------------ batches

    def place(self, array: Tensor, size: int) -> Tensor:
        return self._spread(array, 0)

    def stack(
        self, rows: Sequence[Tensor], capacity: int, size: int, stack: BackendStack
    ) -> Tensor:
        return self._spread(stack(rows, capacity), 1)

    def place_examples(self, array: Tensor) -> Tensor:
        return self._spread(array, None)

    def place_rows(self, table: Tensor) -> Tensor:
        return self._spread(table, 1)

    def _spread(self, array: Any, axis: int | None) -> Tensor:
        """Returns an array as a DTensor, with `axis` over the batch axis if it divides."""
        tensor = keras.ops.convert_to_tensor(array)
        layout: list[Any] = [Replicate() for _ in range(self.mesh.ndim)]
        if axis is not None and tensor.ndim > axis and tensor.shape[axis] % self.replicas == 0:
            layout[self.batch_axis] = Shard(axis)
            part = tensor.shape[axis] // self.replicas
            tensor = tensor.narrow(axis, self.place_in_batch * part, part)
        return DTensor.from_local(tensor, self.mesh, layout, run_check=False)

    # ------------------------------------------------------------------ steps

    def program(self, program: Program, size: int, state: ReplicaState) -> Program:
        def run(*arguments: Any) -> Any:
            with lost_processes_explained():
                return keras.tree.map_structure(whole, program(*arguments))

        return run

    def broadcast(self, variables: Iterable[Stateful]) -> None:
        super().broadcast(v for v in variables if not isinstance(v.value, DTensor))

    def report_layouts(self, variables: Sequence[keras.Variable]) -> None:
        shape = dict(zip(self.mesh.mesh_dim_names, self.mesh.shape, strict=True))
        report_sharded(variables, [isinstance(v.value, DTensor) for v in variables], shape)


def whole(value: Any) -> Any:
    """Returns a tensor with the values of all processes, which must all call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def in_parts(tensor: torch.Tensor) -> ShardedArray | None:
    """Returns a tensor in the parts that processes have; None if each has all of it, or may.

    An axis that the mesh does not divide evenly is left to a whole copy.
    """
    if not isinstance(tensor, DTensor) or not tensor.numel():
        return None
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    places: dict[int, list[int]] = {}
    for coordinate in np.ndindex(*mesh.shape):
        begins, sizes = [0] * len(shape), list(shape)
        for axis, layout in enumerate(tensor.placements):
            if isinstance(layout, Shard):
                if sizes[layout.dim] % mesh.size(axis):
                    return None
                sizes[layout.dim] //= mesh.size(axis)
                begins[layout.dim] += coordinate[axis] * sizes[layout.dim]
        places[int(mesh.mesh[coordinate])] = begins
    part = on_host(tensor.to_local().detach())
    return split(shape, part.dtype, dict(sorted(places.items())), int, {mesh.get_rank(): part})


def from_parts(stored: StoredArray, like: torch.Tensor) -> Any:
    """Returns a tensor out of files, in the layout and dtype of another one."""
    mine = in_parts(like)
    if mine is None or not isinstance(like, DTensor):  # in another layout than it was saved in
        return stored.read()
    local = like.to_local()
    ((number, _),) = mine.own.items()
    part = torch.from_numpy(np.array(stored.read(mine.grid.boxes()[number])))
    part = part.to(dtype=local.dtype, device=local.device)
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False)


def on_host(tensor: Any) -> np.ndarray[Any, Any]:
    """Returns a tensor as NumPy array, also one whose parts other processes have.

    All processes must call it for such a tensor.
    """
    value = whole(tensor)
    # NumPy knows no bfloat16: the same numbers as float32.
    value = value.float() if value.dtype == torch.bfloat16 else value
    array: np.ndarray[Any, Any] = value.cpu().numpy()
    return array
