"""The result of a range test: the curve, the rates it suggests, and a plot."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from polus.figures import html_table, new_figure
from polus.host import counted, did_you_mean
from polus.lr_finder.curve import (
    MIN_STEPS,
    ROUNDING,
    SUGGESTIONS,
    Array,
    SuggestionName,
    has_descent,
    noise,
    remove_batch_noise,
    smooth,
)
from polus.lr_finder.trials import WIDEST_TIE, Trial, best_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_STEPS = 10  # that the drawn losses of trials are averaged over
LABELS: dict[str, str] = {"minimum": "minimum / 10:"}  # in the picture


@dataclass(frozen=True, repr=False, eq=False)
class LRFinderResult:
    """The curve recorded by a range test and the learning rates it suggests.

    Args:
        rates: The learning rates of the sweep, positive and increasing, shape `(n,)`.
        losses: The unsmoothed loss of the step at each rate, shape `(n,)`. The last one may be NaN
            or infinite.
        method: Which of `suggestions` is `suggestion`. "tried" stands for "steep" where no trial
            was judged; see docs/learning_rate.md for how often each is right.
        baseline: The losses of the same batches at a rate of zero, shape `(n,)`, used to remove the
            batch noise from the smoothed losses. None if they were not recorded.
        trials: The short trainings at some of the rates, in the order of the rates.
        monitor: The term of the step's result that `losses` are.

    Raises:
        ValueError: If `method` is not the name of a suggestion.
    """

    rates: Array
    losses: Array
    method: SuggestionName = "tried"
    baseline: Array | None = None
    trials: Sequence[Trial] = ()
    monitor: str = "loss"

    def __post_init__(self) -> None:
        check_suggestion(self.method)
        if self.method == "tried" and best_rate(self.trials) is None:
            object.__setattr__(self, "method", "steep")
        object.__setattr__(self, "rates", np.asarray(self.rates, np.float64))
        object.__setattr__(self, "losses", np.asarray(self.losses, np.float64))
        if self.baseline is not None:
            object.__setattr__(self, "baseline", np.asarray(self.baseline, np.float64))

    @cached_property
    def smoothed_losses(self) -> Array:
        """The losses without batch noise, smoothed. NaN from the first non-finite loss on."""
        n = self._num_finite
        smoothed = smooth(self.rates[:n], self._denoised)
        return np.append(smoothed, np.full(len(self.losses) - n, np.nan))

    @cached_property
    def _denoised(self) -> Array:
        """The finite losses without batch noise, clipped for smoothing.

        After the minimum, a loss in the thousands would lift its whole window and hide the minimum.
        Losses are therefore clipped at the highest loss before the minimum plus the height of the
        descent.
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
    def suggestions(self) -> dict[SuggestionName, float]:
        """The suggested rates by name. Empty if `suggestion` would raise."""
        if self.failure_reason:
            return {}
        n = self._num_finite
        tried = best_rate(self.trials) if self.method == "tried" else None
        found: dict[SuggestionName, float] = {} if tried is None else {"tried": tried}
        return found | {
            name: function(self.rates[:n], self.smoothed_losses[:n])
            for name, function in SUGGESTIONS.items()
        }

    @property
    def open_rates(self) -> tuple[float, float]:
        """The lowest and the highest rate worth a trial.

        They are a third of `minimum`, which is a thirtieth of the rate with the lowest loss, or
        `steep` if that is lower, and the last rate with a finite loss. Where outputs are normalized
        the loss may fall up to rates far above the best one.
        """
        lowest = min(self.suggestions["minimum"] / 3, self.suggestions["steep"])
        return lowest, float(self.rates[self._num_finite - 1])

    @property
    def suggestion(self) -> float:
        """The suggested learning rate.

        Raises:
            ValueError: If the loss never fell or diverged immediately.
        """
        if self.failure_reason:
            raise ValueError(f"The range test suggests no learning rate. {self.failure_reason}")
        return self.suggestions[self.method]

    @cached_property
    def caution(self) -> str:
        """Why the suggestion may be far from the best rate. Empty if nothing tells so."""
        if self.failure_reason:
            return ""
        n, rate = self._num_finite, self.suggestion * (10 if self.method == "minimum" else 1)
        found = [self._bad_batch]
        if self.trials and self.method != "tried":
            found.append(
                f"The trials were too short to tell rates apart, or all diverged, so {self.method} "
                "is suggested. Let them run to their end, or pass a larger max_steps."
            )
        tried = [trial.rate for trial in self.trials] if self.method == "tried" else []
        gap = max(np.divide(tried[1:], tried[:-1]), default=1.0)
        if gap > 1.001 * WIDEST_TIE:
            found.append(
                f"Only {len(tried)} rates were tried, up to a factor of {gap:.0f} apart. Pass a "
                "larger max_steps."
            )
        lowest, highest = (tried[0], tried[-1]) if tried else self.rates[[min(1, n - 1), n - 2]]
        which = "tried" if tried else "of the sweep"
        if rate <= lowest:
            found.append(f"It is the lowest rate {which}: the best one may be lower.")
        elif rate >= highest:
            found.append(
                f"It is the highest rate {which}: the best one may be higher, unless the loss "
                "diverges there. Pass a larger end_lr."
            )
        return " ".join(filter(None, found))

    @property
    def _bad_batch(self) -> str:
        """What ended the curve if a batch's loss is not finite at any rate."""
        n = self._num_finite
        if n == len(self.losses) or self.baseline is None or np.isfinite(self.baseline[n]):
            return ""
        return (
            f"The loss of step {n + 1} is {self.losses[n]}, and at a rate of 0 as well, so its "
            "batch is the reason and not the rate. Check the data for NaN."
        )

    @property
    def _num_finite(self) -> int:
        finite = np.isfinite(self.losses)
        return len(finite) if finite.all() else int(finite.argmin())

    @cached_property
    def failure_reason(self) -> str:
        """Why the curve suggests no rate, and what to try. Empty if it suggests one."""
        rates, n = self.rates, self._num_finite
        if not n:
            return (
                f"The loss is {self.losses[0]} at the first step, where the rate has had no effect "
                "yet. Check the inputs, the targets and the model's initial weights for NaN."
            )
        if self._bad_batch and (n < MIN_STEPS or not has_descent(rates[:n], self._denoised)):
            return self._bad_batch
        if n < MIN_STEPS:
            return (
                f"The loss diverged after {counted(n, 'finite step')} between the rates "
                f"{rates[0]:.1e} and {rates[-1]:.1e}; a curve needs at least {MIN_STEPS}. Use a "
                "smaller start_lr."
            )
        if has_descent(rates[:n], self._denoised):
            return ""
        first, last = self.smoothed_losses[0], self.losses[n - 1] + 0.0  # a zero without its sign
        seen = f"{first:.4g} at the rate {rates[0]:.1e}, {last:.4g} at {rates[n - 1]:.1e}"
        usual = np.median(noise(rates[:n], self.losses[:n])) + ROUNDING * abs(first)
        if n < len(rates) or last - first > 5 * usual:
            return (
                f"The loss diverged before it fell ({seen}). Use a smaller start_lr, and check the "
                "model's initial weights and the scale of its inputs."
            )
        return (
            f"The loss never fell by more than its noise of {usual:.2g} ({seen}). Use a smaller "
            "start_lr, a larger end_lr or more num_steps, and check that the loss depends on the "
            "trainable weights."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the curve and the suggestions as JSON values, non-finite losses as None."""

        def listed(column: Array) -> list[float | None]:
            return [x if math.isfinite(x) else None for x in column.tolist()]

        return {
            "rates": listed(self.rates),
            "losses": listed(self.losses),
            "baseline": None if self.baseline is None else listed(self.baseline),
            "smoothed_losses": listed(self.smoothed_losses),
            "monitor": self.monitor,
            "method": self.method,
            "suggestions": self.suggestions,
            "caution": self.caution,
            "trials": [
                {
                    "rate": trial.rate,
                    "losses": listed(trial.losses),
                    "scores": listed(trial.scores),
                    "errors": listed(trial.errors),
                    "dropped_after": trial.dropped_after,
                }
                for trial in self.trials
            ],
        }

    def __repr__(self) -> str:
        swept = (
            f"{counted(len(self.rates), 'step')} from {self.rates[0]:.1e} to {self.rates[-1]:.1e}"
        )
        if self.failure_reason:
            return f"LRFinderResult({swept}, no suggestion: {self.failure_reason})"
        tried = f", {counted(len(self.trials), 'rate')} tried" if self.trials else ""
        rest = ", ".join(f"{k}={v:.2e}" for k, v in self.suggestions.items() if k != self.method)
        chosen = f"suggestion={self.suggestion:.2e} ({self.method})"
        caution = f". {self.caution}" if self.caution else ""
        return f"LRFinderResult({swept}{tried}, {chosen}, {rest}){caution}"

    def _repr_html_(self) -> str:
        """Shows the suggestions, and the trials, in a notebook."""
        if self.failure_reason:
            return html_table(repr(self), {})
        names = [f"{name} (chosen)" if name == self.method else name for name in self.suggestions]
        suggested = {
            "suggestion": names,
            "rate": [f"{rate:.2e}" for rate in self.suggestions.values()],
        }
        tried = {
            "rate tried": [f"{trial.rate:.2e}" for trial in self.trials],
            "steps": [str(len(trial.losses)) for trial in self.trials],
            "last loss": ["".join(f"{x:.4g}" for x in trial.losses[-1:]) for trial in self.trials],
        }
        caution = f". {self.caution}" if self.caution else ""
        steps = counted(len(self.rates), "step")
        shown = html_table(f"Range test of {steps}{caution}", suggested)
        return shown + (html_table("Trials", tried) if self.trials else "")

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Plots the losses, raw and smoothed, over the learning rate and marks the suggestions.

        The figure is created without pyplot, so it needs no display and leaves pyplot's figures
        alone.

        Args:
            path: The file to save the figure to, if any. Its suffix sets the format.

        Returns:
            The figure, 800 x 400 pixels, or 800 x 800 with trials.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        count = 2 if self.trials else 1
        figure = new_figure("LRFinderResult.plot", height=4 * count)
        axes = figure.subplots(count, squeeze=False)[:, 0]
        self._plot_sweep(axes[0])
        if self.trials:
            self._plot_trials(axes[1])
        figure.legend(loc="outside right upper")  # inside the axes it would hide losses
        if path is not None:
            figure.savefig(path)
        return figure

    def _plot_sweep(self, axes: Axes) -> None:
        axes.set(
            xscale="log",
            xlabel="learning rate (log scale)",
            ylabel=self.monitor,
            title="Range test",
        )
        axes.plot(self.rates, self.losses, ".", color="0.65", label="raw")
        axes.plot(self.rates, self.smoothed_losses, color="black", label="smoothed")
        self._mark_suggestions(axes)
        # Up to the minimum: scaled to the divergence, the descent would look flat.
        known = self.losses[: self._num_finite]
        if len(known):
            descent = known[: known.argmin() + 1]
            margin = 0.15 * (np.ptp(descent) or np.ptp(known) or 1.0)
            axes.set_ylim(known.min() - margin, descent.max() + 2 * margin)
        axes.grid(alpha=0.3)

    def _plot_trials(self, axes: Axes) -> None:
        """Draws the running mean loss of each trial, the chosen one thick."""
        axes.set(xlabel="step", ylabel=f"{self.monitor}, running mean", title="Trials")
        best = self.suggestions.get("tried")
        means = [_running_mean(trial.losses) for trial in self.trials]
        for number, (trial, mean) in enumerate(zip(self.trials, means, strict=True)):
            axes.plot(
                np.arange(1, len(mean) + 1),
                mean,
                color=(share := number / len(means), 0.2, 1 - share),  # from blue to red
                linewidth=2.5 if trial.rate == best else 1.0,
                label=f"trial {trial.rate:.1e}",
            )
        drawn = np.concatenate(means)
        if len(drawn):  # scaled to a divergence, the others would look flat
            first = max(mean[0] for mean in means if len(mean))
            axes.set_ylim(
                drawn.min() - 0.1 * (first - drawn.min() or 1.0), first + 0.2 * abs(first)
            )
        axes.grid(alpha=0.3)

    def _mark_suggestions(self, axes: Axes) -> None:
        for (name, rate), marker in zip(
            self.suggestions.items(), "*osD^"[not self.trials :], strict=False
        ):
            chosen = name == self.method
            height = np.interp(np.log(rate), np.log(self.rates), self.smoothed_losses)
            (point,) = axes.plot(
                rate,
                height,
                marker,
                markersize=11 if chosen else 8,
                label=f"{LABELS.get(name, name)} {rate:.1e}" + (" (chosen)" if chosen else ""),
            )
            if chosen:
                axes.axvline(rate, color=point.get_color(), linestyle=":")


def _running_mean(losses: Array) -> Array:
    """Returns the mean of the last `SHOWN_STEPS` losses at each step, up to a non-finite one."""
    total = np.cumsum(np.append(0.0, losses[np.isfinite(losses)]))
    ends = np.arange(1, len(total))
    starts = np.maximum(0, ends - SHOWN_STEPS)
    mean: Array = (total[ends] - total[starts]) / (ends - starts)
    return mean


def check_suggestion(name: str) -> None:
    """Raises a ValueError if `name` is not the name of a suggestion."""
    names = get_args(SuggestionName)
    if name not in names:
        hint = did_you_mean(name, names)
        hint = hint or f"Use one of {', '.join(map(repr, names))}."
        raise ValueError(f"There is no suggestion {name!r}. {hint}")
