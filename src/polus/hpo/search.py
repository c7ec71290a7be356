"""Runs the trials of a study, each in a run directory, and continues those that were killed."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import filelock
import keras
import numpy as np
import optuna

from polus.callbacks.coordinator import checked_list
from polus.callbacks.monitor import HIGHER_IS_BETTER, lower_is_better
from polus.checkpoint import CheckpointError
from polus.errors import NonFiniteError
from polus.files import atomic_write, make_folder
from polus.history import History
from polus.hpo.callback import ReportTrial
from polus.hpo.checks import check_same_aim, check_search
from polus.hpo.memory import free_memory, is_out_of_memory
from polus.hpo.report import report
from polus.runs.directory import CHECKPOINTS, RunDirectory
from polus.training import BaseTrainer
from polus.training.config import TrainArguments, check_names

SQLITE_WAIT_SECS = 60.0  # for other processes that write to the database

Direction = Literal["minimize", "maximize"]
Errors = type[Exception] | tuple[type[Exception], ...]
State = optuna.trial.TrialState

logger = logging.getLogger("polus.hpo")


def search(
    make_trainer: Callable[[optuna.Trial], BaseTrainer],
    n_trials: int,
    *,
    metric: str = "val_loss",
    direction: Direction | None = None,
    value: Literal["best", "last"] = "best",
    storage: str | optuna.storages.BaseStorage | None = "sqlite:///runs/search.db",
    study_name: str = "search",
    directory: str | PathLike[str] | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    catch: Errors = (),
    seed: int | None = None,
    timeout_secs: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    **arguments: Unpack[TrainArguments],
) -> optuna.Study:
    """Trains a trainer for each of some trials, and returns the study with their values.

    The same call continues a search that was interrupted or killed: a trial that was running goes
    on from its newest checkpoint. Several processes may make the same call at the same time; they
    share the trials.

    Args:
        make_trainer: Takes a trial, asks it for hyperparameters (`trial.suggest_float(...)`), and
            returns a trainer. What `changing_train_config` keeps in it (its epochs, its data, its
            callbacks) takes precedence over `arguments`. It may raise `optuna.TrialPruned`.
        n_trials: The number of trials of the study, those of earlier calls and of other processes
            included.
        metric: The name of the value in the logs to optimize and to prune by: `"val_macro_f1"`.
        direction: "minimize" or "maximize". By default the name of the metric decides.
        value: Whether the value of a trial is that of its best epoch or of its last one.
        storage: Where Optuna keeps the study; None for in memory.
        study_name: The name of the study in the storage.
        directory: The folder of the trials: each one is a run directory `trial_0003` in it, with
            its parameters in `params.json`. `report.md` has a table of all. By default
            `runs/<study_name>`.
        sampler: Suggests parameters; by default Optuna's TPE.
        pruner: Ends trials early; by default Optuna's `MedianPruner`. `NopPruner()` ends none.
        catch: The exceptions that fail a trial instead of the search. `NonFiniteError`, and an
            exhausted memory, always do.
        seed: Seeds each trial, and the default sampler, so that another search of the same seed
            suggests and trains the same.
        timeout_secs: The seconds after which no further trial begins.
        clock: Returns the time in seconds.
        arguments: Arguments of `train` for all trials. With callbacks of their own, make them in
            `make_trainer`.

    Returns:
        Optuna's study: `best_params`, `best_trial.user_attrs["run_dir"]`, `trials_dataframe()`.

    Raises:
        ValueError, TypeError: For arguments that make no search, or another one than the study has.
    """
    check_names(arguments)
    check_search(locals())
    best = _direction(metric, direction)
    settings = _Settings(make_trainer, dict(arguments), metric, value, catch, seed)
    folder = (Path("runs") / study_name if directory is None else Path(directory)).absolute()
    make_folder(folder)
    with _locked(folder):  # or two processes that begin at once would both make the tables
        kept = _opened(storage)
        study = optuna.create_study(
            storage=kept,
            sampler=sampler,
            pruner=pruner,
            study_name=study_name,
            direction=best,
            load_if_exists=True,
        )
        check_same_aim(study, metric, best)
    trials = _Trials(study, kept, folder, None if sampler is not None else seed)
    ends = math.inf if timeout_secs is None else clock() + timeout_secs
    while clock() < ends and (claimed := trials.claim(n_trials)) is not None:
        _run(claimed, settings)
    return study


def _direction(metric: str, direction: str | None) -> Direction:
    if direction is None and lower_is_better(metric):
        return "minimize"
    if direction is None and any(word in metric.lower() for word in HIGHER_IS_BETTER):
        return "maximize"
    for known in get_args(Direction):
        if direction == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(
        f'direction must be "minimize" or "maximize" for the metric {metric!r}, got {direction!r}.'
    )


def _locked(folder: Path) -> filelock.BaseFileLock:
    """Returns the lock under which processes open the study and claim trials."""
    return filelock.FileLock(folder / "search.lock")


def _opened(storage: str | optuna.storages.BaseStorage | None) -> optuna.storages.BaseStorage:
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if not isinstance(storage, str):
        return storage
    options: dict[str, Any] = {}
    if storage.startswith("sqlite:///"):
        options = {"connect_args": {"timeout": SQLITE_WAIT_SECS}}
        make_folder(Path(storage.removeprefix("sqlite:///")).absolute().parent)
    return optuna.storages.RDBStorage(storage, engine_kwargs=options)


@dataclass(frozen=True)
class _Settings:
    """What all trials have in common; see `search`."""

    make_trainer: Callable[[optuna.Trial], BaseTrainer]
    arguments: dict[str, Any]
    metric: str
    value: str
    catch: Errors
    seed: int | None

    def __post_init__(self) -> None:
        if self.value not in ("best", "last"):
            raise ValueError(f'value must be "best" or "last", got {self.value!r}.')


@dataclass(frozen=True)
class _Claimed:
    """A trial that this process runs: no other one has its lock.

    Attributes:
        trial: The trial.
        directory: Its run directory.
        lock: Held while the trial runs. The system releases that of a process that was killed.
        was_killed: Whether another process began to run it.
    """

    trial: optuna.Trial
    directory: Path
    lock: filelock.BaseFileLock
    was_killed: bool


@dataclass(frozen=True)
class _Trials:
    """The trials of a study, claimed one by one by the processes that share them."""

    study: optuna.Study
    storage: optuna.storages.BaseStorage
    directory: Path
    seed: int | None

    def claim(self, n_trials: int) -> _Claimed | None:
        """Returns a trial that was killed, else a new one; None if there are enough."""
        with _locked(self.directory):
            trials = self.study.get_trials(deepcopy=False)
            for each in trials:
                if each.state == State.RUNNING and (claimed := self._killed(each.number)):
                    return claimed
            if sum(each.state != State.WAITING for each in trials) >= n_trials:
                return None
            self._seed(sum(each.state != State.WAITING for each in trials))
            trial = self.study.ask()
            directory = self._directory_of(trial.number)
            try:
                directory.mkdir()
            except FileExistsError:
                self.study.tell(trial, state=State.FAIL)
                raise ValueError(
                    f"{directory} is there already, of another study. Pass another directory=, or "
                    f"remove it if {self.study.study_name!r} is to begin anew."
                ) from None
            lock = filelock.FileLock(directory / "trial.lock")
            lock.acquire()
            return _Claimed(trial, directory, lock, was_killed=False)

    def _killed(self, number: int) -> _Claimed | None:
        directory = self._directory_of(number)
        directory.mkdir(exist_ok=True)
        lock = filelock.FileLock(directory / "trial.lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:  # it runs
            return None
        self._seed(number)
        study = self.storage.get_study_id_from_name(self.study.study_name)
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(study, number)
        return _Claimed(optuna.Trial(self.study, trial_id), directory, lock, was_killed=True)

    def _directory_of(self, number: int) -> Path:
        return self.directory / f"trial_{number:04d}"

    def _seed(self, number: int) -> None:
        """Seeds the sampler by the trial, else a search that continues would begin its row anew."""
        if self.seed is not None:
            self.study.sampler = optuna.samplers.TPESampler(seed=_trial_seed(self.seed, number))


def _trial_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


# ---------------------------------------------------------------------- one trial


def _run(claimed: _Claimed, settings: _Settings) -> None:
    """Runs a trial, and tells the study how it ended."""
    trial = claimed.trial
    logger.info("Trial %d %s.", trial.number, "goes on" if claimed.was_killed else "begins")
    try:
        value = _train(claimed, settings)
        _tell(claimed, State.PRUNED if value is None else State.COMPLETE, value)
    except optuna.TrialPruned as reason:
        _tell(claimed, State.PRUNED, why=str(reason))
    except Exception as error:
        _tell(claimed, State.FAIL, why=f"{type(error).__name__}: {error}")
        refused = claimed.was_killed and isinstance(error, CheckpointError)
        caught = isinstance(error, (NonFiniteError, settings.catch))
        if not (caught or refused or is_out_of_memory(error)):
            raise
    except BaseException:  # Ctrl-C, or a signal after which the run was saved
        logger.warning(
            "The search is interrupted in trial %d. The same call of search continues both.",
            trial.number,
        )
        raise
    finally:
        free_memory()
        claimed.lock.release()
        _write(claimed.directory.parent / "report.md", report(trial.study))


def _train(claimed: _Claimed, settings: _Settings) -> float | None:
    """Trains a trial. Returns its value; None if it was pruned."""
    trial = claimed.trial
    if settings.seed is not None:
        keras.utils.set_random_seed(_trial_seed(settings.seed, trial.number))
    trainer = settings.make_trainer(trial)
    if not isinstance(trainer, BaseTrainer):
        raise TypeError(f"make_trainer must return a trainer, got {trainer!r}.")
    trial.set_user_attr("run_dir", str(claimed.directory))
    _write_params(claimed, {"state": "running"})
    arguments: dict[str, Any] = settings.arguments | trainer.kept_train_config()
    callbacks = checked_list(arguments.get("callbacks", ()))
    if not any(isinstance(callback, ReportTrial) for callback in callbacks):
        callbacks.append(ReportTrial(trial, settings.metric))
    highest = trial.study.direction == optuna.study.StudyDirection.MAXIMIZE
    mode: Literal["max", "min"] = "max" if highest else "min"
    # Its report would take a second and a megabyte: it can be written for those of interest.
    saving = RunDirectory(claimed.directory, settings.metric, mode, report=False)
    arguments |= {"callbacks": [*callbacks, saving], "run_dir": claimed.directory}
    history = trainer.train(**arguments)
    if any(isinstance(each, ReportTrial) and each.pruned for each in callbacks):
        return None
    return _value(history, settings, highest)


def _value(history: History, settings: _Settings, highest: bool) -> float:
    """Returns the value of a trial: its metric's in the best epoch, or in the last one."""
    metric = settings.metric
    values = [float(logs[metric]) for logs in history.epochs if metric in logs]
    if not values:
        raise ValueError(f"The trial has no value: {metric} was never measured.")
    numbers = [value for value in values if math.isfinite(value)]
    best = (max if highest else min)(numbers, default=math.nan)
    value = values[-1] if settings.value == "last" else best
    if not math.isfinite(value):
        raise NonFiniteError(f"The trial has no value: {metric} is not finite.")
    return value


