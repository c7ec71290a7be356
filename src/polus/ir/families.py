"""How folders of MPNet, ModernBERT and Qwen3 describe a `TransformerEncoder` and its weights."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from polus.host import to_host
from polus.ir.pretrained import dense_folders, model_config, output_settings, transformer_folder
from polus.ir.tensors import CheckpointTensors, TensorKind, reshaped
from polus.ir.transformer import Architecture, TransformerEncoder

Config = dict[str, Any]
Slot = tuple[TensorKind, str, tuple[keras.layers.Layer, ...]]
"""Kind and name of a layer in a checkpoint, and the layers that it is here.

Most are one layer. A checkpoint may have several as one, with their rows below each other.
"""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of encoders.

    Attributes:
        served: The values of settings in `config.json` that are implemented, where not all are.
        arguments: Returns the arguments of `TransformerEncoder` besides sizes, given `config.json`.
        config: Returns what `config.json` says besides sizes, given an encoder.
        slots: Yields where the weights are in a checkpoint.
        prefixes: What a model with a head on top prepends to the encoder's names.
    """

    served: dict[str, tuple[object, ...]]
    arguments: Callable[[Config], Config]
    config: Callable[[TransformerEncoder], Config]
    slots: Callable[[TransformerEncoder], Iterator[Slot]]
    prefixes: tuple[str, ...]


def load_transformer(folder: Path, **overrides: Any) -> TransformerEncoder:
    """Loads the encoder in a folder of one of `FAMILIES`, as `polus.ir.models.load_encoder` does.

    Raises:
        FileNotFoundError: If there are no weights in the safetensors format.
        ValueError: If the folder has a setting that isn't implemented.
    """
    config = model_config(folder)
    family = FAMILIES[config["model_type"]]
    differing = {
        key: config[key]
        for key, served in family.served.items()
        if key in config and config[key] not in served
    }
    if differing:
        raise ValueError(
            f"A {config['model_type']} encoder must have {family.served}, got {differing} in "
            f"{folder}. Use another Keras model as the encoder; DualEncoder takes any."
        )
    model = TransformerEncoder(
        **{**_sizes(config), **family.arguments(config), **output_settings(folder), **overrides}
    )
    tensors = CheckpointTensors(transformer_folder(folder), family.prefixes)
    if "num_layers" not in overrides:
        tensors.check_depth(model.config["num_layers"])
    model.build_on_tokens()
    assign_slots(family.slots(model), tensors)
    if "dense" not in overrides:
        for layer, inner in zip(model.dense, dense_folders(folder), strict=True):
            layer.set_weights(CheckpointTensors(inner).of("dense", "linear"))
    return model


def checkpoint_config(encoder: TransformerEncoder) -> Config:
    """Returns the `config.json` of an encoder, without ids of tokens.

    Raises:
        ValueError: If no family has its architecture.
    """
    sizes = {theirs: encoder.config[ours] for ours, theirs in _SIZES.items()}
    for name, family in FAMILIES.items():
        config = {"model_type": name, **sizes, **family.config(encoder)}
        if family.arguments(config)["architecture"] == encoder.architecture:
            return config
    raise ValueError(
        f"An encoder must have the architecture of {', '.join(FAMILIES)} to be saved for "
        f"sentence-transformers, got {encoder.architecture}. Use encoder.save('encoder.keras')."
    )


def checkpoint_weights(encoder: TransformerEncoder, config: Config) -> dict[str, Any]:
    """Returns the weights of an encoder by their names in a checkpoint, float32."""
    return slot_weights(FAMILIES[config["model_type"]].slots(encoder))


def slot_weights(slots: Iterable[Slot]) -> dict[str, Any]:
    """Returns the weights of layers by their names in a checkpoint, float32."""
    found = {}
    for kind, name, layers in slots:
        for number, part in enumerate(("weight", "bias")[: len(layers[0].weights)]):
            values = np.concatenate([_rows(kind, layer, number) for layer in layers])
            found[f"{name}.{part}"] = np.ascontiguousarray(values, np.float32)
    return found


def _rows(kind: TensorKind, layer: keras.layers.Layer, number: int) -> Any:
    """Returns one of a layer's weights as a checkpoint has it, one row per output."""
    value = to_host(layer.weights[number])
    if kind != "dense":
        return value
    if number == 1:
        return value.reshape(-1)
    # Keras has an axis of its own for the heads, which come first where they are the inputs.
    of_heads = getattr(layer, "equation", "").startswith("blhd")
    return value.reshape(-1, value.shape[-1]).T if of_heads else value.reshape(len(value), -1).T


