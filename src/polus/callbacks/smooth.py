"""The smoothed training loss."""

from typing import Any

import numpy as np

from polus.callbacks.base import Callback, Phase
from polus.callbacks.checks import SET_PRIMARY, check_number

MAX_UNREAD = 4096  # blocks of losses kept on the device; beyond that the older half is read


class LossSmoothCallback(Callback):
    """Keeps a bias-corrected exponential moving average of the loss of every step.

    After step t it is `sum(beta**(t - i) * loss_i) / sum(beta**(t - i))`: Adam's bias correction
    (Kingma and Ba 2015, arXiv:1412.6980, section 3). Read it as `smooth_loss`, or at the end of
    each epoch from `shared_dict["smooth_loss"]`. Losses that are not finite are included.

    Args:
        beta: The decay rate, at least 0 and less than 1.
    """

    phase = Phase.MEASURE  # other callbacks read it when an epoch ends

    def __init__(self, beta: float = 0.97) -> None:
        super().__init__()
        check_number("beta", beta, 0, 1)
        self.beta = beta
        self._sum = 0.0
        self._weight = 0.0
        self._unread: list[Any] = []

    def on_train_begin(self) -> None:
        self._sum = self._weight = 0.0
        self._unread = []

    def on_steps_end(self, epoch: int, steps: range, losses: object) -> None:
        if losses is None:
            raise ValueError(
                "LossSmoothCallback smooths the loss, and the step returns none, only "
                f"{', '.join(map(repr, self.coordinator.run.step_logs))}. {SET_PRIMARY}"
            )
        self._unread.append(losses)
        if len(self._unread) > MAX_UNREAD:
            self._read(MAX_UNREAD // 2)

    def on_epoch_end(self, epoch: int) -> None:
        self.coordinator.shared_dict["smooth_loss"] = self.smooth_loss

    @property
    def smooth_loss(self) -> float:
        """The smoothed loss after the last step, NaN before the first. Waits for the device."""
        self._read(len(self._unread))
        return self._sum / self._weight if self._weight else float("nan")

    def _read(self, count: int) -> None:
        """Adds the oldest `count` blocks of losses to the average."""
        blocks, self._unread = self._unread[:count], self._unread[count:]
        if blocks:
            losses = np.concatenate([np.asarray(block, np.float64) for block in blocks])
            powers = self.beta ** np.arange(len(losses) - 1, -1, -1.0)
            decay = self.beta ** len(losses)
            self._sum = decay * self._sum + float(powers @ losses)
            self._weight = decay * self._weight + float(powers.sum())

    def get_state(self) -> dict[str, Any]:
        _ = self.smooth_loss
        return {"sum": self._sum, "weight": self._weight}

    def set_state(self, state: dict[str, Any]) -> None:
        self._sum, self._weight, self._unread = state["sum"], state["weight"], []
