"""Trains a classifier with a gradient penalty: a gradient inside a gradient.

python examples/custom_step.py
"""

import argparse

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from polus.core import value_and_grad
from polus.data import from_arrays
from polus.metrics import Accuracy, IMetric
from polus.training import BaseTrainer


class LargestSlope(IMetric):
    """The largest slope since the last reset."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.largest = self.add_variable((), "zeros")

    def _samples_from_batch(self, slopes):
        self.largest.assign(ops.maximum(self.largest, ops.max(slopes)))

    def _evaluate(self):
        return ops.convert_to_tensor(self.largest)


class GradientPenalty(BaseTrainer):
    """Keeps the loss flat around the training inputs (Drucker & LeCun 1992, double backprop).

    An example's slope is the norm of the gradient of its loss with respect to its input.

    Args:
        model: A model from inputs of shape (n, features) to logits.
        penalty: The weight of the mean squared slope.
        kwargs: The other arguments of `BaseTrainer`.
    """

    def __init__(self, model, penalty, **kwargs):
        super().__init__(
            model, metrics=[Accuracy(10), LargestSlope(name="largest_slope")], **kwargs
        )
        self.penalty = penalty

    def train_step(self, x, y):
        def forward():
            def example_losses(x):
                logits = self.model(x, training=True)
                losses = self.loss(y, logits)
                # With a sum, each row of the gradient belongs to one example's loss.
                return ops.sum(losses), (losses, logits)

            (_, (losses, logits)), (slopes,) = value_and_grad(
                example_losses, [], has_aux=True, inputs=[x]
            )
            squares = ops.sum(slopes**2, axis=-1)
            accuracy, largest = self.metrics
            accuracy.samples_from_batch((y, ops.stop_gradient(logits)))
            largest.samples_from_batch((ops.sqrt(ops.stop_gradient(squares)),))
            fit, flat = ops.mean(losses), ops.mean(squares)
            return {"loss": fit + self.penalty * flat, "fit": fit, "flat": flat}

        result = self.minimize(forward, self.trainable_weights, self.optimizer)
        self.step_counter.assign_add(1)
        return result


def main(epochs: int = 30, penalty: float = 0.5, noise: float = 0.3) -> dict[float, list[float]]:
    """Returns penalty -> [accuracy, accuracy on noisy inputs], without and with the penalty."""
    images, labels = load_digits(return_X_y=True)
    images, labels = images.astype("float32") / 16, labels.astype("int32")
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    noisy = x_test + np.random.default_rng(0).normal(0, noise, x_test.shape).astype("float32")

    results, slopes = {}, {}
    for weight in (0.0, penalty):
        keras.utils.set_random_seed(0)
        trainer = GradientPenalty(
            keras.Sequential(
                [keras.Input((64,)), layers.Dense(64, activation="tanh"), layers.Dense(10)]
            ),
            weight,
            optimizer=keras.optimizers.Adam(2e-3),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None),
        )
        data = from_arrays((x, y), batch_size=64, drop_remainder=True)
        history = trainer.train(data, epochs=epochs)
        slopes[weight] = history.to_dict()["largest_slope"][-1]
        results[weight] = [
            float(np.mean(trainer.model.predict(inputs, verbose=0).argmax(-1) == y_test))
            for inputs in (x_test, noisy)
        ]

    print(f"Trained on {len(x):,} images, {epochs} epochs, {keras.backend.backend()}")
    print("penalty  accuracy  with noise  largest slope")
    for weight, (clean, noisy_accuracy) in results.items():
        print(f"{weight:7.1f}  {clean:8.4f}  {noisy_accuracy:10.4f}  {slopes[weight]:13.3f}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--penalty", type=float, default=0.5)
    main(**vars(parser.parse_args()))
