"""The trainer: one step, described by its user, and the loop around it.

The loop, in five lines:

    for epoch in range(epochs):
        for block in data:                                    # some batches of equal shape
            losses = train_step(*batch) for each of them      # one compiled call
            callbacks.on_steps_end(epoch, steps, losses)
        callbacks.on_epoch_end(epoch)
"""

import contextlib
import inspect
import itertools
import math
import operator
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from polus.backends import backend
from polus.backends.scopes import active_dry_run
from polus.callbacks.base import CallbackCoordinator
from polus.core import BaseLogger, function, get_jit_compile
from polus.data import DataReader, as_adapter, as_arguments
from polus.data.reader import EpochReader
from polus.history import History
from polus.host import DeviceValues
from polus.metrics import as_metric
from polus.state import Snapshot, layers_of
from polus.steps.compiled import CompiledStep, choose

if TYPE_CHECKING:
    from polus.lr_finder import LRFinderResult

SPELLINGS = {
    "foward_without_grads": "forward_without_grads",
    "foward_with_grads": "forward_with_grads",
}


class BaseTrainer(BaseLogger):
    """Gradient descent over batches. Extend it and say what a step computes.

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

    Args:
        model: a `keras.Model`, which may be unbuilt: it is built from the first batch.
        optimizer: a `keras.optimizers.Optimizer`.
        loss: a callable of what `forward_with_grads` returns. It gives a scalar tensor, or a dict
            of scalars of which the one named "loss" is minimised and all are recorded.
        metrics: `polus.metrics.IMetric` or `keras.metrics.Metric` objects.
        post_process_prediction: applied to the model's output before the loss; kept as
            `post_process_logits`.
        post_process_grads: takes and returns the list of gradients (None where there is none),
            before the optimizer sees them. Under loss scaling it sees them unscaled.
        trainable_weights: the variables that are trained; all of the model's where nothing is said.
        post_process_logits: another name of `post_process_prediction`.

    Attributes:
        step_counter: an int32 variable that counts updates; `forward_*` may use it.
        early_stop: set to True (by a callback), it ends training after the present step.

    Raises:
        TypeError: if BaseTrainer itself is instantiated, or an argument is of the wrong kind.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Both spellings are one method, in every class: either can be called and overridden.
        for documented, correct in SPELLINGS.items():
            for base in cls.__mro__:  # a mixin need not know of the spellings
                given = [vars(base)[name] for name in (correct, documented) if name in vars(base)]
                if given:
                    break
            if len(given) == 2 and given[0] is not given[1]:
                raise TypeError(
                    f"{base.__name__} defines both {correct} and {documented}, which are two "
                    "spellings of one method. Keep one."
                )
            setattr(cls, correct, given[0])
            setattr(cls, documented, given[0])

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        loss: Callable[..., Any],
        metrics: Sequence[Any] = (),
        post_process_prediction: Callable[[Any], Any] | None = None,
        post_process_grads: Callable[[list[Any]], list[Any]] | None = None,
        *,
        trainable_weights: Sequence[keras.Variable] | None = None,
        post_process_logits: Callable[[Any], Any] | None = None,
    ) -> None:
        if type(self) is BaseTrainer:
            raise TypeError(
                "BaseTrainer is extended, not instantiated: write a class with "
                "forward_with_grads, or use ClassifierTrainer for batches (x, y)."
            )
        super().__init__()
        _check_kinds(model, optimizer, loss)
        self.model = model
        self.optimizer = _loss_scaled(optimizer, model)
        self.loss = loss
        self.metrics = [as_metric(metric) for metric in metrics]
        _check_names_differ(self.metrics)
        self.post_process_logits = post_process_prediction or post_process_logits
        self.post_process_grads = post_process_grads
        self.step_counter = keras.Variable(0, dtype="int32", trainable=False, name="step_counter")
        self.early_stop = False
        self._trainable_weights = None if trainable_weights is None else list(trainable_weights)
        self._said_all_weights = False
        self._train_config: dict[str, Any] = {}
        self._built = False
        self._built_of: list[Any] = []  # see `_refresh`
        self._updates: list[tuple[Any, list[Any]]] = []  # each optimizer, and what it updates
        self._dispatches: dict[Any, CompiledStep] = {}
        self._choices: dict[str, list[Any]] = {}  # of an earlier process: see `_dispatch`
        self._example: tuple[Any, ...] | None = None  # the step's arguments, to look at
        self._steps_before = 0  # of earlier calls of `train`
        mode = get_jit_compile()
        self._jit_compile: bool | None = None if mode == "auto" else mode
        self._capacity = 1
        # Held for as long as random generators are put back to what they were: the training that
        # runs may draw from them to make a batch.
        self._data_lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self._overridden = type(self).train_step is not BaseTrainer.train_step
        self._step = self.train_step
        # What the class describes is compiled for this object; called alone it does one update.
        self._compiled_step = function(self.train_step)
        self.train_step = self._one_update  # type: ignore[method-assign]

    # ------------------------------------------------------------------ what a user describes

    def forward_without_grads(self, *inputs: Any) -> Any:
        """What needs no gradient, passed on to `forward_with_grads`. Default: the inputs."""
        return inputs

    def forward_with_grads(self, *inputs: Any) -> Any:
        """What is trained: returns what is passed to the loss."""
        raise NotImplementedError(
            f"{type(self).__name__} says no forward_with_grads(self, *inputs). It takes a batch "
            "(what forward_without_grads makes of it) and returns what the loss takes, for "
            "example: return y, self.model(x, training=True)"
        )

    foward_without_grads = forward_without_grads
    foward_with_grads = forward_with_grads

    def metric_samples(self, *outputs: Any) -> tuple[Any, ...] | None:
        """What training metrics take, from what the loss takes; None for no training metrics.

        Default: a pair is taken for (y_true, y_pred); of anything else no metric is computed.
        """
        return outputs if len(outputs) == 2 else None

    def evaluation_step(self, *inputs: Any) -> tuple[Any, ...]:
        """What validation metrics take, in inference mode. Default: (y, prediction) of (x, y)."""
        if len(inputs) < 2:
            raise NotImplementedError(
                f"{type(self).__name__}.evaluation_step takes (x, y) by default, and the batch "
                f"has {len(inputs)} part(s). Override evaluation_step(self, *inputs) to return "
                "what the metrics take: (y_true, y_pred)."
            )
        x, y = inputs[0], inputs[1]
        return y, self.predicted(self.model(x, training=False))

    def evaluation_loss(self, *samples: Any) -> Any:
        """The loss of what `evaluation_step` gave, a scalar; None (the default) for no loss."""
        return None

    def predicted(self, outputs: Any) -> Any:
        """The model's outputs, through `post_process_logits` where there is one."""
        return outputs if self.post_process_logits is None else self.post_process_logits(outputs)

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """The variables that are trained."""
        if self._trainable_weights is not None:
            return self._trainable_weights
        weights = list(self.model.trainable_weights)
        if weights and not self._said_all_weights:
            self._said_all_weights = True
            self.logger.info("All %d trainable weights of the model are trained.", len(weights))
        return weights

    @trainable_weights.setter
    def trainable_weights(self, weights: Sequence[keras.Variable] | None) -> None:
        self._trainable_weights = None if weights is None else list(weights)

    # ------------------------------------------------------------------ the step

    def train_step(self, *inputs: Any) -> Any:
        """One update: forward, loss, gradients, optimizer. Compiled; may be overridden.

        Called outside `train`, it does one update.

        Args:
            inputs: the parts of one batch.

        Returns:
            The loss, a scalar tensor, or the dict of its named terms.
        """
        inputs = as_arguments(self.forward_without_grads(*inputs))

        def forward() -> Any:
            outputs = as_arguments(self.forward_with_grads(*inputs))
            result = _sum(self.loss(*outputs), self.model.losses)
            if self.metrics and (samples := self.metric_samples(*outputs)) is not None:
                samples = keras.tree.map_structure(ops.stop_gradient, samples)
                for metric in self.metrics:
                    metric.samples_from_batch(samples)
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
        """One update of `variables` down the gradient of a closure.

        Args:
            loss_fn: takes nothing and returns a scalar tensor, or a dict with a scalar named
                "loss".
            variables: what is updated.
            optimizer: the trainer's own where none is given.

        Returns:
            What `loss_fn` returned.

        Raises:
            ValueError: if the loss is no scalar, or depends on none of the variables.
        """
        optimizer = self.optimizer if optimizer is None else optimizer
        variables = list(variables)
        if (dry_run := active_dry_run()) is not None:
            result = loss_fn()
            _scalar_loss(result)
            dry_run.record_update(optimizer, variables)
            return result

        def scaled_loss(result: Any) -> Any:
            return optimizer.scale_loss(_scalar_loss(result))

        # As the optimizer is given them in `fit`; but the user's function takes tensors.
        sparse = self.post_process_grads is None
        result, gradients = backend.value_and_grad(loss_fn, variables, scaled_loss, sparse)
        _check_connected(gradients, variables)
        if self.post_process_grads is not None:
            scale = optimizer.scale_loss(ops.ones(()))
            gradients = [None if g is None else g / ops.cast(scale, g.dtype) for g in gradients]
            gradients = list(self.post_process_grads(gradients))
            if len(gradients) != len(variables):
                raise ValueError(
                    f"post_process_grads took {len(variables)} gradients and returned "
                    f"{len(gradients)}; it returns one for each, in the same order."
                )
            gradients = [None if g is None else g * ops.cast(scale, g.dtype) for g in gradients]
        if not optimizer.built:
            optimizer.build(variables)
        backend.apply_gradients(optimizer, gradients, variables)
        return result

    # ------------------------------------------------------------------ the loop

    def train(
        self,
        tf_dataset: Any = None,
        epochs: int | None = None,
        callbacks: Sequence[Any] | None = None,
        custom_data_transform_f: Callable[[Any], Any] | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        *,
        train_map_f: Callable[[Any], Any] | None = None,
        steps_per_execution: int | None = None,
        resume: Any = None,
    ) -> History:
        """Trains for some epochs.

        What is not given is taken from `changing_train_config`.

        Args:
            tf_dataset: see `polus.data.as_adapter` for what it may be. A batch that is a tuple or
                list is spread over the step's arguments; anything else is one argument.
            epochs: how often the data is gone through.
            callbacks: `polus.callbacks` and `keras.callbacks` objects.
            custom_data_transform_f: a Python function applied to each batch before the step.
            steps: the number of steps of one epoch, for a dataset that is endless, longer, or can't
                tell its length.
            learning_rate: the optimizer's rate for this run; afterwards it is what it was before.
            train_map_f: another name of `custom_data_transform_f`.
            steps_per_execution: how many steps the backend runs in one call; by default it is
                measured which number is the fastest. Fewer at a time while data is slow.
            resume: a folder of checkpoints to continue from and, with a
                `polus.checkpoint.Checkpoint` among the callbacks, to save to.

        Returns:
            What happened: see `polus.history.History`.

        Raises:
            ValueError, TypeError: for arguments that can't be trained with; see the message.
        """
        given = {
            name: value for name, value in locals().items() if name != "self" and value is not None
        }
        config = _checked_config({**self._train_config, **_one_name(given)})
        reader = DataReader(
            as_adapter(config["tf_dataset"]),
            config.get("custom_data_transform_f"),
            config.get("steps"),
        )
        if reader.num_batches is None and reader.adapter.endless:
            raise ValueError(
                "The dataset is endless. Say how many steps make an epoch: train(..., steps=1000)."
            )
        callbacks = config.get("callbacks", ())
        run = CallbackCoordinator(callbacks, self, config["epochs"], reader)
        run.steps_per_execution = config.get("steps_per_execution")
        self.early_stop = False
        if (resume := config.get("resume")) is not None:
            from polus.checkpoint import resume_run
            from polus.checkpoint.store import Store

            run.resuming = bool(Store(resume).paths())
        with self._rate(config.get("learning_rate")), run.running(), self._misfits_explained():
            if resume is not None:
                resume_run(run, resume)
            self._run(run)
        self._steps_before += run.epochs * (run.steps or 0)
        return run.history

    def _run(self, run: CallbackCoordinator) -> None:
        """The loop, from where the run stands."""
        if run.step == 0:  # later, to evaluate them resets them
            for metric in self.metrics:
                metric.reset()
        while run.epoch < run.epochs and not self.early_stop:
            data = run.reader.epoch(run.epoch, start=run.step)
            if run.step == 0:
                run.on_epoch_begin()
            dispatch = self._dispatch(run, data)
            with (
                self._reading(run.reader),
                contextlib.closing(
                    data.blocks(dispatch.capacity, run.steps_until_callback, run.poll)
                ) as blocks,
            ):
                for block in blocks:
                    if block.count == 1:
                        run.on_train_batch_begin()
                    program, arguments = dispatch.prepare(block)
                    # From here to the record of it nothing interrupts: signals wait for `run.poll`.
                    outputs = program(*arguments)
                    run.on_steps_end(block, outputs)
                    run.poll()
                    if self.early_stop:
                        break
            run.on_epoch_end(self._metric_results())
            run.poll()
        for optimizer, weights in self._updates:
            # Where it keeps an average of the weights (EMA), they end as that, as in Keras.
            optimizer.finalize_variable_values(weights)

    def lr_finder(
        self,
        tf_dataset: Any = None,
        use_lr_found: bool = False,
        *,
        start_lr: float = 1e-7,
        end_lr: float = 10.0,
        num_steps: int = 100,
        stop_factor: float = 4.0,
        suggestion: str = "steep",
        optimizer: keras.optimizers.Optimizer | None = None,
    ) -> "LRFinderResult":
        """Finds a learning rate by the range test, and leaves no trace on the training.

        Runs `num_steps` steps at rates that grow exponentially, and reads the rate to train with
        from the curve of their losses (Smith 2015, arXiv:1506.01186). The same batches then run
        once more at a rate of zero, which shows how hard each of them is. Afterwards weights,
        optimizer, metrics, generators and the dataset's shuffling are as before, also after an
        error or Ctrl-C; no callback hears of it.

        ```python
        result = trainer.lr_finder(dataset)
        result.plot("lr_finder.png")
        trainer.train(dataset, epochs=10, learning_rate=result.suggestion)
        ```

        Args:
            tf_dataset: as for `train`, but no bare iterator. It is repeated where it is shorter.
                Not given, it is that of `changing_train_config`, whose `custom_data_transform_f`
                counts.
            use_lr_found: whether the optimizer keeps the suggestion as its rate.
            start_lr: the first rate; far too small is right.
            end_lr: the last one; far too large is right, for the sweep stops when the loss
                diverges.
            num_steps: 16 or more.
            stop_factor: the sweep stops when the smoothed loss exceeds this many times its best, or
                the loss is not finite.
            suggestion: "steep", "valley", "slide" or "minimum": see `polus.lr_finder`.
            optimizer: which one is swept, where the step uses several. Default: the trainer's own.

        Returns:
            The curve and the suggestions: see `polus.lr_finder.LRFinderResult`.

        Raises:
            ValueError: for arguments that make no sweep; with `use_lr_found`, for a curve that
                suggests nothing, and for an optimizer whose rate is a schedule.
        """
        from polus.lr_finder import find

        with self._data_lock:
            return find(
                self,
                tf_dataset,
                use_lr_found,
                start_lr=start_lr,
                end_lr=end_lr,
                num_steps=num_steps,
                stop_factor=stop_factor,
                suggestion=suggestion,
                optimizer=optimizer,
            )

    def changing_train_config(self, **arguments: Any) -> None:
        """Keeps arguments of `train` for later calls that don't give them.

        So that a function can return a trainer that is ready to run:

        ```python
        def init_trainer():
            trainer = ClassifierTrainer(model, optimizer, loss)
            trainer.changing_train_config(tf_dataset=data, epochs=10)
            return trainer

        init_trainer().train()
        ```

        Raises:
            TypeError: for a name that `train` doesn't take.
        """
        _check_names(arguments)
        self._train_config |= _one_name(arguments)

    def evaluate(
        self,
        dataset: Any,
        custom_data_transform_f: Callable[[Any], Any] | None = None,
        steps: int | None = None,
    ) -> dict[str, Any]:
        """The trainer's metrics over a dataset, and its loss where `evaluation_loss` gives one.

        In inference mode. Training is not disturbed: its metrics, in the middle of an epoch too,
        and all random generators are as before.

        Args:
            dataset: as for `train`.
            custom_data_transform_f: a Python function applied to each batch.
            steps: how many batches at most.

        Returns:
            Metric name to value, and "loss" and its terms, weighted by the number of examples.
        """
        with self._data_lock:
            return self._evaluated(dataset, custom_data_transform_f, steps)

    def _evaluated(
        self, dataset: Any, custom_data_transform_f: Callable[[Any], Any] | None, steps: int | None
    ) -> dict[str, Any]:
        self._refresh()
        variables = {id(v): v for metric in self.metrics for v in metric.variables}
        # A layer may draw random numbers in inference mode too; its generator's state is integers.
        variables |= {id(v): v for v in self._owned_variables() if "int" in v.dtype}
        snapshot = Snapshot(variables.values())
        fed = [metric.has_samples for metric in self.metrics]
        losses: list[dict[str, DeviceValues]] = []
        sizes: list[int] = []
        reader = DataReader(as_adapter(dataset), custom_data_transform_f, steps)
        try:
            for metric in self.metrics:
                metric.reset()
            data = reader.epoch(0)
            key = "evaluation", get_jit_compile()
            dispatch = self._dispatches.get(key)
            if dispatch is None:
                # Of a resumed run, the compiler that its first validation had.
                chosen, _ = self._choices.get(str(key), (self._jit_compile, None))
                dispatch = self._dispatches[key] = CompiledStep(self._evaluation, chosen)
                if not _built(self.model):
                    backend.trace(self._evaluation, data.example)
            capacity = min(self._capacity, reader.num_batches or self._capacity)
            with contextlib.closing(data.blocks(capacity)) as blocks:
                for block in blocks:
                    program, arguments = dispatch.prepare(block)
                    terms = program(*arguments)
                    losses.append(
                        {k: DeviceValues(values, block.count) for k, values in terms.items()}
                    )
                    sizes += [block.batch_size] * block.count
            results = {metric.name: metric.evaluate() for metric in self.metrics}
        finally:
            snapshot.restore()
            for metric, was_fed in zip(self.metrics, fed, strict=True):
                metric.has_samples = was_fed
        columns = {
            name: np.concatenate([np.asarray(row[name], np.float64) for row in losses])
            for name in sorted(losses[0], key=lambda name: name != "loss")
        }
        means = {name: float(np.average(column, weights=sizes)) for name, column in columns.items()}
        return means | results

    # ------------------------------------------------------------------ how it is done

    def _one_update(self, *inputs: Any) -> Any:
        self._refresh()
        self._build(inputs)
        return self._compiled_step(*inputs)

    def _evaluation(self, *inputs: Any) -> Any:
        samples = self.evaluation_step(*inputs)
        for metric in self.metrics:
            metric.samples_from_batch(samples)
        loss = self.evaluation_loss(*samples)
        return {} if loss is None else _terms(loss)

    def _refresh(self) -> None:
        """Forgets what is compiled where it was made of other parts than there are now.

        So the optimizer, the loss, what is trained and the like can be replaced between two runs.
        """
        if self._built and not _same(self._made_of(), self._built_of):
            self._built = False
            self._dispatches.clear()
            self._compiled_step = function(self._step)

    def _made_of(self) -> list[Any]:
        processing = (self.post_process_logits, self.post_process_grads)
        return [self.optimizer, self.loss, *processing, *self.metrics, *self.trainable_weights]

    def _build(self, inputs: tuple[Any, ...]) -> None:
        """Builds what isn't built yet, from one batch. Nothing is trained."""
        if self._built:
            return
        self.optimizer = _loss_scaled(self.optimizer, self.model)
        layers = [value for value in vars(self).values() if isinstance(value, keras.layers.Layer)]
        if self._overridden or not all(map(_built, layers)):
            self._survey(inputs)
        else:
            weights = self.trainable_weights
            _check_some(weights)
            if not self.optimizer.built:
                self.optimizer.build(weights)
            self._updates = [(self.optimizer, weights)]
        self._built, self._built_of = True, self._made_of()

    def _survey(self, inputs: tuple[Any, ...]) -> list[keras.Variable]:
        """All variables that a step reads or assigns, in the order of their first meeting.

        The step runs abstractly, with `minimize` computing only its loss; models and optimizers
        that were unbuilt are built on the way. No value is changed.
        """

        def step(*inputs: Any) -> Any:
            result = self._step(*inputs)
            _scalar_loss(result, "What train_step returns")
            return result

        for _ in range(2):  # the second time with the weights that the first one made
            unbuilt = [layer for layer in layers_of(self.model) if not layer.built]
            dry_run = backend.trace(step, inputs)
            made = any(layer.built for layer in unbuilt)
            if not made and all(variables for _, variables in dry_run.updates):
                break
        met = dry_run.variables
        self._updates = dry_run.merged_updates()
        for optimizer, weights in self._updates:
            _check_some(weights)
            if not optimizer.built:
                optimizer.build(weights)
            met = [*met, *weights, *optimizer.variables]
        return list({id(variable): variable for variable in met}.values())

    def state_variables(self) -> list[keras.Variable]:
        """All variables that make up a run, in an order that is the same in each process.

        Those of the layers, optimizers and metrics that this object holds, which have the same
        order on each backend, and what a step meets besides. Known from the first batch of a run
        on.
        """
        if self._example is None:
            raise RuntimeError(
                "The variables of a run are known from its first batch on, and none was read yet. "
                "Ask for them, or for a checkpoint, in on_boundary or an event of a batch's end."
            )
        inputs = self._example
        self._build(inputs)
        variables = [self.step_counter, *self._owned_variables(), *self._survey(inputs)]
        return list({id(variable): variable for variable in variables}.values())

    def _owned_variables(self) -> list[keras.Variable]:
        """Those of the layers, optimizers and metrics that stand in attributes of this object."""
        held = keras.tree.flatten([v for v in vars(self).values() if isinstance(v, list | tuple)])
        owned = [getattr(value, "variables", []) for value in (*vars(self).values(), *held)]
        return list(itertools.chain(*owned))

    def _dispatch(self, run: CallbackCoordinator, data: EpochReader) -> CompiledStep:
        """The compiled step, and how many at a time: measured once where nothing is said."""
        self._refresh()
        mode = get_jit_compile()
        longest = run.max_steps_per_execution()
        self._example = data.example
        # Without sizes: batches that are bucketed by length begin each epoch with another one.
        kinds = keras.tree.map_structure(lambda a: (str(a.dtype), len(a.shape)), self._example)
        key = mode, run.steps_per_execution, longest > 1, str(kinds)
        dispatch = self._dispatches.get(key)
        if dispatch is None:
            self._build(self._example)
            self._dispatches[key] = dispatch = CompiledStep(
                self._step, None if mode == "auto" else mode
            )
            if str(key) in self._choices:
                dispatch.jit_compile, dispatch.capacity = self._choices[str(key)]
                dispatch.settled = True
        choose(
            dispatch,
            data,
            lambda: self._survey(data.example),
            mode,
            longest,
            run.steps_per_execution,
            self._steps_before + run.epochs * (run.steps or math.inf),
        )
        self._jit_compile, self._capacity = dispatch.jit_compile, dispatch.capacity
        return dispatch

    @contextlib.contextmanager
    def _reading(self, reader: DataReader) -> Iterator[None]:
        """For the length of the block a thread makes the batches of `reader`."""
        before, self._data_lock = self._data_lock, reader.lock
        try:
            yield
        finally:
            self._data_lock = before

    def _metric_results(self) -> dict[str, Any]:
        return {metric.name: metric.evaluate() for metric in self.metrics if metric.has_samples}

    @contextlib.contextmanager
    def _misfits_explained(self) -> Iterator[None]:
        """Says of a call that failed for its arguments what the batch was that led to it."""
        try:
            yield
        except TypeError as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            # The call itself failed, in our code: no frame of the user's is below.
            ours = str(frame.f_globals.get("__name__")).startswith("polus.")
            if ours and self._example is not None:
                error.add_note(_explanation(self._example))
            raise

    @contextlib.contextmanager
    def _rate(self, learning_rate: float | None) -> Iterator[None]:
        """The optimizer's rate for the length of the block."""
        if learning_rate is None:
            yield
            return
        before = float(ops.convert_to_numpy(self.optimizer.learning_rate))
        try:
            self.optimizer.learning_rate = learning_rate
        except (TypeError, AttributeError):
            raise ValueError(
                f"learning_rate={learning_rate} was given to train, but the rate of this "
                "optimizer is a schedule, which can't be set. Make the optimizer with a number, "
                "or leave it out here."
            ) from None
        try:
            yield
        finally:
            self.optimizer.learning_rate = before


