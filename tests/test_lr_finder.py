"""The range test reads curves with known answers correctly and leaves training unchanged."""

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
    minimum,
    remove_batch_noise,
    slide,
    smooth,
    steep,
    valley,
)
from polus.lr_finder.__main__ import main
from polus.metrics import Accuracy
from polus.state import random_state
from polus.training import BaseTrainer, ClassifierTrainer

RATES = np.geomspace(1e-7, 10, 81)  # ten steps per power of ten
X = np.log10(RATES)
FASTAI = json.loads((Path(__file__).parent / "data" / "fastai_suggestions.json").read_text())


def curve(falls_at: float, lowest_at: float, noise: float = 0.0) -> np.ndarray:
    """Returns a loss that falls from 2 to 1 at one power of ten and diverges at another."""
    clean = 2 - 1 / (1 + np.exp(-8 * (X - falls_at))) + 10 ** (3 * (X - lowest_at) - 2)
    return clean + noise * np.random.default_rng(0).normal(size=len(X))


# The suggestions


def test_minimum_is_a_tenth_of_the_rate_with_the_lowest_loss():
    assert minimum(RATES, np.abs(X + 2)) == pytest.approx(1e-3)


def test_steep_is_the_steepest_point_per_log_rate():
    losses = np.interp(X, [-7, -4, -3, -1, 1], [3, 3, 2, 1, 5])
    assert steep(RATES, losses) == pytest.approx(1e-4)


def test_steep_ignores_falls_after_the_minimum():
    losses = np.interp(X, [-7, -4, -3, 0, 0.1, 1], [3, 3, 2, 100, 2.5, 2.5])
    assert steep(RATES, losses) == pytest.approx(1e-4)


@pytest.mark.parametrize("step", [0, 10, 30])
def test_valley_is_in_the_middle_third_of_the_longest_descent(step):
    losses = np.full(81, 10.0)
    losses[step : step + 30] = np.arange(30, 0, -1) / 10  # 30 falling steps, 31 with the one before
    start = step + 29 - (31 if step else 30)
    assert valley(RATES, losses) == RATES[start + 10 + 5]


def test_valley_of_equal_descents_is_in_the_first():
    losses = np.r_[[9.0] * 20, np.arange(9, 3, -1), [9.0] * 20, np.arange(9, 3, -1), [9.0] * 29]
    assert valley(RATES, losses) == RATES[25 - 6 + 2 + 1]


def test_slide_is_the_left_end_of_the_interval_where_slopes_become_equal():
    losses = np.interp(X, [-7, -3, 1], [2, 2, 1])  # the slope changes at step 40
    # Both ends start on the descent, where slopes are equal at once.
    assert slide(RATES, losses) == RATES[80 - 15]
    losses = np.r_[losses[:60], 2 + np.arange(21) ** 2 / 100]  # the last 21 steps diverge
    # The right end leaves the divergence at step 59, whose central difference still includes it.
    assert slide(RATES, losses) == RATES[59 - 15]


@pytest.mark.parametrize("recorded", FASTAI.values(), ids=FASTAI)
def test_suggestions_match_fastai_on_recorded_curves(recorded):
    rates, losses = np.array(recorded["rates"]), np.array(recorded["losses"])
    ours = {name: SUGGESTIONS[name](rates, losses) for name in recorded["suggestions"]}
    assert ours == pytest.approx(recorded["suggestions"], rel=1e-6)


def test_valley_of_a_long_curve_does_not_take_quadratic_time():
    """A quadratic search would compare ten billion pairs here."""
    n = 100_000
    descent = np.linspace(2, 1, n)
    assert valley(np.geomspace(1e-7, 10, n), descent) == pytest.approx(1e-3, rel=1e-3)


# Smoothing


@pytest.mark.parametrize("losses", [np.ones_like(X), X, 3 - 2 * X], ids=["constant", "up", "down"])
@pytest.mark.parametrize("every", [1, 20])
def test_smoothing_preserves_straight_lines_including_their_ends(losses, every):
    rates, losses = RATES[::every], losses[::every]
    np.testing.assert_allclose(smooth(rates, losses), losses, rtol=1e-12, atol=1e-12)


