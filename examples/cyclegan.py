"""Translates digits into their negatives and back, without pairs to learn from.

python examples/cyclegan.py
"""

import argparse
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits

import polus


class CycleGAN(polus.BaseTrainer):
    """Two translators and two judges, each with its own loss (Zhu et al., arXiv:1703.10593).

    All losses come from one forward pass. The judges' slope at real images is kept small (Mescheder
    et al., arXiv:1801.04406).

    Args:
        models: The translators "a_to_b" and "b_to_a", and the judges "judge_a" and "judge_b" from
            images to one number per image, 1 for a real one.
        optimizers: An optimizer for each name of `models`.
        cycle: The weight of the error after a translation to the other side and back.
        penalty: The weight of the judges' squared slope.
        kwargs: The other arguments of `BaseTrainer`.
    """

    def __init__(self, models, optimizers, cycle=10.0, penalty=1.0, **kwargs):
        super().__init__(models, optimizers["a_to_b"], **kwargs)
        self.optimizers = optimizers
        self.cycle = cycle
        self.penalty = penalty

    def judged(self, judge, real, fake):
        """Returns what a judge minimizes, and what its opponent does."""

        def score(images):
            return ops.sum(judge(images, training=True))

        _, (slope,) = polus.value_and_grad(score, [], inputs=[real])
        on_real, on_fake = judge(real, training=True), judge(fake, training=True)
        own = ops.mean((on_real - 1) ** 2) + ops.mean(on_fake**2)
        slope = ops.mean(ops.sum(slope**2, axis=(1, 2, 3)))
        return own / 2 + self.penalty * slope, ops.mean((on_fake - 1) ** 2)

    def train_step(self, a, b):
        a_to_b, b_to_a = self.model.a_to_b, self.model.b_to_a

        def losses():
            fake_a, fake_b = b_to_a(b, training=True), a_to_b(a, training=True)
            cycled_a, cycled_b = b_to_a(fake_b, training=True), a_to_b(fake_a, training=True)
            cycle = ops.mean(ops.abs(cycled_a - a)) + ops.mean(ops.abs(cycled_b - b))
            judge_a, fooled_a = self.judged(self.model.judge_a, a, fake_a)
            judge_b, fooled_b = self.judged(self.model.judge_b, b, fake_b)
            return {
                "a_to_b": fooled_b + self.cycle * cycle,
                "b_to_a": fooled_a + self.cycle * cycle,
                "judge_a": judge_a,
                "judge_b": judge_b,
                "cycle": cycle,
            }

        return self.minimize_together(
            losses,
            {
                name: (self.model[name].trainable_weights, self.optimizers[name])
                for name in ("a_to_b", "b_to_a", "judge_a", "judge_b")
            },
        )


def build_translator(filters: int = 32) -> keras.Model:
    """Returns a model from images of shape (n, 8, 8, 1) between -1 and 1 to such images."""
    images = keras.Input((8, 8, 1))
    x = layers.Conv2D(filters, 3, padding="same", activation="relu")(images)
    for _ in range(2):
        hidden = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        hidden = layers.ReLU()(layers.BatchNormalization()(hidden))
        x = layers.Add()([x, layers.Conv2D(filters, 3, padding="same")(hidden)])
    return keras.Model(images, layers.Conv2D(1, 3, padding="same", activation="tanh")(x))


def build_judge(filters: int = 32) -> keras.Model:
    """Returns a model from images of shape (n, 8, 8, 1) to numbers of shape (n, 1)."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(filters, 3, padding="same"),
            layers.LeakyReLU(0.2),
            layers.Conv2D(2 * filters, 3, strides=2, padding="same"),
            layers.LeakyReLU(0.2),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )


def make_trainer(filters: int = 32, rate: float = 5e-4) -> CycleGAN:
    """Returns a trainer of translators and judges."""
    models = {name: build_translator(filters) for name in ("a_to_b", "b_to_a")}
    models |= {name: build_judge(filters) for name in ("judge_a", "judge_b")}
    return CycleGAN(models, {name: keras.optimizers.Adam(rate, beta_1=0.5) for name in models})


def main(epochs: int = 60, runs: Path = Path("runs")) -> float:
    """Returns the mean absolute error of the translated images; that of no translation is 1.6."""
    keras.utils.set_random_seed(0)
    folder = runs / "cyclegan"
    folder.mkdir(parents=True, exist_ok=True)
    images = load_digits().images.astype("float32")[..., None] / 8 - 1
    test, a, b = images[:297], images[297:1047], -images[1047:]  # no image is on both sides

    trainer = make_trainer()
    callbacks = [
        polus.ConsoleLogCallback(),
        polus.SaveModelCallback("end", folder / "{model}.keras", models=["a_to_b", "b_to_a"]),
    ]
    trainer.train(polus.from_arrays((a, b), 50, drop_remainder=True), epochs, callbacks)

    a_to_b, b_to_a = trainer.model.a_to_b, trainer.model.b_to_a
    negatives = a_to_b.predict(test, verbose=0)
    back = b_to_a.predict(negatives, verbose=0)
    error, before = np.abs(negatives + test).mean(), np.abs(test + test).mean()
    figure, axes = plt.subplots(3, 10, figsize=(10, 3))
    for row, pictures in zip(axes, (test, negatives, back), strict=True):
        for axis, picture in zip(row, pictures, strict=False):
            axis.imshow(picture[..., 0], cmap="gray", vmin=-1, vmax=1)
            axis.axis("off")
    figure.savefig(folder / "translated.png")
    plt.close(figure)

    print(f"""
Trained     a CycleGAN on {len(a)} digits and {len(b)} negatives of others, {epochs} epochs,
            {keras.backend.backend()}
Quality     {len(test)} translated images have a mean absolute error of {error:.3f} ({before:.3f}
            without translation), and of {np.abs(back - test).mean():.3f} after the way back
Files       {folder}: a_to_b.keras, b_to_a.keras, and translated.png with images, their negatives
            and the way back""")
    return float(error)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    main(**vars(parser.parse_args()))
