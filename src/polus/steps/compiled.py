"""A step as compiled programs: for one batch, or for many in one call of the backend."""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from polus.backends import backend
from polus.backends.base import as_arguments
from polus.data.blocks import StepBlock
from polus.steps.autotune import EXECUTION_SECS, Timing

MANY_SHAPES = 8

logger = logging.getLogger("polus.steps")

Step = Callable[..., Any]


class CompiledStep:
    """One step, compiled as needed.

    Args:
        step: A stateful function of a batch's arguments that returns a scalar or a dict of scalars.
        jit_compile: The compiler setting of programs made from now on; None for the backend's own.

    Attributes:
        step: The step.
        jit_compile: The compiler setting.
        steps_per_execution: The most steps that a call runs.
    """

    def __init__(self, step: Step, jit_compile: bool | None = None) -> None:
        self.step = step
        self.jit_compile = jit_compile
        self.steps_per_execution = 1
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._shapes: list[Any] = []

    def program(self, block: StepBlock) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the program for a block, and its arguments.

        Calling it here would add a frame between the loop and the user's step.
        """
        self._count_shapes(block.signature)
        many = block.capacity > 1
        key = (self.jit_compile, block.unpack, many)
        program = self._programs.get(key)
        if program is None:
            program = backend.program(self.step, block.unpack, many, self.jit_compile)
            self._programs[key] = program
        if many:
            return program, (np.int32(block.count), block.capacity, block.payload)
        return program, (block.payload,) if block.unpack else as_arguments(block.payload)

    def __call__(self, block: StepBlock) -> dict[str, Any]:
        """Runs the steps of a block and returns their outputs by name, a row for each step."""
        program, arguments = self.program(block)
        return as_terms(program(*arguments))

    def time(self, block: StepBlock) -> Timing:
        """Times a call: the shortest of several, after two that compile.

        The second call compiles as well: it is the first to see the values that the first one made.
        """
        began = time.perf_counter()
        program, arguments = self.program(block)
        for _ in range(2):
            backend.wait(program(*arguments))
        compile_secs = time.perf_counter() - began
        secs: list[float] = []
        while len(secs) < 3 or (sum(secs) < EXECUTION_SECS and len(secs) < 20):
            began = time.perf_counter()
            backend.wait(program(*arguments))
            secs.append(time.perf_counter() - began)
            if sum(secs) > 1:
                break
        return Timing(min(secs), compile_secs)

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


def as_terms(outputs: object) -> dict[str, Any]:
    """Returns what a step returned as a dict of named values."""
    return outputs if isinstance(outputs, dict) else {"loss": outputs}
