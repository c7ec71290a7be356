"""Functions of all metrics of a trainer."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from polus.metrics.adapters import OutputMetric
from polus.metrics.base import IMetric, WeightedSamples

RESERVED_NAMES = ("loss", "epoch", "step")  # columns of the history


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


def results_by_name(
    metrics: Iterable[IMetric], result_of: Callable[[IMetric], Any]
) -> dict[str, Any]:
    """Returns the results of metrics. As in `fit`, those of one that returns a dict have its keys.

    Args:
        metrics: The metrics.
        result_of: Returns the result of one.

    Raises:
        ValueError: If a key of a dict is the name of another result.
    """
    found: dict[str, Any] = {}
    for metric in metrics:
        result = result_of(metric)
        if not isinstance(result, Mapping):
            found[metric.name] = result
            continue
        prefix = f"{metric.output}_" if isinstance(metric, OutputMetric) else ""
        for key, value in result.items():
            name = f"{prefix}{key}"
            if name in found or name in RESERVED_NAMES:
                raise ValueError(
                    f"The metric {metric.name!r} returns a dict with the key {key!r}, which is a "
                    "column of the history already. Rename the key."
                )
            found[name] = value
    return found
