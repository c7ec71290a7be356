"""Programs that fit can't run: several models and losses, live data, phases of training."""

import copy

import keras
import numpy as np
import pytest
from keras import layers, ops
from recorder import Recorder

from polus import core
from polus.average import Average
from polus.callbacks import (
    ConsoleLogCallback,
    EarlyStop,
    KerasCallback,
    LearningRateScheduler,
    LossSmoothCallback,
    SaveModelCallback,
    ValidationDataCallback,
)
from polus.checkpoint import Checkpoint, CheckpointError
from polus.optimizers import by_name
from polus.training import BaseTrainer, ClassifierTrainer

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
BATCHES = [X[i : i + 16] for i in range(0, 64, 16)]


def dense(inputs, outputs, name=None):
    return keras.Sequential(
        [keras.Input((inputs,)), layers.Dense(8, "relu"), layers.Dense(outputs)], name=name
    )


class GAN(BaseTrainer):
    """A GAN as one writes it elsewhere: no loss, results of its own names, no count of steps."""

    def __init__(self, **arguments):
        keras.utils.set_random_seed(3)
        self.discriminator = dense(6, 1)
        self.d_optimizer = keras.optimizers.Adam(1e-2)
        super().__init__(dense(4, 6), keras.optimizers.Adam(1e-2), **arguments)
        self.seed = keras.random.SeedGenerator(0)

    def losses(self, real):
        noise = keras.random.normal((ops.shape(real)[0], 4), seed=self.seed)
        d_loss = self.minimize(
            lambda: (
                ops.mean((self.discriminator(real) - 1) ** 2)
                + ops.mean(self.discriminator(self.model(noise)) ** 2)
            ),
            self.discriminator.trainable_weights,
            self.d_optimizer,
        )
        g_loss = self.minimize(
            lambda: ops.mean((self.discriminator(self.model(noise)) - 1) ** 2),
            self.model.trainable_weights,
        )
        return g_loss, d_loss

    def train_step(self, real):
        g_loss, d_loss = self.losses(real)
        return {"g_loss": g_loss, "d_loss": d_loss}


class LossNamedGAN(GAN):
    """The same with everything that used to be asked for."""

    def train_step(self, real):
        g_loss, d_loss = self.losses(real)
        self.step_counter.assign_add(1)
        return {"loss": g_loss, "d_loss": d_loss}


# ---------------------------------------------------------------------- no loss


def test_a_step_without_a_loss_trains_as_one_with_it(capsys):
    reference = LossNamedGAN(loss=ops.mean)
    expected = reference.train(BATCHES, 2, steps_per_execution=2).steps

    trainer, seen = GAN(), Recorder(every_steps=None)
    seen.on_train_batch_end = lambda epoch, step, loss: seen.record("loss", loss)
    callbacks = [seen, ConsoleLogCallback(), EarlyStop("d_loss")]
    history = trainer.train(BATCHES, 2, callbacks=callbacks, steps_per_execution=2)

    np.testing.assert_array_equal(history.steps["g_loss"], expected["loss"])
    np.testing.assert_array_equal(history.steps["d_loss"], expected["d_loss"])
    assert set(history.steps) == {"epoch", "step", "g_loss", "d_loss"}
    rates = {"learning_rate", "d_optimizer_learning_rate"}
    assert set(history.epochs[0]) == {"epoch", "g_loss", "d_loss", *rates}
    assert seen.names.count("loss") == 8
    assert {event for event in seen.events if event[0] == "loss"} == {("loss", None)}
    assert "g_loss" in capsys.readouterr().out
    assert "loss=" not in repr(trainer).replace("g_loss", "")
    assert int(ops.convert_to_numpy(trainer.step_counter)) == 8
    trainer.train_step(BATCHES[0])  # outside of train as well
    assert int(ops.convert_to_numpy(trainer.step_counter)) == 9
    assert int(ops.convert_to_numpy(reference.step_counter)) == 8  # which counts by itself


