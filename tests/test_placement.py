"""Engines for several devices that Polus can't train on are refused before anything is trained.

What it trains on is tested in `tests/distributed`, where each engine has processes of its own.
"""

import contextlib
import logging

import keras
import numpy as np
import pytest

from polus import core
from polus.backends import backend
from polus.backends.placement import Placement, report_idle
from polus.data import from_arrays
from polus.training import ClassifierTrainer

NAME = keras.backend.backend()
X = np.zeros((32, 4), "float32")
Y = np.zeros(32, "int32")


def make_trainer(**kwargs) -> ClassifierTrainer:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return ClassifierTrainer(model, keras.optimizers.SGD(0.1), loss, **kwargs)


@contextlib.contextmanager
def tensorflow_strategy(tmp_path, monkeypatch):
    import tensorflow as tf

    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        yield


@contextlib.contextmanager
def mirrored():
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        yield


@contextlib.contextmanager
def tensorflow_xla(tmp_path, monkeypatch):
    core.set_jit_compile(True)
    try:
        with mirrored():
            yield
    finally:
        core.set_jit_compile("auto")


@contextlib.contextmanager
def jax_processes_without_distribution(tmp_path, monkeypatch):
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    yield


@contextlib.contextmanager
def jax_data_of_each_process(tmp_path, monkeypatch):
    import jax

    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(distribution)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    try:
        yield
    finally:
        keras.distribution.set_distribution(None)


@contextlib.contextmanager
def launched_without_process_group(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    yield


@contextlib.contextmanager
def torch_compile(tmp_path, monkeypatch):
    with process_group(tmp_path, monkeypatch):
        core.set_jit_compile(True)
        try:
            yield
        finally:
            core.set_jit_compile("auto")


@contextlib.contextmanager
def process_group(tmp_path, monkeypatch):
    """One process that believes to be one of two."""
    import torch.distributed

    path = f"file://{tmp_path}/group"
    torch.distributed.init_process_group("gloo", init_method=path, rank=0, world_size=1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


REFUSED = {
    "tensorflow": [
        (tensorflow_strategy, r"OneDeviceStrategy is active.*MirroredStrategy"),
        (tensorflow_xla, r"set_jit_compile\(False\)"),
    ],
    "jax": [
        (jax_processes_without_distribution, r"set_distribution\(keras.distribution.DataParallel"),
        (jax_data_of_each_process, "leave out auto_shard_dataset"),
    ],
    "torch": [
        (launched_without_process_group, r"WORLD_SIZE=2.*init_process_group\(\)"),
        (torch_compile, r"set_jit_compile\(False\)"),
    ],
}


@pytest.mark.parametrize(("engine", "message"), REFUSED[NAME])
def test_what_is_not_served_raises(engine, message, tmp_path, monkeypatch):
    with engine(tmp_path, monkeypatch):
        trainer = make_trainer()
        weights = trainer.model.get_weights()
        with pytest.raises((NotImplementedError, RuntimeError), match=message):
            trainer.train(from_arrays((X, Y), 16), 1)
        np.testing.assert_array_equal(trainer.model.get_weights()[0], weights[0])


@pytest.mark.skipif(NAME != "tensorflow", reason="strategies of TensorFlow")
@pytest.mark.parametrize(
    ("inside", "named"),
    [
        ("model", "variable sequential.*in the scope"),
        ("optimizer", "optimizer 'sgd.*in the scope"),
        ("model optimizer trainer", "variable sequential.*in the scope"),
        ("run", "variable sequential.*outside of the scope of tf.distribute.Mirrored"),
        ("optimizer run", "variable sequential.*outside of the scope"),
        ("model run", "optimizer 'sgd.*outside of the scope"),
        ("model optimizer run", "variable step_counter.*outside of the scope"),
    ],
)
@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_scopes_around_a_part_raise(inside, named, what):
    """One device would be trained, or each replica would assign the same variable."""
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])

    def scope(part):
        return strategy.scope() if part in inside.split() else contextlib.nullcontext()

    with scope("model"):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="sequential")
    with scope("optimizer"):
        optimizer = keras.optimizers.SGD(0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with scope("trainer"):
        trainer = ClassifierTrainer(model, optimizer, loss)
    data = from_arrays((X, Y), 16)
    with scope("run"), pytest.raises(RuntimeError, match=named) as error:
        trainer.evaluate(data) if what == "evaluate" else trainer.train(data, 1)
    assert "with strategy.scope():" in str(error.value)


@pytest.mark.parametrize("settings", [{}, {"reduction": "sum"}, {"ignore_class": 1}])
@pytest.mark.parametrize("step", ["default", "batch_loss", "loss"])
def test_own_steps_whose_loss_replicas_would_change_warn(settings, step, monkeypatch, caplog):
    class Own(ClassifierTrainer):
        def train_step(self, x, y):
            def loss():
                if step == "loss":
                    return self.loss(y, self.model(x))
                return core.batch_loss(self.loss, y, self.model(x))

            return self.minimize(loss, self.trainable_weights)

    monkeypatch.setattr(Placement, "splits_steps", True)
    made = make_trainer()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, **settings)
    kind = ClassifierTrainer if step == "default" else Own
    kind(made.model, made.optimizer, loss).build_on((X[:16], Y[:16]))
    assert ("Own.train_step calls the loss" in caplog.text) == (step == "loss" and settings != {})


