"""Decides whether a monitored value improved."""

import math
from typing import Literal, get_args

from polus.callbacks.base import Coordinator
from polus.callbacks.checks import SET_PRIMARY, check_name, check_number
from polus.host import did_you_mean

Direction = Literal["min", "max"]
Mode = Literal["auto", "min", "max"]

# What a value is, judging by words in its name.
LOWER_IS_BETTER = (
    *("loss", "error", "mse", "mae", "divergence", "perplexity"),
    *("entropy", "hinge", "poisson", "cosh", "nll"),
)
HIGHER_IS_BETTER = (
    *("acc", "auc", "f1", "score", "iou", "precision", "recall", "reward", "return"),
    *("ndcg", "mrr", "@"),  # measures of retrieval have their cutoff in the name: "MAP@10"
)


def lower_is_better(name: str) -> bool:
    """Returns True if a value of this name is a loss or an error, judging by the name."""
    return any(word in name.lower() for word in LOWER_IS_BETTER)


def improving_direction(name: str, coordinator: Coordinator) -> Direction | None:
    """Returns the direction in which a value of the logs improves, None if nothing tells.

    The metric itself is asked first, as Keras does, then whether it is the trainer's `primary`
    term, its loss, then the words in the name.

    Args:
        name: The name in the logs: `"loss"`, `"val_accuracy"`, ...
        coordinator: The coordinator of the run, for its metrics and validation sets.
    """
    metric_names = {
        name.removeprefix(f"{s}_") for s in ("val", *coordinator.shared_dict["validation"])
    }
    trainer = coordinator.trainer
    for metric in (*trainer.metrics, *(trainer.validation_metrics or ())):
        # The attribute by which Keras' metrics, and users' own ones, tell Keras' callbacks. It has
        # no public name.
        direction = getattr(getattr(metric, "metric", metric), "_direction", None)
        if metric.name in {name, *metric_names} and direction is not None:
            return "max" if direction == "up" else "min"
    return "min" if trainer.primary in {name, *metric_names} else _direction_by_name(name)


def _direction_by_name(name: str) -> Direction | None:
    if lower_is_better(name):
        return "min"
    return "max" if any(word in name.lower() for word in HIGHER_IS_BETTER) else None


class Monitor:
    """Compares a value of the epoch's logs with the best one so far.

    Args:
        name: The name in the logs: `"loss"`, a loss term, a metric, or `"<set>_<metric>"` for a
            validation set.
        mode: `"min"`, `"max"` or `"auto"`. `"auto"` asks the metric of that name, if it is one of
            Keras; otherwise it minimizes the trainer's `primary` term and values named like a loss
            or an error, and maximizes those named like a score. Other names need a mode.
        min_delta: The smallest change that counts as an improvement.

    Attributes:
        best: The best value so far, None before the first one.
    """

    def __init__(self, name: str, mode: Mode = "auto", min_delta: float = 0.0) -> None:
        example = 'Use the name of a value in the logs: monitor="val_loss".'
        check_name("monitor", name, example)
        if mode not in get_args(Mode):
            raise ValueError(f'mode must be "min", "max" or "auto", got {mode!r}.')
        check_number("min_delta", min_delta, 0, math.inf)
        self.name = name
        self.mode = mode
        self.min_delta = min_delta
        self.best: float | None = None
        self._direction = _direction_by_name(name) if mode == "auto" else mode

    def value(self, coordinator: Coordinator) -> float | None:
        """Returns the value of this epoch, None if its validation set was not evaluated in it.

        Raises:
            ValueError: If the logs have no such name.
        """
        if self.mode == "auto":
            self._direction = improving_direction(self.name, coordinator)
        logs = coordinator.logs
        if self.name in logs:
            return float(logs[self.name])
        for prefix in (f"{name}_" for name in coordinator.shared_dict["validation"]):
            if self.name.startswith(prefix) and not any(name.startswith(prefix) for name in logs):
                return None
        hint = SET_PRIMARY if self.name == "loss" else did_you_mean(self.name, logs)
        raise ValueError(
            f"The logs have no value named {self.name!r} to monitor. {hint + ' ' * bool(hint)}"
            f"They have {', '.join(sorted(logs))}. A ValidationDataCallback adds the metrics of "
            "its set as <name>_<metric>."
        )

    def improved(self, value: float) -> bool:
        """Returns True and keeps `value`, which `value()` returned, if it is better; NaN never is.

        Raises:
            ValueError: With `mode="auto"`, if nothing tells whether high or low is better.
        """
        if self._direction is None:
            raise ValueError(
                f"Nothing tells whether a high or a low {self.name!r} is better. Say so: "
                f'monitor={self.name!r}, mode="min", or mode="max".'
            )
        if math.isnan(value):
            return False
        sign = -1 if self._direction == "min" else 1
        better = self.best is None or sign * (value - self.best) > self.min_delta
        if better:
            self.best = value
        return better
