"""Functions of all metrics of a trainer."""

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from polus.metrics.base import IMetric, WeightedSamples


def update_metrics(
    metrics: Iterable[IMetric], weighted_metrics: Collection[IMetric], samples: tuple[Any, ...]
) -> None:
    """Adds a batch to metrics. As in `fit`, sample weights reach the weighted ones only.

    Args:
        metrics: All metrics.
        weighted_metrics: Those of them that get weights.
        samples: `WeightedSamples`, or any other tuple, which all metrics take as it is.
    """
    unweighted = samples
    if isinstance(samples, WeightedSamples):
        unweighted = (samples.y_true, samples.y_pred)
        samples = unweighted if samples.sample_weight is None else tuple(samples)
    weighted = set(map(id, weighted_metrics))
    for metric in metrics:
        metric.samples_from_batch(samples if id(metric) in weighted else unweighted)


@contextlib.contextmanager
def kept_has_samples(metrics: Iterable[IMetric]) -> Iterator[None]:
    """Restores `has_samples` of each metric at the end: an evaluation or a dry run changes it."""
    before = [(metric, metric.has_samples) for metric in metrics]
    try:
        yield
    finally:
        for metric, had in before:
            metric.has_samples = had
