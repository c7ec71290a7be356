"""PyTorch on several devices: one process for each, with its own rows of every batch.

The processes are those of `torch.distributed`, started by `torchrun` or any other launcher. Each
has the whole model. Gradients are averaged where they are taken, and what a program leaves behind
is merged after it: outputs and moving statistics are averaged, what metrics have added is summed.
A batch that does not divide by the number of processes runs whole in each of them, which is right
for any loss.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import keras
import torch
import torch.distributed as dist

from polus.backends.placement import (
    OwnRows,
    Placement,
    Program,
    ReplicaState,
    own_part,
    report_idle,
)
from polus.backends.scopes import current_scope
from polus.backends.torch_agreement import Agreement, lost_processes_explained
from polus.backends.torch_dtensor import GlobalView
from polus.types import Tensor

# Keras' seeds are a number and a count of draws, which PyTorch gets as a sum. So far apart, the
# replicas' numbers don't meet.
SEED_STRIDE = 8_000_009
HAS_DTENSORS = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 16)
BUCKET_BYTES = 25 * 2**20  # of gradients that are added up in one call, as in PyTorch


class _Running(threading.local):
    """What the program does that this thread runs: whether each process has the whole batch."""

    whole = False


_running = _Running()


class OneProcess(Placement):
    """A single process, whose model may still be wrapped for several."""

    def check(self, parts: Iterable[object]) -> None:
        for part in parts:
            modules = part.modules() if isinstance(part, torch.nn.Module) else ()
            for module in modules:
                _check_not_wrapped(module)

    def report_layouts(self, variables: Sequence[keras.Variable]) -> None:
        report_idle(
            torch.cuda.device_count() if self.count == 1 else 1,
            "write torch.distributed.init_process_group() at the start of the program, and start "
            "it by torchrun",
        )


class ProcessGroup(OwnRows, OneProcess, Agreement):
    """The processes of `torch.distributed`, each with its own rows of a batch."""

    splits_steps = True

    def __init__(self) -> None:
        Agreement.__init__(self)
        self.replicas = self.count
        self.name = f"a torch.distributed process group of {self.count} processes"

    # ------------------------------------------------------------------ steps

    def program(self, program: Program, size: int, state: ReplicaState) -> Program:
        whole = not self.divides(size)

        def run(*arguments: Any) -> Any:
            before = [variable.value.detach().clone() for variable in state.summed]
            with lost_processes_explained():
                with self._replica(whole, state.seeds):
                    outputs = program(*arguments)
                return self._merged(outputs, state, before, whole)

        return run

    @contextlib.contextmanager
    def _replica(self, whole: bool, seeds: Sequence[keras.Variable]) -> Iterator[None]:
        """Runs the block as this replica: with random numbers of its own unless it has the whole.

        The seeds are those of process 0 again afterwards, so a checkpoint does not depend on the
        number of processes.
        """
        outer, _running.whole = _running.whole, whole
        stride = 0 if whole else self.index * SEED_STRIDE
        try:
            for seed in seeds:
                _shift(seed, stride)
            yield
        finally:
            for seed in seeds:
                _shift(seed, -stride)
            _running.whole = outer

    def _merged(
        self, outputs: Any, state: ReplicaState, before: Sequence[torch.Tensor], whole: bool
    ) -> Any:
        """Merges what a program returned and assigned, in one collective call."""
        leaves = keras.tree.flatten(outputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        averaged = [variable.value.detach() for variable in state.averaged]
        added = [v.value.detach() - old for v, old in zip(state.summed, before, strict=True)]
        mean = 1 / self.count
        scales = [mean] * len(tensors + averaged) + [mean if whole else 1.0] * len(added)
        merged = _summed([*tensors, *averaged, *added], scales)
        results = iter(merged)
        leaves = [next(results) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        with torch.no_grad():
            for variable in state.averaged:
                variable.assign(next(results))
            for variable, old in zip(state.summed, before, strict=True):
                variable.assign(old + next(results).to(old.dtype))
        return keras.tree.pack_sequence_as(outputs, leaves)

    @property
    def parts(self) -> int:
        return 1 if _running.whole or current_scope() is not None else self.count

    def gather(self, tensor: Tensor) -> Tensor:
        if self.parts == 1:
            return tensor
        own: torch.Tensor = keras.ops.convert_to_tensor(tensor)
        # Not every library moves truth values.
        moved = own.to(torch.uint8) if own.dtype == torch.bool else own
        rows: torch.Tensor = _Gather.apply(moved.contiguous())  # type: ignore[no-untyped-call]
        return rows.to(own.dtype)

    def own_rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.parts == 1 else own_part(self, tensor, 0, tensor.shape[0])


class _Gather(torch.autograd.Function):
    """All replicas' rows. Each replica uses them, so each has a part of their gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, tensor)
        ctx.count = len(tensor)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        first = dist.get_rank() * int(ctx.count)
        return total[first : first + ctx.count]


