"""What a run is made of and where it runs, as JSON."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

from polus.callbacks.base import ICallback, RunView
from polus.callbacks.keras_callback import KerasCallback
from polus.describe import describe
from polus.environment import describe_environment
from polus.host import to_host
from polus.models import models_of
from polus.optimizers import optimizers_of
from polus.state import random_state

GIT_SECS = 5.0

Json = Any


def describe_run(run: RunView, callbacks: Sequence[ICallback]) -> dict[str, Json]:
    """Returns what a run is made of: its parts as Keras serializes them, and its data."""
    trainer: Any = run.trainer
    adapter = run.reader.adapter
    return {
        "id": run.id,
        "trainer": type(trainer).__name__,
        "models": {name: _serialized(m) for name, m in models_of(trainer.model).items()},
        "optimizers": {n: _serialized(o) for n, o in optimizers_of(trainer).items()},
        "loss": _serialized(getattr(trainer, "loss", None)),
        "metrics": [metric.name for metric in trainer.metrics],
        "trained": [variable.path for variable in trainer.trainable_weights],
        "callbacks": [_callback(callback) for callback in callbacks],
        "data": {
            "kind": type(adapter.dataset).__name__,
            "num_batches": run.reader.num_batches,
            "batch": _signature(run.reader.current),
        },
        "epochs": run.epochs,
        "steps": run.steps,
        "steps_per_execution": run.steps_per_execution,
    }


def describe_start(run: RunView) -> dict[str, Json]:
    """Returns what a process that begins or continues a run should be told by."""
    state = random_state()
    generators = {name: _crc(state[name]) for name in ("python", "numpy")}
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "command": [sys.executable, *sys.argv],
        "folder": os.getcwd(),
        "process": {"host": socket.gethostname(), "pid": os.getpid()},
        "git": describe_git(Path(sys.argv[0] or ".").absolute().parent),
        "random_state": generators,
        "environment": describe_environment(run.trainer.model, run.steps_per_execution),
    }


def describe_git(folder: Path) -> dict[str, Json] | None:
    """Returns the commit of a work tree and whether it was clean; None where there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=GIT_SECS, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.SubprocessError):
        return None


def _crc(state: object) -> str:
    """Returns a checksum of a generator's state: two runs from one seed have the same."""
    return f"{zlib.crc32(repr(state).encode()):08x}"


def _serialized(part: Any) -> Json:
    """Returns a Keras object as Keras serializes it, and anything else as `describe` tells it."""
    attempts: tuple[Callable[[], Json], ...] = (
        lambda: json.loads(json.dumps(keras.saving.serialize_keras_object(part), allow_nan=False)),
        lambda: json.loads(json.dumps(describe(part))),
    )
    for attempt in attempts if part is not None else ():
        # Whatever a user's get_config raises, and Keras' warning of lambdas: nothing is loaded.
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return attempt()
    return None if part is None else {"class": type(part).__qualname__}


def _callback(callback: Any) -> dict[str, Json]:
    inner = callback.callback if isinstance(callback, KerasCallback) else callback
    plain = {
        name: value
        for name, value in vars(inner).items()
        if not name.startswith("_") and isinstance(value, bool | int | float | str | None)
    }
    return {"class": type(inner).__name__, **{n: v for n, v in plain.items() if _is_json(v)}}


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or abs(value) < float("inf")


def _signature(epoch: Any) -> list[str]:
    """Returns shape and dtype of each part of a batch."""
    if epoch is None:
        return []
    leaves = [to_host(leaf) for leaf in keras.tree.flatten(epoch.example) if leaf is not None]
    return [f"{leaf.dtype.name} {list(leaf.shape)}" for leaf in leaves]
