"""Where a step runs: on one device, or on several that share each batch."""

import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import keras

from polus.backends.scopes import BackendVariable
from polus.types import Tensor

LOST_PROCESS = (
    "Another process of this run has ended, or did not answer in time, and no step runs without "
    "it. Its own output says why. Start the program again: with train(..., resume=folder) it "
    "continues from its newest checkpoint."
)
logger = logging.getLogger("polus.steps")

Program = Callable[..., Any]
BackendStack = Callable[[Sequence[Tensor], int], Tensor]
Stateful: TypeAlias = keras.Variable | BackendVariable


class _Gathers(threading.local):
    """How often this thread has called `polus.core.gather`."""

    count = 0


gathers = _Gathers()


@dataclasses.dataclass(frozen=True)
class ReplicaState:
    """Variables of a step that each replica changes by its own part of a batch.

    Attributes:
        summed: Those of metrics: what each replica has added is summed.
        averaged: Float variables that no optimizer updates, such as moving statistics.
        seeds: The states of Keras' seed generators, from which each replica draws its own numbers.
        optimizers: Those that the step may call.
        variables: All that the step uses.
    """

    summed: Sequence[keras.Variable] = ()
    averaged: Sequence[Stateful] = ()
    seeds: Sequence[keras.Variable] = ()
    optimizers: Sequence[keras.optimizers.Optimizer] = ()
    variables: Sequence[Stateful] = ()


class Placement:
    """One device in one process: nothing to place, to gather or to agree on.

    The engines for several devices override what differs. There are two kinds. On JAX a program
    sees the whole batch, and the compiler spreads it over the devices (a global view). Elsewhere
    each replica runs the step on its own rows, and gradients, outputs and state are merged.

    Attributes:
        name: The engine, for messages; empty for one device.
        index: The number of this process.
        count: The number of processes.
        replicas: The number of parts of a batch.
        has_whole_weights: Whether each process can read all values of each variable by itself.
        splits_steps: Whether a step sees a replica's rows, not the whole batch.
        gathers_on_host: Whether batches are gathered from arrays outside of the compiled step.
    """

    name = ""
    index = 0
    count = 1
    replicas = 1
    has_whole_weights = True
    splits_steps = False
    gathers_on_host = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.index == 0

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def check(self, parts: Iterable[object]) -> None:
        """Raises a NotImplementedError or a RuntimeError if the engine can't train these.

        Args:
            parts: What the trainer holds: models, layers, and anything else.
        """

    def compilers(self, mode: bool | str, candidates: Sequence[bool]) -> tuple[bool, ...]:
        """Returns the settings of `jit_compile` to try: `candidates` if `mode` is "auto"."""
        return tuple(candidates) if isinstance(mode, str) else (mode,)

    # ------------------------------------------------------------------ batches

    def divides(self, size: int) -> bool:
        """Returns whether each replica gets its own part of a batch, and not the whole batch."""
        return size % self.replicas == 0

    def place(self, array: Tensor, size: int) -> Tensor:
        """Returns an array of a batch of `size` examples, ready for `backend.to_device`."""
        return array

    def stack(
        self, rows: Sequence[Tensor], capacity: int, size: int, stack: BackendStack
    ) -> Tensor:
        """Stacks the same array of several batches on the device, by `backend.stack`."""
        return stack(rows, capacity)

    def place_examples(self, array: Tensor) -> Tensor:
        """Returns an array of all examples, of which each device needs any."""
        return array

    def place_rows(self, table: Tensor) -> Tensor:
        """Returns the row numbers of some batches, (steps, batch size)."""
        return table

    # ------------------------------------------------------------------ steps

    def step(self, step: Program, size: int, state: ReplicaState) -> Program:
        """Returns `step`, to be compiled for batches of `size`, over the devices of a process."""
        return step

    def program(self, program: Program, size: int, state: ReplicaState) -> Program:
        """Returns `program`, which runs steps on batches of `size`, over all devices."""
        return program

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the rows of all replicas; see `polus.core.gather`."""
        return tensor

    def own_rows(self, tensor: Tensor) -> Tensor:
        """Returns this replica's rows of what `gather` returned."""
        return tensor

    @property
    def parts(self) -> int:
        """How many parts `gather` puts together where it is called."""
        return 1

    # ------------------------------------------------------------------ agreement of processes

    def agreed(self, values: Sequence[float]) -> list[float]:
        """Returns the numbers that process 0 has. All processes must call it."""
        return list(values)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Returns the largest of each number over the processes. All processes must call it."""
        return list(values)

    def by_itself(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of one process: the variables that it makes are not shared."""
        return function(*arguments)

    def broadcast(self, variables: Iterable[Stateful]) -> None:
        """Gives each process the values that process 0 has."""

    def report_layouts(self, variables: Sequence[keras.Variable]) -> None:
        """Logs how many variables are sharded, if the engine shards any, and of idle devices."""


class OwnRows(Placement):
    """Several processes, each of which reads its own rows of every batch."""

    def place(self, array: Tensor, size: int) -> Tensor:
        return own_part(self, array, 0, size)

    def stack(
        self, rows: Sequence[Tensor], capacity: int, size: int, stack: BackendStack
    ) -> Tensor:
        return stack([own_part(self, row, 0, size) for row in rows], capacity)

    def place_rows(self, table: Tensor) -> Tensor:
        return own_part(self, table, 1, table.shape[1])


def own_part(placement: Placement, array: Tensor, axis: int, size: int) -> Tensor:
    """Returns a process's part of an array with an axis of `size` examples; others as they are."""
    shape = getattr(array, "shape", ())
    if not placement.divides(size) or len(shape) <= axis or shape[axis] != size:
        return array
    part = size // placement.count
    own = slice(placement.index * part, (placement.index + 1) * part)
    return array[(slice(None),) * axis + (own,)]


def report_sharded(
    variables: Sequence[keras.Variable], sharded: Sequence[bool], mesh: dict[str, int]
) -> None:
    """Logs how many of some variables are sharded; a `LayoutMap` that matches none is silent."""
    if any(sharded):
        logger.info(
            "%d of %d variables are sharded over the %d devices of the mesh %s.",
            sum(sharded),
            len(variables),
            math.prod(mesh.values()),
            mesh,
        )
    else:
        logger.warning(
            "None of the %d variables is sharded: no key of the LayoutMap matches a path such as "
            "%r. Keras compares a key with the whole path, so write '.*dense.*kernel', not "
            "'dense.*kernel'.",
            len(variables),
            variables[0].path if variables else "",
        )


@functools.cache
def report_idle(devices: int, remedy: str) -> None:
    """Logs, once in a process, that one of several devices is used.

    Args:
        devices: How many there are.
        remedy: What to do for all of them to be used.
    """
    if devices > 1:
        logger.info("Using 1 of %d devices. For all of them, %s.", devices, remedy)


def check_same(placement: Placement, value: float, message: str) -> None:
    """Raises a RuntimeError in all processes if a number is not the same in all of them."""
    high, low = placement.largest([value, -value])
    if high != -low:
        raise RuntimeError(message)