def test_the_primary_term_is_the_loss():
    class Named(GAN):
        primary = "d_loss"

    trainer = Named()
    assert GAN(primary="d_loss").primary == trainer.primary
    seen, smooth = Recorder(), LossSmoothCallback()
    stopping = keras.callbacks.EarlyStopping("loss", patience=5)
    history = trainer.train(BATCHES, 2, callbacks=[seen, smooth, EarlyStop("loss"), stopping])
    np.testing.assert_array_equal(history.steps["loss"], history.steps["d_loss"])
    np.testing.assert_allclose(seen.losses, history.steps["d_loss"])
    assert history.epochs[1]["loss"] == history.epochs[1]["d_loss"] == stopping.best


def test_asking_for_a_loss_that_is_not_there_raises():
    for callback in (EarlyStop("loss"), LossSmoothCallback()):
        with pytest.raises(ValueError, match="primary="):
            GAN().train(BATCHES, 1, callbacks=[callback])
    with pytest.raises(ValueError, match=r"'d_loss'.*primary="):
        GAN().lr_finder(BATCHES)
    with pytest.raises(ValueError, match="primary is 'total', and the step returns '"):
        GAN(primary="total").train(BATCHES, 1)
    with pytest.raises(ValueError, match=r"primary is 'd_loss'.*'loss' as well"):
        LossNamedGAN(primary="d_loss").train(BATCHES, 1)
    with pytest.raises(TypeError, match=r"loss must be a callable.*overrides train_step"):
        ClassifierTrainer(dense(6, 2), keras.optimizers.SGD())


class Distance(BaseTrainer):
    def train_step(self, x):
        return {
            "gap": self.minimize(lambda: ops.mean((self.model(x) - x) ** 2), self.trainable_weights)
        }


def test_a_monitor_knows_which_way_a_term_improves(tmp_path):
    """A name that doesn't tell was taken for a score: the worst epoch was the best one."""

    def train(callbacks, **arguments):
        trainer = Distance(dense(6, 6), keras.optimizers.Adam(1e-2), **arguments)
        history = trainer.train(BATCHES, 3, callbacks)
        assert history.epochs[2]["gap"] < history.epochs[1]["gap"]
        return trainer, history

    paths = tmp_path / "ours.keras", tmp_path / "keras.keras"
    trainer, _ = train(
        [
            SaveModelCallback("best", paths[0], monitor="gap"),
            keras.callbacks.ModelCheckpoint(paths[1], monitor="gap", save_best_only=True),
            EarlyStop("gap", patience=1),
        ],
        primary="gap",
    )
    for path in paths:
        saved = keras.saving.load_model(path)
        for kept, last in zip(saved.weights, trainer.model.weights, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(kept), ops.convert_to_numpy(last))
    with pytest.raises(ValueError, match=r"high or a low 'gap' is better.*mode=\"min\", or"):
        train([EarlyStop("gap")])
    _, history = train([EarlyStop("gap", patience=1, mode="min")])
    assert len(history.epochs) == 3


def test_a_method_named_loss_is_the_loss(caplog):
    class Own(BaseTrainer):
        def forward_with_grads(self, x):
            return (self.model(x, training=True),)

        def loss(self, y):
            return ops.mean(y**2)

    history = Own(dense(6, 2), keras.optimizers.SGD(0.1)).train(BATCHES, 2)
    assert history.epochs[1]["loss"] < history.epochs[0]["loss"]
    assert caplog.text.count("Training all") == 1  # the step is prepared once, not every epoch


def test_the_range_test_follows_the_primary_term():
    result = GAN(primary="g_loss").lr_finder(BATCHES, num_steps=20)
    assert len(result.losses) > 1


# ---------------------------------------------------------------------- several models


