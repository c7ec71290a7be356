"""The documented trainer: its API, and its results compared with Keras' fit."""

import contextlib
import inspect
import logging

import keras
import numpy as np
import pytest
from keras import ops
from recorder import Recorder

import polus.core
import polus.data
from polus.callbacks import Callback, ValidationDataCallback
from polus.metrics import Accuracy
from polus.training import BaseTrainer, ClassifierTrainer

X = np.random.default_rng(0).normal(size=(80, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 1] > 0)
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 80, 16)]
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def to_float(tensor) -> float:
    return float(ops.convert_to_numpy(tensor))


def make_model(built: bool = True, **dense) -> keras.Model:
    layers = [keras.layers.Dense(8, "relu", **dense), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers] if built else layers)


def make_trainer(model=None, **kwargs) -> ClassifierTrainer:
    model = model or make_model()
    return ClassifierTrainer(model, keras.optimizers.Adam(1e-2), CROSS_ENTROPY, **kwargs)


@pytest.fixture
def jit_compile_off():
    """No XLA where it is a choice: on TensorFlow it draws other dropout masks from a seed."""
    setting = keras.config.backend() == "jax"
    polus.core.set_jit_compile(setting)
    yield setting
    polus.core.set_jit_compile("auto")


# ---------------------------------------------------------------------- equal to Keras' fit


@pytest.mark.parametrize("case", ["plain", "regularised", "dropout", "batch_norm", "weighted"])
def test_same_weights_as_fit(case, jit_compile_off):
    def make(built):
        keras.utils.set_random_seed(1)
        if case == "regularised":
            return make_model(
                built, kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(0.01)
            )
        model = make_model(built)
        if case == "dropout":
            model.add(keras.layers.Dropout(0.3, seed=5))
        if case == "batch_norm":
            model.add(keras.layers.BatchNormalization())
        return model

    def optimizer():
        # A bias in front of a normalization has no gradient, and Adam would blow up its rounding.
        return keras.optimizers.SGD(0.1) if case == "batch_norm" else keras.optimizers.Adam(1e-2)

    weights = (np.linspace(0, 2, 80).astype("float32"),) if case == "weighted" else ()
    theirs = make(built=True)
    theirs.compile(optimizer(), CROSS_ENTROPY, jit_compile=jit_compile_off)
    expected = theirs.fit(
        X, Y, 16, 3, shuffle=False, verbose=0, sample_weight=weights[0] if weights else None
    )
    data = polus.data.from_arrays((X, Y, *weights), 16, shuffle=False)
    for built in (True, False):
        ours = make(built)
        history = ClassifierTrainer(ours, optimizer(), CROSS_ENTROPY).train(data, epochs=3)
        for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(history.to_dict()["loss"], expected.history["loss"], rtol=1e-4)


def test_only_the_given_trainable_weights_are_trained():
    model = make_model()
    trainer = ClassifierTrainer(
        model, model.layers[1].trainable_weights, keras.optimizers.Adam(0.1), CROSS_ENTROPY
    )
    before = [w.copy() for w in model.get_weights()]
    trainer.train(BATCHES, epochs=1)
    changed = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert changed == [False, False, True, True]


def test_training_all_weights_is_logged(caplog):
    caplog.set_level(logging.INFO)
    make_trainer().train(BATCHES, epochs=1)
    assert "Training all 4 trainable variables of the model (83 parameters)" in caplog.text


# ---------------------------------------------------------------------- what a subclass defines


def test_distillation_as_in_the_docs():
    class Distiller(BaseTrainer):
        def __init__(self, student, teacher, **kwargs):
            super().__init__(student, **kwargs)
            self.teacher = teacher

        def forward_without_grads(self, x, y):
            return x, y, self.teacher(x, training=False)

        def forward_with_grads(self, x, y, soft):
            return y, soft, self.model(x, training=True)

    teacher = make_model(built=False)  # built by the step, as the student is
    trainer = Distiller(
        make_model(built=False),
        teacher,
        optimizer=keras.optimizers.Adam(0.05),
        loss=lambda y, soft, logits: ops.mean((soft - logits) ** 2),
    )
    history = trainer.train(BATCHES, epochs=30)
    losses = history.to_dict()["loss"]
    assert losses[-1] < 0.1 * losses[0]
    assert teacher.trainable_weights
    assert trainer.trainable_weights == (trainer.model.trainable_weights)


