"""Validation while training: the trainer's metrics over other data."""

from collections.abc import Callable
from typing import Any

from polus.callbacks.base import Callback, CallbackCoordinator, Phase


class ValidationDataCallback(Callback):
    """Evaluates on a data set after every epoch, or every n steps within one.

    Results go to `history`, to `shared_dict["validation"][name][metric]` (a list, one value for
    each validation), and count as the epoch's logs under `<name>_<metric>`, e.g. `val_macro_f1`.
    Several sets are several callbacks with a name each. Training is not disturbed, its metrics
    neither.

    Args:
        dataset: as for `train`.
        name: of the set.
        every_steps: after each n-th step of an epoch; None for after every epoch.
        custom_data_transform_f: a Python function applied to each batch.
        steps: how many batches at most.
    """

    phase = Phase.MEASURE  # its results are there when others hear of the epoch's end

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

    def add_coordinator(self, coordinator: CallbackCoordinator) -> None:
        super().add_coordinator(coordinator)
        names = coordinator.shared_dict["validation"]
        if self.name in names:
            raise ValueError(
                f"Two validation sets are named {self.name!r}. Give each a name of its own: "
                "ValidationDataCallback(dataset, name=...)."
            )
        names[self.name] = {metric.name: [] for metric in coordinator.trainer.metrics}

    def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
        if self.every_steps and steps.stop % self.every_steps == 0:
            self._validate()

    def on_epoch_end(self, epoch: int) -> None:
        # Not a second time for the same model.
        if not self.every_steps or self.coordinator.step % self.every_steps:
            self._validate()

    def _validate(self) -> None:
        run = self.coordinator
        for callback in run.callbacks:
            callback.on_validation_begin()
        results = run.trainer.evaluate(self.dataset, self.custom_data_transform_f, self.steps)
        for callback in run.callbacks:
            callback.on_validation_end(results)
        if not results:
            raise ValueError(
                f"There is nothing to validate on {self.name!r}: the trainer has no metrics and no "
                "evaluation_loss. Give it metrics=[...], or leave this callback out."
            )
        run.add_validation(self.name, results)