def _tell(
    claimed: _Claimed, state: optuna.trial.TrialState, value: float | None = None, why: str = ""
) -> None:
    """Tells the study how a trial ended, and logs it."""
    trial = claimed.trial
    if why:
        trial.set_user_attr("why", why)
    told = trial.study.tell(trial, value, state)
    facts = {"state": state.name.lower(), "value": told.value} | ({"why": why} if why else {})
    _write_params(claimed, facts)
    if state != State.FAIL:  # its checkpoints may tell why
        shutil.rmtree(claimed.directory / CHECKPOINTS, ignore_errors=True)
    shown = "" if told.value is None else f" with {told.value:.5g}"
    level = logging.WARNING if state == State.FAIL else logging.INFO
    logger.log(
        level,
        "Trial %d is %s%s: %s.%s",
        trial.number,
        {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}[state.name],
        shown,
        ", ".join(f"{name}={given}" for name, given in told.params.items()) or "no parameters",
        f" {why}" if why else "",
    )


def _write_params(claimed: _Claimed, facts: dict[str, Any]) -> None:
    """Writes a trial's parameters, and how it stands, into its folder."""
    facts = {"number": claimed.trial.number, **facts, "params": claimed.trial.params}
    _write(claimed.directory / "params.json", json.dumps(facts, indent=2, default=str))


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)
