"""Metrics and losses over a dataset, in inference mode."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from polus.data import DataReader, as_adapter
from polus.host import DeviceValues, to_host
from polus.metrics import (
    IMetric,
    PhaseMetrics,
    WeightedSamples,
    feed_validation,
    kept_has_samples,
    results_by_name,
)
from polus.state import Snapshot
from polus.steps.compiled import CompiledStep
from polus.steps.executor import StepExecutor, StepOwner
from polus.steps.variables import more_metrics, unique
from polus.training.checks import at_least_float32, check_function, terms_of
from polus.training.config import check_count
from polus.training.processes import check_same_batch, same_blocks


def evaluation_step(trainer: Any, *inputs: Any) -> dict[str, Any]:
    """Feeds a trainer's metrics with one batch and returns its loss and terms, if it has any."""
    samples = trainer.evaluation_step(*inputs)
    metrics = PhaseMetrics(trainer.metrics, trainer.validation_metrics)
    terms = feed_validation(metrics, trainer.weighted_metrics, samples)
    if isinstance(samples, Mapping):
        return {name: at_least_float32(value) for name, value in terms.items()}
    if isinstance(samples, WeightedSamples) and samples.sample_weight is None:
        samples = samples[:2]
    loss = trainer.evaluation_loss(*samples)
    return {} if loss is None else terms_of(loss)


def evaluate(
    executor: StepExecutor,
    dataset: object,
    transform: Callable[[Any], Any] | None,
    steps: int | None,
    weights: Sequence[tuple[keras.Variable, keras.Variable]] = (),
) -> dict[str, Any]:
    """Evaluates the trainer's metrics and loss; see `BaseTrainer.evaluate`.

    Args:
        executor: Compiles the evaluation step.
        dataset: The data.
        transform: A function applied to each batch.
        steps: The number of batches at most.
        weights: Pairs of a variable and the one whose value it has during the evaluation.
    """
    check_count("steps", steps)
    check_function(transform, "custom_data_transform_f")
    check = executor.owner.check_batch
    reader = DataReader(as_adapter(dataset), transform, steps, check=check)
    reader.check_ends("evaluate")
    data = reader.epoch(0)
    check_same_batch(reader.placement, data.example)
    step, assigned = executor.evaluation(data.example)
    metrics = _fed_metrics(executor.owner, assigned)
    variables = {id(v): v for metric in metrics for v in metric.variables}
    # Random layers and layers with a state of their own assign in inference mode too.
    variables |= {id(v): v for v in (*assigned, *(own for own, _ in weights))}
    snapshot = Snapshot(variables.values())
    with kept_has_samples(metrics):
        try:
            for own, other in weights:
                own.assign(to_host(other))
            for metric in metrics:
                metric.reset()
            capacity = min(executor.tuning[1], executor.max_batches(data.example))
            losses, sizes = _run(step, reader, data, min(capacity, reader.num_batches or capacity))
            results = results_by_name(metrics, lambda metric: metric.evaluate())
        finally:
            snapshot.restore()
    found = _weighted_means(losses, sizes)
    found |= {name: value for name, value in results.items() if name not in found}
    if not found:
        raise ValueError(
            "There is nothing to compute: the trainer has no metrics and no evaluation_loss. Pass "
            "metrics=[...] to the trainer, or return a dict of scalars from evaluation_step."
        )
    return found


def _fed_metrics(owner: StepOwner, assigned: Sequence[keras.Variable]) -> list[IMetric]:
    """Returns the metrics that an evaluation step which assigns these variables feeds."""
    fed = set(map(id, assigned))
    every = unique([*(owner.validation_metrics or ()), *owner.metrics])
    own = [m for m in every if not m.variables or any(id(v) in fed for v in m.variables)]
    return [*own, *more_metrics(owner, every, fed, ())]


def _run(
    step: CompiledStep, reader: DataReader, data: Any, capacity: int
) -> tuple[list[dict[str, Any]], list[int]]:
    """Runs all batches. Returns the losses of each block, and the size of each batch."""
    losses, sizes = [], []
    with contextlib.closing(data.blocks(capacity, pace=step.pace)) as blocks:
        for block in same_blocks(reader, blocks):
            began = time.perf_counter()
            terms = step(block)
            step.pace.observe(block.count, terms, began)
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
