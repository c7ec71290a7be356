"""The trials after a sweep find the best rate, within their budget and without a trace."""

import io
import logging
import math
import signal

import keras
import numpy as np
import pytest
from keras import ops
from rich.console import Console

from polus.lr_finder import LRFinderResult, Trial, best_rate
from polus.lr_finder.trials import plan
from polus.optimizers import MultiOptimizer, layerwise, optimizers_of
from polus.schedules import Cosine
from polus.training import BaseTrainer, ClassifierTrainer

ONES = [np.ones((2, 1), "float32")] * 3
RATES = np.geomspace(1e-7, 10, 81)
CURVE = 2 - 1 / (1 + np.exp(-8 * (np.log10(RATES) + 3)))  # falls at 1e-3


class Parabola(BaseTrainer):
    """Its loss is the square of its only weight plus the mean of the batch.

    Each step of SGD multiplies the weight by 1 - 2 * rate.
    """

    def __init__(self, optimizer, start=1.0):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        model.set_weights([np.full((1, 1), start)])
        super().__init__(model, optimizer, lambda x, weight: weight**2 + ops.mean(x))

    def forward_with_grads(self, x):
        return x, ops.sum(self.model.weights[0])

    def evaluation_step(self, x):
        return {"loss": ops.sum(self.model.weights[0]) ** 2 + ops.mean(x)}


def parabola(rate, factors):
    """Returns the losses of a hand-written loop, with a batch mean of 1."""
    weight, losses = 1.0, []
    for factor in factors:
        losses.append(weight**2 + 1)
        weight *= 1 - 2 * rate * factor
    return losses


def trial(rate, judged, rounds=1):
    judged = np.array(judged, float)
    scores = np.full(rounds, judged.mean())
    return Trial(rate, judged, scores, np.zeros(rounds), judged)


@pytest.mark.once
def test_rates_are_thirds_of_a_power_of_ten_and_rounds_halve():
    made = plan(1e-3, 1.0, 500, 100)
    np.testing.assert_allclose(made.rates, np.geomspace(1e-3, 1.0, 10))
    assert [trials for trials, _ in made.rounds] == [10, 5, 3]
    assert 450 < made.num_steps <= 500


@pytest.mark.once
@pytest.mark.parametrize(("max_steps", "max_trials", "count"), [(160, 100, 6), (500, 4, 4)])
def test_fewer_rates_are_tried_where_steps_or_memory_are_short(max_steps, max_trials, count):
    made = plan(1e-3, 1.0, max_steps, max_trials)
    assert len(made.rates) == count
    assert made.rates[0] == pytest.approx(1e-3)
    assert made.rates[-1] == pytest.approx(1.0)
    assert made.num_steps <= max_steps


@pytest.mark.once
def test_too_few_steps_are_no_trials():
    assert plan(1e-3, 1.0, 23, 100).rates == ()


@pytest.mark.once
def test_equal_rates_within_the_noise_give_the_lowest_one():
    hard = np.array([1.0, 5.0, 2.0, 8.0])  # the batches
    trials = [
        trial(0.01, hard + 0.5),
        trial(0.1, np.add(hard, [0.1, -0.1, 0.1, -0.05])),
        trial(1.0, hard),
        trial(10.0, [math.inf] * 4),
        trial(0.001, hard - 1, rounds=0),
    ]
    assert best_rate(trials) == 0.1
    assert best_rate(trials[:1]) == 0.01
    assert best_rate(trials[-2:]) is None


@pytest.mark.once
def test_rates_far_apart_within_the_noise_decide_nothing():
    trials = [trial(rate, [1 + rate, 2 - 1.1 * rate, 3.0]) for rate in (0.01, 0.02, 0.2)]
    assert best_rate(trials[:2]) == 0.01
    assert best_rate(trials) is None
    result = LRFinderResult(RATES, CURVE, trials=trials)
    assert (result.method, next(iter(result.suggestions))) == ("steep", "steep")
    assert "The trials were too short to tell rates apart" in result.caution


