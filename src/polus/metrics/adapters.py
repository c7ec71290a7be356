"""Whatever may be given as a metric, as an `IMetric`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras

from polus.backends import backend
from polus.metrics.base import PER_OUTPUT, IMetric, kind

COMPARING = (keras.metrics.ConcordanceCorrelation, keras.metrics.PearsonCorrelation)


class KerasMetric(IMetric):
    """A metric of Keras as one of Polus: `KerasMetric(keras.metrics.AUC())`.

    The samples are passed on to `metric.update_state`, whose third argument is the sample weights.
    A mask on the prediction counts as in `fit`.

    Args:
        metric: The `keras.metrics.Metric`. Nothing else may update it.
        reduce_f: See `IMetric`.
        name: The name in logs. Defaults to the metric's own name.
    """

    def __init__(
        self,
        metric: keras.metrics.Metric,
        reduce_f: Callable[[Any], tuple[Any, ...]] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(reduce_f, name or metric.name)
        self.metric = metric

    def _samples_from_batch(self, *samples: Any) -> None:
        try:
            _update(self.metric, samples)
        except Exception as error:
            if any(isinstance(part, Mapping) for part in samples[:2]):
                kinds = " and ".join(map(kind, samples[:2]))
                error.add_note(f"Metric {self.name!r} got {kinds}. {PER_OUTPUT}")
            raise

    def sample_parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.metric.update_state).parameters.values())

    def _evaluate(self) -> Any:
        return self.metric.result()

    def reset_state(self) -> None:
        self.metric.reset_state()


def _update(metric: keras.metrics.Metric, samples: tuple[Any, ...]) -> None:
    """Adds a batch to a metric of Keras: the rows of all replicas if it compares them."""
    placement = backend.placement()
    if placement.parts == 1 or not isinstance(metric, COMPARING):
        metric.update_state(*samples)
        return
    before = [keras.ops.copy(variable) for variable in metric.variables]
    metric.update_state(*(placement.gather(keras.ops.convert_to_tensor(part)) for part in samples))
    # What the replicas add is summed, and each has added the same.
    for variable, value in zip(metric.variables, before, strict=True):
        variable.assign(value + (variable - value) / placement.parts)


class OutputMetric(IMetric):
    """A metric of one output of a model whose labels and predictions are dicts.

    Args:
        metric: An `IMetric` or a `keras.metrics.Metric`.
        output: The key of the output in both dicts. Sample weights are a tensor, or a dict as well.
        name: The name in logs. Defaults to `<output>_<name of the metric>`, as in Keras.
    """

    def __init__(self, metric: object, output: str, name: str | None = None) -> None:
        inner = as_metric(metric)
        super().__init__(name=name or f"{output}_{inner.name}")
        self.metric = inner
        self.output = output

    def _samples_from_batch(self, *samples: Any) -> None:
        self.metric.samples_from_batch(
            tuple(
                self._selected(part) if i < 2 or isinstance(part, Mapping) else part
                for i, part in enumerate(samples)
            )
        )

    def _selected(self, part: Any) -> Any:
        if not isinstance(part, Mapping) or self.output not in part:
            raise ValueError(
                f"Metric {self.name!r} expected dicts of labels and predictions with the key "
                f"{self.output!r}, got {kind(part)}."
            )
        return part[self.output]

    def _evaluate(self) -> Any:
        return self.metric.result()

    def evaluate(self) -> Any:
        return self.metric.evaluate()

    def reset_state(self) -> None:
        self.metric.reset_state()


def as_metric(metric: object) -> IMetric:
    """Returns an `IMetric` as it is and wraps any other `keras.metrics.Metric`.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(metric, IMetric):
        return metric
    if isinstance(metric, keras.metrics.Metric):
        return KerasMetric(metric)
    hint = f" Write {metric.__name__}(...)." if isinstance(metric, type) else ""
    if isinstance(metric, str):
        hint = " Write polus.Accuracy(10), with the number of classes, or one of keras.metrics."
    raise TypeError(
        "A metric must be a polus.metrics.IMetric or a keras.metrics.Metric, got "
        f"{metric!r} of type {type(metric).__name__}.{hint}"
    )


def as_metrics(metrics: object, weighted: bool = False) -> list[IMetric]:
    """Returns the metrics of a trainer's `metrics=` or `weighted_metrics=` argument.

    Args:
        metrics: A sequence of metrics, None for none, or a dict of output name to a metric or a
            sequence of metrics, for a model whose labels and predictions are dicts.
        weighted: Whether they get sample weights.

    Raises:
        TypeError: If one is not a metric, or gets sample weights and cannot take them.
    """
    argument = "weighted_metrics" if weighted else "metrics"
    if isinstance(metrics, Mapping):
        found: list[IMetric] = [
            OutputMetric(metric, output)
            for output, given in metrics.items()
            for metric in (given if isinstance(given, list | tuple) else [given])
        ]
    elif metrics is None or isinstance(metrics, list | tuple):
        found = [as_metric(metric) for metric in metrics or ()]
    else:
        raise TypeError(
            f"{argument} must be a list, got {metrics!r}. Use {argument}=[...], or a dict of the "
            "name of an output to its metrics."
        )
    for metric in found if weighted else ():
        try:
            inspect.signature(metric._samples_from_batch).bind(None, None, None)
        except TypeError:
            raise TypeError(
                f"Metric {metric.name!r} is in weighted_metrics, but takes no weights. Add an "
                "argument: def _samples_from_batch(self, y_true, y_pred, sample_weight=None)."
            ) from None
    return found