class Autoencoder(BaseTrainer):
    def forward_with_grads(self, x):
        code = self.model.encoder(x, training=True)
        return x, self.model["decoder"](code, training=True)

    def evaluation_step(self, x):
        return x, self.model["decoder"](self.model["encoder"](x))


def autoencoder(**arguments):
    keras.utils.set_random_seed(5)
    models = {"encoder": dense(6, 2), "decoder": dense(2, 6)}
    mse = keras.losses.MeanSquaredError()
    return Autoencoder(models, keras.optimizers.Adam(1e-2), mse, **arguments)


class Watch(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.code = self.model.encoder(X[:1])


def test_a_dict_of_models_is_trained_named_and_saved(tmp_path, caplog):
    keras.utils.set_random_seed(5)
    encoder, decoder = dense(6, 2), dense(2, 6)
    whole = keras.Sequential([keras.Input((6,)), encoder, decoder])
    fit = ClassifierTrainer(whole, keras.optimizers.Adam(1e-2), keras.losses.MeanSquaredError())
    expected = fit.train([(x, x) for x in BATCHES], 2, steps_per_execution=1).steps["loss"]

    trainer, watch = autoencoder(), Watch()
    assert "encoder: Sequential" in repr(trainer)
    assert "8 of 8 variables" in repr(trainer)
    saving = SaveModelCallback("end", tmp_path / "{model}.keras")
    teacher = SaveModelCallback("end", tmp_path / "the.weights.h5", models=["decoder"])
    history = trainer.train(BATCHES, 2, [watch, saving, teacher], steps_per_execution=1)

    np.testing.assert_allclose(history.steps["loss"], expected, rtol=1e-5)
    assert "of the models encoder, decoder (" in caplog.text
    assert tuple(watch.code.shape) == (1, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "encoder.keras",
        "decoder.keras",
        "the.weights.h5",
    }
    trainer.targets = {"encoder": Average(trainer.model.encoder, 0.9)}
    target = SaveModelCallback("end", tmp_path / "{model}.keras", models=["targets.encoder"])
    trainer.train(BATCHES, 1, [target], steps_per_execution=1)
    loaded = keras.saving.load_model(tmp_path / "targets.encoder.keras")
    average = trainer.targets["encoder"].model.get_weights()
    np.testing.assert_array_equal(loaded.get_weights()[0], average[0])
    saving.on_train_end()
    loaded = keras.saving.load_model(tmp_path / "decoder.keras")
    for old, new in zip(trainer.model.decoder.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(old), ops.convert_to_numpy(new))
    assert list(trainer.model) == ["encoder", "decoder"]
    trainer.model.save(tmp_path / "both.keras")  # as a Keras callback does
    both = keras.saving.load_model(tmp_path / "both.keras")
    for old, new in zip(trainer.model.weights, both.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(old), ops.convert_to_numpy(new))


def test_a_run_of_several_models_resumes_exactly(tmp_path):
    """With models, optimizers and metrics in a dict, in the middle of an epoch."""
    expected = autoencoder().train(BATCHES, 2, steps_per_execution=1).steps["loss"]

    class Killed(Exception):
        pass

    def kill(name, *place):
        if (name, *place[:2]) == ("step_end", 0, 2):
            raise Killed

    callbacks = [Recorder(kill), Checkpoint(tmp_path, every_steps=1)]
    with pytest.raises(Killed):
        autoencoder().train(BATCHES, 2, callbacks, steps_per_execution=1, resume=tmp_path)
    resumed = autoencoder()
    history = resumed.train(
        BATCHES, 2, [Checkpoint(tmp_path)], steps_per_execution=1, resume=tmp_path
    )
    np.testing.assert_array_equal(history.steps["loss"], expected)

    changed = autoencoder()
    changed.model["decoder"].layers[0].activation = keras.activations.tanh
    with pytest.raises(CheckpointError, match=r"model\.decoder"):
        changed.train(BATCHES, 3, resume=tmp_path)


def test_copies_of_a_trainer_of_several_models():
    trainer = autoencoder()
    copied = copy.deepcopy(trainer)
    before = trainer.model.encoder.get_weights()
    copied.train(BATCHES, 1, steps_per_execution=1)
    np.testing.assert_array_equal(trainer.model.encoder.get_weights()[0], before[0])
    assert not np.array_equal(copied.model.encoder.get_weights()[0], before[0])


def test_models_in_a_dict_that_are_wrong_raise(tmp_path):
    optimizer = keras.optimizers.SGD()
    with pytest.raises(TypeError, match=r"model\['b'\] must be a keras.Model, got builtins.int"):
        Autoencoder({"a": dense(6, 2), "b": 3}, optimizer, ops.mean)
    with pytest.raises(TypeError, match="names as keys"):
        Autoencoder({}, optimizer, ops.mean)
    with pytest.raises(TypeError, match=r"Call one of them: self.model\['encoder'\]"):
        autoencoder().model(X)
    with pytest.raises(ValueError, match=r"2 models are saved .*\{model\}"):
        autoencoder().train(BATCHES, 1, [SaveModelCallback("end", tmp_path / "m.keras")])
    saving = SaveModelCallback("end", tmp_path / "m.keras", models=["encoded"])
    with pytest.raises(ValueError, match=r"no model named 'encoded'.*Did you mean 'encoder'"):
        autoencoder().train(BATCHES, 1, [saving])
    clash = Autoencoder({"layers": dense(6, 2)}, optimizer, ops.mean)
    assert clash.model["layers"].output_shape == (None, 2)  # which `keras.Model` has as well


# ---------------------------------------------------------------------- metrics by phase

Y = (X[:, 0] > 0).astype("int32")
LABELLED = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]


