"""Rehearsals: a dry run, a few batches to overfit, a summary, and sessions with all of `train`."""

import json
import logging

import keras
import numpy as np
import pytest

from polus.callbacks import Callback, SaveModelCallback, Unfreeze, ValidationDataCallback
from polus.checkpoint import Checkpoint
from polus.data import from_arrays, live
from polus.errors import NonFiniteError
from polus.runs import read_history
from polus.state import random_state
from polus.training import BaseTrainer, ClassifierTrainer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype("float32")
Y = RNG.integers(0, 2, 24).astype("int32")


def make_trainer(optimizer=None, **kwargs):
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(4, name="body"), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    optimizer = optimizer or keras.optimizers.Adam(0.1)
    return ClassifierTrainer(keras.Sequential(layers), optimizer, loss, metrics, **kwargs)


def data():
    return from_arrays((X, Y), 4, seed=0)


def validation(**arguments):
    return ValidationDataCallback(from_arrays((X, Y), 4, shuffle=False), **arguments)


def values(trainer):
    variables = [*trainer.model.variables, *trainer.optimizer.variables, trainer.step_counter]
    variables += [variable for metric in trainer.metrics for variable in metric.variables]
    return [keras.ops.convert_to_numpy(variable).copy() for variable in variables]


class Events(Callback):
    def __init__(self):
        super().__init__()
        self.heard = []

    def on_train_begin(self):
        self.heard.append("train_begin")

    def on_train_batch_end(self, epoch, step, loss):
        self.heard.append((epoch, step))

    def on_validation_end(self, results):
        self.heard.append(sorted(results))

    def on_epoch_end(self, epoch):
        self.heard.append("epoch_end")

    def on_train_end(self):
        self.heard.append("train_end")


def test_a_dry_run_leaves_no_trace(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    plain = make_trainer()
    plain.build_on((X[:4], Y[:4]))
    expected = plain.train(data(), 2, [validation()])
    trainer, dataset, events = make_trainer(), data(), Events()
    trainer.build_on((X[:4], Y[:4]))
    before, random = values(trainer), random_state()
    rates = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5)
    writers = [SaveModelCallback("end"), Checkpoint("a"), keras.callbacks.CSVLogger("log.csv")]
    callbacks = [events, rates, validation(every_epochs=2), *writers]
    rehearsed = trainer.train(dataset, 2, callbacks, dry_run=True)
    assert not list(tmp_path.iterdir())
    assert events.heard == [
        *("train_begin", (0, 0), (0, 1)),
        *(["accuracy", "loss"], "epoch_end", "train_end"),
    ]
    np.testing.assert_array_equal(rehearsed.steps["loss"][0], expected.steps["loss"][0])
    for old, new in zip(before, values(trainer), strict=True):
        np.testing.assert_array_equal(old, new)
    assert str(random_state()) == str(random)
    assert not hasattr(trainer, "early_stop") or not trainer.early_stop
    history = trainer.train(dataset, 2, [validation()])
    np.testing.assert_array_equal(history.steps["loss"], expected.steps["loss"])
    assert history.epochs == expected.epochs
    (said,) = [r.getMessage() for r in caplog.records if "Dry run" in r.getMessage()]
    assert "2 steps, and everything is as before" in said
    assert "batches: float32 [4, 3], int32 [4]" in said
    assert "val_accuracy" in said
    assert "callbacks: Events, LearningRateScheduler, ValidationDataCallback" in said
    assert "write files: SaveModelCallback, Checkpoint, CSVLogger" in said


def test_a_dry_run_of_a_run_directory_writes_nothing_and_undoes_phases(tmp_path):
    trainer = make_trainer()
    trainer.changing_train_config(run_dir=tmp_path / "a", epochs=3, tf_dataset=data())
    trainer.build_on((X[:4], Y[:4]))
    trainer.model.trainable = False
    trainer.model.get_layer("body").trainable = False
    optimizer = trainer.optimizer
    history = trainer.train(callbacks=[Unfreeze({0: "*"})], dry_run=True)
    assert len(history.steps["loss"]) == 2
    assert not list(tmp_path.iterdir())
    assert trainer.optimizer is optimizer
    assert not trainer.model.trainable_variables


