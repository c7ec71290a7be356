"""The range test: right on curves with known answers, and without a trace on the training."""

import contextlib
import io
import itertools
import json
import logging
import math
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from rich.console import Console

from polus.callbacks.base import Callback
from polus.core import get_jit_compile, set_jit_compile
from polus.data import from_arrays
from polus.lr_finder import (
    SUGGESTIONS,
    LRFinderResult,
    has_descent,
    highest_allowed,
    main,
    minimum,
    remove_batch_noise,
    slide,
    smooth,
    steep,
    valley,
)
from polus.metrics import Accuracy
from polus.state import random_state
from polus.training import BaseTrainer, ClassifierTrainer

RATES = np.geomspace(1e-7, 10, 81)  # ten steps per power of ten
X = np.log10(RATES)
FASTAI = json.loads((Path(__file__).parent / "data" / "fastai_suggestions.json").read_text())


def curve(falls_at: float, lowest_at: float, noise: float = 0.0) -> np.ndarray:
    """A loss of 2 that falls to 1 around one power of ten and diverges from another on."""
    clean = 2 - 1 / (1 + np.exp(-8 * (X - falls_at))) + 10 ** (3 * (X - lowest_at) - 2)
    return clean + noise * np.random.default_rng(0).normal(size=len(X))


# The suggestions


def test_minimum_is_a_tenth_of_the_rate_with_the_lowest_loss():
    assert minimum(RATES, np.abs(X + 2)) == pytest.approx(1e-3)


def test_steep_is_where_the_loss_falls_most_per_log_rate_and_not_per_rate():
    losses = np.interp(X, [-7, -4, -3, -1, 1], [3, 3, 2, 1, 5])
    assert steep(RATES, losses) == pytest.approx(1e-4)


def test_steep_ignores_what_falls_after_the_minimum():
    losses = np.interp(X, [-7, -4, -3, 0, 0.1, 1], [3, 3, 2, 100, 2.5, 2.5])
    assert steep(RATES, losses) == pytest.approx(1e-4)


@pytest.mark.parametrize("step", [0, 10, 30])
def test_valley_is_half_a_third_after_the_first_third_of_the_longest_descent(step):
    losses = np.full(81, 10.0)
    losses[step : step + 30] = np.arange(30, 0, -1) / 10  # 30 falling steps, 31 with the one before
    start = step + 29 - (31 if step else 30)
    assert valley(RATES, losses) == RATES[start + 10 + 5]


def test_valley_takes_the_descent_that_ends_first():
    losses = np.r_[[9.0] * 20, np.arange(9, 3, -1), [9.0] * 20, np.arange(9, 3, -1), [9.0] * 29]
    assert valley(RATES, losses) == RATES[25 - 6 + 2 + 1]


def test_slide_is_the_left_end_of_the_last_interval_with_different_slopes():
    losses = np.interp(X, [-7, -3, 1], [2, 2, 1])  # the slope changes at step 40
    # From the right: two ends on the descent are alike at once.
    assert slide(RATES, losses) == RATES[80 - 15]
    losses = np.r_[losses[:60], 2 + np.arange(21) ** 2 / 100]  # the last 21 steps diverge
    # The right end leaves the divergence at step 59, where the central slope still feels it.
    assert slide(RATES, losses) == RATES[59 - 15]


@pytest.mark.parametrize("recorded", FASTAI.values(), ids=FASTAI)
def test_suggestions_equal_fastai_on_recorded_curves(recorded):
    rates, losses = np.array(recorded["rates"]), np.array(recorded["losses"])
    ours = {name: SUGGESTIONS[name](rates, losses) for name in recorded["suggestions"]}
    assert ours == pytest.approx(recorded["suggestions"], rel=1e-6)


def test_valley_is_found_in_less_than_quadratic_time():
    """A quadratic search would compare ten thousand million pairs here."""
    n = 100_000
    descent = np.linspace(2, 1, n)
    assert valley(np.geomspace(1e-7, 10, n), descent) == pytest.approx(1e-3, rel=1e-3)


# Smoothing


