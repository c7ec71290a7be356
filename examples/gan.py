"""Trains a generative adversarial network on handwritten digits, and draws new ones.

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
    """Two models and two optimizers in one step (Goodfellow et al. 2014, arXiv:1406.2661).

    Args:
        generator: noise (n, LATENT) -> images.
        discriminator: images -> logits (n, 1), above 0 for real ones.
        d_optimizer: the optimizer of the discriminator; `optimizer` is the generator's.
        kwargs: as for `BaseTrainer`.
    """

    def __init__(self, generator, discriminator, d_optimizer, **kwargs):
        super().__init__(generator, **kwargs)
        self.discriminator = discriminator
        self.d_optimizer = d_optimizer
        self.seed = keras.random.SeedGenerator(0)

    def train_step(self, real):
        noise = keras.random.normal((ops.shape(real)[0], LATENT), seed=self.seed)
        fake = self.model(noise, training=True)

        def judge():
            good = self.discriminator(real, training=True)
            bad = self.discriminator(fake, training=True)
            # Real images count as 0.9: a discriminator that is too sure teaches nothing.
            return self.loss(0.9 * ops.ones_like(good), good) + self.loss(ops.zeros_like(bad), bad)

        def fool():
            score = self.discriminator(self.model(noise, training=True), training=True)
            return self.loss(ops.ones_like(score), score)

        judged = self.minimize(judge, self.discriminator.trainable_weights, self.d_optimizer)
        fooled = self.minimize(fool, self.model.trainable_weights, self.optimizer)
        self.step_counter.assign_add(1)
        return {"loss": fooled, "discriminator": judged}


def build() -> tuple[keras.Model, keras.Model]:
    """A generator and a discriminator of images (n, 64) between -1 and 1."""
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
    """Returns the share of generated images that a classifier of real digits is sure of."""
    keras.utils.set_random_seed(0)
    folder = runs / "gan"
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 8 - 1

    generator, discriminator = build()
    trainer = GAN(
        generator,
        discriminator,
        d_optimizer=keras.optimizers.Adam(2e-4, beta_1=0.5),
        optimizer=keras.optimizers.Adam(1e-3, beta_1=0.5),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
    )
    data = from_arrays(images, batch_size=64, drop_remainder=True)
    trainer.train(data, epochs=epochs, callbacks=[ConsoleLogCallback()])

    noise = np.random.default_rng(0).normal(size=(1000, LATENT)).astype("float32")
    generated = generator.predict(noise, batch_size=500, verbose=0)
    judge = LogisticRegression(max_iter=1000).fit(images, labels)
    confidence = judge.predict_proba(generated)
    sure = float((confidence.max(-1) > 0.9).mean())
    sure_of_real = float((judge.predict_proba(images).max(-1) > 0.9).mean())
    counts = np.bincount(confidence.argmax(-1), minlength=10)

    # One column per digit: those that the classifier takes for it.
    figure, axes = plt.subplots(4, 10, figsize=(10, 4), squeeze=False)
    for digit in range(10):
        chosen = generated[confidence.argmax(-1) == digit][:4]
        for row in range(4):
            axes[row, digit].axis("off")
            if row < len(chosen):
                axes[row, digit].imshow(chosen[row].reshape(8, 8), cmap="gray_r", vmin=-1, vmax=1)
    figure.savefig(folder / "digits.png")
    plt.close(figure)

    print(f"""
Trained     a GAN on {len(images):,} images, {epochs} epochs, {keras.backend.backend()}
How well    a classifier of real digits is sure (> 0.9) of {sure:.0%} of 1,000 generated
            ones, of {sure_of_real:.0%} of the real ones; each digit is found
            {counts.min()} to {counts.max()} times
File        {folder}/digits.png""")
    return sure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150)
    main(**vars(parser.parse_args()))
