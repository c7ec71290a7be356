"""Transfers what a model learned on some digits to other digits, in phases.

python examples/transfer.py
"""

import argparse

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import polus

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build_backbone() -> keras.Model:
    """Returns a model from images of shape (n, 8, 8, 1) to features of shape (n, 32)."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="block_1"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="block_2"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(32, "relu", name="block_3"),
        ],
        name="backbone",
    )


def with_head(backbone: keras.Model) -> keras.Model:
    """Returns the backbone with a new head of five classes."""
    return keras.Sequential([keras.Input((8, 8, 1)), backbone, layers.Dense(5, name="head")])


def classifier(backbone: keras.Model) -> polus.ClassifierTrainer:
    """Returns a trainer of the backbone with a new head."""
    optimizer = keras.optimizers.Adam(3e-3)
    return polus.ClassifierTrainer(with_head(backbone), optimizer, LOSS, [polus.Accuracy(5)])


def main(epochs: int = 12, num_labelled: int = 60) -> dict[str, float]:
    """Returns the accuracy on digits 5 to 9, trained from scratch and transferred."""
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    source, target = labels < 5, labels >= 5
    x, x_test, y, y_test = train_test_split(
        images[target],
        labels[target].astype("int32") - 5,
        train_size=num_labelled,
        stratify=labels[target],
        random_state=0,
    )
    few = polus.from_arrays((x, y), batch_size=20)
    test = polus.from_arrays((x_test, y_test), batch_size=128)

    backbone = build_backbone()
    many = polus.from_arrays((images[source], labels[source].astype("int32")), batch_size=64)
    classifier(backbone).train(many, epochs=epochs)

    backbone.trainable = False
    transferred = classifier(backbone)
    # First the head alone, then the last block with it, then all of it, slowly.
    phases = polus.Unfreeze({epochs: "block_3", 2 * epochs: "*"}, learning_rate={2 * epochs: 3e-4})
    transferred.train(few, epochs=3 * epochs, callbacks=[phases])

    scratch = classifier(build_backbone())
    scratch.train(few, epochs=3 * epochs)
    trainers = {"from scratch": scratch, "transferred": transferred}
    results = {name: trainer.evaluate(test)["accuracy"] for name, trainer in trainers.items()}
    print(f"{num_labelled} labelled images of digits 5 to 9, {keras.backend.backend()}")
    for name, accuracy in results.items():
        print(f"{name:14} accuracy {accuracy:.3f}")
    predicted = transferred.predict(test).argmax(-1)
    print(f"{np.mean(predicted == y_test):.1%} of {len(y_test)} predictions are right")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    main(**vars(parser.parse_args()))
