"""The trainer for (x, y) batches."""

from typing import Any

import keras

from polus.training.checks import add_penalties
from polus.training.trainer import BaseTrainer


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

    def __init__(
        self, model: keras.Model, trainable_weights: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(trainable_weights, keras.optimizers.Optimizer):
            args, trainable_weights = (trainable_weights, *args), None
            trainable_weights = kwargs.pop("trainable_weights", None)
        super().__init__(model, *args, trainable_weights=trainable_weights, **kwargs)

    def forward_with_grads(self, x: Any, y: Any, *sample_weight: Any) -> Any:
        """Returns the labels and the prediction, as Keras' losses take them."""
        return y, self.predicted(self.model(x, training=True)), *sample_weight

    def metric_samples(self, *outputs: Any) -> tuple[Any, ...]:
        """Returns the labels and the prediction; as in Keras, `metrics` are not weighted."""
        return outputs[:2]

    def evaluation_loss(self, *samples: Any) -> Any:
        """Returns the loss over validation data, without sample weights."""
        return add_penalties(self.loss(*samples), self.model.losses)