@pytest.mark.parametrize("losses", [np.ones_like(X), X, 3 - 2 * X], ids=["constant", "up", "down"])
@pytest.mark.parametrize("every", [1, 20])
def test_smoothing_leaves_straight_lines_what_they_are_up_to_their_ends(losses, every):
    rates, losses = RATES[::every], losses[::every]
    np.testing.assert_allclose(smooth(rates, losses), losses, rtol=1e-12, atol=1e-12)


def test_smoothing_does_not_lag():
    bump = np.exp(-((X + 3) ** 2) * 4)
    assert smooth(RATES, bump).argmax() == bump.argmax()


def test_smoothing_takes_noise_away():
    noise = np.random.default_rng(0).normal(size=81)
    assert smooth(RATES, noise)[5:-5].std() < noise.std() / 2


# The noise of batches


HARDNESS = np.random.default_rng(0).gamma(2, 0.5, size=81)  # of the batches, before training
CLEAN = 2 - 1 / (1 + np.exp(-3 * (X + 3)))


def test_what_the_batches_do_is_taken_off_the_losses():
    level = HARDNESS.mean()
    cleared = remove_batch_noise(RATES, CLEAN + HARDNESS, HARDNESS)
    assert np.abs(cleared - CLEAN - level).max() < 0.1 * HARDNESS.std()
    # Half of it, where the losses follow the baseline by half.
    cleared = remove_batch_noise(RATES, CLEAN + HARDNESS / 2, HARDNESS)
    assert np.abs(cleared - CLEAN - level / 2).max() < 0.1 * HARDNESS.std()


@pytest.mark.parametrize(
    ("losses", "baseline"),
    [(CLEAN + HARDNESS, np.ones(81)), (CLEAN - HARDNESS, HARDNESS)],
    ids=["equally hard", "the other way round"],
)
def test_nothing_is_taken_off_where_the_losses_do_not_follow_the_baseline(losses, baseline):
    np.testing.assert_array_equal(remove_batch_noise(RATES, losses, baseline), losses)


def test_a_fall_below_the_noise_of_batches_is_seen_by_their_baseline():
    losses = CLEAN / 5 + HARDNESS
    with pytest.raises(ValueError, match="never fell by more than its noise"):
        _ = LRFinderResult(RATES, losses).suggestion
    result = LRFinderResult(RATES, losses, baseline=HARDNESS)
    assert result.suggestion == pytest.approx(1e-3, rel=0.6)
    assert result.to_dict()["baseline"] == HARDNESS.tolist()
    assert result.losses.tolist() == losses.tolist()


def test_a_hard_last_batch_is_no_divergence():
    flat = np.roll(HARDNESS, 80 - HARDNESS.argmax())
    with pytest.raises(ValueError, match="never fell"):
        _ = LRFinderResult(RATES, flat, baseline=flat).suggestion


def test_a_baseline_that_is_not_finite_is_left_out():
    baseline = np.where(np.arange(81) == 40, np.nan, HARDNESS)
    result = LRFinderResult(RATES, curve(-3, -0.5), baseline=baseline)
    assert result.suggestions == LRFinderResult(RATES, curve(-3, -0.5)).suggestions
    assert result.to_dict()["baseline"][40] is None


@pytest.mark.parametrize("noise", [np.ones(81), np.geomspace(0.01, 1, 81)], ids=["even", "growing"])
def test_pure_noise_does_not_fall(noise):
    curves = 1 + noise * np.random.default_rng(0).normal(size=(400, 81))
    assert sum(has_descent(RATES, losses) for losses in curves) <= 8


# The result


def test_result_suggests_from_the_smoothed_curve_and_is_readable():
    result = LRFinderResult(RATES, curve(-3, -0.5, noise=0.05))
    assert result.suggestion == result.suggestions["steep"]
    assert list(result.suggestions) == ["steep", "valley", "slide", "minimum"]
    assert 3e-4 < result.suggestion < 3e-3
    assert 3e-4 < result.suggestions["valley"] < 3e-3
    assert repr(result).startswith("LRFinderResult(81 steps from 1.0e-07 to 1.0e+01, suggestion=")
    assert f"valley={result.suggestions['valley']:.2e}" in repr(result)


def test_result_suggests_by_the_method_that_was_asked_for():
    result = LRFinderResult(RATES, curve(-3, -0.5), "minimum")
    assert result.suggestion == result.suggestions["minimum"]


