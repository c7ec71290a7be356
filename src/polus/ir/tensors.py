"""Reads the tensors of a model saved by Hugging Face's transformers, in one file or in shards."""

import json
import math
import re
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

Array = NDArray[Any]
TensorKind = Literal["embedding", "norm", "dense"]


class CheckpointTensors:
    """The tensors in a folder's `model.safetensors`, or in the shards that its index names.

    Args:
        folder: The folder.
        prefixes: What a model with a head on top prepends to the encoder's names, such as "bert.".

    Raises:
        FileNotFoundError: If there are no weights in this format.
        ValueError: If a file is incomplete or no such file.
    """

    def __init__(self, folder: Path, prefixes: Sequence[str] = ()) -> None:
        self.folder = folder
        files: list[Any] = [_opened(path) for path in _files(folder)]
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        begun = [each for each in prefixes if any(map(str.startswith, self._file_of, repeat(each)))]
        self.prefix = begun[0] if begun else ""

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self._file_of

    def __getitem__(self, name: str) -> Array:
        if name not in self:
            raise ValueError(
                f"The weights in {self.folder} must have a tensor {self.prefix + name!r}, but they "
                f"have {len(self._file_of)} others, such as {next(iter(self._file_of), None)!r}. "
                "They belong to another model, or some are missing."
            )
        found: Array = self._file_of[self.prefix + name].get_tensor(self.prefix + name)
        return found

    def check_depth(self, num_layers: int) -> None:
        """Raises a ValueError if there are weights of more blocks than `num_layers`."""
        begin = re.escape(self.prefix) + r"(?:encoder\.layer|layers)\.(\d+)\."
        numbers = [int(found[1]) for name in self._file_of if (found := re.match(begin, name))]
        if max(numbers, default=-1) >= num_layers:
            raise ValueError(
                f"The weights in {self.folder} must be those of {num_layers} layers, as "
                f"config.json says, but they are of {max(numbers) + 1}. Take both files from the "
                f"same model. To load the first {num_layers} alone, use load_encoder(folder, "
                f"num_layers={num_layers})."
            )

    def of(self, kind: TensorKind, name: str) -> list[Array]:
        """Returns a layer's weights as Keras stores them: a kernel, table or scale, then a bias."""
        # The first BERT checkpoints keep TensorFlow's names of a norm's scale and shift.
        old = kind == "norm" and f"{name}.gamma" in self
        weight, bias = ("gamma", "beta") if old else ("weight", "bias")
        first = self[f"{name}.{weight}"]
        if kind == "dense":
            first = np.ascontiguousarray(first.T)
        return [first, self[f"{name}.{bias}"]] if f"{name}.{bias}" in self else [first]


def reshaped(value: Array, shape: Sequence[int], name: str) -> Array:
    """Returns a tensor in the shape of a variable, which may split one of its axes.

    Raises:
        ValueError: If it has another number of values.
    """
    if value.size != math.prod(shape):
        raise ValueError(
            f"The weights of {name!r} must have {math.prod(shape):,} values, those of "
            f"{tuple(shape)} as config.json says, but they are {value.shape}. Take both files from "
            "the same model."
        )
    return value.reshape(shape)


def damaged(path: Path, kind: str, error: Exception) -> ValueError:
    """Returns the error to raise for a file that a library couldn't read."""
    with open(path, "rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs")
    advice = "It is a pointer of Git LFS: run `git lfs pull`." if pointer else "Get it anew."
    return ValueError(f"{path} must be {kind}, but it is damaged or incomplete: {error}. {advice}")


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), "numpy")
    except SafetensorError as error:
        raise damaged(path, "a safetensors file", error) from error


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"{index} names {len(names)} files, but {', '.join(missing)} is not there. "
                "Download all of them."
            )
        return [folder / name for name in names]
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    raise FileNotFoundError(
        f"{folder} must have a model.safetensors, but it has {found or 'nothing'}. Save other "
        "formats anew with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder)."
    )
