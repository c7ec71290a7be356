"""The range test over a trainer's step."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import keras

from polus.data import DataReader, StepBlock
from polus.data.isolated import isolated_copy
from polus.host import to_host
from polus.lr_finder.result import LRFinderResult
from polus.lr_finder.sweep import StepFunctions, SweepSettings, run_range_test
from polus.lr_finder.swept import (
    check_optimizer,
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
from polus.steps.variables import unique

VALIDATION_BATCHES = 50  # that the trials are judged by, so that this costs less than they do

logger = logging.getLogger("polus.lr_finder")


def find(
    executor: StepExecutor,
    arguments: Mapping[str, Any],
    dataset: object,
    use_lr_found: bool,
    settings: SweepSettings,
    optimizer: keras.optimizers.Optimizer,
    validation_data: object = None,
) -> LRFinderResult:
    """Runs the range test for `BaseTrainer.lr_finder`, which documents the arguments.

    Args:
        executor: Prepares and compiles the step.
        arguments: The arguments of `train` that the trainer keeps.
        dataset: The data; by default that of `arguments`.
        use_lr_found: Whether the optimizer keeps the suggestion.
        settings: The rates, when to stop, and which suggestion to make.
        optimizer: The optimizer to sweep.
        validation_data: What the trials are judged by; by default their training losses.
    """
    dataset = arguments.get("tf_dataset") if dataset is None else dataset
    if dataset is None:
        raise ValueError(
            "lr_finder needs a dataset. Pass one, or set a default with "
            "changing_train_config(tf_dataset=...)."
        )
    check_optimizer(optimizer, use_lr_found)
    reader = DataReader(isolated_copy(dataset), arguments.get("custom_data_transform_f"))
    with random_state_kept():
        inputs = reader.epoch(0).example
    # Outside random_state_kept: training would have drawn the same numbers to build the model.
    variables = executor.prepare(inputs).used
    # A schedule is replaced during the sweep, and is part of the compiled program.
    step = executor.single_step(kept=has_rate_variable(optimizer))
    _say_which(optimizer, executor.owner)

    def run_step(block: StepBlock) -> Any:
        return _loss_of(as_terms(step(block), executor.owner.primary))

    functions = StepFunctions(run_step, run_steps=_run_steps(arguments, reader))
    with kept_has_samples([*executor.owner.metrics, *(executor.owner.validation_metrics or ())]):
        if validation_data is not None:
            validate, assigned = _validation(executor, validation_data, arguments)
            functions = replace(functions, validate=validate)
            variables = unique([*variables, *assigned])
        result = run_range_test(functions, reader, optimizer, variables, settings)
    logger.info("%r", result)
    if use_lr_found:
        _use(optimizer, result.suggestion)
    return result


def _use(optimizer: keras.optimizers.Optimizer, rate: float) -> None:
    old = highest_rate(optimizer)
    set_rates(optimizer, rate)
    logger.info("Learning rate set to %.3g, was %.3g.", rate, old)


def _run_steps(arguments: Mapping[str, Any], reader: DataReader) -> int | None:
    """Returns the steps of the run that `changing_train_config` describes; None if unknown."""
    epochs, steps = arguments.get("epochs"), arguments.get("steps") or reader.num_batches
    return epochs * steps if epochs and steps else None


def _validation(
    executor: StepExecutor, dataset: object, arguments: Mapping[str, Any]
) -> tuple[Callable[[], list[float]], list[keras.Variable]]:
    """Returns a function that returns the loss of each validation batch, and what it assigns."""
    with random_state_kept():
        transform = arguments.get("custom_data_transform_f")
        reader = DataReader(isolated_copy(dataset), transform, prefetch=0)
        data = reader.epoch(0)
        # Under a name of its own: a later validation is compiled as it would have been without.
        step, assigned = executor.inference("range test", executor.evaluation_step, data.example)
        with contextlib.closing(data.blocks()) as blocks:
            kept = list(itertools.islice(blocks, VALIDATION_BATCHES))

    def validate() -> list[float]:
        terms = (as_terms(step(block), executor.owner.primary) for block in kept)
        return [float(to_host(_loss_of(each)).item()) for each in terms]

    return validate, assigned


def _say_which(optimizer: keras.optimizers.Optimizer, owner: object) -> None:
    names = {id(each): name for name, each in optimizers_of(owner).items()}
    inner = [names.pop(id(part), part.name) for part in parts_of(optimizer)]
    swept = " and ".join(inner)
    if names:
        others = ", ".join(names.values())
        logger.info("The range test sweeps the rate of %s; %s keep theirs.", swept, others)


def _loss_of(terms: Mapping[str, Any]) -> Any:
    if "loss" not in terms:
        raise ValueError(
            "The range test follows the loss, and the step returns none, only "
            f"{', '.join(map(repr, terms))}. Give the trainer the name of the one to follow: "
            f"primary={next(iter(terms))!r}."
        )
    return terms["loss"]
