"""The range test of a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from polus.state import random_state_kept
from polus.steps.compiled import CompiledStep

if TYPE_CHECKING:
    from polus.training import BaseTrainer


def find(
    trainer: BaseTrainer,
    dataset: Any,
    use_lr_found: bool,
    settings: SweepSettings,
    optimizer: Any,
) -> LRFinderResult:
    """Runs the range test for `BaseTrainer.lr_finder`, which documents the arguments."""
    config = trainer._train_config
    dataset = config.get("tf_dataset") if dataset is None else dataset
    if dataset is None:
        raise ValueError(
            "lr_finder needs a dataset. Pass one, or set a default with "
            "changing_train_config(tf_dataset=...)."
        )
    optimizer = trainer.optimizer if optimizer is None else optimizer
    check_optimizer(optimizer, use_lr_found)
    reader = DataReader(isolated_copy(dataset), config.get("custom_data_transform_f"))
    with kept_has_samples(trainer.metrics):
        result = _run(trainer, reader, optimizer, settings)
    trainer.logger.info("%r", result)
    if use_lr_found:
        old = float(optimizer.learning_rate)
        optimizer.learning_rate = result.suggestion
        trainer.logger.info("Learning rate set to %.3g, was %.3g.", result.suggestion, old)
    return result


def _run(
    trainer: BaseTrainer, reader: DataReader, optimizer: Any, settings: SweepSettings
) -> LRFinderResult:
    with random_state_kept():
        inputs = reader.epoch(0).example
    # Outside random_state_kept: training would have drawn the same numbers to build the model.
    trainer._refresh()
    trainer._build(inputs)
    variables = trainer._survey(inputs)
    step = CompiledStep(trainer._step, trainer._jit_compile)
    if has_rate_variable(optimizer):  # otherwise the schedule is part of the compiled program
        step = trainer._dispatches.setdefault(("lr_finder", trainer._jit_compile), step)

    def run_step(block: StepBlock) -> Any:
        program, arguments = step.prepare(block)
        outputs = program(*arguments)
        return outputs["loss"] if isinstance(outputs, dict) else outputs

    return run_range_test(run_step, reader, optimizer, variables, settings)
