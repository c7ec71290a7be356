"""The encoder of BERT in Keras, and its weights out of a safetensors file.

KerasHub has one as well, but installs TensorFlow and TensorFlow Text on every backend.
"""

import json
from pathlib import Path
from typing import Any

import keras
from keras import layers, ops
from safetensors import safe_open


class _Block(layers.Layer):
    """Self-attention, then a feed-forward network; after each dropout, sum and normalization."""

    def __init__(
        self, size: int, heads: int, inner: int, dropout: float, epsilon: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(heads, size // heads, dropout=dropout)
        self.attention_norm = layers.LayerNormalization(epsilon=epsilon)
        self.expand = layers.Dense(inner, activation="gelu")  # the exact one, as in the paper
        self.contract = layers.Dense(size)
        self.output_norm = layers.LayerNormalization(epsilon=epsilon)
        self.dropout = layers.Dropout(dropout)

    def call(self, x: Any, mask: Any) -> Any:
        attended = self.attention(x, x, attention_mask=mask)
        x = self.attention_norm(x + self.dropout(attended))
        return self.output_norm(x + self.dropout(self.contract(self.expand(x))))


@keras.saving.register_keras_serializable(package="polus")
class BertEncoder(keras.Model):
    """Texts to vectors with BERT's encoder (Devlin et al. 2019, arXiv:1810.04805).

    Called with `{"input_ids": (B, L) int, "attention_mask": (B, L)}` it gives `(B, hidden_size)`,
    or with `pooling=None`, for late interaction, `(vectors (B, L, hidden_size), mask (B, L))`.

    Args:
        vocab_size: number of token ids.
        hidden_size: length of a vector, a multiple of num_heads.
        num_layers: number of blocks.
        num_heads: attention heads of a block.
        intermediate_size: width within a block's feed-forward network.
        max_positions: longest sequence; calling it with a longer one raises ValueError.
        num_types: kinds of segments; only the first is used.
        dropout: rate on embeddings, attention and both halves of a block.
        epsilon: of the layer normalizations; float32 rounds BERT's 1e-12 away, as it does there.
        pooling: "mean" over the tokens that are not padding, "first" for the first token's vector,
            or None for all of them.
        normalize: whether vectors are scaled to length one.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        max_positions: int = 512,
        num_types: int = 2,
        dropout: float = 0.1,
        epsilon: float = 1e-12,
        pooling: str | None = "mean",
        normalize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if pooling not in ("mean", "first", None):
            raise ValueError(f"pooling is {pooling!r}; choose 'mean', 'first' or None.")
        self.config = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "intermediate_size": intermediate_size,
            "max_positions": max_positions,
            "num_types": num_types,
            "dropout": dropout,
            "epsilon": epsilon,
            "pooling": pooling,
            "normalize": normalize,
        }
        self.pooling = pooling
        self.normalize = normalize
        self.max_positions = max_positions
        self.words = layers.Embedding(vocab_size, hidden_size, name="words")
        self.positions = layers.Embedding(max_positions, hidden_size, name="positions")
        self.types = layers.Embedding(num_types, hidden_size, name="types")
        self.norm = layers.LayerNormalization(epsilon=epsilon, name="norm")
        self.dropout = layers.Dropout(dropout)
        self.blocks = [
            _Block(hidden_size, num_heads, intermediate_size, dropout, epsilon, name=f"block_{i}")
            for i in range(num_layers)
        ]

    def call(self, inputs: dict[str, Any]) -> Any:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        length = ids.shape[1] if ids.shape[1] is not None else ops.shape(ids)[1]
        if isinstance(length, int) and length > self.max_positions:
            raise ValueError(  # JAX would give NaN
                f"Texts of {length} tokens, padding included, are more than the encoder's "
                f"{self.max_positions} positions; cut them: TextTokenizer(path, "
                f"max_length={self.max_positions})."
            )
        x = self.words(ids) + self.positions(ops.arange(length)) + self.types(ops.zeros_like(ids))
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask[:, None, :])
        if self.pooling == "mean":
            # Summed in float32: in half precision a long text's mean would lose digits.
            weights = ops.cast(mask, "float32")[..., None]
            total = ops.sum(ops.cast(x, "float32") * weights, axis=1)
            x = total / ops.maximum(ops.sum(weights, axis=1), 1.0)
        elif self.pooling == "first":
            x = ops.cast(x[:, 0], "float32")
        if self.normalize:
            x = ops.normalize(x, axis=-1)
        return (x, mask) if self.pooling is None else x

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
        } | self.config

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> "BertEncoder":
        """The encoder in a folder with `config.json` and `model.safetensors`.

        Pooling and normalization are those of sentence-transformers' `modules.json` where there is
        one, else "mean" and no normalization.

        Args:
            folder: as downloaded from a model hub or found in a package.
            overrides: arguments of this class, `dropout=0.0` for example.

        Raises:
            ValueError: the weights are not those of a BERT encoder as it is written here, or
                `modules.json` names another module than Transformer, Pooling and Normalize.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        differing = {
            key: config[key]
            for key, served in _SERVED.items()
            if key in config and config[key] != served
        }
        if differing:
            raise ValueError(
                f"{folder} has a model with {differing}; BertEncoder serves {_SERVED}. Write the "
                "encoder as a Keras model; DualEncoder takes any."
            )
        arguments = {ours: config[theirs] for ours, theirs in _CONFIG.items()}
        arguments |= _sentence_transformers(folder)
        model = cls(**(arguments | overrides))
        model({"input_ids": ops.ones((1, 2), "int32"), "attention_mask": ops.ones((1, 2), "int32")})
        model._load(folder / "model.safetensors")
        return model

    def _load(self, path: Path) -> None:
        with safe_open(str(path), "numpy") as file:
            names = set(file.keys())
            prefix = "bert." if "bert.embeddings.word_embeddings.weight" in names else ""

            def get(name: str) -> Any:
                return file.get_tensor(prefix + name)

            def dense(name: str) -> list[Any]:
                return [get(f"{name}.weight").T, get(f"{name}.bias")]

            def norm(name: str) -> list[Any]:
                name += ".LayerNorm"
                # The first BERT files have TensorFlow's names of these.
                old = f"{prefix}{name}.gamma" in names
                scale, shift = ("gamma", "beta") if old else ("weight", "bias")
                return [get(f"{name}.{scale}"), get(f"{name}.{shift}")]

            for layer, name in (
                (self.words, "word"),
                (self.positions, "position"),
                (self.types, "token_type"),
            ):
                layer.set_weights([get(f"embeddings.{name}_embeddings.weight")])
            self.norm.set_weights(norm("embeddings"))
            for i, block in enumerate(self.blocks):
                name = f"encoder.layer.{i}"
                heads = []
                for part in ("query", "key", "value"):
                    heads += dense(f"{name}.attention.self.{part}")
                heads += dense(f"{name}.attention.output.dense")
                # Keras splits the axis of heads off: same numbers, same order.
                shapes = [weight.shape for weight in block.attention.weights]
                block.attention.set_weights(
                    [value.reshape(shape) for value, shape in zip(heads, shapes, strict=True)]
                )
                block.attention_norm.set_weights(norm(f"{name}.attention.output"))
                block.expand.set_weights(dense(f"{name}.intermediate.dense"))
                block.contract.set_weights(dense(f"{name}.output.dense"))
                block.output_norm.set_weights(norm(f"{name}.output"))


_SERVED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
_CONFIG = {
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


def _sentence_transformers(folder: Path) -> dict[str, Any]:
    """Pooling and normalization as the files of sentence-transformers say."""
    if not (folder / "modules.json").exists():
        return {}
    found: dict[str, Any] = {}
    for module in json.loads((folder / "modules.json").read_text()):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Normalize":
            found["normalize"] = True
        elif kind == "Pooling":
            modes = json.loads((folder / module["path"] / "config.json").read_text())
            chosen = [mode for mode, on in modes.items() if on is True and mode in _POOLING]
            if len(chosen) != 1:
                raise ValueError(f"{folder} pools by {modes}; BertEncoder serves {_POOLING}.")
            found["pooling"] = _POOLING[chosen[0]]
        elif kind != "Transformer":
            raise ValueError(
                f"{folder} has a module {module['type']!r} after the encoder; BertEncoder serves "
                "Transformer, Pooling and Normalize. Write the encoder as a Keras model; "
                "DualEncoder takes any."
            )
    return found


_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
