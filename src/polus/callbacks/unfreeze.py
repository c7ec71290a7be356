"""Training in phases: layers that are thawed at given epochs."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from polus.callbacks.base import Callback, TrainerView
from polus.callbacks.checks import check_number
from polus.optimizers import MultiOptimizer, optimizers_of, rebuilt
from polus.state import layers_of
from polus.steps.variables import unique


class Unfreeze(Callback):
    """Thaws frozen layers when an epoch begins.

    ```python
    backbone.trainable = False
    phases = Unfreeze({2: "block_[45]", 4: "*"}, learning_rate=1e-5)
    trainer.train(data, epochs=6, callbacks=[phases])
    ```

    The optimizer is made again for the weights that are trained then, and keeps what it knows of
    those that were trained before, and its count of steps. A resumed run has the same phases. With
    `polus.optimizers.by_name` or `layerwise`, a thawed weight trains at the rate of its group.

    Batch norm keeps the statistics that it was trained with: a thawed layer of it would be in
    training mode, and the few batches of a fine-tuning would move its averages. With
    `batch_norm=True` it is thawed like any other layer.

    Args:
        phases: Epochs, from 0, and the names of the layers that are thawed then: a pattern such as
            "block_[45]", or a list of them. What a named layer consists of is thawed with it.
        learning_rate: The optimizer's rate from the first phase on; or one for each epoch of
            `phases`. By default it stays as it is. A `MultiOptimizer` has several: change them
            with `LearningRateScheduler`.
        batch_norm: Whether layers of batch norm are thawed as well.
    """

    def __init__(
        self,
        phases: Mapping[int, str | Sequence[str]],
        learning_rate: float | Mapping[int, float] | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(phases, Mapping) or not all(
            isinstance(epoch, int) and epoch >= 0 for epoch in phases
        ):
            raise TypeError(
                f"phases must be a dict of epochs, from 0, to names of layers, got {phases!r}. "
                'Use, for example, {2: "block_[45]", 4: "*"}.'
            )
        self.phases = {
            epoch: [names] if isinstance(names, str) else list(names)
            for epoch, names in sorted(phases.items())
        }
        given = learning_rate if isinstance(learning_rate, Mapping) else {}
        if learning_rate is not None and not isinstance(learning_rate, Mapping):
            given = dict.fromkeys(self.phases, learning_rate)
        for rate in given.values():
            check_number("learning_rate", rate, 0, float("inf"))
        self.rates = dict(given)
        self.batch_norm = batch_norm
        self._done: set[int] = set()

    def on_train_begin(self) -> None:
        self._done = set()
        trainer = self.coordinator.trainer
        if self.rates and isinstance(trainer.optimizer, MultiOptimizer):
            raise ValueError(
                "Unfreeze(learning_rate=...) sets one rate, and each optimizer of a "
                "MultiOptimizer has its own. Leave it out, and name the optimizer to change: "
                f'LearningRateScheduler(schedule, "{_first_part(trainer)}").'
            )
        model = trainer.model
        if not getattr(model, "built", True):
            return  # its layers may not be there yet
        names = [layer.name for layer in layers_of(model)]
        for patterns in self.phases.values():
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    raise ValueError(
                        f"No layer's name matches {pattern!r}. The model has "
                        f"{', '.join(names[:20])}{', ...' * (len(names) > 20)}."
                    )

    def on_resume(self, epoch: int, step: int) -> None:
        # Before the first step of an epoch its own phase has not begun.
        self._thaw_up_to(epoch if step else epoch - 1)

    def on_epoch_begin(self, epoch: int) -> None:
        self._thaw_up_to(epoch)

    def _thaw_up_to(self, epoch: int) -> None:
        trainer = self.coordinator.trainer
        for due in [each for each in self.phases if each <= epoch and each not in self._done]:
            self._done.add(due)
            explicit = trainer.explicit_trainable_weights
            trained = trainer.model.trainable_variables if explicit is None else explicit
            before = {id(variable) for variable in trained}
            thawed = thaw(trainer.model, self.phases[due], self.batch_norm)
            there = trainer.model.trainable_variables if explicit is None else thawed
            new = [v for v in there if id(v) not in before]
            self.logger.info("Epoch %d thaws %d variables.", due + 1, len(new))
            _train_also(trainer, new, self.rates.get(due))


def thaw(
    model: keras.Model, patterns: Sequence[str], batch_norm: bool = False
) -> list[keras.Variable]:
    """Makes the layers of some names trainable, and all that they consist of.

    Args:
        model: The model.
        patterns: Names of layers; `*`, `?` and `[45]` stand for parts of them.
        batch_norm: Whether layers of batch norm are made trainable as well.

    Returns:
        The trainable variables of these layers.
    """
    layers = list(layers_of(model))
    leaves = [layer for layer in layers if len(list(layers_of(layer))) == 1]
    trained = {id(leaf) for leaf in leaves if leaf.trainable}
    named: set[int] = set()
    for layer in layers:
        if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns):
            named |= {
                id(part)
                for part in layers_of(layer)
                if batch_norm or not isinstance(part, keras.layers.BatchNormalization)
            }
    # A frozen model hides the trainable layers in it. False first, for TensorFlow passes nothing on
    # to the layers in a model where the model itself does not change.
    model.trainable = False
    model.trainable = True
    for leaf in leaves:
        leaf.trainable = id(leaf) in trained | named
    return unique([v for leaf in leaves if id(leaf) in named for v in leaf.trainable_variables])


def _first_part(trainer: TrainerView) -> str:
    return next(name for name in [*optimizers_of(trainer), "optimizer.adam"] if "." in name)


def _train_also(
    trainer: TrainerView, new: Sequence[keras.Variable], learning_rate: float | None
) -> None:
    explicit = trainer.explicit_trainable_weights
    if explicit is not None:
        trainer.set_trainable_weights([*explicit, *new])
    old = trainer.optimizer
    trainer.optimizer = rebuilt(old, trainer.trainable_weights)
    if learning_rate is not None:
        trainer.optimizer.learning_rate = learning_rate
    model: Any = trainer.model
    if vars(model).get("optimizer") is old:  # where Keras' callbacks look for it
        object.__setattr__(model, "optimizer", trainer.optimizer)
