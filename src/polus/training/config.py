"""The arguments of `train`, given at once or kept for a later call."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

import keras
import numpy as np

from polus.callbacks.base import ICallback, KerasCallbackLike
from polus.callbacks.coordinator import checked_list
from polus.callbacks.time_limit import TimeLimit
from polus.data import DataAdapter, DataReader, NoDataAdapter, as_adapter
from polus.data.first_batches import first_batches
from polus.data.prefetch import PREFETCH
from polus.files import check_directory
from polus.host import did_you_mean, to_host
from polus.optimizers import MultiOptimizer
from polus.steps.autotune import RunLength
from polus.steps.norms import Norms
from polus.training.nonfinite import MAX_SKIPS, POLICIES, Policy
from polus.training.parts import TrainerParts

# More epochs than any loop has, since a session does not know how many it will have.
OPEN_END = 2**31 - 1

# The documented names, of which two are spellings of one argument.
NAMES = {
    "tf_dataset": "dataset",
    "custom_data_transform_f": "transform",
    "train_map_f": "transform",
}


class TrainArguments(TypedDict, total=False):
    """The arguments of `train`, for type checkers."""

    tf_dataset: Any
    epochs: int
    callbacks: Sequence[ICallback | KerasCallbackLike]
    custom_data_transform_f: Callable[[Any], Any]
    train_map_f: Callable[[Any], Any]
    steps: int
    learning_rate: float
    steps_per_execution: int
    prefetch: int
    run_eagerly: bool
    max_secs: float
    resume: str | PathLike[str]
    resume_changes: Literal["refuse", "accept"]
    on_nonfinite: Policy
    max_skips: int
    record: Norms
    run_dir: str | PathLike[str]
    dry_run: bool
    overfit_batches: int


@dataclass(frozen=True)
class TrainConfig:
    """The checked arguments of one call of `train`; see there."""

    dataset: DataAdapter
    epochs: int
    callbacks: Sequence[Any] = ()
    transform: Callable[[Any], Any] | None = None
    steps: int | None = None
    learning_rate: float | None = None
    steps_per_execution: int | None = None
    prefetch: int = PREFETCH
    run_eagerly: bool = False
    max_secs: float | None = None
    resume: Path | None = None
    resume_changes: Literal["refuse", "accept"] = "refuse"
    on_nonfinite: Policy | None = None
    max_skips: int = MAX_SKIPS
    record: Norms = False
    run_dir: Path | None = None
    dry_run: bool = False
    overfit_batches: int | None = None

    @classmethod
    def checked(cls, arguments: dict[str, Any]) -> Self:
        """Checks the arguments of `train`.

        Raises:
            ValueError: If one is missing or out of range.
            TypeError: If one is of the wrong kind.
        """
        given = {NAMES.get(name, name): value for name, value in arguments.items()}
        if given.get("dataset") is None and given.get("steps") is not None:
            given = {"epochs": 1, **given, "dataset": NoDataAdapter()}
        for name in ("tf_dataset", "epochs"):
            if given.get(NAMES.get(name, name)) is None:
                raise ValueError(
                    f"train needs {name}. Pass it, or keep it with "
                    f"changing_train_config({name}=...)."
                    + " A run without data needs steps."
                    * (name == "tf_dataset")
                )
        for name in ("epochs", "steps", "steps_per_execution", "max_skips", "overfit_batches"):
            check_count(name, given.get(name))
        if given.get("overfit_batches") is not None:
            count = min(given["overfit_batches"], given.get("steps") or sys.maxsize)
            given |= {"dataset": first_batches(given["dataset"], count), "steps": None}
        _check_learning_rate(given.get("learning_rate"))
        if not (given.get("transform") is None or callable(given["transform"])):
            raise TypeError(
                "custom_data_transform_f must be a function of one batch, got "
                f"{given['transform']!r}."
            )
        changes = given.get("resume_changes", "refuse")
        if changes not in ("refuse", "accept"):
            raise ValueError(f'resume_changes must be "refuse" or "accept", got {changes!r}.')
        _check_policy(given.get("on_nonfinite", "raise"))
        if given.get("run_dir") is not None:
            from polus.runs.directory import with_run_dir

            given = with_run_dir({**given, "callbacks": checked_list(given.get("callbacks", ()))})
        if given.get("resume") is not None:
            given["resume"] = check_directory(given["resume"], "resume")
        if given.get("max_secs") is not None:
            limit = TimeLimit(given["max_secs"])
            given["callbacks"] = [*checked_list(given.get("callbacks", ())), limit]
        return cls(**{**given, **_reading(as_adapter(given["dataset"]), given)})

    def length(self, steps: float) -> RunLength:
        """Returns how long a run of so many steps is, with the least of its time limits."""
        limits = [c.max_secs for c in self.callbacks if isinstance(c, TimeLimit)]
        return RunLength(steps, min(limits, default=math.inf))

    def reader(self, trainer: TrainerParts, first_epoch: int) -> DataReader:
        """Returns the reader of the training data.

        Args:
            trainer: The trainer, which checks the batches.
            first_epoch: The number that the data's order has in the run's first epoch.

        Raises:
            ValueError: If an epoch has no end.
        """
        self.dataset.bind(trainer)
        check, prefetch = trainer.check_batch, self.prefetch
        reader = DataReader(self.dataset, self.transform, self.steps, first_epoch, check, prefetch)
        reader.check_ends("train")
        return reader


def _reading(adapter: DataAdapter, given: dict[str, Any]) -> dict[str, Any]:
    """Returns how the data are read: what, how far ahead, and how many batches at a time."""
    prefetch, at_once = given.get("prefetch", PREFETCH), given.get("steps_per_execution")
    if isinstance(prefetch, bool) or not isinstance(prefetch, int | np.integer) or prefetch < 0:
        raise ValueError(f"prefetch must be an integer of at least 0, got {prefetch!r}.")
    if adapter.live and at_once not in (None, 1):
        raise ValueError(
            f"Live data are made between two steps, so steps_per_execution can't be {at_once}. "
            "Leave it out."
        )
    if given.get("record") not in (None, True, False, "variables"):
        raise ValueError(f"record must be True, False or 'variables', got {given['record']!r}.")
    for name in ("run_eagerly", "dry_run"):
        if given.get(name) not in (None, True, False):
            raise ValueError(f"{name} must be True or False, got {given[name]!r}.")
    prefetch = 0 if adapter.live or isinstance(adapter, NoDataAdapter) else int(prefetch)
    if adapter.live or given.get("run_eagerly") or (given.get("prefetch") == 0 and at_once is None):
        at_once = 1
    return {"dataset": adapter, "prefetch": prefetch, "steps_per_execution": at_once}


def one_transform(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that were given, with one name for the transform.

    Raises:
        TypeError: If both of its names were given.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if "train_map_f" in given:
        if "custom_data_transform_f" in given:
            raise TypeError(
                "train_map_f and custom_data_transform_f are two names of one argument. Pass one."
            )
        given["custom_data_transform_f"] = given.pop("train_map_f")
    return given


def given_arguments(names: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of `train` that were given.

    Args:
        names: The local variables of the call: its arguments, `self`, and `unknown` ones.

    Raises:
        TypeError: For unknown ones.
    """
    check_names(names["unknown"])
    return one_transform({n: each for n, each in names.items() if n not in ("self", "unknown")})


