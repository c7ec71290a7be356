"""The trainer for (x, y) batches."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack, overload

import keras

from polus.metrics import MetricLike
from polus.training.checks import add_penalties, check_model
from polus.training.trainer import BaseTrainer


class OtherArguments(TypedDict, total=False):
    """The optional arguments of a trainer besides its metrics and weights, for type checkers."""

    post_process_prediction: Callable[[Any], Any] | None
    post_process_grads: Callable[[list[Any]], list[Any]] | None
    post_process_logits: Callable[[Any], Any] | None


class TrainerArguments(OtherArguments, total=False):
    """The optional arguments of a trainer besides its weights, for type checkers."""

    metrics: Sequence[MetricLike] | None


class ClassifierTrainer(BaseTrainer):
    """Classification and regression over (x, y) or (x, y, sample_weight) batches.

    ```python
    trainer = ClassifierTrainer(
        model, keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy()
    )
    history = trainer.train(polus.data.from_arrays((x, y), batch_size=32), epochs=5)
    ```

    The losses of the model itself (regularization, `add_loss`) are part of the loss, as in Keras.

    Args:
        model: A `keras.Model`.
        trainable_weights: The variables to train. By default all trainable ones of the model. The
            optimizer may stand in this place: `ClassifierTrainer(model, optimizer, loss)`.
        args: As for `BaseTrainer`, from `optimizer` on.
        kwargs: As for `BaseTrainer`, from `optimizer` on.
    """

    @overload
    def __init__(
        self,
        model: keras.Model,
        trainable_weights: Sequence[keras.Variable] | None = None,
        *,
        optimizer: keras.optimizers.Optimizer,
        loss: Callable[..., Any],
        **kwargs: Unpack[TrainerArguments],
    ) -> None: ...
    @overload
    def __init__(
        self,
        model: keras.Model,
        trainable_weights: Sequence[keras.Variable] | None,
        optimizer: keras.optimizers.Optimizer,
        loss: Callable[..., Any],
        metrics: Sequence[MetricLike] | None = None,
        **kwargs: Unpack[OtherArguments],
    ) -> None: ...
    @overload
    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        loss: Callable[..., Any],
        metrics: Sequence[MetricLike] | None = None,
        *,
        trainable_weights: Sequence[keras.Variable] | None = None,
        **kwargs: Unpack[OtherArguments],
    ) -> None: ...

    def __init__(self, model: keras.Model, *args: Any, **kwargs: Any) -> None:
        check_model(model)
        if args and (args[0] is None or isinstance(args[0], list | tuple)):
            if "trainable_weights" in kwargs:
                raise TypeError(
                    "ClassifierTrainer got trainable_weights twice: second and by name. Pass "
                    "ClassifierTrainer(model, optimizer, loss, trainable_weights=...)."
                )
            kwargs["trainable_weights"], args = args[0], args[1:]
        super().__init__(model, *args, **kwargs)

    def forward_with_grads(self, *inputs: Any, **named: Any) -> Any:
        """Returns the labels and the prediction, as Keras' losses take them."""
        return _classified(self, *inputs)

    def metric_samples(self, *outputs: Any, **named: Any) -> tuple[Any, ...]:
        """Returns the labels and the prediction; as in Keras, `metrics` are not weighted."""
        return outputs[:2]

    def evaluation_loss(self, *samples: Any, **named: Any) -> Any:
        """Returns the loss over validation data, without sample weights."""
        return add_penalties(self.loss(*samples), self.model.losses)


def _classified(trainer: ClassifierTrainer, x: Any, y: Any, *sample_weight: Any) -> tuple[Any, ...]:
    return y, trainer.predicted(trainer.model(x, training=True)), *sample_weight