def test_result_knows_its_suggestions_by_name():
    with pytest.raises(ValueError, match="no suggestion 'vally': did you mean 'valley'"):
        LRFinderResult(RATES, X, "vally")


@pytest.mark.parametrize("last", [np.nan, np.inf, -np.inf])
def test_result_reads_a_curve_up_to_the_first_loss_that_is_not_finite(last):
    losses = curve(-3, -0.5)
    cut = LRFinderResult(RATES[:71], np.append(losses[:70], last))
    assert cut.suggestions == LRFinderResult(RATES[:70], losses[:70]).suggestions
    assert np.isnan(cut.smoothed_losses[-1])
    assert len(cut.smoothed_losses) == 71
    values = json.loads(json.dumps(cut.to_dict(), allow_nan=False))
    assert values["losses"] == [*losses[:70], None]
    assert values["method"] == "steep"
    assert values["suggestions"] == cut.suggestions
    assert values["rates"] == RATES[:71].tolist()


@pytest.mark.parametrize(
    ("losses", "seen"),
    [
        (np.ones(81), "never fell .* larger end_lr"),
        (1 + np.random.default_rng(0).normal(size=81), "never fell .* larger end_lr"),
        (1 + 1e-7 * np.random.default_rng(0).normal(size=81), "never fell"),
        (1 + 10 ** (X + 2), "diverged before it fell .*1 at the rate 1.0e-07.* smaller start_lr"),
        (np.r_[np.ones(20), np.nan], "diverged before it fell"),
        (np.r_[np.ones(60), np.full(21, 1.3)], "diverged before it fell"),
        (np.r_[3, 2, np.nan], "diverged within 3 steps, 2 of them finite.*smaller start_lr"),
        ([np.nan], "diverged within 1 steps, 0 of them finite.*check the data for NaN"),
    ],
)
def test_a_curve_without_a_descent_gets_no_number(losses, seen):
    result = LRFinderResult(RATES[: len(losses)], losses)
    with pytest.raises(ValueError, match=seen):
        _ = result.suggestion
    assert result.suggestions == {}
    assert "no suggestion" in repr(result)
    result.plot()


# The picture


def test_plot_shows_and_names_everything(tmp_path):
    result = LRFinderResult(RATES, curve(-3, -0.5, noise=0.05))
    figure = result.plot(tmp_path / "lr.png")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [
        "raw",
        "smoothed",
        *(
            f"{name} {rate:.1e}" + " (chosen)" * (name == "steep")
            for name, rate in result.suggestions.items()
        ),
    ]
    picture = (tmp_path / "lr.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20]) == 800


def test_plot_leaves_pyplot_alone():
    import matplotlib.pyplot as plt

    before = plt.get_fignums(), plt.get_backend()
    LRFinderResult(RATES, curve(-3, -0.5)).plot()
    assert (plt.get_fignums(), plt.get_backend()) == before


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install polus\[plot\]"):
        LRFinderResult(RATES, X).plot()


# The sweep


class Slope(BaseTrainer):
    """Its loss is its only weight: each step lowers it by the rate."""

    def __init__(self, optimizer, start=0.0, power=1):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        model.set_weights([np.full((1, 1), start)])
        super().__init__(model, optimizer, lambda x, weight: weight**power)

    def forward_with_grads(self, x):
        return x, ops.sum(self.model.weights[0])


ONES = [np.ones((2, 1), "float32")] * 3


@pytest.mark.parametrize(
    "rate",
    [0.5, keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5), lambda: 0.5],
    ids=["number", "schedule", "callable"],
)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scaling"])
def test_each_step_is_made_at_its_rate(rate, scaled):
    optimizer = inner = keras.optimizers.SGD(rate)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(inner)
    held = inner._learning_rate
    result = Slope(optimizer).lr_finder(ONES, start_lr=1e-3, end_lr=1, num_steps=31)
    np.testing.assert_allclose(result.rates, np.geomspace(1e-3, 1, 31))
    expected = -np.append(0, np.cumsum(result.rates)[:-1])
    np.testing.assert_allclose(result.losses, expected, rtol=1e-5)
    assert inner._learning_rate is held
    assert float(inner.learning_rate) == 0.5