def check_names(arguments: Mapping[str, Any]) -> None:
    """Raises TypeError for a name that is no argument of `train`."""
    known = [field.name for field in fields(TrainConfig) if field.name not in NAMES.values()]
    known = [*NAMES, *known]
    for name in arguments:
        if name not in known:
            hint = OF_FIT.get(name) or did_you_mean(name, known)
            raise TypeError(
                f"train takes no argument {name!r}. {hint + ' ' * bool(hint)}It takes "
                f"{', '.join(known)}."
            )


def refuse(method: str, unknown: Mapping[str, Any]) -> None:
    """Raises TypeError for arguments that `evaluate` or `predict` of a Keras model takes."""
    for name in unknown:
        hint = OF_EVALUATE.get(name, "")
        raise TypeError(f"{method} takes no argument {name!r}.{' ' * bool(hint)}{hint}")


def refuse_of_compile(trainer: object, unknown: Mapping[str, Any]) -> None:
    """Raises TypeError for arguments of a trainer that only `compile` of a Keras model takes."""
    for name in unknown:
        hint = OF_COMPILE.get(name, "")
        raise TypeError(
            f"{type(trainer).__name__} takes no argument {name!r}.{' ' * bool(hint)}{hint}"
        )


OF_COMPILE = {
    "loss_weights": "Weigh them in the loss: lambda y, p: a(y[0], p[0]) + 0.5 * b(y[1], p[1]).",
    "jit_compile": "Use polus.set_jit_compile(True), or leave it to train, which times both.",
    "run_eagerly": "Use train(..., run_eagerly=True).",
    "steps_per_execution": "Use train(..., steps_per_execution=n), or leave it to train.",
    "auto_scale_loss": "The loss is scaled where the model computes in float16.",
    "class_weight": "ClassifierTrainer takes it; weigh the loss in the step.",
    "sample_weight": "Use batches of (x, y, sample_weight).",
    "callbacks": "Use train(..., callbacks=[...]).",
    "epochs": "Use train(..., epochs=n).",
}
OF_EVALUATE = {
    "x": "Pass the data first: evaluate(polus.from_arrays((x, y), batch_size=32)).",
    "y": "Pass the data first: evaluate(polus.from_arrays((x, y), batch_size=32)).",
    "batch_size": "The data says it: polus.from_arrays((x, y), batch_size=32).",
    "verbose": "It prints nothing.",
    "return_dict": "It returns a dict.",
    "sample_weight": "Use batches of (x, y, sample_weight).",
    "callbacks": "Callbacks hear of runs: ValidationDataCallback evaluates in one.",
}
# What to write instead of the arguments of Keras' `fit`.
OF_FIT = {
    "x": "Pass the data first: train(polus.data.from_arrays((x, y), batch_size=32), epochs=3).",
    "y": "Pass the data first: train(polus.data.from_arrays((x, y), batch_size=32), epochs=3).",
    "batch_size": "The data says it: polus.data.from_arrays((x, y), batch_size=32).",
    "shuffle": "The data says it: polus.data.from_arrays((x, y), 32, shuffle=True).",
    "validation_data": "Use callbacks=[ValidationDataCallback(data)].",
    "validation_split": "Split the arrays, and use callbacks=[ValidationDataCallback(data)].",
    "validation_batch_size": "Use callbacks=[ValidationDataCallback(data)] with batches of it.",
    "validation_steps": "Use callbacks=[ValidationDataCallback(data, steps=...)].",
    "validation_freq": "Use callbacks=[ValidationDataCallback(data, every_epochs=...)].",
    "verbose": "Use callbacks=[ConsoleLogCallback()] to see progress; without it there is none.",
    "sample_weight": "Use batches of (x, y, sample_weight).",
    "class_weight": "Use ClassifierTrainer(..., class_weight={0: 1.0, 1: 5.0}).",
    "initial_epoch": "Use resume=..., which continues a run where it was saved.",
    "steps_per_epoch": "Did you mean 'steps'?",
}