def test_smoothing_does_not_lag():
    bump = np.exp(-((X + 3) ** 2) * 4)
    assert smooth(RATES, bump).argmax() == bump.argmax()


def test_smoothing_reduces_noise():
    noise = np.random.default_rng(0).normal(size=81)
    assert smooth(RATES, noise)[5:-5].std() < noise.std() / 2


# The noise of batches


HARDNESS = np.random.default_rng(0).gamma(2, 0.5, size=81)  # of the batches, before training
CLEAN = 2 - 1 / (1 + np.exp(-3 * (X + 3)))


def test_batch_noise_is_removed_in_proportion_to_its_share():
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
def test_losses_that_do_not_follow_the_baseline_are_unchanged(losses, baseline):
    np.testing.assert_array_equal(remove_batch_noise(RATES, losses, baseline), losses)


def test_baseline_reveals_a_descent_hidden_by_batch_noise():
    losses = CLEAN / 5 + HARDNESS
    with pytest.raises(ValueError, match="never fell by more than its noise"):
        _ = LRFinderResult(RATES, losses).suggestion
    result = LRFinderResult(RATES, losses, baseline=HARDNESS)
    assert result.suggestion == pytest.approx(1e-3, rel=0.6)
    assert result.to_dict()["baseline"] == HARDNESS.tolist()
    assert result.losses.tolist() == losses.tolist()


def test_a_hard_last_batch_is_not_a_divergence():
    flat = np.roll(HARDNESS, 80 - HARDNESS.argmax())
    with pytest.raises(ValueError, match="never fell"):
        _ = LRFinderResult(RATES, flat, baseline=flat).suggestion


def test_a_non_finite_baseline_is_ignored():
    baseline = np.where(np.arange(81) == 40, np.nan, HARDNESS)
    result = LRFinderResult(RATES, curve(-3, -0.5), baseline=baseline)
    assert result.suggestions == LRFinderResult(RATES, curve(-3, -0.5)).suggestions
    assert result.to_dict()["baseline"][40] is None


@pytest.mark.parametrize("noise", [np.ones(81), np.geomspace(0.01, 1, 81)], ids=["even", "growing"])
def test_pure_noise_has_no_descent(noise):
    curves = 1 + noise * np.random.default_rng(0).normal(size=(400, 81))
    assert sum(has_descent(RATES, losses) for losses in curves) <= 8


# The result


def test_result_suggests_from_the_smoothed_curve():
    result = LRFinderResult(RATES, curve(-3, -0.5, noise=0.05))
    assert result.suggestion == result.suggestions["steep"]
    assert list(result.suggestions) == ["steep", "valley", "slide", "minimum"]
    assert 3e-4 < result.suggestion < 3e-3
    assert 3e-4 < result.suggestions["valley"] < 3e-3
    assert repr(result).startswith("LRFinderResult(81 steps from 1.0e-07 to 1.0e+01, suggestion=")
    assert f"valley={result.suggestions['valley']:.2e}" in repr(result)


def test_result_uses_the_given_method():
    result = LRFinderResult(RATES, curve(-3, -0.5), "minimum")
    assert result.suggestion == result.suggestions["minimum"]


def test_unknown_suggestions_raise_with_a_hint():
    with pytest.raises(ValueError, match=r"no suggestion 'vally'. Did you mean 'valley'"):
        LRFinderResult(RATES, X, "vally")


@pytest.mark.once
@pytest.mark.parametrize(
    ("losses", "method", "seen"),
    [
        (2 - (X + 7) / 8, "valley", ""),
        (2 - 10.0 ** (X - 1), "steep", "highest rate of the sweep"),
        (2 - 10.0 ** (X - 1), "minimum", "highest rate of the sweep"),
        (1 + 1 / (1 + 10 ** (8 * (X + 7))), "steep", "lowest rate of the sweep"),
        (curve(-3, -0.5), "steep", ""),
    ],
)
def test_suggestions_at_an_end_of_the_sweep_are_flagged(losses, method, seen):
    result = LRFinderResult(RATES, losses, method)
    assert (seen in result.caution) if seen else not result.caution
    for shown in (repr(result), result._repr_html_(), str(result.to_dict())):
        assert result.caution in shown