def test_a_schedule_decays_after_the_sweep_as_it_did_before():
    schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 1, 0.5)
    trainer = Slope(keras.optimizers.SGD(schedule))
    trainer.train_step(ONES[0])
    trainer.lr_finder(ONES, num_steps=16)
    for _ in range(3):
        trainer.train_step(ONES[0])
    assert trainer.model.get_weights()[0].item() == -1.875  # 1 + 1/2 + 1/4 + 1/8


class Uneven(Slope):
    """The loss of a batch is its own mean above the weight."""

    def forward_with_grads(self, x):
        return x, ops.sum(self.model.weights[0]) + ops.mean(x)


def test_the_baseline_is_what_the_same_batches_lose_at_the_rate_zero(monkeypatch):
    batches = [np.full((2, 1), h, "float32") for h in HARDNESS[:30]]
    trainer = Uneven(keras.optimizers.Adam())
    result = trainer.lr_finder(batches, start_lr=1e-4, end_lr=1e-1, num_steps=60)
    np.testing.assert_array_equal(result.baseline, np.float32([*HARDNESS[:30]] * 2))
    assert result.losses[-1] < result.baseline[-1] - 0.1
    assert 1e-4 < result.suggestion <= 1e-1
    monkeypatch.setattr("polus.lr_finder.sweep.MAX_BYTES", 60 * 8 - 1)
    without = trainer.lr_finder(batches, start_lr=1e-4, end_lr=1e-1, num_steps=60)
    assert without.baseline is None
    np.testing.assert_array_equal(without.losses, result.losses)


def test_the_sweep_stops_where_the_smoothed_loss_diverges():
    # w**2 is multiplied by (1 - 2 rate)**2 at each step: it rises from the rate 1 on.
    result = Slope(keras.optimizers.SGD(), 1.0, 2).lr_finder(ONES)
    assert 1 < result.rates[-1] < 10
    smoothed = result.smoothed_losses
    first = np.argmax(smoothed > 4 * np.minimum.accumulate(smoothed))
    assert 0 < len(smoothed) - 1 - first <= 7  # seen when the window has passed it


def test_a_sweep_of_less_than_a_decade_stops_too():
    trainer = Slope(keras.optimizers.SGD(), 1.0, 2)
    result = trainer.lr_finder(ONES, start_lr=1.0, end_lr=1.2)
    assert 25 < len(result.losses) < 75
    assert np.isfinite(result.losses).all()


def test_the_bar_says_that_the_second_pass_is_of_no_rate(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    monkeypatch.setattr("polus.lr_finder.sweep.Console", lambda **arguments: console)
    Slope(keras.optimizers.SGD()).lr_finder(ONES, num_steps=16)
    assert "the same batches, untrained, loss" in out.getvalue()
    assert "rate 0.0e+00" not in out.getvalue()


def test_the_sweep_stops_at_a_loss_that_is_not_finite():
    trainer = Slope(keras.optimizers.SGD(), 1.0, 2)
    result = trainer.lr_finder(ONES, end_lr=1e30, stop_factor=math.inf)
    assert not np.isfinite(result.losses[-1])
    assert np.isfinite(result.losses[:-1]).all()
    assert len(result.losses) < 100


@pytest.mark.parametrize(
    ("losses", "limit"),
    [
        ([3, 0.5, 1], 2.0),
        ([-1], 2.0),  # its own size thrice
        ([2, -1], 8.0),  # the fall of 3 thrice
        ([-1, -5], 10.0),
        ([0], 0.0),
    ],
)
def test_a_loss_may_rise_by_the_stop_factor_also_below_zero(losses, limit):
    assert highest_allowed(losses, stop_factor=4) == limit


def test_use_lr_found_sets_the_rate_and_says_so(caplog):
    trainer = Slope(keras.optimizers.SGD(0.25), 1.0, 2)
    logging.getLogger("polus").propagate = True
    with caplog.at_level(logging.INFO, logger="polus"):
        result = trainer.lr_finder(ONES, use_lr_found=True, suggestion="valley")
    rate = result.suggestion
    assert float(trainer.optimizer.learning_rate) == pytest.approx(rate)
    assert f"Learning rate: 0.25 before, {rate:.3g} found." in caplog.text
    trainer.train(ONES, epochs=1)
    assert trainer.model.get_weights()[0].item() == pytest.approx((1 - 2 * rate) ** 3, rel=1e-4)


def test_use_lr_found_leaves_the_rate_where_the_curve_suggests_nothing():
    trainer = Slope(keras.optimizers.SGD(0.25), 1.0, 2)
    with pytest.raises(ValueError, match="no learning rate to suggest: the loss never fell"):
        trainer.lr_finder(ONES, use_lr_found=True, start_lr=1e-12, end_lr=1e-10)
    assert float(trainer.optimizer.learning_rate) == 0.25


def test_a_rate_found_is_not_set_on_a_schedule():
    trainer = Slope(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 10)))
    with pytest.raises(ValueError, match=r"schedule\. .*CosineDecay\(result.suggestion"):
        trainer.lr_finder(ONES, use_lr_found=True)


