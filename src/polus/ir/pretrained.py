"""Reads the settings in folders saved by Hugging Face's transformers and sentence-transformers."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from polus.host import did_you_mean
from polus.ir.pooling import Pooling
from polus.ir.tensors import damaged

PairTruncation = Literal["longest_first", "only_second"]

_ROBERTA = ("roberta", "xlm-roberta", "camembert")
BERT_TYPES = ("bert", *_ROBERTA)
_SERVED = {
    "model_type": BERT_TYPES,
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
}
BERT_ARGUMENTS = {
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
_POOLING: dict[str, Pooling] = {
    "cls": "first",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_length",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_ACTIVATIONS = {
    "Identity": "linear",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
# Until version 6 of sentence-transformers: a flag for each mode, of which several could be set.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Settings of its module Transformer that change what the encoder is given.
_NOT_SERVED = ("query_length", "document_length", "query_expansion", "processing_kwargs")
_PAIR_TRUNCATIONS: dict[object, PairTruncation] = {
    True: "longest_first",
    "longest_first": "longest_first",
    "only_second": "only_second",
}
# The prompts of every sentence-transformers model; the folder may replace them.
_PROMPTS = {"query": "", "document": ""}


class OutputSettings(TypedDict, total=False):
    """The arguments of `BertEncoder` that say how token vectors become one vector."""

    pooling: Pooling | list[Pooling]
    dense: list[dict[str, object]]
    normalize: bool


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How texts are tokenized.

    Attributes:
        max_length: The number of tokens at which texts are truncated; None if nothing is known.
        lower_case: Whether texts are lowercased before the tokenizer's own normalization.
        truncation_side: The end at which texts are truncated.
        prompts: The prompts that are prepended to texts, by name, perhaps empty.
        default_prompt: The name of the prompt for texts of no particular kind.
        pad_token: The token for padding; None if nothing is known.
        pair_truncation: How pairs of texts are truncated: tokens of the longer text go first, or
            only those of the second text.
        segment_ids: Whether pairs have segment ids other than 0.
    """

    max_length: int | None = None
    lower_case: bool = False
    truncation_side: Literal["left", "right"] = "right"
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    pad_token: str | None = None
    pair_truncation: PairTruncation = "longest_first"
    segment_ids: bool = True


def transformer_folder(folder: Path) -> Path:
    """Returns the folder of weights and tokenizer, a subfolder in old sentence-transformers."""
    for module in _modules(folder):
        if _kind(module) == "Transformer":
            return folder / str(module["path"])
    return folder


def model_config(folder: Path) -> dict[str, Any]:
    """Returns a folder's `config.json`.

    Raises:
        FileNotFoundError: If there is none, or it doesn't say what model it is of.
    """
    path = transformer_folder(folder) / "config.json"
    config = _read(path)
    if "model_type" not in config:
        raise FileNotFoundError(
            f"{path} must say what kind of model the folder has, in model_type. Use a folder that "
            "transformers or sentence-transformers has saved."
        )
    return config


def bert_arguments(folder: Path) -> dict[str, Any]:
    """Returns the arguments of `BertEncoder` that a folder's `config.json` holds.

    Raises:
        ValueError: If the model isn't a BERT encoder as `BertEncoder` implements it.
    """
    config = _read(transformer_folder(folder) / "config.json")
    differing = {
        key: config[key]
        for key, served in _SERVED.items()
        if key in config and config[key] not in served
    }
    if differing:
        raise ValueError(
            f"BertEncoder must be given a model with {_SERVED}, got {differing} in {folder}. Use "
            "another Keras model as the encoder; DualEncoder takes any."
        )
    arguments = {ours: config[theirs] for ours, theirs in BERT_ARGUMENTS.items()}
    offset = _position_offset(config)
    arguments["max_positions"] -= offset
    return arguments | {"position_offset": offset}


def _position_offset(config: dict[str, Any]) -> int:
    # RoBERTa's table of positions starts with rows that no token has, one of them for padding.
    family = config.get("model_type")
    if family == "mpnet":
        return 2
    return int(config["pad_token_id"]) + 1 if family in _ROBERTA else 0


