"""One trainer's step: its variables, its compiled programs and their tuning."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras
import numpy as np

from polus.backends import backend
from polus.core import function, get_jit_compile
from polus.data import EpochReader
from polus.data.batches import arrays_of, map_arrays
from polus.metrics import IMetric, kept_has_samples
from polus.state import Snapshot
from polus.steps.autotune import Autotuner, Limits, Timing, Tuning
from polus.steps.compiled import CompiledStep
from polus.steps.placement import require_one_device
from polus.steps.variables import (
    MetricsOwner,
    StepVariables,
    fed_metrics,
    held_layers,
    held_variables,
    is_built,
    plain_attributes,
    unique,
)

MAX_BYTES = 2**26  # of stacked batches per call
MANY_RECOMPILATIONS = 3

logger = logging.getLogger("polus.steps")


class StepOwner(MetricsOwner, Protocol):
    """What a step is made of: the trainer, as the executor sees it."""

    step_counter: keras.Variable

    def step_parts(self) -> list[Any]: ...
    def prepare_step(self, *inputs: object) -> None: ...
    def check_step(self, variables: StepVariables) -> None: ...


@dataclass
class TunedStep:
    """A compiled step and the tuner that chooses how it runs."""

    step: CompiledStep
    tuner: Autotuner = field(default_factory=Autotuner)


class StepExecutor:
    """Prepares, compiles and tunes the step of one trainer.

    What is compiled is kept for as long as the parts of the step stay what they were: the objects
    of `step_parts()` by identity, plain attributes by value. So the optimizer, the loss, what is
    trained, a flag or a number can be replaced between two epochs or runs.

    Args:
        owner: The trainer.
        get_step: Returns its step, a function of a batch's arguments.
        evaluation: Its evaluation step, which updates metrics and returns a dict of losses.

    Attributes:
        example: The arguments of the newest first batch; None before the first.
        variables: What the step's dry run has seen; None before it.
        fed_metrics: The metrics that the step feeds, whoever holds them.
    """

    def __init__(
        self,
        owner: StepOwner,
        get_step: Callable[[], Callable[..., Any]],
        evaluation: Callable[..., Any],
    ) -> None:
        self.owner = owner
        self.get_step = get_step
        self.step = get_step()
        self.evaluation_step = evaluation
        self.example: tuple[Any, ...] | None = None
        self.variables: StepVariables | None = None
        self.fed_metrics: list[IMetric] = []
        self.tuning = Tuning(_fixed_mode(), 1)
        self._parts: list[Any] = []
        self._plain: dict[str, Any] = {}
        self._own_plain: set[str] = set()
        self._steps: dict[Any, TunedStep] = {}
        self._evaluation: dict[Any, tuple[CompiledStep, list[Any]]] = {}
        self._saved_tunings: dict[str, list[Any]] = {}
        self._update: Callable[..., Any] | None = None
        self._num_recompilations = 0

    # ------------------------------------------------------------------ preparing

    def refresh(self) -> None:
        """Drops compiled programs if a part of the step was replaced or an attribute changed."""
        if self.variables is None:
            return
        same_parts = _same_objects(self.owner.step_parts(), self._parts)
        changes = self._changed_attributes()
        if same_parts and not changes:
            return
        self.variables = self._update = None
        self._evaluation.clear()
        if not same_parts:
            self._steps.clear()
            return
        for tuned in self._steps.values():  # the same step in other words: its timings still hold
            tuned.step = CompiledStep(self.step, tuned.step.jit_compile)
        self._report(changes)

    def _changed_attributes(self) -> list[str]:
        """Describes the attributes that changed since the step was traced."""
        plain = _plain_parts(self.owner)
        names = [n for n in plain | self._plain if plain.get(n) != self._plain.get(n)]
        return [
            f"{name} ({self._plain.get(name)!r} -> {plain.get(name)!r})"
            for name in names
            if name not in self._own_plain
        ]

    def _report(self, changes: list[str]) -> None:
        self._num_recompilations += 1
        level = (
            logging.WARNING if self._num_recompilations == MANY_RECOMPILATIONS else logging.DEBUG
        )
        logger.log(
            level,
            "Compiling the step again, since a compiled step reads attributes as constants and "
            "some changed: %s. If one changes often, make it a variable that the step reads: "
            "keras.Variable(value, trainable=False), changed by assign.",
            ", ".join(changes[:5]),
        )

    def prepare(self, inputs: Sequence[Any]) -> StepVariables:
        """Builds what isn't built yet and runs the step once without updating anything.

        A bug in the user's step is met here first. Nothing is trained.
        """
        self.refresh()
        if self.variables is not None:
            return self.variables
        require_one_device()
        self.step = self.get_step()
        self.owner.prepare_step(*inputs)
        before = _plain_parts(self.owner)
        for _ in range(2):  # the second time with the weights that the first one made
            unbuilt = [layer for layer in held_layers(self.owner) if not is_built(layer)]
            with kept_has_samples(self.owner.metrics):
                seen = backend.trace(self.step, inputs)
            if not any(is_built(layer) for layer in unbuilt) and all(w for _, w in seen.updates):
                break
        for optimizer, weights in seen.updates:
            if weights and not optimizer.built:
                optimizer.build(unique(weights))
        self.variables = StepVariables.of(seen)
        self.fed_metrics = fed_metrics(self.owner, self.variables)
        self.owner.check_step(self.variables)
        self._parts, self._plain = self.owner.step_parts(), _plain_parts(self.owner)
        # What the step itself changes, such as a count of its calls, tells nothing.
        self._own_plain |= {n for n, value in self._plain.items() if before.get(n) != value}
        return self.variables

    def state_variables(self) -> list[keras.Variable]:
        """Returns all variables of a run, in an order that is the same in each process.

        First those of the layers, optimizers and metrics that the trainer holds, which have the
        same order on each backend, then what the step uses besides.

        Raises:
            RuntimeError: Before the first batch of a run.
        """
        if self.example is None:
            raise RuntimeError(
                "The variables of a run are known from its first batch on, and none was read yet. "
                "Ask for them, or for a checkpoint, in on_boundary or at the end of a batch."
            )
        used = self.prepare(self.example).used
        return unique([self.owner.step_counter, *held_variables(self.owner), *used])

    # ------------------------------------------------------------------ running

    def update(self, *inputs: object) -> Any:
        """Runs one step outside of `train`."""
        self.prepare(inputs)
        if self._update is None:
            self._update = function(self.step)
        return self._update(*inputs)

    def single_step(self, kept: bool) -> CompiledStep:
        """Returns the step compiled for one batch per call, with the compiler in use.

        Args:
            kept: Whether its programs are kept for the next call.
        """
        jit_compile = self.tuning.jit_compile
        key = f"one batch, {jit_compile}"
        if not kept:
            return CompiledStep(self.step, jit_compile)
        return self._steps.setdefault(key, TunedStep(CompiledStep(self.step, jit_compile))).step

    def tuned(
        self,
        data: EpochReader,
        max_steps: int,
        steps_per_execution: int | None,
        total_steps: float = math.inf,
    ) -> CompiledStep:
        """Returns the compiled step for the batches of an epoch, tuned for its first batch.

        Args:
            data: The epoch. Its first batch is used for timing, and stays in its place.
            max_steps: The steps that may run in one call at most.
            steps_per_execution: The steps of one call if the user fixed them.
            total_steps: The steps to run, infinite if unknown.
        """
        mode = get_jit_compile()
        key = mode, steps_per_execution, max_steps > 1, _kinds(data.example)
        tuned = self._steps.get(key)
        if tuned is None:
            tuned = self._steps[key] = TunedStep(CompiledStep(self.step, _fixed_mode()))
            if str(key) in self._saved_tunings:
                tuned.tuner.tuning = Tuning(*self._saved_tunings[str(key)])
                tuned.tuner.tuned = True
        limits = Limits(
            modes=tuple(backend.candidates()) if mode == "auto" else (mode,),
            max_steps=max_steps,
            max_batches=max(1, MAX_BYTES // max(1, _num_bytes(data.example))),
            steps_per_execution=steps_per_execution,
            total_steps=total_steps,
            long_run_secs=backend.LONG_RUN_SECS if mode == "auto" else {},
        )

        def time_step(tuning: Tuning) -> Timing:
            tuned.step.jit_compile = tuning.jit_compile
            return tuned.step.time(data.sample(tuning.steps_per_execution))

        self.tuning = tuned.tuner(limits, time_step, self._undone)
        tuned.step.jit_compile, tuned.step.steps_per_execution = self.tuning
        return tuned.step

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Restores the step's variables and the random state at its end."""
        assert self.variables is not None  # the step was prepared
        snapshot = Snapshot(self.variables.used)
        try:
            yield
        finally:
            snapshot.restore()

    def evaluation(self, inputs: Sequence[Any]) -> tuple[CompiledStep, list[keras.Variable]]:
        """Returns the compiled evaluation step, and the variables that it assigns."""
        self.refresh()
        key = f"evaluation, {get_jit_compile()}"
        known = self._evaluation.get(key)
        if known is None:
            # A resumed run validates with the compiler that its first validation had.
            saved = self._saved_tunings.get(key)
            step = CompiledStep(self.evaluation_step, saved[0] if saved else self.tuning[0])
            seen = backend.trace(self.evaluation_step, inputs)
            if any(not is_built(layer) for layer in held_layers(self.owner)):
                seen = backend.trace(self.evaluation_step, inputs)
            known = self._evaluation[key] = step, StepVariables.of(seen).assigned
        return known

    def finalize(self) -> None:
        """Ends training as Keras does: weights become their moving average where one is kept."""
        for update in self.variables.updates if self.variables is not None else ():
            update.optimizer.finalize_variable_values(update.variables)

    # ------------------------------------------------------------------ checkpoints

    def get_state(self) -> dict[str, list[Any]]:
        """Returns the tunings by key, for a resumed run to compute the same bits."""
        chosen = {
            str(key): list(tuned.tuner.tuning)
            for key, tuned in self._steps.items()
            if tuned.tuner.tuning is not None
        }
        evaluation = {key: [step.jit_compile, 1] for key, (step, _) in self._evaluation.items()}
        return self._saved_tunings | chosen | evaluation

    def set_state(self, state: dict[str, list[Any]]) -> None:
        """Uses the tunings that `get_state` returned."""
        self._saved_tunings = dict(state)


def _fixed_mode() -> bool | None:
    mode = get_jit_compile()
    return None if mode == "auto" else mode


def _plain_parts(owner: StepOwner) -> dict[str, Any]:
    return plain_attributes(owner, ignored=("early_stop", "log_name"))


def _same_objects(parts: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(parts) == len(others) and all(a is b for a, b in zip(parts, others, strict=True))


def _kinds(example: Any) -> str:
    """Describes a batch without its sizes: bucketed batches begin each epoch with another one."""
    return str(map_arrays(lambda a: (str(a.dtype), len(a.shape)), example))


def _num_bytes(batch: Any) -> int:
    """Returns the bytes that one more step adds to a call."""
    return sum(int(np.prod(leaf.shape)) * 8 for leaf in arrays_of(batch))