@pytest.mark.once
@pytest.mark.parametrize(("best", "seen"), [(0, "lowest"), (1, ""), (2, "highest")])
def test_the_lowest_and_the_highest_rate_tried_are_flagged(best, seen):
    losses = np.full(3, 2.0)
    losses[best] = 1.0
    trials = [trial(10.0**-k, [loss] * 3) for k, loss in zip((3, 2, 1), losses, strict=True)]
    result = LRFinderResult(RATES, CURVE, trials=trials)
    assert result.suggestion == trials[best].rate
    assert (f"It is the {seen} rate tried" in result.caution) if seen else not result.caution
    few = LRFinderResult(RATES, CURVE, trials=trials[::2])
    assert "Only 2 rates were tried, up to a factor of 100 apart. Pass a larger" in few.caution


@pytest.mark.once
def test_tried_stands_for_steep_without_trials():
    assert LRFinderResult(RATES, CURVE).method == "steep"
    tried = LRFinderResult(RATES, CURVE, trials=[trial(0.02, [1.0, 1.1])])
    assert (tried.method, tried.suggestion) == ("tried", 0.02)
    assert tried.to_dict()["trials"][0]["losses"] == [1.0, 1.1]
    assert "1 rate tried" in repr(tried)
    assert "after 1 step," in str(Trial(0.1, np.ones(1), *(np.zeros(0),) * 3, dropped_after=1))
    assert "<th>rate tried</th>" in tried._repr_html_()
    assert "(chosen)" in tried._repr_html_()


def test_trials_train_as_a_loop_does_and_find_the_rate():
    trainer = Parabola(keras.optimizers.SGD(0.125))
    result = trainer.lr_finder(ONES, num_steps=50)
    assert 0.2 < result.suggestion < 0.5  # 0.5 solves it in one step, 1 diverges
    assert result.method == "tried"
    lasted = [each for each in result.trials if each.dropped_after is None]
    assert 0 < len(lasted) <= 3
    for each in result.trials:
        expected = parabola(each.rate, np.ones(len(each.losses)))
        np.testing.assert_allclose(each.losses, expected, rtol=1e-3)
    assert sum(len(each.losses) for each in result.trials) <= 250
    assert trainer.model.get_weights()[0].item() == 1.0
    assert float(trainer.optimizer.learning_rate) == 0.125


def test_all_trials_of_a_round_read_the_same_batches():
    batches = [np.full((2, 1), k, "float32") for k in range(7)]
    result = Parabola(keras.optimizers.SGD(), 1e-3).lr_finder(
        batches, start_lr=1e-12, num_steps=16, suggestion="steep"
    )
    assert not result.trials
    trainer = Parabola(keras.optimizers.SGD(), 3.0)
    result = trainer.lr_finder(batches, num_steps=50, max_steps=150)
    for each in result.trials:  # the first loss of each is that of the first batch
        assert each.losses[0] == pytest.approx(9.0)
        weights = each.losses - np.resize(np.arange(7), len(each.losses))
        np.testing.assert_allclose(weights[1], 9 * (1 - 2 * each.rate) ** 2, rtol=1e-3)


def test_trials_cost_at_most_a_tenth_of_a_known_run(caplog):
    trainer = Parabola(keras.optimizers.SGD())
    trainer.changing_train_config(epochs=100)
    logging.getLogger("polus").propagate = True
    with caplog.at_level(logging.INFO, logger="polus"):
        result = trainer.lr_finder(ONES, num_steps=50)
    assert 0 < sum(len(each.losses) for each in result.trials) <= 30
    assert "runs up to 100 steps, and then trials with up to 30 together" in caplog.text
    trainer.changing_train_config(epochs=10)
    with caplog.at_level(logging.INFO, logger="polus"):
        result = trainer.lr_finder(ONES, num_steps=50)
    assert result.trials == ()
    assert result.method == "steep"
    assert "No rates are tried, since 3 steps do not suffice" in caplog.text