@pytest.mark.parametrize("spelling", ["forward", "foward"])
def test_both_spellings_of_forward_work(spelling):
    def without(self, x, y):
        return x * 2.0, y

    def with_grads(self, x, y):
        return y, self.model(x, training=True)

    cls = type(
        "Spelled",
        (BaseTrainer,),
        {f"{spelling}_without_grads": without, f"{spelling}_with_grads": with_grads},
    )
    trainer = cls(make_model(), keras.optimizers.SGD(0.0), CROSS_ENTROPY)
    history = trainer.train(BATCHES, epochs=1)
    expected = to_float(CROSS_ENTROPY(Y[:16], trainer.model(X[:16] * 2)))
    assert history.steps["loss"][0] == pytest.approx(expected, rel=1e-5)
    for name in ("forward", "foward"):
        assert getattr(trainer, f"{name}_without_grads")(X, Y)[0][0, 0] == X[0, 0] * 2

    class Sub(cls):  # the other spelling overrides, and super() finds either
        def foward_without_grads(self, x, y):
            return super().forward_without_grads(x, y)

    assert Sub.forward_without_grads is Sub.__dict__["foward_without_grads"]

    class Mixin:  # knows nothing of trainers
        pass

    setattr(Mixin, f"{spelling}_with_grads", lambda self, x, y: (y, self.model(x) * 0.0))

    class Mixed(Mixin, Sub):
        pass

    trainer = Mixed(make_model(), keras.optimizers.SGD(0.0), CROSS_ENTROPY)
    losses = trainer.train(BATCHES, epochs=1).steps["loss"]
    np.testing.assert_allclose(losses, np.log(3), rtol=1e-6)


def test_both_spellings_in_one_class_raise():
    with pytest.raises(TypeError, match="two spellings"):
        type(
            "Both",
            (BaseTrainer,),
            {"forward_with_grads": lambda s: 1, "foward_with_grads": lambda s: 2},
        )


def test_loss_terms_are_recorded_and_their_total_minimized():
    def loss(y, logits):
        main, size = CROSS_ENTROPY(y, logits), ops.mean(ops.abs(logits))
        return {"loss": main + 0.1 * size, "main": main, "size": size}

    model = make_model(kernel_regularizer="l2")
    trainer = ClassifierTrainer(model, keras.optimizers.Adam(0.05), loss)
    validation = ValidationDataCallback(BATCHES[:2])
    history = trainer.train(BATCHES, epochs=4, callbacks=[validation])
    steps, epochs = history.steps, history.to_dict()
    assert (steps["loss"] > steps["main"] + 0.1 * steps["size"]).all()  # and regularisation
    assert epochs["loss"][-1] < epochs["loss"][0]
    terms = ["loss", "main", "size"]
    assert set(epochs) == {"epoch", *terms, *(f"val_{term}" for term in terms)}
    y, logits = Y[:32], model(X[:32])
    assert epochs["val_main"][-1] == pytest.approx(to_float(CROSS_ENTROPY(y, logits)), rel=1e-5)
    total = to_float(loss(y, logits)["loss"] + sum(model.losses))
    assert epochs["val_loss"][-1] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("keyword", ["post_process_prediction", "post_process_logits"])
def test_post_process_prediction(keyword):
    trainer = make_trainer(**{keyword: lambda logits: logits * 0.0})
    history = trainer.train(BATCHES, epochs=1)
    np.testing.assert_allclose(history.steps["loss"], np.log(3), rtol=1e-6)
    assert trainer.post_process_logits is not None


def test_post_process_grads():
    model = make_model()
    before = model.get_weights()
    trainer = ClassifierTrainer(
        model,
        keras.optimizers.SGD(1.0),
        CROSS_ENTROPY,
        post_process_grads=lambda grads: [ops.ones_like(g) for g in grads],
    )
    trainer.train(BATCHES[:1], epochs=1)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_allclose(a - b, 1.0, rtol=1e-5)


