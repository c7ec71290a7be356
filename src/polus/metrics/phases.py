"""Which metrics training feeds, which validation feeds, and with what."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from polus.host import did_you_mean
from polus.metrics.adapters import KerasMetric, OutputMetric, as_metrics
from polus.metrics.base import IMetric
from polus.metrics.update import update_metrics

PHASES = ("train", "validation")


class PhaseMetrics(NamedTuple):
    """The metrics of a trainer by phase.

    Attributes:
        train: Those that the step feeds.
        validation: Those that a validation feeds; None for those of `train` that it can feed.
    """

    train: list[IMetric]
    validation: list[IMetric] | None


def metrics_by_phase(metrics: object) -> PhaseMetrics:
    """Returns what a trainer's argument `metrics` means.

    Args:
        metrics: As for `as_metrics`, or a dict of these with the keys "train" and "validation". A
            metric that both of them list is one metric.

    Raises:
        TypeError: If one is not a metric.
    """
    if not isinstance(metrics, Mapping) or not metrics or not set(metrics) <= set(PHASES):
        return PhaseMetrics(as_metrics(metrics), None)
    train, validation = (as_metrics(metrics.get(phase)) for phase in PHASES)
    known = {key_of(metric): metric for metric in train}
    return PhaseMetrics(train, [known.get(key_of(metric), metric) for metric in validation])


def key_of(metric: IMetric) -> Any:
    """Returns what tells a metric from others, however often it was adapted."""
    if isinstance(metric, KerasMetric):
        return id(metric.metric)
    if isinstance(metric, OutputMetric):
        return metric.output, key_of(metric.metric)
    return id(metric)


def feed_validation(
    metrics: PhaseMetrics, weighted_metrics: Sequence[IMetric], samples: Any
) -> dict[str, Any]:
    """Adds what an evaluation step returned to the metrics of validation.

    Args:
        metrics: The trainer's metrics.
        weighted_metrics: Those of them that get weights.
        samples: Samples for all metrics, or a dict of names to the samples of that metric. In the
            dict, a scalar that belongs to no metric is a term to average, such as "loss".

    Returns:
        The terms of the dict.

    Raises:
        ValueError: If the dict has a name that is neither.
    """
    if not isinstance(samples, Mapping):
        validated = metrics.train if metrics.validation is None else metrics.validation
        fed = validated if metrics.validation is not None else _fitting(validated, samples)
        update_metrics(fed, weighted_metrics, samples)
        return {}
    named = {metric.name: metric for metric in (*metrics.train, *(metrics.validation or ()))}
    terms = {}
    for name, value in samples.items():
        if name in named:
            given = tuple(value) if isinstance(value, tuple | list) else (value,)
            update_metrics([named[name]], weighted_metrics, given)
        elif getattr(value, "shape", None) == ():
            terms[name] = value
        else:
            raise ValueError(
                f"evaluation_step returns samples for {name!r}, and no metric has this name. "
                f"{did_you_mean(name, named)} The metrics are {', '.join(named) or 'none'}. Only a "
                "scalar may stand for itself, and is averaged."
            )
    return terms


def _fitting(metrics: Iterable[IMetric], samples: Any) -> list[IMetric]:
    """Leaves out metrics of one value, such as `keras.metrics.Mean`: only the step feeds them.

    They would take the predictions of a pair of labels and predictions for the weights.
    """
    pair = isinstance(samples, tuple | list) and len(samples) > 1
    return [metric for metric in metrics if not pair or not _takes_one_value(metric)]


def _takes_one_value(metric: IMetric) -> bool:
    if isinstance(metric, OutputMetric):
        return _takes_one_value(metric.metric)
    if metric.reduce_f is not None:
        return False
    names = list(metric.sample_parameters())
    positional = [p for p in names if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    some = any(p.kind is p.VAR_POSITIONAL for p in names)
    return not some and [p.name for p in positional[1:]] in ([], ["sample_weight"])
