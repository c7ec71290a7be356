"""Learning rates in shares of a run, whose length the loop tells when `train` begins."""

import math
from typing import Any

import keras
from keras import ops


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A rise to the peak, then what a subclass says: the base of this module's schedules.

    ```python
    optimizer = keras.optimizers.AdamW(polus.schedules.Cosine(1e-3, warmup=0.06))
    ```

    The total number of steps is that of the run, which `train` sets when it begins: `epochs` times
    the steps of an epoch. A second `train` begins again at its first step.

    Args:
        peak: The highest rate.
        warmup: The rise from 0 to the peak: a share of the total, if less than 1, or a number of
            steps.
        total_steps: The total, where it is not that of the run.
    """

    def __init__(self, peak: float, warmup: float = 0.0, total_steps: int | None = None) -> None:
        given = {"peak": peak, "warmup": warmup, "total_steps": total_steps or 0}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")
        self.peak = peak
        self.warmup = warmup
        self.total_steps = total_steps
        # What the loop sets: the first step of the run, and its steps.
        self.first = keras.Variable(0, dtype="int32", trainable=False, name="schedule_first")
        self.total = keras.Variable(
            total_steps or 0, dtype="int32", trainable=False, name="schedule_total"
        )

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that a compiled step reads."""
        return [self.first, self.total]

    def begin(self, first_step: int, total_steps: int) -> None:
        """Tells the schedule which run it is for; called when `train` begins.

        Raises:
            ValueError: If the number of steps is not known.
        """
        total = self.total_steps or total_steps
        if not total:
            raise ValueError(
                f"{type(self).__name__} needs the number of steps of the run, and the dataset "
                "doesn't know its length. Pass train(..., steps=...), or total_steps=... here."
            )
        self.first.assign(first_step)
        self.total.assign(total)

    def __call__(self, step: Any) -> Any:
        """Returns the rate of a step, counted by the optimizer's `iterations`."""
        done = ops.cast(ops.convert_to_tensor(step), "float32") - ops.cast(
            self.first.value, "float32"
        )
        total = ops.maximum(ops.cast(self.total.value, "float32"), 1.0)
        rise = self.warmup * total if self.warmup < 1 else float(self.warmup)
        share = ops.clip((done - rise) / ops.maximum(total - rise, 1.0), 0.0, 1.0)
        rate = self.after(share)
        if self.warmup:
            rate = ops.where(done < rise, done / rise, rate)
        return self.peak * rate

    def after(self, share: object) -> Any:
        """Returns the share of the peak, given the share of the steps after the rise."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {"peak": self.peak, "warmup": self.warmup, "total_steps": self.total_steps}


@keras.saving.register_keras_serializable(package="polus")
class Constant(Schedule):
    """A rise to the peak, which then stays."""

    def after(self, share: object) -> Any:
        return ops.ones_like(share)


@keras.saving.register_keras_serializable(package="polus")
class Linear(Schedule):
    """A rise to the peak, then a straight line to zero at the end."""

    def after(self, share: Any) -> Any:
        return 1.0 - share


@keras.saving.register_keras_serializable(package="polus")
class Cosine(Schedule):
    """A rise to the peak, then half a cosine to zero (Loshchilov & Hutter, arXiv:1608.03983)."""

    def after(self, share: Any) -> Any:
        return 0.5 * (1.0 + ops.cos(math.pi * share))


@keras.saving.register_keras_serializable(package="polus")
class OneCycle(Schedule):
    """Up and down once, by half cosines (Smith & Topin, arXiv:1708.07120).

    It rises from `peak / 25` during the first `warmup` of the run (0.3 where nothing is said), and
    falls to `peak / 250,000`.
    """

    def __init__(self, peak: float, warmup: float = 0.3, total_steps: int | None = None) -> None:
        super().__init__(peak, warmup, total_steps)

    def __call__(self, step: Any) -> Any:
        done = ops.cast(ops.convert_to_tensor(step), "float32") - ops.cast(
            self.first.value, "float32"
        )
        last = ops.maximum(ops.cast(self.total.value, "float32") - 1.0, 1.0)
        top = self.warmup * (last + 1.0) - 1.0 if self.warmup < 1 else float(self.warmup) - 1.0
        up = _half_cosine(1 / 25, 1.0, done / ops.maximum(top, 1.0))
        down = _half_cosine(1.0, 1 / 250_000, (done - top) / ops.maximum(last - top, 1.0))
        return self.peak * ops.where(done < top, up, down)


def _half_cosine(start: float, end: float, share: Any) -> Any:
    share = ops.clip(share, 0.0, 1.0)
    return end + (start - end) * 0.5 * (1.0 + ops.cos(math.pi * share))