def test_loss_scaling_does_not_change_post_processed_gradients():
    """`post_process_grads` sees true gradients, and the optimizer applies what it returns."""

    def trained(optimizer):
        def clipped(gradients):
            return [ops.clip(gradient, -0.05, 0.05) for gradient in gradients]

        keras.utils.set_random_seed(3)
        trainer = ClassifierTrainer(
            make_model(), optimizer, CROSS_ENTROPY, post_process_grads=clipped
        )
        trainer.train(BATCHES, epochs=1)
        return trainer.model.get_weights()

    plain = trained(keras.optimizers.SGD(0.5))
    # The scale changes on the way, as it does in a longer run.
    scaled = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.5), initial_scale=2.0**12, dynamic_growth_steps=2
    )
    for one, other in zip(plain, trained(scaled), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_train_step_outside_train_is_one_update():
    model = make_model(built=False)
    trainer = make_trainer(model)
    first = float(trainer.train_step(*BATCHES[0]))
    assert float(trainer.train_step(*BATCHES[0])) < first
    assert int(ops.convert_to_numpy(trainer.step_counter.value)) == 2


def test_forward_can_read_the_step_counter():
    class Warm(ClassifierTrainer):
        def forward_with_grads(self, x, y):
            return y, self.model(x) * ops.cast(self.step_counter, "float32")

    trainer = Warm(make_model(), keras.optimizers.SGD(0.0), CROSS_ENTROPY)
    losses = trainer.train(BATCHES[:1] * 3, epochs=1).steps["loss"]
    assert losses[0] == pytest.approx(np.log(3), rel=1e-5)
    assert len(set(losses.tolist())) == 3


def test_train_step_can_be_overridden():
    class Two(BaseTrainer):
        def __init__(self, one, other, *args, **kwargs):
            super().__init__(one, *args, **kwargs)
            self.other = other
            self.other_optimizer = keras.optimizers.SGD(0.1)
            self.traced = 0

        def train_step(self, x, y):
            self.traced += 1
            a = self.minimize(
                lambda: CROSS_ENTROPY(y, self.model(x)),
                self.model.trainable_weights,
                self.optimizer,
            )
            b = self.minimize(
                lambda: CROSS_ENTROPY(y, self.other(x)),
                self.other.trainable_weights,
                self.other_optimizer,
            )
            return {"loss": a, "other": b}

    trainer = Two(make_model(False), make_model(False), keras.optimizers.Adam(0.01), CROSS_ENTROPY)
    columns = trainer.train(BATCHES, epochs=6).to_dict()
    assert columns["loss"][-1] < columns["loss"][0]
    assert columns["other"][-1] < columns["other"][0]


def test_parts_replaced_between_runs_take_effect():
    model = make_model()
    head = model.layers[1].trainable_weights
    trainer = ClassifierTrainer(model, head, keras.optimizers.SGD(0.1), CROSS_ENTROPY)

    def changed(run):
        before = model.get_weights()
        run()
        after = model.get_weights()
        return [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]

    def epoch():
        return trainer.train(BATCHES, epochs=1).steps["loss"]

    assert changed(epoch) == [False, False, True, True]
    trainer.trainable_weights, trainer.optimizer = None, keras.optimizers.SGD(0.1)
    assert changed(lambda: trainer.train_step(*BATCHES[0])) == [True] * 4
    model.layers[1].trainable, trainer.optimizer = False, keras.optimizers.SGD(0.1)
    assert changed(epoch) == [True, True, False, False]
    trainer.post_process_logits = lambda logits: logits * 0.0
    trainer.post_process_grads = lambda gradients: gradients
    np.testing.assert_allclose(epoch(), np.log(3), rtol=1e-6)
    assert trainer.evaluate(BATCHES)["loss"] == pytest.approx(np.log(3), rel=1e-6)
    trainer.loss = lambda y, logits: ops.mean(logits) + 7.0
    np.testing.assert_allclose(epoch(), 7.0, rtol=1e-6)


def test_ema_weights_are_finalized_as_in_keras(jit_compile_off):
    class Overridden(ClassifierTrainer):
        def train_step(self, *inputs):
            return super().train_step(*inputs)

    def make():
        keras.utils.set_random_seed(5)
        return make_model(), keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)

    model, optimizer = make()
    model.compile(optimizer, CROSS_ENTROPY, jit_compile=jit_compile_off)
    model.fit(X, Y, 16, 2, shuffle=False, verbose=0)
    for cls in (ClassifierTrainer, Overridden):
        trainer = cls(*make(), CROSS_ENTROPY)
        trainer.train(BATCHES, epochs=2)
        for one, other in zip(trainer.model.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- datasets and batches


def test_dict_and_tensor_batches_are_one_argument():
    class One(BaseTrainer):
        def forward_with_grads(self, batch):
            x = batch["x"] if isinstance(batch, dict) else batch
            return (self.model(x),)

    for batches in ([{"x": X[:16]}], [X[:16]]):
        trainer = One(make_model(), keras.optimizers.SGD(0.1), lambda p: ops.mean(p**2))
        assert len(trainer.train(batches, epochs=2).steps["loss"]) == 2


def kinds_of_data():
    class Batches(keras.utils.PyDataset):
        def __init__(self):
            super().__init__()

        def __len__(self):
            return len(BATCHES)

        def __getitem__(self, i):
            return BATCHES[i]

    def generator():
        yield from BATCHES

    def tensorflow_data():
        tf = pytest.importorskip("tensorflow")
        return tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)

    def torch_data():
        torch = pytest.importorskip("torch")
        pairs = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
        return torch.utils.data.DataLoader(pairs, batch_size=16)

    return {
        "list": lambda: BATCHES,
        "PyDataset": Batches,
        "generator function": lambda: generator,
        "tf.data": tensorflow_data,
        "DataLoader": torch_data,
        "arrays": lambda: polus.data.from_arrays((X, Y), 16, shuffle=False),
    }


