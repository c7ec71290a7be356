"""Validation during training."""

from collections.abc import Callable
from typing import Any

from polus.callbacks.base import Callback, Coordinator, Phase


class ValidationDataCallback(Callback):
    """Evaluates the trainer on a dataset after every epoch, or every n steps within an epoch.

    The results go to `history`, to `shared_dict["validation"][name][metric]` (a list with one value
    per validation) and, as `<name>_<metric>`, to the epoch's logs: for example `val_macro_f1`. Use
    one callback per validation set, each with its own name. The training metrics and random
    generators are left as they were.

    Args:
        dataset: The validation data, as for `train`.
        name: The name of the validation set.
        every_steps: Validates after every n-th step of an epoch, and after its last step; None
            validates after every epoch.
        custom_data_transform_f: A Python function applied to each batch.
        steps: The maximum number of batches.
    """

    phase = Phase.MEASURE  # the others find the results in the epoch's logs

    def __init__(
        self,
        dataset: Any,
        name: str = "val",
        every_steps: int | None = None,
        custom_data_transform_f: Callable[[Any], Any] | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.name = name
        self.every_steps = every_steps
        self.custom_data_transform_f = custom_data_transform_f
        self.steps = steps

    def add_coordinator(self, coordinator: Coordinator) -> None:
        super().add_coordinator(coordinator)
        names = coordinator.shared_dict["validation"]
        if self.name in names:
            raise ValueError(
                f"Two validation sets are named {self.name!r}. Give each one its own name: "
                "ValidationDataCallback(dataset, name=...)."
            )
        names[self.name] = {metric.name: [] for metric in coordinator.trainer.metrics}

    def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
        if self.every_steps and steps.stop % self.every_steps == 0:
            self._validate()

    def on_epoch_end(self, epoch: int) -> None:
        # Skipped if the last step was just validated: the model has not changed since.
        if not self.every_steps or self.coordinator.run.step % self.every_steps:
            self._validate()

    def _validate(self) -> None:
        run = self.coordinator.run
        self.coordinator.on_validation_begin()
        results = run.trainer.evaluate(self.dataset, self.custom_data_transform_f, self.steps)
        self.coordinator.on_validation_end(results)
        if not results:
            raise ValueError(
                f"Validation on {self.name!r} has nothing to compute: the trainer has no metrics "
                "and no evaluation_loss. Pass metrics=[...] to the trainer, or remove this "
                "callback."
            )
        run.validated(self.name, results)
