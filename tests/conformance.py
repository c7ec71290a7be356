"""Steps of many kinds, and for each backend the plain loop that a user would write by hand.

Each row is a trainer and, where the trainer does not say its step itself, the same step as a
hand-written loop has it. The plain loops use Keras' layers and optimizers and the backend's own
gradients, and none of our code. `KERAS_BACKEND=tensorflow python tests/conformance.py` records what
they compute, as the reference of all backends.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from polus import core
from polus.training import BaseTrainer, ClassifierTrainer

NUM_STEPS = 10
RECORDED = Path(__file__).parent / "data" / "conformance.json"

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(NUM_STEPS, 16, 6)).astype("float32")
LABELS = (X[..., 0] > 0).astype("int32") + (X[..., 1] > 0)
TARGETS = X[..., :2] ** 2
WEIGHTS = GENERATOR.uniform(0, 2, (NUM_STEPS, 16)).astype("float32")
TOKENS = GENERATOR.integers(0, 12, (NUM_STEPS, 16, 5)).astype("int32")
NOISE = GENERATOR.normal(size=(NUM_STEPS, 16, 3)).astype("float32")

cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
binary = keras.losses.BinaryCrossentropy(from_logits=True)
mean_squared = keras.losses.MeanSquaredError()


class Case:
    """One row, built: the trainer, its batches, and what the plain loop has to be told.

    Args:
        trainer: what is tested.
        batches: arrays with one row per step; each is one argument of the step.
        holders: models, optimizers and variables: all that the step reads or changes. A plain loop
            on JAX has to have them listed.
        plain: the step for the plain loop, `plain(loop, *batch)`; the trainer's own where it says
            one.
        deterministic: whether all backends compute the same.
        rtol: how near ours comes to the plain loop.
        num_steps: how many steps there are.
    """

    def __init__(
        self,
        trainer: BaseTrainer,
        batches: tuple[Any, ...],
        holders: tuple[Any, ...],
        plain: Callable[..., Any] | None = None,
        deterministic: bool = True,
        rtol: float = 1e-5,
        num_steps: int = NUM_STEPS,
    ) -> None:
        self.trainer = trainer
        # Of the trainer's own class, for the instance's one is compiled by us.
        self.plain = plain or type(trainer).train_step
        self.batches = [
            tuple(keras.tree.map_structure(lambda a, i=i: a[i], part) for part in batches)
            for i in range(num_steps)
        ]
        self.holders = (trainer.model, trainer.optimizer, *holders)
        self.deterministic = deterministic
        self.rtol = rtol

    def start(self) -> "Case":
        """Builds everything and sets weights that are the same on each backend."""
        generator = np.random.default_rng(1)
        seen: set[int] = set()
        for holder in self.holders:
            if isinstance(holder, keras.Model):
                for variable in holder.trainable_variables:
                    if id(variable) not in seen:
                        variable.assign(0.4 * generator.normal(size=variable.shape))
                        seen.add(id(variable))
        return self

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables, each once."""
        found = []
        for holder in self.holders:
            found += [holder] if isinstance(holder, keras.Variable) else holder.variables
        return list({id(variable): variable for variable in found}.values())


def counted(cls: type[BaseTrainer]) -> type[BaseTrainer]:
    """The trainer class with `traces`: how often Python ran through a gradient of it."""

    class Counted(cls):  # type: ignore[misc, valid-type]
        traces = 0

        def minimize(self, *args: Any) -> Any:
            self.traces += 1
            return super().minimize(*args)

        def minimize_together(self, *args: Any) -> Any:
            self.traces += 1
            return super().minimize_together(*args)

    Counted.__name__ = cls.__name__
    return Counted


# ---------------------------------------------------------------------- the rows

ROWS: dict[str, Callable[[], Case]] = {}


def row(build: Callable[[], Case]) -> Callable[[], Case]:
    ROWS[build.__name__] = build
    return build


def sequential(*stack: Any, shape: tuple[int | None, ...] = (6,), dtype: str | None = None) -> Any:
    return keras.Sequential([keras.Input(shape, dtype=dtype), *stack])


def dense(*sizes: int) -> Any:
    return sequential(*[layers.Dense(n, "tanh") for n in sizes[:-1]], layers.Dense(sizes[-1]))


