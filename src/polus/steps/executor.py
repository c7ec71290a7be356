"""One trainer's step: its variables, its compiled programs and their tuning."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras

from polus.backends import backend
from polus.backends.placement import Placement
from polus.core import function, get_jit_compile, times_ways
from polus.data import EpochReader
from polus.data.batches import batch_size_of
from polus.metrics import IMetric, kept_has_samples
from polus.optimizers import optimizers_of
from polus.state import Snapshot
from polus.steps.autotune import Autotuner, Limits, RunLength, Timing, Timings, Tuning, Way
from polus.steps.by_hand import followed
from polus.steps.compiled import CompiledStep
from polus.steps.finish import array_terms, finished_step
from polus.steps.finite import GuardedSteps
from polus.steps.guard import Guard
from polus.steps.norms import Norms, with_norms
from polus.steps.pace import Pace
from polus.steps.progress import Progress
from polus.steps.shapes import Shapes
from polus.steps.sizes import kinds_of, num_bytes, num_state_bytes, warn_of_whole_batches
from polus.steps.tuning_cache import active_cache, kind_of_step
from polus.steps.variables import (
    MetricsOwner,
    StepVariables,
    build_optimizers,
    fed_metrics,
    has_convolutions,
    held_layers,
    held_parts,
    held_variables,
    is_built,
    plain_parts,
    replica_state,
    same_objects,
    unique,
)

MAX_HELD_BYTES = 2**28  # of variables that are kept during a call of many steps
MAX_BYTES = 2**24  # of stacked batches per call
# Several processes can't adapt their calls to the clock, and a step may take seconds.
STEPS_OF_PROCESSES = 8
MANY_RECOMPILATIONS = 3

logger = logging.getLogger("polus.steps")


class StepOwner(MetricsOwner, Protocol):
    """What a step is made of: the trainer, as the executor sees it."""

    step_counter: keras.Variable
    primary: str | None

    @property
    def follows_fit(self) -> bool: ...
    def step_parts(self) -> list[Any]: ...
    def prepare_step(self, *inputs: object) -> None: ...
    def check_step(self, variables: StepVariables) -> None: ...
    def check_batch(self, inputs: tuple[Any, ...], where: str) -> None: ...


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
        progress: Where the run stands, for steps that read it.
        array_terms: The names of the step's results that are no scalars.
        run_eagerly: Whether steps run without being compiled, to debug them.
        guarded: The programs in which a step that is not finite changes nothing.
        norms: Whether steps return the norms of their gradients, "variables" for each variable's.
    """

    def __init__(
        self,
        owner: StepOwner,
        get_step: Callable[[], Callable[..., Any]],
        evaluation: Callable[..., Any],
    ) -> None:
        self.owner = owner
        self.get_step = get_step
        self.step = self._finished = get_step()
        self.evaluation_step = evaluation
        self.example: tuple[Any, ...] | None = None
        self.variables: StepVariables | None = None
        self.fed_metrics: list[IMetric] = []
        self.tuning = Tuning(_fixed_mode(), 1)
        self.progress = Progress()
        self.array_terms: set[str] = set()
        self.run_eagerly = False
        self.norms: Norms = False
        self.guarded = GuardedSteps(self)
        self._parts: list[Any] = []
        self._plain: dict[str, Any] = {}
        self._own_plain: set[str] = set()
        self._placement = Placement()
        self._steps: dict[Any, TunedStep] = {}
        self._evaluation: dict[Any, tuple[CompiledStep, list[Any]]] = {}
        self._saved_tunings: dict[str, list[Any]] = {}
        self._shapes: dict[str, Shapes] = {}
        self._update: Callable[..., Any] | None = None
        self._num_recompilations = 0

    # ------------------------------------------------------------------ preparing

    def refresh(self) -> None:
        """Drops compiled programs if a part of the step was replaced or an attribute changed."""
        if self.variables is None:
            return
        same_parts = same_objects(self.owner.step_parts(), self._parts)
        same_parts = same_parts and backend.placement() == self._placement
        changes = self._changed_attributes()
        if same_parts and not changes:
            return
        self.variables = self._update = None
        self._evaluation.clear()
        if same_parts:  # the same step in other words: its timings still hold
            self._report(changes)
        else:
            self._steps.clear()

    def set_run_eagerly(self, run_eagerly: bool) -> bool:
        """Sets whether steps run as they are written, and returns whether they did.

        The step is traced again: a trace by the compiler has no values to print.
        """
        before, self.run_eagerly = self.run_eagerly, run_eagerly
        if before != run_eagerly:
            self.variables = None
        return before

    def set_norms(self, norms: Norms) -> None:
        """Sets whether steps return the norms of their gradients."""
        if self.norms != norms:
            self.norms, self.variables = norms, None

    def _changed_attributes(self) -> list[str]:
        """Describes the attributes that changed since the step was traced."""
        plain = plain_parts(self.owner)
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
        self._placement = backend.placement()
        written = self.get_step()
        self.owner.prepare_step(*inputs)
        before = plain_parts(self.owner)
        for _ in range(2):  # the second time with the weights that the first one made
            self.step = written
            unbuilt = [layer for layer in held_layers(self.owner) if not is_built(layer)]
            with kept_has_samples(self.owner.metrics), followed(self.owner):
                seen = backend.trace(self.step, inputs, self.run_eagerly)
            self.step = finished_step(
                self.step, self.owner, self.owner.step_counter, self._placement, seen
            )
            if not any(is_built(layer) for layer in unbuilt) and all(w for _, w in seen.updates):
                break
        self._placement.check(held_parts(self.owner))
        self._finished = self.step
        if self.norms:
            names = {id(o): name for name, o in optimizers_of(self.owner).items()}
            self.step = with_norms(self.step, names, self.norms == "variables")
        build_optimizers(seen.merged_updates())
        self.variables = variables = StepVariables.of(seen)
        self.fed_metrics = fed_metrics(self.owner, variables)
        self.array_terms = array_terms(variables.result)
        self.owner.check_step(variables)
        self.owner.check_batch(tuple(inputs), "The first batch")  # its outputs are known only now
        self._place(variables)
        for tuned in self._steps.values():
            old = tuned.step
            tuned.step = self._compiled(self.step, variables, old.jit_compile, old.held)
        self._parts, self._plain = self.owner.step_parts(), plain_parts(self.owner)
        # What the step itself changes, such as a count of its calls, tells nothing.
        self._own_plain |= {n for n, value in self._plain.items() if before.get(n) != value}
        return variables

    def _place(self, variables: StepVariables) -> None:
        """Gives each process the same values."""
        placement = self._placement
        every = unique([self.owner.step_counter, *held_variables(self.owner), *variables.used])
        placement.broadcast(every)
        placement.report_layouts([v for update in variables.updates for v in update.variables])

    def _compiled(
        self,
        step: Callable[..., Any],
        variables: StepVariables,
        jit_compile: bool | None,
        held: bool = False,
        more: Sequence[Any] = (),
        of: str = "train",
    ) -> CompiledStep:
        state = replica_state(self.owner, variables)
        known, convolves = variables.known(more), has_convolutions(held_layers(self.owner))
        settings = jit_compile, self.run_eagerly, held, known, convolves
        shapes = self._shapes.setdefault(of, Shapes()) if self.owner.follows_fit else None
        return CompiledStep(step, self._placement, state, *settings, shapes)

    def guard(self, limit: int, gates: bool) -> Guard:
        """Returns a guard of the step; see there."""
        assert self.variables is not None  # the step was prepared
        metrics = [v for metric in self.fed_metrics for v in metric.variables]
        agree = self._placement.gather if self._placement.replicas > 1 else None
        optimizers = optimizers_of(self.owner).values()
        return Guard(self.variables, metrics, optimizers, self.owner.primary, limit, agree, gates)

    def compiled(
        self, step: Callable[..., Any], jit_compile: bool | None, more: Sequence[Any] = ()
    ) -> CompiledStep:
        """Compiles a step that uses the variables of this one, and assigns some more."""
        assert self.variables is not None  # the step was prepared
        return self._compiled(step, self.variables, jit_compile, more=more)

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
            # What every process is given it computes whole: a size that is no batch's.
            state = replica_state(self.owner, self.prepare(inputs))
            step = function(self._placement.step(self._finished, 1, state))
            self._update = self._placement.program(step, 1, state)
        return self._update(*inputs)

    def single_step(self, kept: bool) -> CompiledStep:
        """Returns the step compiled for one batch per call, with the compiler in use.

        Args:
            kept: Whether its programs are kept for the next call.
        """
        assert self.variables is not None  # the step was prepared
        jit_compile = self.tuning.jit_compile
        key = f"one batch, {jit_compile}"
        step = self._compiled(self.step, self.variables, jit_compile)
        return self._steps.setdefault(key, TunedStep(step)).step if kept else step

    def tuned(
        self,
        data: EpochReader,
        max_steps: int,
        steps_per_execution: int | None,
        length: RunLength,
    ) -> CompiledStep:
        """Returns the compiled step for the batches of an epoch, tuned for its first batch.

        Args:
            data: The epoch. Its first batch is used for timing, and stays in its place.
            max_steps: The steps that may run in one call at most.
            steps_per_execution: The steps of one call if the user fixed them.
            length: How long the run is.
        """
        assert self.variables is not None  # the step was prepared
        if self.run_eagerly:
            return self._compiled(self.step, self.variables, None)
        mode = get_jit_compile()
        modes = self._placement.compilers(mode, backend.candidates())
        held = self.guarded.limit is not None
        held = held and num_state_bytes(self.variables) <= MAX_HELD_BYTES
        key = mode, steps_per_execution, max_steps > 1, kinds_of(data.example)
        kept = key if not held else (*key, "held")
        tuned = self._steps.get(kept)
        if tuned is None:
            step = self._compiled(self.step, self.variables, _fixed_mode(), held)
            tuned = self._steps[kept] = TunedStep(step, Autotuner(self._timings(data, kept)))
            warn_of_whole_batches(self._placement, batch_size_of(data.example))
            saved = self._saved_tunings.get(str(kept))
            if saved is not None and saved[0] in modes:  # else of another number of devices
                tuned.tuner.tuning = Tuning(*saved)
                tuned.tuner.tuned = True
        most = self.max_batches(data.example)
        ways = self._ways(modes)
        limits = Limits(ways, max_steps, most, steps_per_execution, length)

        def time_step(tuning: Tuning) -> Timing:
            tuned.step.jit_compile = tuning.jit_compile
            return tuned.step.time(data.sample(tuning.steps_per_execution))

        self.tuning = tuned.tuner(limits, time_step, self._undone)
        tuned.step.jit_compile, tuned.step.steps_per_execution = self.tuning
        if steps_per_execution is not None or self._placement.count > 1:
            tuned.step.pace = Pace(fixed=True)
        elif (cost := tuned.tuner.timings.costs.get(self.tuning)) is not None:
            tuned.step.pace = Pace(cost.secs)
        return tuned.step

    def _timings(self, data: EpochReader, settings: tuple[Any, ...]) -> Timings:
        """Returns what steps of this kind took; of several processes each would know another."""
        cache = active_cache()
        if cache is None or self._placement.count > 1 or self.variables is None:
            return Timings()
        settings = (*settings, self._placement.replicas)
        return cache.timings(kind_of_step(self.owner, self.variables, data.example, settings))

    def _ways(self, modes: Sequence[bool]) -> list[Way]:
        """Returns the ways to run the step that are worth considering, the usual one first."""
        ways = backend.ways(has_convolutions(held_layers(self.owner)))
        known = [Way(*way) for way in ways if way[0] in modes]
        known = known or [Way(mode, True) for mode in modes]
        return known if times_ways() else known[:1]

    def max_batches(self, example: Any) -> int:
        """Returns how many batches one call may take."""
        most = max(1, MAX_BYTES // max(1, num_bytes(example)))
        return most if self._placement.count == 1 else min(most, STEPS_OF_PROCESSES)

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
        return self.inference("evaluation", self.evaluation_step, inputs)

    def inference(
        self, name: str, written: Callable[..., Any], inputs: Sequence[Any]
    ) -> tuple[CompiledStep, list[keras.Variable]]:
        """Returns a function of a batch as a compiled step, and the variables that it assigns.

        Args:
            name: What it is kept under.
            written: The function.
            inputs: The arguments of a first batch.
        """
        self.refresh()
        key = f"{name}, {'eager' if self.run_eagerly else get_jit_compile()}"
        known = self._evaluation.get(key)
        if known is None:
            # A resumed run validates with the compiler that its first validation had.
            saved = self._saved_tunings.get(key)
            modes = (None, *self._placement.compilers(get_jit_compile(), backend.candidates()))
            mode = saved[0] if saved and saved[0] in modes else self.tuning[0]
            seen = backend.trace(written, inputs, self.run_eagerly)
            if any(not is_built(layer) for layer in held_layers(self.owner)):
                seen = backend.trace(written, inputs, self.run_eagerly)
            variables = StepVariables.of(seen)
            if self.variables is None:
                self._placement = backend.placement()
                self._placement.check(held_parts(self.owner))
                self._place(variables)
            step = self._compiled(written, variables, mode, of=key)
            known = self._evaluation[key] = step, variables.assigned
        return known

    def finalize(self) -> None:
        """Ends training as Keras does: weights become their moving average where one is kept."""
        for update in self.variables.updates if self.variables is not None else ():
            update.optimizer.finalize_variable_values(update.variables)

    # ------------------------------------------------------------------ checkpoints

    def get_state(self) -> dict[str, dict[str, Any]]:
        """Returns the tunings and shapes by key, for a resumed run to compute the same bits."""
        chosen = {
            str(key): list(tuned.tuner.tuning)
            for key, tuned in self._steps.items()
            if tuned.tuner.tuning is not None
        }
        evaluation = {key: [step.jit_compile, 1] for key, (step, _) in self._evaluation.items()}
        return {
            "ways": self._saved_tunings | chosen | evaluation,
            "shapes": {key: shapes.get_state() for key, shapes in self._shapes.items()},
        }

    def set_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Uses what `get_state` returned."""
        self._saved_tunings = dict(state.get("ways", {}))
        for key, shapes in state.get("shapes", {}).items():
            self._shapes.setdefault(key, Shapes()).set_state(shapes)


def _fixed_mode() -> bool | None:
    return None if (mode := get_jit_compile()) == "auto" else mode