@pytest.mark.parametrize("last", [np.nan, np.inf, -np.inf])
def test_result_ignores_losses_from_the_first_non_finite_one_on(last):
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
        (np.r_[3, 2, np.nan], "diverged after 2 finite steps .*smaller start_lr"),
        ([np.nan], "is nan at the first step, where the rate has had no effect yet. Check the inp"),
    ],
)
def test_a_curve_without_a_descent_has_no_suggestion(losses, seen):
    result = LRFinderResult(RATES[: len(losses)], losses)
    with pytest.raises(ValueError, match=seen):
        _ = result.suggestion
    assert result.suggestions == {}
    assert "no suggestion" in repr(result)
    assert " 1 steps" not in repr(result)
    assert "no suggestion" in result._repr_html_()
    result.plot()


# The picture


def test_plot_labels_losses_and_suggestions(tmp_path):
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
            f"{name.replace('minimum', 'minimum / 10:')} {rate:.1e}"
            + " (chosen)" * (name == "steep")
            for name, rate in result.suggestions.items()
        ),
    ]
    picture = (tmp_path / "lr.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20]) == 800


def test_plot_does_not_touch_pyplot():
    import matplotlib.pyplot as plt

    before = plt.get_fignums(), plt.get_backend()
    LRFinderResult(RATES, curve(-3, -0.5)).plot()
    assert (plt.get_fignums(), plt.get_backend()) == before


def test_plot_without_matplotlib_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="Install it with `pip install matplotlib`"):
        LRFinderResult(RATES, X).plot()


# The sweep


class Slope(BaseTrainer):
    """Its loss is its only weight, so that each step lowers it by the learning rate."""

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
def test_each_step_uses_its_rate(rate, scaled):
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


def test_a_schedule_is_unaffected_by_the_sweep():
    schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 1, 0.5)
    trainer = Slope(keras.optimizers.SGD(schedule))
    trainer.train_step(ONES[0])
    trainer.lr_finder(ONES, num_steps=16)
    for _ in range(3):
        trainer.train_step(ONES[0])
    assert trainer.model.get_weights()[0].item() == -1.875  # 1 + 1/2 + 1/4 + 1/8


class Uneven(Slope):
    """The loss of a batch is the weight plus the mean of the batch."""

    def forward_with_grads(self, x):
        return x, ops.sum(self.model.weights[0]) + ops.mean(x)


def test_baseline_is_the_loss_of_the_same_batches_at_rate_zero(monkeypatch):
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


def test_sweep_stops_when_the_smoothed_loss_diverges():
    # w**2 is multiplied by (1 - 2 rate)**2 at each step: it rises from the rate 1 on.
    result = Slope(keras.optimizers.SGD(), 1.0, 2).lr_finder(ONES)
    assert 1 < result.rates[-1] < 10
    smoothed = result.smoothed_losses
    first = np.argmax(smoothed > 4 * np.minimum.accumulate(smoothed))
    assert 0 < len(smoothed) - 1 - first <= 7  # seen when the window has passed it


def test_sweep_of_less_than_a_decade_stops_when_it_diverges():
    trainer = Slope(keras.optimizers.SGD(), 1.0, 2)
    result = trainer.lr_finder(ONES, start_lr=1.0, end_lr=1.2)
    assert 25 < len(result.losses) < 75
    assert np.isfinite(result.losses).all()


