"""Trains a classifier of handwritten digits on all devices there are.

Only `join` differs from a program for one device. JAX and TensorFlow use all devices of the machine
from one process, PyTorch takes a process for each:

KERAS_BACKEND=jax python examples/several_devices.py
KERAS_BACKEND=tensorflow python examples/several_devices.py
KERAS_BACKEND=torch torchrun --nproc-per-node 2 examples/several_devices.py

Without GPUs, JAX makes two devices of a processor with
XLA_FLAGS=--xla_force_host_platform_device_count=2. For several machines, see
docs/several_devices.md.
"""

import argparse
import contextlib
import os
from pathlib import Path

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from polus.callbacks import ConsoleLogCallback, SaveModelCallback, ValidationDataCallback
from polus.checkpoint import Checkpoint
from polus.data import from_arrays
from polus.metrics import Accuracy
from polus.training import ClassifierTrainer


def join() -> contextlib.AbstractContextManager[object]:
    """Tells the backend which devices there are. The model is made and trained in what it returns.

    Only TensorFlow has a scope. The others need the call before any model is made.
    """
    if keras.backend.backend() == "torch" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not torch.distributed.is_initialized():  # a launcher such as Ray Train has done it
            torch.distributed.init_process_group()
    elif keras.backend.backend() == "jax":
        if "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ:
            keras.distribution.initialize()  # several processes
        if len(keras.distribution.list_devices()) > 1:
            keras.distribution.set_distribution(keras.distribution.DataParallel())
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if "TF_CONFIG" in os.environ:  # several processes
            return tf.distribute.MultiWorkerMirroredStrategy().scope()
        if len(tf.config.list_physical_devices("GPU")) > 1:
            return tf.distribute.MirroredStrategy().scope()
    return contextlib.nullcontext()


def main(epochs: int = 10, runs: Path = Path("runs")) -> float:
    """Returns the accuracy on held-out digits."""
    with join():
        return train(epochs, runs / "several_devices")


def train(epochs: int, folder: Path) -> float:
    keras.utils.set_random_seed(0)  # the same in all processes
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images.astype("float32") / 16, labels.astype("int32"), random_state=0)
    x, x_test, y, y_test = split
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, "relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = ClassifierTrainer(model, keras.optimizers.Adam(1e-3), loss, metrics=[Accuracy(10)])
    # The batch of all devices together. The last one, which is smaller, may not divide: each device
    # computes all of it, and it counts once.
    test = from_arrays((x_test, y_test), batch_size=64, shuffle=False)
    trainer.train(
        from_arrays((x, y), batch_size=64),
        epochs=epochs,
        callbacks=[
            ConsoleLogCallback(),  # the first process prints and writes files
            ValidationDataCallback(test),
            SaveModelCallback("end", folder / "model.keras"),
            Checkpoint(folder / "checkpoints"),
        ],
        resume=folder / "checkpoints",  # also on another number of devices
    )
    return trainer.evaluate(test)["accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where results go")
    main(**vars(parser.parse_args()))
