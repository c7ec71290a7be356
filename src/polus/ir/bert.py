"""BERT's encoder in Keras, with weights loaded from a safetensors file.

KerasHub has one too, but it installs TensorFlow and TensorFlow Text on every backend.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
from keras import layers, ops

from polus.ir.pooled import PooledEncoder
from polus.ir.pooling import Pooling, table_rows
from polus.ir.pretrained import bert_arguments, dense_folders, output_settings, transformer_folder
from polus.ir.tensors import CheckpointTensors, TensorKind, reshaped


class _Block(layers.Layer):
    """Self-attention and a feed-forward network, each followed by dropout, sum and layer norm."""

    def __init__(
        self, size: int, heads: int, inner: int, dropout: float, epsilon: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        dtype = self.dtype_policy  # Keras doesn't hand it on to the layers in a layer
        self.attention = layers.MultiHeadAttention(
            heads, size // heads, dropout=dropout, dtype=dtype
        )
        self.attention_norm = layers.LayerNormalization(epsilon=epsilon, dtype=dtype)
        # The exact form of GELU, as in the paper.
        self.expand = layers.Dense(inner, activation="gelu", dtype=dtype)
        self.contract = layers.Dense(size, dtype=dtype)
        self.output_norm = layers.LayerNormalization(epsilon=epsilon, dtype=dtype)
        self.dropout = layers.Dropout(dropout, dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.attention.build(input_shape, input_shape)
        for layer in (self.attention_norm, self.expand, self.output_norm):
            layer.build(input_shape)
        self.contract.build((*input_shape[:-1], self.expand.units))

    def call(
        self, x: Any, mask: Any, first_only: bool = False, training: bool | None = None
    ) -> Any:
        queries = x[:, :1] if first_only else x
        attend = self.attention if training else self.attend_without_dropout
        attended = attend(queries, x, attention_mask=mask)
        x = self.attention_norm(queries + self.dropout(attended))
        return self.output_norm(x + self.dropout(self.contract(self.expand(x))))

    def attend_without_dropout(self, queries: Any, x: Any, attention_mask: Any) -> Any:
        """Returns what `attention` returns in inference.

        Keras' layer with a dropout rate computes all scores even where it drops none. On PyTorch a
        whole encoder took 1.4 times as long.
        """
        layer = self.attention
        inputs = layer.query_dense(queries), layer.key_dense(x), layer.value_dense(x)
        seen = ops.cast(attention_mask, "bool")[:, None]
        return layer.output_dense(ops.dot_product_attention(*inputs, mask=seen))


@keras.saving.register_keras_serializable(package="polus")
class BertEncoder(PooledEncoder):
    """BERT's encoder (Devlin et al. 2019, arXiv:1810.04805), with pooling.

    With `position_offset`, also RoBERTa's and XLM-RoBERTa's (arXiv:1907.11692, arXiv:1911.02116),
    the multilingual e5's and bge-m3's among them.

    Maps `{"input_ids": (B, L) int, "attention_mask": (B, L)}`, for pairs of texts with
    `"token_type_ids": (B, L)` as well, to `(B, hidden_size)`, or with
    `pooling=None`, for late interaction, to `(vectors (B, L, hidden_size), mask (B, L))`.

    Args:
        vocab_size: The number of token ids.
        hidden_size: The length of a vector, a multiple of num_heads.
        num_layers: The number of blocks.
        num_heads: The number of attention heads in a block.
        intermediate_size: The width of a block's feed-forward network.
        max_positions: The longest sequence. A longer one raises ValueError.
        num_types: The number of segment types, of which texts use the first and pairs two.
        dropout: The rate on embeddings, attention and both halves of a block.
        epsilon: That of the layer normalizations. BERT's 1e-12 vanishes in float32, there as here.
        pooling: A mode, or several whose vectors are concatenated; see `polus.ir.pooling.pool`.
            None returns the vectors of all tokens.
        normalize: Whether to scale vectors to unit length, at the end.
        dense: The arguments of `keras.layers.Dense` for each layer after pooling.
        position_offset: The row of the first token in the table of positions: 2 in RoBERTa, whose
            token 1 is padding, wherever it stands.
        kwargs: As for `keras.Model`; a `dtype`, such as "mixed_bfloat16", is that of all layers.
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
        pooling: Pooling | Sequence[Pooling] | None = "mean",
        normalize: bool = False,
        dense: Sequence[Mapping[str, object]] = (),
        position_offset: int = 0,
        **kwargs: Any,
    ) -> None:
        arguments = locals()
        super().__init__(**kwargs)
        self.config = {name: arguments[name] for name in _ARGUMENTS}
        self.config["dense"] = [dict(each) for each in dense]
        self.max_positions = max_positions
        self.position_offset = position_offset
        dtype = self.dtype_policy
        self.words, self.positions, self.types = (
            layers.Embedding(count, hidden_size, name=name, dtype=dtype)
            for count, name in (
                (vocab_size, "words"),
                (max_positions + position_offset, "positions"),
                (num_types, "types"),
            )
        )
        self.norm = layers.LayerNormalization(epsilon=epsilon, name="norm", dtype=dtype)
        self.dropout = layers.Dropout(dropout, dtype=dtype)
        sizes = hidden_size, num_heads, intermediate_size
        self.blocks = [
            _Block(*sizes, dropout, epsilon, name=f"block_{i}", dtype=dtype)
            for i in range(num_layers)
        ]
        self.add_output_layers(pooling, normalize, dense)

    def call(self, inputs: dict[str, Any]) -> Any:
        ids, mask = self.tokens_of(inputs)
        # RoBERTa has one type, whatever a tokenizer says of a pair's second text.
        several = "token_type_ids" in inputs and self.config["num_types"] > 1
        types = inputs["token_type_ids"] if several else ops.zeros_like(ids)
        x = (
            self.words(ids)
            + self.positions(table_rows(ids, self.position_offset))
            + self.types(types)
        )
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            # Of the last block's outputs, "first" pools one: the others needn't be computed.
            first_only = self.pooling == "first" and block is self.blocks[-1]
            x = block(x, mask[:, None, :], first_only=first_only)
        return self.output_of(x, mask)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> "BertEncoder":
        """Loads the encoder in a folder with `config.json` and `model.safetensors` or its shards.

        Pooling, dense layers and normalization are those of sentence-transformers' `modules.json`.
        Without that file they are "mean", none and no normalization. Prompts and the maximum length
        belong to the tokenizer: see `TextTokenizer`.

        Args:
            folder: The folder, as downloaded from a model hub or found in a package.
            overrides: Arguments of this class, such as `dropout=0.0`.

        Raises:
            FileNotFoundError: If there are no weights in the safetensors format.
            ValueError: If the weights aren't those of a BERT encoder as implemented here, or a
                module or setting in `modules.json` isn't implemented.
        """
        folder = Path(folder)
        model = cls(**{**bert_arguments(folder), **output_settings(folder), **overrides})
        tensors = CheckpointTensors(transformer_folder(folder), ("bert.", "roberta."))
        if "num_layers" not in overrides:
            tensors.check_depth(model.config["num_layers"])
        model.build_on_tokens()
        _load_weights(model, tensors)
        if "dense" not in overrides:
            for layer, inner in zip(model.dense, dense_folders(folder), strict=True):
                layer.set_weights(CheckpointTensors(inner).of("dense", "linear"))
        return model


