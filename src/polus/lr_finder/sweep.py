"""The sweep of a range test: training steps at exponentially growing learning rates.

The loss over the rate is flat at first, then falls, then diverges (Smith, "Cyclical Learning Rates
for Training Neural Networks", arXiv:1506.01186, section 3.3). The sweep knows no trainer: it takes
a function that runs a step, a reader, the optimizer, and the variables to restore afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.progress import Progress

from polus.data import DataReader, StepBlock
from polus.host import to_host
from polus.learning_rate import rate_owner, schedule_of, set_rate_variable
from polus.lr_finder.curve import (
    HALF_WIDTH,
    MIN_STEPS,
    Array,
    SuggestionName,
    highest_allowed,
    smooth,
)
from polus.lr_finder.result import LRFinderResult, check_suggestion
from polus.optimizers import MultiOptimizer
from polus.signals import Signals
from polus.state import Snapshot

MAX_BYTES = 2**28  # of batches kept in memory to record their baseline


@dataclass(frozen=True)
class SweepSettings:
    """The settings of a range test, checked. `BaseTrainer.lr_finder` describes them."""

    start_lr: float = 1e-7
    end_lr: float = 10.0
    num_steps: int = 100
    stop_factor: float = 4.0
    suggestion: SuggestionName = "steep"

    def __post_init__(self) -> None:
        check_suggestion(self.suggestion)
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


def run_range_test(
    run_step: Callable[[StepBlock], Any],
    reader: DataReader,
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[Any],
    settings: SweepSettings,
) -> LRFinderResult:
    """Runs the sweep and then its baseline, and restores everything that the steps changed.

    State is restored after an error as well. Signals are held until the step in progress is done.

    Args:
        run_step: Runs one training step on a block of one batch and returns its loss.
        reader: The data, read from the start again as often as needed.
        optimizer: The optimizer whose learning rate is swept.
        variables: All variables that the step changes, those of metrics included.
        settings: The rates, when to stop, and which suggestion to make.

    Raises:
        ValueError: If the step does not use the optimizer.
    """
    _check_used(optimizer, variables)
    with Signals() as signals:
        snapshot = Snapshot(variables)
        try:
            with (
                _swept_rate(optimizer) as set_rate,
                _progress(settings) as report,
                contextlib.closing(_batches_forever(reader, signals.check)) as blocks,
            ):

                def loss_of(block: StepBlock, stage: str) -> float:
                    loss = float(to_host(run_step(block)).item())
                    report(f"{stage}, loss {loss:.4g}")
                    signals.check()
                    return loss

                losses, kept = _sweep(loss_of, blocks, set_rate, settings)
                # From the same weights and seeds, so that only the rate differs.
                snapshot.restore()
                set_rate(0.0)
                baseline = [loss_of(block, "Baseline at rate 0") for block in kept]
        finally:
            snapshot.restore()
    return LRFinderResult(
        settings.rates[: len(losses)],
        np.array(losses),
        settings.suggestion,
        np.array(baseline) if kept else None,
    )


def _sweep(
    loss_of: Callable[[StepBlock, str], float],
    blocks: Iterator[StepBlock],
    set_rate: Callable[[float], Any],
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
def _progress(settings: SweepSettings) -> Iterator[Callable[[str], None]]:
    """Shows a progress bar on a terminal and yields a function that advances it by one step."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=2 * settings.num_steps)
        yield lambda stage: progress.update(task, advance=1, description=stage)


# The optimizer


def check_optimizer(optimizer: object, use_lr_found: bool) -> None:
    """Checks that an optimizer's learning rate can be swept and, for `use_lr_found`, be set.

    Raises:
        TypeError: If it is not an optimizer of Keras.
        ValueError: If it has several learning rates, or one that cannot be set.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "optimizer must be the keras.optimizers.Optimizer to sweep, one that the training step "
            f"uses, got {optimizer!r}. Pass, for example, optimizer=trainer.optimizer."
        )
    if isinstance(optimizer, MultiOptimizer):
        raise ValueError(
            f"The optimizer {optimizer.name!r} is a MultiOptimizer, which has a learning rate for "
            "each of its inner optimizers. Pass the one to sweep: "
            "lr_finder(dataset, optimizer=trainer.optimizer.optimizers[0])."
        )
    if use_lr_found and not has_rate_variable(optimizer):
        raise ValueError(
            "use_lr_found=True sets the learning rate, but the optimizer's rate is a schedule and "
            "cannot be set. Leave use_lr_found out and create a schedule from the suggestion, for "
            "example keras.optimizers.schedules.CosineDecay(result.suggestion, decay_steps=10_000)."
        )


def has_rate_variable(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether the learning rate is a variable, not a schedule or a callable."""
    return isinstance(optimizer.learning_rate, keras.Variable)


def _check_used(optimizer: keras.optimizers.Optimizer, variables: Sequence[Any]) -> None:
    if not {id(v) for v in optimizer.variables} & {id(v) for v in variables}:
        raise ValueError(
            f"The training step does not use the optimizer {optimizer.name!r}, so its rate has no "
            "effect. Pass the one to sweep: lr_finder(dataset, optimizer=trainer.d_optimizer)."
        )


@contextlib.contextmanager
def _swept_rate(optimizer: keras.optimizers.Optimizer) -> Iterator[Callable[[float], Any]]:
    """Yields a function that sets the learning rate. A schedule is put back at the end."""
    if has_rate_variable(optimizer):
        yield optimizer.learning_rate.assign
        return
    schedule = schedule_of(optimizer)
    # With a name, so that Keras' counter of unnamed variables does not advance.
    rate = keras.Variable(0.0, dtype="float32", trainable=False, name="swept_learning_rate")
    set_rate_variable(optimizer, rate)
    try:
        yield rate.assign
    finally:
        rate_owner(optimizer).learning_rate = schedule  # the setter also untracks the variable