class Pair(BaseTrainer):
    """Two weights, two optimizers, a step of its own that returns terms."""

    def __init__(self):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.set_weights([np.zeros((1, 1)), np.zeros(1)])
        super().__init__(model, keras.optimizers.SGD(0.5), lambda: 0)
        self.second = keras.optimizers.SGD(0.25)

    def train_step(self, x):
        first, second = self.model.weights
        a = self.minimize(lambda: ops.sum(first), [first])
        b = self.minimize(lambda: ops.sum(second), [second], self.second)
        return {"loss": a + b, "second": b}


def test_any_of_several_optimizers_can_be_swept():
    trainer = Pair()
    rates = np.geomspace(1e-3, 1e-1, 16)
    settings = {"start_lr": 1e-3, "end_lr": 1e-1, "num_steps": 16, "stop_factor": math.inf}
    steps, swept = np.arange(16), np.append(0, np.cumsum(rates)[:-1])
    default = trainer.lr_finder(ONES, **settings)
    np.testing.assert_allclose(default.losses, -swept - 0.25 * steps, rtol=1e-5)
    second = trainer.lr_finder(ONES, **settings, optimizer=trainer.second)
    np.testing.assert_allclose(second.losses, -swept - 0.5 * steps, rtol=1e-5)
    assert all(not weight.any() for weight in trainer.model.get_weights())
    with pytest.raises(ValueError, match="does not use the optimizer 'adam"):
        trainer.lr_finder(ONES, optimizer=keras.optimizers.Adam())
    with pytest.raises(TypeError, match=r"the keras.optimizers.Optimizer to sweep.* got 'sgd'"):
        trainer.lr_finder(ONES, optimizer="sgd")


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"start_lr": 0}, "rises from start_lr to end_lr, but got 0 and 10"),
        ({"start_lr": 1, "end_lr": 0.1}, "rises from start_lr to end_lr"),
        ({"num_steps": 15}, "at least 16, but got 15"),
        ({"num_steps": 20.5}, "integer of at least 16"),
        ({"stop_factor": 1}, "stop_factor is above 1"),
        ({"suggestion": "sharp"}, "no suggestion 'sharp': there are steep, valley"),
        ({"tf_dataset": None}, "lr_finder needs a dataset"),
        ({"tf_dataset": []}, "gave no batch"),
        ({"tf_dataset": iter(ONES)}, "What is read from a list_iterator is gone"),
    ],
)
def test_arguments_that_make_no_sweep_are_refused(arguments, seen):
    with pytest.raises(ValueError, match=seen):
        Slope(keras.optimizers.SGD()).lr_finder(**{"tf_dataset": ONES, **arguments})


# No trace


INPUTS = (
    np.random.default_rng(0).normal(size=(44, 6)).astype("float32")
)  # the last batch is smaller
LABELS = (INPUTS.sum(axis=1) > 0).astype("int32")


def tensorflow_data():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((INPUTS, LABELS)).shuffle(40, seed=1).batch(8)


def data_loader():
    import torch

    data = torch.utils.data.TensorDataset(torch.tensor(INPUTS), torch.tensor(LABELS))
    torch.manual_seed(1)
    return torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)


