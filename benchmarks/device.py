"""The device of a benchmark: the CPU, also where there is a GPU, or with `--device gpu` the GPU."""

import argparse
import os
import sys
from pathlib import Path


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")


def choose(device: str) -> None:
    """Sets it for processes to come, and for this one if no backend is imported yet."""
    if device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}


def check(device: str) -> None:
    """Exits if the backend of this process doesn't run on that device."""
    import keras

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        found = jax.default_backend() == "gpu"
    elif backend == "tensorflow":
        import tensorflow as tf

        found = bool(tf.config.list_physical_devices("GPU"))
    else:
        import torch

        found = torch.cuda.is_available()
    if found != (device == "gpu"):
        sys.exit(f"{backend} finds {'a' if found else 'no'} GPU, and --device is {device}.")


def page(path: Path, device: str) -> Path:
    """Returns the page of the figures of that device."""
    return path if device == "cpu" else path.with_stem(f"{path.stem}_{device}")
