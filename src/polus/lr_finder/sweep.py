"""The learning-rate range test: what rate should this model, on this data, be trained with?

A hundred steps at rates that grow exponentially from far too small to far too large give a curve,
loss over rate: flat, then falling, then diverging (Smith, "Cyclical Learning Rates for Training
Neural Networks", arXiv:1506.01186, section 3.3). A suggestion is a point of that curve.

    result = trainer.lr_finder(dataset)
    print(result.suggestion, result.suggestions)
    result.plot("lr_finder.png")

or, for a function that returns a trainer with its training configuration,

    python -m polus.lr_finder package.module:init_trainer
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import itertools
import math
import numbers
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from polus.data import DataReader, StepBlock
from polus.data.isolated import isolated_copy
from polus.signals import Signals
from polus.state import Snapshot, random_state_kept
from polus.steps.compiled import CompiledStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from polus.training import BaseTrainer

Array = npt.NDArray[np.float64]


HALF_WIDTH = 0.5  # of the smoothing window, in powers of ten: 6 of 100 steps from 1e-7 to 10
MAX_BYTES = 2**28  # of batches kept for their baseline
ROUNDING = 1e-6  # of losses in float32, relative


def smooth(rates: Array, losses: Array, half_width: float = HALF_WIDTH) -> Array:
    """Gives the losses, smoothed over the logarithm of the rate.

    At each rate a line is fitted to the losses around it, nearer ones weighing more, and read there
    (local linear regression: Cleveland 1979, doi:10.1080/01621459.1979.10481038). So the curve does
    not lag behind, as a running average does, and a constant or a straight line stays what it is,
    up to its two ends.

    Args:
        rates: Positive and rising, shape `(n,)`.
        losses: Finite, shape `(n,)`.
        half_width: How far the window reaches to either side, in powers of ten; it is widened until
            it holds two neighbours on each side.
    """
    if len(losses) < 2:
        return losses.copy()
    smoothed: Array = _smoother(*_window(rates, half_width)) @ losses
    return smoothed


def _window(rates: Array, half_width: float) -> tuple[Array, Array]:
    """Distance in powers of ten, and weight, of each rate (column) seen from each (row)."""
    position = np.log10(rates)
    half_width = max(half_width, 3 * np.diff(position).max())
    distance = position - position[:, None]
    return distance, np.maximum(0, 1 - np.abs(distance) / half_width)


def _smoother(distance: Array, weight: Array) -> Array:
    """The matrix that takes losses to smoothed losses."""
    s0, s1, s2 = (np.sum(weight * distance**power, axis=1, keepdims=True) for power in (0, 1, 2))
    matrix: Array = weight * (s2 - s1 * distance) / (s0 * s2 - s1**2)
    return matrix


def remove_batch_noise(rates: Array, losses: Array, baseline: Array) -> Array:
    """Gives the losses, had all batches been equally hard.

    How hard a batch is shows its loss with untrained weights, the baseline; what is above its mean
    is taken off (a control variate). Not all of it where the model is no longer the untrained one:
    the share is that by which the losses around follow the baseline, both less their smoothed
    values (local regression of residuals: Speckman 1988), between 0 and 1.

    Args:
        rates: As for `smooth`.
        losses: As for `smooth`.
        baseline: The same batches' losses at a rate of zero; finite, shape `(n,)`.
    """
    _, weight = _window(rates, HALF_WIDTH)
    hardness = baseline - smooth(rates, baseline)
    together = weight @ (hardness * (losses - smooth(rates, losses)))
    alone = weight @ hardness**2
    share = np.divide(together, alone, out=np.zeros_like(alone), where=alone > 0)
    cleared: Array = losses - np.clip(share, 0, 1) * (baseline - baseline.mean())
    return cleared


def noise(rates: Array, losses: Array) -> Array:
    """Gives the standard deviation of the losses around their curve, at each rate.

    From the steps between neighbours, those around and those of the whole curve, the larger: it
    grows towards the divergence, and few steps alone say little.
    """
    _, weight = _window(rates, HALF_WIDTH)
    steps = np.diff(losses)
    around = np.sqrt(weight[:, 1:] @ steps**2 / weight[:, 1:].sum(axis=1) / 2)
    # The median step is 0.954 standard deviations of normal noise.
    larger: Array = np.maximum(around, np.median(np.abs(steps)) / 0.954)
    return larger


def has_descent(rates: Array, losses: Array) -> bool:
    """Whether the curve of the losses falls anywhere, by more than its noise.

    It does where its smoothed value is below the median of those before by more than five standard
    errors. Of 2,000 curves of pure noise .2 % get that far, and 1.2 % at most where the noise grows
    up to a hundredfold towards the end.
    """
    matrix = _smoother(*_window(rates, HALF_WIDTH))
    smoothed = matrix @ losses
    before = np.array([np.median(smoothed[: step + 1]) for step in range(len(smoothed))])
    deviation = noise(rates, losses) + ROUNDING * np.abs(smoothed)
    errors = deviation * np.sqrt(np.sum(matrix**2, axis=1))
    return bool(np.any(before - smoothed > 5 * errors))


# The suggestions, from a curve that falls somewhere: rates and losses, shape (n,), give a rate.


def minimum(rates: Array, losses: Array) -> float:
    """Gives a tenth of the rate with the lowest loss, fast.ai's first rule of thumb."""
    return float(rates[losses.argmin()]) / 10


