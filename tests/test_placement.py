"""Engines for several devices are refused by name, before anything is trained."""

import contextlib

import keras
import numpy as np
import pytest

from polus.data import from_arrays
from polus.training import ClassifierTrainer

X = np.zeros((32, 4), "float32")
Y = np.zeros(32, "int32")


@contextlib.contextmanager
def jax_data_parallel(tmp_path, monkeypatch):
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    try:
        yield
    finally:
        keras.distribution.set_distribution(None)


@contextlib.contextmanager
def tensorflow_strategy(tmp_path, monkeypatch):
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        yield


@contextlib.contextmanager
def torch_process_group(tmp_path, monkeypatch):
    import torch.distributed

    path = f"file://{tmp_path}/group"
    torch.distributed.init_process_group("gloo", init_method=path, rank=0, world_size=1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


ENGINES = {
    "jax": (jax_data_parallel, "keras.distribution.DataParallel"),
    "tensorflow": (tensorflow_strategy, "tf.distribute.MirroredStrategy"),
    "torch": (torch_process_group, "process group of 2 processes"),
}


def test_an_engine_for_several_devices_raises(tmp_path, monkeypatch):
    engine, name = ENGINES[keras.backend.backend()]
    with engine(tmp_path, monkeypatch):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        trainer = ClassifierTrainer(model, keras.optimizers.SGD(0.1), loss)
        with pytest.raises(NotImplementedError, match=f"{name} is active"):
            trainer.train(from_arrays((X, Y), 16), 1)
        with pytest.raises(NotImplementedError, match=f"{name} is active"):
            trainer.train_step(X, Y)