def accuracy(name="accuracy"):
    return keras.metrics.SparseCategoricalAccuracy(name=name)


def classifier(metrics, cls=ClassifierTrainer, **arguments):
    keras.utils.set_random_seed(5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return cls(dense(6, 2), keras.optimizers.Adam(1e-2), loss, metrics=metrics, **arguments)


def test_metrics_by_phase():
    shared = accuracy("shared")
    phases = {"train": [accuracy(), shared], "validation": [accuracy(), shared, accuracy("more")]}
    history = classifier(phases).train(LABELLED, 1, [ValidationDataCallback(LABELLED[:2])])
    assert list(history.epochs[0]) == [
        *("epoch", "loss", "accuracy", "shared"),
        *("val_loss", "val_accuracy", "val_shared", "val_more"),
    ]
    both = classifier([accuracy()]).train(LABELLED, 1, [ValidationDataCallback(LABELLED[:2])])
    for name in ("accuracy", "val_accuracy"):
        assert history.epochs[0][name] == both.epochs[0][name]
    with pytest.raises(ValueError, match="2 metrics are named 'accuracy'"):
        classifier({"train": [], "validation": [accuracy(), accuracy()]})


def test_what_only_the_step_feeds_is_not_validated():
    class Step(ClassifierTrainer):
        def train_step(self, x, y):
            loss = super().train_step(x, y)
            self.norm.update_state(ops.mean(x**2))
            return loss

        def metric_samples(self, *outputs):
            return None

    norm = keras.metrics.Mean(name="norm")
    trainer = classifier([norm, accuracy()], Step)
    trainer.norm = norm
    history = trainer.train(LABELLED, 1, [ValidationDataCallback(LABELLED)])
    np.testing.assert_allclose(history.epochs[0]["norm"], np.mean(X**2), rtol=1e-5)
    assert "val_norm" not in history.epochs[0]
    assert history.epochs[0]["val_accuracy"] == trainer.evaluate(LABELLED)["accuracy"]


class Sizes(keras.metrics.Metric):
    """Returns a dict."""

    def __init__(self):
        super().__init__(name="sizes")
        self.total = self.add_variable((), "zeros")

    def update_state(self, y, prediction, sample_weight=None):
        self.total.assign_add(ops.sum(prediction**2))

    def result(self):
        return {"total": self.total + 0, "half": self.total / 2}


class Measuring(keras.layers.Layer):
    """Has metrics of its own, one in a list and one in a dict whose keys can't be sorted."""

    def __init__(self):
        super().__init__()
        self.mean = keras.metrics.Mean(name="mean_input")
        self.others = [keras.metrics.Sum(name="sum_input")]
        self.by_key = {1: keras.metrics.Sum(name="sum_again"), "two": None}

    def call(self, x):
        self.mean.update_state(x)
        self.others[0].update_state(x)
        self.by_key[1].update_state(x)
        return x


def test_metrics_of_layers_and_metrics_that_return_dicts_are_logged_as_in_fit():
    x, y = (np.concatenate(part) for part in zip(*LABELLED, strict=True))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    on_jax = keras.config.backend() == "jax"  # where a metric in a layer raises in `fit`
    heard, found = {}, {}
    for how in ("fit", "train"):
        batches = heard[how] = []

        def hear(batch, logs, batches=batches):
            batches.append(dict(logs))

        keras.utils.set_random_seed(1)
        inner = [] if on_jax else [Measuring()]
        model = keras.Sequential([keras.Input((6,)), *inner, keras.layers.Dense(3)])
        sgd, hearing = (
            keras.optimizers.SGD(),
            keras.callbacks.LambdaCallback(on_train_batch_end=hear),
        )
        if how == "fit":
            model.compile(sgd, loss, metrics=[Sizes()])
            size, data = len(LABELLED[0][0]), (x, y)
            history = model.fit(
                x, y, size, shuffle=False, verbose=0, callbacks=[hearing], validation_data=data
            )
            found[how] = {name: values[0] for name, values in history.history.items()}
        else:
            trainer = ClassifierTrainer(model, sgd, loss, [Sizes()])
            history = trainer.train(LABELLED, 1, [hearing, ValidationDataCallback(LABELLED)])
            found[how] = {k: v for k, v in history.epochs[0].items() if k != "epoch"}
    logs = [(found["train"], found["fit"]), *zip(heard["train"], heard["fit"], strict=True)]
    assert len(logs) == 5
    assert on_jax or {"mean_input", "val_sum_input", "sum_again"} <= found["fit"].keys()
    assert "half" in heard["fit"][0]
    for got, expected in logs:
        assert got == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)


