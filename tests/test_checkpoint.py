"""A run that is interrupted and resumed equals one that was not.

An interruption is an exception here, and a resumed run gets everything made anew, as in a new
process. Processes that are really killed are in benchmarks/resilience.py.
"""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from recorder import Recorder

import polus.core
from polus import environment
from polus.backends import backend
from polus.callbacks import Callback
from polus.checkpoint import Checkpoint, CheckpointError, store
from polus.checkpoint.__main__ import main
from polus.checkpoint.store import Store, read
from polus.data import from_arrays
from polus.metrics import Accuracy
from polus.state import random_state
from polus.state_tree import flatten_state, unflatten_state
from polus.steps.autotune import Autotuner, Tuning
from polus.steps.compiled import CompiledStep
from polus.training import ClassifierTrainer
from polus.training_state import allocate_buffers, canonical_paths, variables_state

generator = np.random.default_rng(0)
x = generator.normal(size=(52, 8)).astype("float32")
y = (x.sum(axis=1) > 0).astype("int32")


@pytest.fixture(autouse=True)
def _measured_already():
    """Which compiler is the fastest is not the question here."""
    polus.core.set_jit_compile(backend.candidates()[0])
    yield
    polus.core.set_jit_compile("auto")  # not what it was: a run for the module sets it before


def new_trainer(width=16, optimizer=None, loss=None):
    """With all that has a state: dropout, batch norm, Adam, schedule, accumulation, EMA."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.layers.Dense(width, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(2),
        ]
    )
    rate = keras.optimizers.schedules.CosineDecay(1e-2, 30)
    return ClassifierTrainer(
        model,
        optimizer or keras.optimizers.Adam(rate, gradient_accumulation_steps=2, use_ema=True),
        loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[Accuracy(num_classes=2)],
    )


def small_trainer():
    """For what does not depend on the state: it compiles in a third of the time."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = keras.Sequential([keras.layers.Dense(2)])
    return ClassifierTrainer(model, keras.optimizers.SGD(0.1), loss)


def data():
    return from_arrays((x, y), batch_size=8, seed=3)  # 7 steps, the last one smaller


class Killed(BaseException):
    """Not to be caught by anybody."""


def kill():
    raise Killed


class Remembers(Recorder):
    """A recorder with a state, and draws of its own; does something at a place of the run."""

    def __init__(self, at=None, then=kill):
        super().__init__(self.happened)
        self.at, self.do, self.draws = at, then, []

    def happened(self, name, *place):
        self.draws.append(np.random.random())
        if name == "epoch_end":
            values = self.coordinator.shared_dict["validation"].setdefault("val", {"f1": []})
            values["f1"].extend(place)
        if (name, *place[:2]) == self.at:
            self.do()

    def get_state(self):
        return {"events": self.events, "draws": self.draws}

    def set_state(self, state):
        self.events, self.draws = list(map(tuple, state["events"])), state["draws"]


def train(folder, at=None, then=kill, epochs=3, trainer=None, dataset=None, **kwargs):
    trainer = trainer or new_trainer()
    remembers = Remembers(at, then)
    callbacks = [Checkpoint(folder, **{"every_steps": 2, **kwargs}), remembers]
    history = trainer.train(
        dataset or data(), epochs, callbacks, resume=folder, steps_per_execution=4
    )
    return result(trainer, history, remembers)


