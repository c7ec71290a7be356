"""Runs that give the same bits each time, and what Polus says of where it runs."""

import json
import subprocess
import sys

import keras
import pytest

import polus

# In processes of their own: the switches are the whole process's.
PROGRAM = """
import sys, logging, hashlib
import keras, numpy as np
import polus

polus.set_deterministic(int(sys.argv[1]))
x = np.random.normal(size=(64, 8)).astype("float32")
y = np.random.randint(0, 2, 64)
layers = [keras.layers.Dense(16, "relu"), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
trainer = polus.ClassifierTrainer(keras.Sequential(layers), keras.optimizers.Adam(0.01), loss)
history = trainer.train(polus.from_arrays((x, y), 8, shuffle=True), 20)
print(hashlib.sha256(history.steps["loss"].tobytes()).hexdigest())
"""


def losses(seed):
    command = [sys.executable, "-c", PROGRAM, str(seed)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_runs_of_one_seed_have_the_same_bits():
    assert losses(3) == losses(3) != losses(4)


@pytest.mark.once
@pytest.mark.parametrize("seed", [-1, 2**32, "3", True, None])
def test_invalid_seeds_raise(seed):
    with pytest.raises(ValueError, match="seed must be an integer"):
        polus.set_deterministic(seed)


def test_info_tells_versions_backends_devices_and_what_is_missing(capsys, monkeypatch):
    from polus import info

    monkeypatch.setattr(info, "OPTIONAL", {"no_such_package": "nothing"})
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["keras"] == keras.__version__
    assert facts["backend"] == keras.config.backend()
    assert facts["backends"][keras.config.backend()]
    assert facts["missing"] == {"no_such_package": "nothing (pip install no_such_package)"}
    assert info.main([]) == 0
    assert f"backend      {keras.config.backend()}" in capsys.readouterr().out