class ClassifierTrainer(BaseTrainer):
    """Classification and regression over batches (x, y) or (x, y, sample_weight).

    ```python
    trainer = ClassifierTrainer(
        model, keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy()
    )
    history = trainer.train(polus.data.from_arrays((x, y), batch_size=32), epochs=5)
    ```

    The losses of the model itself (regularisation, `add_loss`) are part of the loss, as in Keras.

    Args:
        model: a `keras.Model`.
        trainable_weights: the variables that are trained; all of the model's where it is None. The
            optimizer may stand in this place: `ClassifierTrainer(model, optimizer, loss)`.
        args, kwargs: as for `BaseTrainer`, from `optimizer` on.
    """

    def __init__(
        self, model: keras.Model, trainable_weights: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(trainable_weights, keras.optimizers.Optimizer):
            args, trainable_weights = (trainable_weights, *args), None
        super().__init__(model, *args, trainable_weights=trainable_weights, **kwargs)

    def forward_with_grads(self, x: Any, y: Any, *sample_weight: Any) -> Any:
        """The labels and the prediction: what a loss of Keras takes."""
        return y, self.predicted(self.model(x, training=True)), *sample_weight

    def metric_samples(self, *outputs: Any) -> tuple[Any, ...]:
        """The labels and the prediction. Metrics are not weighted, as `metrics` in Keras."""
        return outputs[:2]

    def evaluation_loss(self, *samples: Any) -> Any:
        """The loss over validation data, without sample weights."""
        return _sum(self.loss(*samples), self.model.losses)


# ---------------------------------------------------------------------- what can go wrong


def _check_kinds(model: Any, optimizer: Any, loss: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"model is a keras.Model, and got {_kind(model)}. It has to come from this Keras "
            f"(keras {keras.__version__} on {keras.config.backend()}), not from another library."
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"optimizer is a keras.optimizers.Optimizer, and got {_kind(optimizer)}. Write, for "
            "example, keras.optimizers.Adam(1e-3); an optimizer of a backend can't update Keras "
            "variables on every backend."
        )
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(
            f"loss is a callable that returns a scalar, and got {_kind(loss)}: {loss!r}. Write, "
            "for example, keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
        )


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__qualname__}, of which an object is meant"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _loss_scaled(optimizer: Any, model: keras.Model) -> Any:
    """Under mixed_float16 a plain optimizer is given loss scaling, as `compile` does."""
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if not scaled and getattr(model.dtype_policy, "name", None) == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    return optimizer


