"""Predictions over a dataset, in its order."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from polus.core import gather
from polus.data import ArrayDataset, DataReader, as_adapter
from polus.host import to_host
from polus.state import Snapshot
from polus.steps.executor import StepExecutor
from polus.training.checks import check_function
from polus.training.config import check_count
from polus.training.processes import check_same_batch, same_blocks


def predict(
    executor: StepExecutor,
    step: Callable[..., Any],
    dataset: object,
    transform: Callable[[Any], Any] | None,
    steps: int | None,
) -> Any:
    """Predicts each batch; see `BaseTrainer.predict`."""
    check_count("steps", steps)
    check_function(transform, "custom_data_transform_f")
    if isinstance(dataset, ArrayDataset):
        dataset = dataset.in_order()
    reader = DataReader(as_adapter(dataset), transform, steps)
    reader.check_ends("predict")
    data = reader.epoch(0)
    check_same_batch(reader.placement, data.example)

    def gathered(*inputs: Any) -> Any:
        # Each replica predicts its own rows; what a program returns is that of all replicas.
        return keras.tree.map_structure(gather, step(*inputs))

    program, assigned = executor.inference("prediction", gathered, data.example)
    found: list[Any] = []
    waiting: list[Any] = []  # the newest one, which the device may still compute
    # Random layers and layers with a state of their own assign in inference mode too.
    snapshot = Snapshot(assigned)
    try:
        with contextlib.closing(data.blocks(1)) as blocks:
            for block in same_blocks(reader, blocks):
                run, arguments = program.program(block)
                waiting.append(run(*arguments))
                if len(waiting) > 1:
                    found.append(_on_host(waiting.pop(0)))
        found += map(_on_host, waiting)
    finally:
        snapshot.restore()
    return keras.tree.map_structure(lambda *rows: np.concatenate(rows), *found)


def _on_host(outputs: Any) -> Any:
    return keras.tree.map_structure(lambda value: np.atleast_1d(to_host(value)), outputs)