def result(trainer, history, remembers):
    return {
        "losses": history.steps["loss"].tobytes(),
        "steps": list(zip(history.steps["epoch"], history.steps["step"], strict=True)),
        "epochs": history.epochs,
        "weights": [keras.ops.convert_to_numpy(v).tobytes() for v in trainer.model.variables],
        "optimizer": [keras.ops.convert_to_numpy(v).tobytes() for v in trainer.optimizer.variables],
        "events": remembers.events,
        "draws": remembers.draws,
        "shared": remembers.coordinator.shared_dict["validation"],
        "count": int(keras.ops.convert_to_numpy(trainer.step_counter.value)),
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    polus.core.set_jit_compile(backend.candidates()[0])
    return train(str(tmp_path_factory.mktemp("uninterrupted")))


def test_repeatedly_killed_run_equals_an_uninterrupted_one(tmp_path, uninterrupted, caplog):
    caplog.set_level(logging.INFO)
    folder = str(tmp_path)
    # The last step of an epoch, its end, the first after, the one before the last, any.
    for at in [
        ("step_end", 0, 6),
        ("epoch_end", 0),
        ("step_end", 1, 0),
        ("step_end", 1, 5),
        ("step_end", 2, 3),
    ]:
        with pytest.raises(Killed):
            train(folder, at)
    assert train(folder) == uninterrupted
    assert caplog.text.count("Continuing from") == 5

    # What is finished is not trained again; more epochs go on from there.
    assert train(folder, at=("step_end", 2, 6)) == uninterrupted
    more = train(folder, epochs=4)
    assert more["losses"][: len(uninterrupted["losses"])] == uninterrupted["losses"]
    assert len(more["steps"]) == 4 * 7


KILLED_IN_A_SAVE = """
import os, signal, sys
import polus.core, test_checkpoint
from polus.backends import backend

replace, saves = os.replace, []

def dies(*arguments):
    saves.append(arguments)
    if len(saves) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)

os.replace = dies
polus.core.set_jit_compile(backend.candidates()[0])
test_checkpoint.train(sys.argv[1])
"""


def test_process_killed_during_a_save(tmp_path, uninterrupted):
    command = [sys.executable, "-c", KILLED_IN_A_SAVE, str(tmp_path)]
    child = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert [p["progress"]["step"] for p in trees(tmp_path)] == [2, 4]
    assert list(tmp_path.glob(".tmp-*"))
    assert train(str(tmp_path)) == uninterrupted
    assert not list(tmp_path.glob(".tmp-*"))


def test_damaged_checkpoint_costs_steps_but_no_bit(tmp_path, uninterrupted, caplog):
    with pytest.raises(Killed):
        train(str(tmp_path), ("step_end", 1, 5))
    newest = Store(tmp_path).paths()[-1] / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert train(str(tmp_path)) == uninterrupted
    assert "is damaged" in caplog.text


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("SIGTERM", ("step_end", 0, 0)),
        ("SIGINT", ("step_end", 1, 3)),
        ("SIGUSR1", ("epoch_end", 0)),  # where a validation runs
    ],
)
def test_signal_saves_and_exits(tmp_path, uninterrupted, name, moment, caplog):
    number = getattr(signal, name)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with pytest.raises(SystemExit) as exit_:
        train(str(tmp_path), moment, lambda: signal.raise_signal(number), every_steps=None)
    assert exit_.value.code == 128 + number
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert f"{name}: the run is saved in" in caplog.text
    assert f"with its run_dir, or with resume={str(tmp_path)!r}." in caplog.text
    saved = Store(tmp_path).read_newest()
    assert saved.tree["callbacks"][1][1]["events"][-1][: len(moment)] == list(moment)
    # No step is lost or repeated, and the bits are those of a run that saves at other times.
    assert train(str(tmp_path), every_steps=None) == uninterrupted


def test_signal_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    started = threading.Event()
    write = Store.write

    def slow(self, *arguments):
        started.set()
        assert signalled.wait(60)
        return write(self, *arguments)

    def term():
        assert started.wait(60)
        signal.raise_signal(signal.SIGTERM)
        signalled.set()

    signalled = threading.Event()
    monkeypatch.setattr(Store, "write", slow)
    with pytest.raises(SystemExit):
        train(str(tmp_path), ("step_end", 0, 2), term, trainer=small_trainer())
    assert [p["progress"]["step"] for p in trees(tmp_path)] == [2, 3]


@pytest.mark.parametrize("moment", ["in the last save", "behind it", "in a finished run"])
def test_signal_after_the_last_step_exits(tmp_path, one_epoch, moment):
    class Late(Callback):
        def term(self):
            self.term = lambda: None  # once
            signal.raise_signal(signal.SIGTERM)

        def get_state(self):
            if moment == "in the last save":
                self.term()
            return {}

        def on_train_begin(self):
            if moment == "in a finished run":
                self.term()

        def on_train_end(self):
            self.ended = True

    folder = one_epoch if moment == "in a finished run" else str(tmp_path)
    trainer, late = new_trainer(), Late()
    if moment == "behind it":
        trainer.optimizer.finalize_variable_values = lambda weights: late.term()
    with pytest.raises(SystemExit) as exit_:
        trainer.train(data(), 1, [Checkpoint(folder), Remembers(), late], resume=folder)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert late.ended
    assert trees(folder)[-1]["progress"]["epoch"] == 1


def test_signal_during_a_call_of_many_steps(tmp_path, monkeypatch):
    def weights(callbacks=(), resume=None):
        trainer = small_trainer()
        trainer.train(data(), 2, callbacks, steps_per_execution=4, resume=resume)
        return [keras.ops.convert_to_numpy(v).tobytes() for v in trainer.model.variables]

    def prepare(self, block):
        program, arguments = prepared(self, block)

        def interrupted(*arguments):
            assert block.count == 4
            signal.raise_signal(signal.SIGTERM)
            return program(*arguments)

        return interrupted, arguments

    prepared = CompiledStep.program
    with monkeypatch.context() as patch:
        patch.setattr(CompiledStep, "program", prepare)
        with pytest.raises(SystemExit):
            weights([Checkpoint(tmp_path)])
    assert [t["progress"]["step"] for t in trees(tmp_path)] == [4]
    assert weights([Checkpoint(tmp_path)], resume=tmp_path) == weights()


