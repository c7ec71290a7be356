"""Saves encoders and cross-encoders as sentence-transformers does, so that it loads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import keras
import numpy as np
from safetensors.numpy import save_file

from polus.files import atomic_write
from polus.host import to_host
from polus.ir.bert import BertEncoder, named_weights
from polus.ir.cross_encoder import PairScorer
from polus.ir.families import checkpoint_config, checkpoint_weights, slot_weights
from polus.ir.heads import HEADS
from polus.ir.models import IdentityProjection, TextTokenizer
from polus.ir.pooled import PooledEncoder
from polus.ir.pretrained import BERT_ARGUMENTS, activation_name, pooling_settings
from polus.ir.texts import check_texts_by_id
from polus.ir.transformer import TransformerEncoder

Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
Module = tuple[str, dict[str, object], dict[str, Any]]
"""A module's kind, its config.json, and its weights."""


def save_sentence_transformers(
    folder: str | Path,
    encoder: BertEncoder | TransformerEncoder,
    tokenizer: TextTokenizer,
    projection: IdentityProjection | None = None,
    *,
    normalize: bool = False,
    prompts: Mapping[str, str] | None = None,
    similarity: Similarity = "cosine",
) -> None:
    """Writes a folder that `SentenceTransformer(folder)` loads, with equal vectors.

    Query and document projections that differ need a folder each.

    Args:
        folder: A new folder. An interrupted call leaves none.
        encoder: The encoder, built, such as the `query_encoder` of a `DualEncoder`.
        tokenizer: Its tokenizer. Its prompt becomes the default one if there are no `prompts`.
        projection: A trained projection on top, which is saved as a module Dense.
        normalize: Whether vectors are scaled to unit length at the end, as for a model that was
            trained on cosines.
        prompts: The prompts by name, such as `{"query": "query: ", "document": ""}`.
        similarity: What sentence-transformers compares vectors with: "dot" for a model that was
            trained on inner products.

    Raises:
        FileExistsError: If the folder exists.
        TypeError: If the encoder or the projection is of another class, or a prompt isn't a string.
        ValueError: If the encoder isn't built or has no pooling, or if sentence-transformers can't
            load its architecture or a layer's activation.
    """
    _check_new(folder)
    _check(encoder, projection, similarity)
    check_texts_by_id({} if prompts is None else prompts, "prompts")
    above = _modules(encoder, projection, normalize)
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        _write_modules(temporary, above)
        _write_transformer(temporary, encoder, tokenizer, *_checkpoint(encoder))
        given = {"default": tokenizer.prompt} if prompts is None and tokenizer.prompt else prompts
        _write(
            temporary / "config_sentence_transformers.json",
            {
                "prompts": dict(given or {}),
                "default_prompt_name": "default" if given and prompts is None else None,
                "similarity_fn_name": similarity,
            },
        )


def _check(encoder: object, projection: object, similarity: str) -> None:
    if similarity not in get_args(Similarity):
        raise ValueError(
            f"similarity must be one of {', '.join(map(repr, get_args(Similarity)))}, as "
            f"sentence-transformers calls them, got {similarity!r}."
        )
    if not isinstance(encoder, BertEncoder | TransformerEncoder):
        raise TypeError(
            "encoder must be a BertEncoder or a TransformerEncoder, got a "
            f"{type(encoder).__name__}. For a DualEncoder write save_sentence_transformers(folder, "
            "model.query_encoder, tokenizer, model.query_projection), and a folder for documents."
        )
    if not encoder.built or encoder.pooling is None:
        raise ValueError(
            "An encoder must be built and have pooling to be saved for sentence-transformers, got "
            f"built={encoder.built} and pooling={encoder.pooling!r}. Call it on tokens first."
        )
    if projection is not None and not isinstance(projection, IdentityProjection):
        raise TypeError(
            f"projection must be an IdentityProjection, such as a DualEncoder's query_projection, "
            f"got a {type(projection).__name__}. Give other layers to the encoder as dense=[...]."
        )
    if projection is not None and not projection.built:
        raise ValueError("projection must be built to be saved. Call it on vectors first.")