def _sum(result: Any, penalties: list[Any]) -> Any:
    """What the loss returned, with the losses of the model itself."""
    if not penalties or (isinstance(result, dict) and "loss" not in result):
        return result  # of which `_scalar_loss` complains
    if isinstance(result, dict):
        return {**result, "loss": result["loss"] + sum(penalties)}
    return result + sum(penalties)


def _terms(result: Any) -> dict[str, Any]:
    """What the loss returned as named terms in float32."""
    _scalar_loss(result)
    terms = result if isinstance(result, dict) else {"loss": result}
    return {name: ops.cast(value, "float32") for name, value in terms.items()}


def _scalar_loss(result: Any, what: str = "The loss") -> Any:
    """The loss out of a scalar, or of a dict of scalars."""
    terms = result if isinstance(result, dict) else {"loss": result}
    if "loss" not in terms:
        raise ValueError(
            f"{what} has the terms {sorted(terms)}, and none is named 'loss'. Return "
            '{"loss": total, ...}: that one is minimised, the others are recorded.'
        )
    for name, value in terms.items():
        term = "" if name == "loss" else f" as its term {name!r}"
        shape = getattr(value, "shape", None)
        if shape is None:
            raise ValueError(
                f"{what} is a scalar tensor, and got a {type(value).__name__}{term}. Return a "
                'tensor, or a dict of tensors: {"loss": total, ...}.'
            )
        if len(shape):
            raise ValueError(
                f"{what} is a scalar tensor, and got a tensor of shape {tuple(shape)}{term}. "
                "Reduce it, for example with keras.ops.mean(...). Keras' losses that are classes, "
                "such as keras.losses.MeanSquaredError(), reduce by themselves; the functions give "
                "one value per example."
            )
    return terms["loss"]


