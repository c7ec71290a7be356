"""The trainer for (x, y) batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack, overload

import keras
from keras import ops

from polus.backends import backend
from polus.backends.scopes import active_dry_run
from polus.masks import mask_of, own_weights
from polus.metrics import MetricLike, WeightedSamples
from polus.steps.variables import StepVariables
from polus.training.checks import add_penalties, check_model
from polus.training.fit_methods import check_not_overridden
from polus.training.labels import check_labels, num_classes
from polus.training.trainer import BaseTrainer
from polus.whole_batch import batch_loss, ignored_class, is_reduced_by_keras

STEPS = (
    "train_step",
    "forward_without_grads",
    "forward_with_grads",
    "metric_samples",
    "evaluation_step",
    "evaluation_loss",
    "prediction_step",
)


class OtherArguments(TypedDict, total=False):
    """The optional arguments of a trainer besides its metrics and weights, for type checkers."""

    post_process_prediction: Callable[[Any], Any] | None
    post_process_grads: Callable[[list[Any]], list[Any]] | None
    post_process_logits: Callable[[Any], Any] | None
    weighted_metrics: Sequence[MetricLike] | None
    class_weight: Mapping[int, float] | None


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
        class_weight: The weight of each class in the training loss, 1 for those left out. In a
            validation, classes have no weights, as in `fit`.
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
        _check_methods(type(self), model)
        self.class_weight = _checked_class_weight(kwargs.pop("class_weight", None))
        super().__init__(model, *args, **kwargs)

    @property
    def follows_fit(self) -> bool:
        """Whether no part of a step is overridden."""
        return _are_own(type(self), *STEPS) and not vars(self).keys() & set(STEPS)

    def forward_with_grads(self, *inputs: Any, **named: Any) -> Any:
        """Returns the labels and the prediction, as Keras' losses take them."""
        return _classified(self, *inputs)

    def prepare_step(self, *inputs: Any, **named: Any) -> None:
        """Prepares the step as `BaseTrainer` does.

        Raises:
            ValueError: If the first batch is a single example.
        """
        shapes = [getattr(each, "shape", None) for each in inputs[:2]]
        if None not in shapes and len(shapes) == 2 and not shapes[1]:
            raise ValueError(
                f"The labels of the first batch have the shape (), and its inputs {shapes[0]}: it "
                "is a single example. Batch the dataset, for example dataset.batch(32), or a "
                "DataLoader(dataset, batch_size=32)."
            )
        super().prepare_step(*inputs)

    def check_step(self, variables: StepVariables) -> None:
        """Checks the step as `BaseTrainer` does.

        Raises:
            ValueError: If `class_weight` was given, and the step does not use it.
        """
        super().check_step(variables)
        splits = backend.placement().splits_steps
        if splits and "mask" in variables.settings and not is_reduced_by_keras(self.loss):
            self.logger.warning(
                "The model's output has a mask. If the loss, a function, divides by the number of "
                "entries that the mask leaves, the mean over the replicas is not the loss of the "
                "whole batch. See the documentation, Several devices, What each engine gives."
            )
        if self.class_weight is not None and "class_weight" not in variables.settings:
            raise ValueError(
                f"class_weight was given, and the step of {type(self).__name__} does not use it: "
                "ClassifierTrainer.forward_with_grads weighs the classes. Call it, "
                "super().forward_with_grads(x, y), or leave class_weight out and weigh the loss "
                "in the step."
            )

    def metric_samples(self, *outputs: Any, **named: Any) -> tuple[Any, ...]:
        """Returns labels, prediction and weights, which count for `weighted_metrics` only."""
        y, prediction, *sample_weight = outputs
        weights = sample_weight[0] if sample_weight else None
        return WeightedSamples(y, prediction, own_weights(weights))

    def evaluation_step(self, *inputs: Any, **named: Any) -> Any:
        """Returns labels, prediction and weights of a batch, in inference mode."""
        y, prediction = super().evaluation_step(*inputs)
        y = _as_columns(y, prediction, self.loss)
        return WeightedSamples(y, prediction, own_weights(inputs[2] if len(inputs) > 2 else None))

    def check_batch(self, inputs: tuple[Any, ...], where: str) -> None:
        """Raises a ValueError if a label is no class of the model: not every backend notices it."""
        methods = ("train_step", "forward_without_grads", "forward_with_grads", "evaluation_step")
        as_written = all(
            getattr(type(self), name) is getattr(ClassifierTrainer, name) for name in methods
        )
        if not as_written or len(inputs) < 2:
            return
        if (classes := num_classes(self, self.traced_output_shape(), inputs[1])) is not None:
            check_labels(inputs[1], classes, ignored_class(self.loss), where)

    def evaluation_loss(self, *samples: Any, **named: Any) -> Any:
        """Returns the loss over validation data, weighted as the training loss is."""
        return add_penalties(batch_loss(self.loss, *samples), self.model.losses)