def test_progress_bar_names_the_baseline_pass(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    monkeypatch.setattr("polus.lr_finder.sweep.Console", lambda **arguments: console)
    Slope(keras.optimizers.SGD()).lr_finder(ONES, num_steps=16)
    assert "Baseline at rate 0, loss" in out.getvalue()
    assert "Rate 0.0" not in out.getvalue()


def test_sweep_stops_at_a_non_finite_loss():
    trainer = Slope(keras.optimizers.SGD(), 1.0, 2)
    result = trainer.lr_finder(ONES, end_lr=1e30, stop_factor=math.inf)
    assert not np.isfinite(result.losses[-1])
    assert np.isfinite(result.losses[:-1]).all()
    assert len(result.losses) < 100


@pytest.mark.parametrize(
    ("losses", "limit"),
    [
        ([3, 0.5, 1], 2.0),
        ([-1], 2.0),  # rises by 3 times its absolute value
        ([2, -1], 8.0),  # rises by 3 times the descent of 3
        ([-1, -5], 10.0),
        ([0], 0.0),
    ],
)
def test_highest_allowed_loss_for_positive_and_negative_losses(losses, limit):
    assert highest_allowed(losses, stop_factor=4) == limit


def test_use_lr_found_sets_and_logs_the_rate(caplog):
    trainer = Slope(keras.optimizers.SGD(0.25), 1.0, 2)
    logging.getLogger("polus").propagate = True
    with caplog.at_level(logging.INFO, logger="polus"):
        result = trainer.lr_finder(ONES, use_lr_found=True, suggestion="valley")
    rate = result.suggestion
    assert float(trainer.optimizer.learning_rate) == pytest.approx(rate)
    assert f"Learning rate set to {rate:.3g}, was 0.25." in caplog.text
    trainer.train(ONES, epochs=1)
    assert trainer.model.get_weights()[0].item() == pytest.approx((1 - 2 * rate) ** 3, rel=1e-4)


def test_use_lr_found_without_a_suggestion_keeps_the_rate():
    trainer = Slope(keras.optimizers.SGD(0.25), 1.0, 2)
    with pytest.raises(ValueError, match=r"suggests no learning rate. The loss never fell"):
        trainer.lr_finder(ONES, use_lr_found=True, start_lr=1e-12, end_lr=1e-10)
    assert float(trainer.optimizer.learning_rate) == 0.25


def test_use_lr_found_with_a_schedule_raises():
    trainer = Slope(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 10)))
    with pytest.raises(ValueError, match=r"schedule .*CosineDecay\(result.suggestion"):
        trainer.lr_finder(ONES, use_lr_found=True)


class Pair(BaseTrainer):
    """Its step trains two weights with one optimizer each and returns named terms."""

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


def test_optimizer_argument_selects_the_one_to_sweep():
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
    with pytest.raises(ValueError, match=r"'secnd'. Did you mean 'second'\? The .*'optimizer', 's"):
        trainer.lr_finder(ONES, optimizer="secnd")
    with pytest.raises(TypeError, match=r"the keras.optimizers.Optimizer to sweep.* got 3"):
        trainer.lr_finder(ONES, optimizer=3)


def test_monitor_names_the_term_to_read(caplog):
    trainer = Pair()
    logging.getLogger("polus").propagate = True
    settings = {"start_lr": 1e-3, "end_lr": 1e-1, "num_steps": 16, "stop_factor": math.inf}
    result = trainer.lr_finder(ONES, **settings, optimizer="second", monitor="second")
    swept = np.append(0, np.cumsum(np.geomspace(1e-3, 1e-1, 16))[:-1])
    np.testing.assert_allclose(result.losses, -swept, rtol=1e-5)
    assert result.to_dict()["monitor"] == "second"
    assert result.plot().axes[0].get_ylabel() == "second"
    assert "several optimizers" not in caplog.text
    trainer.lr_finder(ONES, **settings, optimizer="second")
    assert "the search of the rate of second reads 'loss'. If it minim" in caplog.text
    assert "name that one: monitor='second'." in caplog.text
    assert "The range test sweeps the rate of second; optimizer keeps its.\n" in caplog.text
    with pytest.raises(ValueError, match=r"no term named 'secod' to monitor.*mean 'second'\?"):
        trainer.lr_finder(ONES, monitor="secod")
    trainer.primary = "second"
    with pytest.raises(ValueError, match="'loss' as well"):
        trainer.lr_finder(ONES)


class Shapes(Slope):
    """Its step returns no loss, but an array."""

    def train_step(self, x):
        loss = super().train_step(x)
        return {"cost": loss, "rows": ops.zeros(3)}


