"""Each task of `tasks.py` gives the same numbers on several devices as on one."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tasks

from polus.data import DataReader, as_adapter

NAME = keras.backend.backend()
TIMEOUT_SECS = 280  # a minute on two idle cores
# JAX's processes compute what its devices in one process do, which is tested here as well.
ON_PROCESSES = {
    "jax": ["plain", "dropped", "refused", "stopped", "resumed", "sharded", "in_shards"],
    "torch": [name for name in tasks.TASKS if name not in [*tasks.ON_JAX, "synchronized"]],
    "tensorflow": [name for name in tasks.TASKS if name not in [*tasks.COSTLY, *tasks.ON_JAX]],
}[NAME]
ELSEWHERE = ["refused", "lost", "written", *tasks.ON_JAX]  # what needs several processes
ON_REPLICAS = [name for name in tasks.TASKS if name not in ELSEWHERE]


class JaxDevices:
    """Two devices in this process; the weights are replicated, or sharded over the batch axis."""

    is_global, can_be_alone, index, replicas = True, True, 0, 1

    def __init__(self, folder, distribution):
        self.folder = folder
        self.distribution = distribution

    @contextlib.contextmanager
    def running(self):
        keras.distribution.set_distribution(self.distribution())
        try:
            yield self
        finally:
            keras.distribution.set_distribution(None)

    @contextlib.contextmanager
    def alone(self):
        keras.distribution.set_distribution(None)
        try:
            yield True
        finally:
            keras.distribution.set_distribution(self.distribution())


def fsdp():
    """Kernels, and so the optimizer's slots, are split over the devices that share a batch."""
    mesh = keras.distribution.DeviceMesh((2,), ("batch",))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*dense.*kernel"] = ("batch", None)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def tensor_parallel():
    """Each device has a part of each kernel, and whole batches."""
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*dense.*kernel"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


