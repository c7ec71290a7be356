"""A program of a user's, with everything that it may override. Type checkers find nothing in it.

It is checked, not run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

import polus
from polus.callbacks import (
    Callback,
    ConsoleLogCallback,
    EarlyStop,
    LossSmoothCallback,
    SaveModelCallback,
    TimerCallback,
    ValidationDataCallback,
)
from polus.checkpoint import Checkpoint
from polus.core import function, set_jit_compile, value_and_grad
from polus.data import from_arrays
from polus.metrics import Accuracy, IMetric, MacroF1Score
from polus.training import BaseTrainer, ClassifierTrainer

x = np.zeros((96, 8), "float32")
y = np.zeros(96, "int32")
model = keras.Sequential([keras.layers.Dense(3)])
teacher = keras.Sequential([keras.layers.Dense(3)])
cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


# ---------------------------------------------------------------------- the example of README.md


class Distiller(BaseTrainer):
    def __init__(self, student, teacher, **kwargs):
        super().__init__(student, **kwargs)
        self.teacher = teacher

    def forward_without_grads(self, x, y):  # frozen: no gradient flows here
        return x, y, self.teacher(x, training=False)

    def forward_with_grads(self, x, y, soft):  # trained: returns what the loss takes
        return y, soft, self.model(x, training=True)


def distillation_loss(y, soft, logits):
    hard: Any = cross_entropy(y, logits)  # Keras' own types don't tell
    return {"loss": hard + ops.mean((soft - logits) ** 2), "hard": hard}  # all terms are recorded


trainer = Distiller(model, teacher, optimizer=keras.optimizers.Adam(1e-2), loss=distillation_loss)
history = trainer.train(from_arrays((x, y), batch_size=32), epochs=3)
print(history)


class Both(BaseTrainer):
    """Two models that learn from each other, each with an optimizer of its own."""

    def __init__(self, model, other, other_optimizer, **kwargs):
        super().__init__(model, **kwargs)
        self.other, self.other_optimizer = other, other_optimizer

    def train_step(self, x, y):
        target = self.model(x, training=False)
        first = self.minimize(
            lambda: self.loss(y, self.model(x, training=True)),
            self.model.trainable_weights,
            self.optimizer,
        )
        second = self.minimize(
            lambda: ops.mean((self.other(x, training=True) - target) ** 2),
            self.other.trainable_weights,
            self.other_optimizer,
        )
        self.step_counter.assign_add(1)
        return {"loss": first, "other": second}


# ---------------------------------------------------------------------- overrides of each method


class Annotated(BaseTrainer):
    """Each method with parameters of its own, annotated."""

    def __init__(self, model: keras.Model, temperature: float = 2.0) -> None:
        super().__init__(model, keras.optimizers.Adam(), cross_entropy, [Accuracy(3)])
        self.temperature = temperature
        self.trainable_weights = model.trainable_weights

    def forward_without_grads(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = super().forward_without_grads(x, y)
        return x, y

    def forward_with_grads(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, Any]:
        return y, self.model(x, training=True) / self.temperature

    def metric_samples(self, y: Any, logits: Any) -> tuple[Any, Any]:
        return y, logits

    def evaluation_step(self, x: Any, y: Any) -> tuple[Any, Any]:
        return y, self.predicted(self.model(x, training=False))

    def evaluation_loss(self, y: Any, logits: Any) -> Any:
        return self.loss(y, logits)


class OneArgument(BaseTrainer):
    """A batch that is a dict is one argument; the documented spelling is known as well."""

    def foward_without_grads(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def foward_with_grads(self, batch: dict[str, Any]) -> Any:
        return (self.model(batch["x"], training=True),)

    def evaluation_step(self, batch: dict[str, Any]) -> tuple[Any, ...]:
        return batch["y"], self.model(batch["x"], training=False)


class Optional(ClassifierTrainer):
    """Defaults, keyword-only parameters and a variable number of them."""

    def forward_without_grads(self, x: Any, *rest: Any) -> Any:
        return (x, *rest)

    def forward_with_grads(self, x: Any, y: Any, weight: Any = None, *, scale: float = 1.0) -> Any:
        return y, self.model(x) * scale

    def train_step(self, x: Any, y: Any, weight: Any = None) -> Any:
        loss = super().train_step(x, y)
        return {"loss": loss, "weight": ops.mean(weight)}


# ---------------------------------------------------------------------- callbacks and metrics


class Report(Callback):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.every_steps = 10

    def on_train_begin(self) -> None:
        self.coordinator.shared_dict["report"] = []

    def on_epoch_begin(self, epoch: int) -> None:
        self.logger.info("epoch %d", epoch)

    def on_train_batch_end(self, epoch: int, step: int, loss: Any) -> None:
        self.coordinator.shared_dict["report"].append(float(loss))
        if self.coordinator.has_callback(EarlyStop) and step > 100:
            self.coordinator.trainer.early_stop = True

    def on_epoch_end(self, epoch: int) -> None:
        self.path.write_text(str(self.coordinator.logs))

    def get_state(self) -> dict[str, Any]:
        return {"path": str(self.path)}

    def set_state(self, state: dict[str, Any]) -> None:
        self.path = Path(state["path"])


class MeanError(IMetric):
    def __init__(self) -> None:
        super().__init__(name="mean_error")
        self.total = self.add_variable((), "zeros")

    def _samples_from_batch(self, y_true: Any, y_pred: Any) -> None:
        self.total.assign_add(ops.mean(ops.abs(y_true - y_pred)))

    def _evaluate(self) -> Any:
        return self.total.value


# ---------------------------------------------------------------------- all that train takes


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield x[:32], y[:32]


def cast(batch: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return batch[0].astype("float32"), batch[1]


def clipped(gradients: list[Any]) -> list[Any]:
    return [ops.clip(gradient, -1.0, 1.0) for gradient in gradients]


classifier = ClassifierTrainer(
    model,
    keras.optimizers.Adam(1e-3),
    cross_entropy,
    metrics=[Accuracy(3), MacroF1Score(3), MeanError(), keras.metrics.Mean()],
    post_process_prediction=lambda logits: logits / 2.0,
    post_process_grads=clipped,
)
frozen = ClassifierTrainer(
    model, model.trainable_weights, keras.optimizers.SGD(), cross_entropy, post_process_logits=None
)
held_out = from_arrays((x, y), 32, shuffle=False)
result = classifier.lr_finder(held_out, use_lr_found=True, suggestion="valley", num_steps=50)
rate: float = result.suggestion
everything = classifier.train(
    batches,
    3,
    [
        ConsoleLogCallback(),
        LossSmoothCallback(),
        TimerCallback(),
        ValidationDataCallback(held_out, name="val", every_steps=10),
        SaveModelCallback("best", Path("model.keras"), monitor="val_macro_f1", mode="max"),
        EarlyStop("val_macro_f1", patience=2, mode="max"),
        Checkpoint("runs/a", every_secs=60.0),
        Report(Path("report.txt")),
        keras.callbacks.CSVLogger("log.csv"),
    ],
    cast,
    steps=2,
    learning_rate=rate,
    steps_per_execution=4,
    resume=Path("runs/a"),
)
losses: np.ndarray = everything.steps["loss"]
first_epoch: dict[str, Any] = everything.epochs[0]
everything.plot("history.png")
figures: dict[str, Any] = classifier.evaluate(held_out, steps=1)
classifier.trainable_weights = None
classifier.changing_train_config(tf_dataset=held_out, epochs=2)
classifier.train()
loss = classifier.train_step(x[:32], y[:32])

for data in ([(x, y)], [{"x": x}], batches(), iter([x]), keras.utils.PyDataset()):
    classifier.train(data, epochs=1, callbacks=(EarlyStop(),), train_map_f=None)

# ---------------------------------------------------------------------- the seam to the backends

set_jit_compile("auto")
counter = keras.Variable(0, trainable=False)


@function
def count(values: np.ndarray, times: int = 1) -> np.ndarray:
    counter.assign_add(times)
    return values


@function(jit_compile=True)
def doubled(values: np.ndarray) -> np.ndarray:
    return 2 * values


counted: np.ndarray = count(x, times=2)
twice: np.ndarray = doubled(x)
value, gradients = value_and_grad(lambda: ops.mean(model(x)), model.trainable_weights)
version: str = polus.__version__
