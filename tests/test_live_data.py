"""Data that the run makes itself, runs without data, and loops of one's own."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from recorder import Recorder

import polus
from polus.callbacks import ConsoleLogCallback, EarlyStop
from polus.checkpoint import Checkpoint
from polus.training import BaseTrainer

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")


class Killed(Exception):
    pass


def kill_at(epoch, step):
    def then(name, *place):
        if (name, *place[:2]) == ("step_end", epoch, step):
            raise Killed

    return Recorder(then)


class Follow(BaseTrainer):
    """Follows a target; reports the epoch and the length of the run that the step sees."""

    def train_step(self, x):
        def loss():
            return ops.mean((self.model(x, training=True) - 1) ** 2)

        return {
            "loss": self.minimize(loss, self.trainable_weights),
            "epoch_seen": ops.cast(self.epoch.value, "float32"),
            "total": ops.cast(self.total_steps.value, "float32"),
            "x": x,
        }


def follow():
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    return Follow(model, keras.optimizers.Adam(0.01))


def values(variables):
    return [ops.convert_to_numpy(variable) for variable in variables]


class Player:
    """Makes a batch of the model's own answer, and of a state of its own."""

    def __init__(self):
        self.number = 0
        self.seen = []

    def __call__(self, trainer):
        self.seen.append(int(ops.convert_to_numpy(trainer.step_counter)))
        self.number += 1
        answer = ops.convert_to_numpy(trainer.model(X[:4]))
        return (answer + self.number + np.random.normal(size=(4, 4))).astype("float32")

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


# ---------------------------------------------------------------------- inside a step


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_step_knows_its_epoch_and_the_length_of_the_run(at_once):
    trainer, seen = follow(), Recorder(every_steps=None)
    history = trainer.train([X[:8], X[8:16], X[16:24]], 2, [seen], steps_per_execution=at_once)
    assert history.steps["epoch_seen"].tolist() == [0, 0, 0, 1, 1, 1]
    assert history.steps["total"].tolist() == [6] * 6
    assert "x" not in history.steps
    last = seen.coordinator.run.step_arrays["x"]  # of the newest step
    np.testing.assert_array_equal(ops.convert_to_numpy(last), X[16:24])
    history = trainer.train(lambda: iter([X, X]), 2, steps_per_execution=at_once)  # no length
    assert history.steps["total"].tolist() == [0, 0, 4, 4]

    class Own(Follow):
        epoch = 3  # a name for something else

        def train_step(self, x):
            return {"x": ops.mean(x) + self.epoch}

    assert Own(trainer.model, trainer.optimizer).train([X], 1).steps["x"][0] > 2


# ---------------------------------------------------------------------- live data


def test_live_data_are_made_by_the_weights_of_all_steps_before(tmp_path):
    trainer, player = follow(), Player()
    history = trainer.train(polus.data.live(player), 2, [ConsoleLogCallback()], steps=4)
    assert player.seen[-8:] == list(range(8))
    expected = history.steps["loss"]

    # The same as a loop by hand.
    trainer, player = follow(), Player()
    losses = [
        float(ops.convert_to_numpy(trainer.train_step(player(trainer))["loss"])) for _ in range(8)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)

    # Killed in the middle, and continued in another process.
    callbacks = [kill_at(0, 2), Checkpoint(tmp_path, every_steps=1)]
    with pytest.raises(Killed):
        follow().train(polus.data.live(Player()), 2, callbacks, steps=4, resume=tmp_path)
    trainer, player = follow(), Player()
    np.random.seed(77)
    history = trainer.train(
        polus.data.live(player), 2, [Checkpoint(tmp_path)], steps=4, resume=tmp_path
    )
    np.testing.assert_array_equal(history.steps["loss"], expected)


def test_live_data_that_are_wrong_raise():
    with pytest.raises(TypeError, match="live takes a function"):
        polus.data.live([X])
    with pytest.raises(ValueError, match="endless"):
        follow().train(polus.data.live(lambda trainer: X), 1)
    with pytest.raises(ValueError, match="steps_per_execution can't be 4"):
        follow().train(polus.data.live(lambda trainer: X), 1, steps=4, steps_per_execution=4)
    with pytest.raises(TypeError, match="yielded None"):
        follow().train(polus.data.live(lambda trainer: None), 1, steps=4)


def test_nothing_is_read_ahead_without_prefetch():
    trainer, seen = follow(), []

    def batches():
        for _ in range(6):
            seen.append(int(ops.convert_to_numpy(trainer.step_counter)))
            yield X

    trainer.train(batches, 1, prefetch=0)
    assert seen == list(range(6))
    with pytest.raises(ValueError, match="prefetch must be an integer of at least 0, got -1"):
        trainer.train(batches, 1, prefetch=-1)


class Dream(BaseTrainer):
    """Moves an image of its own: a program without data."""

    def train_step(self):
        image = self.model.trainable_weights
        return {"loss": self.minimize(lambda: ops.mean(self.model(np.eye(4)) ** 2), image)}