@pytest.fixture(scope="module")
def from_the_start():
    """Trains the same trainer, which compiles once, from the same weights each time."""
    trainer = make_trainer()
    trainer.build_on(BATCHES[0])
    variables = [*trainer.model.variables, *trainer.optimizer.variables]
    initial = [np.array(ops.convert_to_numpy(variable)) for variable in variables]

    def steps(data, steps_per_execution):
        for variable, value in zip(variables, initial, strict=True):
            variable.assign(value)
        return trainer.train(data, epochs=2, steps_per_execution=steps_per_execution).steps

    return steps


@pytest.mark.parametrize("kind", kinds_of_data())
@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_all_kinds_of_datasets_train_the_same(kind, steps_per_execution, from_the_start):
    expected = from_the_start(BATCHES, 1)
    got = from_the_start(kinds_of_data()[kind](), steps_per_execution)
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-5)
    assert got["step"].tolist() == [0, 1, 2, 3, 4] * 2


class Heard(keras.utils.PyDataset):
    def __init__(self, num_batches=5):
        super().__init__()
        self.count = num_batches
        self.heard = []

    @property
    def num_batches(self):
        return self.count

    def __getitem__(self, i):
        self.heard.append(i)
        return BATCHES[i % 5]

    def on_epoch_begin(self):
        self.heard.append("begin")

    def on_epoch_end(self):
        self.heard.append("end")


def test_pydataset_epoch_events_are_called():
    data = Heard()
    make_trainer().train(data, epochs=2)
    assert data.heard == ["begin", *range(5), "end"] * 2
    for num_batches, steps in ((5, 5), (5, 3), (None, 7)):  # the last one is endless
        data = Heard(num_batches)
        make_trainer().train(data, epochs=2, steps=steps, steps_per_execution=1)
        first, second = "-".join(map(str, data.heard)).split("-end-")
        for epoch in (first, second):  # it may be read ahead
            assert epoch.startswith("-".join(map(str, ["begin", *range(steps)])))
    with pytest.raises(ValueError, match="endless"):
        make_trainer().train(Heard(None), epochs=1)


def test_transform_is_applied_to_each_batch():
    def negative(batch):
        x, y = batch
        return -x, y

    keras.utils.set_random_seed(3)
    expected = make_trainer().train([(-x, y) for x, y in BATCHES], epochs=1).steps["loss"]
    for name in ("custom_data_transform_f", "train_map_f"):
        keras.utils.set_random_seed(3)
        got = make_trainer().train(BATCHES, epochs=1, **{name: negative}).steps["loss"]
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_steps_limit_an_endless_dataset():
    def endless():
        while True:
            yield BATCHES[0]

    history = make_trainer().train(endless, epochs=2, steps=7)
    assert history.steps["step"].tolist() == [*range(7)] * 2
    # An iterator goes on where it stopped, for it is never read too far.
    read = []
    source = (read.append(i) or BATCHES[i % 5] for i in range(10))
    make_trainer().train(source, epochs=2, steps=3)
    assert read == [*range(6)]


