"""PyTorch on several processes: numbers that they agree on, values that they share."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import keras
import torch
import torch.distributed as dist

from polus.backends.placement import LOST_PROCESS, Placement, Stateful


@contextlib.contextmanager
def lost_processes_explained() -> Iterator[None]:
    """Adds to an error of a collective call what it means for a run."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            error.add_note(LOST_PROCESS)
        raise


class Agreement(Placement):
    """The processes of `torch.distributed`, whose steps run without `torch.compile`."""

    def __init__(self) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()

    def compilers(self, mode: bool | str, candidates: Sequence[bool]) -> tuple[bool, ...]:
        if mode is True:
            raise NotImplementedError(
                f"torch.compile is asked for under {self.name}, and Polus runs steps there without "
                'it. Write polus.core.set_jit_compile(False), or "auto".'
            )
        return (False,)

    @lost_processes_explained()
    def agreed(self, values: Sequence[float]) -> list[float]:
        numbers = _numbers(values)
        dist.broadcast(numbers, 0)
        return [float(number) for number in numbers.tolist()]

    @lost_processes_explained()
    def largest(self, values: Sequence[float]) -> list[float]:
        numbers = _numbers(values)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return [float(number) for number in numbers.tolist()]

    @lost_processes_explained()
    def broadcast(self, variables: Iterable[Stateful]) -> None:
        with torch.no_grad():
            for variable in variables:
                value = variable.value.detach().clone().contiguous()
                # As bytes: not every library moves every dtype.
                dist.broadcast(value.reshape(-1).view(torch.uint8), 0)
                variable.assign(value)


def _numbers(values: Sequence[float]) -> torch.Tensor:
    # On Keras' device: NCCL takes no tensors of the host.
    device = keras.ops.zeros(()).device
    return torch.tensor(list(values), dtype=torch.float64, device=device)