def steep(rates: Array, losses: Array) -> float:
    """Gives the rate from which the loss falls most per log rate, looking only before its minimum.

    What falls after the minimum is the noise of a diverging training.
    """
    before = slice(int(losses.argmin()) + 1)
    slopes = np.diff(losses[before]) / np.diff(np.log(rates[before]))
    return float(rates[slopes.argmin()])


def valley(rates: Array, losses: Array) -> float:
    """Gives the rate in the middle of the longest descent, as fastai defines it.

    The descent is the longest falling subsequence of the losses; of several equally long ones the
    one that ends first. With its length L, it counts as the L steps up to its last one, and the
    suggestion stands half a third after the first third. Found by patience sorting, in O(n log n):
    `lowest[k]` is the least steep end of a descent of k + 1 losses (Fredman 1975,
    doi:10.1016/0012-365X(75)90103-X).
    """
    lowest: list[float] = []
    end = 0
    for step, height in enumerate(-losses):
        k = bisect_left(lowest, height)
        if k == len(lowest):
            end = step
        lowest[k : k + 1] = [height]
    length = len(lowest)
    return float(rates[max(0, end - length + length // 3 + length // 6)])


def slide(rates: Array, losses: Array, interval: int = 15, threshold: float = 0.005) -> float:
    """Gives the left end of an interval slid leftwards while the slopes at its ends differ.

    The slopes are per step, and the interval starts at the end of the curve: it leaves behind first
    the divergence, then the descent (Novak's "learning rate slide rule", as fastai defines it).
    The curve must be longer than `interval`.
    """
    slope = np.gradient(losses)
    alike = np.abs(slope[interval:] - slope[:-interval]) <= threshold
    reached = int(np.flatnonzero(alike)[-1]) + 1 if alike.any() else 0
    return float(rates[min(reached, len(alike) - 1)])


MIN_STEPS = 16  # what slide needs; less of a curve is not worth reading either

SUGGESTIONS: dict[str, Callable[[Array, Array], float]] = {
    f.__name__: f for f in (steep, valley, slide, minimum)
}


@dataclass(frozen=True, repr=False, eq=False)
class LRFinderResult:
    """What a range test saw, and the rates it suggests.

    Args:
        rates: The swept learning rates, positive and rising, shape `(n,)`.
        losses: The loss of the step at each, as it came; the last may be NaN or infinite.
        method: Which of `suggestions` is `suggestion`. The default was the best of four in a
            benchmark: see docs/learning_rate.md.
        baseline: The losses of the same batches at a rate of zero, shape `(n,)`: by them the
            smoothed losses are cleared of what is the batches' doing. None where there are none.

    Raises:
        ValueError: For an unknown `method`.
    """

    rates: Array
    losses: Array
    method: str = "steep"
    baseline: Array | None = None

    def __post_init__(self) -> None:
        """Checks the name early: it would be a pity to find a typo after the sweep."""
        check_suggestion(self.method)
        object.__setattr__(self, "rates", np.asarray(self.rates, np.float64))
        object.__setattr__(self, "losses", np.asarray(self.losses, np.float64))
        if self.baseline is not None:
            object.__setattr__(self, "baseline", np.asarray(self.baseline, np.float64))

    @cached_property
    def smoothed_losses(self) -> Array:
        """The losses, cleared of batch noise and smoothed; NaN from where they are not finite."""
        n = self._num_finite
        smoothed = smooth(self.rates[:n], self._readable)
        return np.append(smoothed, np.full(len(self.losses) - n, np.nan))

    @cached_property
    def _readable(self) -> Array:
        """The finite losses, as they are smoothed.

        A loss of thousands behind the minimum would lift its neighbours in the window as well, and
        hide the minimum. So losses count only up to the highest before the minimum and once the
        height of the descent above it.
        """
        n = self._num_finite
        losses = self.losses[:n]
        if n:
            descent = losses[: losses.argmin() + 1]
            losses = np.minimum(losses, descent.max() + np.ptp(descent))
        if n < 2 or self.baseline is None or not np.isfinite(self.baseline[:n]).all():
            return losses
        return remove_batch_noise(self.rates[:n], losses, self.baseline[:n])

    @cached_property
    def suggestions(self) -> dict[str, float]:
        """Each suggestion by name; none of them where `suggestion` raises."""
        if self.failure_reason:
            return {}
        n = self._num_finite
        return {
            name: function(self.rates[:n], self.smoothed_losses[:n])
            for name, function in SUGGESTIONS.items()
        }

    @property
    def suggestion(self) -> float:
        """The suggested learning rate.

        Raises:
            ValueError: If the loss never fell, or diverged at once: such a curve suggests nothing.
        """
        if self.failure_reason:
            raise ValueError(f"no learning rate to suggest: {self.failure_reason}")
        return self.suggestions[self.method]

    @property
    def _num_finite(self) -> int:
        finite = np.isfinite(self.losses)
        return len(finite) if finite.all() else int(finite.argmin())

    @cached_property
    def failure_reason(self) -> str:
        """Why this curve suggests nothing, and what to try; empty if it does."""
        rates, losses, n = self.rates, self.smoothed_losses, self._num_finite
        if n < MIN_STEPS:
            return (
                f"the loss diverged within {len(rates)} steps, {n} of them finite, between the "
                f"rates {rates[0]:.1e} and {rates[-1]:.1e}, and fewer than {MIN_STEPS} show no "
                f"curve: sweep from a smaller start_lr, and check the data for NaN"
            )
        if has_descent(rates[:n], self._readable):
            return ""
        first, last = losses[0], self.losses[n - 1]
        seen = f"{first:.4g} at the rate {rates[0]:.1e}, {last:.4g} at {rates[n - 1]:.1e}"
        usual = np.median(noise(rates[:n], self.losses[:n])) + ROUNDING * abs(first)
        if n < len(rates) or last - first > 5 * usual:
            return (
                f"the loss diverged before it fell ({seen}): sweep from a smaller start_lr, and "
                f"check the model's initial weights and the scale of its inputs"
            )
        return (
            f"the loss never fell by more than its noise of {usual:.2g} ({seen}): sweep to a "
            f"larger end_lr or in more num_steps, and check that the loss depends on the "
            f"trainable weights"
        )

    def to_dict(self) -> dict[str, Any]:
        """Gives everything as lists and numbers for JSON; a loss that is not finite is None."""

        def listed(column: Array) -> list[float | None]:
            return [x if math.isfinite(x) else None for x in column.tolist()]

        return {
            "rates": listed(self.rates),
            "losses": listed(self.losses),
            "baseline": None if self.baseline is None else listed(self.baseline),
            "smoothed_losses": listed(self.smoothed_losses),
            "method": self.method,
            "suggestions": self.suggestions,
        }

    def __repr__(self) -> str:
        swept = f"{len(self.rates)} steps from {self.rates[0]:.1e} to {self.rates[-1]:.1e}"
        if self.failure_reason:
            return f"LRFinderResult({swept}, no suggestion: {self.failure_reason})"
        rest = ", ".join(f"{k}={v:.2e}" for k, v in self.suggestions.items() if k != self.method)
        return f"LRFinderResult({swept}, suggestion={self.suggestion:.2e} ({self.method}), {rest})"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws the raw and the smoothed loss over the rate, with each suggestion marked and named.

        Args:
            path: Where to save the picture; its suffix gives the format. Not saved if None.

        Returns:
            The figure, 800 pixels wide, made without pyplot: it needs no display, and stays out of
            the user's own figures.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install polus[plot]") from error

        figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
        axes = figure.add_subplot(
            xscale="log", xlabel="learning rate (log scale)", ylabel="loss", title="Range test"
        )
        axes.plot(self.rates, self.losses, ".", color="0.65", label="raw")
        axes.plot(self.rates, self.smoothed_losses, color="black", label="smoothed")
        for (name, rate), marker in zip(self.suggestions.items(), "osD^", strict=False):
            chosen = name == self.method
            height = np.interp(np.log(rate), np.log(self.rates), self.smoothed_losses)
            (point,) = axes.plot(
                rate,
                height,
                marker,
                markersize=11 if chosen else 8,
                label=f"{name} {rate:.1e}" + (" (chosen)" if chosen else ""),
            )
            if chosen:
                axes.axvline(rate, color=point.get_color(), linestyle=":")
        # The divergence would press the descent flat: what counts is the curve up to its minimum.
        known = self.losses[: self._num_finite]
        if len(known):
            fall = known[: known.argmin() + 1]
            margin = 0.15 * (np.ptp(fall) or np.ptp(known) or 1.0)
            axes.set_ylim(known.min() - margin, fall.max() + 2 * margin)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper")  # inside it would hide losses
        if path is not None:
            figure.savefig(path)
        return figure


def check_suggestion(name: str) -> None:
    """Raises ValueError for a name that is none of `SUGGESTIONS`."""
    if name not in SUGGESTIONS:
        meant = difflib.get_close_matches(name, SUGGESTIONS, n=1)
        hint = f"did you mean {meant[0]!r}?" if meant else f"there are {', '.join(SUGGESTIONS)}"
        raise ValueError(f"there is no suggestion {name!r}: {hint}")


# The sweep


def find(
    trainer: BaseTrainer,
    dataset: Any,
    use_lr_found: bool,
    start_lr: float,
    end_lr: float,
    num_steps: int,
    stop_factor: float,
    suggestion: str,
    optimizer: Any,
) -> LRFinderResult:
    """Runs the range test of `BaseTrainer.lr_finder`, which says what the arguments are.

    Everything that the step meets is put back, whatever ends the sweep: signals wait meanwhile.
    """
    check_suggestion(suggestion)
    _check_sweep(start_lr, end_lr, num_steps, stop_factor)
    config = trainer._train_config
    dataset = config.get("tf_dataset") if dataset is None else dataset
    if dataset is None:
        raise ValueError(
            "lr_finder needs a dataset: give it, or keep one: changing_train_config(tf_dataset=...)"
        )
    optimizer = trainer.optimizer if optimizer is None else optimizer
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"optimizer is the keras.optimizers.Optimizer to sweep, one that the training step "
            f"uses, for example trainer.optimizer; got {optimizer!r}"
        )
    if use_lr_found and not _settable(optimizer):
        raise ValueError(
            "use_lr_found=True sets the optimizer's rate to a number, and this one's rate is a "
            "schedule. Leave use_lr_found out and build the schedule anew, for example "
            "keras.optimizers.schedules.CosineDecay(result.suggestion, decay_steps=10_000)"
        )
    reader = DataReader(isolated_copy(dataset), config.get("custom_data_transform_f"))
    fed = [metric.has_samples for metric in trainer.metrics]
    with random_state_kept():
        inputs = reader.epoch(0).example
    # Outside of random_state_kept: what building draws, training would have drawn.
    trainer._refresh()
    trainer._build(inputs)
    variables = trainer._survey(inputs)
    if not {id(v) for v in optimizer.variables} & {id(v) for v in variables}:
        raise ValueError(
            f"the training step does not use the optimizer {optimizer.name!r}, so its rate changes "
            f"nothing. Give the one to sweep: lr_finder(dataset, optimizer=trainer.d_optimizer)"
        )
    dispatch = CompiledStep(trainer._step, trainer._jit_compile)
    if _settable(optimizer):  # else a schedule is compiled into the programs
        dispatch = trainer._dispatches.setdefault(("lr_finder", trainer._jit_compile), dispatch)
    rates = np.geomspace(start_lr, end_lr, num_steps)
    with Signals() as signals:
        snapshot = Snapshot(variables)
        try:
            with _swept(optimizer) as set_rate:
                losses, baseline = _sweep(
                    dispatch, reader, rates, set_rate, stop_factor, snapshot.restore, signals.check
                )
        finally:
            snapshot.restore()
            for metric, was_fed in zip(trainer.metrics, fed, strict=True):
                metric.has_samples = was_fed
    result = LRFinderResult(rates[: len(losses)], losses, suggestion, baseline)
    trainer.logger.info("%r", result)
    if use_lr_found:
        old = float(optimizer.learning_rate)
        optimizer.learning_rate = result.suggestion
        trainer.logger.info("Learning rate: %.3g before, %.3g found.", old, result.suggestion)
    return result


def _sweep(
    dispatch: CompiledStep,
    reader: DataReader,
    rates: Array,
    set_rate: Callable[[float], Any],
    stop_factor: float,
    restore: Callable[[], None],
    poll: Callable[[], None],
) -> tuple[Array, Array | None]:
    """Gives the losses of steps at `rates`, up to the divergence, and the batches' baseline."""
    # The curve is judged half a window behind, where smoothing sees both sides of it. In a sweep of
    # little more than a window that would be at its end: a quarter of it has to do.
    decades = math.log10(rates[1] / rates[0])
    reach = max(3, min(math.ceil(HALF_WIDTH / decades), len(rates) // 4))
    smoothed: list[float] = []
    console = Console(stderr=True)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        contextlib.closing(_endless(reader, poll)) as blocks,
    ):
        task = progress.add_task("", total=2 * len(rates))

        def run(block: StepBlock, losses: list[float], doing: str) -> None:
            program, arguments = dispatch.prepare(block)
            outputs = program(*arguments)
            outputs = outputs["loss"] if isinstance(outputs, dict) else outputs
            losses.append(float(keras.ops.convert_to_numpy(outputs).item()))
            progress.update(task, advance=1, description=f"{doing}, loss {losses[-1]:.4g}")
            poll()

        losses: list[float] = []
        kept: list[StepBlock] = []
        for rate, block in zip(rates, blocks, strict=False):
            if not losses:
                keep = _num_bytes(block) * len(rates) <= MAX_BYTES
            if keep:
                kept.append(block)
            set_rate(rate)
            run(block, losses, f"rate {rate:.1e}")
            if not math.isfinite(losses[-1]):
                break
            if len(losses) > 2 * reach:
                window = slice(len(losses) - 2 * reach - 1, len(losses))
                smoothed.append(float(smooth(rates[window], np.array(losses[window]))[reach]))
                if smoothed[-1] > highest_allowed(smoothed, stop_factor):
                    break
        if not keep:
            return np.array(losses), None
        # From the same weights, with the same random numbers (unless the data draw some as well).
        restore()
        set_rate(0.0)
        baseline: list[float] = []
        progress.update(task, total=2 * len(losses))
        for block in kept:
            run(block, baseline, "the same batches, untrained")
    return np.array(losses), np.array(baseline)


def _num_bytes(block: StepBlock) -> int:
    """The memory that keeping a block takes."""
    if block.fetch is not None:  # from examples that live on the device anyway
        return 0
    return sum(
        np.asarray(keras.ops.convert_to_numpy(x)).nbytes for x in keras.tree.flatten(block.payload)
    )


def highest_allowed(losses: list[float], stop_factor: float) -> float:
    """Gives `stop_factor` times the best loss, or what corresponds to it for losses below zero.

    These may rise by `stop_factor - 1` times what they had fallen by, or their size if it is more.
    """
    best = min(losses)
    return best + (stop_factor - 1) * (best if best > 0 else max(-best, losses[0] - best))


def _endless(reader: DataReader, poll: Callable[[], None]) -> Generator[StepBlock]:
    """The batches one by one, from the start again where the dataset ends."""
    for epoch in itertools.count():
        data = reader.epoch(epoch)
        data.peek()  # raises where there is nothing to read (any more)
        with contextlib.closing(data.blocks(poll=poll)) as blocks:
            yield from blocks


def _settable(optimizer: Any) -> bool:
    return isinstance(optimizer.learning_rate, keras.Variable)


@contextlib.contextmanager
def _swept(optimizer: Any) -> Iterator[Callable[[float], Any]]:
    """Gives a function that sets the optimizer's rate; a schedule is put back at the end."""
    if _settable(optimizer):
        yield optimizer.learning_rate.assign
        return
    owner = getattr(optimizer, "inner_optimizer", optimizer)  # under loss scaling
    # Private to Keras: its public property gives a schedule's value, and takes no variable for one.
    schedule = owner._learning_rate
    # Named, so that Keras' counter of unnamed variables stays as it is.
    rate = keras.Variable(0.0, dtype="float32", trainable=False, name="swept_learning_rate")
    owner._learning_rate = rate
    try:
        yield rate.assign
    finally:
        owner.learning_rate = schedule  # which also makes the variable no longer the optimizer's


def _check_sweep(start_lr: float, end_lr: float, num_steps: int, stop_factor: float) -> None:
    if not 0 < start_lr < end_lr < math.inf:
        raise ValueError(
            f"the sweep rises from start_lr to end_lr, but got {start_lr} and {end_lr}"
        )
    if not isinstance(num_steps, numbers.Integral) or num_steps < MIN_STEPS:
        raise ValueError(f"num_steps is an integer of at least {MIN_STEPS}, but got {num_steps!r}")
    if not stop_factor > 1:
        raise ValueError(
            f"stop_factor is above 1 (math.inf to stop at NaN only), but got {stop_factor}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Runs the range test for a function that returns a trainer; prints and draws what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m polus.lr_finder",
        description="The learning-rate range test.",
        argument_default=argparse.SUPPRESS,  # what is not given is left to lr_finder
    )
    parser.add_argument(
        "function",
        help="package.module:init_trainer, which takes nothing and returns a trainer that knows "
        "its data: trainer.changing_train_config(tf_dataset=...)",
    )
    parser.add_argument("--plot", default="lr_finder.png", help="where to write the picture")
    parser.add_argument("--start-lr", type=float)
    parser.add_argument("--end-lr", type=float)
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--stop-factor", type=float)
    parser.add_argument("--suggestion", choices=SUGGESTIONS)
    options = vars(parser.parse_args(arguments))
    path = options.pop("plot")
    module, _, name = options.pop("function").partition(":")
    if not name:
        parser.error(f"write package.module:function, not {module!r}")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not module.startswith(str(error.name)):  # one that the user's module imports
            raise
        parser.error(f"there is no module {error.name!r} here or among the installed packages")
    if not callable(function):
        parser.error(f"the module {module!r} has no function {name!r}")
    trainer = function()
    from polus.training import BaseTrainer

    if not isinstance(trainer, BaseTrainer):
        parser.error(f"{module}:{name} returns a trainer, but gave {trainer!r}")
    result = trainer.lr_finder(**options)
    for method, rate in result.suggestions.items():
        print(f"{method:8} {rate:.2e}{'  (suggested)' if method == result.method else ''}")
    if result.failure_reason:
        print(f"no learning rate to suggest: {result.failure_reason}", file=sys.stderr)
    result.plot(path)
    print(f"picture: {path}")
    return bool(result.failure_reason)
