"""The names of polus 0.1, for its programs: they call `search`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal, TypeVar

import optuna

from polus.hpo.callback import ReportTrial
from polus.hpo.search import search
from polus.training import BaseTrainer

T = TypeVar("T")
_trial: ContextVar[optuna.Trial] = ContextVar("trial")


def parameter(real: T, hpo_lambda: Callable[[optuna.Trial], T] | None = None) -> T:
    """Returns a hyperparameter: what the trial suggests within a search, else `real`.

    Args:
        real: The value outside of a search.
        hpo_lambda: Takes the trial: `lambda trial: trial.suggest_float("rate", 1e-4, 1e-2)`.
    """
    trial = _trial.get(None)
    return real if trial is None or hpo_lambda is None else hpo_lambda(trial)


class HPOPruneCallback(ReportTrial):
    """Prunes the current trial by a metric of a validation set; `HPO_Objective` adds it itself."""

    def __init__(self, validator_name: str, metric_name: str) -> None:
        super().__init__(_trial.get(), f"{validator_name}_{metric_name}")


class HPO_Objective:
    """Searches when its block ends, over what `parameter` suggests in `trainer_init_function`.

    Args:
        trainer_init_function: Returns a trainer that is ready for `train()`.
        validator_name: The name of the validation set.
        metric_name: The name of the metric.
        metric_time: "max" for the best epoch's value, "last" for the last epoch's.
        add_pruning_cb: Whether trials are pruned.

    Attributes:
        study: The study, after the block.
    """

    study: optuna.Study

    def __init__(
        self,
        trainer_init_function: Callable[[], BaseTrainer],
        validator_name: str,
        metric_name: str,
        *,
        metric_time: Literal["max", "last"] = "max",
        add_pruning_cb: bool = True,
    ) -> None:
        self.init = trainer_init_function
        self.config: dict[str, Any] = {"n_trials": 100, "direction": "maximize"}
        self.config |= {"metric": f"{validator_name}_{metric_name}"}
        self.config |= {"value": "best" if metric_time == "max" else metric_time}
        self.config |= {} if add_pruning_cb else {"pruner": optuna.pruners.NopPruner()}

    def change_optuna_config(self, **arguments: Any) -> None:
        """Sets arguments of `search`: n_trials, storage, sampler, ..."""
        self.config |= arguments

    def __enter__(self) -> "HPO_Objective":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.study = search(self._make_trainer, **self.config)

    def _make_trainer(self, trial: optuna.Trial) -> BaseTrainer:
        with _suggesting(trial):
            return self.init()


@contextmanager
def _suggesting(trial: optuna.Trial) -> Iterator[None]:
    token = _trial.set(trial)
    try:
        yield
    finally:
        _trial.reset(token)
