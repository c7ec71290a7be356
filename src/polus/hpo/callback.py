"""Reports a monitored value to a trial, and ends the run if the trial is to be pruned."""

from typing import Any

import optuna

from polus.callbacks import Callback
from polus.callbacks.monitor import Monitor


class ReportTrial(Callback):
    """Reports a value of each epoch's logs to a trial, and ends the run in order to prune it.

    `polus.hpo.search` adds one that reports its metric. To prune by another value, make one among
    the trainer's own callbacks. An epoch in which the monitored validation set is not evaluated is
    not reported. As a step, Optuna's pruners get the number of the epoch, from 0.

    Args:
        trial: The trial.
        metric: The name of the value in the logs: `"val_loss"`, `"val_macro_f1"`, ...

    Attributes:
        pruned: Whether the run was ended.
    """

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        super().__init__()
        self.trial = trial
        self.monitor = Monitor(metric)
        self.pruned = False

    def on_train_begin(self) -> None:
        self.pruned = False
        # A killed trial may have reported epochs that its newest checkpoint does not have.
        reported = self.trial.study.get_trials(deepcopy=False)[self.trial.number]
        self._reported = set(reported.intermediate_values)

    def on_epoch_end(self, epoch: int) -> None:
        value = self.monitor.value(self.coordinator)
        if value is None:
            return
        if epoch not in self._reported:
            self.trial.report(value, epoch)
        if self.trial.should_prune():
            self.pruned = True
            self.coordinator.run.stop(f"trial {self.trial.number} is pruned")

    def get_state(self) -> dict[str, Any]:
        return {"pruned": self.pruned}

    def set_state(self, state: dict[str, Any]) -> None:
        self.pruned = bool(state["pruned"])
