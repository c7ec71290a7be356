"""Decides whether a monitored value improved."""

import math
from typing import Literal

from polus.callbacks.base import RunView
from polus.host import did_you_mean

Mode = Literal["auto", "min", "max"]

# A value whose name contains one of these words is better when it is lower.
LOWER_IS_BETTER = (
    *("loss", "error", "mse", "mae", "divergence", "perplexity"),
    *("entropy", "hinge", "poisson", "cosh"),
)


def lower_is_better(name: str) -> bool:
    """Returns True if a value of this name is a loss or an error, judging by the name."""
    return any(word in name.lower() for word in LOWER_IS_BETTER)


class Monitor:
    """Compares a value of the epoch's logs with the best one so far.

    Args:
        name: The name in the logs: `"loss"`, a loss term, a metric, or `"<set>_<metric>"` for a
            validation set.
        mode: `"min"`, `"max"` or `"auto"`. `"auto"` minimizes values named like a loss or an error
            and maximizes all others.
        min_delta: The smallest change that counts as an improvement.

    Attributes:
        best: The best value so far, None before the first one.
    """

    def __init__(self, name: str, mode: Mode = "auto", min_delta: float = 0.0) -> None:
        if mode not in ("auto", "min", "max"):
            raise ValueError(f'mode must be "min", "max" or "auto", got {mode!r}.')
        if min_delta < 0:
            raise ValueError(f"min_delta must be at least 0, got {min_delta!r}.")
        self.name = name
        self.sign = -1 if mode == "min" or (mode == "auto" and lower_is_better(name)) else 1
        self.min_delta = min_delta
        self.best: float | None = None

    def value(self, run: RunView) -> float:
        """Returns the current value.

        Raises:
            ValueError: If the logs have no such name.
        """
        logs = run.logs
        if self.name not in logs:
            hint = did_you_mean(self.name, logs)
            raise ValueError(
                f"The logs have no value named {self.name!r} to monitor. {hint + ' ' * bool(hint)}"
                f"They have {', '.join(sorted(logs))}. A ValidationDataCallback adds the metrics "
                "of its set as <name>_<metric>."
            )
        return float(logs[self.name])

    def improved(self, value: float) -> bool:
        """Returns True and keeps `value` as the best one if it is better; NaN never is."""
        if math.isnan(value):
            return False
        better = self.best is None or self.sign * (value - self.best) > self.min_delta
        if better:
            self.best = value
        return better
