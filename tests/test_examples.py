"""The examples, shrunk: they run on each backend, and do what they say."""

import functools
import importlib.util
from pathlib import Path

import keras
import numpy as np
import pytest
from conformance import Case, plain_losses
from keras import ops

from polus import core, demo

BATCH = 4
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _plots_need_no_screen(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(tmp_path, capsys):
    assert demo.main(epochs=1, runs=tmp_path) > 0.3, "one in ten is chance"
    printed = capsys.readouterr().out
    files = ("model.keras", "history.png", "confusion_matrix.png")
    assert all((tmp_path / "digits" / name).stat().st_size for name in files)
    assert all(name in printed for name in files)


def test_digits_from_the_files_of_mnist(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "mnist.npz", **arrays)
    demo.main(data=tmp_path, epochs=1, runs=tmp_path)
    assert (tmp_path / "mnist" / "model.keras").stat().st_size


def test_gan(tmp_path, capsys):
    load("gan").main(epochs=1, runs=tmp_path)
    assert (tmp_path / "gan" / "digits.png").stat().st_size
    assert "generated" in capsys.readouterr().out


def test_distillation(capsys):
    results = load("distillation").main(epochs=4)
    assert len(results) == 3
    assert min(results.values()) > 0.3, "one in ten is chance"
    assert "distilled" in capsys.readouterr().out


def test_custom_step(capsys):
    results = load("custom_step").main(epochs=4)
    assert len(results) == 2
    assert all(clean > 0.3 for clean, _ in results.values()), "one in ten is chance"
    assert "largest slope" in capsys.readouterr().out


def test_ddpm(tmp_path, capsys):
    load("ddpm").main(epochs=2, num_times=10, runs=tmp_path)
    names = {path.name for path in (tmp_path / "ddpm").iterdir()}
    assert names == {"average.keras", "epoch-001.png", "epoch-002.png"}
    assert "recognizes" in capsys.readouterr().out


def test_ppo(capsys):
    assert load("ppo").main(epochs=30) > 0.0, "a paddle that does not learn has -0.6"
    assert "Mean reward" in capsys.readouterr().out


def test_transfer(capsys):
    results = load("transfer").main(epochs=1)
    assert results.keys() == {"from scratch", "transferred"}
    assert "predictions are right" in capsys.readouterr().out


def test_search(tmp_path, capsys):
    pytest.importorskip("optuna")
    scores = load("search").main(secs=600, epochs=1, trials=2, runs=tmp_path)
    assert scores.keys() == {"demo", "best"}
    printed = capsys.readouterr().out
    assert "| 0     | complete |" in printed
    assert "demo: trial 0" in printed
    assert (tmp_path / "search" / "trial_0001" / "best.keras").stat().st_size


def test_several_devices(tmp_path, capsys):
    """On the two fake devices of JAX, and on one elsewhere."""
    try:
        assert load("several_devices").main(epochs=3, runs=tmp_path) > 0.5, "one in ten is chance"
    finally:
        if keras.backend.backend() == "jax":
            keras.distribution.set_distribution(None)
    assert (tmp_path / "several_devices" / "model.keras").stat().st_size
    assert "epoch 3/3" in capsys.readouterr().out


def test_cyclegan(tmp_path, capsys):
    load("cyclegan").main(epochs=1, runs=tmp_path, filters=4, steps=2)
    names = {path.name for path in (tmp_path / "cyclegan").iterdir()}
    assert names == {"a_to_b.keras", "b_to_a.keras", "translated.png"}
    assert "mean absolute error" in capsys.readouterr().out


def test_simclr(capsys):
    results = load("simclr").main(epochs=2, filters=4, steps=2)
    assert results.keys() == {"contrastive features", "random features"}
    assert "val_probe_accuracy" in capsys.readouterr().out


# ---------------------------------------------------------------------- beside loops by hand


def steps_beside_a_loop_by_hand(make, holders, batches, plain, optimizers):
    """Asserts that a trainer's steps sum up to what a plain loop returns, with equal weights.

    Args:
        make: Makes the trainer.
        holders: Returns what its step reads and changes, given the trainer, besides the model.
        batches: Arrays with one row per step.
        plain: The step by hand, `plain(trainer, loop, *batch)`.
        optimizers: Returns pairs of an optimizer and what it trains, given the trainer.
    """
    sides = []
    core.set_jit_compile(False if keras.backend.backend() == "tensorflow" else "auto")
    try:
        for _ in range(2):
            keras.utils.set_random_seed(2)
            trainer = make()
            for optimizer, weights in optimizers(trainer):
                optimizer.build(weights)
            step = functools.partial(plain, trainer)
            case = Case(trainer, batches, holders(trainer), step, num_steps=len(batches[0]))
            sides.append(case.start())
        ours, hand = sides
        expected = plain_losses(hand)
        data = [*ours.batches]
        history = ours.trainer.train(data, 1, steps_per_execution=1)
    finally:
        core.set_jit_compile("auto")
    terms = [history.steps[n] for n in history.steps if n not in ("epoch", "step")]
    np.testing.assert_allclose(np.sum(terms, 0), expected, rtol=1e-4)
    for own, other in zip(ours.variables, hand.variables, strict=True):
        if "accuracy" not in own.path:  # metrics are reset at the end of the epoch
            values = [ops.convert_to_numpy(each) for each in (own, other)]
            np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5, err_msg=own.path)


