"""What was measured of a step is measured once: in a process, and on a machine."""

import contextlib
import json
import math
import shutil
import stat

import keras
import numpy as np
import pytest

import polus.core
from polus.backends import backend
from polus.steps.autotune import Autotuner, Limits, RunLength, Timing, Timings, Tuning, Way
from polus.steps.compiled import CompiledStep
from polus.training import BaseTrainer, ClassifierTrainer

X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """The configurations that were timed; two compilers, of which the second one is faster."""
    asked = []

    def time(step, block):
        asked.append(step.jit_compile)
        return Timing(4e-3 if step.jit_compile else 5e-3, 0.01)

    monkeypatch.setattr(CompiledStep, "time", time)
    monkeypatch.setattr(backend, "candidates", lambda: (False, True))
    monkeypatch.setattr(backend, "ways", lambda convolutions: ((False, True), (True, True)))
    monkeypatch.setattr(backend, "LONG_RUN_SECS", {})
    monkeypatch.setattr(CompiledStep, "__call__", lambda step, block: pytest.fail("not run"))
    polus.core.set_tuning_cache(tmp_path / "tuning.json")
    return asked


def make_trainer(kind=ClassifierTrainer, units=4, rate=0.1):
    layers = keras.layers.Dense(units), keras.layers.Dropout(rate)
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return kind(model, keras.optimizers.SGD(rate), loss)


def choose(trainer, x=X, y=Y, steps=10_000):
    """Chooses how to run a step, and runs none: what is timed here is not compiled."""
    from polus.data import DataReader
    from polus.data.adapters import as_adapter

    executor = trainer._engine.executor
    data = DataReader(as_adapter([(x, y)] * 3)).epoch(0)
    executor.example = data.example
    executor.prepare(data.example)
    executor.tuned(data, 64, steps_per_execution=None, length=RunLength(steps))
    return executor.tuning.jit_compile


class Written(ClassifierTrainer):
    def train_step(self, x, y):
        return super().train_step(x, y)


def test_a_second_trainer_of_the_same_kind_measures_nothing(timed):
    assert choose(make_trainer()) is True
    assert timed == [False, True]
    assert choose(make_trainer(rate=0.3)) is True  # rates don't change how long a step takes
    assert timed == [False, True]


class Mine(BaseTrainer):
    def train_step(self, x, y):
        return self.minimize(lambda: keras.ops.mean(self.model(x)), self.trainable_weights)


OTHERS = {
    "layers": lambda: choose(make_trainer(units=5)),
    "trainer": lambda: choose(make_trainer(Mine)),
    "code": lambda: choose(make_trainer(Written)),
    "batches": lambda: choose(make_trainer(), X[:16], Y[:16]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_kind_is_measured(timed, what):
    choose(make_trainer())
    OTHERS[what]()
    assert timed == [False, True] * 2


def test_another_process_reads_the_file(timed, tmp_path):
    choose(make_trainer())
    shutil.copy(tmp_path / "tuning.json", tmp_path / "of_another_process.json")
    polus.core.set_tuning_cache(tmp_path / "of_another_process.json")
    assert choose(make_trainer()) is True
    assert timed == [False, True]
    assert json.loads((tmp_path / "tuning.json").read_text())["version"] == 1


def test_without_a_cache_each_trainer_measures(timed, tmp_path):
    polus.core.set_tuning_cache(None)
    choose(make_trainer())
    choose(make_trainer())
    assert timed == [False, True] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[" * 100_000,
        b"[]",
        b'{"version": 2, "steps": {}}',
        b'{"version": 1, "steps": 3}',
        b'{"version": 1}',
        None,  # a folder
    ],
)
def test_a_damaged_or_foreign_file_counts_as_empty(timed, tmp_path, content):
    path = tmp_path / "tuning.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert choose(make_trainer()) is True
    assert timed == [False, True]
    if content is not None:  # it was replaced by a sound one
        assert len(json.loads(path.read_text())["steps"]) == 1


@pytest.mark.parametrize(
    "entry", [3, [3], [[True]], [[True, 64, "a", 1]], [[True, 64, math.nan, 1.0]], [[[], 1, 2, 3]]]
)
def test_a_damaged_entry_counts_as_absent(timed, tmp_path, entry):
    choose(make_trainer())
    content = json.loads((tmp_path / "tuning.json").read_text())
    content["steps"] = dict.fromkeys(content["steps"], entry)
    (tmp_path / "damaged.json").write_text(json.dumps(content))
    polus.core.set_tuning_cache(tmp_path / "damaged.json")
    assert choose(make_trainer()) is True
    assert timed == [False, True] * 2


def test_a_folder_that_cannot_be_written_to_is_no_error(timed, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    polus.core.set_tuning_cache(folder / "below" / "tuning.json")
    assert choose(make_trainer()) is True
    (tmp_path / "file").touch()
    polus.core.set_tuning_cache(tmp_path / "file" / "tuning.json")
    assert choose(make_trainer()) is True


@pytest.mark.once
def test_a_short_run_does_not_pay_for_the_compilation_of_what_others_found_faster():
    plain, compiled = Tuning(False, 64), Tuning(True, 64)
    timings = Timings({plain: Timing(5e-3, 0.1), compiled: Timing(1e-3, 10.0)})

    def tune(tuner, steps):
        limits = Limits([Way(False, True), Way(True, True)], 64, 10**6, length=RunLength(steps))
        never = lambda tuning: pytest.fail("measured again")  # noqa: E731
        return tuner(limits, never, contextlib.nullcontext)

    tuner = Autotuner(timings)
    assert tune(tuner, 1_000) == plain  # 5.1 seconds; 11 with the other
    assert tune(tuner, math.inf) == plain
    assert tune(tuner, 10_000) == compiled
    assert tune(tuner, 1_000) == compiled  # it is compiled now


@pytest.mark.once
def test_the_file_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(polus.core, "_tuning_cache", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert polus.core.get_tuning_cache() == tmp_path / "polus" / "tuning.json"


@pytest.mark.once
def test_a_user_without_a_home_has_no_file(monkeypatch):
    monkeypatch.setattr(polus.core, "_tuning_cache", {})
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it does for an unknown user
    assert polus.core.get_tuning_cache() is None


def test_the_file_stays_small(timed, tmp_path, monkeypatch):
    from polus.steps import tuning_cache

    monkeypatch.setattr(tuning_cache, "MAX_STEPS", 3)
    for units in range(1, 6):
        choose(make_trainer(units=units))
    assert len(json.loads((tmp_path / "tuning.json").read_text())["steps"]) == 3


@pytest.mark.once
@pytest.mark.parametrize("given", [3, b"a", "", "."], ids=repr)
def test_a_path_that_is_no_file_raises(given):
    before = polus.core.get_tuning_cache()
    with pytest.raises((TypeError, ValueError), match="path must be the path of a file"):
        polus.core.set_tuning_cache(given)
    assert polus.core.get_tuning_cache() == before