def generator_function():
    def batches():
        for _ in range(5):  # draws from NumPy's and Python's global generators
            rows = np.random.permutation(40)[random.randrange(32) :][:8]
            yield INPUTS[rows], LABELS[rows]

    return batches


DATASETS = {
    "arrays": lambda: from_arrays((INPUTS, LABELS), 8),
    "tf.data": tensorflow_data,
    "DataLoader": data_loader,
    "function": generator_function,
}


@contextlib.contextmanager
def compiled_in_one_way():
    """Measured, two runs might be compiled differently, and differ in the last bit."""
    before = get_jit_compile()
    set_jit_compile(keras.config.backend() == "jax")
    yield
    set_jit_compile(before)


@pytest.fixture(autouse=True)
def _one_way():
    with compiled_in_one_way():
        yield


def classifier(built=True):
    keras.utils.set_random_seed(7)
    stack = [keras.layers.Dense(8, "relu"), keras.layers.BatchNormalization()]
    stack += [keras.layers.Dropout(0.3), keras.layers.Dense(2, kernel_regularizer="l2")]
    model = keras.Sequential([keras.Input((6,)), *stack] if built else stack)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return ClassifierTrainer(model, keras.optimizers.Adam(0.01), loss, metrics=[Accuracy(2)])


def everything(trainer) -> list[np.ndarray]:
    metrics = [v for metric in trainer.metrics for v in metric.variables]
    kept = [*trainer.model.variables, *trainer.optimizer.variables, *metrics, trainer.step_counter]
    return [np.array(ops.convert_to_numpy(v)) for v in kept]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def flattened(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in keras.tree.flatten(state) if leaf is not None]


class Searcher(Callback):
    """Looks for a rate in the middle of an epoch and at its end; without data it does nothing."""

    def __init__(self, dataset=None):
        self.dataset = dataset

    def on_train_batch_end(self, epoch, step, loss):
        if self.dataset is not None and (epoch, step) == (0, 2):
            self.coordinator.trainer.lr_finder(self.dataset, num_steps=16)

    def on_epoch_end(self, epoch):
        self.on_train_batch_end(0, 2, None)


def trained(trainer, data, searcher) -> list[np.ndarray]:
    """Everything that two epochs leave behind."""
    history = trainer.train(data, 2, [searcher], steps_per_execution=1)
    logs = [history.steps["loss"], history.to_dict()["accuracy"]]
    return [*logs, *everything(trainer), *flattened(random_state())]


@pytest.fixture(scope="module", params=DATASETS)
def make(request):
    return DATASETS[request.param]


@pytest.fixture(scope="module")
def alone(make):
    with compiled_in_one_way():
        return trained(classifier(), make(), Searcher())


def test_training_is_the_same_with_sweeps_before_and_within(make, alone):
    trainer, data = classifier(), make()
    trainer.lr_finder(data, num_steps=20)  # longer than the data
    assert_equal(trained(trainer, data, Searcher(data)), alone)


def test_training_is_the_same_after_a_sweep_that_built_the_model(make, alone):
    trainer, data = classifier(built=False), make()
    trainer.lr_finder(data, num_steps=16)
    assert_equal(trained(trainer, data, Searcher()), alone)


def test_training_is_the_same_after_sweeps_that_an_error_and_ctrl_c_ended(make, alone):
    def sweep(fails):
        # The first batch is looked at once more, before the sweep.
        batches = iter(range(100))
        trainer.changing_train_config(
            custom_data_transform_f=lambda batch: fails(batch) if next(batches) == 37 else batch
        )
        trainer.optimizer.build(trainer.model.trainable_variables)
        before = [*everything(trainer), *flattened(random_state())]
        with pytest.raises((RuntimeError, KeyboardInterrupt)) as caught:
            trainer.lr_finder(data)
        assert_equal([*everything(trainer), *flattened(random_state())], before)
        assert next(batches) < 45
        return caught.type

    def broken(batch):
        raise RuntimeError

    def interrupted(batch):
        signal.raise_signal(signal.SIGINT)
        return batch

    trainer, data = classifier(), make()
    assert sweep(broken) is RuntimeError
    assert sweep(interrupted) is KeyboardInterrupt
    trainer.changing_train_config(custom_data_transform_f=None)
    assert_equal(trained(trainer, data, Searcher()), alone)


