"""Distills a large digit classifier into a small one, and trains the small one alone too.

python examples/distillation.py
"""

import argparse

import keras
from keras import layers, ops
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from polus.data import from_arrays
from polus.metrics import Accuracy
from polus.training import BaseTrainer, ClassifierTrainer


class Distiller(BaseTrainer):
    """Trains a student on labels and on a teacher's soft predictions.

    Args:
        student: The model to train, which returns logits of shape (n, classes).
        teacher: A trained model that returns logits of the same shape.
        kwargs: The other arguments of `BaseTrainer`.
    """

    def __init__(self, student, teacher, **kwargs):
        super().__init__(student, **kwargs)
        self.teacher = teacher

    def forward_without_grads(self, x, y):  # frozen: no gradient flows here
        return x, y, self.teacher(x, training=False)

    def forward_with_grads(self, x, y, soft):  # trained: returns the arguments of the loss
        return y, soft, self.model(x, training=True)


def distillation_loss(y, teacher_logits, logits, temperature=3.0, hard_weight=0.1):
    """Returns cross-entropy with the labels and the softened teacher (arXiv:1503.02531, section 2).

    The soft term is multiplied by temperature**2, so that the temperature does not scale its
    gradient.
    """
    hard = ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True))
    target = ops.softmax(teacher_logits / temperature)
    soft = ops.mean(
        keras.losses.categorical_crossentropy(target, logits / temperature, from_logits=True)
    )
    soft = soft * temperature**2
    return {"loss": hard_weight * hard + (1 - hard_weight) * soft, "hard": hard, "soft": soft}


def main(epochs: int = 40, few: int = 100) -> dict[str, float]:
    """Returns held-out accuracies of the teacher and of the student, trained alone and distilled.

    The teacher is trained on all images, the students on a few. Soft targets tell a student how
    similar an image is to the other digits (arXiv:1503.02531, section 6).
    """
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = images.astype("float32") / 16, labels.astype("int32")
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.4, stratify=labels, random_state=0
    )
    all_images = from_arrays((x, y), batch_size=32)
    few_images = from_arrays((x[:few], y[:few]), batch_size=25)
    held_out = from_arrays((x_test, y_test), batch_size=256, shuffle=False)

    teacher = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.4),
            layers.Dense(10),
        ]
    )
    student = keras.Sequential(
        [keras.Input((64,)), layers.Dense(16, activation="relu"), layers.Dense(10)]
    )
    twin = keras.models.clone_model(student)  # with the same initial weights
    twin.set_weights(student.get_weights())

    def shared():
        return {"optimizer": keras.optimizers.Adam(5e-3), "metrics": [Accuracy(10)]}

    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainers = {
        "teacher": (ClassifierTrainer(teacher, loss=cross_entropy, **shared()), all_images, 1),
        "alone": (ClassifierTrainer(twin, loss=cross_entropy, **shared()), few_images, 2),
        "distilled": (
            Distiller(student, teacher, loss=distillation_loss, **shared()),
            few_images,
            2,
        ),
    }
    results = {}
    print(f"Held out    {len(x_test):,} images, {keras.backend.backend()}")
    for name, (trainer, data, times) in trainers.items():
        trainer.train(data, epochs=times * epochs)
        results[name] = trainer.evaluate(held_out)["accuracy"]
        print(
            f"{name:10}  {trainer.model.count_params():,} weights, "
            f"{data.num_examples:,} images: accuracy {results[name]:.4f}"
        )
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--few", type=int, default=100, help="number of images for the students")
    main(**vars(parser.parse_args()))