def output_settings(folder: Path) -> OutputSettings:
    """Returns pooling, dense layers and normalization as a folder's `modules.json` says.

    Returns an empty dict if there is no such file.

    Raises:
        ValueError: If `BertEncoder` doesn't implement a module, its place or one of its settings.
    """
    found: OutputSettings = {}
    size = _read(folder / "config_sentence_transformers.json").get("truncate_dim")
    if size is not None:
        raise ValueError(
            f"load_encoder doesn't implement truncate_dim, which config_sentence_transformers.json "
            f"in {folder} sets to {size}. Set it to null there, and take vectors[:, :{size}]."
        )
    modules = _modules(folder)
    kinds = [_kind(module) for module in modules]
    if [_ORDER.get(kind) for kind in kinds] != sorted(_ORDER.get(kind, -1) for kind in kinds):
        raise ValueError(
            f"BertEncoder implements the modules {', '.join(_ORDER)}, in this order, but {folder} "
            f"has {', '.join(module['type'] for module in modules)}. Use another Keras "
            "model as the encoder; DualEncoder takes any."
        )
    for module, kind in zip(modules, kinds, strict=True):
        path = folder / module["path"] / "config.json"
        if kind in ("Pooling", "Dense") and not path.exists():
            raise FileNotFoundError(
                f"modules.json in {folder} has a module {kind}, but {path} isn't there. Get all of "
                "the folder, with its subfolders."
            )
        config = _read(path)
        if kind == "Pooling":
            found["pooling"] = _pooling(folder, config)
        elif kind != "Transformer":
            names = {config.get("module_input_name"), config.get("module_output_name")}
            if module is modules[-1]:
                names.discard("scores")  # a cross-encoder's
            if not {None, "sentence_embedding"}.issuperset(names):
                raise ValueError(
                    f"The module {kind} must map sentence embeddings to sentence embeddings, got "
                    f"{config} in {folder}."
                )
            if kind == "Dense":
                found["dense"] = [*found.get("dense", []), _dense(folder, config)]
            else:
                found["normalize"] = True
    return found


_ORDER = {"Transformer": 0, "Pooling": 1, "Dense": 2, "Normalize": 3}


def pooling_settings(pooling: Pooling | Sequence[Pooling], size: int) -> dict[str, object]:
    """Returns the `config.json` of a module Pooling of token vectors of that size.

    A single mode is written so that every version reads it; several need version 6 or later.
    """
    names = {ours: theirs for theirs, ours in _POOLING.items()}
    if isinstance(pooling, str):
        flags = {flag: mode == names[pooling] for flag, mode in _POOLING_FLAGS.items()}
        return {"word_embedding_dimension": size, **flags}
    return {"embedding_dimension": size, "pooling_mode": [names[mode] for mode in pooling]}


def activation_name(activation: object) -> str:
    """Returns the name of a Keras activation's class in PyTorch.

    Raises:
        ValueError: If it is none of those that `output_settings` reads.
    """
    for theirs, ours in _ACTIVATIONS.items():
        if ours == activation:
            return f"torch.nn.{theirs}"
    raise ValueError(
        f"A dense layer must have one of the activations {', '.join(_ACTIVATIONS.values())} to be "
        f"saved for sentence-transformers, got {activation!r}."
    )


def dense_folders(folder: Path) -> list[Path]:
    """Returns the folders of the weights of the dense layers, in order."""
    return [folder / module["path"] for module in _modules(folder) if _kind(module) == "Dense"]