def check_count(name: str, value: object) -> None:
    """Raises ValueError if an optional argument is not a positive integer."""
    if value is None:
        return
    if isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a positive integer, got an array. {OF_FIT['y']}")
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def _check_learning_rate(value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, int | float | np.floating | np.integer)
    if isinstance(value, bool) or not number or not 0 <= value < float("inf"):
        raise ValueError(
            f"learning_rate must be a number of at least 0, got {value!r}. A schedule belongs to "
            "the optimizer: keras.optimizers.Adam(schedule)."
        )


def _check_policy(policy: object) -> None:
    if policy not in POLICIES:
        hint = did_you_mean(policy, POLICIES)
        raise ValueError(
            f"on_nonfinite must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}. {hint}"
        )


@contextlib.contextmanager
def learning_rate_set(
    optimizer: keras.optimizers.Optimizer, learning_rate: float | None
) -> Iterator[None]:
    """Sets the optimizer's learning rate, and restores it at the end."""
    if learning_rate is None:
        yield
        return
    try:
        before = float(to_host(optimizer.learning_rate))
        optimizer.learning_rate = learning_rate
    except (TypeError, AttributeError):
        several = isinstance(optimizer, MultiOptimizer)
        kind = "one of each inner optimizer" if several else "a schedule"
        raise ValueError(
            f"learning_rate={learning_rate} was passed to train, but the learning rate of this "
            f"optimizer is {kind}, which can't be set. Make the optimizer with a number, or "
            "leave learning_rate out."
        ) from None
    try:
        yield
    finally:
        optimizer.learning_rate = before