def active() -> Placement:
    """Returns where steps run now.

    Raises:
        NotImplementedError: Under an engine that Polus does not serve.
        RuntimeError: If the launcher started several programs that don't know of each other.
    """
    distribution = keras.distribution.distribution()
    if distribution is not None and not HAS_DTENSORS:
        raise NotImplementedError(
            "keras.distribution is active, and with this Keras (3.16 has it) PyTorch trains by "
            "torch.distributed. Leave out set_distribution(...), and write "
            "torch.distributed.init_process_group() at the start of a program that torchrun starts."
        )
    if distribution is not None and not distribution.auto_shard_dataset:
        raise NotImplementedError(
            f"keras.distribution.{type(distribution).__name__}(auto_shard_dataset=False) says that "
            "each process reads a part of the data of its own, and Polus takes each process's part "
            "of the whole data itself. Give each process the whole dataset, and leave out "
            "auto_shard_dataset."
        )
    if isinstance(distribution, keras.distribution.ModelParallel):
        return GlobalView(distribution)
    there = dist.is_available() and dist.is_initialized()
    if there and dist.get_world_size() > 1:
        return ProcessGroup()
    if not there and (size := os.environ.get("WORLD_SIZE", "1")) not in ("", "0", "1"):
        raise RuntimeError(
            f"The environment says WORLD_SIZE={size}: a launcher has started {size} programs, and "
            "each would train a model of its own. Write torch.distributed.init_process_group() "
            "before training to train one model; to train independent ones, start them without "
            "WORLD_SIZE."
        )
    return OneProcess()