def test_a_schedule_is_tried_with_its_first_part():
    trainer = Parabola(keras.optimizers.SGD())
    trainer.changing_train_config(epochs=400)  # 1,200 steps
    result = trainer.lr_finder(ONES, num_steps=24, for_schedule="warmup_cosine")
    warmup = len(result.trials[0].losses) // 2
    schedule = Cosine(1.0, warmup, 1200)
    for each in result.trials:
        factors = [float(schedule(step)) for step in range(len(each.losses))]
        if each.rate < 1:
            np.testing.assert_allclose(each.losses, parabola(each.rate, factors), rtol=1e-3)
    assert max(len(each.losses) for each in result.trials) > 2 * warmup


def test_validation_data_judge_the_trials():
    trainer = Parabola(keras.optimizers.SGD())
    validation = [np.full((2, 1), k, "float32") for k in (5, 7)]
    result = trainer.lr_finder(ONES, num_steps=50, max_steps=200, validation_data=validation)
    for each in result.trials:
        if np.isfinite(each.judged).all():
            weight = each.losses[-1] - 1  # before the last step
            after = weight * (1 - 2 * each.rate) ** 2
            np.testing.assert_allclose(each.judged, np.add(after, [5, 7]), rtol=1e-3, atol=1e-3)
    assert trainer.model.get_weights()[0].item() == 1.0


def test_ctrl_c_ends_the_trials_and_leaves_no_trace(caplog):
    trainer, calls = Parabola(keras.optimizers.SGD(0.125)), []

    def transform(batch):
        calls.append(1)
        if len(calls) == 75:
            signal.raise_signal(signal.SIGINT)
        return batch

    trainer.changing_train_config(custom_data_transform_f=transform)
    logging.getLogger("polus").propagate = True
    result = trainer.lr_finder(ONES, num_steps=50)
    assert "The trials were interrupted" in caplog.text
    assert result.suggestions["steep"]
    assert 0 < sum(len(each.losses) for each in result.trials) < 230
    assert trainer.model.get_weights()[0].item() == 1.0
    assert float(trainer.optimizer.learning_rate) == 0.125


