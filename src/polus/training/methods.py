"""What a trainer does besides training: loops of one's own, predictions, the range test."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Never, Unpack

import keras

from polus.average import Average, weights_for
from polus.backends import backend
from polus.callbacks.base import ICallback, KerasCallbackLike
from polus.log import BaseLogger, info_from_first
from polus.training.config import TrainArguments, check_names, one_transform, refuse
from polus.training.engine import Engine
from polus.training.evaluation import evaluate
from polus.training.fit_methods import check_not_overridden
from polus.training.nonfinite import Policy
from polus.training.prediction import predict
from polus.training.reports import summarize
from polus.training.session import Session, open_session
from polus.training.together import minimize_together

if TYPE_CHECKING:
    from polus.lr_finder import LRFinderResult, SuggestionName


# What to write instead of the methods of a Keras model.
OF_MODEL = {
    "fit": ". Write train(polus.from_arrays((x, y), batch_size=32), epochs=3).",
    "compile": ": optimizer, loss and metrics are arguments of the trainer.",
}


class TrainerMethods(BaseLogger):
    """The base of `BaseTrainer` with what few programs need."""

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    post_process_grads: Callable[[list[Any]], list[Any]] | None
    _engine: Engine

    if not TYPE_CHECKING:  # where it would give the class any attribute

        def __getattr__(self, name: str) -> Never:
            hint = OF_MODEL.get(name, "")
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(f"{message}{hint}", name=name, obj=self)

    def __reduce__(self) -> Never:
        raise TypeError(
            f"A {type(self).__name__} can't be pickled: its optimizer and average would no longer "
            "be those of its model. copy.deepcopy(trainer) copies it; "
            'train(..., run_dir="runs/a") saves a run, which another process continues.'
        )

    @property
    def follows_fit(self) -> bool:
        """Whether steps run nothing but what `fit` would: model, loss and metrics.

        Only these are traced for batches of any length, as in `fit` on TensorFlow: a step of one's
        own may ask for the length of a batch.
        """
        return False

    def predicted(self, outputs: object) -> Any:
        """Returns a prediction from the model's outputs."""
        return outputs

    def changing_train_config(self, **arguments: Unpack[TrainArguments]) -> None:
        """Keeps arguments of `train` for later calls that leave them out.

        So a function can return a trainer that is ready to run: `init_trainer().train()`.

        Raises:
            TypeError: For a name that `train` doesn't take.
        """
        check_names(dict(arguments))
        self._engine.arguments |= one_transform(dict(arguments))

    def kept_train_config(self) -> dict[str, Any]:
        """Returns the arguments of `train` that `changing_train_config` has kept."""
        return dict(self._engine.arguments)

    def summary(self, print_fn: Callable[[str], object] = print) -> None:
        """Prints models, optimizers, what they train, the loss and the metrics, as a table.

        What each optimizer trains is known once a step was traced: after `build_on(batch)`,
        `train(..., dry_run=True)` or the first step.

        Args:
            print_fn: Takes the table. Of several processes that train together, only the first one
                prints.
        """
        if print_fn is not print or backend.placement().is_first:
            print_fn(summarize(self, self._engine.executor.variables))

    def traced_output_shape(self) -> tuple[int | None, ...] | None:
        """Returns the shape of the model's output when a step was last traced; None before that."""
        return self._engine.output_shape

    def session(
        self,
        callbacks: Sequence[ICallback | KerasCallbackLike] | None = None,
        *,
        resume: str | PathLike[str] | None = None,
        learning_rate: float | None = None,
        on_nonfinite: Policy | None = None,
        max_skips: int | None = None,
        run_dir: str | PathLike[str] | None = None,
        run_eagerly: bool | None = None,
    ) -> contextlib.AbstractContextManager[Session]:
        """Begins a run whose loop is your own, with callbacks, history and checkpoints as `train`.

        ```python
        with trainer.session(callbacks=[...], resume="runs/ppo") as run:
            while run.epoch < 100:
                for batch in rollout(trainer.model):
                    run.step(*batch)
                run.end_epoch(reward=...)
        ```

        The block ends at the next step after a callback, or `run.stop("kl")`, has stopped it.

        Args:
            callbacks: As for `train`.
            resume: A folder of checkpoints to continue from and to save to, as for `train`. The
                block then begins at `run.epoch`, after `run.num_steps` steps of it.
            learning_rate: As for `train`.
            on_nonfinite: As for `train`.
            max_skips: As for `train`.
            run_dir: As for `train`; instead of `resume`.
            run_eagerly: As for `train`.
        """
        given = {
            "resume": resume,
            "learning_rate": learning_rate,
            "on_nonfinite": on_nonfinite,
            "max_skips": max_skips,
            "run_dir": run_dir,
            "run_eagerly": run_eagerly,
        }
        given = {name: value for name, value in given.items() if value is not None}
        trainer: Any = self
        start = functools.partial(self._engine.running, trainer)
        return open_session(start, callbacks, given)

    def minimize_together(
        self,
        losses_fn: Callable[[], Mapping[str, Any]],
        groups: Mapping[str, tuple[Sequence[keras.Variable], keras.optimizers.Optimizer]],
    ) -> Any:
        """Updates groups of variables, each down the gradient of its own loss, at once.

        The losses come from one forward pass, and all gradients are taken before any update.

        ```python
        losses = self.minimize_together(
            lambda: {"g_loss": ..., "d_loss": ...},
            {"g_loss": (g.trainable_weights, g_optimizer), "d_loss": (d.trainable_weights, d_opt)},
        )
        ```

        Args:
            losses_fn: Takes nothing and returns a dict with a scalar for each group. It may have
                other terms, which are returned as well.
            groups: The name of a loss to the variables that minimize it, and their optimizer. One
                that serves several groups makes one step with all their gradients.

        Returns:
            What `losses_fn` returned.

        Raises:
            ValueError: If a loss is missing, is no scalar or depends on none of its variables, or
                if two groups share a variable.
        """
        return minimize_together(losses_fn, groups, self.post_process_grads)

    def prediction_step(self, *inputs: Any, **kwargs: Any) -> Any:
        """Returns what `predict` collects: tensors, or dicts of them, with a row per example.

        By default it returns the prediction for the first part of a batch.
        """
        check_not_overridden(self.model, "predict_step")
        return self.predicted(self.model(inputs[0], training=False))

    def evaluate(
        self,
        dataset: object,
        custom_data_transform_f: Callable[[Any], Any] | None = None,
        steps: int | None = None,
        *,
        model: "keras.Model | Average | None" = None,
        **unknown: Never,
    ) -> dict[str, Any]:
        """Evaluates the trainer's metrics over a dataset, and its loss if it has one.

        Runs in inference mode. Training is not disturbed: its metrics, the state of layers and all
        random generators are as before, in the middle of an epoch too.

        Args:
            dataset: As for `train`.
            custom_data_transform_f: A Python function applied to each batch.
            steps: The number of batches at most.
            model: An `Average`, or a model of the same architecture, whose weights are evaluated in
                place of the model's own.
            unknown: Raises, and says what to write instead of an argument of Keras' `evaluate`.

        Returns:
            Metric names and values, and "loss" and its terms (where `evaluation_loss` returns
            one), weighted by the number of examples.

        Raises:
            ValueError: If there is nothing to compute: no metrics, and no loss.
        """
        refuse("evaluate", unknown)
        weights = () if model is None else weights_for(self.model, model)
        with self._engine.paused():
            executor = self._engine.executor
            return evaluate(executor, dataset, custom_data_transform_f, steps, weights)

    def predict(
        self,
        dataset: object,
        custom_data_transform_f: Callable[[Any], Any] | None = None,
        steps: int | None = None,
        **unknown: Never,
    ) -> Any:
        """Predicts all examples of a dataset, in their order: what `prediction_step` returns.

        Runs compiled and in inference mode, and leaves the training undisturbed. The device holds
        the outputs of two batches at most.

        Args:
            dataset: As for `train`. What `from_arrays` returns is read unshuffled.
            custom_data_transform_f: A Python function applied to each batch.
            steps: The number of batches at most.
            unknown: Raises, and says what to write instead of an argument of Keras' `predict`.

        Returns:
            A NumPy array, or a structure of arrays, with the examples along the first axis.
        """
        refuse("predict", unknown)
        with self._engine.paused():
            executor = self._engine.executor
            return predict(executor, self.prediction_step, dataset, custom_data_transform_f, steps)

    def lr_finder(
        self,
        tf_dataset: object = None,
        use_lr_found: bool = False,
        *,
        start_lr: float = 1e-7,
        end_lr: float = 10.0,
        num_steps: int = 100,
        stop_factor: float = 4.0,
        suggestion: "SuggestionName" = "tried",
        optimizer: keras.optimizers.Optimizer | str | None = None,
        max_steps: int | None = None,
        for_schedule: str | None = None,
        validation_data: object = None,
        monitor: str | None = None,
    ) -> "LRFinderResult":
        """Finds a learning rate by a range test and trials, and leaves no trace on the training.

        Runs `num_steps` steps at rates that grow exponentially, and records the curve of their
        losses (Smith 2015, arXiv:1506.01186). The same batches then run once more at a rate of
        zero, which shows how hard each of them is. Then it trains for a while at each of the rates
        that the curve leaves open, keeps the best one and its neighbours, half of them, and trains
        these on (after Jamieson and Talwalkar 2016, arXiv:1502.07943). Afterwards weights,
        optimizer, metrics, generators and the dataset's shuffling are as before, also after an
        error or Ctrl-C; Ctrl-C during the trials ends them, and the result has those so far. No
        callback is called.

        Args:
            tf_dataset: As for `train`, but not a bare iterator. It is repeated if it is shorter.
                By default that of `changing_train_config`, with its `custom_data_transform_f`.
            use_lr_found: Whether the optimizer keeps the suggestion as its learning rate.
            start_lr: The first rate; far too small is right.
            end_lr: The last rate; far too large is right, since the sweep stops when the loss
                diverges.
            num_steps: The number of steps, at least 16.
            stop_factor: The sweep stops when the smoothed loss exceeds this many times its best, or
                the loss is not finite.
            suggestion: "tried", or a point of the curve, which needs no trials: "steep",
                "valley", "slide" or "minimum". See docs/learning_rate.md.
            optimizer: The optimizer to sweep if the step uses several, or its name, such as
                "d_optimizer". By default the trainer's own. Of a `MultiOptimizer` the highest rate
                is swept, and the others keep their ratio to it.
            max_steps: The training steps of all trials together at most; 0 for no trials. By
                default 5 times `num_steps`, but at most a tenth of the run if
                `changing_train_config` has its epochs.
            for_schedule: "warmup_cosine" lets each trial begin as `polus.schedules.Cosine` with a
                warm-up does; the suggestion is then its peak. By default rates are constant.
            validation_data: Data to judge the trials by, of which 50 batches are read at most. By
                default they are judged by their training losses.
            monitor: The term of the step's result to read, such as "d_loss"; by default "loss". If
                the step has several optimizers, that which the swept one minimizes.

        Returns:
            The curve and the suggestions: see `polus.lr_finder.LRFinderResult`.

        Raises:
            ValueError: For arguments that make no sweep; with `use_lr_found`, for a curve that
                suggests nothing, and for an optimizer whose rate is a schedule.
        """
        from polus.lr_finder import SweepSettings, find

        engine = self._engine
        settings = SweepSettings(
            start_lr,
            end_lr,
            num_steps,
            stop_factor,
            suggestion,
            max_steps,
            for_schedule,
            monitor,
        )
        with engine.paused(), info_from_first(backend.placement().is_first):
            return find(
                engine.executor,
                engine.arguments,
                tf_dataset,
                use_lr_found,
                settings,
                optimizer,
                validation_data,
            )
