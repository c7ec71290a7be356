"""Trains a generative adversarial network on handwritten digits and draws new digits.

python examples/gan.py
"""

import argparse
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from polus.callbacks import ConsoleLogCallback
from polus.data import from_arrays
from polus.training import BaseTrainer

LATENT = 24


class GAN(BaseTrainer):
    """Trains two models with two optimizers in one step (Goodfellow et al., arXiv:1406.2661).

    Args:
        models: A "generator" from noise of shape (n, LATENT) to images, and a "discriminator" from
            images to logits of shape (n, 1), positive for real images.
        d_optimizer: The discriminator's optimizer; `optimizer` is the generator's.
        kwargs: The other arguments of `BaseTrainer`.
    """

    def __init__(self, models, d_optimizer, **kwargs):
        super().__init__(models, **kwargs)
        self.d_optimizer = d_optimizer
        self.seed = keras.random.SeedGenerator(0)

    def train_step(self, real):
        generator, discriminator = self.model.generator, self.model.discriminator
        noise = keras.random.normal((ops.shape(real)[0], LATENT), seed=self.seed)
        fake = generator(noise, training=True)

        def discriminator_loss():
            on_real = discriminator(real, training=True)
            on_fake = discriminator(fake, training=True)
            # Label smoothing: an overconfident discriminator gives the generator no gradient.
            real_loss = self.loss(0.9 * ops.ones_like(on_real), on_real)
            return real_loss + self.loss(ops.zeros_like(on_fake), on_fake)

        def generator_loss():
            on_fake = discriminator(generator(noise, training=True), training=True)
            return self.loss(ops.ones_like(on_fake), on_fake)

        d_weights = discriminator.trainable_weights
        d_loss = self.minimize(discriminator_loss, d_weights, self.d_optimizer)
        g_loss = self.minimize(generator_loss, generator.trainable_weights, self.optimizer)
        return {"g_loss": g_loss, "d_loss": d_loss}


def build() -> tuple[keras.Model, keras.Model]:
    """Returns a generator and a discriminator of images of shape (n, 64) between -1 and 1."""
    generator = keras.Sequential(
        [
            keras.Input((LATENT,)),
            layers.Dense(128),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(128),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(64, activation="tanh"),
        ]
    )
    discriminator = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128),
            layers.LeakyReLU(0.2),
            layers.Dropout(0.5),
            layers.Dense(128),
            layers.LeakyReLU(0.2),
            layers.Dropout(0.5),
            layers.Dense(1),
        ]
    )
    return generator, discriminator


def main(epochs: int = 150, runs: Path = Path("runs")) -> float:
    """Returns the share of generated images that a digit classifier recognizes with confidence."""
    keras.utils.set_random_seed(0)
    folder = runs / "gan"
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 8 - 1

    generator, discriminator = build()
    trainer = GAN(
        {"generator": generator, "discriminator": discriminator},
        d_optimizer=keras.optimizers.Adam(2e-4, beta_1=0.5),
        optimizer=keras.optimizers.Adam(1e-3, beta_1=0.5),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
    )
    data = from_arrays(images, batch_size=64, drop_remainder=True)
    trainer.train(data, epochs=epochs, callbacks=[ConsoleLogCallback()])

    noise = np.random.default_rng(0).normal(size=(1000, LATENT)).astype("float32")
    generated = generator.predict(noise, batch_size=500, verbose=0)
    classifier = LogisticRegression(max_iter=1000).fit(images, labels)
    probabilities = classifier.predict_proba(generated)
    recognized = float((probabilities.max(-1) > 0.9).mean())
    recognized_real = float((classifier.predict_proba(images).max(-1) > 0.9).mean())
    counts = np.bincount(probabilities.argmax(-1), minlength=10)

    # One column per predicted digit.
    figure, axes = plt.subplots(4, 10, figsize=(10, 4), squeeze=False)
    for digit in range(10):
        chosen = generated[probabilities.argmax(-1) == digit][:4]
        for row in range(4):
            axes[row, digit].axis("off")
            if row < len(chosen):
                axes[row, digit].imshow(chosen[row].reshape(8, 8), cmap="gray_r", vmin=-1, vmax=1)
    figure.savefig(folder / "digits.png")
    plt.close(figure)

    print(f"""
Trained     a GAN on {len(images):,} images, {epochs} epochs, {keras.backend.backend()}
Quality     a classifier trained on real digits recognizes {recognized:.0%} of 1,000 generated
            images (probability > 0.9; {recognized_real:.0%} of the real ones), each digit
            {counts.min()} to {counts.max()} times
File        {folder}/digits.png""")
    return recognized


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150)
    main(**vars(parser.parse_args()))