def test_signal_lets_every_checkpoint_save(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    term = Remembers(("step_end", 0, 3), lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        small_trainer().train(data(), 1, [*map(Checkpoint, folders), term])
    assert [[t["progress"]["step"] for t in trees(folder)] for folder in folders] == [[4], [4]]


def test_second_signal_does_not_wait_for_the_save(tmp_path, monkeypatch):
    ended, write = threading.Event(), Store.write

    def slow(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        assert ended.wait(5)
        return write(self, *arguments)

    monkeypatch.setattr(Store, "write", slow)
    term = Remembers(("step_end", 0, 3), lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        small_trainer().train(data(), 1, [Checkpoint(tmp_path), term])
    # The thread has the folder until it is done, and doesn't hold up the end of the process.
    (thread,) = [t for t in threading.enumerate() if t.name == "polus-checkpoint"]
    assert thread.daemon
    with pytest.raises(CheckpointError, match="Another run"):
        Store(tmp_path).lock()
    ended.set()
    thread.join()
    assert [p["progress"]["step"] for p in trees(tmp_path)] == [4]
    Store(tmp_path).lock().release()


def test_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what ends with &
    interrupt = Remembers(("step_end", 0, 3), lambda: signal.raise_signal(signal.SIGINT))
    try:
        small_trainer().train(data(), 1, [Checkpoint(tmp_path), interrupt])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def trees(folder):
    return [read(path).tree for path in Store(folder).paths()]


def test_loop_waits_for_the_device(tmp_path):
    class Losses:
        def __array__(self, dtype=None, copy=None):
            waited.append(self)
            return np.zeros(1)

    waited, checkpoint = [], Checkpoint(tmp_path)
    blocks = [Losses() for _ in range(3)]
    for step, losses in enumerate(blocks):
        checkpoint.coordinator = SimpleNamespace(run=SimpleNamespace(step_logs={"loss": losses}))
        checkpoint.on_steps_end(0, range(step, step + 1), losses)
    assert waited == blocks[:2]


def test_signal_while_waiting_for_data(tmp_path, monkeypatch):
    late, save = threading.Event(), Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self: (save(self), late.set()))

    def slow_data():
        yield x[:8], y[:8]
        yield x[8:16], y[8:16]
        os.kill(os.getpid(), signal.SIGTERM)
        assert late.wait(60)  # until the run has been saved
        yield x[:8], y[:8]

    with pytest.raises(SystemExit):
        train(str(tmp_path), dataset=slow_data, every_steps=None, trainer=small_trainer())
    assert [p["progress"]["step"] for p in trees(tmp_path)] in ([0], [1], [2])


@pytest.mark.parametrize(("name", "ends"), [("SIGTERM", SystemExit), ("SIGINT", KeyboardInterrupt)])
def test_signal_while_a_resume_replays_the_data(tmp_path, name, ends, caplog):
    def batches():
        for i in range(6):
            if resuming:
                read.append(i)
            if resuming and i == 2:
                signal.raise_signal(getattr(signal, name))
            yield x[8 * i :][:8], y[8 * i :][:8]

    resuming, read = False, []
    with pytest.raises(Killed):
        train(str(tmp_path), ("step_end", 0, 4), dataset=batches, trainer=small_trainer())
    before, resuming = sorted(os.listdir(tmp_path)), True
    with pytest.raises(ends) as ended:
        train(str(tmp_path), dataset=batches, trainer=small_trainer())
    assert ends is KeyboardInterrupt or ended.value.code == 128 + signal.SIGTERM
    assert read == [0, 1, 2]  # of the four that were seen
    assert f"{name}: the run has not continued yet, and nothing is saved" in caplog.text
    assert sorted(os.listdir(tmp_path)) == before


@pytest.fixture
def full_disk(monkeypatch):
    """Store.write fails as often as `full_disk.times` says."""
    write = Store.write

    def failing(self, *arguments):
        if failing.times > 0:
            failing.times -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    failing.times = 0
    monkeypatch.setattr(Store, "write", failing)
    return failing


def test_full_disk_does_not_end_the_run(tmp_path, uninterrupted, full_disk, caplog):
    with pytest.raises(Killed):
        train(str(tmp_path), at=("step_end", 0, 2))
    newest = Store(tmp_path).paths()[-1]
    full_disk.times = 8
    assert train(str(tmp_path)) == uninterrupted
    assert f"The newest one is {newest}." in caplog.text
    assert caplog.text.count("NO CHECKPOINT WAS WRITTEN") == 8
    assert "No space left on device" in caplog.text
    assert len(trees(tmp_path)) == 3


def test_no_checkpoint_at_all_raises_at_the_end(tmp_path, full_disk):
    full_disk.times = 1000
    trainer = small_trainer()
    with pytest.raises(CheckpointError, match="Not one checkpoint could be written to"):
        train(str(tmp_path), trainer=trainer, epochs=1)
    assert int(keras.ops.convert_to_numpy(trainer.step_counter.value)) == 7


def test_folder_that_cannot_be_made_is_retried(tmp_path, caplog, monkeypatch):
    def fails(path):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(store, "make_folder", fails)
        train(
            str(tmp_path / "run"), ("step_end", 0, 0), patch.undo, epochs=1, trainer=small_trainer()
        )
    assert "NO CHECKPOINT WAS WRITTEN" in caplog.text
    assert "Read-only file system" in caplog.text
    assert len(trees(tmp_path / "run")) == 3


def test_two_runs_cannot_share_a_folder(tmp_path):
    lock = Store(tmp_path).lock()
    with pytest.raises(CheckpointError, match="Another run is writing its checkpoints to"):
        train(str(tmp_path))
    lock.release()


def test_removed_folder_is_locked_again(tmp_path):
    class Removes(Callback):
        refused = False

        def on_epoch_end(self, epoch):
            if epoch == 0:
                shutil.rmtree(tmp_path)
            elif epoch == 2:  # the save after the first epoch is through
                with pytest.raises(CheckpointError, match="Another run"):
                    Store(tmp_path).lock()
                self.refused = True

    removes = Removes()
    small_trainer().train(data(), 3, [Checkpoint(tmp_path), removes])
    assert removes.refused
    Store(tmp_path).lock().release()


def test_folder_taken_by_another_run_does_not_end_the_run(tmp_path, caplog):
    class Taken(Callback):
        def on_epoch_end(self, epoch):
            if epoch == 0:
                shutil.rmtree(tmp_path)
                self.lock = Store(tmp_path).lock()
            elif epoch == 2:
                self.lock.release()

    small_trainer().train(data(), 3, [Checkpoint(tmp_path), Taken()])
    assert "NO CHECKPOINT WAS WRITTEN to" in caplog.text
    assert "Another run is writing its checkpoints to" in caplog.text
    assert trees(tmp_path)[-1]["progress"]["epoch"] == 3


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    polus.core.set_jit_compile(backend.candidates()[0])
    folder = tmp_path_factory.mktemp("one_epoch")
    train(str(folder), epochs=1)
    return str(folder)


def test_checkpoints_of_an_earlier_run_stay(one_epoch, tmp_path, caplog):
    folder = shutil.copytree(one_epoch, tmp_path / "run")
    paths, trainer = Store(folder).paths(), small_trainer()
    for count, resume in enumerate((None, tmp_path / "empty"), start=1):
        trainer.train(data(), 2, [Checkpoint(folder, keep=1)], resume=resume)
        assert caplog.text.count(f"train(..., resume={str(folder)!r})") == count
        assert Store(folder).paths()[: len(paths)] == paths
        assert len(Store(folder).paths()) == len(paths) + count
    # Of two folders one may be the spare copy.
    spare = tmp_path / "spare"
    for epochs in (3, 4):
        trainer.train(data(), epochs, [Checkpoint(folder), Checkpoint(spare)], resume=folder)
    assert [t["progress"]["epoch"] for t in trees(spare)] == [3, 4]


def test_resumed_run_removes_only_its_own_checkpoints(one_epoch, tmp_path, caplog):
    folder = shutil.copytree(one_epoch, tmp_path / "run")
    earlier = Store(folder).paths()
    trainer = small_trainer()
    with pytest.raises(Killed):
        trainer.train(data(), 3, [Checkpoint(folder, keep=1), Remembers(("step_end", 1, 2))])
    assert "They stay until you remove them" in caplog.text
    # That second run goes on, in other processes.
    for epochs in (2, 3):
        small_trainer().train(data(), epochs, [Checkpoint(folder, keep=1)], resume=folder)
        own = Store(folder).paths()[len(earlier) :]
        assert Store(folder).paths()[: len(earlier)] == earlier
        assert [read(path).tree["progress"]["epoch"] for path in own] == [epochs]


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_earlier_run_is_not_continued_for_a_damaged_one(one_epoch, tmp_path, caplog, name):
    folder = shutil.copytree(one_epoch, tmp_path / "run")
    new_trainer().train(data(), 2, [Checkpoint(folder, keep=1)])
    (newest,) = Store(folder).paths()[3:]
    with open(newest / name, "r+b") as file:
        file.truncate(30)
    if name == "manifest.json":  # which run it was is not known
        new_trainer().train(data(), 1, [], resume=folder)
        assert f"{name} is damaged" in caplog.text
        return
    for _ in range(2):  # the second time it has been set aside
        with pytest.raises(CheckpointError, match=r"has only damaged checkpoints: .* earlier run"):
            new_trainer().train(data(), 2, [], resume=folder)


def test_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    class Moves(Callback):
        def on_epoch_end(self, epoch):
            os.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = small_trainer()
    trainer.train(data(), 2, [Checkpoint("runs"), Moves()], resume="runs")
    assert [t["progress"]["epoch"] for t in trees(tmp_path / "runs")] == [1, 2]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("folder", ["", "a\0b", "file", "dangling"])
def test_resume_from_what_is_no_folder_raises_before_training(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    trainer, remembers = small_trainer(), Remembers()
    with pytest.raises(ValueError, match="must be"):
        trainer.train(data(), 1, [remembers], resume=folder)
    with pytest.raises(ValueError, match="directory must be"):
        Checkpoint(folder)
    assert remembers.events == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"width": 20},
            r"model.layers\[0\].units was 16 and is 20",
        ),
        ({"optimizer": keras.optimizers.SGD}, r"optimizer was Adam\(.* and is SGD\("),
        (
            {"loss": keras.losses.KLDivergence},
            r"loss was SparseCategoricalCrossentropy\(.* and is KLDivergence",
        ),
        (
            {"optimizer": lambda: keras.optimizers.Adam(1e-3)},
            r"optimizer.learning_rate was CosineDecay\(.* and is 0.001",
        ),
    ],
)
def test_checkpoint_of_another_run_raises_with_the_difference(one_epoch, kwargs, message):
    kwargs = {name: v() if callable(v) else v for name, v in kwargs.items()}
    with pytest.raises(CheckpointError, match=message):
        train(one_epoch, trainer=new_trainer(**kwargs))