def test_a_dict_of_results_with_a_name_that_is_taken_raises():
    class Named(Sizes):
        def result(self):
            return {"loss": self.total}

    with pytest.raises(ValueError, match=r"returns a dict with the key 'loss'.*Rename the key"):
        classifier([Named()]).evaluate(LABELLED)


def test_an_evaluation_step_returns_samples_by_metric():
    class Named(ClassifierTrainer):
        def evaluation_step(self, x, y):
            logits = self.model(x)
            return {"accuracy": (y, logits), "norm": x**2, "loss": self.loss(y, logits)}

    metrics = [accuracy(), keras.metrics.Mean(name="norm"), accuracy("of_training")]
    trainer, plain = classifier(metrics, Named), classifier([accuracy()])
    found, expected = trainer.evaluate(LABELLED), plain.evaluate(LABELLED)
    np.testing.assert_allclose(found.pop("norm"), np.mean(X**2), rtol=1e-5)
    assert found.keys() == {"loss", "accuracy"}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)

    class Misspelled(ClassifierTrainer):
        def evaluation_step(self, x, y):
            return {"acuracy": (y, self.model(x))}

    with pytest.raises(ValueError, match=r"for 'acuracy'.*Did you mean 'accuracy'"):
        classifier([accuracy()], Misspelled).evaluate(LABELLED)


# ---------------------------------------------------------------------- several optimizers


