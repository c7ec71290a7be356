"""The range test over a trainer's step."""

import logging
from collections.abc import Mapping
from typing import Any

import keras

from polus.data import DataReader, StepBlock
from polus.data.isolated import isolated_copy
from polus.lr_finder.result import LRFinderResult
from polus.lr_finder.sweep import (
    SweepSettings,
    check_optimizer,
    has_rate_variable,
    run_range_test,
)
from polus.metrics import kept_has_samples
from polus.optimizers import optimizers_of
from polus.state import random_state_kept
from polus.steps.compiled import as_terms
from polus.steps.executor import StepExecutor

logger = logging.getLogger("polus.lr_finder")


def find(
    executor: StepExecutor,
    arguments: Mapping[str, Any],
    dataset: object,
    use_lr_found: bool,
    settings: SweepSettings,
    optimizer: keras.optimizers.Optimizer,
) -> LRFinderResult:
    """Runs the range test for `BaseTrainer.lr_finder`, which documents the arguments.

    Args:
        executor: Prepares and compiles the step.
        arguments: The arguments of `train` that the trainer keeps.
        dataset: The data; by default that of `arguments`.
        use_lr_found: Whether the optimizer keeps the suggestion.
        settings: The rates, when to stop, and which suggestion to make.
        optimizer: The optimizer to sweep.
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

    with kept_has_samples(executor.owner.metrics):
        result = run_range_test(run_step, reader, optimizer, variables, settings)
    logger.info("%r", result)
    if use_lr_found:
        old = float(optimizer.learning_rate)
        optimizer.learning_rate = result.suggestion
        logger.info("Learning rate set to %.3g, was %.3g.", result.suggestion, old)
    return result


def _say_which(optimizer: keras.optimizers.Optimizer, owner: object) -> None:
    names = {id(each): name for name, each in optimizers_of(owner).items()}
    swept = names.pop(id(optimizer), optimizer.name)
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
