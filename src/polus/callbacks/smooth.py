"""A loss that can be read: each step's, smoothed."""

from typing import Any

import numpy as np

from polus.callbacks.base import Callback, Phase

MAX_UNREAD = 4096  # blocks of losses left on the device; then the older half is read


class LossSmoothCallback(Callback):
    """Keeps an exponential moving average of every step's loss, corrected for its start.

    After step t it is `sum(beta**(t - i) * loss_i) / sum(beta**(t - i))`: Adam's bias correction
    (Kingma and Ba 2015, arXiv:1412.6980, section 3). It is read as `smooth_loss`, and stands in
    `shared_dict["smooth_loss"]` from the first epoch's end on. A loss that is not finite counts.

    Args:
        beta: what remains of the old value at each step, 0 to below 1.
    """

    phase = Phase.MEASURE  # read by others at the end of an epoch

    def __init__(self, beta: float = 0.97) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta is at least 0 and less than 1, and got {beta!r}.")
        self.beta = beta
        self._sum = 0.0
        self._weight = 0.0
        self._unread: list[Any] = []

    def on_train_begin(self) -> None:
        self._sum = self._weight = 0.0
        self._unread = []

    def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
        self._unread.append(losses)
        if len(self._unread) > MAX_UNREAD:
            self._read(MAX_UNREAD // 2)

    def on_epoch_end(self, epoch: int) -> None:
        self.coordinator.shared_dict["smooth_loss"] = self.smooth_loss

    @property
    def smooth_loss(self) -> float:
        """The smoothed loss after the last step; NaN before the first. Waits for the device."""
        self._read(len(self._unread))
        return self._sum / self._weight if self._weight else float("nan")

    def _read(self, count: int) -> None:
        """Adds the oldest `count` blocks of losses."""
        blocks, self._unread = self._unread[:count], self._unread[count:]
        if blocks:
            losses = np.concatenate([np.asarray(block, np.float64) for block in blocks])
            powers = self.beta ** np.arange(len(losses) - 1, -1, -1.0)
            rest = self.beta ** len(losses)
            self._sum = rest * self._sum + float(powers @ losses)
            self._weight = rest * self._weight + float(powers.sum())

    def get_state(self) -> dict[str, Any]:
        _ = self.smooth_loss
        return {"sum": self._sum, "weight": self._weight}

    def set_state(self, state: dict[str, Any]) -> None:
        self._sum, self._weight, self._unread = state["sum"], state["weight"], []