def test_exhausted_generator_raises_in_epoch_2():
    with pytest.raises(ValueError, match=r"exhausted before epoch 2.*without calling it"):
        make_trainer().train((batch for batch in BATCHES), epochs=2)


def test_an_iterator_counts_the_epochs_of_its_own_call():
    trainer = make_trainer()
    trainer.train(BATCHES, epochs=3)
    with pytest.raises(ValueError, match=r"exhausted before epoch 2\."):
        trainer.train(iter(BATCHES), epochs=2)


def test_epoch_loss_is_weighted_by_examples():
    batches = [(X[:10], Y[:10]), (X[10:12], Y[10:12])]
    trainer = ClassifierTrainer(make_model(), keras.optimizers.SGD(0.0), CROSS_ENTROPY)
    history = trainer.train(batches, epochs=1)
    expected = to_float(CROSS_ENTROPY(Y[:12], trainer.model(X[:12])))
    assert history.epochs[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(batches)["loss"] == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------- arguments of train


def test_learning_rate_is_set_for_one_run():
    trainer = make_trainer()
    seen = []
    recorder = Recorder(lambda *_: seen.append(to_float(trainer.optimizer.learning_rate)))
    trainer.train(BATCHES[:1], epochs=1, learning_rate=0.5, callbacks=[recorder])
    assert set(seen[1:-1]) == {0.5}
    assert to_float(trainer.optimizer.learning_rate) == pytest.approx(0.01)


def test_early_stop_ends_training_after_the_step():
    trainer = make_trainer()

    def stop(*event):
        if event[:3] == ("step_end", 1, 2):
            trainer.early_stop = True

    recorder = Recorder(stop)
    history = trainer.train(BATCHES, epochs=9, callbacks=[recorder])
    assert recorder.steps == [(0, s) for s in range(5)] + [(1, s) for s in range(3)]
    assert recorder.names[-1] == "train_end"
    assert len(history.epochs) == 2
    assert len(trainer.train(BATCHES, epochs=1).epochs) == 1  # the next run is not stopped


def test_changing_train_config_is_used_by_train():
    trainer = make_trainer()
    trainer.changing_train_config(tf_dataset=BATCHES, epochs=2)
    assert len(trainer.train().epochs) == 2
    assert len(trainer.train(epochs=1).epochs) == 1
    assert len(trainer.train().epochs) == 2
    with pytest.raises(TypeError, match="Did you mean 'epochs'"):
        trainer.changing_train_config(epoch=3)


def test_callbacks_of_one_run_are_not_kept_for_the_next():
    trainer, recorder = make_trainer(), Recorder()
    trainer.train(BATCHES, epochs=1, callbacks=[recorder])
    trainer.train(BATCHES, epochs=1)
    assert recorder.names.count("train_end") == 1


def test_documented_signatures():
    names = list(inspect.signature(BaseTrainer.__init__).parameters)
    assert names[1:7] == [
        "model",
        "optimizer",
        "loss",
        "metrics",
        "post_process_prediction",
        "post_process_grads",
    ]
    assert list(inspect.signature(BaseTrainer.train).parameters)[1:7] == [
        "tf_dataset",
        "epochs",
        "callbacks",
        "custom_data_transform_f",
        "steps",
        "learning_rate",
    ]
    trainer = ClassifierTrainer(make_model(), None, keras.optimizers.SGD(), CROSS_ENTROPY)
    assert trainer.trainable_weights == trainer.model.trainable_weights


def test_an_error_in_the_data_still_ends_callbacks():
    def broken():
        yield BATCHES[0]
        raise RuntimeError("no more disk")

    recorder = Recorder()
    with pytest.raises(RuntimeError, match="no more disk") as caught:
        make_trainer().train(broken, epochs=1, callbacks=[recorder])
    assert "broken" in [entry.name for entry in caught.traceback]
    assert [recorder.names[0], recorder.names[-1]] == ["train_begin", "train_end"]


def test_a_failing_callback_still_ends_the_others(caplog):
    class Fails(Callback):
        def on_epoch_end(self, epoch):
            raise RuntimeError("mine")

        def on_train_end(self):
            raise ValueError("and at the end too")

    recorders = [Recorder(), Recorder()]
    with pytest.raises(RuntimeError, match="mine"):
        make_trainer().train(BATCHES, epochs=1, callbacks=[recorders[0], Fails(), recorders[1]])
    assert "on_train_end failed as well" in caplog.text
    assert [recorder.names[-1] for recorder in recorders] == ["train_end", "train_end"]


# ---------------------------------------------------------------------- metrics and validation


def test_evaluation_does_not_disturb_training_metrics():
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    keras.utils.set_random_seed(4)
    plain = make_trainer(metrics=metrics).train(BATCHES, epochs=2)

    keras.utils.set_random_seed(4)
    trainer = make_trainer(metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")])
    seen = []
    evaluating = Recorder(lambda *_: seen.append(trainer.evaluate(BATCHES[:3])))
    disturbed = trainer.train(BATCHES, epochs=2, callbacks=[evaluating])
    np.testing.assert_allclose(
        disturbed.to_dict()["accuracy"], plain.to_dict()["accuracy"], atol=1e-6
    )
    np.testing.assert_allclose(disturbed.steps["loss"], plain.steps["loss"], rtol=1e-5)
    logits = ops.convert_to_numpy(trainer.model(X[:48]))
    assert seen[-1]["accuracy"] == pytest.approx((logits.argmax(-1) == Y[:48]).mean())
    assert seen[-1]["loss"] == pytest.approx(float(CROSS_ENTROPY(Y[:48], logits)), rel=1e-5)


def test_metrics_without_samples_are_left_out():
    class Three(BaseTrainer):
        def forward_with_grads(self, x, y):
            return y, self.model(x), x

    trainer = Three(
        make_model(),
        keras.optimizers.SGD(0.1),
        lambda y, logits, x: CROSS_ENTROPY(y, logits),
        metrics=[Accuracy(3), keras.metrics.SparseCategoricalAccuracy(name="theirs")],
    )
    heard, batches = keras.callbacks.History(), []
    events = keras.callbacks.LambdaCallback(on_train_batch_end=lambda _, logs: batches.append(logs))
    validation = ValidationDataCallback(BATCHES)
    history = trainer.train(BATCHES, epochs=2, callbacks=[validation, heard, events])
    assert [set(logs) for logs in batches] == [{"loss"}] * 10
    expected = {"loss", "val_accuracy", "val_theirs"}
    assert set(history.to_dict()) - {"epoch"} == set(heard.history) == expected


def test_evaluation_restores_seed_generators_of_layers():
    class Noise(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.generator = keras.random.SeedGenerator(1)

        def call(self, x):
            return x + keras.random.normal(ops.shape(x), seed=self.generator)

    losses = []
    for callbacks in ([], [ValidationDataCallback(BATCHES, every_steps=2)]):
        keras.utils.set_random_seed(6)
        model = make_model()
        model.add(Noise())
        trainer = make_trainer(model)
        history = trainer.train(BATCHES, epochs=2, callbacks=callbacks, steps_per_execution=1)
        losses.append(history.steps["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


# ---------------------------------------------------------------------- errors and warnings


def test_instantiating_the_base_raises():
    with pytest.raises(TypeError, match="extended, not instantiated"):
        BaseTrainer(make_model(), keras.optimizers.SGD(), CROSS_ENTROPY)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("model", keras.optimizers.SGD(), CROSS_ENTROPY),
            TypeError,
            "model must be a keras.Model",
        ),
        ((None, "adam", CROSS_ENTROPY), TypeError, "keras.optimizers.Adam"),
        ((None, keras.optimizers.SGD(), "mse"), TypeError, "loss must be a callable"),
        ((None, keras.optimizers.SGD, CROSS_ENTROPY), TypeError, "got the class SGD"),
        ((None, keras.optimizers.SGD(), keras.losses.Loss), TypeError, "got the class Loss"),
    ],
)
def test_parts_of_the_wrong_kind_raise(arguments, error, message):
    class Trainer(BaseTrainer):
        pass

    model, *rest = arguments
    with pytest.raises(error, match=message):
        Trainer(model or make_model(), *rest)


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        ({"tf_dataset": [], "epochs": 1}, ValueError, "yielded no batch in epoch 1"),
        ({"tf_dataset": BATCHES, "epochs": 0}, ValueError, "epochs must be a positive integer"),
        ({"tf_dataset": BATCHES, "epochs": 1, "steps": 0}, ValueError, "steps must be a positive"),
        ({"tf_dataset": X, "epochs": 1}, TypeError, r"polus.data.from_arrays"),
        ({"tf_dataset": (X, Y), "epochs": 1}, TypeError, r"polus.data.from_arrays"),
        ({"tf_dataset": 3, "epochs": 1}, TypeError, "got a int"),
        ({"epochs": 1}, ValueError, "train needs tf_dataset"),
        ({"tf_dataset": BATCHES}, ValueError, "train needs epochs"),
        ({"tf_dataset": BATCHES, "epochs": 1, "callbacks": [print]}, TypeError, "write a class"),
        (
            {"tf_dataset": [(X,)], "epochs": 1},
            TypeError,
            r"(?s)argument: .y.*1 part: float32 \(80",
        ),
        ({"tf_dataset": [{"a": X}], "epochs": 1}, TypeError, "a dict of 'a'.*custom_data_transf"),
        ({"tf_dataset": [X, Y], "epochs": 1}, TypeError, "are not batches: use polus.data.from"),
        ({"tf_dataset": [(X, Y, Y, Y)], "epochs": 1}, TypeError, "(?s)5 were given\n.* 4 parts"),
    ],
)
def test_bad_arguments_of_train_raise(train, error, message):
    with pytest.raises(error, match=message):
        make_trainer().train(**train)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (keras.losses.sparse_categorical_crossentropy, r"scalar tensor, got .*shape \(16,\)"),
        (lambda y, p: {"total": ops.mean(p)}, "The loss must have a term named 'loss'"),
        (lambda y, p: {"loss": ops.mean(p), "p": p}, r"shape \(16, 3\) as its term 'p'"),
        (
            lambda y, p: ops.mean(ops.cast(y, "float32")) * 0 + ops.sum(ops.ones(2)),
            "depends on none",
        ),
        (lambda y, p: 1.0, "got a float"),
    ],
)
def test_losses_that_cannot_be_minimized_raise(loss, message):
    trainer = ClassifierTrainer(make_model(), keras.optimizers.SGD(), loss)
    with pytest.raises(ValueError, match=message):
        trainer.train(BATCHES, epochs=1)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: None, "result of train_step must be a scalar tensor, got a NoneType"),
        (lambda loss: (loss, loss), "got a tuple"),
        (lambda loss: {"loss": loss[None]}, r"tensor of shape \(1,\)"),
        (lambda loss: {"v": ops.ones(4)}, "at least one scalar to record, got only the arrays 'v'"),
    ],
)
def test_train_step_must_return_scalars(returned, message):
    class Step(ClassifierTrainer):
        def train_step(self, x, y):
            return returned(super().train_step(x, y))

    with pytest.raises(ValueError, match=message):
        Step(make_model(), keras.optimizers.SGD(), CROSS_ENTROPY).train(BATCHES, epochs=1)