def assign_slots(slots: Iterable[Slot], tensors: CheckpointTensors) -> None:
    """Assigns the weights in a checkpoint to layers."""
    for kind, name, layers in slots:
        parts = [np.split(value, len(layers), axis=-1) for value in tensors.of(kind, name)]
        for number, layer in enumerate(layers):
            for variable, values in zip(layer.weights, parts, strict=True):
                variable.assign(reshaped(values[number], variable.shape, name))


def _sizes(config: Config) -> Config:
    return {ours: config[theirs] for ours, theirs in _SIZES.items()}


def _mpnet_arguments(config: Config) -> Config:
    return {
        "max_positions": config["max_position_embeddings"] - _MPNET_OFFSET,
        "architecture": Architecture(
            norm_first=False, position_offset=_MPNET_OFFSET, relative_bias=True
        ),
        "dropout": config["hidden_dropout_prob"],
        "epsilon": config["layer_norm_eps"],
    }


def _mpnet_config(encoder: TransformerEncoder) -> Config:
    return {
        "architectures": ["MPNetModel"],
        "hidden_act": "gelu",
        "max_position_embeddings": encoder.max_positions + _MPNET_OFFSET,
        "hidden_dropout_prob": encoder.config["dropout"],
        "attention_probs_dropout_prob": encoder.config["dropout"],
        "layer_norm_eps": encoder.config["epsilon"],
    }


def _mpnet_slots(model: TransformerEncoder) -> Iterator[Slot]:
    yield _slot("embedding", "embeddings.word_embeddings", model.words)
    yield _slot("embedding", "embeddings.position_embeddings", model.positions)
    yield _slot("norm", "embeddings.LayerNorm", model.norm)
    yield _slot("embedding", "encoder.relative_attention_bias", model.relative)
    for i, block in enumerate(model.blocks):
        name = f"encoder.layer.{i}"
        for part, layer in (
            ("attention.attn.q", block.attention.query),
            ("attention.attn.k", block.attention.key),
            ("attention.attn.v", block.attention.value),
            ("attention.attn.o", block.attention.output_dense),
            ("intermediate.dense", block.expand),
            ("output.dense", block.contract),
        ):
            yield _slot("dense", f"{name}.{part}", layer)
        yield _slot("norm", f"{name}.attention.LayerNorm", block.attention_norm)
        yield _slot("norm", f"{name}.output.LayerNorm", block.output_norm)


def _modernbert_arguments(config: Config) -> Config:
    num_layers = config["num_hidden_layers"]
    every = config.get("global_attn_every_n_layers", 3)
    kinds = config.get("layer_types") or [
        "sliding_attention" if i % every else "full_attention" for i in range(num_layers)
    ]
    bases = {
        "full_attention": _rotary_base(config, "full_attention", "global_rope_theta", 160_000.0),
        "sliding_attention": _rotary_base(config, "sliding_attention", "local_rope_theta", 1e4),
    }
    window = config.get("local_attention", 128) // 2
    return {
        "architecture": Architecture(
            use_bias=False,
            gated=True,
            rotary_bases=[bases[kind] for kind in kinds],
            windows=[window if kind == "sliding_attention" else None for kind in kinds],
        ),
        "dropout": config.get("mlp_dropout", 0.0),
        "epsilon": config.get("norm_eps", 1e-5),
    }


def _modernbert_config(encoder: TransformerEncoder) -> Config:
    kinds = ["sliding_attention" if window else "full_attention" for window, _ in encoder.kinds]
    bases = {kind: base for kind, (_, base) in zip(kinds, encoder.kinds, strict=True)}
    windows = [window for window, _ in encoder.kinds if window]
    dropout = encoder.config["dropout"]
    return {
        "architectures": ["ModernBertModel"],
        "hidden_activation": "gelu",
        "layer_types": kinds,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()
        },
        "local_attention": 2 * windows[0] if windows else 128,
        "embedding_dropout": dropout,
        "attention_dropout": dropout,
        "mlp_dropout": dropout,
        "norm_eps": encoder.config["epsilon"],
        "classifier_pooling": "mean" if encoder.pooling == "mean" else "cls",
    }