def _are_own(cls: type[ClassifierTrainer], *names: str) -> bool:
    """Returns whether a trainer's class overrides none of these."""
    return all(getattr(cls, name) is getattr(ClassifierTrainer, name) for name in names)


def _check_methods(cls: type[ClassifierTrainer], model: keras.Model) -> None:
    """Raises TypeError if the model's class has a step for `fit`, and the trainer's class none."""
    if _are_own(cls, "train_step", "forward_with_grads"):
        check_not_overridden(model, "train_step", "compute_loss", "compute_metrics")
    if _are_own(cls, "evaluation_step"):
        check_not_overridden(model, "test_step")


def _classified(
    trainer: ClassifierTrainer, x: Any, y: Any, sample_weight: Any = None
) -> tuple[Any, ...]:
    prediction = trainer.predicted(trainer.model(x, training=True))
    y = _as_columns(y, prediction, trainer.loss)
    dry_run = active_dry_run()
    if dry_run is not None and not isinstance(prediction, dict) and mask_of(prediction) is not None:
        dry_run.settings.add("mask")
    if trainer.class_weight is not None:
        if dry_run is not None:
            dry_run.settings.add("class_weight")
        by_class = _weights_of(y, prediction, trainer.class_weight)
        sample_weight = by_class if sample_weight is None else sample_weight * by_class
    return (y, prediction) if sample_weight is None else (y, prediction, own_weights(sample_weight))


def _as_columns(y: Any, prediction: Any, loss: object) -> Any:
    """Returns labels of the rank of the prediction, where one of them has a last axis of length 1.

    For a loss that is a function: (N,) and (N, 1) would be broadcast to (N, N) in it. `fit` aligns
    them as well. Keras' classes do it by themselves.
    """
    shape, other = getattr(y, "shape", None), getattr(prediction, "shape", None)
    if isinstance(loss, keras.losses.Loss) or shape is None or other is None:
        return y
    if len(other) == len(shape) + 1 and other[-1] == 1:
        return ops.expand_dims(y, -1)
    return ops.squeeze(y, -1) if len(shape) == len(other) + 1 and shape[-1] == 1 else y


def _weights_of(y: Any, prediction: Any, class_weight: Mapping[int, float]) -> Any:
    """Returns the weight of each label's class; 1 for classes without one, as in `fit`."""
    labels = ops.convert_to_tensor(y)
    if len(labels.shape) > 1 and labels.shape[-1] == prediction.shape[-1] > 1:  # one-hot
        labels = ops.argmax(labels, axis=-1)
    elif len(labels.shape) > 1 and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, -1)
    labels = ops.cast(labels, "int32")
    weights = ops.ones_like(labels, dtype=keras.config.floatx())
    for label, weight in class_weight.items():
        weights = ops.where(labels == label, weight, weights)
    return weights


def _checked_class_weight(class_weight: Any) -> dict[int, float] | None:
    if class_weight is None:
        return None
    if not isinstance(class_weight, Mapping) or not all(
        isinstance(label, int) and isinstance(weight, int | float)
        for label, weight in class_weight.items()
    ):
        raise TypeError(
            f"class_weight must be a dict of classes to weights, got {class_weight!r}. Use, for "
            "example, class_weight={0: 1.0, 1: 5.0}."
        )
    return {int(label): float(weight) for label, weight in class_weight.items()}