def is_distributed() -> bool:
    """Returns True if several processes train one model."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gradients_of(
    tensors: Sequence[Any], backward: Callable[[], list[Tensor | None]]
) -> list[Tensor | None]:
    """Runs a backward pass, and returns the means over the processes of what it returns.

    Args:
        tensors: The tensors that it differentiates by.
        backward: Returns their gradients first.
    """
    if not is_distributed() or current_scope() is not None:
        return backward()
    if isinstance(keras.distribution.distribution(), keras.distribution.ModelParallel):
        return backward()  # of the whole batch already
    with _Averaging(tensors, dist.get_world_size()) as averaging:
        gradients = backward()
    return averaging.means() + gradients[len(tensors) :]


class _Averaging:
    """A context for a backward pass, which averages gradients over the processes meanwhile.

    As in `DistributedDataParallel` (Li et al. 2020, "PyTorch Distributed: Experiences on
    accelerating data parallel training"), gradients are added up in buckets, in the reverse order
    of the variables, and each bucket is on its way while the earlier layers are differentiated. The
    buckets leave in the same order in each process.

    Args:
        tensors: The tensors that are differentiated by.
        count: The number of processes.
    """

    def __init__(self, tensors: Sequence[Any], count: int) -> None:
        self.tensors = tensors
        self.count = count
        self._buckets = _buckets([t for t in tensors if t.requires_grad])
        self._gradients: dict[int, torch.Tensor] = {}
        self._sums: list[tuple[list[int], Any, Any]] = []

    def __enter__(self) -> Self:
        self._hooks = [t.register_hook(self._arrived(t)) for t in self.tensors if t.requires_grad]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, tensor: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            self._gradients[id(tensor)] = gradient.detach()
            while (sent := len(self._sums)) < len(self._buckets):
                if not self._gradients.keys() >= set(self._buckets[sent]):
                    break
                self._send(self._buckets[sent])

        return hook

    def _send(self, bucket: list[int]) -> None:
        parts = [self._gradients[i].reshape(-1) for i in bucket if i in self._gradients]
        flat = torch.cat(parts) if parts else None
        work = None if flat is None else dist.all_reduce(flat.div_(self.count), async_op=True)
        self._sums.append((bucket, flat, work))

    def means(self) -> list[Tensor | None]:
        """Returns the mean of each tensor's gradient; None if it had none."""
        for bucket in self._buckets[len(self._sums) :]:  # of which a tensor had no gradient
            self._send(bucket)
        means: dict[int, torch.Tensor] = {}
        for bucket, flat, work in self._sums:
            if work is not None:
                work.wait()
                found = {i: self._gradients[i] for i in bucket if i in self._gradients}
                pieces = torch.split(flat, [gradient.numel() for gradient in found.values()])
                for (i, gradient), piece in zip(found.items(), pieces, strict=True):
                    means[i] = piece.reshape(gradient.shape)
        return [means.get(id(tensor)) for tensor in self.tensors]


def _buckets(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Returns the identities of tensors of one dtype and some bytes together, the last first."""
    buckets: list[list[int]] = []
    kind, room = None, 0
    for tensor in reversed(tensors):
        size = tensor.numel() * tensor.element_size()
        if tensor.dtype != kind or size > room:
            buckets.append([])
            kind, room = tensor.dtype, BUCKET_BYTES
        buckets[-1].append(id(tensor))
        room -= size
    return buckets


def _summed(
    tensors: Sequence[torch.Tensor],
    scales: Sequence[float],
    accumulate: torch.dtype | None = torch.float64,
) -> list[torch.Tensor]:
    """Returns the sums of scaled tensors over the processes, by one call for each dtype.

    Args:
        tensors: The tensors of this process.
        scales: The factor of each.
        accumulate: The dtype to add in; None for the tensors' own.
    """
    results: list[Any] = [None] * len(tensors)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_dtype.setdefault(accumulate or tensor.dtype, []).append(i)
    for dtype, numbers in by_dtype.items():
        parts = [tensors[i].detach().reshape(-1).to(dtype) * scales[i] for i in numbers]
        flat = torch.cat(parts)
        dist.all_reduce(flat)
        pieces = torch.split(flat, [part.numel() for part in parts])
        for i, part in zip(numbers, pieces, strict=True):
            kept = tensors[i].dtype if tensors[i].is_floating_point() else dtype
            results[i] = part.reshape(tensors[i].shape).to(kept)
    return results


def _shift(seed: keras.Variable, stride: int) -> None:
    if stride:
        value = seed.value.detach().clone()
        value[0] += stride
        seed.assign(value)


def _check_not_wrapped(module: torch.nn.Module) -> None:
    wrappers: dict[str, Any] = {
        "DataParallel": torch.nn.DataParallel,
        "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel,
    }
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        wrappers |= {
            "FullyShardedDataParallel": FullyShardedDataParallel,
            "fully_shard": FSDPModule,
        }
    for name, kind in wrappers.items():
        if isinstance(module, kind):
            raise NotImplementedError(
                f"A module is wrapped by {name}, which has no effect on the gradients that Polus "
                "takes: each process would train a model of its own. Pass the model unwrapped. "
                "After torch.distributed.init_process_group() Polus averages gradients itself. "
                "keras.distribution.ModelParallel shards weights, on JAX or with Keras 3.16."
            )
