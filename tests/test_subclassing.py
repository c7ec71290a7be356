"""A trainer is the user's class: its private names are theirs, and so is each copy of it."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops

from polus.metrics import Accuracy, MacroF1Score
from polus.training import BaseTrainer, ClassifierTrainer

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 1] > 0)
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

# What people call things in a class of theirs. The trainer itself keeps one, `_engine`.
WORDS = """
    args backend batch batch_size best build built cache callbacks check choices clock compile
    compiled compiled_step config count counter current data data_lock dataset debug device
    dispatch dispatches epoch epochs evaluate evaluation example forward frozen grads history
    index init initialized inputs is_training iterator jit_compile kwargs layers lock log logger
    logs loop loss losses lr metric_results metrics mode model models name names optimizer
    optimizers outputs overridden params phase position prepare rate reader reading refresh
    reset resume rng run sample samples save schedule seed setup shape state step steps
    steps_before store survey surveyed tape targets teacher temperature train train_config
    trainable_weights update updates variables verbose weights writer
"""
EVERYDAY_NAMES = [*(f"_{word}" for word in WORDS.split()), "logger"]


def make_model(built: bool = True) -> keras.Model:
    layers = [keras.layers.Dense(8, "relu"), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers] if built else layers, name="student")


def make_trainer(cls=ClassifierTrainer, **arguments):
    """A trainer with all that it may have: an unbuilt model, a metric, explicit parts."""
    keras.utils.set_random_seed(3)
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    return cls(
        make_model(built=False),
        keras.optimizers.Adam(0.01),
        CROSS_ENTROPY,
        metrics=metrics,
        **arguments,
    )


def everything_used(trainer):
    """The numbers of a trainer that does all it can: trains, evaluates, updates once."""
    first = trainer.train(BATCHES, epochs=2, learning_rate=0.05, steps_per_execution=2)
    evaluated = trainer.evaluate(BATCHES)
    once = float(ops.convert_to_numpy(trainer.train_step(*BATCHES[0])))
    trainer.optimizer = keras.optimizers.SGD(0.1)
    second = trainer.train(BATCHES, epochs=1)
    return [*first.steps["loss"], *second.steps["loss"], once, *evaluated.values()]


# ---------------------------------------------------------------------- private names


def test_a_trainer_has_one_private_name():
    trainer = make_trainer()
    everything_used(trainer)
    private = [name for name in vars(trainer) if name.startswith("_")]
    inherited = [n for n in dir(ClassifierTrainer) if n.startswith("_") and n[:2] != "__"]
    assert (private, inherited) == (["_engine"], [])


@pytest.mark.parametrize("where", ["before super().__init__", "after it", "as methods"])
def test_private_names_of_a_subclass_change_nothing(where):
    values = {name: ("mine", name) for name in EVERYDAY_NAMES}

    class Before(ClassifierTrainer):
        def __init__(self, *args, **kwargs):
            vars(self).update(values)
            super().__init__(*args, **kwargs)

    class After(ClassifierTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for name, value in values.items():
                setattr(self, name, value)

    def unwanted(self, *args, **kwargs):
        raise AssertionError("a method of the user's was called for one of Polus")

    methods = type("Methods", (ClassifierTrainer,), dict.fromkeys(values, unwanted))
    cls = {"before super().__init__": Before, "after it": After, "as methods": methods}[where]
    expected = everything_used(make_trainer())
    trainer = make_trainer(cls)
    np.testing.assert_allclose(everything_used(trainer), expected, rtol=1e-5)
    if cls is not methods:
        assert {name: getattr(trainer, name) for name in values} == values


@pytest.mark.parametrize("value", [None, 0, "text", [], {}])
def test_a_private_name_may_hold_anything(value):
    """An empty list under a name of ours once trained nothing, and said nothing."""

    class Mine(ClassifierTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for name in EVERYDAY_NAMES:
                setattr(self, name, value)

    trainer, reference = make_trainer(Mine), make_trainer()
    losses = [t.train(BATCHES, epochs=2).steps["loss"] for t in (trainer, reference)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


# ---------------------------------------------------------------------- set before super().__init__


def first_layer(model):
    return model.layers[0].trainable_weights


def test_trainable_weights_set_before_init_are_kept():
    class HeadOnly(ClassifierTrainer):
        def __init__(self, model, *args, **kwargs):
            self.trainable_weights = model.layers[-1].trainable_weights
            super().__init__(model, *args, **kwargs)

    model = make_model()
    before = model.get_weights()
    trainer = HeadOnly(model, keras.optimizers.SGD(0.1), CROSS_ENTROPY)
    trainer.train(BATCHES, epochs=1)
    changed = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert changed == [False, False, True, True]
    # An argument says it as well, and later.
    trainer = HeadOnly(
        model, keras.optimizers.SGD(0.1), CROSS_ENTROPY, trainable_weights=first_layer(model)
    )
    assert [v.path for v in trainer.trainable_weights] == [v.path for v in first_layer(model)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metrics", [keras.metrics.SparseCategoricalAccuracy(name="mine")]),
        ("post_process_grads", lambda gradients: [ops.zeros_like(g) for g in gradients]),
        ("post_process_logits", lambda logits: logits * 0.0),
    ],
)
def test_a_part_set_before_init_is_kept_and_used(name, value):
    class Mine(ClassifierTrainer):
        def __init__(self, *args, **kwargs):
            setattr(self, name, value)
            super().__init__(*args, **kwargs)

    model = make_model()
    before = model.get_weights()
    history = Mine(model, keras.optimizers.SGD(0.1), CROSS_ENTROPY).train(BATCHES, epochs=1)
    if name == "metrics":
        assert 0 < history.to_dict()["mine"][0] <= 1
    elif name == "post_process_grads":
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
    else:
        np.testing.assert_allclose(history.steps["loss"], np.log(3), rtol=1e-6)


# ---------------------------------------------------------------------- copies


def weights_of(trainer):
    return [np.array(ops.convert_to_numpy(v)) for v in trainer.model.variables]


def trained_once(trainer):
    """The losses of an epoch and of one step alone."""
    alone = float(ops.convert_to_numpy(trainer.train_step(*BATCHES[0])))
    return [alone, *trainer.train(BATCHES, epochs=1, steps_per_execution=1).steps["loss"]]


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_copy_with_another_model_trains_that_model(used):
    original = ClassifierTrainer(make_model(), keras.optimizers.SGD(0.1), CROSS_ENTROPY)
    if used:  # so that it has compiled programs that a copy might take over
        trained_once(original)
        original.evaluate(BATCHES)
    other = copy.copy(original)
    other.model = keras.models.clone_model(original.model)
    other.optimizer = keras.optimizers.SGD(0.1)
    reference = ClassifierTrainer(
        keras.models.clone_model(other.model), keras.optimizers.SGD(0.1), CROSS_ENTROPY
    )
    reference.model.set_weights(other.model.get_weights())
    before = weights_of(original)
    np.testing.assert_allclose(trained_once(other), trained_once(reference), rtol=1e-5)
    assert other.evaluate(BATCHES) == pytest.approx(reference.evaluate(BATCHES), rel=1e-5)
    for old, new in zip(before, weights_of(original), strict=True):
        np.testing.assert_array_equal(old, new)
    # And the original goes on with its own.
    after = weights_of(other)
    trained_once(original)
    for old, new in zip(after, weights_of(other), strict=True):
        np.testing.assert_array_equal(old, new)
    assert any((a != b).any() for a, b in zip(before, weights_of(original), strict=True))


def test_a_copy_keeps_a_configuration_of_its_own():
    original = make_trainer()
    original.changing_train_config(tf_dataset=BATCHES, epochs=1)
    other = copy.copy(original)
    other.changing_train_config(epochs=3)
    other.early_stop = True
    assert len(original.train().epochs) == 1
    assert len(other.train().epochs) == 3


@pytest.mark.parametrize("head_only", [False, True], ids=["all weights", "head only"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_deep_copy_trains_on_as_the_original_would(used, head_only):
    model = make_model()
    trained = model.layers[-1].trainable_weights if head_only else None
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    original = ClassifierTrainer(
        model, trained, keras.optimizers.Adam(0.01), CROSS_ENTROPY, metrics=metrics
    )
    if used:
        trained_once(original)
    other = copy.deepcopy(original)
    before = weights_of(original)
    losses = trained_once(other)
    for old, new in zip(before, weights_of(original), strict=True):
        np.testing.assert_array_equal(old, new)
    if head_only:
        for old, new in zip(before[:2], weights_of(other)[:2], strict=True):
            np.testing.assert_array_equal(old, new)
    assert trained_once(original) == pytest.approx(losses, rel=1e-5)
    assert original.evaluate(BATCHES) == pytest.approx(other.evaluate(BATCHES), rel=1e-5)
    for mine, theirs in zip(weights_of(other), weights_of(original), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- repr


def test_repr_says_what_is_trained_and_how(caplog):
    class Pair(BaseTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.critic_optimizer = keras.optimizers.RMSprop(0.25)

    model = make_model()
    trainer = Pair(
        model,
        keras.optimizers.Adam(0.125),
        CROSS_ENTROPY,
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="right")],
        trainable_weights=model.layers[-1].trainable_weights,
    )
    caplog.clear()
    text = repr(trainer)
    for part in ("Pair", "student", "Adam", "0.125", "RMSprop", "0.25", "right"):
        assert part in text
    assert "SparseCategoricalCrossentropy" in text
    assert "2 of 4" in text  # variables
    assert not caplog.records


def test_repr_of_an_unbuilt_trainer():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    trainer = ClassifierTrainer(
        make_model(built=False), keras.optimizers.SGD(schedule), lambda y, logits: ops.mean(logits)
    )
    text = repr(trainer)
    for part in ("ClassifierTrainer", "student", "SGD", "CosineDecay", "lambda"):
        assert part in text
    assert "all" in text  # of what is not built yet, no number is known


def test_a_deep_copy_has_metrics_of_its_own():
    metrics = [Accuracy(3), MacroF1Score(3), keras.metrics.SparseCategoricalAccuracy(name="keras")]
    trainer = ClassifierTrainer(
        make_model(), keras.optimizers.SGD(0.1), CROSS_ENTROPY, metrics=metrics
    )
    trainer.train(BATCHES, epochs=1)
    twin = copy.deepcopy(trainer)
    one, other = (each.train(BATCHES, epochs=2).epochs for each in (trainer, twin))
    assert one == other
    ids = [{id(v) for m in each.metrics for v in m.variables} for each in (trainer, twin)]
    assert not ids[0] & ids[1]


def test_a_trainer_is_not_pickled():
    """Its parts are rebuilt one by one: the optimizer's variables would be of another model."""
    with pytest.raises(TypeError, match=r"can't be pickled.*copy\.deepcopy.*run_dir"):
        pickle.dumps(make_trainer())
