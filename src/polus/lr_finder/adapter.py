"""The range test over a trainer's step."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import keras

from polus.data import DataReader, StepBlock
from polus.data.isolated import isolated_copy
from polus.host import did_you_mean, to_host
from polus.lr_finder.result import LRFinderResult
from polus.lr_finder.sweep import StepFunctions, SweepSettings, run_range_test
from polus.lr_finder.swept import (
    check_optimizer,
    chosen_optimizer,
    has_rate_variable,
    highest_rate,
    parts_of,
    set_rates,
)
from polus.metrics import kept_has_samples
from polus.optimizers import optimizers_of
from polus.state import random_state_kept
from polus.steps.compiled import as_terms
from polus.steps.executor import StepExecutor
from polus.steps.variables import StepVariables, unique

VALIDATION_BATCHES = 50  # that the trials are judged by, so that this costs less than they do

EVALUATION = "evaluation step, which judges the trials on validation_data,"

logger = logging.getLogger("polus.lr_finder")


def find(
    executor: StepExecutor,
    arguments: Mapping[str, Any],
    dataset: object,
    use_lr_found: bool,
    settings: SweepSettings,
    optimizer: keras.optimizers.Optimizer | str | None = None,
    validation_data: object = None,
) -> LRFinderResult:
    """Runs the range test for `BaseTrainer.lr_finder`, which documents the arguments.

    Args:
        executor: Prepares and compiles the step.
        arguments: The arguments of `train` that the trainer keeps.
        dataset: The data; by default that of `arguments`.
        use_lr_found: Whether the optimizer keeps the suggestion.
        settings: The rates, when to stop, which suggestion to make, and which term to read.
        optimizer: The optimizer to sweep, or its name; by default the trainer's own.
        validation_data: What the trials are judged by; by default their training losses.
    """
    dataset = _dataset(arguments, dataset, use_lr_found)
    optimizer = chosen_optimizer(executor.owner, optimizer)
    check_optimizer(optimizer, use_lr_found)
    reader = DataReader(isolated_copy(dataset), arguments.get("custom_data_transform_f"))
    with random_state_kept():
        inputs = reader.epoch(0).example
    # Outside random_state_kept: training would have drawn the same numbers to build the model.
    traced = executor.prepare(inputs)
    variables = traced.used
    # A schedule is replaced during the sweep, and is part of the compiled program.
    step = executor.single_step(kept=has_rate_variable(optimizer))
    _check_monitor(settings.monitor, executor, traced)
    _say_which(optimizer, executor.owner)
    if settings.monitor is None and len(traced.updates) > 1:
        _warn_of_other_terms(optimizer, executor, traced)

    def run_step(block: StepBlock) -> Any:
        return _monitored(as_terms(step(block), executor.owner.primary), settings.monitor)

    functions = StepFunctions(run_step, run_steps=_run_steps(arguments, reader))
    with kept_has_samples([*executor.owner.metrics, *(executor.owner.validation_metrics or ())]):
        if validation_data is not None:
            validate, assigned = _validation(executor, validation_data, arguments, settings.monitor)
            functions = replace(functions, validate=validate)
            variables = unique([*variables, *assigned])
        result = run_range_test(functions, reader, optimizer, variables, settings)
    logger.log(logging.WARNING if result.caution else logging.INFO, "%r", result)
    if use_lr_found:
        _use(optimizer, result.suggestion)
    return result


def _dataset(arguments: Mapping[str, Any], dataset: object, use_lr_found: object) -> object:
    if hasattr(use_lr_found, "shape"):  # labels in its place
        raise TypeError(
            "use_lr_found must be True or False, got an array. Data is one argument: "
            "polus.from_arrays((x, y), batch_size=32)."
        )
    dataset = arguments.get("tf_dataset") if dataset is None else dataset
    if dataset is None:
        raise ValueError(
            "lr_finder needs a dataset. Pass one, or set a default with "
            "changing_train_config(tf_dataset=...)."
        )
    return dataset


def _use(optimizer: keras.optimizers.Optimizer, rate: float) -> None:
    old = highest_rate(optimizer)
    set_rates(optimizer, rate)
    logger.info("Learning rate set to %.3g, was %.3g.", rate, old)


def _run_steps(arguments: Mapping[str, Any], reader: DataReader) -> int | None:
    """Returns the steps of the run that `changing_train_config` describes; None if unknown."""
    epochs, steps = arguments.get("epochs"), arguments.get("steps") or reader.num_batches
    return epochs * steps if epochs and steps else None


def _validation(
    executor: StepExecutor, dataset: object, arguments: Mapping[str, Any], monitor: str | None
) -> tuple[Callable[[], list[float]], list[keras.Variable]]:
    """Returns a function that returns the loss of each validation batch, and what it assigns."""
    with random_state_kept():
        transform = arguments.get("custom_data_transform_f")
        with _naming_validation_data():
            reader = DataReader(isolated_copy(dataset), transform, prefetch=0)
            data = reader.epoch(0)
            data.peek()
        # Under a name of its own: a later validation is compiled as it would have been without.
        try:
            name, evaluation_step = "range test", executor.evaluation_step
            step, assigned = executor.inference(name, evaluation_step, data.example)
        except Exception as error:  # of the user's step as well
            error.add_note("It was raised for a batch of validation_data of lr_finder.")
            raise
        with contextlib.closing(data.blocks()) as blocks:
            kept = list(itertools.islice(blocks, VALIDATION_BATCHES))

    def validate() -> list[float]:
        terms = (as_terms(step(block), executor.owner.primary) for block in kept)
        return [float(to_host(_monitored(each, monitor, EVALUATION)).item()) for each in terms]

    return validate, assigned


@contextlib.contextmanager
def _naming_validation_data() -> Iterator[None]:
    """Names the argument in an error that speaks of a dataset."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"validation_data of lr_finder: {error}") from error


