"""Runs blocks of steps so that a step that is not finite changes nothing.

A compiled loop over many small steps would be half as slow again if each of them looked at its
gradients. So such a loop runs as it is, and what it has made is looked at once per call. If that is
not finite, the variables get back what they had before the call, and the same batches run again in
a program that looks at each step. Single steps, and models whose variables would take much memory
to keep, run in that program from the start.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from polus.backends import backend
from polus.data.blocks import StepBlock
from polus.host import to_host
from polus.steps.compiled import CompiledStep
from polus.steps.guard import Guard
from polus.steps.variables import StepVariables

Flags = np.ndarray[Any, Any]
MAX_READ = 2**18  # numbers that the host reads after a call


class Prepared(Protocol):
    """What a guarded run uses of an executor."""

    step: Callable[..., Any]
    variables: StepVariables | None

    def guard(self, limit: int, gates: bool) -> Guard: ...
    def compiled(
        self, step: Callable[..., Any], jit_compile: bool | None, more: Sequence[Any] = ()
    ) -> CompiledStep: ...


class GuardedSteps:
    """The guarded programs of a trainer's step, kept from run to run.

    Args:
        executor: Prepares and compiles the step.

    Attributes:
        limit: After how many consecutive steps that were not finite training stands still; None to
            look at nothing.
        bad: How many consecutive steps were not finite.
        finite: Whether each step of the newest block was finite; None if all were.
        trusting: Whether calls of many steps run as they are, and are looked at afterwards.
    """

    def __init__(self, executor: Prepared) -> None:
        self.executor = executor
        self.limit: int | None = None
        self.bad = keras.Variable(0, dtype="int32", trainable=False, name="non_finite_steps")
        self.finite: Flags | None = None
        self.step: CompiledStep
        self._variables: StepVariables | None = None
        self._steps: dict[Any, CompiledStep] = {}
        self._whole: Guard
        self._seen: Callable[[], Any]
        self._held: Any = None
        self.trusting = True

    def begin(self, limit: int | None) -> "GuardedSteps":
        """Begins a run, and returns itself."""
        self.limit = limit
        self.finite = None
        self.trusting = True
        self.bad.assign(0)
        return self

    def use(self, step: CompiledStep) -> CompiledStep:
        """Uses a compiled step from now on, and returns it."""
        self.step = step
        if self.limit is not None and self._variables is not self.executor.variables:
            self._variables = self.executor.variables
            self._steps.clear()
            self._whole = self.executor.guard(self.limit, gates=False)
            self._seen = _finite_values(self._whole.checked)
        return step

    def program(self, block: StepBlock) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the program for a block, and its arguments."""
        self._held = None
        if self.limit is None:
            return self.step.program(block)
        single = block.capacity == 1 or (block.count == 1 and self._loops_in_python)
        if not single and self.step.held and self.trusting:
            self._held = backend.hold(self._whole.assigned)
            return self.step.program(block)
        # Where nothing is held, updates wait for gradients: that takes no copy of the variables.
        return self._guarded(single or not self.step.held).program(block)

    @property
    def _loops_in_python(self) -> bool:
        """Whether a step is the same in a loop and by itself.

        Elsewhere these are two programs, which may differ in their last bits, and how many batches
        a block has may depend on how late the data are.
        """
        return not backend.COMPILES and not self.step.jit_compile

    def checked(self, block: StepBlock, outputs: Any) -> Any:
        """Returns what the steps of a block returned, and sets `finite`."""
        self.finite = None
        if self.limit is None:
            return outputs
        if self._held is not None:
            if self._all_finite(block, outputs):
                return outputs
            self.trusting = False  # what happened once is likely to happen again
            for variable, value in self._held:
                backend.assign(variable, value)
            self._held = None
            program, arguments = self._guarded(False).program(block)
            outputs = program(*arguments)
        flags = to_host(outputs["finite"]).reshape(-1)[: block.count] > 0.5
        self.finite = None if flags.all() else flags
        return outputs["result"]

    def _all_finite(self, block: StepBlock, outputs: object) -> bool:
        seen = self._seen()  # on its way while the losses are read
        losses = self._whole.monitored(outputs)
        read = [np.isfinite(to_host(rows).reshape(-1)[: block.count]).all() for rows in losses]
        return all(read) and bool(to_host(seen))

    def details(self, block: StepBlock, i: int) -> dict[str, dict[str, bool]]:
        """Runs step `i` of the newest block again, which changes nothing, and looks at its values.

        Returns:
            "gradients" and "variables": the path of a variable to whether it is finite.
        """
        step = self._guarded(False, detail=True)
        single = replace(block, count=1, unpack=None, payload=block.batch(i), capacity=1)
        program, arguments = step.program(single)
        found = program(*arguments)
        return {
            kind: {n: bool(np.isfinite(to_host(v)).all()) for n, v in found.get(kind, {}).items()}
            for kind in ("gradients", "variables")
        }

    def bad_variables(self) -> list[str]:
        """Returns the paths of variables that are not finite."""
        checked = self._whole.checked
        return [v.path for v in checked if not np.isfinite(to_host(v.value).astype(float)).all()]

    def _guarded(self, gates: bool, detail: bool = False) -> CompiledStep:
        assert self.limit is not None
        key = gates, detail, self.step.jit_compile, self.step.eager, self.limit
        if key not in self._steps:
            guard = self.executor.guard(self.limit, gates)
            step = guard.wrap(self.executor.step, self.bad, detail)
            more = [*guard.assigned, self.bad]
            self._steps[key] = self.executor.compiled(step, self.step.jit_compile, more)
        return self._steps[key]


def _finite_values(variables: Sequence[Any]) -> Callable[[], Any]:
    """Returns a function that says whether all values of some variables are finite."""
    if sum(math.prod(variable.shape) for variable in variables) <= MAX_READ:
        # Read by the host: compiling a program for it would take longer than a short run.
        return lambda: all(_is_finite(backend.view(variable)) for variable in variables)
    return backend.function(lambda: ops.isfinite(backend.total([v.value for v in variables])))


def _is_finite(array: Flags) -> bool:
    """Returns whether all values are finite: a sum is quicker than a look at each."""
    total = np.add.reduce(array, axis=None, dtype=None if array.itemsize > 2 else np.float32)
    return bool(np.isfinite(total))
