"""Mistakes that type checkers find. Each line says which rule of mypy and of pyright finds it.

It is checked, not run.
"""

from typing import Any

import keras
import numpy as np

from polus.callbacks import Callback, EarlyStop, SaveModelCallback, ValidationDataCallback
from polus.checkpoint import Checkpoint
from polus.core import function, set_jit_compile, value_and_grad
from polus.data import from_arrays
from polus.metrics import Accuracy
from polus.training import BaseTrainer, ClassifierTrainer

x = np.zeros((96, 8), "float32")
data = from_arrays(x, 32)
model = keras.Sequential([keras.layers.Dense(3)])
optimizer = keras.optimizers.Adam()


def mean_error(y: Any, prediction: Any) -> Any:
    return y - prediction


trainer = ClassifierTrainer(model, optimizer, mean_error)

# Arguments of train.
trainer.train(data, "3")  # mypy: arg-type, pyright: reportArgumentType
trainer.train(data, epochs=2.5)  # mypy: arg-type, pyright: reportArgumentType
trainer.train(data, epoch=3)  # mypy: arg-type, pyright: reportArgumentType
trainer.train(data, 1, validation_data=data)  # mypy: arg-type, pyright: reportArgumentType
trainer.train(data, 1, [print])  # mypy: list-item, pyright: reportArgumentType
trainer.train(data, 1, [EarlyStop])  # mypy: list-item, pyright: reportArgumentType
trainer.train(data, 1, EarlyStop())  # mypy: arg-type, pyright: reportArgumentType
trainer.train(data, 1, steps="all")  # mypy: arg-type, pyright: reportArgumentType
trainer.train(data, 1, learning_rate="auto")  # mypy: arg-type, pyright: reportArgumentType
trainer.train(data, 1, steps_per_execution="auto")  # mypy: arg-type, pyright: reportArgumentType
trainer.train(data, 1, train_map_f=3)  # mypy: arg-type, pyright: reportArgumentType
trainer.train(data, 1, None, None, None, 0.1, 4)  # mypy: call-arg, pyright: reportCallIssue
trainer.train(data, 1, resume=3.5)  # mypy: arg-type, pyright: reportArgumentType

trainer.changing_train_config(epoch=3)  # mypy: call-arg, pyright: reportCallIssue

# What describes a trainer.
trainer.early_stop = "yes"  # mypy: assignment, pyright: reportAttributeAccessIssue
trainer.trainable_weights = 3  # mypy: assignment, pyright: reportAttributeAccessIssue
trainer.optimiser  # mypy: attr-defined, pyright: reportAttributeAccessIssue
trainer.fit(data)  # mypy: attr-defined, pyright: reportAttributeAccessIssue


class Trainer(BaseTrainer):
    """A subclass, since BaseTrainer itself is not instantiated."""

    def predicted(self) -> Any:  # mypy: override, pyright: reportIncompatibleMethodOverride
        return None


Trainer(model, optimizer, "mse")  # mypy: arg-type, pyright: reportArgumentType
Trainer(model, optimizer, mean_error, 3)  # mypy: arg-type, pyright: reportArgumentType
Trainer(model, optimizer, mean_error, [3])  # mypy: list-item, pyright: reportArgumentType
Trainer(model, optimizer, mean_error, post_process_grads=3)  # mypy: arg-type, pyright: reportArgumentType
trainer.minimize(3, [])  # mypy: arg-type, pyright: reportArgumentType

# Choices.
set_jit_compile("always")  # mypy: arg-type, pyright: reportArgumentType
trainer.lr_finder(data, suggestion="steepest")  # mypy: arg-type, pyright: reportArgumentType
EarlyStop("val_loss", mode="lowest")  # mypy: arg-type, pyright: reportArgumentType
SaveModelCallback("bset")  # mypy: arg-type, pyright: reportArgumentType
SaveModelCallback("best", mode="low")  # mypy: arg-type, pyright: reportArgumentType
trainer.train(data, 1).to_dict("steps")  # mypy: arg-type, pyright: reportArgumentType

# Callbacks, metrics and data.
EarlyStop("val_loss", patience="3")  # mypy: arg-type, pyright: reportArgumentType
ValidationDataCallback(data, every_steps="epoch")  # mypy: arg-type, pyright: reportArgumentType
Checkpoint(every_secs=60)  # mypy: call-arg, pyright: reportCallIssue
Checkpoint("runs/a", every_secs="60")  # mypy: arg-type, pyright: reportArgumentType
Accuracy("3")  # mypy: arg-type, pyright: reportArgumentType
from_arrays(x, batch_size="32")  # mypy: arg-type, pyright: reportArgumentType
from_arrays(x)  # mypy: call-arg, pyright: reportCallIssue


class Late(Callback):
    """Events with other parameters than the loop gives."""

    def on_epoch_end(self) -> None:  # mypy: override, pyright: reportIncompatibleMethodOverride
        pass

    def on_train_end(self, logs: Any) -> None:  # mypy: override, pyright: reportIncompatibleMethodOverride
        pass


# The seam to the backends.
@function
def double(values: np.ndarray) -> np.ndarray:
    return 2 * values


double("3")  # mypy: arg-type, pyright: reportArgumentType
double(x, 3)  # mypy: call-arg, pyright: reportCallIssue
value_and_grad(3, [])  # mypy: arg-type, pyright: reportArgumentType
function(3)  # mypy: call-overload, pyright: reportCallIssue