class ByHand(BaseTrainer):
    """Takes its gradients and calls its optimizer itself."""

    def train_step(self, x):
        weights = self.trainable_weights

        def loss():
            value = ops.mean((self.model(x, training=True) - x) ** 2)
            return self.optimizer.scale_loss(value), value

        (_, value), gradients = core.value_and_grad(loss, weights, has_aux=True)
        if isinstance(self.optimizer, keras.optimizers.MultiOptimizer):
            self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        else:
            self.optimizer.apply(gradients, weights)
        return {"gap": value}


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_of_a_loss_that_is_not_scaled_warn(scaled, caplog):
    """Loss scaling divides them all the same: by 32,768 at first."""

    class Careless(BaseTrainer):
        def train_step(self, x):
            def loss():
                value = ops.mean((self.model(x, training=True) - x) ** 2)
                return self.optimizer.scale_loss(value) if scaled else value

            weights = self.trainable_weights
            value, gradients = core.value_and_grad(loss, weights)
            self.optimizer.apply(gradients, weights)
            return {"gap": value}

    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-2))
    Careless(dense(6, 6), optimizer).train(BATCHES, 1)
    warned = ["Differentiate optimizer.scale_loss(loss)" in message for message in caplog.messages]
    assert any(warned) == (not scaled)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Adam(1e-2),
        lambda: by_name({"*/bias": keras.optimizers.Adam(1e-1), "*": keras.optimizers.Adam(1e-2)}),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2)),
    ],
)
def test_an_optimizer_that_the_step_calls_is_built_and_named(make, caplog):
    """Slots that are made late failed on TensorFlow, and loss scaling moved nothing on JAX."""

    def train(cls, **arguments):
        keras.utils.set_random_seed(1)
        trainer = cls(dense(6, 6), make(), **arguments)
        return trainer.train(BATCHES, 2).steps["gap"], trainer

    expected, _ = train(Distance)
    caplog.clear()
    gaps, trainer = train(ByHand)
    np.testing.assert_allclose(gaps, expected, rtol=1e-5)
    assert caplog.messages[0].startswith("Training all 4 trainable variables of the model")
    bad = np.full((1, 6), np.nan, "float32")
    before = trainer.model.get_weights()
    history = trainer.train([BATCHES[0], bad], 1, on_nonfinite="skip", steps_per_execution=1)
    after = trainer.model.get_weights()
    assert np.isfinite(after[0]).all()
    assert not np.array_equal(before[0], after[0])
    assert history.record[0]["skipped_steps"] == 1


class Faint(BaseTrainer):
    """Two models by two optimizers, with gradients that are zero in float16 unless scaled."""

    def __init__(self, scaled):
        scale = keras.optimizers.LossScaleOptimizer if scaled else lambda optimizer: optimizer
        keras.utils.set_random_seed(5)
        layer = lambda: layers.Dense(6, dtype="mixed_float16")  # noqa: E731
        models = {name: keras.Sequential([keras.Input((6,)), layer()]) for name in "ab"}
        for model in models.values():
            model.dtype_policy = "mixed_float16"
        self.optimizers = {name: scale(keras.optimizers.Adam(1e-2)) for name in "ab"}
        self.more = [scale(keras.optimizers.Adam(1e-2))]
        super().__init__(models, self.optimizers["a"])

    def train_step(self, x):
        a, b = self.model["a"], self.model["b"]

        def loss():
            return ops.mean(ops.cast(b(a(x)), "float32") ** 2) * 1e-7

        first = self.minimize(loss, a.trainable_weights, self.optimizers["a"])
        kernel, bias = b.trainable_weights
        second = self.minimize(loss, [kernel], self.optimizers["b"])
        return {"a": first, "b": second, "c": self.minimize(loss, [bias], self.more[0])}


