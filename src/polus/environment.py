"""The environment of a run: what its bits, and its speed, depend on besides its steps."""

import importlib.metadata
import logging
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import keras

from polus.backends import backend
from polus.core import get_jit_compile
from polus.state import layers_of
from polus.state_tree import printable

PACKAGES = ("polus", "keras", "numpy", "tensorflow", "tensorflow-cpu", "jax", "jaxlib", "torch")
# Environment variables that tell libraries how to compute.
FLAGS = re.compile(
    "XLA_FLAGS|TF_(XLA_FLAGS|ENABLE_ONEDNN_OPTS|DETERMINISTIC_OPS|NUM_.*)|JAX_.*|PYTHONHASHSEED"
    "|(OMP|MKL|OPENBLAS)_.*|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32.*"
)

logger = logging.getLogger("polus.checkpoint")


def describe_environment(model: keras.Model, steps_per_execution: int | None) -> dict[str, Any]:
    """Returns settings, versions, devices and processor by name, as JSON values."""
    return {
        "backend": keras.config.backend(),
        "floatx": keras.config.floatx(),
        "dtype policies": sorted({layer.dtype_policy.name for layer in layers_of(model)}),
        "jit_compile": get_jit_compile(),
        "steps_per_execution": steps_per_execution,
        "replicas": backend.placement().replicas,
        **describe_machine(),
    }


def describe_machine() -> dict[str, Any]:
    """Returns the processor and the devices, versions, and variables that libraries read."""
    return {
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "processor": processor(),
        **backend.describe(),
        "system": platform.platform(),
        **_versions(),
        **{name: os.environ[name] for name in sorted(os.environ) if FLAGS.fullmatch(name)},
    }


def processor() -> str:
    """Returns the name of the processor's model."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def warn_of_changes(name: str, saved: object, now: dict[str, Any]) -> None:
    """Logs a warning if the environment differs from that of the checkpoint `name`."""
    saved = saved if isinstance(saved, dict) else {}
    changes = [
        f"{printable(key)} was {printable(repr(saved.get(key)))} and is {now.get(key)!r}"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key) != now.get(key)
    ]
    if changes:
        logger.warning(
            "This environment is not the one that %s was saved in, so the results may not be bit "
            "for bit those of an uninterrupted run: %s.",
            name,
            ", ".join(changes),
        )


def _versions() -> dict[str, str]:
    versions = {"version of python": platform.python_version()}
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = getattr(sys.modules.get(name), "__version__", "")
        if version:
            versions[f"version of {name}"] = version
    return versions
