"""The trainer: one step, described by its user, and the loop."""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Never, Self, TypeVar

import keras

from polus.average import averages_of
from polus.backends import backend
from polus.backends.base import as_arguments
from polus.backends.placement import gathers
from polus.backends.scopes import active_dry_run
from polus.callbacks.base import ICallback, KerasCallbackLike
from polus.history import History
from polus.host import counted
from polus.masks import stop_gradient
from polus.metrics import MetricLike, as_metrics, update_metrics
from polus.steps.norms import Norms
from polus.steps.progress import ProgressVariable
from polus.steps.update import apply_gradients
from polus.steps.variables import StepVariables, unique
from polus.training import checks
from polus.training.config import TrainConfig, given_arguments, refuse_of_compile
from polus.training.copies import deep_copy, shallow_copy
from polus.training.dry_run import dry_run as rehearse
from polus.training.engine import CompiledMethod, Engine
from polus.training.loss_scaling import loss_scaled, scale_losses
from polus.training.methods import TrainerMethods
from polus.training.nonfinite import Policy
from polus.training.reports import check_step, describe_trainer
from polus.training.spellings import unite_spellings
from polus.whole_batch import of_whole_batch, own_arguments

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(fn: F) -> F:
    """Wraps a `train_step`: called outside of `train`, it runs one compiled update."""
    return CompiledMethod(fn, lambda trainer: trainer._engine.executor.update)  # type: ignore[return-value]