@pytest.mark.parametrize("look", ["lr_finder", "evaluate"])
def test_data_made_in_the_middle_of_it_draws_what_it_would_have_drawn(look):
    batches = [(INPUTS[i : i + 4], LABELS[i : i + 4]) for i in range(0, 40, 4)]

    def losses(looks):
        within, number = threading.Event(), itertools.count()

        def noisy(batch):
            if looks and next(number) == 3:
                within.wait(0.5)  # in vain: nobody looks while a batch is made
            return batch[0] + np.random.normal(size=(4, 6)).astype("float32"), batch[1]

        def seen():
            yield from batches[:3]
            within.set()
            yield from 4 * batches

        class Looker(Callback):
            def on_train_batch_end(self, epoch, step, loss):
                if looks and step == 0:
                    getattr(self.coordinator.trainer, look)(seen)

        trainer = classifier()
        history = trainer.train(batches, 1, [Looker()], noisy, steps_per_execution=1)
        return history.steps["loss"]

    np.testing.assert_array_equal(losses(True), losses(False))


def test_a_dataset_may_evaluate_while_it_makes_a_batch():
    trainer, seen = classifier(), []

    def batches():
        yield INPUTS[:4], LABELS[:4]
        seen.append(trainer.evaluate([(INPUTS[:4], LABELS[:4])]))  # the lock is this thread's own
        yield INPUTS[4:8], LABELS[4:8]

    trainer.train(batches, 1, steps_per_execution=1)
    assert len(seen) == 1


def test_a_metric_that_was_never_fed_is_not_fed_by_a_sweep():
    trainer = classifier()
    trainer.lr_finder(DATASETS["arrays"](), num_steps=16)
    assert not trainer.metrics[0].has_samples


def test_the_baseline_has_the_random_numbers_of_the_sweep():
    data = DATASETS["arrays"]()
    result = classifier().lr_finder(data, start_lr=1e-31, end_lr=1e-30, num_steps=16)
    np.testing.assert_array_equal(result.losses, result.baseline)
    assert len(np.unique(result.baseline)) > 8


def test_no_callback_hears_of_a_sweep_and_no_file_is_written(tmp_path, monkeypatch):
    class Deaf(Callback):
        def __getattribute__(self, name):
            raise AssertionError(name)

    monkeypatch.chdir(tmp_path)
    trainer = classifier()
    trainer.changing_train_config(
        tf_dataset=from_arrays((INPUTS, LABELS), 8), callbacks=[Deaf()], epochs=1
    )
    trainer.lr_finder(num_steps=20)
    assert not list(tmp_path.iterdir())


# From the shell


PROGRAM = """
import keras, numpy as np
from polus.training import ClassifierTrainer

def init_trainer():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    x = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    trainer = ClassifierTrainer(model, keras.optimizers.SGD(), keras.losses.MeanSquaredError())
    trainer.changing_train_config(tf_dataset=[(x, x.sum(axis=1, keepdims=True))])
    return trainer
"""


def test_the_shell_gets_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    (tmp_path / "lr_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    path = str(tmp_path / "lr.png")
    assert main(["lr_program:init_trainer", "--plot", path, "--suggestion", "valley"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*SUGGESTIONS, "picture:"]
    assert lines[1].endswith("(suggested)")
    assert Path(path).read_bytes().startswith(b"\x89PNG")
    flat = ["--start-lr", "1e-12", "--end-lr", "1e-10"]
    assert main(["lr_program:init_trainer", "--plot", path, *flat]) == 1
    assert "no learning rate to suggest: the loss never fell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        ("lr_program:trainer", "the module 'lr_program' has no function 'trainer'"),
        ("lr_programs:init_trainer", "there is no module 'lr_programs' here"),
        ("builtins:list", "builtins:list returns a trainer, but gave []"),
    ],
)
def test_the_shell_says_what_is_no_function_that_returns_a_trainer(
    function, seen, tmp_path, monkeypatch, capsys
):
    (tmp_path / "lr_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        main([function])
    assert seen in capsys.readouterr().err


def test_the_module_runs(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "polus.lr_finder", "package.module"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "write package.module:function, not 'package.module'" in done.stderr
