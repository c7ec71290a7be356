"""A run is continued with the settings that it was saved with, or says which ones are others.

Each change is made to the same program. It is refused by name; some are taken if that is said.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import polus.core
from polus.backends import backend
from polus.callbacks import Callback
from polus.checkpoint import Checkpoint, CheckpointError
from polus.checkpoint.store import Store
from polus.configuration import changes_since, check_changes, describe_parts, differences
from polus.data import from_arrays
from polus.describe import code_hash, describe
from polus.metrics import Accuracy, MacroF1Score
from polus.training import ClassifierTrainer

generator = np.random.default_rng(0)
x = generator.normal(size=(40, 8)).astype("float32")
y = (x.sum(axis=1) > 0).astype("int32")

SCALE = 1.0
layers, optimizers, losses = keras.layers, keras.optimizers, keras.losses
L2, Decay = keras.regularizers.L2, optimizers.schedules.ExponentialDecay


class Scaled(layers.Layer):
    """A layer of the user's, which has no configuration."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, inputs):
        return inputs * self.factor


class Rewritten(Scaled):
    def call(self, inputs):
        return inputs + self.factor


Rewritten.__name__ = Rewritten.__qualname__ = "Scaled"


class Trainer(ClassifierTrainer):
    def __init__(self, *args, strength=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.strength = strength

    def forward_with_grads(self, x, y):
        return y, self.predicted(self.model(x, training=True)) * 1.0


class OtherForward(Trainer):
    def forward_with_grads(self, x, y):
        return y, self.predicted(self.model(x, training=True)) * 2.0


class OtherStep(Trainer):
    def train_step(self, *inputs):
        return super().train_step(*inputs)


OtherForward.__name__ = OtherForward.__qualname__ = "Trainer"
OtherStep.__name__ = OtherStep.__qualname__ = "Trainer"


def loss_of_scale(y, logits):
    return SCALE * keras.ops.mean(losses.sparse_categorical_crossentropy(y, logits, True))


def rewritten_loss(y, logits):
    return SCALE * keras.ops.sum(losses.sparse_categorical_crossentropy(y, logits, True))


def closure_loss(factor):
    return lambda y, logits: factor * loss_of_scale(y, logits)


def network(**changes):
    """What the model is made of, and what of it is another one."""
    settings = {
        "units": 16,
        "activation": "relu",
        "use_bias": True,
        "kernel_initializer": "glorot_uniform",
        "kernel_regularizer": L2(2**-10),
        "kernel_constraint": None,
        "dtype": None,
        "name": None,
        "momentum": 0.99,
        "rate": 0.3,
        "noise": layers.Dropout,
        "function": lambda inputs: inputs * 2.0,
        "own": Scaled(1.0),
        "last": [],
        "order": range(6),
    } | changes
    of_dense = {k: settings[k] for k in list(settings)[1:8]}
    parts = [
        layers.Dense(settings["units"], **of_dense),
        layers.BatchNormalization(momentum=settings["momentum"]),
        settings["noise"](settings["rate"]),
        layers.Lambda(settings["function"]),
        settings["own"],
        layers.Dense(2),
    ]
    return keras.Sequential([*(parts[i] for i in settings["order"]), *settings["last"]])


def branches(skipped=False):
    inputs = keras.Input((8,))
    a = layers.Dense(4)(inputs)
    b = layers.Dense(4)(a)
    return keras.Model(inputs, layers.Dense(2)(layers.Add()([a if skipped else b, b])))


def frozen():
    model = network()
    model.layers[0].trainable = False
    return model


PROGRAM = {
    "trainer": Trainer,
    "model": network,
    "optimizer": lambda **changes: optimizers.Adam(
        **{"learning_rate": 1e-3, "clipnorm": 1.0, "weight_decay": 0.01} | changes
    ),
    "loss": lambda: losses.SparseCategoricalCrossentropy(from_logits=True),
    "metrics": lambda: [Accuracy(num_classes=2)],
    "kwargs": {"post_process_grads": lambda gradients: gradients},
    "train": {"custom_data_transform_f": lambda batch: batch},
    "data": lambda: from_arrays((x, y), batch_size=8, seed=3),
}
BASES = {
    "": {},
    "schedule": {"optimizer": lambda: optimizers.SGD(Decay(0.1, 10, 0.5))},
    "function": {"loss": lambda: loss_of_scale},
    "closure": {"loss": lambda: closure_loss(1.0)},
    "branches": {"model": branches},
}


def made(**changes):
    program = PROGRAM | changes
    keras.utils.set_random_seed(1)
    trainer = program["trainer"](
        program["model"](),
        None,
        program["optimizer"](),
        program["loss"](),
        program["metrics"](),
        **program["kwargs"],
    )
    return trainer, lambda callbacks, epochs=2, **kwargs: trainer.train(
        program["data"](), epochs, callbacks, **program["train"], **kwargs
    )


class Dies(Callback):
    every_steps = 1

    def on_train_batch_end(self, epoch, step, loss):
        if (epoch, step) == (1, 2):
            raise KeyError("dies")


@pytest.fixture(autouse=True)
def _not_measured():
    before = polus.core.get_jit_compile()
    polus.core.set_jit_compile(backend.candidates()[0])
    yield
    polus.core.set_jit_compile(before)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a killed run of one of the programs, each of which runs once."""

    @functools.cache
    def folder_of(base=""):
        folder = tmp_path_factory.mktemp("killed")
        _, train = made(**BASES[base])
        with pytest.raises(KeyError, match="dies"):
            train([Checkpoint(folder, every_steps=2), Dies()])
        return folder

    return folder_of


def model(**changes):
    return {"model": lambda: network(**changes)}


def optimizer(**changes):
    return {"optimizer": lambda: PROGRAM["optimizer"](**changes)}


ANOTHER_RUN = {
    "units": (model(units=20), "model.layers[0].units was 16 and is 20"),
    "activation": (model(activation="gelu"), "model.layers[0].activation was relu"),
    "bias": (model(use_bias=False), "model.layers[0].use_bias was True and is False"),
    "layer more": (model(last=[layers.Activation("relu")]), "model.layers was [Dense"),
    "layer less": (model(order=range(5)), "model.layers was [Dense"),
    "class of a layer": (model(noise=layers.GaussianDropout), "Dropout(dtype='float32'"),
    "order of layers": (model(order=[0, 2, 1, 3, 4, 5]), "model.layers[1] was BatchNorm"),
    "function of a layer": (
        model(function=lambda inputs: inputs * 3.0),
        "the code of model.layers[3].function has changed",
    ),
    "setting of a layer of one's own": (
        model(own=Scaled(2.0)),
        "model.layers[4].factor was 1.0 and is 2.0",
    ),
    "connections": ({"model": lambda: branches(True)}, "model.connections was", "branches"),
    "class of the optimizer": (
        {"optimizer": lambda: optimizers.SGD(1e-3)},
        "optimizer was Adam(learning_rate=",
    ),
    "class of the loss": ({"loss": losses.KLDivergence}, "loss was SparseCategoricalCrossentropy("),
    "from_logits": ({"loss": losses.SparseCategoricalCrossentropy}, "loss.from_logits was True"),
    "reduction": (
        {"loss": lambda: losses.SparseCategoricalCrossentropy(True, reduction="sum")},
        "loss.reduction was 'sum_over_batch_size' and is 'sum'",
    ),
    "code of the loss": (
        {"loss": lambda: rewritten_loss},
        "the code of loss has changed",
        "function",
    ),
    "value that the loss closes over": (
        {"loss": lambda: closure_loss(2.0)},
        "loss.closure.factor was 1.0 and is 2.0",
        "closure",
    ),
    "metric more": (
        {"metrics": lambda: [Accuracy(num_classes=2), MacroF1Score(num_classes=2)]},
        "metrics was [Accuracy",
    ),
    "class of a metric": (
        {"metrics": lambda: [MacroF1Score(num_classes=2)]},
        "metrics[0] was Accuracy",
    ),
    "class of the trainer": ({"trainer": ClassifierTrainer}, "trainer was Trainer"),
    "what is trained": ({"model": frozen}, "trainable_weights was ["),
    # Variables of its own make it another run.
    "average of the weights": (optimizer(use_ema=True), "_average (8, 16) float32"),
    "batch size": (
        {"data": lambda: from_arrays((x, y), batch_size=4, seed=3)},
        "num_batches: it was 5, and is 10",
    ),
    "seed of the data": (
        {"data": lambda: from_arrays((x, y), batch_size=8, seed=4)},
        "seed: it was 3, and is 4",
    ),
    "labels": (
        {"data": lambda: from_arrays((x, np.append(y[:-1], 1 - y[-1])), batch_size=8, seed=3)},
        "checksum of the arrays",
    ),
}

CHANGED = {
    "rate of a dropout": (model(rate=0.5), "model.layers[2].rate was 0.3 and is 0.5"),
    "regularisation": (
        model(kernel_regularizer=L2(2**-7)),
        "model.layers[0].kernel_regularizer.l2 was 0.0009765625 and is 0.0078125",
    ),
    "no regularisation": (
        model(kernel_regularizer=None),
        "model.layers[0].kernel_regularizer was L2(l2=0.0009765625) and is None",
    ),
    "constraint": (
        model(kernel_constraint=keras.constraints.MaxNorm(3)),
        "model.layers[0].kernel_constraint was None and is MaxNorm(",
    ),
    "momentum of a normalisation": (
        model(momentum=0.9),
        "model.layers[1].momentum was 0.99 and is 0.9",
    ),
    "precision": (
        model(dtype="mixed_bfloat16"),
        "model.layers[0].dtype was 'float32' and is 'mixed_bfloat16'",
    ),
    "code of a layer of one's own": (
        model(own=Rewritten(1.0)),
        "the code of model.layers[4].call has changed",
    ),
    "learning rate": (optimizer(learning_rate=1e-2), "optimizer.learning_rate was 0.001"),
    "learning rate of train": (
        {"train": PROGRAM["train"] | {"learning_rate": 0.02}},
        "optimizer.learning_rate was 0.001",
    ),
    "schedule in the place of a rate": (
        optimizer(learning_rate=Decay(1e-3, 5, 0.5)),
        "and is ExponentialDecay(initial_learning_rate=0.001",
    ),
    "schedule": (
        {"optimizer": lambda: optimizers.SGD(Decay(0.1, 10, 0.9))},
        "optimizer.learning_rate.decay_rate was 0.5 and is 0.9",
        "schedule",
    ),
    "rate in the place of a schedule": (
        {"optimizer": lambda: optimizers.SGD(0.05)},
        "optimizer.learning_rate was ExponentialDecay(",
        "schedule",
    ),
    "beta": (optimizer(beta_1=0.8), "optimizer.beta_1 was 0.9 and is 0.8"),
    "epsilon": (optimizer(epsilon=1e-5), "optimizer.epsilon was 1e-07 and is 1e-05"),
    "clipping": (optimizer(clipnorm=0.1), "optimizer.clipnorm was 1.0 and is 0.1"),
    "other clipping": (
        optimizer(clipnorm=None, clipvalue=0.1),
        "optimizer.clipnorm was 1.0 and is None; optimizer.clipvalue was None and is 0.1",
    ),
    "weight decay": (optimizer(weight_decay=0.1), "optimizer.weight_decay was 0.01 and is 0.1"),
    "attribute of the trainer": (
        {"trainer": functools.partial(Trainer, strength=0.7)},
        "trainer.strength was 0.5 and is 0.7",
    ),
    "method of the trainer": (
        {"trainer": OtherForward},
        "the code of trainer.forward_with_grads has changed",
    ),
    "step of the trainer": ({"trainer": OtherStep}, "trainer.train_step was None and is"),
    "gradients": (
        {"kwargs": {"post_process_grads": lambda gradients: gradients[:]}},
        "the code of post_process_grads has changed",
    ),
    "prediction": (
        {"kwargs": PROGRAM["kwargs"] | {"post_process_prediction": lambda outputs: outputs}},
        "post_process_logits was None and is <lambda>",
    ),
    "transform": (
        {"train": {"custom_data_transform_f": lambda batch: (batch[0] * 2, batch[1])}},
        "the code of transform has changed",
    ),
}

SAME = {
    "initial values": model(kernel_initializer="he_normal"),
    "more epochs": {},
}


# What the others describe is the same on each backend: the code of functions, connections.
ON_EACH = ("", "schedule")


@pytest.mark.parametrize(
    "base",
    [base if base in ON_EACH else pytest.param(base, marks=pytest.mark.once) for base in BASES],
)
def test_the_program_itself_continues(killed, tmp_path, caplog, base):
    folder = shutil.copytree(killed(base), tmp_path / "run")
    continued({}, base)([Checkpoint(folder)], resume=folder)
    assert "has changed" not in caplog.text
    assert Store(folder).read_newest().facts["epoch"] == 2


def continued(change, base=""):
    """A new process with a changed program: its `train`."""
    _, train = made(**{**BASES[base], **change})
    return train


# The whole table on one backend; some of it, below, on each.
@pytest.mark.once
@pytest.mark.parametrize("change", ANOTHER_RUN)
def test_another_run_raises_whatever_is_accepted(killed, change):
    changes, message, *base = ANOTHER_RUN[change]
    with pytest.raises(CheckpointError) as error:
        continued(changes, *base)([], resume=killed(*base), resume_changes="accept")
    assert message in str(error.value)
    assert "nothing is trained" in str(error.value)


@pytest.mark.once
@pytest.mark.parametrize("change", CHANGED)
def test_changed_setting_raises_until_it_is_accepted(killed, change, caplog):
    changes, message, *base = CHANGED[change]
    with pytest.raises(CheckpointError) as error:
        continued(changes, *base)([], resume=killed(*base))
    assert message in str(error.value)
    assert 'train(..., resume_changes="accept")' in str(error.value)
    caplog.clear()
    history = continued(changes, *base)([], resume=killed(*base), resume_changes="accept")
    assert "continues with changed settings" in caplog.text
    assert message in caplog.text
    assert len(history.steps["loss"]) == 10


@pytest.mark.parametrize("change", ["units", "average of the weights", "from_logits", "labels"])
def test_another_run_raises_on_each_backend(killed, change):
    test_another_run_raises_whatever_is_accepted(killed, change)


@pytest.mark.parametrize(
    "change", ["rate of a dropout", "schedule", "rate in the place of a schedule", "clipping"]
)
def test_changed_setting_raises_on_each_backend(killed, change, caplog):
    test_changed_setting_raises_until_it_is_accepted(killed, change, caplog)


@pytest.mark.parametrize("change", SAME)
def test_change_without_effect_is_taken(killed, change):
    epochs = 3 if change == "more epochs" else 2
    history = continued(SAME[change])([], epochs, resume=killed())
    assert len(history.steps["loss"]) == 5 * epochs


@pytest.mark.parametrize("change", ["learning rate", "learning rate of train"])
def test_accepted_learning_rate_is_used(killed, change):
    class Rates(Callback):
        every_steps = 1

        def on_train_batch_end(self, epoch, step, loss):
            self.rate = float(keras.ops.convert_to_numpy(trainer.optimizer.learning_rate))

    rates = Rates()
    trainer, train = made(**CHANGED[change][0])
    train([rates], resume=killed(), resume_changes="accept")
    assert rates.rate == pytest.approx(0.02 if "train" in change else 0.01)


def test_accepted_change_is_accepted_once(killed, tmp_path):
    folder = shutil.copytree(killed(), tmp_path / "run")
    changes = CHANGED["beta"][0]
    continued(changes)([Checkpoint(folder)], resume=folder, resume_changes="accept")
    continued(changes)([], 3, resume=folder)
    with pytest.raises(CheckpointError, match=r"optimizer.beta_1 was 0.8 and is 0.9"):
        continued({})([], 3, resume=folder)


def test_setting_that_a_callback_changes_is_no_change(tmp_path):
    class Decays(Callback):
        def on_epoch_end(self, epoch):
            self.coordinator.trainer.optimizer.learning_rate = 0.01 / (epoch + 2)
            self.coordinator.trainer.strength += 1.0

    train = continued({})
    train([Checkpoint(tmp_path), Decays()], 1, resume=tmp_path)
    train([Checkpoint(tmp_path), Decays()], 2, resume=tmp_path)  # in the same process
    continued({})([Checkpoint(tmp_path), Decays()], 3, resume=tmp_path)  # and in another
    with pytest.raises(CheckpointError, match=r"optimizer.learning_rate was 0.001\d* and is 0.5"):
        continued(optimizer(learning_rate=0.5))([], 4, resume=tmp_path)


def test_run_that_stopped_early_trains_on_if_more_epochs_are_asked_for(tmp_path, caplog):
    class Stops(Callback):
        def on_epoch_end(self, epoch):
            self.coordinator.trainer.early_stop = epoch == 0

    caplog.set_level("INFO")
    for epochs, done, message in [
        (3, 1, ""),
        (3, 1, "so nothing is left to train"),
        (4, 4, "training continues"),
    ]:
        history = continued({})([Checkpoint(tmp_path), Stops()], epochs, resume=tmp_path)
        assert len(history.epochs) == done
        assert message in caplog.text


def test_changed_global_of_a_function_is_named(monkeypatch):
    before = describe(loss_of_scale)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    (found,) = differences({"loss": before}, {"loss": describe(loss_of_scale)})
    assert str(found) == "loss.globals.SCALE was 1.0 and is 2.0"
    assert found.kind == "run"


def test_changed_function_that_a_function_calls_is_named(monkeypatch):
    before = {"transform": describe(closure_loss(1.0))}
    monkeypatch.setitem(globals(), "loss_of_scale", rewritten_loss)
    (found,) = differences(before, {"transform": describe(closure_loss(1.0))})
    assert str(found) == "the code of transform.globals.loss_of_scale has changed"


def counting():
    """A docstring."""
    return {1, 2, 3} if 1 in {"a", "b", "c"} else [i for i in range(3)]


@pytest.mark.once
def test_descriptions_are_the_same_in_each_process():
    program = (
        "import json, test_configuration as t\n"
        "print(json.dumps([t.describe(t.Scaled(2.0)), t.code_hash(t.counting), "
        "t.describe(t.loss_of_scale), t.describe(t.PROGRAM['optimizer']())]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    expected = [Scaled(2.0), counting, loss_of_scale, PROGRAM["optimizer"]()]
    expected = [code_hash(v) if v is counting else describe(v) for v in expected]
    assert json.loads(outputs.pop()) == json.loads(json.dumps(expected))


def compiled(source):
    names = {}
    exec(source, names)
    return code_hash(names["f"])


def test_code_counts_and_its_text_does_not():
    first = compiled("def f(a):\n    return a + 1")
    assert compiled('\n\ndef f(b):  # a comment\n    "A docstring."\n    return b + 1') == first
    for other in ("a + 2", "a - 1", "a + 1.0", "a + b", "(lambda: a + 1)()"):
        assert compiled(f"def f(a):\n    return {other}") != first
    assert compiled("def f(a, b):\n    return a + 1") != first


def test_code_of_another_python_is_not_compared():
    saved = {"python": "3.9", "loss": {"$function": "f", "code": "a", "closure": {"k": 1}}}
    now = {"python": "3.11", "loss": {"$function": "f", "code": "b", "closure": {"k": 2}}}
    assert [each.name for each in differences(saved, now)] == ["loss.closure.k"]


def test_setting_that_is_new_in_keras_is_no_change():
    saved = describe_parts({"optimizer": optimizers.SGD(0.1)})
    now = json.loads(json.dumps(saved))
    now["optimizer"]["new"] = True
    assert differences(saved, now) == []


@pytest.mark.parametrize("saved", [None, [], {"loss": 3}, {"loss": []}, {"loss": {"$loss": []}}])
def test_hostile_settings_differ(saved):
    now = describe_parts({"loss": losses.KLDivergence()})
    found = changes_since(saved, saved, now)
    if found:
        with pytest.raises(ValueError, match="loss was"):
            check_changes(found, accept=True)


class Wrapper(keras.Model):
    """A model with layers in attributes, lists and layers of its own."""

    def __init__(self, rate):
        super().__init__()
        self.first = layers.Dense(4)
        self.others = [layers.Dropout(rate), Scaled(rate)]
        self.inside = Nested(rate)

    def call(self, inputs):
        return self.inside(self.others[1](self.others[0](self.first(inputs))))


class Nested(layers.Layer):
    def __init__(self, rate):
        super().__init__()
        self.dropout = layers.Dropout(rate)
        self._hidden = Scaled(rate)

    def call(self, inputs):
        return self._hidden(self.dropout(inputs))


def test_layers_inside_of_layers_are_described():
    saved = describe_parts({"model": Wrapper(0.1)})
    found = differences(saved, describe_parts({"model": Wrapper(0.2)}))
    assert {each.name: each.kind for each in found} == {
        "model.others[0].rate": "change",
        "model.others[1].factor": "run",
        "model.inside.rate": "change",  # which Keras takes from its __init__
        "model.inside.dropout.rate": "change",
        "model.inside._hidden.factor": "run",
    }
    built = Wrapper(0.1)
    built(np.zeros((1, 4), "float32"))
    assert differences(saved, describe_parts({"model": built})) == []
