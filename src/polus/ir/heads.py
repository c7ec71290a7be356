"""The heads of transformers' ForSequenceClassification models, which score pairs of texts."""

import dataclasses
from collections.abc import Callable
from typing import Any

from keras import layers

from polus.ir.families import Slot
from polus.ir.pooled import PooledEncoder
from polus.ir.pretrained import OutputSettings
from polus.ir.tensors import TensorKind

Config = dict[str, Any]


class HeadSettings(OutputSettings, total=False):
    """The arguments of an encoder that say how a score is made of token vectors."""

    pad_id: int | None


@dataclasses.dataclass(frozen=True)
class Head:
    """How a family scores the vectors of its encoder.

    Attributes:
        architecture: The name of the class in transformers.
        prefix: What the class prepends to the names of the encoder's weights.
        names: Kind and name of each layer in a checkpoint, the scores' last.
        settings: Returns pooling and layers, given `config.json`.
    """

    architecture: str
    prefix: str
    names: tuple[tuple[TensorKind, str], ...]
    settings: Callable[[Config], HeadSettings]

    def slots(self, model: PooledEncoder) -> list[Slot]:
        """Returns where the weights of a model with this head are in a checkpoint."""
        named = zip(self.names, model.dense, strict=True)
        return [(kind, name, (layer,)) for (kind, name), layer in named]

    def fits(self, model: PooledEncoder, config: Config) -> bool:
        """Returns whether a model has this head on top."""
        expected = self.settings(config)
        if model.normalize or model.pooling != expected["pooling"]:
            return False
        if "pad_id" in expected and model.config["pad_id"] is None:
            return False  # its score is another one where a text ends in padding
        return len(model.dense) == len(expected["dense"]) and all(
            map(_is_made_of, model.dense, expected["dense"])
        )


def _is_made_of(layer: layers.Layer, arguments: dict[str, object]) -> bool:
    defaults = {"activation": "linear", "use_bias": True} if "units" in arguments else {}
    found = layer.get_config()
    return all(found.get(name) == value for name, value in (defaults | arguments).items())


def _dense_and_tanh(config: Config) -> HeadSettings:
    hidden = {"units": config["hidden_size"], "activation": "tanh"}
    return {"pooling": "first", "normalize": False, "dense": [hidden, {"units": 1}]}


def _modernbert(config: Config) -> HeadSettings:
    activation = config.get("classifier_activation", "gelu")
    if activation != "gelu":
        raise ValueError(f"classifier_activation must be 'gelu', got {activation!r}.")
    hidden = {
        "units": config["hidden_size"],
        "activation": "gelu",
        "use_bias": config.get("classifier_bias", False),
    }
    norm: dict[str, object] = {"epsilon": config.get("norm_eps", 1e-5), "center": False}
    return {
        "pooling": "mean" if config.get("classifier_pooling", "cls") == "mean" else "first",
        "normalize": False,
        "dense": [hidden, norm, {"units": 1}],
    }


def _last_token(config: Config) -> HeadSettings:
    return {
        "pooling": "last",
        "normalize": False,
        "dense": [{"units": 1, "use_bias": False}],
        "pad_id": config.get("pad_token_id"),
    }


def _roberta(name: str, prefix: str = "roberta.") -> Head:
    names: tuple[tuple[TensorKind, str], ...] = (
        ("dense", "classifier.dense"),
        ("dense", "classifier.out_proj"),
    )
    return Head(f"{name}ForSequenceClassification", prefix, names, _dense_and_tanh)


HEADS = {
    "bert": Head(
        "BertForSequenceClassification",
        "bert.",
        (("dense", "bert.pooler.dense"), ("dense", "classifier")),
        _dense_and_tanh,
    ),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "mpnet": _roberta("MPNet", "mpnet."),
    "modernbert": Head(
        "ModernBertForSequenceClassification",
        "model.",
        (("dense", "head.dense"), ("norm", "head.norm"), ("dense", "classifier")),
        _modernbert,
    ),
    "qwen3": Head("Qwen3ForSequenceClassification", "model.", (("dense", "score"),), _last_token),
}