def put(*path, value):
    """A fault: another value at a place of the state."""

    def fault(tree):
        *parents, last = path
        for key in parents:
            tree = tree[key]
        if value is None:
            del tree[last]
        else:
            tree[last] = value

    return fault


HOSTILE_STATES = {
    "no progress": put("progress", value=None),
    "epoch: negative": put("progress", "epoch", value=-1),
    "epoch: true": put("progress", "epoch", value=True),
    "epoch: text": put("progress", "epoch", value="1"),
    "epoch: not a number": put("progress", "epoch", value=float("nan")),
    "epoch: huge": put("progress", "epoch", value=2**80),
    "step: fraction": put("progress", "step", value=0.5),
    "early_stop: text": put("progress", "early_stop", value="no"),
    "batch_sizes: list": put("progress", "batch_sizes", value=[8]),
    "batch_sizes: fractions": put("progress", "batch_sizes", value=np.zeros(1)),
    "variables: dict": put("variables", value={}),
    "variables: path": put("variables", 0, "path", value=3),
    "variables: value": put("variables", 0, "value", value=3.0),
    "settings: list": put("settings", "first", value=[]),
    "settings: none": put("settings", value=None),
    "callbacks: name": put("callbacks", 0, 0, value=3),
    "callbacks: too much": put("callbacks", 0, value=["Checkpoint", {}, {}]),
    "callbacks: state": put("callbacks", 0, 1, value=[]),
    "tuning: list": put("tuning", value=[1]),
    "random: Python": put("random", "python", 1, value=[0] * 10),
    "random: of Python's generator a position outside": put(
        "random", "python", 1, value=[0] * 624 + [625]
    ),
    "random: of NumPy's generator a position outside": put("random", "numpy", 2, value=10**5),
    "random: NumPy": put("random", "numpy", 1, value=np.zeros(3)),
    "random: no NumPy": put("random", "numpy", value=None),
    "data: list": put("data", value=[]),
    "data: no start of the epoch": put("data", "epoch_start", value=None),
    "data: no generators": put("data", "epoch_start", "random", value=None),
    "data: a position outside": put("data", "epoch_start", "random", "numpy", 2, value=-1),
    "data: previous epoch": put("data", "previous_epoch", value=[]),
    "data: generators of the previous epoch": put(
        "data", "previous_epoch", "epoch_start", "random", "python", value=[]
    ),
    "data: iterator": put("data", "iterator", value=[-1, {}]),
    "data: generators of the iterator": put(
        "data",
        "iterator",
        value={"num_read": 1, "state": 1, "generators": {}, "next_checksum": 1},
    ),
    "data: state of the iterator": put(
        "data",
        "iterator",
        value={
            "num_read": 1,
            "state": {"dict": [[{"list": []}, 1]]},  # a list is no key
            "generators": {"random": random_state(), "adapter": {}},
            "next_checksum": 1,
        },
    ),
    "data: state at the end of an epoch": put("data", "iterator_at_epoch_end", value={"no": 1}),
    "history: steps": put("history", "steps", value=[]),
    "history: epochs": put("history", "epochs", value=[[1]]),
    "history: validations": put("history", "validations", value=[[1]]),
    "more": put("more", value=1),
}


