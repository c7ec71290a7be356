"""Programs beyond `fit`: each equals a loop by hand, and itself after a kill in the middle.

A row builds a `Case` of tests/conformance.py, whose plain loop runs `NUM_EPOCHS` times over the
same batches, and says how the trainer runs: `train` over the batches, unless it is named `drive`.
"""

import keras
import numpy as np
import pytest
from conformance import (
    LABELS,
    Case,
    X,
    build,
    counted,
    cross_entropy,
    dense,
    mean_squared,
    plain_losses,
    sequential,
)
from keras import layers, ops
from recorder import Recorder

import polus
from polus.checkpoint import Checkpoint

NUM_EPOCHS, NUM_STEPS = 2, 4


class Killed(Exception):
    pass


def train(case, callbacks=(), **arguments):
    """Runs a trainer over the batches of a case."""
    data = case.batches[:NUM_STEPS]
    settings = {"callbacks": list(callbacks), "steps_per_execution": 1} | arguments
    return case.trainer.train(data, NUM_EPOCHS, **settings)


ROWS = {
    "gradients_by_inputs": (lambda: build("gradients_by_inputs"), train),
    "joint_gradients": (lambda: build("joint_gradients"), train),
    "two_optimizers": (lambda: build("two_optimizers"), train),
}


def row(drive=train):
    def add(make):
        def built():
            keras.utils.set_random_seed(2)
            case = make()
            case.trainer.optimizer.build(case.trainer.model.trainable_variables)
            return case.start()

        ROWS[make.__name__] = built, drive
        return make

    return add


@row()
def average():
    """A mean teacher: the step's target is the average's answer."""

    class Teacher(polus.BaseTrainer):
        def train_step(self, x):
            target = self.average(x, training=False)
            loss = self.minimize(
                lambda: mean_squared(target + 1, self.model(x)), self.trainable_weights
            )
            self.average.update()
            return loss

    model, copied = dense(8, 3), dense(8, 3)
    trainer = Teacher(model, keras.optimizers.SGD(0.05))
    trainer.average = polus.Average(model, 0.8, copied)
    count = trainer.average.count

    def plain(loop, x):
        target = copied(x)
        weights = model.trainable_variables
        loss = loop.minimize(lambda: mean_squared(target + 1, model(x)), weights, trainer.optimizer)
        keep = 0.8 * ops.cast(count.value > 0, "float32")  # the first time it is a copy
        for slow, fast in zip(copied.variables, model.variables, strict=True):
            slow.assign(keep * slow.value + (1 - keep) * fast.value)
        count.assign_add(1)
        return loss

    return Case(trainer, (X,), (copied, count), plain)


@row()
def dict_of_models():
    class Autoencoder(polus.BaseTrainer):
        def forward_with_grads(self, x):
            return x, self.model.decoder(self.model["encoder"](x, training=True), training=True)

    models = {"encoder": dense(8, 2), "decoder": sequential(layers.Dense(6), shape=(2,))}
    trainer = Autoencoder(models, keras.optimizers.Adam(0.01), mean_squared)

    def plain(loop, x):
        weights = [v for model in models.values() for v in model.trainable_variables]
        return loop.minimize(
            lambda: mean_squared(x, models["decoder"](models["encoder"](x))),
            weights,
            trainer.optimizer,
        )

    return Case(trainer, (X,), (), plain)


def moved_case():
    """Examples that are moved by what the model answers: it makes its data."""
    model, optimizer = dense(8, 3), keras.optimizers.Adam(0.02)

    def plain(loop, x, y):
        moved = x + ops.stop_gradient(ops.mean(model(x)))
        return loop.minimize(
            lambda: cross_entropy(y, model(moved)), model.trainable_variables, optimizer
        )

    trainer = counted(polus.ClassifierTrainer)(model, optimizer, cross_entropy)
    return Case(trainer, (X, LABELS), (), plain)


def moved(case, step):
    x, y = case.batches[step]
    return x + ops.convert_to_numpy(ops.mean(case.trainer.model(x))), y


def train_live(case, callbacks=(), **arguments):
    def make_batch(trainer):
        return moved(case, int(ops.convert_to_numpy(trainer.step_counter)))

    live = polus.data.live(make_batch)
    return case.trainer.train(live, NUM_EPOCHS, list(callbacks), steps=NUM_STEPS, **arguments)


def train_in_session(case, callbacks=(), **arguments):
    with case.trainer.session(list(callbacks), **arguments) as run:
        while run.epoch < NUM_EPOCHS:
            for step in range(run.num_steps, NUM_STEPS):
                run.step(*moved(case, run.epoch * NUM_STEPS + step))
            run.end_epoch()
    return run.history


@row(train_live)
def live_data():
    return moved_case()


@row(train_in_session)
def session():
    return moved_case()


def train_in_phases(case, callbacks=(), **arguments):
    case.trainer.model.get_layer("block").trainable = False
    return train(case, [polus.Unfreeze({1: "block"}), *callbacks], **arguments)


@row(train_in_phases)
def thawing():
    model = sequential(layers.Dense(8, "tanh", name="block"), layers.Dense(3))
    optimizer = keras.optimizers.SGD(0.1)  # without slots, thawing is to begin to move
    trainer = counted(polus.ClassifierTrainer)(model, optimizer, cross_entropy)
    thawed = keras.Variable(0.0, trainable=False)
    done = keras.Variable(0, dtype="int32", trainable=False)

    def plain(loop, x, y):
        block = model.get_layer("block").trainable_variables
        before = [ops.copy(variable.value) for variable in block]
        loss = loop.minimize(
            lambda: cross_entropy(y, model(x)), model.trainable_variables, optimizer
        )
        thawed.assign(ops.cast(done.value >= NUM_STEPS, "float32"))
        for variable, value in zip(block, before, strict=True):
            variable.assign(thawed.value * variable.value + (1 - thawed.value) * value)
        done.assign_add(1)
        return loss

    return Case(trainer, (X, LABELS), (thawed, done), plain)


def values(case):
    known = {id(variable) for variable in case.trainer.model.variables}
    return [ops.convert_to_numpy(v) for v in case.variables if id(v) in known]


@pytest.mark.parametrize("name", ROWS)
def test_a_program_equals_its_loop_by_hand_and_resumes_exactly(tmp_path, name):
    make, drive = ROWS[name]
    cases = [make() for _ in range(4)]
    for case in cases:
        case.batches = case.batches[:NUM_STEPS] * NUM_EPOCHS
    plain, whole, killed, resumed = cases

    expected = plain_losses(plain)
    losses = drive(whole).steps["loss"]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for own, other in zip(values(whole), values(plain), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-5)

    def kill(event, *place):
        if (event, *place[:2]) == ("step_end", 1, 1):
            raise Killed

    with pytest.raises(Killed):
        drive(killed, [Recorder(kill), Checkpoint(tmp_path, every_steps=1)], resume=tmp_path)
    keras.utils.set_random_seed(77)
    history = drive(resumed, [Checkpoint(tmp_path)], resume=tmp_path)
    np.testing.assert_array_equal(history.steps["loss"], losses)
    for own, other in zip(values(resumed), values(whole), strict=True):
        np.testing.assert_array_equal(own, other)
