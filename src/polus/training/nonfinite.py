"""What a run does about steps that were not finite: it stops, skips them or raises."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import keras
import numpy as np

from polus.callbacks.coordinator import CallbackCoordinator
from polus.data import StepBlock
from polus.data.batches import arrays_of
from polus.errors import NonFiniteError
from polus.host import to_host
from polus.steps.finite import Flags, GuardedSteps

Policy = Literal["raise", "skip", "stop", "ignore"]
POLICIES = ("raise", "skip", "stop", "ignore")
MAX_SKIPS = 10  # in a row: by then it is no single bad batch
MAX_NAMES = 5
STOPPED = "a step was not finite"

logger = logging.getLogger("polus.training")


class NonFiniteSteps:
    """Counts the steps of a run that were not finite, and says what follows.

    Args:
        policy: `train`'s `on_nonfinite`; None for its default.
        max_skips: `train`'s `max_skips`.
        callbacks: The callbacks of the run. Beside `TerminateOnNaN` the default is "ignore": it
            then ends training as in `fit`.

    Attributes:
        policy: "raise", "skip", "stop" or "ignore".
        limit: After how many such steps in a row training stands still; None for "ignore".
        skipped: The steps of the run that were skipped.
        consecutive: How many steps up to the newest were skipped in a row.
    """

    def __init__(
        self, policy: Policy | None, max_skips: int, callbacks: CallbackCoordinator
    ) -> None:
        handled = callbacks.has_callback(keras.callbacks.TerminateOnNaN)
        self.policy: Policy = policy or ("ignore" if handled else "raise")
        self.limit = {"ignore": None, "skip": max_skips}.get(self.policy, 1)
        self.skipped = 0
        self.consecutive = 0

    def count(self, block: StepBlock, finite: Flags | None) -> int:
        """Returns how many steps of a block count: none after the one that ends training."""
        if finite is None:
            self.consecutive = 0
            return block.count
        assert self.limit is not None
        for i, good in enumerate(finite):
            self.consecutive = 0 if good else self.consecutive + 1
            self.skipped += not good
            if self.consecutive >= self.limit:
                return i + 1
        return block.count

    @property
    def ends(self) -> bool:
        """Whether training ends with the newest step."""
        return self.limit is not None and self.consecutive >= self.limit

    def report(self, epoch: int, steps: range, finite: Flags) -> None:
        """Warns of the first steps that were skipped, and of each power of ten of them."""
        bad = [step for step, good in zip(steps, finite, strict=False) if not good]
        before = self.skipped - len(bad)
        if len(str(self.skipped)) > len(str(before)) or not before:
            logger.warning(
                "Batch %d of epoch %d gave a loss or gradients that are not finite, and its update "
                "was skipped: %d of this run so far.",
                bad[0] + 1,
                epoch + 1,
                self.skipped,
            )

    def get_state(self, guarded: GuardedSteps) -> dict[str, Any]:
        """Returns the counts, for a checkpoint, and which programs run."""
        return {
            "skipped": self.skipped,
            "consecutive": self.consecutive,
            "trusting": guarded.trusting,
        }

    def set_state(self, state: dict[str, Any], guarded: GuardedSteps) -> None:
        """Restores the counts; what ended the saved run is no part of this one."""
        self.skipped, consecutive = state["skipped"], state["consecutive"]
        guarded.trusting = state["trusting"]
        if self.limit is not None and consecutive < self.limit:
            self.consecutive = consecutive
            guarded.bad.assign(consecutive)


def sizes_of(block: StepBlock, count: int, finite: Flags | None) -> Iterable[int]:
    """Returns the number of examples that each of `count` steps was trained on."""
    if finite is None:
        return itertools.repeat(block.batch_size, count)
    return [block.batch_size * bool(good) for good in finite[:count]]


def non_finite_error(
    guarded: GuardedSteps, block: StepBlock, i: int, place: tuple[int, int], terms: dict[str, float]
) -> NonFiniteError:
    """Returns an error that says which step was not finite, and what of it.

    Args:
        guarded: Runs the step again to look at its values.
        block: The block of batches.
        i: The number of the step in it.
        place: Its epoch and step.
        terms: What it returned.
    """
    epoch, step = place
    try:
        found = guarded.details(block, i)
    except Exception as error:  # whatever a second run may hit, such as too little memory
        logger.warning("The step could not run again to look at its values: %r", error)
        found = {"gradients": {}, "variables": {}}
    gradients = [name for name, finite in found["gradients"].items() if not finite]
    variables = [name for name, finite in found["variables"].items() if not finite]
    bad_terms = [name for name, value in terms.items() if not np.isfinite(value)]
    before = guarded.bad_variables()
    parts = [f"the {name} is {terms[name]}" for name in bad_terms]
    parts += [f"the gradients of {_listed(gradients)} are not finite"] if gradients else []
    others = [name for name in variables if name not in gradients]
    if others and not gradients:
        parts += [f"the update makes {_listed(others)} not finite"]
    batch = block.batch(i)
    message = (
        f"Batch {step + 1} of epoch {epoch + 1} (epoch {epoch}, step {step} of the history): "
        f"{'; '.join(parts) or 'a value is not finite'}. The batch: {_summary(batch)}. "
        + (
            f"Already before it, {_listed(before)} were not finite."
            if before
            else "All weights are those before this step."
        )
        + " Try a smaller learning rate (trainer.lr_finder finds one), clip gradients "
        '(keras.optimizers.Adam(clipnorm=1.0)), or leave such batches out: on_nonfinite="skip".'
    )
    return NonFiniteError(message, epoch, step, bad_terms, gradients, variables)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest} others" if rest > 0 else "")


def _summary(batch: object) -> str:
    """Describes each array of a batch: shape, dtype, range, and how much of it is not finite."""
    return "; ".join(_described(to_host(array)) for array in arrays_of(batch)) or "no arrays"


def _described(array: np.ndarray[Any, Any]) -> str:
    kind = f"{array.shape} {array.dtype}"
    if array.dtype.kind not in "biuf" and not keras.backend.is_float_dtype(array.dtype.name):
        return kind
    values = array.astype(np.float64).reshape(-1)
    good = values[np.isfinite(values)]
    bad = len(values) - len(good)
    span = f" from {good.min():.4g} to {good.max():.4g}" if len(good) else ""
    return f"{kind}{span}{f', {bad} of {len(values)} values not finite' if bad else ''}"