def _say_which(optimizer: keras.optimizers.Optimizer, owner: object) -> None:
    names = {id(each): name for name, each in optimizers_of(owner).items()}
    inner = [names.pop(id(part), part.name) for part in parts_of(optimizer)]
    swept = " and ".join(inner)
    if names:
        *others, last = names.values()
        rest = f"{', '.join(others)} and {last} keep their rates" if others else f"{last} keeps its"
        logger.info("The range test sweeps the rate of %s; %s.", swept, rest)


def _check_monitor(monitor: str | None, executor: StepExecutor, traced: StepVariables) -> None:
    """Raises a ValueError if the step returns no scalar of this name."""
    _monitored(as_terms(traced.result, executor.owner.primary), monitor)
    if monitor in executor.array_terms:
        raise ValueError(f"monitor must name a scalar, and {monitor!r} is an array.")


def _warn_of_other_terms(
    optimizer: keras.optimizers.Optimizer, executor: StepExecutor, traced: StepVariables
) -> None:
    """Warns if a step of several optimizers has several losses and none was chosen."""
    primary = executor.owner.primary
    others = as_terms(traced.result).keys() - executor.array_terms - {"loss", primary}
    names = {id(each): name for name, each in optimizers_of(executor.owner).items()}
    if not others or (primary is not None and names.get(id(optimizer)) == "optimizer"):
        return  # `primary` is what the trainer's own optimizer minimizes
    logger.warning(
        "The step has several optimizers, and the search of the rate of %s reads %r. If it "
        "minimizes another term, name that one: %s. In a GAN no single loss tells a good rate: see "
        "docs/learning_rate.md.",
        names.get(id(optimizer), optimizer.name),
        primary or "loss",
        " or ".join(f"monitor={name!r}" for name in sorted(others)),
    )


def _monitored(terms: Mapping[str, Any], monitor: str | None, step: str = "step") -> Any:
    """Returns the term of a step's result that the search reads."""
    name = "loss" if monitor is None else monitor
    if name in terms:
        return terms[name]
    known = ", ".join(map(repr, terms))
    if monitor is None:
        raise ValueError(
            f"The range test follows the loss, and the {step} returns none, only {known}. Name the "
            f"term to follow: monitor={next(iter(terms))!r}, or primary={next(iter(terms))!r} as "
            "an argument of the trainer, for callbacks as well."
        )
    hint = did_you_mean(name, terms)
    raise ValueError(
        f"The {step} returns no term named {name!r} to monitor, only {known}."
        f"{' ' * bool(hint)}{hint}"
    )