def _modernbert_slots(model: TransformerEncoder) -> Iterator[Slot]:
    yield _slot("embedding", "embeddings.tok_embeddings", model.words)
    yield _slot("norm", "embeddings.norm", model.norm)
    for i, block in enumerate(model.blocks):
        name, attention = f"layers.{i}", block.attention
        if i:  # the first block's is the identity
            yield _slot("norm", f"{name}.attn_norm", block.attention_norm)
        yield _slot("dense", f"{name}.attn.Wqkv", attention.query, attention.key, attention.value)
        yield _slot("dense", f"{name}.attn.Wo", attention.output_dense)
        yield _slot("norm", f"{name}.mlp_norm", block.output_norm)
        yield _slot("dense", f"{name}.mlp.Wi", block.expand, block.gate)
        yield _slot("dense", f"{name}.mlp.Wo", block.contract)
    yield _slot("norm", "final_norm", model.last_norm)


def _qwen3_arguments(config: Config) -> Config:
    return {
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_size": config.get("head_dim", 128),
        "architecture": Architecture(
            norm="rms",
            embedding_norm=False,
            qk_norm=True,
            use_bias=False,
            activation="silu",
            gated=True,
            causal=True,
            rotary_bases=_rotary_base(config, None, "rope_theta", 1e6),
        ),
        "dropout": 0.0,
        "epsilon": config.get("rms_norm_eps", 1e-6),
        "pooling": "last",
    }


def _qwen3_config(encoder: TransformerEncoder) -> Config:
    base = encoder.kinds[0][1]
    heads = encoder.config["num_heads"]
    pad_id = encoder.config["pad_id"]
    return {
        **({} if pad_id is None else {"pad_token_id": pad_id}),
        "architectures": ["Qwen3Model"],
        "num_key_value_heads": encoder.config["num_kv_heads"] or heads,
        "head_dim": encoder.head_size,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "attention_dropout": encoder.config["dropout"],
        "rms_norm_eps": encoder.config["epsilon"],
    }


def _qwen3_slots(model: TransformerEncoder) -> Iterator[Slot]:
    yield _slot("embedding", "embed_tokens", model.words)
    for i, block in enumerate(model.blocks):
        name, attention = f"layers.{i}", block.attention
        for part, layer in (
            ("self_attn.q_proj", attention.query),
            ("self_attn.k_proj", attention.key),
            ("self_attn.v_proj", attention.value),
            ("self_attn.o_proj", attention.output_dense),
            ("mlp.gate_proj", block.expand),
            ("mlp.up_proj", block.gate),
            ("mlp.down_proj", block.contract),
        ):
            yield _slot("dense", f"{name}.{part}", layer)
        for part, layer in (
            ("self_attn.q_norm", attention.qk_norms[0]),
            ("self_attn.k_norm", attention.qk_norms[1]),
            ("input_layernorm", block.attention_norm),
            ("post_attention_layernorm", block.output_norm),
        ):
            yield _slot("norm", f"{name}.{part}", layer)
    yield _slot("norm", "norm", model.last_norm)


def _slot(kind: TensorKind, name: str, *layers: keras.layers.Layer) -> Slot:
    return kind, name, layers


def _rotary_base(config: Config, kind: str | None, old: str, default: float) -> float:
    """Returns the base of the rotary embedding, under its names before and since transformers 5.

    Raises:
        ValueError: If the frequencies are scaled.
    """
    found = config.get("rope_parameters") or {}
    found = found.get(kind, {}) if kind else found
    scaling = config.get("rope_scaling") or found
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name != "default":
        raise ValueError(
            f"A rotary embedding must have the type 'default', got {name!r}. Use another Keras "
            "model as the encoder; DualEncoder takes any."
        )
    return float(found.get("rope_theta") or config.get(old) or default)


_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
_MPNET_OFFSET = 2  # the rows of positions that no token has
FAMILIES = {
    "mpnet": Family(
        {"hidden_act": ("gelu",), "relative_attention_num_buckets": (32,)},
        _mpnet_arguments,
        _mpnet_config,
        _mpnet_slots,
        ("mpnet.",),
    ),
    "modernbert": Family(
        {
            "hidden_activation": ("gelu",),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "norm_bias": (False,),
        },
        _modernbert_arguments,
        _modernbert_config,
        _modernbert_slots,
        ("model.",),
    ),
    "qwen3": Family(
        {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
        _qwen3_arguments,
        _qwen3_config,
        _qwen3_slots,
        ("model.",),
    ),
}