def _dense(folder: Path, config: dict[str, Any]) -> dict[str, object]:
    """Returns the arguments of the Keras layer that a module Dense is."""
    activation = str(config.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS or config.get("use_residual"):
        raise ValueError(
            f"A module Dense must have one of the activations {', '.join(_ACTIVATIONS)} and no "
            f"residual connection, got {config} in {folder}."
        )
    return {
        "units": config["out_features"],
        "activation": _ACTIVATIONS[activation],
        "use_bias": config.get("bias", True),
    }


def text_settings(folder: Path) -> TextSettings:
    """Returns how a folder says that texts are tokenized.

    Raises:
        ValueError: If it has a setting that `TextTokenizer` doesn't implement.
    """
    inner = transformer_folder(folder)
    tokenizer = _read(inner / "tokenizer_config.json")
    transformer: dict[str, Any] = {}
    for path in sorted(inner.glob("sentence_*_config.json")):  # one per family in old versions
        transformer |= _read(path)
    pair_truncation = _pair_truncation(transformer)
    if pair_truncation is not None:
        del transformer["processing_kwargs"]
    unserved = {name: transformer[name] for name in _NOT_SERVED if transformer.get(name)}
    # Rotary positions are relative, so the vectors don't depend on the side.
    rotary = _read(inner / "config.json").get("model_type") in ("modernbert", "qwen3")
    if tokenizer.get("padding_side", "right") != "right" and not rotary:
        unserved["padding_side"] = tokenizer["padding_side"]
    if unserved:
        raise ValueError(
            f"TextTokenizer doesn't implement the settings {unserved} of {folder}. Write a class "
            "with __call__(texts), lengths(texts) and fingerprint."
        )
    config = _read(inner / "config.json")
    positions = config.get("max_position_embeddings")
    limits = [
        tokenizer.get("model_max_length"),
        positions and positions - _position_offset(config),
    ]
    known = [limit for limit in limits if limit is not None]
    pad = tokenizer.get("pad_token")
    sentence_transformers = _read(folder / "config_sentence_transformers.json")
    prompts = sentence_transformers.get("prompts") or {}
    return TextSettings(
        max_length=transformer.get("max_seq_length") or (int(min(known)) if known else None),
        lower_case=bool(transformer.get("do_lower_case", False)),
        truncation_side=tokenizer.get("truncation_side", "right"),
        prompts=_PROMPTS | {name: text or "" for name, text in prompts.items()},
        default_prompt=sentence_transformers.get("default_prompt_name"),
        pad_token=pad.get("content") if isinstance(pad, dict) else pad,
        pair_truncation=pair_truncation or "longest_first",
        segment_ids="token_type_ids" in tokenizer.get("model_input_names", ["token_type_ids"]),
    )


def _pair_truncation(transformer: dict[str, Any]) -> PairTruncation | None:
    """Returns the truncation in `processing_kwargs`; None if there is none or anything else."""
    given = transformer.get("processing_kwargs") or {}
    text = given.get("text") or {}
    if set(given) != {"text"} or set(text) != {"truncation"}:
        return None
    return _PAIR_TRUNCATIONS.get(text["truncation"])


def score_activation(folder: Path) -> str:
    """Returns the Keras name of the activation that sentence-transformers applies to a score.

    It is "sigmoid" if the folder names none.

    Raises:
        ValueError: If it is none of those that modules Dense may have.
    """
    config = _read(transformer_folder(folder) / "config.json")
    named = (
        _read(folder / "config_sentence_transformers.json").get("activation_fn")
        or config.get("sentence_transformers", {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
        or "Sigmoid"
    )
    name = str(named).rsplit(".", 1)[-1]
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"A score must have one of the activations {', '.join(_ACTIVATIONS)}, got {named!r} in "
            f"{folder}. Use PairScorer(load_cross_encoder(folder), TextTokenizer(folder), "
            "activation=...)."
        )
    return _ACTIVATIONS[name]


def _pooling(folder: Path, config: dict[str, Any]) -> Pooling | list[Pooling]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    unknown = [mode for mode in modes if mode not in _POOLING]
    if unknown:
        raise ValueError(
            f"BertEncoder implements the pooling modes {', '.join(_POOLING)}, but {folder} has "
            f"{', '.join(unknown)}."
        )
    if not config.get("include_prompt", True):
        raise ValueError(
            f"BertEncoder pools the tokens of prompts too, but {folder} has include_prompt=False."
        )
    found = [_POOLING[mode] for mode in modes]
    return found[0] if len(found) == 1 else found


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    return _json(path) if path.exists() else []


def _kind(module: dict[str, Any]) -> str:
    return str(module["type"]).rsplit(".", 1)[-1]


def _read(path: Path) -> dict[str, Any]:
    """Returns what a JSON file holds; an empty dict if there is none."""
    return _json(path) if path.exists() else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise damaged(path, "JSON", error) from error


def choose_prompt(folder: Path, settings: TextSettings, name: str | None) -> str:
    """Returns the prompt of that name, or else the folder's default."""
    names = [each for each, text in settings.prompts.items() if text]
    if name is None:
        if settings.default_prompt is None and names:
            raise ValueError(
                f"{folder} has prompts, so TextTokenizer needs to know which one to use. Use "
                f"prompt_name= with one of {list(settings.prompts)}, or prompt='' for none."
            )
        return settings.prompts.get(settings.default_prompt or "", "")
    if name not in settings.prompts:
        hint = did_you_mean(name, settings.prompts) or f"Its prompts are {list(settings.prompts)}."
        raise ValueError(f"{folder} has no prompt named {name!r}. {hint}")
    return settings.prompts[name]