@pytest.fixture(scope="module")
def resuming_trainer():
    """Resumes the same run again and again: it compiles once."""
    return new_trainer()


@pytest.mark.parametrize("fault", HOSTILE_STATES)
def test_hostile_state_falls_back_to_the_previous_checkpoint(
    one_epoch, tmp_path, caplog, fault, resuming_trainer
):
    folder = shutil.copytree(one_epoch, tmp_path / "run")
    saved = Store(folder).read_newest()
    HOSTILE_STATES[fault](saved.tree)
    hostile = Store(folder).write(flatten_state(saved.tree), saved.facts, keep=9)
    history = resuming_trainer.train(data(), 1, [Remembers()], resume=folder)
    assert len(history.steps["loss"]) == 7
    assert f"It is set aside as damaged-{hostile.name}" in caplog.text
    assert Store(folder).paths()[-1] == saved.path


def test_callback_that_does_not_take_its_state_raises(one_epoch):
    class Remembers(Callback):
        def set_state(self, state):
            self.seen = state["what is not there"]

    with pytest.raises(CheckpointError, match=r"callback Remembers does not take its saved state"):
        new_trainer().train(data(), 2, [Remembers()], resume=one_epoch)


def test_an_error_of_the_users_own_is_not_reported_as_another_run(one_epoch):
    def broken(batch):
        raise ValueError("the user's own")

    with pytest.raises(ValueError, match=r"^the user's own$"):
        new_trainer().train(
            data(), 2, [Remembers()], broken, resume=one_epoch, resume_changes="accept"
        )