def save_cross_encoder(folder: str | Path, scorer: PairScorer) -> None:
    """Writes a folder that `CrossEncoder(folder)` loads, whose `predict` has the scorer's scores.

    A model with the layers of its family's ForSequenceClassification on top, as one that
    `load_cross_encoder` has read, is saved as that class, so that transformers loads it too. With
    other pooling or dense layers, or without Qwen3's `pad_id`, it is saved as modules, for
    sentence-transformers 6 or later.

    Args:
        folder: A new folder. An interrupted call leaves none.
        scorer: The scorer of a `BertEncoder` or `TransformerEncoder`, built, whose last layer has
            one unit. Its tokenizer's prompt becomes the default one.

    Raises:
        FileExistsError: If the folder exists.
        ValueError: If the model isn't such a model, or if sentence-transformers can't load its
            architecture or a layer's activation.
    """
    _check_new(folder)
    encoder, tokenizer = _scoring_encoder(scorer.model), scorer.tokenizer
    activation = activation_name(scorer.activation)
    config, weights = _checkpoint(encoder)
    head = HEADS[config["model_type"]]
    above: Sequence[Module] = ()
    settings: dict[str, object] = {}
    if head.fits(encoder, config):
        settings["transformer_task"] = "sequence-classification"
        weights = {f"{head.prefix}{name}": value for name, value in weights.items()}
        weights |= slot_weights(head.slots(encoder))
        config |= {
            "architectures": [head.architecture],
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "sentence_transformers": {"activation_fn": activation},  # read before version 6
        }
    else:
        *others, (kind, dense, values) = _modules(encoder, None, False)
        above = [*others, (kind, dense | {"module_output_name": "scores"}, values)]
    if tokenizer.pair_truncation != "longest_first":
        settings["processing_kwargs"] = {"text": {"truncation": tokenizer.pair_truncation}}
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        _write_modules(temporary, above)
        _write_transformer(temporary, encoder, tokenizer, config, weights, settings)
        _write(
            temporary / "config_sentence_transformers.json",
            {
                "model_type": "CrossEncoder",
                "activation_fn": activation,
                "prompts": {"default": tokenizer.prompt},
                "default_prompt_name": "default" if tokenizer.prompt else None,
            },
        )


def _scoring_encoder(model: keras.Model) -> BertEncoder | TransformerEncoder:
    """Returns the model, or raises a ValueError unless it ends in a score."""
    if not isinstance(model, BertEncoder | TransformerEncoder):
        raise ValueError(
            "A cross-encoder must be a BertEncoder or TransformerEncoder to be saved for "
            f"sentence-transformers, got {type(model).__name__}."
        )
    is_score = bool(model.dense) and getattr(model.dense[-1], "units", None) == 1
    if not model.built or model.pooling is None or model.normalize or not is_score:
        raise ValueError(
            "A cross-encoder must be built, and end in pooling and a dense layer of one unit, got "
            f"built={model.built}, pooling={model.pooling!r}, normalize={model.normalize} and "
            f"dense={model.config['dense']}."
        )
    return model


def _check_new(folder: str | Path) -> None:
    if Path(folder).exists():
        raise FileExistsError(f"{folder} exists. Use another folder, or delete this one.")