def test_metrics_with_the_same_name_raise():
    with pytest.raises(ValueError, match=r"2 metrics are named 'accuracy'.*Accuracy\(\.\.\., name"):
        make_trainer(metrics=[Accuracy(3), Accuracy(3)])


def test_a_frozen_model_warns_and_runs_as_in_fit(caplog):
    model = make_model()
    model.trainable = False
    history = make_trainer(model).train(BATCHES, epochs=1)
    assert "The step updates nothing" in caplog.text
    model.compile(keras.optimizers.SGD(), CROSS_ENTROPY)
    x, y = (np.concatenate(part) for part in zip(*BATCHES, strict=True))
    warned = keras.backend.backend() != "jax"  # where `fit` says nothing
    with (
        pytest.warns(UserWarning, match="any trainable weights")
        if warned
        else contextlib.nullcontext()
    ):
        expected = model.fit(x, y, batch_size=len(BATCHES[0][0]), shuffle=False, verbose=0)
    np.testing.assert_allclose(history.epochs[0]["loss"], expected.history["loss"][0], rtol=1e-5)


def test_learning_rate_with_a_schedule_raises():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    trainer = ClassifierTrainer(make_model(), keras.optimizers.SGD(schedule), CROSS_ENTROPY)
    with pytest.raises(ValueError, match="is a schedule"):
        trainer.train(BATCHES, epochs=1, learning_rate=0.1)


