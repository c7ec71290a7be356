"""The sweep of a range test: training steps at exponentially growing learning rates.

The loss over the rate is flat at first, then falls, then diverges (Smith, "Cyclical Learning Rates
for Training Neural Networks", arXiv:1506.01186, section 3.3). Trials at some of the rates follow.
The sweep knows no trainer: it takes a function that runs a step, a reader, the optimizer, and the
variables to restore afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import numbers
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.progress import Progress

from polus.data import DataReader, StepBlock
from polus.host import to_host
from polus.lr_finder.curve import (
    HALF_WIDTH,
    MIN_STEPS,
    Array,
    SuggestionName,
    highest_allowed,
    smooth,
)
from polus.lr_finder.result import LRFinderResult, check_suggestion
from polus.lr_finder.swept import SetRate, check_used, swept_rate
from polus.lr_finder.trials import MAX_STATE_BYTES, SCHEDULES, Contest, Plan, plan, schedule_factor
from polus.signals import Signals
from polus.state import Snapshot

MAX_BYTES = 2**28  # of batches kept in memory, for their baseline and for the trials
TRIAL_STEPS = 5  # of all trials together, per step of the sweep: see docs/learning_rate.md
SHARE_OF_RUN = 10  # where the run's length is known, the trials cost at most a tenth of it


logger = logging.getLogger("polus.lr_finder")


@dataclass(frozen=True)
class SweepSettings:
    """The settings of a range test, checked. `BaseTrainer.lr_finder` describes them."""

    start_lr: float = 1e-7
    end_lr: float = 10.0
    num_steps: int = 100
    stop_factor: float = 4.0
    suggestion: SuggestionName = "tried"
    max_steps: int | None = None
    for_schedule: str | None = None
    monitor: str | None = None

    def __post_init__(self) -> None:
        check_suggestion(self.suggestion)
        if self.for_schedule not in (None, *SCHEDULES):
            raise ValueError(
                f"for_schedule must be None or one of {', '.join(map(repr, SCHEDULES))}, got "
                f"{self.for_schedule!r}."
            )
        if self.max_steps is not None and (
            isinstance(self.max_steps, bool)
            or not isinstance(self.max_steps, numbers.Integral)
            or self.max_steps < 0
        ):
            raise ValueError(
                f"max_steps must be an integer of at least 0, got {self.max_steps!r}. 0 runs no "
                "trials."
            )
        for name in ("start_lr", "end_lr", "stop_factor"):
            if not isinstance(getattr(self, name), numbers.Real):
                raise TypeError(f"{name} must be a number, got {name}={getattr(self, name)!r}.")
        if not 0 < self.start_lr < self.end_lr < math.inf:
            raise ValueError(
                "start_lr must be positive and less than end_lr, got "
                f"start_lr={self.start_lr!r} and end_lr={self.end_lr!r}."
            )
        if not isinstance(self.num_steps, numbers.Integral) or self.num_steps < MIN_STEPS:
            raise ValueError(
                f"num_steps must be an integer of at least {MIN_STEPS}, got {self.num_steps!r}."
            )
        if not self.stop_factor > 1:
            raise ValueError(
                f"stop_factor must be greater than 1, got {self.stop_factor!r}. Use math.inf to "
                "stop only at a loss that is not finite."
            )

    @property
    def rates(self) -> Array:
        """The learning rates, evenly spaced on a log scale."""
        return np.geomspace(self.start_lr, self.end_lr, self.num_steps)

    def trial_steps(self, run_steps: int | None) -> int:
        """Returns the most steps that all trials together may run.

        Args:
            run_steps: The steps of the training that the rate is for; None if not known.
        """
        if self.suggestion != "tried":
            return 0
        if self.max_steps is not None:
            return self.max_steps
        steps = TRIAL_STEPS * self.num_steps
        return steps if run_steps is None else min(steps, run_steps // SHARE_OF_RUN)


@dataclass(frozen=True)
class StepFunctions:
    """What a range test runs.

    Attributes:
        run_step: Runs one training step on a block of one batch and returns its loss.
        validate: Returns the losses of the validation batches; None without validation data.
        run_steps: The steps of the training that the rate is for; None if not known.
    """

    run_step: Callable[[StepBlock], Any]
    validate: Callable[[], list[float]] | None = None
    run_steps: int | None = None


def run_range_test(
    functions: StepFunctions,
    reader: DataReader,
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[Any],
    settings: SweepSettings,
) -> LRFinderResult:
    """Runs the sweep, its baseline and the trials, and restores all that the steps changed.

    State is restored after an error as well. Signals are held until the step in progress is done.
    Ctrl-C during the trials ends them, and the result has those so far.

    Args:
        functions: The training step and the validation.
        reader: The data, read from the start again as often as needed.
        optimizer: The optimizer whose learning rate is swept.
        variables: All variables that the functions change, those of metrics included.
        settings: The rates, when to stop, and which suggestion to make.

    Raises:
        ValueError: If the step does not use the optimizer.
    """
    check_used(optimizer, variables)
    most = settings.trial_steps(functions.run_steps)
    logger.info(
        "The range test runs up to %d steps, and %s.",
        2 * settings.num_steps,
        f"then trials with up to {most} together" if most else "no trials",
    )
    with Signals() as signals:
        snapshot = Snapshot(variables)
        try:
            with (
                swept_rate(optimizer) as set_rate,
                _progress(2 * settings.num_steps + most) as report,
            ):
                test = _RangeTest(functions, reader, settings, signals, snapshot, set_rate, report)
                return test.with_trials(test.curve(), most)
        finally:
            snapshot.restore()


@dataclass(frozen=True)
class _RangeTest:
    """A range test in progress; each part of it begins at the snapshot."""

    functions: StepFunctions
    reader: DataReader
    settings: SweepSettings
    signals: Signals
    snapshot: Snapshot
    set_rate: SetRate
    report: Callable[[str], None]

    def loss_of(self, block: StepBlock, stage: str) -> float:
        loss = float(to_host(self.functions.run_step(block)).item())
        self.report(f"{stage}, loss {loss:.4g}")
        self.signals.check()
        return loss

    def curve(self) -> LRFinderResult:
        """Runs the sweep and its baseline."""
        with contextlib.closing(_batches_forever(self.reader, self.signals.check)) as blocks:
            losses, kept = _sweep(self.loss_of, blocks, self.set_rate, self.settings)
        # From the same weights and seeds, so that only the rate differs.
        self.snapshot.restore()
        self.set_rate(0.0)
        baseline = [self.loss_of(block, "Baseline at rate 0") for block in kept]
        return LRFinderResult(
            self.settings.rates[: len(losses)],
            np.array(losses),
            self.settings.suggestion,
            np.array(baseline) if kept else None,
            monitor=self.settings.monitor or "loss",
        )

    def with_trials(self, result: LRFinderResult, most: int) -> LRFinderResult:
        """Runs the trials, with `most` steps at most, and returns the result with them."""
        planned = _planned(result, most, self.snapshot)
        if not planned.rates:
            return result

        def run_step(block: StepBlock, rate: float) -> float:
            self.set_rate(rate)
            return self.loss_of(block, f"Trial at rate {rate:.1e}")

        self.snapshot.restore()
        functions = self.functions
        factor = schedule_factor(self.settings.for_schedule, planned, functions.run_steps)
        contest = Contest(planned, self.snapshot, run_step, functions.validate, factor)
        method: SuggestionName = "tried"
        with contextlib.closing(_batches_forever(self.reader, self.signals.check)) as blocks:
            try:
                first = next(blocks)
                chunk = max(1, MAX_BYTES // max(1, _num_bytes(first)))
                contest.run(itertools.chain([first], blocks), chunk, self.reader.paused)
            except KeyboardInterrupt:
                if self.signals.second or not self.signals.dismiss():
                    raise
                logger.warning("The trials were interrupted; the result has those so far.")
                method = "tried" if contest.decided else "steep"
        return replace(result, method=method, trials=tuple(contest.trials))


def _planned(result: LRFinderResult, most: int, snapshot: Snapshot) -> Plan:
    """Returns the trials at the rates that the curve leaves open, and logs what they cost."""
    if result.failure_reason or not most:
        return Plan((), ())
    size = 4 * sum(math.prod(variable.shape) for variable in snapshot.variables)
    trials = plan(*result.open_rates, most, MAX_STATE_BYTES // max(1, size))
    if trials.rates:
        logger.info(
            "Trying %d learning rates from %.1e to %.1e, with up to %d steps.",
            len(trials.rates),
            trials.rates[0],
            trials.rates[-1],
            trials.num_steps,
        )
    else:
        logger.info(
            "No rates are tried, since %d step%s not suffice; the curve decides. Pass max_steps= "
            "to allow more.",
            most,
            " does" if most == 1 else "s do",
        )
    return trials


def _sweep(
    loss_of: Callable[[StepBlock, str], float],
    blocks: Iterator[StepBlock],
    set_rate: SetRate,
    settings: SweepSettings,
) -> tuple[list[float], list[StepBlock]]:
    """Returns the losses up to the divergence, and their batches if they fit in memory."""
    losses: list[float] = []
    kept: list[StepBlock] = []
    has_diverged = _divergence_test(settings)
    for rate, block in zip(settings.rates, blocks, strict=False):
        if not losses:
            keep = _num_bytes(block) * settings.num_steps <= MAX_BYTES
        if keep:
            kept.append(block)
        set_rate(rate)
        losses.append(loss_of(block, f"Rate {rate:.1e}"))
        if has_diverged(losses):
            break
    return losses, kept


def _divergence_test(settings: SweepSettings) -> Callable[[list[float]], bool]:
    """Returns a function to call with all losses so far after each step of a sweep."""
    # The smoothed loss is read half a window back, where smoothing sees both sides of it. A sweep
    # hardly longer than the window would be over by then, so at most a quarter of the sweep back.
    rates = settings.rates
    decades = math.log10(rates[1] / rates[0])
    reach = max(3, min(math.ceil(HALF_WIDTH / decades), len(rates) // 4))
    smoothed: list[float] = []

    def has_diverged(losses: list[float]) -> bool:
        if not math.isfinite(losses[-1]):
            return True
        if len(losses) <= 2 * reach:
            return False
        window = slice(len(losses) - 2 * reach - 1, len(losses))
        smoothed.append(float(smooth(rates[window], np.array(losses[window]))[reach]))
        return smoothed[-1] > highest_allowed(smoothed, settings.stop_factor)

    return has_diverged


def _num_bytes(block: StepBlock) -> int:
    """Returns how much memory it takes to keep a block."""
    if block.unpack is not None:  # its examples stay on the device anyway
        return 0
    return sum(to_host(leaf).nbytes for leaf in keras.tree.flatten(block.payload))


def _batches_forever(reader: DataReader, poll: Callable[[], None]) -> Generator[StepBlock]:
    """Yields the batches one by one, epoch after epoch."""
    for epoch in itertools.count():
        data = reader.epoch(epoch)
        data.peek()  # raises if there is no data (left)
        with contextlib.closing(data.blocks(handle_signals=poll)) as blocks:
            yield from blocks


@contextlib.contextmanager
def _progress(num_steps: int) -> Iterator[Callable[[str], None]]:
    """Shows a progress bar on a terminal and yields a function that advances it by one step."""
    console = Console(stderr=True)
    shown = console.is_terminal and logger.isEnabledFor(logging.INFO)
    with Progress(console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=num_steps)
        yield lambda stage: progress.update(task, advance=1, description=stage)