def with_other_variables():
    """A trainer with variables that are not Keras', and what gives their values."""
    keras.utils.set_random_seed(1)
    inputs, head = keras.Input((8,)), keras.layers.Dense(2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if keras.config.backend() == "torch":
        torch = pytest.importorskip("torch")
        module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
        # Which says that it is built, and isn't behind the module.
        model = keras.Sequential([inputs, keras.layers.TorchModuleWrapper(module), head])
        trainer = ClassifierTrainer(model, keras.optimizers.Adam(1e-2), loss)
        return trainer, lambda: {name: b.tolist() for name, b in module.named_buffers()}
    if keras.config.backend() != "tensorflow":
        pytest.skip("JAX has no variables of its own")
    tf = pytest.importorskip("tensorflow")
    steps, noise = tf.Variable(0), tf.random.Generator.from_seed(3)

    class Noisy(ClassifierTrainer):
        def forward_without_grads(self, x, y):
            steps.assign_add(1)
            return x + 0.1 * noise.normal(tf.shape(x)), y

    trainer = Noisy(keras.Sequential([inputs, head]), keras.optimizers.Adam(1e-2), loss)
    return trainer, lambda: {"steps": int(steps), "noise": noise.state.numpy().tolist()}


def test_variables_of_the_backend_are_restored(tmp_path):
    trainer, values = with_other_variables()
    # Measuring, too, puts them back.
    history = trainer.train(data(), 2)
    assert 14 in values().values()
    expected = values()
    trainer, _ = with_other_variables()
    with pytest.raises(Killed):
        train(str(tmp_path), ("step_end", 1, 3), trainer=trainer, epochs=2)
    trainer, values = with_other_variables()
    resumed = train(str(tmp_path), trainer=trainer, epochs=2)
    assert values() == expected
    assert resumed["losses"] == history.steps["loss"].tobytes()


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="TensorFlow's variables")
def test_tensorflow_variables_are_traced_in_first_use_order():
    tf = pytest.importorskip("tensorflow")
    variables = [tf.Variable(0.0, name=f"v{i}") for i in range(40)]
    dry_run = backend.trace(lambda x: [v.assign_add(x) for v in variables], [np.float32(1)])
    assert [variable.path for variable in dry_run.variables] == [f"v{i}" for i in range(40)]
    assert not any(map(float, variables))


def test_added_layer_without_variables_raises(one_epoch):
    trainer = new_trainer()
    trainer.model.add(keras.layers.Activation("relu"))
    with pytest.raises(CheckpointError, match=r"model.layers was \[Dense.* and is \[Dense"):
        train(one_epoch, trainer=trainer)