def test_a_name_that_is_not_monitored_is_met():
    save = SaveModelCallback("best", "model.keras", monitor="val_acuracy")
    with pytest.raises(ValueError, match="no value named 'val_acuracy' to monitor"):
        make_trainer().train(data(), 5, [save], dry_run=True)


class Rows:
    """Makes batches between steps, and knows where it stands."""

    def __init__(self):
        self.made = 0

    def __call__(self, trainer):
        self.made += 1
        return X[:4] + self.made, Y[:4]

    def get_state(self):
        return {"made": self.made}

    def set_state(self, state):
        self.made = state["made"]


class NoData(BaseTrainer):
    def train_step(self):
        variable = self.model.trainable_weights[0]
        return self.minimize(lambda: keras.ops.sum(variable**2), [variable], self.optimizer)


def test_a_dry_run_of_live_data_and_without_data():
    trainer, rows = make_trainer(), Rows()
    history = trainer.train(live(rows), 3, steps=9, dry_run=True)
    assert (len(history.steps["loss"]), rows.made) == (2, 0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    before = model.get_weights()
    history = NoData(model, keras.optimizers.SGD(0.1)).train(steps=5, dry_run=True)
    assert len(history.steps["loss"]) == 2
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_an_error_in_a_dry_run_is_raised_and_leaves_no_trace():
    class Fails(Callback):
        def on_epoch_end(self, epoch):
            raise RuntimeError("a bug of the callback")

    trainer = make_trainer()
    trainer.build_on((X[:4], Y[:4]))
    before = values(trainer)
    with pytest.raises(RuntimeError, match="a bug of the callback"):
        trainer.train(data(), 3, [Fails()], dry_run=True)
    for old, new in zip(before, values(trainer), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.once
def test_what_cannot_be_rehearsed_raises():
    with pytest.raises(ValueError, match="is gone, and training would miss it"):
        make_trainer().train(iter([(X, Y)]), 1, dry_run=True)
    with pytest.raises(ValueError, match="dry_run must be True or False, got ''"):
        make_trainer().train(data(), 1, dry_run="")


class Batches:
    """Batches in another order in each epoch."""

    def __init__(self):
        self.epochs = 0

    def __len__(self):
        return 6

    def __iter__(self):
        self.epochs += 1
        order = np.random.default_rng(self.epochs).permutation(24)
        return ((X[rows], Y[rows]) for rows in np.split(order, 6))


@pytest.mark.parametrize(
    "make", [data, Batches, lambda: iter(Batches())], ids=["arrays", "own", "i"]
)
def test_overfitted_batches_are_those_of_a_list(make):
    batches = _first(data()) if make is data else list(Batches())[:2]
    history = make_trainer().train(make(), 3, overfit_batches=2)
    expected = make_trainer().train(batches, 3)
    np.testing.assert_array_equal(history.steps["loss"], expected.steps["loss"])
    assert len(history.steps["loss"]) == 6


def _first(dataset):
    """The first two batches of `from_arrays`, as a step sees them."""
    seen = []

    class Sees(BaseTrainer):
        def forward_with_grads(self, x, y):
            seen.append([keras.ops.convert_to_numpy(each) for each in (x, y)])
            return y, self.model(x)

    trainer = make_trainer()
    sees = Sees(trainer.model, trainer.optimizer, trainer.loss)
    sees.train(dataset, 1, steps=2, run_eagerly=True)
    return [tuple(batch) for batch in seen[-2:]]


@pytest.mark.once
def test_overfitting_leaves_the_later_epochs_of_a_loader_as_they_are():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    rows = list(zip(X, Y, strict=True))
    loader = torch.utils.data.DataLoader(rows, 4, shuffle=True, generator=generator)
    before = generator.get_state()
    make_trainer().train(loader, 1, overfit_batches=2)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.once
def test_overfitting_takes_a_dataset_and_a_count():
    with pytest.raises(ValueError, match="overfit_batches must be a positive integer, got 0"):
        make_trainer().train(data(), 1, overfit_batches=0)
    made = live(lambda trainer: (X, Y))
    with pytest.raises(ValueError, match="takes batches of a dataset"):
        make_trainer().train(made, 1, steps=2, overfit_batches=1)
    with pytest.raises(ValueError, match="found no batch"):
        make_trainer().train(lambda: iter(()), 1, overfit_batches=1)
    history = make_trainer().train(data(), 2, steps=1, overfit_batches=4)
    assert len(history.steps["loss"]) == 2


@pytest.mark.once
def test_arrays_as_in_fit_raise_with_what_to_write():
    with pytest.raises(TypeError, match=r"got an array.*from_arrays\(\(x, y\), batch_size=32\)"):
        make_trainer().train(X, Y)


def test_the_summary_says_what_is_trained(capsys):
    teacher = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="net")
    trainer = make_trainer()
    trainer.teacher = teacher
    trainer.summary()
    printed = capsys.readouterr().out
    assert "not built yet" in printed
    assert "known after a step" in printed
    trainer.trainable_weights = []
    trainer.build_on((X[:4], Y[:4]))
    trainer.trainable_weights = trainer.model.layers[-1].trainable_weights
    trainer.build_on((X[:4], Y[:4]))
    lines = []
    trainer.summary(lines.append)
    rows = {line.split()[0]: line for line in lines[0].splitlines()}
    assert "26 parameters), trained: 2 variables (10 parameters)" in rows[trainer.model.name]
    assert "8 parameters), trained: 0 variables" in rows["teacher"]
    assert "Adam(learning_rate=0.1)" in rows["optimizer"]
    assert "trains 2 variables (10 parameters)" in rows["optimizer"]
    assert "SparseCategoricalCrossentropy" in rows["loss"]
    assert "accuracy" in rows["metrics"]


def test_a_session_has_a_run_directory_and_continues(tmp_path):
    batches, began = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 24, 4)], []

    def loop(folder, epochs):
        with make_trainer().session(run_dir=folder) as run:
            began.append(run.epoch)
            while run.epoch < epochs:
                for batch in batches[run.num_steps :]:
                    run.step(*batch)
                run.end_epoch(reward=1.0)
        return run.history

    whole = loop(tmp_path / "whole", 2)
    loop(tmp_path / "a", 1)
    history = loop(tmp_path / "a", 2)
    assert began == [0, 0, 1]
    np.testing.assert_array_equal(history.steps["loss"], whole.steps["loss"])
    record = read_history(tmp_path / "a")
    np.testing.assert_array_equal(record.steps["loss"], whole.steps["loss"])
    facts = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (facts["status"], facts["epochs_done"]) == ("completed", 2)


@pytest.mark.parametrize("name", ["epoch", "loss", "accuracy"])
def test_a_value_of_a_session_named_like_one_of_its_steps_raises(name):
    with make_trainer().session() as run:
        run.step(X[:4], Y[:4])
        with pytest.raises(ValueError, match=f"end_epoch got '{name}'"):
            run.end_epoch(**{name: 1.0})
        assert run.end_epoch(reward=1.0)["reward"] == 1.0


def test_a_session_skips_or_raises_at_values_that_are_not_finite():
    bad = np.full((4, 3), np.nan, "float32")
    trainer = make_trainer()
    with trainer.session(on_nonfinite="skip", max_skips=2) as run:
        run.step(X[:4], Y[:4])
        before = trainer.model.get_weights()
        run.step(bad, Y[:4])
        run.end_epoch()
    for old, new in zip(before, trainer.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert run.history.record[0]["skipped_steps"] == 1
    for policy in ({}, {"on_nonfinite": "skip", "max_skips": 1}):
        with pytest.raises(NonFiniteError), trainer.session(**policy) as run:
            run.step(bad, Y[:4])
