"""Trains a diffusion model on handwritten digits, and draws new digits as it learns.

python examples/ddpm.py
"""

import argparse
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import polus

PIXELS = 64


class Diffusion(polus.BaseTrainer):
    """Learns to tell the noise in an image (Ho et al., arXiv:2006.11239).

    Args:
        model: A model from noisy images and times, in shares of the whole, to the noise.
        num_times: The steps from an image to noise.
        kwargs: The other arguments of `BaseTrainer`.
    """

    def __init__(self, model, num_times: int, **kwargs):
        super().__init__(model, **kwargs)
        self.num_times = num_times
        betas = np.linspace(1e-4, min(20 / num_times, 0.99), num_times)
        self.alphas = (1 - betas).astype("float32")
        self.kept = np.cumprod(1 - betas).astype("float32")  # of an image, after so many steps
        self.seed = keras.random.SeedGenerator(0)
        self.average = polus.Average(model, decay=0.995)

    def train_step(self, images):
        size = ops.shape(images)[0]
        times = keras.random.randint((size,), 0, self.num_times, seed=self.seed)
        noise = keras.random.normal(ops.shape(images), seed=self.seed)
        kept = ops.take(self.kept, times)[:, None]
        noisy = ops.sqrt(kept) * images + ops.sqrt(1 - kept) * noise

        def loss():
            shares = ops.cast(times, "float32")[:, None] / self.num_times
            return ops.mean((self.model([noisy, shares], training=True) - noise) ** 2)

        return self.minimize(loss, self.trainable_weights)

    @polus.function
    def denoised(self, images, time):
        """Returns images a step nearer to the data, by the averaged weights."""
        shares = ops.ones((ops.shape(images)[0], 1)) * ops.cast(time, "float32") / self.num_times
        noise = self.average([images, shares], training=False)
        alpha, kept = ops.take(self.alphas, time), ops.take(self.kept, time)
        mean = (images - (1 - alpha) / ops.sqrt(1 - kept) * noise) / ops.sqrt(alpha)
        fresh = keras.random.normal(ops.shape(images), seed=self.seed)
        return mean + ops.where(time > 0, ops.sqrt(1 - alpha), 0.0) * fresh

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Draws images, of shape (count, PIXELS)."""
        images = np.random.default_rng(seed).normal(size=(count, PIXELS)).astype("float32")
        for time in reversed(range(self.num_times)):
            images = self.denoised(images, np.int32(time))
        return ops.convert_to_numpy(images)


class Draw(polus.Callback):
    """Saves a picture of samples after every n-th epoch."""

    def __init__(self, folder: Path, every_epochs: int) -> None:
        super().__init__()
        self.folder = folder
        self.every_epochs = every_epochs

    def on_epoch_end(self, epoch: int) -> None:
        if (epoch + 1) % self.every_epochs:
            return
        figure, axes = plt.subplots(2, 8, figsize=(8, 2))
        for axis, image in zip(axes.flat, self.coordinator.trainer.sample(16), strict=True):
            axis.imshow(image.reshape(8, 8), cmap="gray_r", vmin=-1, vmax=1)
            axis.axis("off")
        figure.savefig(self.folder / f"epoch-{epoch + 1:03d}.png")
        plt.close(figure)


def build() -> keras.Model:
    """Returns a model of noisy images and times, which adds what it finds to its input twice."""
    images, times = keras.Input((PIXELS,)), keras.Input((1,))
    frequencies = np.float32(2 ** np.arange(6) * np.pi / 2)
    waves = layers.Concatenate()([layers.Rescaling(f)(times) for f in frequencies])
    waves = layers.Concatenate()([ops.sin(waves), ops.cos(waves)])
    x = layers.Dense(256)(images)
    for _ in range(3):
        hidden = layers.Concatenate()([layers.LayerNormalization()(x), waves])
        hidden = layers.Dense(256, activation="silu")(hidden)
        x = layers.Add()([x, layers.Dense(256)(hidden)])
    return keras.Model([images, times], layers.Dense(PIXELS)(x))


def main(epochs: int = 200, num_times: int = 100, runs: Path = Path("runs")) -> float:
    """Returns the share of drawn images that a digit classifier recognizes with confidence."""
    keras.utils.set_random_seed(0)
    folder = runs / "ddpm"
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 8 - 1

    schedule = polus.schedules.Cosine(2e-3, warmup=0.05)
    trainer = Diffusion(build(), num_times, optimizer=keras.optimizers.Adam(schedule))
    callbacks = [polus.ConsoleLogCallback(), Draw(folder, max(1, epochs // 4))]
    callbacks += [polus.SaveModelCallback("end", folder / "average.keras", models=["average"])]
    trainer.train(polus.from_arrays(images, 128, drop_remainder=True), epochs, callbacks)

    classifier = LogisticRegression(max_iter=1000).fit(images, labels)
    probabilities = classifier.predict_proba(trainer.sample(500))
    recognized = float((probabilities.max(-1) > 0.9).mean())
    print(f"""
Trained     a diffusion model on {len(images):,} images, {epochs} epochs, {keras.backend.backend()}
Quality     a classifier trained on real digits recognizes {recognized:.0%} of 500 drawn images
            (probability > 0.9)
Files       {folder}: average.keras and a picture of samples every {max(1, epochs // 4)} epochs""")
    return recognized


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    main(**vars(parser.parse_args()))