def _check_some(variables: Sequence[Any]) -> None:
    if not variables:
        raise ValueError(
            "There is nothing to train: the list of trainable variables is empty. Is the model "
            "frozen (model.trainable = False), or was the list made before the layers were built?"
        )


def _check_connected(gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    _check_some(variables)
    if all(gradient is None for gradient in gradients):
        names = ", ".join(variable.path for variable in variables[:5])
        raise ValueError(
            f"The loss depends on none of the {len(variables)} trainable variables ({names}"
            f"{', ...' if len(variables) > 5 else ''}). Is the model called in "
            "forward_with_grads, is its output passed to the loss, and does everything between "
            "come from keras.ops?"
        )


def _check_names_differ(metrics: Sequence[Any]) -> None:
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} metrics are named {name!r}, and results are told apart by "
                f"name. Give each its own: {type(metrics[names.index(name)]).__name__}(..., "
                "name=...)."
            )


def _explanation(batch: Sequence[Any]) -> str:
    parts = ", ".join(map(_described, batch))
    return (
        f"The first batch has {len(batch)} part{'s' * (len(batch) != 1)}: {parts}. A batch that is "
        "a tuple or list is spread over the arguments of the step, anything else (a dict, one "
        "tensor) is one argument. What forward_without_grads returns is spread over "
        "forward_with_grads, and what that returns over the loss. To bring batches into another "
        "form: train(..., custom_data_transform_f=lambda batch: (batch['x'], batch['y'])). Arrays "
        "in memory are no batches: write polus.data.from_arrays((x, y), batch_size=32)."
    )


