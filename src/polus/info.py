"""Shows what Polus runs on: `python -m polus.info`, or `python -m polus.info --json`."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import keras

from polus.backends import backend
from polus.core import get_jit_compile
from polus.environment import FLAGS, processor

BACKENDS = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}
# What is missing for a feature, by the package that it needs.
OPTIONAL = {
    "matplotlib": "history.plot",
    "bokeh": "report.html of a run",
    "pandas": "history.to_frame",
    "ir_measures": "polus.ir: evaluation",
    "tokenizers": "polus.ir: pretrained encoders",
    "sklearn": "python -m polus.demo",
}
PACKAGE_OF = {"sklearn": "scikit-learn", "tensorflow": "tensorflow-cpu"}


def collect() -> dict[str, Any]:
    """Returns versions, backends, devices, compilers and what is missing, as JSON values."""
    found = {name: _version(name) for name in BACKENDS}
    missing = {name: why for name, why in OPTIONAL.items() if not _is_there(name)}
    return {
        "polus": _version("polus"),
        "keras": keras.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "backend": keras.config.backend(),
        "backends": found,
        **backend.describe(),
        "floatx": keras.config.floatx(),
        "jit_compile": get_jit_compile(),
        "compilers": {
            "settings of jit_compile": list(backend.candidates()),
            "C++ compiler": shutil.which("g++") or shutil.which("clang++"),
            "git": shutil.which("git"),
        },
        "environment": {n: v for n, v in sorted(os.environ.items()) if FLAGS.fullmatch(n)},
        "missing": {
            PACKAGE_OF.get(name, name): f"{why} (pip install {PACKAGE_OF.get(name, name)})"
            for name, why in missing.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints it and returns the exit code, 0."""
    parser = argparse.ArgumentParser(prog="python -m polus.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="prints JSON")
    facts = collect()
    if parser.parse_args(arguments).json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        print(f"{name:12} {_shown(value)}")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(each)}" for name, each in value.items()) or "nothing"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not there" if value is None else str(value)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str | None:
    for name in (package, PACKAGE_OF.get(package, package)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return getattr(sys.modules.get(package), "__version__", None)


if __name__ == "__main__":
    sys.exit(main())