def test_each_optimizer_scales_its_loss_in_float16():
    """The second model did not move: its gradients were zero."""
    trainer, expected = Faint(False), Faint(True)
    before = trainer.model.get_weights()
    history = trainer.train(BATCHES, 1)
    expected.train(BATCHES, 1)
    for old, new, scaled in zip(
        before, trainer.model.get_weights(), expected.model.get_weights(), strict=True
    ):
        assert not np.array_equal(old, new)
        np.testing.assert_array_equal(new, scaled)
    assert trainer.optimizer is trainer.optimizers["a"]
    assert {"optimizers.b_learning_rate", "more.0_learning_rate"} <= set(history.epochs[0])


def test_the_rates_of_several_optimizers(caplog):
    seen = []

    class Rates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(logs)

    trainer = GAN()
    d_only = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 10)
    callbacks = [
        LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1)),
        KerasCallback(d_only, optimizer="d_optimizer"),
        Rates(),
    ]
    history = trainer.train(BATCHES, 2, callbacks)
    rates = {
        name: history.to_dict()[name] for name in ("learning_rate", "d_optimizer_learning_rate")
    }
    np.testing.assert_allclose(rates["learning_rate"], [0.1, 0.05])
    np.testing.assert_allclose(rates["d_optimizer_learning_rate"], [1e-3, 1e-4])
    assert seen[1]["d_optimizer_learning_rate"] == rates["d_optimizer_learning_rate"][1]

    trainer.primary = "d_loss"
    trainer.lr_finder(BATCHES, num_steps=16, optimizer="d_optimizer")
    assert "sweeps the rate of d_optimizer; optimizer keep" in caplog.text
    with pytest.raises(ValueError, match=r"no optimizer named 'd_optimiser'.*'d_optimizer'"):
        trainer.train(BATCHES, 1, [LearningRateScheduler(lambda epoch: 0.1, "d_optimiser")])


@pytest.mark.needs_keras_3_15
def test_a_multi_optimizer_trains_as_two_do(tmp_path):
    def split(encoder, decoder):
        def choose(variable):
            ours = {id(v) for v in encoder.trainable_variables}
            return optimizers["encoder" if id(variable) in ours else "decoder"]

        optimizers = {"encoder": keras.optimizers.SGD(0.1), "decoder": keras.optimizers.Adam(0.01)}
        return keras.optimizers.MultiOptimizer(choose)

    def trained(**arguments):
        keras.utils.set_random_seed(5)
        models = {"encoder": dense(6, 2), "decoder": dense(2, 6)}
        loss = keras.losses.MeanSquaredError()
        trainer = Autoencoder(models, split(*models.values()), loss)
        history = trainer.train(BATCHES, 2, steps_per_execution=2, **arguments)
        return trainer, history

    class ByHand(Autoencoder):
        def train_step(self, x):
            forward = lambda: self.loss(*self.forward_with_grads(x))  # noqa: E731
            weights = [self.model[name].trainable_weights for name in self.model]
            return self.minimize_together(
                lambda: dict.fromkeys(["loss", "d_loss"], forward()),
                {"loss": (weights[0], self.optimizer), "d_loss": (weights[1], self.other)},
            )

    trainer, history = trained(callbacks=[Checkpoint(tmp_path)])
    assert "MultiOptimizer(SGD(learning_rate=0.1), Adam(learning_rate=0.01))" in repr(trainer)
    assert history.epochs[0]["optimizer.sgd_learning_rate"] == pytest.approx(0.1)
    keras.utils.set_random_seed(5)
    models = {"encoder": dense(6, 2), "decoder": dense(2, 6)}
    hand = ByHand(models, keras.optimizers.SGD(0.1), keras.losses.MeanSquaredError())
    hand.other = keras.optimizers.Adam(0.01)
    expected = hand.train(BATCHES, 2, steps_per_execution=2).steps["loss"]
    np.testing.assert_allclose(history.steps["loss"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="one of each inner optimizer"):
        trained(learning_rate=0.1)
