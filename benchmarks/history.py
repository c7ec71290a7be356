"""Measures the memory that the record of one long epoch takes: `python benchmarks/history.py`.

A model of two weights is trained for 10 million steps in a single epoch. The resident memory is
read after the first hundred thousand steps and at the end: what it grew by, divided by the steps.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")  # the fastest for steps that do almost nothing

import keras
import numpy as np

import polus


def resident_bytes() -> int:
    """Returns the memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Memory(polus.Callback):
    """Reads the memory after the first hundred thousand steps and at the epoch's end."""

    every_steps = None

    def on_steps_end(self, epoch, steps, losses):
        if not hasattr(self, "start") and steps.stop >= 100_000:
            self.start, self.first = resident_bytes(), steps.stop
        self.last = steps.stop

    def on_epoch_end(self, epoch):
        self.end = resident_bytes()


def main(steps: int) -> None:
    x = np.random.default_rng(0).normal(size=(steps, 1)).astype("float32")
    trainer = polus.ClassifierTrainer(
        keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]),
        optimizer=keras.optimizers.SGD(1e-3),
        loss=keras.losses.MeanSquaredError(),
    )
    memory, start = Memory(), time.perf_counter()
    history = trainer.train(
        polus.from_arrays((x, 2 * x), batch_size=1), epochs=1, callbacks=[memory]
    )
    seconds = time.perf_counter() - start
    grown, counted = memory.end - memory.start, memory.last - memory.first
    assert len(history.steps["loss"]) == steps
    print(
        f"{steps:,} steps in one epoch, {seconds:.0f} s on {keras.backend.backend()}: "
        f"{grown / 2**20:,.0f} MiB more than after {memory.first:,} steps, "
        f"{grown / counted:.1f} bytes a step"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000_000)
    main(parser.parse_args().steps)