@pytest.mark.parametrize("at_once", [1, 5])
def test_a_run_without_data(at_once):
    trainer = Dream(follow().model, keras.optimizers.SGD(0.1))
    history = trainer.train(None, 2, steps=5, steps_per_execution=at_once)
    assert len(history.steps["loss"]) == 10
    assert history.steps["loss"][-1] < history.steps["loss"][0]
    assert len(trainer.train(None, steps=3).steps["loss"]) == 3
    with pytest.raises(ValueError, match="A run without data needs steps"):
        trainer.train(None, 2)


# ---------------------------------------------------------------------- a loop of one's own


def ppo(trainer, callbacks=(), **arguments):
    """Batches of the model's answers, each trained on twice, with an epoch for each pair."""
    player = Player()
    with trainer.session([*callbacks], **arguments) as run:
        player.number = run.epoch
        while run.epoch < 3:
            batch = player(trainer)
            for _ in range(2 - run.num_steps):
                run.step(batch)
            run.end_epoch(reward=float(run.epoch))
    return run


def test_a_session_is_a_run(tmp_path, capsys):
    trainer, seen = follow(), Recorder()
    callbacks = [seen, ConsoleLogCallback(), EarlyStop("reward", patience=9), Watch()]
    run = ppo(trainer, callbacks)

    other, player, losses = follow(), Player(), []
    for _ in range(3):
        batch = player(other)
        losses += [float(ops.convert_to_numpy(other.train_step(batch)["loss"])) for _ in range(2)]
    np.testing.assert_allclose(run.history.steps["loss"], losses, rtol=1e-5)
    assert [row["reward"] for row in run.history.epochs] == [0, 1, 2]
    assert run.history.epochs[1]["loss"] == pytest.approx(np.mean(losses[2:4]), rel=1e-5)
    assert seen.steps == [(epoch, step) for epoch in range(3) for step in range(2)]
    assert seen.names[-2:] == ["epoch_end", "train_end"]
    assert "epoch 3  reward 2  loss" in capsys.readouterr().out


class Watch(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        assert logs["reward"] == epoch


def test_a_session_resumes(tmp_path):
    expected = ppo(follow()).history.steps["loss"]
    with pytest.raises(Killed):
        ppo(follow(), [kill_at(1, 0), Checkpoint(tmp_path, every_steps=1)], resume=tmp_path)
    np.random.seed(77)
    run = ppo(follow(), [Checkpoint(tmp_path)], resume=tmp_path)
    assert run.epoch == 3
    np.testing.assert_array_equal(run.history.steps["loss"][:2], expected[:2])
    assert len(run.history.steps["loss"]) == 6


def test_a_session_that_was_stopped_stays_so(tmp_path, caplog):
    for _ in range(2):
        with follow().session([Checkpoint(tmp_path)], resume=tmp_path) as run:
            while True:
                run.step(X)
                run.stop("kl")
        assert len(run.history.steps["loss"]) == 1
    assert "stopped early in epoch 1 (kl), so nothing is left to train. Its session" in caplog.text


def test_a_session_ends_in_order_where_it_is_stopped(caplog):
    trainer, seen, steps = follow(), Recorder(), 0
    with trainer.session([seen]) as run:
        for _ in range(100):
            run.step(X)
            steps += 1
            if steps == 3:
                run.stop("kl")
    assert (steps, run.stop_reason) == (3, "kl")
    assert "stopped after 1 epoch: kl." in caplog.text
    assert seen.names[-2:] == ["epoch_end", "train_end"]
    assert len(run.history.epochs) == 1
    with trainer.session() as run, pytest.raises(ValueError, match="no step to end"):
        run.end_epoch()

    with pytest.raises(Killed), trainer.session([seen, kill_at(0, 0)]) as run:
        run.step(X)
    assert seen.names[-1] == "train_end"
    assert seen.names.count("epoch_end") == 1  # of the first one only


def test_no_step_follows_the_end_of_a_session():
    trainer = follow()
    with trainer.session() as run:
        run.step(X)
    before = ops.convert_to_numpy(trainer.model.weights[0]).copy()
    with pytest.raises(RuntimeError, match=r"ended with its `with` block\. Open another"):
        run.step(X)
    np.testing.assert_array_equal(ops.convert_to_numpy(trainer.model.weights[0]), before)


class Looking(BaseTrainer):
    def train_step(self, x):
        loss = self.minimize(lambda: ops.mean(self.model(x) ** 2), self.trainable_weights)
        self.seen.append(float(ops.convert_to_numpy(loss)))
        return {"loss": loss}


def test_the_steps_of_a_session_run_eagerly():
    trainer = Looking(follow().model, keras.optimizers.SGD(0.1))
    trainer.seen = []
    with trainer.session(run_eagerly=True) as run:
        for _ in range(3):
            run.step(X)
    np.testing.assert_allclose(trainer.seen[1:], run.history.steps["loss"], rtol=1e-6)
