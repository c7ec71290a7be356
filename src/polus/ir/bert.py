"""BERT's encoder in Keras, with weights loaded from a safetensors file.

KerasHub has one too, but it installs TensorFlow and TensorFlow Text on every backend.
"""

import inspect
from pathlib import Path
from typing import Any, Literal

import keras
from keras import layers, ops
from safetensors import safe_open

from polus.ir.pretrained import bert_arguments, output_settings, transformer_folder


class _Block(layers.Layer):
    """Self-attention and a feed-forward network, each followed by dropout, sum and layer norm."""

    def __init__(
        self, size: int, heads: int, inner: int, dropout: float, epsilon: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(heads, size // heads, dropout=dropout)
        self.attention_norm = layers.LayerNormalization(epsilon=epsilon)
        self.expand = layers.Dense(inner, activation="gelu")  # the exact form, as in the paper
        self.contract = layers.Dense(size)
        self.output_norm = layers.LayerNormalization(epsilon=epsilon)
        self.dropout = layers.Dropout(dropout)

    def call(self, x: Any, mask: Any) -> Any:
        attended = self.attention(x, x, attention_mask=mask)
        x = self.attention_norm(x + self.dropout(attended))
        return self.output_norm(x + self.dropout(self.contract(self.expand(x))))


@keras.saving.register_keras_serializable(package="polus")
class BertEncoder(keras.Model):
    """BERT's encoder (Devlin et al. 2019, arXiv:1810.04805), with pooling.

    Maps `{"input_ids": (B, L) int, "attention_mask": (B, L)}` to `(B, hidden_size)`, or with
    `pooling=None`, for late interaction, to `(vectors (B, L, hidden_size), mask (B, L))`.

    Args:
        vocab_size: The number of token ids.
        hidden_size: The length of a vector, a multiple of num_heads.
        num_layers: The number of blocks.
        num_heads: The number of attention heads in a block.
        intermediate_size: The width of a block's feed-forward network.
        max_positions: The longest sequence. A longer one raises ValueError.
        num_types: The number of segment types, of which only the first is used.
        dropout: The rate on embeddings, attention and both halves of a block.
        epsilon: That of the layer normalizations. BERT's 1e-12 vanishes in float32, there as here.
        pooling: "mean" over the tokens that aren't padding, "first" for the first token's vector,
            or None for all of them.
        normalize: Whether to scale vectors to unit length.
        kwargs: As for `keras.Model`.
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
        pooling: Literal["mean", "first"] | None = "mean",
        normalize: bool = False,
        **kwargs: Any,
    ) -> None:
        arguments = locals()
        if pooling not in ("mean", "first", None):
            raise ValueError(f"pooling must be 'mean', 'first' or None, got {pooling!r}.")
        super().__init__(**kwargs)
        self.config = {name: arguments[name] for name in _ARGUMENTS}
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
                f"A text must have at most {self.max_positions} tokens, as many as the encoder has "
                f"positions, got {length} (padding included). Use TextTokenizer(path, "
                f"max_length={self.max_positions}) to truncate texts."
            )
        x = self.words(ids) + self.positions(ops.arange(length)) + self.types(ops.zeros_like(ids))
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask[:, None, :])
        if self.pooling == "mean":
            # Sum in float32: in half precision the mean of a long text loses digits.
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
        """Loads the encoder in a folder with `config.json` and `model.safetensors`.

        Pooling and normalization are those of sentence-transformers' `modules.json`. Without that
        file they are "mean" and no normalization. Prompts and the maximum length belong to the
        tokenizer: see `TextTokenizer`.

        Args:
            folder: The folder, as downloaded from a model hub or found in a package.
            overrides: Arguments of this class, such as `dropout=0.0`.

        Raises:
            ValueError: If the weights aren't those of a BERT encoder as implemented here, or a
                module or setting in `modules.json` isn't implemented.
        """
        folder = Path(folder)
        model = cls(**{**bert_arguments(folder), **output_settings(folder), **overrides})
        model({"input_ids": ops.ones((1, 2), "int32"), "attention_mask": ops.ones((1, 2), "int32")})
        with safe_open(str(transformer_folder(folder) / "model.safetensors"), "numpy") as file:
            _load_weights(model, _Tensors(file))
        return model


class _Tensors:
    """The tensors of a BERT checkpoint, by their names without the `bert.` prefix.

    Args:
        file: An open safetensors file.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.names = set(file.keys())
        self.prefix = "bert." if "bert.embeddings.word_embeddings.weight" in self.names else ""

    def __getitem__(self, name: str) -> Any:
        return self.file.get_tensor(self.prefix + name)

    def dense(self, name: str) -> list[Any]:
        """Returns kernel and bias of a linear layer, as Keras stores them."""
        return [self[f"{name}.weight"].T, self[f"{name}.bias"]]

    def norm(self, name: str) -> list[Any]:
        """Returns scale and shift of a layer normalization."""
        name += ".LayerNorm"
        # The first BERT checkpoints keep TensorFlow's names.
        old = f"{self.prefix}{name}.gamma" in self.names
        scale, shift = ("gamma", "beta") if old else ("weight", "bias")
        return [self[f"{name}.{scale}"], self[f"{name}.{shift}"]]


def _load_weights(model: BertEncoder, tensors: _Tensors) -> None:
    for layer, name in (
        (model.words, "word"),
        (model.positions, "position"),
        (model.types, "token_type"),
    ):
        layer.set_weights([tensors[f"embeddings.{name}_embeddings.weight"]])
    model.norm.set_weights(tensors.norm("embeddings"))
    for i, block in enumerate(model.blocks):
        name = f"encoder.layer.{i}"
        heads = []
        for part in ("query", "key", "value"):
            heads += tensors.dense(f"{name}.attention.self.{part}")
        heads += tensors.dense(f"{name}.attention.output.dense")
        # Keras has an axis of its own for the heads: the same numbers in the same order.
        shapes = [weight.shape for weight in block.attention.weights]
        block.attention.set_weights(
            [value.reshape(shape) for value, shape in zip(heads, shapes, strict=True)]
        )
        block.attention_norm.set_weights(tensors.norm(f"{name}.attention.output"))
        block.expand.set_weights(tensors.dense(f"{name}.intermediate.dense"))
        block.contract.set_weights(tensors.dense(f"{name}.output.dense"))
        block.output_norm.set_weights(tensors.norm(f"{name}.output"))


_ARGUMENTS = tuple(inspect.signature(BertEncoder.__init__).parameters)[1:-1]
