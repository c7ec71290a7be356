"""Trains and saves a model on one backend, for the tests to load on all, with what it predicts.

KERAS_BACKEND=tensorflow python tests/data/saved_model.py
"""

import json
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from polus.training import ClassifierTrainer

FILE = Path(__file__).parent / f"trained_on_{keras.backend.backend()}.keras"

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input((6, 3)),
        layers.Conv1D(4, 3, activation="relu"),
        layers.BatchNormalization(),
        layers.LSTM(4),
        layers.Dropout(0.2),
        layers.Dense(2),
    ]
)
x = np.random.default_rng(0).normal(size=(32, 6, 3)).astype("float32")
y = x[:, 0, :2] ** 2
loss = keras.losses.MeanSquaredError()
ClassifierTrainer(model, keras.optimizers.Adam(0.05), loss).train([(x, y)], epochs=5)
model.save(FILE)
stored = {"inputs": x[:4].round(4).tolist(), "predictions": None}
stored["predictions"] = ops.convert_to_numpy(model(np.float32(stored["inputs"]))).tolist()
FILE.with_suffix(".json").write_text(json.dumps(stored) + "\n")