class BaseTrainer(TrainerMethods):
    """Gradient descent over batches. Extend it and write what a step computes.

    ```python
    class Distiller(BaseTrainer):
        def __init__(self, student, teacher, **kwargs):
            super().__init__(student, **kwargs)
            self.teacher = teacher

        def forward_without_grads(self, x, y):  # frozen: no gradient flows here
            return x, y, self.teacher(x, training=False)

        def forward_with_grads(self, x, y, soft):  # trained: returns what the loss takes
            return y, soft, self.model(x, training=True)
    ```

    A subclass may use any attribute and method name of its own except `_engine`. `copy.copy` and
    `copy.deepcopy` give trainers that compile and count for themselves. An optional argument that
    is left out keeps an attribute of that name that was set before `super().__init__()`.

    Args:
        model: A `keras.Model`. It may be unbuilt: the first batch builds it. Or a dict of models,
            which are trained together: `trainer.model["generator"]` or `trainer.model.generator`.
        optimizer: A `keras.optimizers.Optimizer`.
        loss: A callable that takes what `forward_with_grads` returns. It returns a scalar tensor,
            or a dict of scalars of which the one named "loss" is minimized and all are recorded. A
            method named `loss` serves too. A trainer with a `train_step` of its own needs none.
        metrics: `polus.metrics.IMetric` or `keras.metrics.Metric` objects. For a model whose
            outputs are a dict, a dict of the name of an output to its metrics. By phase:
            `{"train": [...], "validation": [...]}`; else a validation takes the same ones, except
            those of a single value, such as `keras.metrics.Mean`, which only the step feeds.
        post_process_prediction: Applied to the model's output before the loss. It is kept as
            `post_process_logits`.
        post_process_grads: Takes and returns the list of gradients (None where there is none)
            before the optimizer sees them. Under loss scaling they are unscaled.
        trainable_weights: The variables to train. By default all trainable ones of the model.
        weighted_metrics: Metrics that sample weights count for; those of `metrics` ignore them.
        post_process_logits: Another name of `post_process_prediction`.
        primary: The name of the term of `train_step` that is recorded and monitored as "loss" too.
            Without it, and without a term named "loss", a run has none. It may be an attribute of
            the class as well.
        unknown: Raises, and says what to write instead of an argument of Keras' `compile`.

    Attributes:
        step_counter: An int32 variable that counts updates. `forward_*` may use it.
        epoch: An int32 variable that the loop sets to the current epoch, from 0.
        total_steps: An int32 variable that the loop sets to the steps of the whole run; 0 until
            they are known, which is from the beginning with `steps`.
        early_stop: Set it to True (in a callback) to end training after the current step.

    Raises:
        TypeError: If BaseTrainer itself is instantiated, or an argument is of the wrong kind.
    """

    step_counter: keras.Variable
    primary: str | None = None
    epoch = ProgressVariable("epoch", lambda trainer: trainer._engine.executor.progress)
    total_steps = ProgressVariable("total_steps", lambda trainer: trainer._engine.executor.progress)
    loss: Callable[..., Any]  # None where a train_step of one's own needs none

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        unite_spellings(cls)
        step = next(vars(base)["train_step"] for base in cls.__mro__ if "train_step" in vars(base))
        if not isinstance(step, CompiledMethod):
            cls.train_step = _compiled(step)  # type: ignore[method-assign]

    def __init__(
        self,
        model: keras.Model | Mapping[str, keras.Model],
        optimizer: keras.optimizers.Optimizer,
        loss: Callable[..., Any] | None = None,
        metrics: Sequence[MetricLike] | Mapping[str, Any] | None = None,
        post_process_prediction: Callable[[Any], Any] | None = None,
        post_process_grads: Callable[[list[Any]], list[Any]] | None = None,
        *,
        trainable_weights: Sequence[keras.Variable] | None = None,
        weighted_metrics: Sequence[MetricLike] | Mapping[str, Any] | None = None,
        post_process_logits: Callable[[Any], Any] | None = None,
        primary: str | None = None,
        **unknown: Never,
    ) -> None:
        checks.check_extended(type(self) is not BaseTrainer)
        refuse_of_compile(self, unknown)
        super().__init__()
        model = checks.checked_model(model)
        checks.check_optimizer(optimizer)
        checks.check_function(post_process_grads, "post_process_grads")
        process = checks.one_processing(post_process_prediction, post_process_logits)
        self.model = model
        self.optimizer = loss_scaled(optimizer, model)
        if loss is not None or not hasattr(self, "loss"):
            self.loss = loss  # type: ignore[assignment]
        checks.check_loss(self.loss, vars(self), type(self).train_step is BaseTrainer.train_step)
        if primary is not None:
            self.primary = primary
        given = metrics if metrics is not None else getattr(self, "metrics", ())
        self.weighted_metrics = as_metrics(weighted_metrics, weighted=True)
        self.metrics, self.validation_metrics = checks.checked_metrics(given, self.weighted_metrics)
        self.post_process_logits = process or getattr(self, "post_process_logits", None)
        self.post_process_grads = post_process_grads or getattr(self, "post_process_grads", None)
        if trainable_weights is not None:
            self.trainable_weights = trainable_weights
        self.step_counter = keras.Variable(0, dtype="int32", trainable=False, name="step_counter")
        self.early_stop = False
        self._engine = Engine(self)

    # ------------------------------------------------------------------ what a user describes

    def forward_without_grads(self, *inputs: Any, **kwargs: Any) -> Any:
        """Computes what needs no gradient. Its result is unpacked into `forward_with_grads`.

        By default it returns its inputs.
        """
        return inputs

    def forward_with_grads(self, *inputs: Any, **kwargs: Any) -> Any:
        """Computes what is trained. Its result is unpacked into the loss."""
        raise NotImplementedError(
            f"{type(self).__name__} has no forward_with_grads(self, *inputs). It takes what "
            "forward_without_grads returns and returns what the loss takes, for example: "
            "return y, self.model(x, training=True)"
        )

    foward_without_grads = forward_without_grads
    foward_with_grads = forward_with_grads

    def metric_samples(self, *outputs: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        """Returns what training metrics take, given what the loss takes; None for no metrics.

        By default a pair is taken for (y_true, y_pred), and anything else has no metrics.
        """
        return outputs if len(outputs) == 2 else None

    def evaluation_step(self, *inputs: Any, **kwargs: Any) -> Any:
        """Returns what validation metrics take, in inference mode.

        By default it returns (y, prediction) of an (x, y) batch. It may return a dict of names to
        the samples of that metric, `{"accuracy": (y, logits), "kid": (x, fake)}`. Metrics that it
        leaves out are not validated; scalars of other names, such as "loss", are averaged.
        """
        if len(inputs) < 2:
            raise NotImplementedError(
                f"{type(self).__name__}.evaluation_step takes (x, y) by default, got a batch of "
                f"{counted(len(inputs), 'part')}. Override evaluation_step(self, *inputs) to "
                "return what the metrics take: (y_true, y_pred)."
            )
        x, y = inputs[0], inputs[1]
        return y, self.predicted(self.model(x, training=False))

    def evaluation_loss(self, *samples: Any, **kwargs: Any) -> Any:
        """Returns the loss of what `evaluation_step` returned; None (the default) for no loss."""
        return None

    def predicted(self, outputs: object) -> Any:
        """Applies `post_process_logits`, if there is one, to the model's outputs."""
        shape = getattr(outputs, "shape", None)
        self._engine.output_shape = None if shape is None else tuple(shape)
        return outputs if self.post_process_logits is None else self.post_process_logits(outputs)

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """The variables to train: those that were set, else all trainable ones of the model."""
        explicit = self.explicit_trainable_weights
        return list(self.model.trainable_weights) if explicit is None else explicit

    @trainable_weights.setter
    def trainable_weights(self, weights: Sequence[keras.Variable] | None) -> None:
        self.set_trainable_weights(weights)

    @property
    def explicit_trainable_weights(self) -> list[keras.Variable] | None:
        """The variables that `trainable_weights` was set to; None if it was not."""
        return self.__dict__.get("trainable_weights")

    def set_trainable_weights(self, weights: Sequence[keras.Variable] | None) -> None:
        """Sets `explicit_trainable_weights`; for a subclass that overrides `trainable_weights`."""
        # Under the property's name, where no attribute of a subclass can be in the way.
        self.__dict__["trainable_weights"] = (
            None if weights is None else checks.checked_variables(weights)
        )

    def build_on(self, batch: object) -> None:
        """Builds the model and the optimizer from a batch. Nothing is trained."""
        self._engine.executor.prepare(as_arguments(batch))

    # ------------------------------------------------------------------ the step

    @_compiled
    def train_step(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs one update: forward, loss, gradients, optimizer. Compiled; may be overridden.

        Called outside of `train`, it runs one update.

        Args:
            inputs: The parts of one batch.
            kwargs: For overrides with named arguments.

        Returns:
            The loss, a scalar tensor, or the dict of its named terms.
        """
        inputs = as_arguments(self.forward_without_grads(*inputs))

        def forward() -> Any:
            before = gathers.count
            outputs = as_arguments(self.forward_with_grads(*inputs))
            result = self.loss(*own_arguments(self.loss, outputs))
            result = of_whole_batch(self.loss, outputs, result, gathers.count > before)
            result = checks.add_penalties(result, self.model.losses)
            if self.metrics and (samples := self.metric_samples(*outputs)) is not None:
                samples = keras.tree.map_structure(stop_gradient, samples)
                update_metrics(self.metrics, self.weighted_metrics, samples)
            return result

        result = self.minimize(forward, self.trainable_weights, self.optimizer)
        self.step_counter.assign_add(1)
        return result

    def minimize(
        self,
        loss_fn: Callable[[], Any],
        variables: Sequence[keras.Variable],
        optimizer: keras.optimizers.Optimizer | None = None,
    ) -> Any:
        """Updates `variables` once, down the gradient of a closure.

        Args:
            loss_fn: Takes nothing and returns a scalar tensor, or a dict with a scalar named
                "loss".
            variables: The variables to update.
            optimizer: By default the trainer's own.

        Returns:
            What `loss_fn` returned.

        Raises:
            ValueError: If the loss is not a scalar, or depends on none of the variables.
        """
        optimizer = self.optimizer if optimizer is None else optimizer
        if (dry_run := active_dry_run()) is not None:
            checks.check_minimized(loss_fn, variables, optimizer)
            with dry_run.differentiating():
                result = loss_fn()
            checks.scalar_loss(result)
            dry_run.record_updates((optimizer, unique(variables)))
            return result
        variables = unique(variables)
        if not variables:
            return loss_fn()

        def scaled_loss(result: object) -> Any:
            return optimizer.scale_loss(checks.scalar_loss(result))

        # The user's function takes tensors; else gradients go to the optimizer as they do in `fit`.
        sparse = self.post_process_grads is None
        result, gradients = backend.value_and_grad(loss_fn, variables, scaled_loss, sparse)
        checks.check_connected(gradients, variables)
        loss = checks.scalar_loss(result)
        apply_gradients([(optimizer, gradients, variables)], self.post_process_grads, True, loss)
        return result

    def step_parts(self) -> list[Any]:
        """Returns the objects that a compiled step is made of. Replacing one compiles anew."""
        processing = (self.post_process_logits, self.post_process_grads)
        metrics = [*self.metrics, *(self.validation_metrics or ())]
        return [
            self.model,
            self.optimizer,
            self.loss,
            *processing,
            *metrics,
            *averages_of(self),
            *self.trainable_weights,
        ]

    def prepare_step(self, *inputs: Any, **kwargs: Any) -> None:
        """Prepares what a step needs, given a batch, before the step first runs.

        Called again after a part of the step was replaced. Nothing is trained. By default, an
        optimizer that has none is given loss scaling where the model's precision needs it.
        """
        scale_losses(self)

    def check_step(self, variables: StepVariables) -> None:
        """Checks what a dry run of the step has seen, logs what is trained, and warns."""
        check_step(self, variables)

    def check_batch(self, inputs: tuple[Any, ...], where: str) -> None:
        """Raises if no step can take a batch in host memory; `where` says which one it is."""

    # ------------------------------------------------------------------ what can be done with it

    def train(
        self,
        tf_dataset: object = None,
        epochs: int | None = None,
        callbacks: Sequence[ICallback | KerasCallbackLike] | None = None,
        custom_data_transform_f: Callable[[Any], Any] | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        *,
        train_map_f: Callable[[Any], Any] | None = None,
        steps_per_execution: int | None = None,
        prefetch: int | None = None,
        run_eagerly: bool | None = None,
        max_secs: float | None = None,
        resume: str | PathLike[str] | None = None,
        resume_changes: Literal["refuse", "accept"] | None = None,
        on_nonfinite: Policy | None = None,
        max_skips: int | None = None,
        record: Norms | None = None,
        run_dir: str | PathLike[str] | None = None,
        dry_run: bool | None = None,
        overfit_batches: int | None = None,
        **unknown: Never,
    ) -> History:
        """Trains for some epochs.

        Arguments that are left out are taken from `changing_train_config`.

        Args:
            tf_dataset: The data; see `polus.data.as_adapter` for what it may be. A tuple or list
                batch is unpacked into the step's arguments; anything else is one argument. None
                with `steps` trains without data, one epoch by default: the step takes no arguments.
            epochs: The number of passes over the data.
            callbacks: `polus.callbacks` and `keras.callbacks` objects.
            custom_data_transform_f: A Python function applied to each batch before the step.
            steps: The number of steps of one epoch, for a dataset that is endless, longer, or
                doesn't know its length.
            learning_rate: The optimizer's learning rate for this run. Afterwards the old one is
                restored.
            train_map_f: Another name of `custom_data_transform_f`.
            steps_per_execution: The number of steps per call of the backend. By default as many
                as take about a twenty-fifth of a second. Slow data gets fewer.
            prefetch: How many blocks of batches a thread reads ahead, 2 by default. 0 reads each
                batch in the main thread right before its step.
            run_eagerly: Whether steps run as they are written, operation by operation, one per
                call: prints, breakpoints and values work in them. Slow.
            max_secs: The seconds after which training ends in order. A run that continues from a
                checkpoint has all of them again.
            resume: A folder of checkpoints to continue from and, with a
                `polus.checkpoint.Checkpoint` among the callbacks, to save to.
            resume_changes: "accept" continues a run although settings that may change on the way
                differ from the checkpoint's, such as the learning rate. By default that raises.
            on_nonfinite: What a step does whose loss, gradients or update are not finite. Its
                update is never applied, except with "ignore". "raise" raises a `NonFiniteError`,
                "stop" ends training in order, "skip" goes on with the next batch. By default
                "raise"; beside Keras' `TerminateOnNaN`, which acts as in `fit`, "ignore".
            max_skips: How many steps may be skipped in a row, 10 by default; the last one raises.
            record: Whether `history.record` (rates, speed, waiting time, skipped steps) stands in
                the logs too, and so on the console and in Keras callbacks, and each step has terms
                `gradient_norm` and, if gradients are clipped, `clipped_gradient_norm`. With
                "variables" also that of each variable: `gradient_norm/sequential/dense/kernel`.
            run_dir: The folder of this run: its checkpoints, from which it continues if it has any,
                its record, parts, messages and best model. See `polus.runs.RunDirectory`.
            dry_run: Whether to run only two steps and a validation of two batches, with every
                callback but those that write files. Then models, optimizers, random state and data
                are as before, and the log says what was seen.
            overfit_batches: Trains on the first n batches only, the same ones in each epoch. A step
                that works brings their loss close to zero.
            unknown: Raises, and says what to write instead of an argument of `fit`.

        Returns:
            What happened: see `polus.history.History`.

        Raises:
            ValueError, TypeError: If it can't train with these arguments; the message says why.
        """
        arguments = self._engine.arguments | given_arguments(locals())
        if arguments.get("dry_run"):
            return rehearse(copied := copy.copy(self), copied._engine, arguments)
        with self._engine.running(self, TrainConfig.checked(arguments)) as run:
            while not run.finished:
                data = run.open_epoch()
                run.executor.prepare(data.example)
                with contextlib.closing(run.blocks(data)) as blocks:
                    for block in blocks:  # some batches of equal shape
                        program, args = run.begin(block)  # signals wait until the record
                        run.record(block, program(*args))  # one compiled call, a step per batch
                        if run.stopping:
                            break
                run.close_epoch()
            run.executor.finalize()
            return run.history

    def __copy__(self) -> Self:
        """Returns a trainer of the same parts, with an engine and a step counter of its own."""
        return shallow_copy(self, self._engine.give_copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a trainer of copied parts, with an engine and a step counter of its own."""
        return deep_copy(self, memo, self._engine.give_copy)

    def __repr__(self) -> str:
        return describe_trainer(self)
