"""Metrics that are updated inside the compiled step and read when an epoch or a validation ends.

A metric takes samples batch by batch and accumulates them in Keras variables, so that predictions
stay on the device and are not kept::

    metric = MacroF1Score(num_classes=10)
    for x, y in dataset:
        metric.samples_from_batch((y, model(x)))
    print(metric.evaluate())  # over all batches; resets the metric
"""

from polus.metrics.adapters import KerasMetric, OutputMetric, as_metric, as_metrics
from polus.metrics.base import IMetric, MetricLike, WeightedSamples
from polus.metrics.confusion import Accuracy, IConfusionMatrix, MacroF1Score
from polus.metrics.phases import PhaseMetrics, feed_validation, metrics_by_phase
from polus.metrics.update import kept_has_samples, results_by_name, update_metrics

__all__ = [
    "Accuracy",
    "IConfusionMatrix",
    "IMetric",
    "KerasMetric",
    "MacroF1Score",
    "MetricLike",
    "OutputMetric",
    "PhaseMetrics",
    "WeightedSamples",
    "as_metric",
    "as_metrics",
    "feed_validation",
    "kept_has_samples",
    "metrics_by_phase",
    "results_by_name",
    "update_metrics",
]
