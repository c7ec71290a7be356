"""Trains a large classifier of digits, then a small one with its help, and one without.

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
    """A student learns from labels and from a teacher's soft predictions.

    Args:
        student: the model that is trained.
        teacher: a trained model with outputs (n, classes), logits like the student's.
        kwargs: as for `BaseTrainer`.
    """

    def __init__(self, student, teacher, **kwargs):
        super().__init__(student, **kwargs)
        self.teacher = teacher

    def forward_without_grads(self, x, y):  # frozen: no gradient flows here
        return x, y, self.teacher(x, training=False)

    def forward_with_grads(self, x, y, soft):  # trained: returns what the loss takes
        return y, soft, self.model(x, training=True)


def distillation_loss(y, teacher_logits, logits, temperature=3.0, hard_weight=0.1):
    """Cross-entropy with the labels and, softened, with the teacher (arXiv:1503.02531, section 2).

    The soft term is multiplied by temperature**2, so that its gradient keeps its size.
    """
    hard = ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True))
    target = ops.softmax(teacher_logits / temperature)
    soft = ops.mean(
        keras.losses.categorical_crossentropy(target, logits / temperature, from_logits=True)
    )
    soft = soft * temperature**2
    return {"loss": hard_weight * hard + (1 - hard_weight) * soft, "hard": hard, "soft": soft}


def main(epochs: int = 30, labelled: int = 200) -> tuple[float, float, float]:
    """Returns the accuracies of the teacher, the student alone and the distilled student."""
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = images.astype("float32") / 16, labels.astype("int32")
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.4, stratify=labels, random_state=0
    )
    held_out = from_arrays((x_test, y_test), batch_size=256, shuffle=False)

    def data():
        return from_arrays((x, y), batch_size=32, seed=0)

    def trained_alone(model):
        trainer = ClassifierTrainer(
            model,
            keras.optimizers.Adam(2e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[Accuracy(10)],
        )
        trainer.train(data(), epochs=epochs)
        return trainer.evaluate(held_out)["accuracy"]

    teacher = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(256, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(256, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(10),
        ]
    )
    student = keras.Sequential(
        [keras.Input((64,)), layers.Dense(8, activation="relu"), layers.Dense(10)]
    )
    alone = keras.models.clone_model(student)
    alone.set_weights(student.get_weights())

    trainer = Distiller(
        student,
        teacher,
        optimizer=keras.optimizers.Adam(2e-3),
        loss=distillation_loss,
        metrics=[Accuracy(10)],
    )
    teacher_accuracy = trained_alone(teacher)
    alone_accuracy = trained_alone(alone)
    trainer.train(data(), epochs=epochs)
    distilled_accuracy = trainer.evaluate(held_out)["accuracy"]
    return teacher_accuracy, alone_accuracy, distilled_accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    print(main(**vars(parser.parse_args())))
