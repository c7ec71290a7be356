"""Whether a monitored value is better than the best one before."""

import math

from polus.callbacks.base import CallbackCoordinator

# A name with one of these parts is better when it is lower.
LOWER = (
    *("loss", "error", "mse", "mae", "divergence", "perplexity"),
    *("entropy", "hinge", "poisson", "cosh"),
)


def lower_is_better(name: str) -> bool:
    """Whether a value of this name is better when it is lower."""
    return any(part in name.lower() for part in LOWER)


class Monitor:
    """Compares a value of the logs, epoch by epoch, with its best.

    Args:
        name: as in the logs: `"loss"`, a term or metric, or `"<set>_<metric>"` of a validation set.
        mode: `"min"`, `"max"`, or `"auto"`: what is called a loss or an error is to fall, anything
            else to rise.
        min_delta: a change less than this is no improvement.

    Attributes:
        best: the best value so far, None before the first.
    """

    def __init__(self, name: str, mode: str = "auto", min_delta: float = 0.0) -> None:
        if mode not in ("auto", "min", "max"):
            raise ValueError(f'mode is "min", "max" or "auto", and got {mode!r}.')
        if min_delta < 0:
            raise ValueError(f"min_delta is at least 0, and got {min_delta!r}.")
        self.name = name
        self.sign = -1 if mode == "min" or (mode == "auto" and lower_is_better(name)) else 1
        self.min_delta = min_delta
        self.best: float | None = None

    def value(self, run: CallbackCoordinator) -> float:
        """The present value.

        Raises:
            ValueError: if the logs have no such name.
        """
        logs = run.logs
        if self.name not in logs:
            import difflib

            close = difflib.get_close_matches(self.name, logs, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            names = ", ".join(sorted(logs))
            raise ValueError(
                f"There is no {self.name!r} to monitor. {hint}There are {names}; a "
                "ValidationDataCallback adds those of its set, <name>_<metric>."
            )
        return float(logs[self.name])

    def improved(self, value: float) -> bool:
        """Whether `value` is better than the best, which it then becomes."""
        if math.isnan(value):
            return False
        better = self.best is None or self.sign * (value - self.best) > self.min_delta
        if better:
            self.best = value
        return better
