"""What a trainer keeps between calls of its methods, and how its step is compiled."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from polus.steps.executor import StepExecutor, StepOwner
from polus.training.checks import adapt_assigned_metrics, explain_argument_errors
from polus.training.config import TrainConfig, learning_rate_set
from polus.training.evaluation import evaluation_step
from polus.training.parts import TrainerParts
from polus.training.run import Run


class Engine:
    """The executor of a trainer's step, and what `train` remembers.

    Args:
        trainer: The trainer.

    Attributes:
        arguments: The arguments of `train` that `changing_train_config` keeps.
        run: The run in progress, else None.
        steps: The number of steps that earlier calls of `train` asked for.
        epochs: The number of the data's epochs that earlier calls of `train` trained.
        output_shape: The shape of the model's output when a step was last traced, if it has one.
    """

    def __init__(self, trainer: StepOwner) -> None:
        self._executor = StepExecutor(
            trainer,
            functools.partial(uncompiled, trainer, "train_step"),
            functools.partial(evaluation_step, trainer),
        )
        self._weighted = list(getattr(trainer, "weighted_metrics", ()))
        self.arguments: dict[str, Any] = {}
        self.run: Run | None = None
        self.steps = 0
        self.epochs = 0
        self.output_shape: tuple[int | None, ...] | None = None

    @property
    def executor(self) -> StepExecutor:
        """What prepares, compiles and tunes the step, with the trainer's present metrics."""
        self._weighted = adapt_assigned_metrics(self._executor.owner, self._weighted)
        return self._executor

    def give_copy(self, trainer: Any) -> None:
        """Gives a copied trainer an engine of its own, with the same arguments of `train`."""
        trainer.__dict__["_engine"] = engine = Engine(trainer)
        engine.arguments |= self.arguments

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the prefetch thread from making batches.

        Held while evaluation restores the global random state, so that the thread does not draw
        from it meanwhile.
        """
        with contextlib.nullcontext() if self.run is None else self.run.reader.paused():
            yield

    @contextlib.contextmanager
    def running(self, trainer: TrainerParts, config: TrainConfig) -> Iterator[Run]:
        """Begins a run, from its newest checkpoint if there is one, and ends it.

        Meanwhile it is the run in progress. Afterwards what it trained is counted.
        """
        trainer.early_stop = False
        with learning_rate_set(trainer.optimizer, config.learning_rate):
            run = Run(trainer, self.executor, config, self.steps, self.epochs)
            if config.resume is not None:
                from polus.checkpoint import Checkpoint, has_checkpoint, resume_run

                if not any(isinstance(callback, Checkpoint) for callback in config.callbacks):
                    run.logger.warning(
                        "resume=%r says where to continue from, and nothing saves to it. If this "
                        "run is to survive as well, add Checkpoint(%r) to the callbacks, or pass "
                        "run_dir instead.",
                        str(config.resume),
                        str(config.resume),
                    )
                run.resuming = has_checkpoint(config.resume)
            explained = explain_argument_errors(functools.partial(_seen_batches, run))
            with self._in_progress(run), run.running(), explained:
                if config.resume is not None:
                    resume_run(run, config.resume)
                yield run

    @contextlib.contextmanager
    def _in_progress(self, run: Run) -> Iterator[None]:
        before, self.run = self.run, run
        first = run.reader.first_epoch
        eager = self.executor.set_run_eagerly(run.config.run_eagerly)
        self.executor.set_norms(run.config.record)
        try:
            yield
        finally:
            self.run = before
            self.executor.set_run_eagerly(eager)
            if before is not None:  # else the next run is likely to be like this one
                self.executor.set_norms(before.config.record)
            # A run that was resumed has also trained the data's epochs before its checkpoint.
            self.epochs += run.reader.first_epoch - first + run.epoch
        if not run.open_ended:
            self.steps += run.epochs * (run.steps or 0)


def _seen_batches(run: Run) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields batches that may explain an error, with the words for where they are."""
    if run.executor.example is None:
        return
    yield "The first batch", run.executor.example
    if run.block is not None and run.step:
        yield f"Batch {run.step + 1} of epoch {run.epoch + 1}", run.block.batch(0)


class CompiledMethod:
    """A `train_step` that runs one compiled update when it is called outside of `train`.

    Through `super()` or on the class it is the plain function, which becomes a part of the step
    that calls it.

    Args:
        fn: The function.
        update: Returns what runs one compiled update of a trainer.
    """

    def __init__(self, fn: Callable[..., Any], update: Callable[[Any], Callable[..., Any]]) -> None:
        functools.update_wrapper(self, fn)  # type: ignore[arg-type]
        self.fn = fn
        self.update = update

    def __get__(self, trainer: Any, owner: type | None = None) -> Callable[..., Any]:
        if trainer is None:
            return self.fn
        if inspect.getattr_static(type(trainer), self.fn.__name__, None) is self:
            update: Callable[..., Any] = self.update(trainer)
            return update
        bound: Callable[..., Any] = types.MethodType(self.fn, trainer)
        return bound


def uncompiled(trainer: object, name: str) -> Callable[..., Any]:
    """Returns a trainer's own step as it was written."""
    written = vars(trainer).get(name) or types.MethodType(getattr(type(trainer), name), trainer)
    step: Callable[..., Any] = written
    return step
