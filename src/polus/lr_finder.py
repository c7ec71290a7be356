"""The learning-rate range test: what rate should this model, on this data, be trained with?

A hundred steps at rates that grow exponentially from far too small to far too large give a curve,
loss over rate: flat, then falling, then diverging (Smith, "Cyclical Learning Rates for Training
Neural Networks", arXiv:1506.01186, section 3.3). A suggestion is a point of that curve.

    result = trainer.lr_finder(dataset)
    print(result.suggestion, result.suggestions)
    result.plot("lr_finder.png")
"""

from __future__ import annotations

import difflib
import os
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]


def smooth(rates: Array, losses: Array, half_width: float = 0.5) -> Array:
    """Gives the losses, smoothed over the logarithm of the rate.

    At each rate a line is fitted to the losses around it, nearer ones weighing more, and read there
    (local linear regression: Cleveland 1979, doi:10.1080/01621459.1979.10481038). So the curve does
    not lag behind, as a running average does, and a constant or a straight line stays what it is,
    up to its two ends.

    Args:
        rates: Positive and rising, shape `(n,)`.
        losses: Finite, shape `(n,)`.
        half_width: How far the window reaches to either side, in powers of ten; it is widened until
            it holds two neighbours on each side. Half a decade is 6 of 100 steps from 1e-7 to 10.
    """
    if len(losses) < 2:
        return losses.copy()
    position = np.log10(rates)
    half_width = max(half_width, 3 * np.diff(position).max())
    distance = position - position[:, None]
    weight = np.maximum(0, 1 - np.abs(distance) / half_width)
    s0, s1, s2 = (np.sum(weight * distance**power, axis=1) for power in (0, 1, 2))
    weighted = (weight * (s2[:, None] - s1[:, None] * distance)) @ losses
    smoothed: Array = weighted / (s0 * s2 - s1**2)
    return smoothed


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
    f.__name__: f for f in (valley, steep, slide, minimum)
}


@dataclass(frozen=True, repr=False, eq=False)
class LRFinderResult:
    """What a range test saw, and the rates it suggests.

    Args:
        rates: The swept learning rates, positive and rising, shape `(n,)`.
        losses: The loss of the step at each, as it came; the last may be NaN or infinite.
        method: Which of `suggestions` is `suggestion`.

    Raises:
        ValueError: For an unknown `method`.
    """

    rates: Array
    losses: Array
    method: str = "valley"

    def __post_init__(self) -> None:
        """Checks the name early: it would be a pity to find a typo after the sweep."""
        check_suggestion(self.method)
        object.__setattr__(self, "rates", np.asarray(self.rates, np.float64))
        object.__setattr__(self, "losses", np.asarray(self.losses, np.float64))

    @cached_property
    def smoothed_losses(self) -> Array:
        """The losses, smoothed as far as they are finite, and NaN from there on."""
        n = self._num_finite
        rest = np.full(len(self.losses) - n, np.nan)
        return np.concatenate([smooth(self.rates[:n], self.losses[:n]), rest])

    @cached_property
    def suggestions(self) -> dict[str, float]:
        """Each suggestion by name; none of them where `suggestion` raises."""
        if self.why_none:
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
        if self.why_none:
            raise ValueError(f"no learning rate to suggest: {self.why_none}")
        return self.suggestions[self.method]

    @property
    def _num_finite(self) -> int:
        finite = np.isfinite(self.losses)
        return len(finite) if finite.all() else int(finite.argmin())

    @cached_property
    def why_none(self) -> str:
        """Why this curve suggests nothing, and what to try; empty if it does.

        The loss counts as falling where its smoothed minimum is further below its median before
        than twice the noise between neighbours: of 3,000 curves of pure noise 0.5 % get that far.
        """
        rates, losses, n = self.rates, self.smoothed_losses, self._num_finite
        if n < MIN_STEPS:
            return (
                f"the loss diverged within {len(rates)} steps, {n} of them finite, between the "
                f"rates {rates[0]:.1e} and {rates[-1]:.1e}, and fewer than {MIN_STEPS} show no "
                f"curve: sweep from a smaller start_lr, and check the data for NaN"
            )
        lowest, last = int(losses[:n].argmin()), losses[n - 1]
        # The median step between neighbours is 0.954 standard deviations of normal noise; to that
        # comes the rounding of float32.
        noise = np.median(np.abs(np.diff(self.losses[:n]))) / 0.954 + 1e-6 * abs(last)
        if np.median(losses[: lowest + 1]) - losses[lowest] > 2 * noise:
            return ""
        seen = f"{losses[0]:.4g} at the rate {rates[0]:.1e}, {last:.4g} at {rates[n - 1]:.1e}"
        if n < len(rates) or last - losses[0] > 2 * noise:
            return (
                f"the loss diverged before it fell ({seen}): sweep from a smaller start_lr, and "
                f"check the model's initial weights and the scale of its inputs"
            )
        return (
            f"the loss never fell by more than its noise of {noise:.2g} ({seen}): sweep to a "
            f"larger end_lr or in more num_steps, and check that the loss depends on the "
            f"trainable weights"
        )

    def to_dict(self) -> dict[str, Any]:
        """Gives everything as lists and numbers for JSON; a loss that is not finite is None."""
        columns = {name: getattr(self, name) for name in ("rates", "losses", "smoothed_losses")}
        return {
            **{k: [x if np.isfinite(x) else None for x in v.tolist()] for k, v in columns.items()},
            "method": self.method,
            "suggestions": self.suggestions,
        }

    def __repr__(self) -> str:
        swept = f"{len(self.rates)} steps from {self.rates[0]:.1e} to {self.rates[-1]:.1e}"
        if self.why_none:
            return f"LRFinderResult({swept}, no suggestion: {self.why_none})"
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

        figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
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
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def check_suggestion(name: str) -> None:
    """Raises ValueError for a name that is none of `SUGGESTIONS`."""
    if name not in SUGGESTIONS:
        meant = difflib.get_close_matches(name, SUGGESTIONS, n=1)
        hint = f"did you mean {meant[0]!r}?" if meant else f"there are {', '.join(SUGGESTIONS)}"
        raise ValueError(f"there is no suggestion {name!r}: {hint}")
