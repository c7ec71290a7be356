"""A trace by the backend's own profiler has the operations of the step."""

import gzip
import logging

import keras
import numpy as np
import pytest

import polus


def test_a_trace_has_the_operations_of_the_step(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = polus.ClassifierTrainer(model, keras.optimizers.SGD(0.1), loss)
    data = polus.from_arrays((np.ones((8, 3), "float32"), np.ones(8, "int32")), 4)
    folder = tmp_path / "run" / "trace"
    with polus.profile(folder):
        trainer.train(data, 1)
    assert f"The trace is in {folder}: " in caplog.text
    files = {
        "jax": "**/perfetto_trace.json.gz",
        "tensorflow": "**/*.xplane.pb",
        "torch": "*.pt.trace.json",
    }
    operations = {"jax": b"dot", "tensorflow": b"MatMul", "torch": b"aten::matmul"}
    backend = keras.backend.backend()
    (file,) = folder.glob(files[backend])
    content = file.read_bytes()
    content = gzip.decompress(content) if file.suffix == ".gz" else content
    assert operations[backend] in content


def test_an_error_in_the_body_is_raised_and_a_later_trace_works(tmp_path):
    with pytest.raises(ZeroDivisionError), polus.profile(tmp_path / "a"):
        _ = 1 / 0
    with polus.profile(tmp_path / "b"):
        keras.ops.convert_to_numpy(keras.ops.ones((2,)) + 1)
    assert any((tmp_path / "b").rglob("*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder"), polus.profile(tmp_path / "file"):
        pass


def test_a_trace_within_a_trace_raises(tmp_path):
    nested = pytest.raises(RuntimeError, match=r"A block of polus\.profile runs already")
    with polus.profile(tmp_path / "a"):
        with nested, polus.profile(tmp_path / "b"):
            pass
        keras.ops.convert_to_numpy(keras.ops.ones((2,)) + 1)
    assert any((tmp_path / "a").rglob("*"))