def classifies(
    model: Any, x: Any = X, loss: Any = cross_entropy, optimizer: Any = None, **settings: Any
) -> Case:
    """A case for one model trained on (x, labels) by `ClassifierTrainer`."""
    optimizer = optimizer or keras.optimizers.Adam(0.01)
    trainer = counted(ClassifierTrainer)(model, optimizer, loss)

    def plain(loop: Any, x: Any, y: Any) -> Any:
        def forward() -> Any:
            return loss(y, model(x, training=True)) + sum(model.losses)

        # The trainer's: under mixed_float16 it is wrapped for loss scaling.
        return loop.minimize(forward, model.trainable_variables, trainer.optimizer)

    return Case(trainer, (x, LABELS), (), plain, **settings)


@row
def classifier() -> Case:
    return classifies(dense(8, 3))


@row
def regression() -> Case:
    model, optimizer = dense(8, 2), keras.optimizers.SGD(0.05, momentum=0.9)

    def plain(loop: Any, x: Any, y: Any, weight: Any) -> Any:
        return loop.minimize(
            lambda: mean_squared(y, model(x), weight), model.trainable_variables, optimizer
        )

    trainer = counted(ClassifierTrainer)(model, optimizer, mean_squared)
    return Case(trainer, (X, TARGETS, WEIGHTS), (), plain)


@row
def frozen_teacher() -> Case:
    class Distiller(BaseTrainer):
        def __init__(self, student: Any, teacher: Any, **kwargs: Any) -> None:
            super().__init__(student, **kwargs)
            self.teacher = teacher

        def forward_without_grads(self, x: Any) -> Any:
            return x, self.teacher(x, training=False)

        def forward_with_grads(self, x: Any, soft: Any) -> Any:
            return soft, self.model(x, training=True)

    student, teacher, optimizer = dense(4, 3), dense(8, 3), keras.optimizers.AdamW(0.01)

    def plain(loop: Any, x: Any) -> Any:
        soft = teacher(x)
        return loop.minimize(
            lambda: mean_squared(soft, student(x)), student.trainable_variables, optimizer
        )

    trainer = counted(Distiller)(student, teacher, optimizer=optimizer, loss=mean_squared)
    return Case(trainer, (X,), (teacher,), plain)


@row
def two_optimizers() -> Case:
    class GAN(BaseTrainer):
        def train_step(self, real: Any, noise: Any) -> Any:
            fake = self.model(noise, training=True)

            def judge() -> Any:
                good, bad = self.discriminator(real), self.discriminator(fake)
                return binary(ops.ones_like(good), good) + binary(ops.zeros_like(bad), bad)

            def fool() -> Any:
                score = self.discriminator(self.model(noise, training=True))
                return binary(ops.ones_like(score), score)

            judged = self.minimize(judge, self.discriminator.trainable_variables, self.d_optimizer)
            fooled = self.minimize(fool, self.model.trainable_variables, self.optimizer)
            return {"loss": fooled, "discriminator": judged}

    generator = sequential(layers.Dense(8, "tanh"), layers.Dense(6), shape=(3,))
    trainer = counted(GAN)(generator, keras.optimizers.Adam(0.01), binary)
    trainer.discriminator = dense(8, 1)
    trainer.d_optimizer = keras.optimizers.RMSprop(0.01)
    return Case(trainer, (X, NOISE), (trainer.discriminator, trainer.d_optimizer))


@row
def loss_terms() -> Case:
    def loss(y: Any, logits: Any) -> dict[str, Any]:
        main, size = cross_entropy(y, logits), ops.mean(ops.square(logits))
        return {"loss": main + 0.1 * size, "main": main, "size": size}

    model, optimizer = dense(8, 3), keras.optimizers.Adam(0.01)

    def plain(loop: Any, x: Any, y: Any) -> Any:
        terms: dict[str, Any] = {}

        def forward() -> Any:
            terms.update(loss(y, model(x)))
            return terms["loss"]

        return loop.minimize(forward, model.trainable_variables, optimizer)

    trainer = counted(ClassifierTrainer)(model, optimizer, loss)
    return Case(trainer, (X, LABELS), (), plain)


@row
def batch_norm() -> Case:
    model = sequential(layers.Dense(8), layers.BatchNormalization(), layers.Dense(3))
    # Adam would blow up the rounding in which a plain loop without a graph differs.
    return classifies(model, optimizer=keras.optimizers.SGD(0.1))