def test_cyclegan_steps_equal_those_of_a_loop_by_hand():
    names = ("a_to_b", "b_to_a", "judge_a", "judge_b")

    def groups(trainer):
        models = trainer.model
        return {n: (models[n].trainable_variables, trainer.optimizers[n]) for n in names}

    def plain(trainer, loop, a, b):
        f, g, judge_a, judge_b = (trainer.model[name] for name in names)

        def losses():
            fake_b, fake_a = f(a, training=True), g(b, training=True)
            back_a, back_b = g(fake_b, training=True), f(fake_a, training=True)
            cycle = ops.mean(ops.abs(back_a - a)) + ops.mean(ops.abs(back_b - b))
            result = {"cycle": cycle}
            for name, judge, real, fake, opponent in (
                ("judge_a", judge_a, a, fake_a, "b_to_a"),
                ("judge_b", judge_b, b, fake_b, "a_to_b"),
            ):
                _, (slope,) = loop.value_and_grad(
                    lambda x, judge=judge: ops.sum(judge(x)), [], inputs=[real]
                )
                good, bad = judge(real), judge(fake)
                result[name] = ops.mean((1 - good) ** 2) / 2 + ops.mean(bad**2) / 2
                result[name] += ops.sum(slope**2) / BATCH
                result[opponent] = ops.mean((1 - bad) ** 2) + 10 * cycle
            return result

        return sum(loop.minimize_together(losses, groups(trainer)).values())

    generator = np.random.default_rng(0)
    a, b = generator.uniform(-1, 1, (2, 3, BATCH, 8, 8, 1)).astype("float32")
    steps_beside_a_loop_by_hand(
        lambda: load("cyclegan").make_trainer(filters=4, rate=1e-3),
        lambda trainer: tuple(trainer.optimizers.values()),
        (a, b),
        plain,
        lambda trainer: [(optimizer, weights) for weights, optimizer in groups(trainer).values()],
    )


def test_simclr_steps_equal_those_of_a_loop_by_hand():
    def weights(models):
        return [*models.encoder.trainable_variables, *models.head.trainable_variables]

    def plain(trainer, loop, images, labelled, labels):
        models, augment = trainer.model, trainer.augment
        one, other, few = (augment(each, training=True) for each in (images, images, labelled))
        count = BATCH

        def contrastive():
            z = ops.concatenate([models.head(models.encoder(view)) for view in (one, other)])
            z = z / ops.sqrt(ops.sum(z**2, -1, keepdims=True))
            similar = ops.exp(ops.matmul(z, ops.transpose(z)) / trainer.temperature)
            same = np.eye(2 * count, dtype="float32")
            similar = similar * ops.convert_to_tensor(1 - same)
            pairs = similar * ops.convert_to_tensor(np.roll(same, count, axis=1))
            return -ops.mean(ops.log(ops.sum(pairs, -1) / ops.sum(similar, -1)))

        loss = loop.minimize(contrastive, weights(models), trainer.optimizer)
        features = models.encoder(few)

        def probed():
            logs = ops.log_softmax(models.probe(features))
            return -ops.mean(ops.sum(logs * ops.one_hot(labels, 10), -1))

        probe = models.probe.trainable_variables
        return loss + loop.minimize(probed, probe, trainer.probe_optimizer)

    generator = np.random.default_rng(0)
    images, labelled = generator.uniform(-1, 1, (2, 3, BATCH, 8, 8, 1)).astype("float32")
    labels = generator.integers(0, 10, (3, BATCH)).astype("int32")
    steps_beside_a_loop_by_hand(
        lambda: load("simclr").make_trainer(filters=2),
        lambda t: (t.augment, t.probe_optimizer, t.contrastive_accuracy, t.probe_accuracy),
        (images, labelled, labels),
        plain,
        lambda t: [
            (t.optimizer, weights(t.model)),
            (t.probe_optimizer, t.model.probe.trainable_variables),
        ],
    )