def test_a_non_finite_loss_warns(caplog):
    trainer = ClassifierTrainer(
        make_model(), keras.optimizers.SGD(0.1), lambda y, p: ops.mean(p) * float("nan")
    )
    trainer.train(BATCHES, epochs=1, on_nonfinite="ignore")
    assert "not finite from step 0 of epoch 1" in caplog.text


def test_a_dataset_that_ends_early_warns(caplog):
    history = make_trainer().train(BATCHES, epochs=1, steps=9)
    assert "ended after 5 of the 9 steps of epoch 1" in caplog.text
    assert len(history.steps["loss"]) == 5


def test_an_endless_tf_dataset_without_steps_raises():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16).repeat()
    with pytest.raises(ValueError, match="endless"):
        make_trainer().train(data, epochs=1)
    assert len(make_trainer().train(data, epochs=1, steps=8).steps["loss"]) == 8


@pytest.mark.parametrize("columns", ["labels", "outputs"])
def test_a_loss_that_is_a_function_aligns_ranks_as_fit(columns):
    """(N,) and (N, 1) would be broadcast to (N, N)."""
    y = X.sum(axis=1, keepdims=columns == "labels")
    ends = [keras.layers.Flatten()] if columns == "outputs" else [keras.layers.Reshape(())]
    losses = []
    for how in ("fit", "train"):
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1), *ends])
        function = lambda true, predicted: ops.mean((true - predicted) ** 2)  # noqa: E731
        if how == "fit":
            model.compile(keras.optimizers.SGD(0.1), function)
            model.fit(X, y, batch_size=16, shuffle=False, epochs=2, verbose=0)
            losses.append(model.evaluate(X, y, batch_size=16, verbose=0))
        else:
            trainer = ClassifierTrainer(model, keras.optimizers.SGD(0.1), function)
            data = polus.data.from_arrays((X, y), 16, shuffle=False)
            trainer.train(data, 2)
            losses.append(trainer.evaluate(data)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_class_weights_that_the_step_does_not_use_raise():
    class Own(ClassifierTrainer):
        def forward_with_grads(self, x, y):
            return y, self.model(x, training=True)

    class Extended(ClassifierTrainer):
        def forward_with_grads(self, x, y):
            return super().forward_with_grads(x * 1.0, y)

    def loss(cls):
        arguments = (make_model(), keras.optimizers.SGD(0.0), CROSS_ENTROPY)
        trainer = cls(*arguments, class_weight={0: 10.0, 1: 10.0, 2: 10.0})
        return trainer.train(BATCHES, 1).epochs[0]["loss"]

    with pytest.raises(ValueError, match=r"class_weight was given, and the step of Own does not"):
        loss(Own)
    assert loss(Extended) > 3  # ten times the loss of three classes


def test_an_error_in_a_validation_names_the_set():
    once = iter(BATCHES)
    held_out = ValidationDataCallback(once, "held_out")
    with pytest.raises(ValueError, match=r"yielded no batch.*function that makes a gen") as error:
        make_trainer(metrics=[Accuracy(3)]).train(BATCHES, 2, [held_out])
    assert error.value.__notes__ == ["This was the validation on 'held_out'."]


def test_an_evaluation_of_nothing_raises():
    class Own(BaseTrainer):
        def train_step(self, x, y):
            return self.minimize(
                lambda: CROSS_ENTROPY(y, self.model(x, training=True)), self.trainable_weights
            )

    trainer = Own(make_model(), keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="There is nothing to compute"):
        trainer.evaluate(BATCHES)


def test_a_run_that_resumes_and_saves_nothing_warns(tmp_path, caplog):
    make_trainer().train(BATCHES, 1, resume=tmp_path / "a")
    assert "nothing saves to it" in caplog.text
