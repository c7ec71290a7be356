"""Learns features of digits without labels, and probes them with a few labels as it learns.

python examples/simclr.py
"""

import argparse

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits

import polus


class SimCLR(polus.BaseTrainer):
    """Draws two views of an image together and others apart (Chen et al., arXiv:2002.05709).

    A linear probe learns the labels from the features, to which it passes no gradient.

    Args:
        models: An "encoder" from images to features, a "head" from features to what is compared,
            and a "probe" from features to logits.
        augment: A layer that makes a view of images.
        probe_optimizer: The probe's optimizer; `optimizer` is that of encoder and head.
        temperature: What similarities are divided by.
        kwargs: The other arguments of `BaseTrainer`. The training metrics "contrastive_accuracy"
            and "probe_accuracy" are fed by the step.
    """

    def __init__(self, models, augment, probe_optimizer, temperature=0.2, **kwargs):
        accuracy = keras.metrics.SparseCategoricalAccuracy
        self.contrastive_accuracy = accuracy(name="contrastive_accuracy")
        self.probe_accuracy = accuracy(name="probe_accuracy")
        metrics = {
            "train": [self.contrastive_accuracy, self.probe_accuracy],
            "validation": [self.probe_accuracy],
        }
        super().__init__(models, metrics=metrics, **kwargs)
        self.augment = augment
        self.probe_optimizer = probe_optimizer
        self.temperature = temperature

    def contrastive_loss(self, one, other):
        """Returns the cross-entropy of finding an image's other view among those of all images."""
        views = ops.normalize(ops.concatenate([one, other]), axis=-1)
        count = ops.shape(views)[0]
        logits = ops.matmul(views, ops.transpose(views)) / self.temperature
        logits = logits - 1e9 * ops.eye(count)  # a view is not compared with itself
        partner = ops.mod(ops.arange(count) + count // 2, count)
        self.contrastive_accuracy.update_state(partner, logits)
        losses = keras.losses.sparse_categorical_crossentropy(partner, logits, from_logits=True)
        return ops.mean(losses)

    def train_step(self, images, labelled, labels):
        encoder, head, probe = self.model.encoder, self.model.head, self.model.probe
        one, other, labelled = (
            self.augment(each, training=True) for each in (images, images, labelled)
        )

        def contrastive():
            return self.contrastive_loss(
                *(head(encoder(view, training=True), training=True) for view in (one, other))
            )

        weights = [*encoder.trainable_weights, *head.trainable_weights]
        loss = self.minimize(contrastive, weights)
        features = encoder(labelled, training=False)

        def probed():
            logits = probe(features, training=True)
            self.probe_accuracy.update_state(labels, logits)
            return ops.mean(
                keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            )

        probe_loss = self.minimize(probed, probe.trainable_weights, self.probe_optimizer)
        return {"contrastive_loss": loss, "probe_loss": probe_loss}

    def prediction_step(self, images, *labels):
        return self.model.probe(self.model.encoder(images, training=False), training=False)

    def evaluation_step(self, images, labels):
        return {"probe_accuracy": (labels, self.prediction_step(images))}


def build(filters: int = 16) -> dict[str, keras.Model]:
    """Returns the models for images of shape (n, 8, 8, 1) and ten classes."""
    features = 4 * filters
    encoder = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(filters, 3, padding="same", activation="relu"),
            layers.Conv2D(2 * filters, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(2 * filters, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(features, "relu"),
        ]
    )
    head = [keras.Input((features,)), layers.Dense(features, "relu"), layers.Dense(32)]
    probe = [keras.Input((features,)), layers.Dense(10)]
    return {
        "encoder": encoder,
        "head": keras.Sequential(head),
        "probe": keras.Sequential(probe),
    }


def build_augmentation() -> keras.Model:
    """Returns a model that shifts, turns and zooms images, and adds noise."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.RandomTranslation(0.15, 0.15, fill_mode="constant", fill_value=-1.0, seed=1),
            layers.RandomRotation(0.05, fill_mode="constant", fill_value=-1.0, seed=2),
            layers.RandomZoom(0.15, fill_mode="constant", fill_value=-1.0, seed=3),
            layers.GaussianNoise(0.2, seed=4),
        ]
    )


def make_trainer(filters: int = 16) -> SimCLR:
    """Returns a trainer of new models."""
    return SimCLR(
        build(filters),
        build_augmentation(),
        probe_optimizer=keras.optimizers.Adam(1e-2),
        optimizer=keras.optimizers.Adam(2e-3),
    )


def main(epochs: int = 40, num_labelled: int = 50) -> dict[str, float]:
    """Returns the accuracy of probes on features learned without labels, and on random ones."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32").reshape(-1, 8, 8, 1) / 8 - 1
    labels = labels.astype("int32")
    test = polus.from_arrays((images[:400], labels[:400]), 200)
    images, labels = images[400:], labels[400:]
    few = np.resize(np.arange(num_labelled), len(images))  # the same few, again and again
    data = polus.from_arrays((images, images[few], labels[few]), 128, drop_remainder=True)

    results = {}
    for name in ("contrastive features", "random features"):
        keras.utils.set_random_seed(0)
        trainer = make_trainer()
        if name == "random features":
            trainer.optimizer.learning_rate = 0.0
        callbacks = [
            polus.ValidationDataCallback(test, "val", every_epochs=max(1, epochs // 4)),
            polus.ConsoleLogCallback(),
        ]
        trainer.train(data, epochs, callbacks)
        results[name] = trainer.evaluate(test)["probe_accuracy"]
    print(f"{num_labelled} labels, {len(images):,} images, {keras.backend.backend()}")
    for name, accuracy in results.items():
        print(f"{name:20} probe accuracy {accuracy:.3f}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    main(**vars(parser.parse_args()))