def _modules(
    encoder: PooledEncoder, projection: IdentityProjection | None, normalize: bool
) -> Sequence[Module]:
    size = encoder.config["hidden_size"]
    assert encoder.pooling is not None  # or the caller has raised
    if not all(isinstance(layer, keras.layers.Dense) for layer in encoder.dense):
        raise ValueError(
            "The layers after pooling must be dense to be saved as modules of "
            f"sentence-transformers, got {encoder.config['dense']}."
        )
    found: list[Module] = [("Pooling", pooling_settings(encoder.pooling, size), {})]
    found += [
        _dense(layer.kernel, layer.bias if layer.use_bias else None, layer.activation)
        for layer in encoder.dense
    ]
    # A length before a projection that is linear doesn't matter if there is a length after it, and
    # `load_encoder` reads one module Normalize, the last.
    if encoder.normalize and (projection is None or not normalize):
        found.append(("Normalize", {}, {}))
    if projection is not None:
        found.append(_dense(projection.kernel, None, keras.activations.linear))
    if normalize and (projection is not None or not encoder.normalize):
        found.append(("Normalize", {}, {}))
    return found


def _dense(kernel: Any, bias: Any, activation: Any) -> Module:
    # A layer may compute in half precision.
    weights = {"linear.weight": np.ascontiguousarray(to_host(kernel).T.astype(np.float32))}
    if bias is not None:
        weights["linear.bias"] = to_host(bias).astype(np.float32)
    size_out, size_in = weights["linear.weight"].shape
    config = {
        "in_features": size_in,
        "out_features": size_out,
        "bias": bias is not None,
        "activation_function": activation_name(keras.activations.serialize(activation)),
    }
    return "Dense", config, weights


def _write_modules(folder: Path, above: Sequence[Module]) -> None:
    listed: list[dict[str, object]] = [_listed(0, "Transformer", "")]
    for number, (kind, config, weights) in enumerate(above, 1):
        listed.append(_listed(number, kind, f"{number}_{kind}"))
        inner = folder / f"{number}_{kind}"
        inner.mkdir()
        _write(inner / "config.json", config)
        if weights:
            save_file(weights, str(inner / "model.safetensors"))
    _write(folder / "modules.json", listed)


def _checkpoint(
    encoder: BertEncoder | TransformerEncoder,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns an encoder's `config.json` and weights."""
    if isinstance(encoder, BertEncoder):
        return _bert_config(encoder), _bert_weights(encoder)
    config = checkpoint_config(encoder)
    return config, checkpoint_weights(encoder, config)


def _write_transformer(
    folder: Path,
    encoder: BertEncoder | TransformerEncoder,
    tokenizer: TextTokenizer,
    config: dict[str, Any],
    weights: dict[str, Any],
    settings: Mapping[str, object] = MappingProxyType({}),
) -> None:
    pad_id = tokenizer.save(
        folder,
        config.get("pad_token_id", 0),
        segment_ids=encoder.config.get("num_types", 1) > 1,
        settings=settings,
    )
    config = {"pad_token_id": pad_id} | config
    _write(folder / "config.json", config)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _bert_config(encoder: BertEncoder) -> dict[str, Any]:
    offset = encoder.position_offset
    config = {theirs: encoder.config[ours] for ours, theirs in BERT_ARGUMENTS.items()}
    config["max_position_embeddings"] += offset
    return {
        **config,
        "model_type": "xlm-roberta" if offset else "bert",
        "architectures": ["XLMRobertaModel" if offset else "BertModel"],
        "hidden_act": "gelu",
        "attention_probs_dropout_prob": config["hidden_dropout_prob"],
        "pad_token_id": max(offset - 1, 0),
    }


def _bert_weights(encoder: BertEncoder) -> dict[str, Any]:
    weights = {}
    for kind, name, variables in named_weights(encoder):
        for variable, part in zip(variables, ("weight", "bias"), strict=False):
            value = to_host(variable).astype(np.float32)
            if kind == "dense":
                rows = encoder.config["hidden_size"] if value.ndim == 3 else value.shape[0]
                value = value.reshape(rows, -1).T if part == "weight" else value.reshape(-1)
            weights[f"{name}.{part}"] = np.ascontiguousarray(value)
    return weights


def _listed(number: int, kind: str, path: str) -> dict[str, object]:
    # The names before version 6, which every version loads.
    kind = f"sentence_transformers.models.{kind}"
    return {"idx": number, "name": str(number), "path": path, "type": kind}


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2), "utf-8")