def test_a_step_without_a_loss_needs_monitor():
    trainer = Shapes(keras.optimizers.SGD())
    with pytest.raises(ValueError, match=r"follows the loss.*Name the term.*: monitor='cost', or"):
        trainer.lr_finder(ONES)
    with pytest.raises(ValueError, match="monitor must name a scalar, and 'rows' is an array"):
        trainer.lr_finder(ONES, monitor="rows")
    assert trainer.lr_finder(ONES, num_steps=16, monitor="cost").monitor == "cost"


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras before 3.15")
def test_a_multi_optimizer_is_found_by_the_name_of_its_attribute():
    inner = keras.optimizers.SGD(0.5)
    trainer = Slope(keras.optimizers.MultiOptimizer(lambda variable: inner))
    named = trainer.lr_finder(ONES, num_steps=16, optimizer="optimizer")
    np.testing.assert_array_equal(named.losses, trainer.lr_finder(ONES, num_steps=16).losses)


def test_a_batch_with_nan_is_named_as_the_reason(caplog):
    batches = [*ONES * 4, np.full((2, 1), np.nan, "float32")] * 20
    logging.getLogger("polus").propagate = True
    result = Uneven(keras.optimizers.SGD()).lr_finder(batches, end_lr=1e-3)
    with pytest.raises(ValueError, match="The loss of step 13 is nan, and at a rate of 0 as well"):
        _ = result.suggestion
    late = [*ONES * 24, np.full((2, 1), np.nan, "float32")]
    result = Uneven(keras.optimizers.SGD()).lr_finder(late, start_lr=1e-4, max_steps=0)
    assert len(result.losses) == 73
    assert result.suggestion
    assert "The loss of step 73 is nan, and at a rate of 0 as well" in caplog.text


@pytest.mark.needs_keras_3_15
def test_one_optimizer_of_a_multi_optimizer_can_be_swept():
    inner = keras.optimizers.SGD(0.5)
    trainer = Slope(keras.optimizers.MultiOptimizer(lambda variable: inner))
    result = trainer.lr_finder(ONES, start_lr=1e-3, end_lr=1, num_steps=31, optimizer=inner)
    expected = -np.append(0, np.cumsum(result.rates)[:-1])
    np.testing.assert_allclose(result.losses, expected, rtol=1e-5)
    assert float(inner.learning_rate) == 0.5


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"start_lr": 0}, "positive and less than end_lr, got start_lr=0 and end_lr=10"),
        ({"start_lr": 1, "end_lr": 0.1}, "less than end_lr, got start_lr=1 and end_lr=0.1"),
        ({"num_steps": 15}, "integer of at least 16, got 15"),
        ({"num_steps": 20.5}, "integer of at least 16, got 20.5"),
        ({"stop_factor": 1}, "stop_factor must be greater than 1, got 1"),
        ({"suggestion": "sharp"}, "no suggestion 'sharp'. Use one of 'tried', 'steep'"),
        ({"suggestion": 3}, "no suggestion 3. Use one of"),
        ({"tf_dataset": None}, "lr_finder needs a dataset"),
        ({"tf_dataset": []}, "yielded no batch"),
        ({"tf_dataset": iter(ONES)}, "What is read from a list_iterator is gone"),
    ],
)
def test_invalid_arguments_raise(arguments, seen):
    with pytest.raises(ValueError, match=seen):
        Slope(keras.optimizers.SGD()).lr_finder(**{"tf_dataset": ONES, **arguments})


# Training is unchanged


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
    """Turns autotuning off: two runs compiled differently may differ in the last bit."""
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
    """Runs a sweep during an epoch and at its end. Does nothing without data."""

    def __init__(self, dataset=None):
        self.dataset = dataset

    def on_train_batch_end(self, epoch, step, loss):
        if self.dataset is not None and (epoch, step) == (0, 2):
            self.coordinator.trainer.lr_finder(self.dataset, num_steps=16)

    def on_epoch_end(self, epoch):
        self.on_train_batch_end(0, 2, None)


def trained(trainer, data, searcher) -> list[np.ndarray]:
    """Trains for two epochs and returns the history and all state."""
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


