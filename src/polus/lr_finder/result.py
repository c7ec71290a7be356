"""The result of a range test: the curve, the rates it suggests, and a plot."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from polus.figures import new_figure
from polus.host import did_you_mean
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False, eq=False)
class LRFinderResult:
    """The curve recorded by a range test and the learning rates it suggests.

    Args:
        rates: The learning rates of the sweep, positive and increasing, shape `(n,)`.
        losses: The unsmoothed loss of the step at each rate, shape `(n,)`. The last one may be NaN
            or infinite.
        method: Which of `suggestions` is `suggestion`. The default was the best of four in a
            benchmark: see docs/learning_rate.md.
        baseline: The losses of the same batches at a rate of zero, shape `(n,)`, used to remove the
            batch noise from the smoothed losses. None if they were not recorded.

    Raises:
        ValueError: If `method` is not the name of a suggestion.
    """

    rates: Array
    losses: Array
    method: SuggestionName = "steep"
    baseline: Array | None = None

    def __post_init__(self) -> None:
        check_suggestion(self.method)
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
        return {
            name: function(self.rates[:n], self.smoothed_losses[:n])
            for name, function in SUGGESTIONS.items()
        }

    @property
    def suggestion(self) -> float:
        """The suggested learning rate.

        Raises:
            ValueError: If the loss never fell or diverged immediately.
        """
        if self.failure_reason:
            raise ValueError(f"The range test suggests no learning rate. {self.failure_reason}")
        return self.suggestions[self.method]

    @property
    def _num_finite(self) -> int:
        finite = np.isfinite(self.losses)
        return len(finite) if finite.all() else int(finite.argmin())

    @cached_property
    def failure_reason(self) -> str:
        """Why the curve suggests no rate, and what to try. Empty if it suggests one."""
        rates, n = self.rates, self._num_finite
        if n < MIN_STEPS:
            return (
                f"The loss diverged after {n} finite step{'s' * (n != 1)} between the rates "
                f"{rates[0]:.1e} and {rates[-1]:.1e}; a curve needs at least {MIN_STEPS}. Use a "
                "smaller start_lr, and check the data for NaN."
            )
        if has_descent(rates[:n], self._denoised):
            return ""
        first, last = self.smoothed_losses[0], self.losses[n - 1]
        seen = f"{first:.4g} at the rate {rates[0]:.1e}, {last:.4g} at {rates[n - 1]:.1e}"
        usual = np.median(noise(rates[:n], self.losses[:n])) + ROUNDING * abs(first)
        if n < len(rates) or last - first > 5 * usual:
            return (
                f"The loss diverged before it fell ({seen}). Use a smaller start_lr, and check the "
                "model's initial weights and the scale of its inputs."
            )
        return (
            f"The loss never fell by more than its noise of {usual:.2g} ({seen}). Use a larger "
            "end_lr or more num_steps, and check that the loss depends on the trainable weights."
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
        """Plots the losses, raw and smoothed, over the learning rate and marks the suggestions.

        The figure is created without pyplot, so it needs no display and leaves pyplot's figures
        alone.

        Args:
            path: The file to save the figure to, if any. Its suffix sets the format.

        Returns:
            The figure, 800 x 400 pixels.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure = new_figure("LRFinderResult.plot", height=4)
        axes = figure.add_subplot(
            xscale="log", xlabel="learning rate (log scale)", ylabel="loss", title="Range test"
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
        figure.legend(loc="outside right upper")  # inside the axes it would hide losses
        if path is not None:
            figure.savefig(path)
        return figure

    def _mark_suggestions(self, axes: Axes) -> None:
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


def check_suggestion(name: str) -> None:
    """Raises a ValueError if `name` is not the name of a suggestion."""
    if name not in list(SUGGESTIONS):
        hint = did_you_mean(name, SUGGESTIONS)
        hint = hint or f"Use one of {', '.join(map(repr, SUGGESTIONS))}."
        raise ValueError(f"There is no suggestion {name!r}. {hint}")
