"""The range test: right on curves with known answers, and without a trace on the training."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polus.lr_finder import SUGGESTIONS, LRFinderResult, minimum, slide, smooth, steep, valley

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


# The result


def test_result_suggests_from_the_smoothed_curve_and_is_readable():
    result = LRFinderResult(RATES, curve(-3, -0.5, noise=0.05))
    assert result.suggestion == result.suggestions["valley"]
    assert list(result.suggestions) == ["valley", "steep", "slide", "minimum"]
    assert 3e-4 < result.suggestion < 3e-3
    assert 3e-4 < result.suggestions["steep"] < 3e-3
    assert repr(result).startswith("LRFinderResult(81 steps from 1.0e-07 to 1.0e+01, suggestion=")
    assert f"steep={result.suggestions['steep']:.2e}" in repr(result)


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
    assert values["method"] == "valley"
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
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [
        "raw",
        "smoothed",
        *(
            f"{name} {rate:.1e}" + " (chosen)" * (name == "valley")
            for name, rate in result.suggestions.items()
        ),
    ]
    picture = (tmp_path / "lr.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20]) == 800


def test_plot_leaves_pyplot_alone():
    program = (
        "import sys, numpy as np; from polus.lr_finder import LRFinderResult\n"
        "assert 'matplotlib' not in sys.modules\n"
        "LRFinderResult(np.geomspace(1e-3, 1, 20), np.linspace(2, 1, 20)).plot()\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install polus\[plot\]"):
        LRFinderResult(RATES, X).plot()
