"""Validation during training."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from polus.average import Average, averages_of
from polus.callbacks.base import Callback, Coordinator, Phase
from polus.callbacks.checks import check_callable, check_count, check_name
from polus.data import DataReader, as_adapter


class ValidationDataCallback(Callback):
    """Evaluates the trainer on a dataset after every epoch or every n epochs or steps.

    The results go to `history`, to `shared_dict["validation"][name][metric]` (a list with one value
    per validation) and, as `<name>_<metric>`, to the epoch's logs: for example `val_macro_f1`. Use
    one callback per validation set, each with its own name. The training metrics and random
    generators are left as they were.

    Args:
        dataset: The validation data, as for `train`.
        name: The name of the validation set.
        every_steps: Validates after every n-th step of an epoch, and after its last step; None
            validates after the epoch.
        custom_data_transform_f: A Python function applied to each batch.
        steps: The maximum number of batches.
        model: An `Average` of the trainer's, or a model of the same architecture, whose weights are
            validated in place of the model's own. Give the callback another name than "val".
        every_epochs: Validates after every n-th epoch, as `validation_freq` does in `fit`. The logs
            of the other epochs have no results of this set, and a callback that monitors them skips
            these epochs.
    """

    phase = Phase.MEASURE  # the others find the results in the epoch's logs

    def __init__(
        self,
        dataset: object,
        name: str = "val",
        every_steps: int | None = None,
        custom_data_transform_f: Callable[[Any], Any] | None = None,
        steps: int | None = None,
        *,
        every_epochs: int = 1,
        model: "keras.Model | Average | None" = None,
    ) -> None:
        super().__init__()
        keywords = (
            "The arguments are ValidationDataCallback(dataset, name='val', every_steps=None, "
            "custom_data_transform_f=None, steps=None, every_epochs=1, model=None)."
        )
        check_name("name", name, keywords)
        for argument, value in {"every_steps": every_steps, "steps": steps}.items():
            if value is not None:
                check_count(argument, value, keywords)
        if custom_data_transform_f is not None:
            check_callable("custom_data_transform_f", custom_data_transform_f, keywords)
        check_count("every_epochs", every_epochs)
        if every_steps is not None and every_epochs != 1:
            raise ValueError(
                f"A validation runs every {every_steps} steps or every {every_epochs} epochs. Pass "
                "either every_steps or every_epochs."
            )
        self.dataset = dataset
        self.name = name
        self.every_steps = None if every_steps is None else int(every_steps)
        self.custom_data_transform_f = custom_data_transform_f
        self.steps = steps
        self.every_epochs = every_epochs
        self.model = model

    def add_coordinator(self, coordinator: Coordinator) -> None:
        super().add_coordinator(coordinator)
        names = coordinator.shared_dict["validation"]
        if self.name in names:
            raise ValueError(
                f"Two validation sets are named {self.name!r}. Give each one its own name: "
                "ValidationDataCallback(dataset, name=...)."
            )
        trainer = coordinator.trainer
        metrics = (
            trainer.metrics if trainer.validation_metrics is None else trainer.validation_metrics
        )
        names[self.name] = {metric.name: [] for metric in metrics}

    def on_train_begin(self) -> None:
        # What can't be evaluated raises before training, not after its first epoch.
        reader = DataReader(as_adapter(self.dataset), self.custom_data_transform_f, self.steps)
        reader.check_ends("ValidationDataCallback")
        trainer = self.coordinator.trainer
        if isinstance(self.model, Average) and self.model not in averages_of(trainer):
            if hasattr(trainer, "average"):
                raise ValueError(
                    "The average to validate is not part of the trainer, so nothing updates it. "
                    "Keep it in an attribute of its own: trainer.other_average = average."
                )
            vars(trainer)["average"] = self.model  # from where the run updates and saves it

    def on_steps_end(self, epoch: int, steps: range, losses: Sequence[float] | None) -> None:
        if self.every_steps and steps.stop % self.every_steps == 0:
            self._validate()

    def on_epoch_end(self, epoch: int) -> None:
        if self.every_steps is None:
            due = (epoch + 1) % self.every_epochs == 0
        else:  # not if the last step was just validated: the model has not changed since
            due = self.coordinator.run.step % self.every_steps > 0
        if due:
            self._validate()

    def _validate(self) -> None:
        run = self.coordinator.run
        self.coordinator.on_validation_begin()
        try:
            results = run.trainer.evaluate(
                self.dataset, self.custom_data_transform_f, self.steps, model=self.model
            )
        except Exception as error:
            error.add_note(f"This was the validation on {self.name!r}.")
            raise
        self.coordinator.on_validation_end(results)
        run.validated(self.name, results)