def named_weights(model: BertEncoder) -> Iterator[tuple[TensorKind, str, list[keras.Variable]]]:
    """Yields kind, name in a checkpoint and variables of each layer, weight before bias."""
    for layer, name in (
        (model.words, "word"),
        (model.positions, "position"),
        (model.types, "token_type"),
    ):
        yield "embedding", f"embeddings.{name}_embeddings", layer.weights
    yield "norm", "embeddings.LayerNorm", model.norm.weights
    for i, block in enumerate(model.blocks):
        name = f"encoder.layer.{i}"
        # Keras has an axis of its own for the heads: the same numbers in the same order.
        for part, layer in (
            ("self.query", block.attention.query_dense),
            ("self.key", block.attention.key_dense),
            ("self.value", block.attention.value_dense),
            ("output.dense", block.attention.output_dense),
        ):
            yield "dense", f"{name}.attention.{part}", layer.weights
        yield "norm", f"{name}.attention.output.LayerNorm", block.attention_norm.weights
        yield "dense", f"{name}.intermediate.dense", block.expand.weights
        yield "dense", f"{name}.output.dense", block.contract.weights
        yield "norm", f"{name}.output.LayerNorm", block.output_norm.weights


def _load_weights(model: BertEncoder, tensors: CheckpointTensors) -> None:
    for kind, name, variables in named_weights(model):
        for variable, value in zip(variables, tensors.of(kind, name), strict=True):
            variable.assign(reshaped(value, variable.shape, name))


_ARGUMENTS = tuple(inspect.signature(BertEncoder.__init__).parameters)[1:-1]