@row
def dropout() -> Case:
    model = sequential(layers.Dense(16, "tanh"), layers.Dropout(0.4, seed=3), layers.Dense(3))
    return classifies(model, deterministic=False)


@row
def recurrent_layer() -> Case:
    # Four steps of three features each.
    model = sequential(layers.Reshape((2, 3)), layers.LSTM(4), layers.Dense(3))
    return classifies(model)


# Rows with an embedding train by SGD: on TensorFlow its gradient is sparse, and of a token that
# occurs twice in a batch Keras' Adam squares the two parts, elsewhere their sum.


@row
def attention() -> Case:
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(12, 8)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
    model = keras.Model(tokens, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    return classifies(model, TOKENS, optimizer=keras.optimizers.SGD(0.1))


@row
def embedding() -> Case:
    model = sequential(
        layers.Embedding(12, 4, mask_zero=True),
        layers.GlobalAveragePooling1D(),
        layers.Dense(3),
        shape=(5,),
        dtype="int32",
    )
    return classifies(model, TOKENS, optimizer=keras.optimizers.SGD(0.1))


@row
def ema_target_network() -> Case:
    class Momentum(BaseTrainer):
        def train_step(self, x: Any, noise: Any) -> Any:
            target = self.target(x + 0.1 * ops.mean(noise), training=False)
            loss = self.minimize(
                lambda: mean_squared(target, self.model(x)) + 0.1 * ops.mean(self.model(x)),
                self.model.trainable_variables,
                self.optimizer,
            )
            for slow, fast in zip(self.target.variables, self.model.variables, strict=True):
                slow.assign(0.9 * slow + 0.1 * fast)
            return loss

    trainer = counted(Momentum)(dense(8, 3), keras.optimizers.Adam(0.02), mean_squared)
    trainer.target = dense(8, 3)
    return Case(trainer, (X, NOISE), (trainer.target,))


@row
def gradient_penalty() -> Case:
    class Penalised(BaseTrainer):
        value_and_grad = staticmethod(core.value_and_grad)

        def train_step(self, x: Any, y: Any) -> Any:
            def forward() -> Any:
                # The gradient by the inputs is that by something added to them.
                _, (slope,) = self.value_and_grad(
                    lambda: ops.sum(self.model(x + self.shift)), [self.shift]
                )
                norm = ops.sqrt(ops.sum(slope**2, axis=-1) + 1e-6)
                return mean_squared(y, self.model(x)) + ops.mean((norm - 1.0) ** 2)

            return self.minimize(forward, self.model.trainable_variables, self.optimizer)

    trainer = counted(Penalised)(dense(8, 2), keras.optimizers.SGD(0.02), mean_squared)
    trainer.shift = keras.Variable(np.zeros((16, 6), "float32"))
    return Case(trainer, (X, TARGETS), (trainer.shift,))


@row
def gradients_by_inputs() -> Case:
    class Penalised(BaseTrainer):
        value_and_grad = staticmethod(core.value_and_grad)

        def train_step(self, x: Any, y: Any) -> Any:
            def forward() -> Any:
                _, (slope,) = self.value_and_grad(lambda x: ops.sum(self.model(x)), [], inputs=[x])
                norm = ops.sqrt(ops.sum(slope**2, axis=-1) + 1e-6)
                return mean_squared(y, self.model(x)) + ops.mean((norm - 1.0) ** 2)

            return self.minimize(forward, self.model.trainable_variables, self.optimizer)

    trainer = counted(Penalised)(dense(8, 2), keras.optimizers.SGD(0.02), mean_squared)
    return Case(trainer, (X, TARGETS), ())


@row
def joint_gradients() -> Case:
    class Joint(BaseTrainer):
        def train_step(self, x: Any, noise: Any) -> Any:
            def losses() -> Any:
                made = self.model(noise, training=True)
                good, bad = self.other(x, training=True), self.other(made, training=True)
                judged = binary(ops.ones_like(good), good) + binary(ops.zeros_like(bad), bad)
                return {"loss": binary(ops.ones_like(bad), bad), "judged": judged}

            groups = {
                "loss": (self.model.trainable_variables, self.optimizer),
                "judged": (self.other.trainable_variables, self.other_optimizer),
            }
            return self.minimize_together(losses, groups)

    generator = sequential(layers.Dense(8, "tanh"), layers.Dense(6), shape=(3,))
    trainer = counted(Joint)(generator, keras.optimizers.SGD(0.1))
    trainer.other = dense(8, 1)
    trainer.other_optimizer = keras.optimizers.Adam(0.01)
    return Case(trainer, (X, NOISE), (trainer.other, trainer.other_optimizer))


@row
def inputs_in_a_dict() -> Case:
    inputs = {
        "features": keras.Input((6,), name="features"),
        "tokens": keras.Input((5,), dtype="int32", name="tokens"),
    }
    pooled = layers.GlobalAveragePooling1D()(layers.Embedding(12, 4)(inputs["tokens"]))
    joined = layers.Concatenate()([layers.Dense(4, "tanh")(inputs["features"]), pooled])
    model = keras.Model(inputs, layers.Dense(3)(joined))
    sgd = keras.optimizers.SGD(0.1)
    return classifies(model, {"features": X, "tokens": TOKENS}, optimizer=sgd)


@row
def nested_function() -> Case:
    class Nested(BaseTrainer):
        def train_step(self, x: Any, y: Any) -> Any:
            self.prepare(x)
            return self.minimize(
                lambda: cross_entropy(y, self.model(self.prepare(x))),
                self.model.trainable_variables,
                self.optimizer,
            )

    offset = keras.Variable(0.0, trainable=False)

    def prepare(x: Any) -> Any:
        offset.assign_add(0.1)
        return x + offset

    trainer = counted(Nested)(dense(8, 3), keras.optimizers.Adam(0.01), cross_entropy)
    trainer.prepare = core.function(prepare)

    def plain(loop: Any, x: Any, y: Any) -> Any:
        offset.assign_add(0.2)
        model = trainer.model
        return loop.minimize(
            lambda: cross_entropy(y, model(x + offset)),
            model.trainable_variables,
            trainer.optimizer,
        )

    return Case(trainer, (X, LABELS), (offset,), plain)


class Noisy(layers.Layer):
    """Multiplies by noise of its own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(4)

    def call(self, x: Any) -> Any:
        return x * keras.random.uniform(ops.shape(x), 0.5, 1.5, seed=self.seed_generator)


@row
def layer_with_a_seed_generator() -> Case:
    return classifies(sequential(layers.Dense(8), Noisy(), layers.Dense(3)), deterministic=False)


class Share(keras.metrics.Metric):
    """The share of right predictions so far."""

    def __init__(self) -> None:
        super().__init__()
        self.right = self.add_variable((), "zeros")
        self.count = self.add_variable((), "zeros")

    def update_state(self, y: Any, logits: Any) -> None:
        right = ops.equal(y, ops.cast(ops.argmax(logits, axis=-1), "int32"))
        self.right.assign_add(ops.sum(ops.cast(right, "float32")))
        self.count.assign_add(ops.cast(ops.size(y), "float32"))

    def result(self) -> Any:
        return self.right / self.count


@row
def metric_in_the_step() -> Case:
    class Measured(BaseTrainer):
        def train_step(self, x: Any, y: Any) -> Any:
            def forward() -> Any:
                logits = self.model(x)
                self.accuracy.update_state(y, logits)
                return cross_entropy(y, logits)

            loss = self.minimize(forward, self.model.trainable_variables, self.optimizer)
            # Where the metric was not updated, this is no number.
            return (
                loss + 0.0 / ops.cast(self.accuracy.count > 0, "float32") + self.accuracy.result()
            )

    trainer = counted(Measured)(dense(8, 3), keras.optimizers.Adam(0.01), cross_entropy)
    trainer.accuracy = Share()
    return Case(trainer, (X, LABELS), (trainer.accuracy,))


@row
def variable_only_read() -> Case:
    class Weighted(BaseTrainer):
        def forward_with_grads(self, x: Any, y: Any) -> Any:
            return y, self.model(x, training=True) * self.scale

    model, optimizer = dense(8, 3), keras.optimizers.Adam(0.01)
    trainer = counted(Weighted)(model, optimizer, cross_entropy)
    trainer.scale = keras.Variable([0.5, 1.0, 2.0], trainable=False)

    def plain(loop: Any, x: Any, y: Any) -> Any:
        return loop.minimize(
            lambda: cross_entropy(y, model(x) * trainer.scale), model.trainable_variables, optimizer
        )

    return Case(trainer, (X, LABELS), (trainer.scale,), plain)


@row
def shared_parameter() -> Case:
    class Both(BaseTrainer):
        def train_step(self, x: Any, labels: Any, targets: Any) -> Any:
            first = self.minimize(
                lambda: cross_entropy(labels, self.model(x)),
                self.model.trainable_variables,
                self.optimizer,
            )
            second = self.minimize(
                lambda: mean_squared(targets, self.other(x)),
                self.other.trainable_variables,
                self.other_optimizer,
            )
            return {"loss": first, "second": second}

    inputs = keras.Input((6,))
    features = layers.Dense(8, "tanh")(inputs)
    trainer = counted(Both)(
        keras.Model(inputs, layers.Dense(3)(features)), keras.optimizers.Adam(0.01), cross_entropy
    )
    trainer.other = keras.Model(inputs, layers.Dense(2)(features))
    trainer.other_optimizer = keras.optimizers.SGD(0.05)
    return Case(trainer, (X, LABELS, TARGETS), (trainer.other, trainer.other_optimizer))


@row
def losses_of_layers() -> Case:
    class Sparse(layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(0.01 * ops.mean(ops.abs(x)))
            return x

    return classifies(
        sequential(
            layers.Dense(8, "tanh", kernel_regularizer="l2", activity_regularizer="l1"),
            Sparse(),
            layers.Dense(3),
        )
    )


@row
def clipping() -> Case:
    case = classifies(dense(8, 3))
    case.trainer.optimizer.global_clipnorm = 0.1
    return case


@row
def bfloat16() -> Case:
    return _mixed("mixed_bfloat16")


@row
def float16() -> Case:
    return _mixed("mixed_float16")


def _mixed(policy: str) -> Case:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = sequential(layers.Dense(8, "tanh"), layers.Dense(3, dtype="float32"))
    finally:
        keras.config.set_dtype_policy(before)
    # Compilers may keep more bits between operations than the type has.
    return classifies(model, deterministic=False, rtol=1e-2)


# ---------------------------------------------------------------------- the loops by hand


def plain_losses(case: Case) -> list[float]:
    """The losses of the steps, as a hand-written loop of this backend computes them."""
    return LOOPS[keras.backend.backend()](case)


def tensorflow_loop(case: Case) -> list[float]:
    import tensorflow as tf

    class Loop:
        def value_and_grad(self, fn: Any, variables: Any, inputs: Any = ()) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                value = fn(*inputs)
            by = [*(variable.value for variable in variables), *inputs]
            return value, tape.gradient(value, by)

        def minimize_together(self, fn: Any, groups: Any) -> Any:
            with tf.GradientTape(persistent=True) as tape:
                losses = fn()
            found = {
                name: tape.gradient(losses[name], [v.value for v in variables])
                for name, (variables, _) in groups.items()
            }
            for name, (variables, optimizer) in groups.items():
                optimizer.apply(found[name], variables)
            return losses

        def minimize(self, fn: Any, variables: Any, optimizer: Any) -> Any:
            value, gradients = self.value_and_grad(lambda: optimizer.scale_loss(fn()), variables)
            optimizer.apply(gradients, variables)
            return value / optimizer.scale_loss(1.0)

    return _all_steps(case, Loop(), tf.convert_to_tensor)


def torch_loop(case: Case) -> list[float]:
    import torch

    class Loop:
        def value_and_grad(self, fn: Any, variables: Any, inputs: Any = ()) -> Any:
            leaves = [x.detach().requires_grad_() for x in inputs]
            value = fn(*leaves)
            tensors = [*(variable.value for variable in variables), *leaves]
            return value, torch.autograd.grad(value, tensors, create_graph=True)

        def minimize_together(self, fn: Any, groups: Any) -> Any:
            losses = fn()
            found = {
                name: torch.autograd.grad(
                    losses[name], [v.value for v in variables], retain_graph=True
                )
                for name, (variables, _) in groups.items()
            }
            with torch.no_grad():
                for name, (variables, optimizer) in groups.items():
                    optimizer.apply(found[name], variables)
            return losses

        def minimize(self, fn: Any, variables: Any, optimizer: Any) -> Any:
            value = fn()
            scaled = optimizer.scale_loss(value)
            gradients = torch.autograd.grad(scaled, [v.value for v in variables])
            with torch.no_grad():
                optimizer.apply(gradients, variables)
            return value

    return _all_steps(case, Loop(), torch.as_tensor)


def jax_gradients(variables: list[keras.Variable]) -> Any:
    """What a plain loop on JAX answers to, given all variables of the step."""
    import jax

    class Loop:
        """Inside a scope that holds the value of each variable."""

        def value_and_grad(self, fn: Any, by: Any, inputs: Any = ()) -> Any:
            if inputs:
                value, gradients = jax.value_and_grad(lambda inputs: fn(*inputs))(list(inputs))
                return value, gradients
            (_, (value, _)), gradients = self._grad(fn, by)
            return value, gradients

        def minimize(self, fn: Any, by: Any, optimizer: Any) -> Any:
            (_, (value, new)), gradients = self._grad(fn, by, optimizer.scale_loss)
            for variable, changed in zip(variables, new, strict=True):
                variable.assign(changed)
            self._apply(by, gradients, optimizer)
            return value

        def minimize_together(self, fn: Any, groups: Any) -> Any:
            found = {
                name: self._grad(lambda name=name: fn()[name], by)[1]
                for name, (by, _) in groups.items()
            }
            losses = fn()
            for name, (by, optimizer) in groups.items():
                self._apply(by, found[name], optimizer)
            return losses

        def _apply(self, by: Any, gradients: Any, optimizer: Any) -> None:
            weights, state = optimizer.stateless_apply(
                [v.value for v in optimizer.variables], gradients, [v.value for v in by]
            )
            for variable, changed in zip(
                [*by, *optimizer.variables], [*weights, *state], strict=True
            ):
                variable.assign(changed)

        def _grad(self, fn: Any, by: Any, scale: Any = lambda value: value) -> Any:
            def pure(values: Any) -> Any:
                now = {id(v): (v, v.value) for v in variables}
                now |= {id(v): (v, value) for v, value in zip(by, values, strict=True)}
                with keras.StatelessScope(
                    state_mapping=list(now.values()), collect_losses=True
                ) as scope:
                    value = fn()
                return scale(value), (value, [scope.get_current_value(v) for v in variables])

            return jax.value_and_grad(pure, has_aux=True)([v.value for v in by])

    return Loop()


def jax_loop(case: Case) -> list[float]:
    import jax

    variables = case.variables
    if not all(getattr(holder, "built", True) for holder in case.holders):
        raise RuntimeError("JAX has to have all variables before the first step.")

    loop = jax_gradients(variables)

    @jax.jit
    def step(values: Any, batch: Any) -> Any:
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            loss = _plain_step(case, loop, batch)
        return loss, [scope.get_current_value(v) for v in variables]

    values, losses = [v.value for v in variables], []
    for batch in case.batches:
        loss, values = step(values, batch)
        losses.append(float(loss))
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return losses


LOOPS = {"tensorflow": tensorflow_loop, "jax": jax_loop, "torch": torch_loop}


def _all_steps(case: Case, loop: Any, tensor: Callable[[Any], Any]) -> list[float]:
    losses = []
    for batch in case.batches:
        loss = _plain_step(case, loop, keras.tree.map_structure(tensor, batch))
        losses.append(float(ops.convert_to_numpy(loss)))
    return losses


def _plain_step(case: Case, loop: Any, batch: Any) -> Any:
    """The loss of one step; `loop` answers to what the trainer has beyond it."""
    for name, value in vars(case.trainer).items():
        if not hasattr(loop, name) and name != "train_step":
            setattr(loop, name, value)
    result = case.plain(loop, *batch)
    return result["loss"] if isinstance(result, dict) else result


def build(name: str) -> Case:
    """The row `name`, ready to be run by us or by a plain loop."""
    keras.utils.set_random_seed(2)
    case = ROWS[name]()
    # What trains what is known only to the step: plain loops build an optimizer where it is made.
    trained = {
        "two_optimizers": [("d_optimizer", "discriminator")],
        "shared_parameter": [("other_optimizer", "other")],
        "joint_gradients": [("other_optimizer", "other")],
    }
    pairs = [("optimizer", "model"), *trained.get(name, [])]
    for optimizer, model in pairs:
        getattr(case.trainer, optimizer).build(getattr(case.trainer, model).trainable_variables)
    return case.start()


if __name__ == "__main__":
    recorded = {}
    for name in ROWS:
        case = build(name)
        if case.deterministic:
            recorded[name] = [round(loss, 7) for loss in plain_losses(case)]
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in recorded.items())
    RECORDED.write_text(f"{{\n{rows}\n}}\n")