def test_callback_that_sets_itself_up_in_on_epoch_begin(tmp_path):
    class Counts(Callback):
        """Has no state: what it knows it sets up at the beginning."""

        every_steps = 3

        def on_epoch_begin(self, epoch):
            self.seen = 0
            self.coordinator.trainer.optimizer.learning_rate = 0.5

        def on_steps_end(self, epoch, steps, losses):
            if steps.start == 0:
                self.coordinator.trainer.optimizer.learning_rate = 0.25
            self.seen += len(steps)
            if (epoch, steps.stop) == at:
                raise Killed

    class InKeras(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.seen = []

        def on_epoch_end(self, epoch, logs=None):
            self.seen.append(epoch)

    def run():
        trainer = small_trainer()
        callbacks = [Counts(), InKeras(), Checkpoint(tmp_path, every_steps=3)]
        trainer.train(data(), 2, callbacks, resume=tmp_path)
        return trainer.optimizer, *callbacks

    at = (1, 6)
    with pytest.raises(Killed):
        run()
    at = None
    optimizer, counts, in_keras, _ = run()
    assert counts.seen == 4
    assert in_keras.seen == [1]
    # What it changed there is what the checkpoint says.
    assert float(keras.ops.convert_to_numpy(optimizer.learning_rate)) == 0.25


def test_checkpoint_of_another_dataset_raises(one_epoch):
    with pytest.raises(CheckpointError, match="num_batches: it was 7, and is 26"):
        train(one_epoch, dataset=from_arrays((x, y), batch_size=2))


def test_saves_are_on_schedule(tmp_path):
    now = [0.0]

    class Clock(Callback):
        every_steps = 1

        def on_train_batch_end(self, epoch, step, loss):
            now[0] += 10.0

    def saved_at(**kwargs):
        folder = tmp_path / str(kwargs)
        checkpoint = Checkpoint(folder, keep=99, clock=lambda: now[0], **kwargs)
        trainer.train(data(), 3, [checkpoint, Clock()])
        return [(t["progress"]["epoch"], t["progress"]["step"]) for t in trees(folder)]

    trainer = small_trainer()
    assert saved_at() == [(1, 0), (2, 0), (3, 0)]
    assert saved_at(every_epochs=2) == [(2, 0), (3, 0)]  # and at the end
    assert saved_at(every_epochs=None) == [(3, 0)]
    assert saved_at(every_epochs=None, every_steps=3) == [
        (e, s) for e in range(3) for s in (3, 6)
    ] + [(3, 0)]
    assert saved_at(every_epochs=None, every_secs=50) == [(0, 5), (1, 3), (2, 1), (2, 6), (3, 0)]


def test_callback_can_save(tmp_path):
    class Saves(Callback):
        def on_train_begin(self):
            with pytest.raises(RuntimeError, match="known from its first batch on"):
                checkpoint.save()

        def on_train_batch_end(self, epoch, step, loss):
            if step in (0, 3):
                checkpoint.save()

    checkpoint = Checkpoint(tmp_path)
    small_trainer().train(data(), 1, [checkpoint, Saves()])
    assert [t["progress"]["step"] for t in trees(tmp_path)] == [1, 4, 0]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"keep": 0},
        {"every_epochs": 0},
        {"every_steps": 0},
        {"every_steps": 2.5},
        {"every_secs": -1},
        {"every_secs": "a"},
        {"every_secs": float("nan")},
        {"every_secs": float("inf")},
        {"every_secs": True},
        {"keep": True},
        {"keep": None},
    ],
)
def test_invalid_arguments_raise(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))} must be a .*, got"):
        Checkpoint("anywhere", **kwargs)


def once(dispatch, *_):
    assert dispatch.settled, "measured again"


def test_autotuned_settings_are_restored(tmp_path, monkeypatch):
    polus.core.set_jit_compile("auto")
    checkpoint = Checkpoint(tmp_path)
    small_trainer().train(data(), 1, [checkpoint], resume=tmp_path)
    chosen = checkpoint.coordinator.run.executor.tuning
    monkeypatch.setattr(CompiledStep, "time", never)
    small_trainer().train(data(), 2, [checkpoint], resume=tmp_path)
    assert checkpoint.coordinator.run.executor.tuning == chosen


def never(*arguments):
    raise AssertionError("a resumed run must not time its step again")


def test_validation_after_the_last_step_keeps_its_compiler(tmp_path, monkeypatch):
    class Validates(Callback):
        def on_epoch_end(self, epoch):
            if epoch == 1 and dies:
                raise Killed
            self.coordinator.trainer.evaluate(data())

    def program(step, unpack=None, many=False, jit_compile=None, *others):
        return made(step, unpack, many, None, *others)  # compiling takes PyTorch ten seconds

    polus.core.set_jit_compile("auto")
    made = backend.program
    monkeypatch.setattr(backend, "program", program)
    dies, folder = True, str(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Autotuner, "__call__", lambda *_: Tuning(True, 2))
        with pytest.raises(Killed):
            small_trainer().train(data(), 2, [Checkpoint(folder, every_steps=7), Validates()])
    dies, validates = False, Validates()
    small_trainer().train(data(), 2, [Checkpoint(folder, every_steps=7), validates], resume=folder)
    tunings = validates.coordinator.run.executor.get_state()
    assert tunings["ways"]["evaluation, auto"] == [True, 1]


