"""Reads the settings in a folder that Hugging Face's libraries have saved."""

import json
from pathlib import Path
from typing import Any, Literal, TypedDict

_SERVED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
_BERT_ARGUMENTS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "num_types": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
    "epsilon": "layer_norm_eps",
}
Pooling = Literal["mean", "first"]
_POOLING: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
}


class OutputSettings(TypedDict, total=False):
    """The arguments of `BertEncoder` that say how token vectors become one vector."""

    pooling: Pooling
    normalize: bool


def bert_arguments(folder: Path) -> dict[str, Any]:
    """Returns the arguments of `BertEncoder` that a folder's `config.json` holds.

    Raises:
        ValueError: If the model isn't a BERT encoder as `BertEncoder` implements it.
    """
    config = json.loads((folder / "config.json").read_text())
    differing = {
        key: config[key]
        for key, served in _SERVED.items()
        if key in config and config[key] != served
    }
    if differing:
        raise ValueError(
            f"BertEncoder must be given a model with {_SERVED}, got {differing} in {folder}. Use "
            "another Keras model as the encoder; DualEncoder takes any."
        )
    return {ours: config[theirs] for ours, theirs in _BERT_ARGUMENTS.items()}


def output_settings(folder: Path) -> OutputSettings:
    """Returns pooling and normalization as sentence-transformers' `modules.json` says.

    Returns an empty dict if there is no such file.

    Raises:
        ValueError: If a module or a pooling mode is none that `BertEncoder` implements.
    """
    if not (folder / "modules.json").exists():
        return {}
    found: OutputSettings = {}
    for module in json.loads((folder / "modules.json").read_text()):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Normalize":
            found["normalize"] = True
        elif kind == "Pooling":
            found["pooling"] = _pooling(folder, module["path"])
        elif kind != "Transformer":
            raise ValueError(
                "BertEncoder implements the modules Transformer, Pooling and Normalize, but "
                f"{folder} has {module['type']!r} as well. Use another Keras model as the encoder; "
                "DualEncoder takes any."
            )
    return found


def _pooling(folder: Path, module: str) -> Pooling:
    modes = json.loads((folder / module / "config.json").read_text())
    chosen = [mode for mode, on in modes.items() if on is True and mode in _POOLING]
    if len(chosen) != 1:
        raise ValueError(
            f"BertEncoder implements the pooling {_POOLING}, but {folder} has {modes}."
        )
    return _POOLING[chosen[0]]
