"""Measures whether a search's memory stays flat: resident memory after each trial.

KERAS_BACKEND=jax python benchmarks/search.py --trials 50
"""

import argparse
import gc
import os
import resource
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

import polus

EVERY = 5


def resident_mb() -> float:
    """Returns the resident memory of the process, in MB."""
    if sys.platform == "linux":
        return (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # the highest so far


def main(trials: int = 50, width: int = 400) -> list[float]:
    """Searches, prints the memory after some trials, and returns that after each one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 32)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    memory: list[float] = []

    def make_trainer(trial):
        gc.collect()
        memory.append(resident_mb())
        if trial.number % EVERY == 0:
            live = sum(issubclass(type(each), keras.Variable) for each in gc.get_objects())
            print(f"trial {trial.number:3}: {memory[-1]:7.1f} MB, {live} variables", flush=True)
        units = trial.suggest_int("units", width, width + 100)
        model = keras.Sequential(
            [keras.layers.Dense(units, "relu"), keras.layers.Dense(units), keras.layers.Dense(2)]
        )
        trainer = polus.ClassifierTrainer(model, keras.optimizers.Adam(1e-3), loss)
        # Made here: a shared data set or callback would keep what it saw last.
        trainer.changing_train_config(
            tf_dataset=polus.from_arrays((x, y), 32),
            callbacks=[polus.ValidationDataCallback(polus.from_arrays((x, y), 64, shuffle=False))],
        )
        return trainer

    with tempfile.TemporaryDirectory() as folder:
        polus.hpo.search(make_trainer, trials + 1, epochs=2, storage=None, directory=folder)
    half = memory[len(memory) // 2 :]
    grown = (half[-1] - half[0]) / max(1, len(half) - 1)
    print(f"{keras.backend.backend()}: {grown:+.2f} MB per trial in the second half")
    return memory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    main(**vars(parser.parse_args()))