def _described(part: Any) -> str:
    if isinstance(part, dict):
        return f"a dict of {', '.join(map(repr, part))}"
    if hasattr(part, "shape") and hasattr(part, "dtype"):
        return f"{keras.backend.standardize_dtype(part.dtype)} {tuple(part.shape)}"
    return f"a {type(part).__name__}"


def _built(layer: keras.layers.Layer) -> bool:
    # A Sequential with a wrapped PyTorch module says so before the layers behind it are.
    return all(part.built for part in layers_of(layer))


def _same(parts: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(parts) == len(others) and all(map(operator.is_, parts, others))


TRAIN_NAMES = tuple(inspect.signature(BaseTrainer.train).parameters)[1:]


def _check_names(arguments: dict[str, Any]) -> None:
    import difflib

    for name in arguments:
        if name not in TRAIN_NAMES:
            close = difflib.get_close_matches(name, TRAIN_NAMES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(
                f"train takes no argument {name!r}.{hint} It takes {', '.join(TRAIN_NAMES)}."
            )


def _one_name(arguments: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(arguments)
    if "train_map_f" in arguments:
        arguments["custom_data_transform_f"] = arguments.pop("train_map_f")
    return arguments


def _checked_config(config: dict[str, Any]) -> dict[str, Any]:
    for name in ("tf_dataset", "epochs"):
        if config.get(name) is None:
            raise ValueError(
                f"train needs {name}: give it, or keep it with changing_train_config({name}=...)."
            )
    for name in ("epochs", "steps", "steps_per_execution"):
        value = config.get(name)
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{name} is a positive integer, and got {value!r}.")
    return config