def test_progress_bar_names_the_trials(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    monkeypatch.setattr("polus.lr_finder.sweep.Console", lambda **arguments: console)
    Parabola(keras.optimizers.SGD()).lr_finder(ONES, num_steps=40)
    assert "Trial at rate" in out.getvalue()


def test_the_picture_has_the_trials_beside_the_sweep():
    trials = [trial(0.01, [2.0, 1.5, 1.2]), trial(0.1, [2.0, 1.0, 0.5])]
    figure = LRFinderResult(RATES, CURVE, trials=trials).plot()
    sweep, tried = figure.axes
    assert sweep.get_title() == "Range test"
    assert len(tried.lines) == 2
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "trial 1.0e-02" in names
    assert "tried 1.0e-01 (chosen)" in names
    assert any(name.startswith("minimum / 10") for name in names)


def test_early_ctrl_c_falls_back_to_the_curve(caplog):
    """One round of trials was judged, and its losses are few."""
    trainer, calls = Parabola(keras.optimizers.SGD(0.125)), []

    def transform(batch):
        calls.append(1)
        if len(calls) == 78:  # after 50 of the sweep, and 11 of the first round
            signal.raise_signal(signal.SIGINT)
        return batch

    trainer.changing_train_config(custom_data_transform_f=transform)
    logging.getLogger("polus").propagate = True
    result = trainer.lr_finder(ONES, num_steps=50)
    assert {len(each.scores) for each in result.trials} == {1}
    assert result.method == "steep"
    assert "tried" not in result.suggestions
    assert "The trials were interrupted" in caplog.text
    assert "The trials were too short to tell rates apart" in caplog.text


def test_errors_of_validation_data_name_the_argument():
    trainer = Parabola(keras.optimizers.SGD())
    with pytest.raises(TypeError, match="validation_data of lr_finder: A dataset must yield batch"):
        trainer.lr_finder(ONES, validation_data=3)
    with pytest.raises(ValueError, match=r"validation_data of lr_finder: .*list_iterator is gone"):
        trainer.lr_finder(ONES, validation_data=iter(ONES))
    with pytest.raises(ValueError, match=r"validation_data of lr_finder: .*no batch"):
        trainer.lr_finder(ONES, validation_data=[])
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    classifier = ClassifierTrainer(model, keras.optimizers.SGD(), keras.losses.MeanSquaredError())
    with pytest.raises(NotImplementedError, match="got a batch of 1 part") as caught:
        classifier.lr_finder([(x, x) for x in ONES], validation_data=ONES)
    assert any("validation_data of lr_finder" in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match="evaluation step, which judges the trials on valid"):
        Costly(keras.optimizers.SGD()).lr_finder(ONES, validation_data=ONES, monitor="cost")


class Costly(Parabola):
    """Its step returns a term that its evaluation step doesn't."""

    def train_step(self, x):
        return {"cost": super().train_step(x)}


class Two(BaseTrainer):
    """Trains two weights down their squares, with one optimizer each."""

    def __init__(self):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.set_weights([np.ones((1, 1)), np.ones(1)])
        super().__init__(model, keras.optimizers.SGD(0.01), lambda: 0)
        self.second = keras.optimizers.SGD(0.01)

    def train_step(self, x):
        first, second = self.model.weights
        a = self.minimize(lambda: ops.sum(first**2), [first])
        b = self.minimize(lambda: ops.sum(second**2) * 10, [second], self.second)
        return {"loss": a + b}


def test_several_optimizers_are_searched_in_turn():
    trainer = Two()
    for name in optimizers_of(trainer):
        trainer.lr_finder(ONES, use_lr_found=True, optimizer=name, num_steps=40)
    assert 0.2 < float(trainer.optimizer.learning_rate) < 1  # best is 1/2
    assert 0.02 < float(trainer.second.learning_rate) < 0.1  # best is 1/20


@pytest.mark.needs_keras_3_15
def test_layerwise_rates_are_swept_by_one_factor():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1), keras.layers.Dense(1)])
    optimizer = layerwise(model, 0.25, decay=0.5, make=keras.optimizers.SGD)
    assert isinstance(optimizer, MultiOptimizer)
    trainer = ClassifierTrainer(model, optimizer, keras.losses.MeanSquaredError())
    before = model.get_weights()
    data = [(batch, 3 * batch) for batch in ONES]
    trainer.lr_finder(data, num_steps=40)
    np.testing.assert_allclose(
        sorted(float(part.learning_rate) for part in optimizer.optimizers), [0.125, 0.25]
    )
    for kept, weight in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(kept, weight)
    result = trainer.lr_finder(data, use_lr_found=True, num_steps=40)
    rates = sorted(float(part.learning_rate) for part in optimizer.optimizers)
    np.testing.assert_allclose(rates, [result.suggestion / 2, result.suggestion], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"max_steps": -1}, "max_steps must be an integer of at least 0, got -1"),
        ({"max_steps": True}, "max_steps must be an integer of at least 0, got True"),
        ({"max_steps": 1.5}, "max_steps must be an integer of at least 0, got 1.5"),
        ({"for_schedule": "cosine"}, "None or one of 'warmup_cosine', got 'cosine'"),
    ],
)
def test_invalid_arguments_of_trials_raise(arguments, seen):
    with pytest.raises(ValueError, match=seen):
        Parabola(keras.optimizers.SGD()).lr_finder(ONES, **arguments)


@pytest.mark.once
def test_trials_reach_down_to_where_the_loss_fell_fastest():
    """As with normalized outputs: after a steep descent the loss still falls a little, and on."""
    rates = np.geomspace(1e-5, 10, 100)
    losses = 3 - 2 / (1 + (3e-3 / rates) ** 2) - 0.05 * np.log10(rates)
    result = LRFinderResult(rates, losses)
    assert result.suggestions["minimum"] > 0.5
    assert result.open_rates[0] == result.suggestions["steep"] < 1e-2
    falls_to_the_end = plan(*result.open_rates, 500, 100)
    assert falls_to_the_end.rates[0] < 1e-2
    assert falls_to_the_end.rates[-1] == pytest.approx(10)
