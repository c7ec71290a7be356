"""The search: its trials are those that Optuna runs by hand, also after a kill."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import filelock
import keras
import numpy as np
import pytest

from polus import NonFiniteError, hpo
from polus.backends import backend
from polus.backends.placement import Placement
from polus.callbacks import Callback, Phase, ValidationDataCallback
from polus.checkpoint import Checkpoint
from polus.data import from_arrays
from polus.training import BaseTrainer

optuna = pytest.importorskip("optuna")
State = optuna.trial.TrialState

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 3)).astype("float32")
Y = X @ np.float32([[1.0], [-2.0], [0.5]])
EPOCHS = 4
cleared = []
ROOT = Path(__file__).parent.parent
DATABASE = "sqlite:///runs/search.db"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if keras.backend.backend() == "jax":  # else each trial compiles every operation anew
        monkeypatch.setattr("jax.clear_caches", lambda: cleared.append(1))
        cleared.clear()
    yield
    gc.collect()  # closes the connections of studies


class Regression(BaseTrainer):
    """Gradient descent on all rows at once, from zero: a few lines of NumPy compute the same."""

    def forward_with_grads(self, x, y):
        return y, self.model(x)

    def evaluation_loss(self, y, outputs):
        return self.loss(y, outputs)


def data():
    return from_arrays((X, Y), 16, shuffle=False)


def regression(rate, *callbacks):
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((3,)), layer])
    loss = keras.losses.MeanSquaredError()
    trainer = Regression(model, keras.optimizers.SGD(rate), loss)
    trainer.changing_train_config(
        tf_dataset=data(), callbacks=[*callbacks, ValidationDataCallback(data())]
    )
    return trainer


def make_trainer(trial):
    return regression(trial.suggest_float("rate", 1e-3, 0.3, log=True))


def search(make=make_trainer, n_trials=3, **arguments):
    quick = {"run_eagerly": keras.backend.backend() != "jax", "storage": None}
    arguments = {"epochs": EPOCHS, "seed": 0, **quick, **arguments}
    return hpo.search(make, n_trials, **arguments)


def by_hand(trial):
    """The same trial in NumPy, as Optuna's tutorial writes it."""
    rate, weights = trial.suggest_float("rate", 1e-3, 0.3, log=True), np.zeros((3, 1))
    losses = []
    for epoch in range(EPOCHS):
        weights -= rate * 2 * X.T @ (X @ weights - Y) / len(X)
        losses.append(np.mean((X @ weights - Y) ** 2))
        trial.report(losses[-1], epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return min(losses)


def outcomes(study):
    return [(t.state, t.params, t.value, t.intermediate_values) for t in study.trials]


def assert_same_outcomes(study, other):
    assert [t.state for t in study.trials] == [t.state for t in other.trials]
    assert [t.params for t in study.trials] == [t.params for t in other.trials]
    for ours, theirs in zip(study.trials, other.trials, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-4)
        assert ours.intermediate_values == pytest.approx(theirs.intermediate_values, rel=1e-4)


class At(Callback):
    """Calls a function after an epoch."""

    def __init__(self, epoch, function):
        super().__init__()
        self.epoch = epoch
        self.function = function

    def on_epoch_end(self, epoch):
        if epoch == self.epoch:
            self.function()


def test_trials_are_those_of_a_loop_by_hand(tmp_path):
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    ours = search(
        n_trials=6, storage=DATABASE, sampler=optuna.samplers.RandomSampler(7), pruner=pruner
    )
    theirs = optuna.create_study(sampler=optuna.samplers.RandomSampler(7), pruner=pruner)
    theirs.optimize(by_hand, n_trials=6)
    assert {t.state for t in theirs.trials} == {State.COMPLETE, State.PRUNED}
    assert_same_outcomes(ours, theirs)
    for trial in ours.trials:
        folder = tmp_path / "runs" / "search" / f"trial_{trial.number:04d}"
        assert trial.user_attrs["run_dir"] == str(folder)
        facts = json.loads((folder / "params.json").read_text())
        assert (facts["params"], facts["value"]) == (trial.params, trial.value)
        assert facts["state"] == trial.state.name.lower()
        assert json.loads((folder / "run.json").read_text())["epochs_done"] == len(
            trial.intermediate_values
        )
        assert not (folder / "checkpoints").exists()
    assert not list(Path("runs").rglob("report.html"))
    best = keras.models.load_model(Path(ours.best_trial.user_attrs["run_dir"]) / "best.keras")
    error = np.mean((keras.ops.convert_to_numpy(best(X)) - Y) ** 2)
    assert error == pytest.approx(ours.best_value, rel=1e-4)


def test_a_search_of_the_same_seed_suggests_and_trains_the_same():
    def make(trial):
        trainer = make_trainer(trial)
        noise = keras.ops.convert_to_numpy(keras.random.normal((3, 1)))
        trainer.model.layers[-1].kernel.assign(noise)
        return trainer

    one, other = (search(make, 2, study_name=name) for name in ("one", "other"))
    assert outcomes(one) == outcomes(other)
    assert outcomes(search(make, 2, study_name="third", seed=1)) != outcomes(one)


def test_an_interrupted_search_continues_within_its_trial():
    whole = search(study_name="whole")
    trained = []

    def interrupt():
        if interrupts.pop():
            signal.raise_signal(signal.SIGINT)

    class Count(Callback):
        def on_epoch_end(self, epoch):
            trained.append((self.coordinator.run.trainer.trial, epoch))

    def make(trial):
        if trial.number == 2 and interrupts.pop():
            raise KeyboardInterrupt
        rate = trial.suggest_float("rate", 1e-3, 0.3, log=True)
        trainer = regression(rate, Count(), *[At(1, interrupt)] * (trial.number == 1))
        trainer.trial = trial.number
        return trainer

    interrupts = [False, True, True]
    with pytest.raises(SystemExit) as ended:
        search(make, storage=DATABASE)
    assert ended.value.code == 128 + signal.SIGINT
    study = optuna.load_study(study_name="search", storage=DATABASE)
    assert [t.state for t in study.trials] == [State.COMPLETE, State.RUNNING]
    with pytest.raises(KeyboardInterrupt):
        search(make, storage=DATABASE)
    study = search(make, storage=DATABASE)
    assert_same_outcomes(study, whole)
    assert trained == [(trial, epoch) for trial in range(3) for epoch in range(EPOCHS)]
    assert len(search(make, storage=DATABASE).trials) == 3, "nothing is left to do"
    assert len(search(make, 4, storage=DATABASE).trials) == 4


@pytest.mark.once
def test_a_trial_killed_before_its_first_checkpoint_begins_anew():
    def interrupt():
        if interrupts.pop():
            raise KeyboardInterrupt

    def make(trial):
        ends = At(1, interrupt)
        ends.phase = Phase.SAVE  # after the epoch was reported
        return regression(0.1, ends)

    interrupts, storage = [False, True], optuna.storages.InMemoryStorage()
    with pytest.raises(KeyboardInterrupt):
        search(make, 1, storage=storage)
    (trial,) = search(make, 1, storage=storage).trials
    assert (trial.state, len(trial.intermediate_values)) == (State.COMPLETE, EPOCHS)


def make_shared(trial, kills=False):
    """Saves after each epoch, and waits with its first trial until another process has one too."""
    trial.set_user_attr("by", [*trial.user_attrs.get("by", []), os.getpid()])
    while not kills and trial.number < 3:
        others = trial.study.get_trials(deepcopy=False)[1:]
        if len({t.user_attrs["by"][-1] for t in others if "by" in t.user_attrs}) > 1:
            break
    kill = At(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
    trainer = make_trainer(trial)
    saving = Checkpoint(f"runs/search/trial_{trial.number:04d}/checkpoints")
    callbacks = [*trainer.kept_train_config()["callbacks"], saving]
    trainer.changing_train_config(callbacks=[*callbacks, *[kill] * (kills and trial.number)])
    return trainer


@pytest.mark.once
def test_a_killed_search_continues_and_processes_share_the_trials(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_search
kills = sys.argv[1] == "killed"
print("ready", flush=True)
test_search.search(lambda trial: test_search.make_shared(trial, kills), 6, storage={DATABASE!r})
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    killed = subprocess.run([*command, "killed"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with subprocess.Popen([*command, "shares"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        search(make_shared, 6, storage=DATABASE)
        other.communicate()
    assert other.returncode == 0
    study = optuna.load_study(study_name="search", storage=DATABASE)
    assert {t.state for t in study.trials} <= {State.COMPLETE, State.PRUNED}
    ran = [trial.user_attrs["by"] for trial in study.trials]
    assert [len(processes) for processes in ran] == [1, 2, 1, 1, 1, 1]
    assert {processes[-1] for processes in ran[1:]} == {os.getpid(), other.pid}
    starts = json.loads((tmp_path / "runs/search/trial_0001/run.json").read_text())["starts"]
    assert len(starts) == 2
    alone = search(n_trials=2, directory="alone")
    assert outcomes(study)[:2] == outcomes(alone)


@pytest.mark.once
def test_a_trial_that_another_process_runs_is_left_alone(tmp_path):
    (tmp_path / "runs" / "search" / "trial_0000").mkdir(parents=True)
    other = optuna.create_study(study_name="search", storage=DATABASE)
    rate = other.ask().suggest_float("rate", 1e-3, 0.3, log=True)
    with filelock.FileLock(tmp_path / "runs" / "search" / "trial_0000" / "trial.lock"):
        study = search(n_trials=2, storage=DATABASE)
        assert [t.state for t in study.trials] == [State.RUNNING, State.COMPLETE]
    study = search(n_trials=2, storage=DATABASE)
    assert [t.state for t in study.trials] == [State.COMPLETE, State.COMPLETE]
    assert study.trials[0].params == {"rate": rate}


@pytest.mark.once
def test_a_killed_trial_that_cannot_continue_fails_and_the_search_goes_on(caplog):
    interrupts = [True]

    def make(trial, width=3):
        trainer = regression(0.1, At(0, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        return trainer if interrupts.pop() else other(trial)

    def other(trial):
        trainer = regression(0.1)
        trainer.model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        return trainer

    with pytest.raises(SystemExit):
        search(make, 2, storage=DATABASE)
    study = search(other, 2, storage=DATABASE)
    assert [t.state for t in study.trials] == [State.FAIL, State.COMPLETE]
    assert "CheckpointError" in study.trials[0].user_attrs["why"]


class OutOfMemoryError(RuntimeError):
    """As PyTorch names it."""


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteError("the loss is NaN"),
        MemoryError(),
        OutOfMemoryError("no room"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.once
def test_trials_fail_without_memory_or_with_nan_and_the_search_goes_on(error):
    def make(trial):
        if trial.number == 0:
            raise error
        raise optuna.TrialPruned("too large")

    study = search(make, 2)
    assert [t.state for t in study.trials] == [State.FAIL, State.PRUNED]
    assert study.trials[0].user_attrs["why"] == f"{type(error).__name__}: {error}"
    assert study.trials[1].user_attrs["why"] == "too large"


def test_a_diverging_trial_fails():
    study = search(lambda trial: regression([np.inf, 0.1][trial.number]), 2)
    assert [t.state for t in study.trials] == [State.FAIL, State.COMPLETE]
    assert study.trials[0].user_attrs["why"].startswith("NonFiniteError")
    (trial,) = search(
        lambda trial: regression(np.inf), 1, study_name="b", on_nonfinite="ignore"
    ).trials
    why = "NonFiniteError: The trial has no value: val_loss is not finite."
    assert (trial.state, trial.user_attrs["why"]) == (State.FAIL, why)
    assert Path("runs/search/trial_0000/log.txt").exists()


@pytest.mark.once
def test_another_error_ends_the_search_unless_it_is_caught():
    def make(trial):
        return regression(0.1) if trial.number else {}["no such key"]

    with pytest.raises(KeyError):
        search(make, 2, storage=DATABASE)
    assert [t.state for t in search(make, 1, storage=DATABASE).trials] == [State.FAIL]
    study = search(make, 1, study_name="caught", catch=KeyError)
    assert [t.state for t in study.trials] == [State.FAIL]


def test_no_trial_is_kept_in_memory():
    references, counts = [], []

    def make(trial):
        gc.collect()
        counts.append(sum(issubclass(type(o), keras.Variable) for o in gc.get_objects()))
        trainer = make_trainer(trial)
        references.extend(map(weakref.ref, (trainer, trainer.model, trainer.optimizer)))
        return trainer

    search(make, 4, run_eagerly=False)
    gc.collect()
    assert not any(reference() for reference in references)
    assert len(set(counts)) == 1
    assert len(cleared) == 4 * (keras.backend.backend() == "jax")


@pytest.mark.once
def test_freeing_memory_keeps_the_settings_of_keras():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        policies = []

        def make(trial):
            policies.append(keras.config.dtype_policy().name)
            raise optuna.TrialPruned

        search(make, 2)
        assert policies == ["mixed_bfloat16"] * 2
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.once
def test_trials_may_suggest_epochs_data_and_callbacks():
    def make(trial):
        trainer = make_trainer(trial)
        rows = trial.suggest_categorical("rows", [8])
        few = from_arrays((X[:rows], Y[:rows]), rows)
        trainer.changing_train_config(epochs=trial.suggest_int("epochs", 2, 2), tf_dataset=few)
        return trainer

    study = search(make, 1, epochs=9)
    assert len(study.trials[0].intermediate_values) == 2
    facts = json.loads(Path("runs/search/trial_0000/run.json").read_text())
    assert facts["data"]["batch"][0] == "float32 [8, 3]"


def test_the_last_value_and_the_highest():
    last = search(lambda t: regression(0.1), 1, metric="val_loss", value="last", study_name="a")
    (trial,) = last.trials
    assert trial.value == trial.intermediate_values[EPOCHS - 1]
    high = search(lambda t: regression(0.1), 1, direction="maximize", study_name="b")
    assert high.trials[0].value == max(trial.intermediate_values.values())
    best = keras.models.load_model("runs/b/trial_0000/best.keras")
    error = np.mean((keras.ops.convert_to_numpy(best(X)) - Y) ** 2)
    assert error == pytest.approx(high.best_value, rel=1e-4)


@pytest.mark.once
def test_no_trial_begins_after_the_timeout():
    def make(trial):
        now.append(now[-1] + 10)
        raise optuna.TrialPruned

    now = [0.0]
    study = search(make, 9, timeout_secs=25, clock=lambda: now[-1])
    assert len(study.trials) == 3


@pytest.mark.once
def test_enqueued_trials_come_first_and_the_report_lists_all():
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(study_name="search", storage=storage)
    study.enqueue_trial({"rate": 0.25})

    def make(trial):
        rate = trial.suggest_float("rate", 1e-3, 0.3)
        if trial.number == 1:
            raise NonFiniteError("a | b\nand more")
        return regression(rate)

    study = search(make, 3, storage=storage)
    assert study.trials[0].params == {"rate": 0.25}
    table = Path("runs/search/report.md").read_text()
    assert table == hpo.report(study)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[0] == ["trial", "state", "value", "epochs", "secs", "rate", "why"]
    assert [line[1] for line in lines[2:]] == ["complete", "complete", "fail"]
    assert lines[2][0] == str(study.best_trial.number)
    assert float(lines[2][2]) == pytest.approx(study.best_value, rel=1e-4)
    assert lines[-1][-1] == "NonFiniteError: a / b"


@pytest.mark.once
def test_the_table_holds_names_and_values_of_any_text():
    study = optuna.create_study()
    trial = study.ask()
    trial.suggest_categorical("a | b", ["c | d\ne"])
    study.tell(trial, 1.0)
    header, _, row = hpo.report(study).splitlines()
    assert header.count("|") == row.count("|") == 8
    assert "a / b" in header
    assert "c / d" in row


@pytest.mark.once
def test_a_folder_of_another_study_raises(tmp_path):
    (tmp_path / "runs" / "search" / "trial_0000").mkdir(parents=True)
    with pytest.raises(ValueError, match="trial_0000 is there already, of another study"):
        search()


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_trials": 0}, "n_trials must be a positive integer, got 0"),
        ({"metric": "val_height"}, 'direction must be "minimize" or "maximize" for the metric'),
        ({"direction": "min"}, "got 'min'"),
        ({"value": "mean"}, 'value must be "best" or "last", got \'mean\''),
        ({"epoch": 3}, "train takes no argument 'epoch'. Did you mean 'epochs'"),
        ({"make": lambda trial: None}, "make_trainer must return a trainer, got None"),
        ({"metric": "val_f1"}, "no value named 'val_f1' to monitor"),
        ({"n_trials": None}, "got None. Where timeout_secs is to end the search"),
        ({"metric": 3}, "metric must be the name of a value in the logs, got 3"),
        ({"study_name": ""}, "study_name must not be empty"),
        ({"storage": 3}, "storage must be a URL or a storage of Optuna, got 3"),
        ({"sampler": "tpe"}, "sampler must be a sampler of Optuna, got 'tpe'"),
        ({"pruner": "median"}, "pruner must be a pruner of Optuna, got 'median'"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
        ({"timeout_secs": "a"}, "timeout_secs must be a number of seconds, got 'a'"),
        ({"timeout_secs": -1}, "timeout_secs must be a number of seconds, got -1"),
        ({"catch": "ValueError"}, "catch must be an exception class or a tuple of them"),
        ({"run_dir": "a"}, "search takes no run_dir. Each trial has its own. Pass directory="),
        ({"resume": "a"}, "search takes no resume. The same call of search continues"),
        ({"dry_run": True}, "search takes no dry_run. A trial of two steps has no value"),
    ],
    ids=str,
)
def test_arguments_that_make_no_search_raise(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        search(**arguments)


@pytest.mark.once
def test_processes_that_train_together_do_not_search(monkeypatch):
    """Each would take another trial, and wait for the others in its first step."""
    placement = Placement()
    placement.count = 2
    monkeypatch.setattr(backend, "placement", lambda: placement)
    with pytest.raises(NotImplementedError, match=r"in 2 processes.*without the launcher"):
        hpo.search(lambda trial: None, 1, storage=None)


def test_a_study_of_another_metric_or_direction_raises():
    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(ValueError, match="no value named 'val_los' to monitor"):
        search(n_trials=1, metric="val_los", direction="minimize", storage=storage)
    search(n_trials=2, storage=storage)  # nothing has a value of the wrong name
    with pytest.raises(ValueError, match="this search is for 'loss'"):
        search(metric="loss", storage=storage)
    with pytest.raises(ValueError, match="is to minimize, and 'val_accuracy' is to be maximized"):
        search(metric="val_accuracy", storage=storage)


@pytest.mark.once
def test_choices_that_json_has_no_word_for():
    def make(trial):
        trial.suggest_categorical("activation", [keras.activations.relu])
        return regression(0.1)

    with pytest.warns(UserWarning, match="for persistent storage"):
        search(make, 1)
    params = json.loads(Path("runs/search/trial_0000/params.json").read_text())["params"]
    assert "relu" in params["activation"]


@pytest.mark.once
def test_a_metric_that_is_never_measured_raises():
    def make(trial):
        trainer = regression(0.1)
        trainer.changing_train_config(callbacks=[ValidationDataCallback(data(), every_epochs=9)])
        return trainer

    with pytest.raises(ValueError, match="The trial has no value: val_loss was never measured"):
        search(make)


@pytest.mark.once
def test_without_optuna_the_message_says_how_to_install_it():
    code = "import sys; sys.modules['optuna'] = None; import polus; polus.hpo"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "polus.hpo requires optuna. Run `pip install optuna`" in process.stderr


# ---------------------------------------------------------------------- the names of polus 0.1


@pytest.mark.once
def test_programs_of_polus_0_1():
    def init_trainer():
        rate = hpo.parameter(0.1, lambda trial: trial.suggest_float("rate", 1e-3, 0.3, log=True))
        rates.append(rate)
        trainer = regression(rate, hpo.HPOPruneCallback("val", "loss"))
        trainer.changing_train_config(epochs=EPOCHS, run_eagerly=True)
        return trainer

    rates = []
    assert hpo.parameter(0.1, lambda trial: trial.suggest_float("rate", 1e-3, 0.3)) == 0.1
    sampler = optuna.samplers.RandomSampler(7)
    with hpo.HPO_Objective(init_trainer, "val", "loss", add_pruning_cb=False) as objective:
        objective.change_optuna_config(n_trials=2, direction="minimize", sampler=sampler)
    theirs = optuna.create_study(sampler=optuna.samplers.RandomSampler(7))
    theirs.optimize(by_hand, n_trials=2)
    assert rates == [trial.params["rate"] for trial in theirs.trials]
    assert objective.study.best_value == pytest.approx(theirs.best_value, rel=1e-4)
    with contextlib.suppress(ZeroDivisionError), hpo.HPO_Objective(init_trainer, "val", "loss"):
        raise ZeroDivisionError  # which begins no search
    assert len(rates) == 2
