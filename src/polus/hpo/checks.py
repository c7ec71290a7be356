"""Checks the arguments of a search before its first trial."""

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import optuna

from polus.backends import backend
from polus.training.config import check_count

State = optuna.trial.TrialState

# Arguments of `train` that mean nothing in a search, and what to write instead.
INSTEAD = {
    "run_dir": "Each trial has its own. Pass directory=..., the folder of all of them.",
    "resume": "The same call of search continues its trials.",
    "dry_run": "A trial of two steps has no value. Rehearse one trainer instead: "
    "make_trainer(optuna.trial.FixedTrial({...})).train(..., dry_run=True).",
}


def check_search(arguments: Mapping[str, Any]) -> None:
    """Checks what is passed to `search`.

    Raises:
        ValueError, TypeError: For an argument that can't be meant.
        NotImplementedError: In one of several processes that train together.
    """
    if (count := backend.placement().count) > 1:
        raise NotImplementedError(
            f"search was called in {count} processes that train one model together, and each would "
            "take another trial. Start it without the launcher, once for each device: the "
            "processes share the trials of a storage."
        )
    n_trials, secs, catch = (arguments[name] for name in ("n_trials", "timeout_secs", "catch"))
    if n_trials is None:
        raise ValueError(
            "n_trials must be a positive integer, got None. Where timeout_secs is to end the "
            "search, pass a large number."
        )
    check_count("n_trials", n_trials)
    for name, value in arguments["arguments"].items():
        if name in INSTEAD and value not in (None, False):
            raise ValueError(f"search takes no {name}. {INSTEAD[name]}")
    for name, kinds, kind in (
        ("make_trainer", Callable, "a function of a trial"),
        ("metric", str, "the name of a value in the logs"),
        ("study_name", str, "the name of the study"),
        ("storage", str | optuna.storages.BaseStorage | None, "a URL or a storage of Optuna"),
        ("sampler", optuna.samplers.BaseSampler | None, "a sampler of Optuna"),
        ("pruner", optuna.pruners.BasePruner | None, "a pruner of Optuna"),
        ("seed", Integral | None, "an integer"),
    ):
        if not isinstance(arguments[name], kinds):  # type: ignore[arg-type]
            raise TypeError(f"{name} must be {kind}, got {arguments[name]!r}.")
    if not arguments["study_name"]:
        raise ValueError("study_name must not be empty: the folder of the trials has its name.")
    number = isinstance(secs, Real) and not isinstance(secs, bool)
    if secs is not None and not (number and secs >= 0):
        raise ValueError(f"timeout_secs must be a number of seconds, got {secs!r}.")
    for error in catch if isinstance(catch, tuple) else (catch,):
        if not (isinstance(error, type) and issubclass(error, Exception)):
            raise TypeError(f"catch must be an exception class or a tuple of them, got {catch!r}.")


def check_same_aim(study: optuna.Study, metric: str, direction: str) -> None:
    """Keeps the metric of a study, and checks that it is the one of its earlier trials.

    Raises:
        ValueError: If the study has another metric or direction.
    """
    name = study.study_name
    other = "Pass another study_name, or another storage."
    has = study.direction.name.lower()
    if has != direction:
        raise ValueError(
            f"The study {name!r} is to {has}, and {metric!r} is to be {direction}d. {other} If it "
            f"was made by optuna.create_study, make it with direction={direction!r}."
        )
    earlier = study.user_attrs.get("metric", metric)
    done = study.get_trials(deepcopy=False, states=(State.COMPLETE, State.PRUNED, State.RUNNING))
    if earlier != metric and done:
        raise ValueError(
            f"The trials of the study {name!r} have values of {earlier!r}, and this search is for "
            f"{metric!r}. {other}"
        )
    if study.user_attrs.get("metric") != metric:
        study.set_user_attr("metric", metric)