def test_changed_environment_warns(one_epoch, monkeypatch, caplog):
    monkeypatch.setattr(environment, "processor", lambda: "Difference Engine")
    polus.core.set_jit_compile("auto")
    trainer = new_trainer()
    trainer.model.layers[0].dtype_policy = "mixed_bfloat16"
    trainer.train(data(), 1, [], resume=one_epoch, resume_changes="accept")
    assert "and is 'Difference Engine'" in caplog.text
    assert f"jit_compile was {backend.candidates()[0]} and is 'auto'" in caplog.text
    assert "dtype policies was ['float32'] and is ['float32', 'mixed_bfloat16']" in caplog.text
    assert "steps_per_execution was 4 and is None" in caplog.text
    assert "may not be bit for bit those" in caplog.text


def test_missing_callback_warns(one_epoch, caplog):
    new_trainer().train(data(), 1, [], resume=one_epoch)
    assert "the state of callbacks that are gone: ['Remembers']" in caplog.text


def test_state_that_cannot_be_stored_raises_with_its_place(tmp_path):
    class Strange(Callback):
        def get_state(self):
            return {"model": object()}

    message = r"At callbacks/1/1/model the state has a object[^$]*callbacks/1 is Strange"
    with pytest.raises(TypeError, match=message):
        small_trainer().train(data(), 1, [Checkpoint(tmp_path), Strange()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "bool", "int32"])
def test_variables_of_every_dtype_round_trip(dtype):
    variable = keras.Variable(np.array([[0, 1], [1, 0]]).T, dtype=dtype, trainable=False)
    flat = flatten_state(variables_state([variable]))
    assert json.loads(json.dumps(flat.skeleton))[0]["value"]["dtype"] == variable.dtype
    value = unflatten_state(flat)[0]["value"]
    again = keras.Variable(np.zeros((2, 2)), dtype=dtype, trainable=False)
    again.assign(value)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(again), keras.ops.convert_to_numpy(variable)
    )


def test_first_copy_uses_the_allocated_buffers():
    dtypes = ("float32", "bfloat16", "int8")
    variables = [keras.Variable(np.ones((3, 2)), dtype=d, trainable=False) for d in dtypes]
    memory = allocate_buffers(variables)
    arrays = flatten_state({"variables": variables_state(variables)}, memory).arrays
    assert len(memory) == len(variables)
    assert all(np.shares_memory(memory[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        (["a/dense/kernel", "a/dense_1/kernel"], ["a/dense_4/kernel", "a/dense_7/kernel"], True),
        (["a/dense/kernel", "a/dense_1/kernel"], ["a/dense_1/kernel", "a/dense/kernel"], False),
        (["adam/a_1_dense_2_kernel_momentum"], ["adam/a_dense_kernel_momentum"], True),
        (["a/dense/kernel"], ["a/dense/bias"], False),
    ],
)
def test_canonical_paths(then, now, same):
    assert (canonical_paths(then) == canonical_paths(now)) == same


def test_command_line(one_epoch, capsys, tmp_path):
    assert main(["ls", one_epoch]) == 0
    assert "epoch 1 of 1, step 0" in capsys.readouterr().out
    assert main(["verify", one_epoch]) == 0
    assert capsys.readouterr().out.count("verified") == 3
    assert main(["show", one_epoch]) == 0
    shown = capsys.readouterr().out
    assert "sequential/dense/kernel: float32 [8, 16]" in shown
    assert f"version of keras: {keras.__version__}" in shown
    assert main(["ls", str(tmp_path)]) == 1
    assert "There is no checkpoint in" in capsys.readouterr().err
    (tmp_path / "checkpoint-00000001").mkdir()
    assert main(["verify", str(tmp_path)]) == 1
    assert "DAMAGED" in capsys.readouterr().out


def test_a_call_after_a_resumed_run_goes_on_with_the_next_epoch_of_the_data(one_epoch):
    seen = []

    class Told(list):
        def set_epoch(self, epoch):
            seen.append(epoch)

    class ByEpoch(Callback):
        def on_epoch_begin(self, epoch):
            seen.append(f"call {epoch}")

    trainer = new_trainer()
    trainer.train(data(), 2, [Remembers()], resume=one_epoch)
    trainer.train(Told([(x[:8], y[:8])]), 1, [ByEpoch()])
    assert sorted(map(str, seen[-2:])) == ["2", "call 0"]
