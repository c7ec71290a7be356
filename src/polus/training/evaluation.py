"""Metrics and losses over a dataset, in inference mode."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from polus.data import DataReader, as_adapter
from polus.host import DeviceValues
from polus.metrics import WeightedSamples, kept_has_samples, update_metrics
from polus.state import Snapshot
from polus.steps.compiled import CompiledStep
from polus.steps.executor import StepExecutor
from polus.training.checks import check_function, terms_of
from polus.training.config import check_count


def evaluation_step(trainer: Any, *inputs: Any) -> dict[str, Any]:
    """Feeds a trainer's metrics with one batch and returns its loss and terms, if it has any."""
    samples = trainer.evaluation_step(*inputs)
    update_metrics(trainer.metrics, trainer.weighted_metrics, samples)
    if isinstance(samples, WeightedSamples) and samples.sample_weight is None:
        samples = samples[:2]
    loss = trainer.evaluation_loss(*samples)
    return {} if loss is None else terms_of(loss)


def evaluate(
    executor: StepExecutor,
    dataset: object,
    transform: Callable[[Any], Any] | None,
    steps: int | None,
) -> dict[str, Any]:
    """Evaluates the trainer's metrics and loss; see `BaseTrainer.evaluate`."""
    check_count("steps", steps)
    check_function(transform, "custom_data_transform_f")
    reader = DataReader(as_adapter(dataset), transform, steps)
    reader.check_ends("evaluate")
    data = reader.epoch(0)
    step, assigned = executor.evaluation(data.example)
    metrics = executor.owner.metrics
    variables = {id(v): v for metric in metrics for v in metric.variables}
    # Random layers and layers with a state of their own assign in inference mode too.
    variables |= {id(v): v for v in assigned}
    snapshot = Snapshot(variables.values())
    with kept_has_samples(metrics):
        try:
            for metric in metrics:
                metric.reset()
            losses, sizes = _run(step, data, min(executor.tuning[1], reader.num_batches or 2**31))
            results = {metric.name: metric.evaluate() for metric in metrics}
        finally:
            snapshot.restore()
    return _weighted_means(losses, sizes) | results


def _run(step: CompiledStep, data: Any, capacity: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Runs all batches. Returns the losses of each block, and the size of each batch."""
    losses, sizes = [], []
    with contextlib.closing(data.blocks(capacity)) as blocks:
        for block in blocks:
            terms = step(block)
            losses.append({k: DeviceValues(values, block.count) for k, values in terms.items()})
            sizes += [block.batch_size] * block.count
    return losses, sizes


def _weighted_means(losses: list[dict[str, Any]], sizes: list[int]) -> dict[str, float]:
    names = sorted(losses[0], key=lambda name: name != "loss")
    columns = {
        name: np.concatenate([np.asarray(row[name], np.float64) for row in losses])
        for name in names
    }
    return {name: float(np.average(column, weights=sizes)) for name, column in columns.items()}