def test_training_is_unchanged_by_sweeps_before_and_during_it(make, alone):
    trainer, data = classifier(), make()
    result = trainer.lr_finder(data, start_lr=1e-5, num_steps=60)  # longer than the data
    assert result.method == "tried"
    assert_equal(trained(trainer, data, Searcher(data)), alone)


def test_training_is_unchanged_by_interrupted_trials_and_validation(make, alone):
    trainer, data, calls = classifier(), make(), itertools.count()

    def interrupting(batch):
        if next(calls) == 250:
            signal.raise_signal(signal.SIGINT)
        return batch

    trainer.changing_train_config(custom_data_transform_f=interrupting)
    settings = {"start_lr": 1e-5, "num_steps": 60, "validation_data": make()}
    result = trainer.lr_finder(data, max_steps=2000, **settings)
    assert 0 < sum(len(trial.losses) for trial in result.trials) < 1900
    trainer.changing_train_config(custom_data_transform_f=None)
    assert_equal(trained(trainer, data, Searcher()), alone)


def test_training_is_unchanged_by_a_sweep_that_built_the_model(make, alone):
    trainer, data = classifier(built=False), make()
    trainer.lr_finder(data, num_steps=16)
    assert_equal(trained(trainer, data, Searcher()), alone)


def test_training_is_unchanged_by_sweeps_ended_by_an_error_or_ctrl_c(make, alone):
    def sweep(fails):
        # The first batch is read once more before the sweep.
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
def test_prefetching_draws_the_same_random_numbers_during_a_sweep_or_evaluation(look):
    batches = [(INPUTS[i : i + 4], LABELS[i : i + 4]) for i in range(0, 40, 4)]

    def losses(looks):
        within, number = threading.Event(), itertools.count()

        def noisy(batch):
            if looks and next(number) == 3:
                within.wait(0.5)  # times out: the sweep waits for the batch to be made
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
        seen.append(trainer.evaluate([(INPUTS[:4], LABELS[:4])]))  # the lock is reentrant
        yield INPUTS[4:8], LABELS[4:8]

    trainer.train(batches, 1, steps_per_execution=1)
    assert len(seen) == 1


def test_sweep_does_not_mark_metrics_as_updated():
    trainer = classifier()
    trainer.lr_finder(DATASETS["arrays"](), num_steps=16)
    assert not trainer.metrics[0].has_samples


def test_baseline_uses_the_random_numbers_of_the_sweep():
    data = DATASETS["arrays"]()
    result = classifier().lr_finder(data, start_lr=1e-31, end_lr=1e-30, num_steps=16)
    np.testing.assert_array_equal(result.losses, result.baseline)
    assert len(np.unique(result.baseline)) > 8


def test_sweep_calls_no_callback_and_writes_no_file(tmp_path, monkeypatch):
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


# The command


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


def test_command_prints_suggestions_and_saves_a_plot(tmp_path, monkeypatch, capsys):
    (tmp_path / "lr_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    path = str(tmp_path / "lr.png")
    assert main(["lr_program:init_trainer", "--plot", path, "--suggestion", "valley"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*SUGGESTIONS, "Plot"]  # no trials
    assert lines[1].endswith("(suggested)")
    assert main(["lr_program:init_trainer", "--plot", path, "--max-steps", "150"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tried")
    assert lines[0].endswith("(suggested)")
    assert any(line.startswith("trial at ") for line in lines)
    assert Path(path).read_bytes().startswith(b"\x89PNG")
    flat = ["--start-lr", "1e-12", "--end-lr", "1e-10"]
    assert main(["lr_program:init_trainer", "--plot", path, *flat]) == 1
    assert "No learning rate suggested. The loss never fell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        ("lr_program:trainer", "the module 'lr_program' has no function 'trainer'"),
        ("lr_programs:init_trainer", "there is no module named 'lr_programs' here"),
        ("builtins:list", "builtins:list must return a trainer, got []"),
    ],
)
def test_command_rejects_functions_that_return_no_trainer(
    function, seen, tmp_path, monkeypatch, capsys
):
    (tmp_path / "lr_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        main([function])
    assert seen in capsys.readouterr().err


@pytest.mark.once
def test_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "polus.lr_finder", "package.module"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "the form package.module:function, got 'package.module'" in done.stderr