DISTRIBUTIONS = {
    "data parallel": keras.distribution.DataParallel,
    "fsdp": fsdp,
    "tensor parallel": tensor_parallel,
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def processes():
    """The results of two processes, by task: one list entry per process."""
    with tempfile.TemporaryDirectory() as folder:
        yield run_processes(NAME, folder, ON_PROCESSES)


def run_processes(engine: str, folder: str, names: list[str], count: int = 2) -> list[dict]:
    program = [sys.executable, str(Path(tasks.__file__)), engine]
    port = str(free_port())
    flags = os.environ.get("XLA_FLAGS", "").replace("device_count=2", "device_count=1")
    environment = os.environ | {"KERAS_BACKEND": NAME, "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags}
    logs = [Path(folder) / f"log-{i}" for i in range(count)]
    started = []
    try:
        for i in range(count):
            with open(logs[i], "w") as log:
                arguments = [str(i), str(count), port, folder, *names]
                started.append(
                    subprocess.Popen(
                        [*program, *arguments], stdout=log, stderr=log, env=environment
                    )
                )
        end = time.monotonic() + TIMEOUT_SECS
        codes = [process.wait(max(0.1, end - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        codes = ["timeout"]
    finally:
        for process in started:
            process.kill()
            process.wait()
    shown = "\n\n".join(log.read_text()[-4000:] for log in logs)
    assert codes == [0] * count, f"exit codes {codes}\n{shown}"
    return [json.loads((Path(folder) / f"results-{i}.json").read_text()) for i in range(count)]


@pytest.fixture(scope="module")
def sharded_processes():
    """The results of two PyTorch processes with sharded weights, by task."""
    with tempfile.TemporaryDirectory() as folder:
        yield run_processes("torch sharded", folder, ON_DTENSORS)


@pytest.fixture(scope="module")
def replicas():
    """The results of one process with two replicas, by task."""
    with tempfile.TemporaryDirectory() as folder:
        yield run_processes("mirrored", folder, ON_REPLICAS, count=1)[0]


@pytest.fixture(scope="module")
def reference():
    """Returns the result of a task on one device, computed once."""
    known = {}

    def get(name):
        if name not in known:
            known[name] = json.loads(json.dumps(tasks.TASKS[name](tasks.OneDevice())))
        return known[name]

    return get


def assert_same(result, expected, rtol=1e-5, atol=2e-6):
    """Compares JSON values; `atol` is for weights around zero."""
    left, right = keras.tree.flatten_with_path(result), keras.tree.flatten_with_path(expected)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol, atol, err_msg=str(path))


def without_secs(result):
    return {name: value for name, value in result.items() if name != "secs"}


EQUAL = [
    "plain",
    "clipped",
    "uneven",
    "accumulated",
    "scaled",
    "gan",
    "penalized",
    "skipped",
    "embedded",
]
EQUAL += ["retrieval", "cached", "swept", "predicted", "other_means", "compared"]

# PyTorch itself refuses the reshape in the backward pass of "retrieval".
EQUAL_ON_DTENSORS = [name for name in EQUAL if name not in ("retrieval", "cached")]
EQUAL_ON_DTENSORS += ["normalized", "data_kinds"]
ON_DTENSORS = [*EQUAL_ON_DTENSORS, "stopped", "resumed", "in_shards"]

# ---------------------------------------------------------------------- processes


def on_processes(name):
    return pytest.mark.skipif(name not in ON_PROCESSES, reason="another engine's, or on devices")


@pytest.mark.parametrize("name", [name for name in EQUAL if name in ON_PROCESSES])
def test_processes_give_the_numbers_of_one_device(name, processes, reference):
    for results in processes:
        assert_same(without_secs(results[name]), reference(name))


@on_processes("rows")
def test_each_process_computes_its_rows(processes):
    for results in processes:
        whole, *traced = results["rows"]["rows"]
        assert (whole, set(traced)) == (16, {8})  # the dry run, and the steps


@on_processes("normalized")
def test_batch_norm_in_processes(processes, reference):
    """Each process normalizes its own rows, and the moving statistics are those of all."""
    first, second = (without_secs(results["normalized"]) for results in processes)
    assert_same(first, second, rtol=0, atol=0)
    assert_same(first["steps"]["loss"][0], sliced_batch_norm_loss())
    assert abs(first["steps"]["loss"][-1] - reference("normalized")["steps"]["loss"][-1]) > 1e-3


def sliced_batch_norm_loss() -> float:
    """The loss of the first batch, where each half is normalized by its own statistics."""
    trainer = tasks.classifier(keras.layers.BatchNormalization())
    x, y = next(iter(tasks.arrays()))
    halves = [trainer.loss(y[i], trainer.model(x[i], training=True)) for i in HALVES]
    return float(np.mean([keras.ops.convert_to_numpy(half) for half in halves]))


HALVES = slice(0, 8), slice(8, 16)


@on_processes("dropped")
def test_each_row_of_a_batch_has_its_own_dropout_mask(processes):
    for results in processes:
        assert results["dropped"]["masks"] == 16
    # What a checkpoint would save knows nothing of the replicas.
    assert processes[0]["dropped"]["seed"] == processes[1]["dropped"]["seed"]


@on_processes("data_kinds")
def test_each_example_is_used_once(processes, reference):
    for results in processes:
        assert without_secs(results["data_kinds"]) == reference("data_kinds")
    assert set(map(tuple, reference("data_kinds").values())) == {(1.0,)}


@on_processes("stopped")
def test_processes_stop_together(processes):
    assert [results["stopped"]["steps"] for results in processes] == [4, 4]


@on_processes("resumed")
def test_a_signal_to_one_process_ends_all_and_they_resume(processes, reference):
    expected = reference("plain")
    for results in processes:
        run = results["resumed"]
        assert run["code"] == 128 + 15
        assert run["saved"] == 1
        resumed, uninterrupted = run["resumed"], run["uninterrupted"]
        assert run["same"] == uninterrupted  # every bit on the same number of devices
        assert_same(resumed["steps"], uninterrupted["steps"])
        assert_same(resumed["sizes"], uninterrupted["sizes"])
        assert_same(resumed["steps"]["loss"], expected["steps"]["loss"])


@on_processes("refused")
def test_processes_that_differ_are_refused(processes):
    for results in processes:
        batches, callbacks, *lengths = results["refused"]["messages"]
        assert "read different batches" in batches
        assert "no DistributedSampler" in batches
        assert "different arguments" in callbacks
        assert ["different lengths" in message for message in lengths] == [True] * 6


@on_processes("sharded")
def test_weights_that_are_sharded_over_processes(processes, reference):
    for results in processes:
        run = results["sharded"]
        assert run["parts"] == [[10, 32]]  # of (20, 32)
        assert run["files"] == ["manifest.json", "state.safetensors"]
        assert "save the model after train(..., resume=folder)" in run["message"]
        assert (run["code"], run["saved"]) == (128 + 15, 1)
        assert run["resumed"] == run["uninterrupted"]
        assert_same(run["resumed"]["steps"]["loss"], reference("plain")["steps"]["loss"])


@on_processes("in_shards")
def test_each_process_saves_its_shards(processes):
    check_shards(processes)


def check_shards(processes):
    """On another layout, a run continues from what its processes read of each other's shards."""
    whole = ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    for i, results in enumerate(processes):
        run = results["in_shards"]
        assert run["files"] == 4 * [*whole, "state.safetensors"]
        assert run["same"] == run["damaged"] == run["full"] == run["uninterrupted"]
        assert_same(run["other axis"], run["uninterrupted"], rtol=1e-6, atol=1e-6)
        own, others = (f"shard-0000{number}.safetensors" for number in (i, 1 - i))
        assert {name for name, _ in run["read"]["same"]} == {own}
        assert {name for name, parts in run["read"]["other axis"] if parts is None} == {own}
        parts = [parts for name, parts in run["read"]["other axis"] if name == others]
        assert len(parts) == 6  # two kernels and their slots
        assert run["set aside"] == ["damaged-checkpoint-00000004"]
        assert run["left"] == []
        assert "don't see the same folder" in run["elsewhere"]


@on_processes("in_shards")
@pytest.mark.parametrize("layout", [None, "data parallel", "fsdp"])
def test_shards_of_processes_continue_in_one(layout, processes, tmp_path):
    run = processes[0]["in_shards"]
    folder = tmp_path / "run"
    shutil.copytree(run["folder"], folder)

    def finish():
        trainer = tasks.classifier(classes=6)
        history = trainer.train(tasks.arrays(), 3, resume=folder, steps_per_execution=2)
        return json.loads(json.dumps(tasks.summary(history, trainer.model)))

    if layout is None:
        result = finish()
    else:
        with JaxDevices(tmp_path, DISTRIBUTIONS[layout]).running():
            result = finish()
    assert_same(result, run["uninterrupted"], rtol=1e-6, atol=1e-6)


@on_processes("lost")
def test_a_lost_process_ends_the_others(processes):
    first, _ = (results["lost"] for results in processes)
    assert "Another process of this run has ended" in first["notes"][-1]
    assert first["secs"] < 60


@on_processes("written")
def test_the_first_process_writes(processes):
    first, second = (results["written"] for results in processes)
    assert first["files"] == ["keras.keras", "log.csv", "model.keras"]
    assert "epoch 1/1" in first["lines"]
    assert "Adam(learning_rate" in first["lines"]
    assert first["logged"] == ["INFO"]
    assert (second["files"], second["lines"], second["logged"]) == ([], "", [])


# ---------------------------------------------------------------------- PyTorch's DTensors


on_dtensors = pytest.mark.skipif(
    NAME != "torch" or tuple(map(int, keras.__version__.split(".")[:2])) < (3, 16),
    reason="Keras has DTensors from 3.16 on",
)


@on_dtensors
@pytest.mark.parametrize("name", EQUAL_ON_DTENSORS)
def test_dtensors_give_the_numbers_of_one_device(name, sharded_processes, reference):
    for results in sharded_processes:
        assert_same(without_secs(results[name]), reference(name), rtol=2e-5, atol=1e-5)


@on_dtensors
def test_runs_on_dtensors_stop_and_resume(sharded_processes, reference):
    for results in sharded_processes:
        assert results["stopped"]["steps"] == 4
        run = results["resumed"]
        assert (run["code"], run["saved"]) == (128 + 15, 1)
        assert run["resumed"] == run["uninterrupted"]  # every bit
        assert_same(run["resumed"]["steps"]["loss"], reference("plain")["steps"]["loss"])


@on_dtensors
def test_each_process_of_dtensors_saves_its_shards(sharded_processes):
    check_shards(sharded_processes)


# ---------------------------------------------------------------------- TensorFlow's replicas


on_tensorflow = pytest.mark.skipif(NAME != "tensorflow", reason="replicas of TensorFlow")


@on_tensorflow
@pytest.mark.parametrize("name", [*EQUAL, "synchronized", "data_kinds"])
def test_replicas_give_the_numbers_of_one_device(name, replicas, reference):
    assert_same(without_secs(replicas[name]), reference(name))


@on_tensorflow
def test_each_replica_computes_its_rows(replicas):
    """Were the batch replicated, the numbers would be right, and each device would do all."""
    whole, *traced = replicas["rows"]["rows"]
    assert whole == 16  # the dry run
    assert set(traced) == {8}


@on_tensorflow
def test_batch_norm_in_replicas(replicas, reference):
    """Each replica normalizes its own rows, and the moving statistics are those of all."""
    losses = replicas["normalized"]["steps"]["loss"]
    assert_same(losses[0], sliced_batch_norm_loss())
    assert abs(losses[-1] - reference("normalized")["steps"]["loss"][-1]) > 1e-3


@on_tensorflow
def test_each_row_of_a_batch_has_its_own_dropout_mask_in_replicas(replicas, reference):
    assert replicas["dropped"]["masks"] == 16
    # What a checkpoint saves knows nothing of the replicas.
    assert replicas["dropped"]["seed"] == reference("dropped")["seed"]


@on_tensorflow
def test_replicas_stop_and_resume(replicas, reference):
    assert replicas["stopped"]["steps"] == 4
    run = replicas["resumed"]
    assert (run["code"], run["saved"]) == (128 + 15, 1)
    assert run["same"] == run["uninterrupted"]  # every bit on the same number of devices
    assert_same(run["resumed"]["steps"], run["uninterrupted"]["steps"])
    assert_same(run["resumed"]["sizes"], run["uninterrupted"]["sizes"])
    assert_same(run["resumed"]["steps"]["loss"], reference("plain")["steps"]["loss"])


# ---------------------------------------------------------------------- JAX's devices


on_jax = pytest.mark.skipif(NAME != "jax", reason="devices of JAX")
ON_DEVICES = [("data parallel", name) for name in (*EQUAL, "normalized")]
ON_DEVICES += [("fsdp", "normalized"), ("fsdp", "uneven"), ("tensor parallel", "plain")]


@on_jax
@pytest.mark.parametrize(("layout", "name"), ON_DEVICES)
def test_devices_of_one_process_give_the_numbers_of_one(layout, name, reference, tmp_path):
    with JaxDevices(tmp_path, DISTRIBUTIONS[layout]).running() as engine:
        assert_same(json.loads(json.dumps(tasks.TASKS[name](engine))), reference(name))


@on_jax
def test_sharded_weights_are_saved_whole(tmp_path, caplog):
    """A run on sharded weights continues on one device, and then on sharded ones again."""
    caplog.set_level("INFO")
    with JaxDevices(tmp_path, fsdp).running() as engine:
        run = tasks.resumed(engine)
    assert (run["code"], run["saved"]) == (128 + 15, 1)
    assert_same(run["resumed"], run["uninterrupted"])
    assert "2 of 4 variables are sharded over the 2 devices of the mesh {'batch': 2}" in caplog.text
    assert "replicas was 2 and is 1" in caplog.text


@on_jax
def test_layouts_that_match_nothing_warn(caplog):
    def replicated():
        mesh = keras.distribution.DeviceMesh((2,), ("batch",))
        layouts = keras.distribution.LayoutMap(mesh)
        layouts["dense.*kernel"] = ("batch", None)  # not the beginning of any path
        return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")

    with JaxDevices(None, replicated).running():
        tasks.classifier().train(tasks.arrays(), 1, steps=1)
    assert "None of the 4 variables is sharded" in caplog.text


@on_jax
def test_batches_that_never_divide_warn(caplog):
    with JaxDevices(None, keras.distribution.DataParallel).running():
        tasks.classifier().train(tasks.arrays(batch_size=15), 1, steps=1)
    assert "15 examples does not divide by the 2 devices" in caplog.text


@on_jax
@pytest.mark.parametrize("device_bytes", [0, 2**30])
def test_each_device_computes_its_part(device_bytes):
    """Were the batch replicated, the numbers would be right, and each device would do all."""

    def flops() -> float:
        trainer = tasks.classifier()
        reader = DataReader(as_adapter(tasks.arrays(device_bytes=device_bytes)))
        data = reader.epoch(0)
        executor = trainer._engine.executor
        executor.prepare(data.example)
        program, arguments = executor.single_step(kept=False).program(data.sample(4))
        program(*arguments)
        ((stateful, compiled),) = program.compiled.values()
        arrays = [a for a in keras.tree.flatten(arguments) if hasattr(a, "dtype")]
        (room,) = program.stacks.values()
        lowered = compiled.jitted.lower(*stateful.values(), room, *arrays)
        return lowered.compile().cost_analysis()["flops"]

    alone = flops()
    with JaxDevices(None, keras.distribution.DataParallel).running():
        assert flops() < 0.75 * alone