def test_devices_that_stay_idle_are_named_once(monkeypatch, caplog):
    if NAME == "tensorflow":
        import tensorflow as tf

        devices = {"CPU": ["CPU:0", "CPU:1"], "GPU": []}
        monkeypatch.setattr(tf.config, "list_logical_devices", devices.get)
        remedy = "tf.distribute.MirroredStrategy"
    elif NAME == "jax":
        import jax

        monkeypatch.setattr(jax, "local_device_count", lambda: 2)
        remedy = "keras.distribution.set_distribution"
    else:
        import torch

        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        remedy = "torchrun"
    report_idle.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "polus"):
            for _ in range(2):
                make_trainer().train(from_arrays((X, Y), 16), 1)
    finally:
        report_idle.cache_clear()
    told = [record.getMessage() for record in caplog.records if "devices" in record.getMessage()]
    assert len(told) == 1
    assert "Using 1 of 2 devices" in told[0]
    assert remedy in told[0]


@pytest.mark.skipif(NAME != "tensorflow", reason="strategies of TensorFlow")
def test_distributed_datasets_raise():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    whole = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    data = strategy.experimental_distribute_dataset(whole)
    with strategy.scope(), pytest.raises(TypeError, match=r"Pass the tf.data.Dataset of whole"):
        make_trainer().train(data, 1)


@pytest.mark.skipif(NAME != "tensorflow", reason="strategies of TensorFlow")
@pytest.mark.parametrize("kind", ["global generator", "variable"])
def test_state_without_a_copy_on_each_device_raises(kind):
    import tensorflow as tf

    variable = tf.Variable(0.0)

    class Stateful(ClassifierTrainer):
        def forward_without_grads(self, x, y):
            if kind == "variable":
                return x + variable.assign_add(1.0), y
            return x + keras.random.normal((4,)), y

    with mirrored():
        parts = make_trainer()
        trainer = Stateful(parts.model, parts.optimizer, parts.loss)
        message = {"variable": "a variable of TensorFlow itself", "global generator": "SeedGen"}
        with pytest.raises((NotImplementedError, RuntimeError), match=message[kind]):
            trainer.train(from_arrays((X, Y), 16), 1)


@pytest.mark.skipif(NAME != "torch", reason="wrappers of PyTorch")
@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "fully_shard", "DataParallel"])
def test_wrapped_modules_raise(wrapper, tmp_path):
    """Their hooks need `loss.backward()`, and a layer of Keras doesn't see their weights."""
    import torch
    from torch.distributed.fsdp import fully_shard

    path = f"file://{tmp_path}/group"
    torch.distributed.init_process_group("gloo", init_method=path, rank=0, world_size=1)
    try:
        trainer = make_trainer()
        if wrapper == "fully_shard":
            fully_shard(trainer.model.layers[-1])
        elif wrapper == "DataParallel":
            trainer.wrapped = torch.nn.DataParallel(trainer.model)
        else:
            trainer.wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
        with pytest.raises(NotImplementedError, match=f"wrapped by {wrapper}.*unwrapped"):
            trainer.train(from_arrays((X, Y), 16), 1)
    finally:
        torch.distributed.destroy_process_group()


def test_one_device_has_nothing_to_agree_on():
    placement = backend.placement()
    assert (placement.count, placement.replicas, placement.is_first) == (1, 1, True)
    assert placement == backend.placement()
    assert placement.agreed([1.5, 2]) == placement.largest([1.5, 2]) == [1.5, 2]
    assert core.gather(X) is X


@pytest.mark.skipif(NAME != "torch", reason="PyTorch's processes")
def test_gradients_are_on_their_way_while_earlier_layers_are_differentiated(monkeypatch):
    import torch

    from polus.backends import torch_distribution

    events = []

    class Sent:
        def __init__(self, flat):
            self.size = flat.numel()
            events.append(f"{self.size} leave")

        def wait(self):
            events.append(f"{self.size} arrive")

    group = torch_distribution.dist
    monkeypatch.setattr(group, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "get_world_size", lambda: 2)
    monkeypatch.setattr(group, "all_reduce", lambda flat, async_op: Sent(flat))
    monkeypatch.setattr(torch_distribution, "BUCKET_BYTES", 40)  # ten numbers
    sizes = 3, 4, 5, 20, 2
    weights = [torch.ones(size, requires_grad=True) for size in sizes]
    weights[0].register_hook(lambda gradient: events.append("the first layer"))
    unused = torch.ones(7, requires_grad=True)

    def backward():
        value = 1.0
        for weight in weights:  # the later ones are differentiated first
            value = (value * weight).sum()
        return list(torch.autograd.grad(value, [unused, *weights], allow_unused=True))

    none, *means = torch_distribution.gradients_of([unused, *weights], backward)
    assert events == [
        *("2 leave", "20 leave", "9 leave", "the first layer", "3 leave"),
        *("2 arrive", "20 arrive", "9 arrive", "3 arrive"),
    ]
    assert none is None
    for mean, gradient in zip(means, backward()[1:], strict=True):
        np.testing.assert_allclose(mean, gradient / 2)
