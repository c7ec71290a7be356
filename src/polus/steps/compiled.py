"""A step as compiled programs: for one batch, or for many in one call of the backend."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from polus.backends import backend
from polus.backends.base import Known, as_arguments
from polus.backends.placement import Placement, ReplicaState
from polus.data.blocks import StepBlock, stacked
from polus.steps.autotune import Timing
from polus.steps.pace import Pace
from polus.steps.shapes import Lengths, Shapes

MANY_SHAPES = 8
TIMED_SECS = 0.02
TIMED_CALLS = 4
MAX_TIMED_SECS = 0.2  # one call may be long because another program had the processor

logger = logging.getLogger("polus.steps")

Step = Callable[..., Any]


class CompiledStep:
    """One step, compiled as needed.

    Args:
        step: A stateful function of a batch's arguments that returns a scalar or a dict of scalars.
        placement: The devices that it runs on.
        state: The variables that replicas change by their own part of a batch.
        jit_compile: The compiler setting of programs made from now on; None for the backend's own.
        eager: Whether the step runs as it is written, operation by operation.
        held: Whether what `backend.hold` returned before a call is there after it.
        known: The variables that the step assigns, and those that it only reads, if known.
        convolutions: Whether the step has convolutions.
        shapes: The shapes of batches so far, of other programs of the same batches too, where a
            program may serve several; None where each shape has its own.

    Attributes:
        step: The step.
        placement: The devices that it runs on.
        jit_compile: The compiler setting.
        steps_per_execution: The most steps that a call runs.
        pace: How many of them the next call runs.
    """

    def __init__(
        self,
        step: Step,
        placement: Placement,
        state: ReplicaState,
        jit_compile: bool | None = None,
        eager: bool = False,
        held: bool = False,
        known: Known | None = None,
        convolutions: bool = False,
        shapes: Shapes | None = None,
    ) -> None:
        self.step = step
        self.placement = placement
        self.eager = eager
        self.held = held
        self.known = known
        self.convolutions = convolutions
        self.jit_compile = jit_compile
        self.steps_per_execution = 1
        self.pace = Pace(fixed=placement.count > 1)  # processes must not follow their clocks
        self._state = state
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._shapes: list[Any] = []
        self._lengths = shapes

    def program(self, block: StepBlock) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the program for a block, and its arguments.

        Calling it here would add a frame between the loop and the user's step.
        """
        lengths = self._open_lengths(block)
        many, divides = block.capacity > 1, self.placement.divides(block.batch_size)
        key = (self.jit_compile, block.unpack, many, divides, lengths)
        program = self._programs.get(key)
        if program is None:
            step = self.placement.step(self.step, block.batch_size, self._state)
            if self.eager:
                program = backend.eager_program(step, block.unpack)
            else:
                settings = self.jit_compile, self.held, self.known, self.convolutions, lengths
                program = backend.program(step, block.unpack, many, *settings)
            program = self.placement.program(program, block.batch_size, self._state)
            self._programs[key] = program
        if many:
            return program, (np.int32(block.count), block.capacity, block.payload)
        return program, (block.payload,) if block.unpack else as_arguments(block.payload)

    def __call__(self, block: StepBlock) -> dict[str, Any]:
        """Runs the steps of a block and returns their outputs by name, a row for each step."""
        program, arguments = self.program(block)
        return as_terms(program(*arguments))

    def time(self, block: StepBlock) -> Timing:
        """Times a step: first a call that compiles, then a few of some milliseconds.

        Several processes make the same calls, as often as process 0 decides, and get its times.

        Args:
            block: A block of one batch, again and again. The calls run as many of its steps as
                fill the time.
        """
        agreed = self.placement.agreed
        began = time.perf_counter()
        backend.wait(self._call(block, 1))
        compile_secs = time.perf_counter() - began
        count, best, total = 1, math.inf, 0.0
        for _ in range(TIMED_CALLS):
            began = time.perf_counter()
            backend.wait(self._call(block, count))
            (secs,) = agreed([time.perf_counter() - began])
            best, total = min(best, secs / count), total + secs
            count = max(1, min(block.count, int(TIMED_SECS / best)))
            if total > MAX_TIMED_SECS:
                break
        return Timing(*agreed([best, compile_secs]))

    def _call(self, block: StepBlock, count: int) -> Any:
        program, arguments = self.program(replace(block, count=count))
        return program(*arguments)

    def _open_lengths(self, block: StepBlock) -> Lengths | None:
        """Returns the shapes to compile for; None for those of the block."""
        of_batches = block.unpack is None or block.unpack is stacked  # not of rows of arrays
        may = backend.OPEN_LENGTHS and of_batches and not self.jit_compile and not self.eager
        alone = self.placement.replicas == self.placement.count == 1
        lengths = None
        if self._lengths is not None and may and alone:
            lengths = self._lengths.lengths(block.signature)
        if lengths is None:
            self._count_shapes(block.signature)
        return lengths

    def _count_shapes(self, signature: Any) -> None:
        """Warns once if batches come in so many shapes that compiling dominates."""
        if signature in self._shapes:
            return
        self._shapes.append(signature)
        if len(self._shapes) == MANY_SHAPES and backend.COMPILES:
            logger.warning(
                "Batches came in %d different shapes so far, and each shape is compiled "
                "separately: %s. Pad batches to a few lengths, or drop the last, smaller one.",
                MANY_SHAPES,
                "; ".join(map(str, self._shapes)),
            )


def as_terms(outputs: object, primary: str | None = None) -> dict[str, Any]:
    """Returns what a step returned as a dict of named values.

    Args:
        outputs: A scalar or a dict of scalars, for each of some steps.
        primary: The name of a term that is named "loss" as well.
    """
    terms = outputs if isinstance(outputs, dict) else {"loss": outputs}
    return terms if primary is None else {"loss": terms[primary], **terms}
