"""A transformer encoder whose settings cover MPNet, ModernBERT and Qwen3."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import layers, ops

from polus.ir.pooled import PooledEncoder
from polus.ir.pooling import Pooling, positions, table_rows
from polus.types import Tensor

# Added to the attention scores of tokens that are out of sight, in float32. A finite number: a
# padding token may see none at all.
_HIDDEN = -1e9
_NUM_BUCKETS = 32
_MAX_DISTANCE = 128


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What differs between families of encoders, besides sizes.

    Attributes:
        norm: "layer" or "rms" normalization.
        norm_first: Whether a block normalizes its inputs, with a last norm after all blocks, rather
            than its sums.
        embedding_norm: Whether embeddings are normalized.
        qk_norm: Whether the queries and keys of each head are normalized.
        use_bias: Whether dense layers and layer norms have a bias.
        activation: That of the feed-forward network.
        gated: Whether what is activated is multiplied by a second dense layer (Shazeer 2020,
            arXiv:2002.05202).
        causal: Whether a token sees only those before it.
        position_offset: The row of the first token in the table of positions; if it is positive,
            the token before it is padding, wherever it stands. None for no table.
        relative_bias: Whether scores of attention get a bias by distance, as in T5 (Raffel et al.
            2020, arXiv:1910.10683), shared by all blocks.
        rotary_bases: The base of each block's rotary embedding (Su et al. 2021, arXiv:2104.09864),
            one for all blocks, or None for none.
        windows: For each block the largest distance to a token in sight; None for no limit.
    """

    norm: Literal["layer", "rms"] = "layer"
    norm_first: bool = True
    embedding_norm: bool = True
    qk_norm: bool = False
    use_bias: bool = True
    activation: str = "gelu"
    gated: bool = False
    causal: bool = False
    position_offset: int | None = None
    relative_bias: bool = False
    rotary_bases: float | Sequence[float] | None = None
    windows: Sequence[int | None] | None = None

    def kinds(self, num_layers: int) -> list[tuple[int | None, float | None]]:
        """Returns the window and the rotary base of each block.

        Raises:
            ValueError: If there are not as many windows or bases as blocks.
        """
        bases = self.rotary_bases
        every = bases if isinstance(bases, Sequence) else [bases] * num_layers
        windows = self.windows or [None] * num_layers
        if not len(every) == len(windows) == num_layers:
            raise ValueError(
                f"windows and rotary_bases must have one entry for each of the {num_layers} blocks,"
                f" got {len(windows)} and {len(every)}."
            )
        return list(zip(windows, every, strict=True))


class _Attention(layers.Layer):
    """Multi-head attention, with fewer heads for keys and values if asked for."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        size: int,
        use_bias: bool,
        qk_epsilon: float | None,
        dropout: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)  # the bias and the rotation stay float32
        dtype = self.dtype_policy  # Keras doesn't hand it on to the layers in a layer
        self.groups = num_heads // num_kv_heads
        self.scale = head_size**-0.5
        self.query, self.key, self.value = (
            layers.EinsumDense(
                "ble,ehd->blhd",
                (None, heads, head_size),
                bias_axes="hd" if use_bias else None,
                dtype=dtype,
            )
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        )
        self.output_dense = layers.EinsumDense(
            "blhd,hde->ble", (None, size), bias_axes="e" if use_bias else None, dtype=dtype
        )
        self.qk_norms = [
            layers.RMSNormalization(epsilon=qk_epsilon, dtype=dtype)
            for _ in range(2)
            if qk_epsilon is not None
        ]
        self.dropout = layers.Dropout(dropout, dtype=dtype)
        self.of_heads = (None, None, num_heads, head_size)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (self.query, self.key, self.value):
            layer.build(input_shape)
        for layer in (*self.qk_norms, self.output_dense):
            layer.build(self.of_heads)

    def call(self, x: Any, bias: Any, rotation: Any = None) -> Any:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.qk_norms:
            query, key = (
                norm(each) for norm, each in zip(self.qk_norms, (query, key), strict=True)
            )
        if rotation is not None:
            query, key = _rotate(query, *rotation), _rotate(key, *rotation)
        if self.groups > 1:
            key, value = (ops.repeat(each, self.groups, axis=2) for each in (key, value))
        scores = ops.einsum("bqhd,bkhd->bhqk", query * self.scale, key)
        # In float32, whatever the layer computes in: -1e9 is infinite in float16.
        shares = ops.softmax(ops.cast(scores, "float32") + bias, axis=-1)
        shares = self.dropout(ops.cast(shares, value.dtype))
        return self.output_dense(ops.einsum("bhqk,bkhd->bqhd", shares, value))


class _Block(layers.Layer):
    """Self-attention and a feed-forward network, with norms before them or after the sums."""

    def __init__(self, settings: Mapping[str, Any], first: bool, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        size, inner = settings["hidden_size"], settings["intermediate_size"]
        given = {"dtype": self.dtype_policy}
        dense = {"use_bias": settings["use_bias"], **given}
        self.norm_first = settings["norm_first"]
        self.attention = _Attention(
            settings["num_heads"],
            settings["num_kv_heads"] or settings["num_heads"],
            settings["head_size"] or size // settings["num_heads"],
            size,
            settings["use_bias"],
            settings["epsilon"] if settings["qk_norm"] else None,
            settings["dropout"],
            name="attention",
            **given,
        )
        # Embeddings that have just been normalized are not normalized again, as in ModernBERT.
        repeated = first and self.norm_first and settings["embedding_norm"]
        self.attention_norm = layers.Identity(**given) if repeated else _norm(settings, **given)
        self.expand = layers.Dense(inner, activation=settings["activation"], **dense)
        self.gate = layers.Dense(inner, **dense) if settings["gated"] else None
        self.contract = layers.Dense(size, **dense)
        self.output_norm = _norm(settings, **given)
        self.dropout = layers.Dropout(settings["dropout"], **given)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (self.attention, self.attention_norm, self.output_norm, self.expand):
            layer.build(input_shape)
        if self.gate is not None:
            self.gate.build(input_shape)
        self.contract.build((*input_shape[:-1], self.expand.units))

    def call(self, x: Any, bias: Any, rotation: Any = None) -> Any:
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), bias, rotation))
            return x + self.dropout(self.feed_forward(self.output_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, bias, rotation)))
        return self.output_norm(x + self.dropout(self.feed_forward(x)))

    def feed_forward(self, x: Any) -> Any:
        inner = self.expand(x)
        return self.contract(inner if self.gate is None else inner * self.gate(x))


@keras.saving.register_keras_serializable(package="polus")
class TransformerEncoder(PooledEncoder):
    """A transformer encoder with pooling: MPNet's, ModernBERT's or Qwen3's, by its settings.

    MPNet: Song et al. 2020, arXiv:2004.09297. ModernBERT: Warner et al. 2024, arXiv:2412.13663.
    Qwen3: Yang et al. 2025, arXiv:2505.09388. `polus.ir.models.load_encoder` reads their folders.

    Maps `{"input_ids": (B, L) int, "attention_mask": (B, L)}` to `(B, hidden_size)`, or with
    `pooling=None`, for late interaction, to `(vectors (B, L, hidden_size), mask (B, L))`. Scores of
    attention take `B * num_heads * L * L` numbers.

    Args:
        vocab_size: The number of token ids.
        hidden_size: The length of a vector.
        num_layers: The number of blocks.
        num_heads: The number of attention heads in a block.
        intermediate_size: The width of a block's feed-forward network.
        max_positions: The longest sequence. A longer one raises ValueError.
        architecture: The rest of what differs between families.
        num_kv_heads: The number of heads for keys and values, which divides num_heads (Ainslie et
            al. 2023, arXiv:2305.13245). Defaults to num_heads.
        head_size: The length of a head's vectors. Defaults to hidden_size / num_heads.
        dropout: The rate on embeddings, attention and both halves of a block.
        epsilon: That of the norms.
        pooling: A mode, or several whose vectors are concatenated; see `polus.ir.pooling.pool`.
            None returns the vectors of all tokens.
        normalize: Whether to scale vectors to unit length, at the end.
        dense: The arguments of `keras.layers.Dense` for each layer after pooling.
        pad_id: The id of a token that pooling leaves out even where a text spells it out, as
            transformers' Qwen3ForSequenceClassification does. None to pool all of a text.
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
        *,
        architecture: Architecture | Mapping[str, Any] = Architecture(),
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        dropout: float = 0.1,
        epsilon: float = 1e-5,
        pooling: Pooling | Sequence[Pooling] | None = "mean",
        normalize: bool = False,
        dense: Sequence[Mapping[str, object]] = (),
        pad_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        arguments = locals()
        super().__init__(**kwargs)
        if not isinstance(architecture, Architecture):
            architecture = Architecture(**architecture)
        self.config = {name: arguments[name] for name in _ARGUMENTS}
        self.config["dense"] = [dict(each) for each in dense]
        self.config["architecture"] = dataclasses.asdict(architecture)
        self.max_positions = max_positions
        self.architecture = architecture
        self.kinds = architecture.kinds(num_layers)
        self.head_size = head_size or hidden_size // num_heads
        self.add_embeddings()
        settings = self.config | self.config["architecture"]
        given = {"dtype": self.dtype_policy}
        self.blocks = [
            _Block(settings, first=i == 0, name=f"block_{i}", **given) for i in range(num_layers)
        ]
        norm = _norm(settings, name="last_norm", **given)
        self.last_norm = norm if architecture.norm_first else layers.Identity(**given)
        self.add_output_layers(pooling, normalize, dense)

    def add_embeddings(self) -> None:
        """Adds the embeddings of tokens, positions and distances, as many as there are."""
        config, architecture = self.config, self.architecture
        size, offset = config["hidden_size"], architecture.position_offset
        given = {"dtype": self.dtype_policy}
        self.words = layers.Embedding(config["vocab_size"], size, name="words", **given)
        self.positions = self.relative = None
        if offset is not None:
            count = self.max_positions + offset
            self.positions = layers.Embedding(count, size, name="positions", **given)
        if architecture.relative_bias:
            heads = config["num_heads"]
            self.relative = layers.Embedding(_NUM_BUCKETS, heads, name="relative", **given)
        settings = config | config["architecture"]
        normed = architecture.embedding_norm
        self.norm = _norm(settings, name="norm", **given) if normed else layers.Identity(**given)
        self.dropout = layers.Dropout(config["dropout"], **given)

    def call(self, inputs: dict[str, Any]) -> Any:
        ids, mask = self.tokens_of(inputs)
        places = positions(ids)
        x = self.words(ids)
        offset = self.architecture.position_offset
        if self.positions is not None and offset is not None:
            x = x + self.positions(table_rows(ids, offset))
        x = self.dropout(self.norm(x))
        distances = places[None, :] - places[:, None]  # of a key from a query
        biases = {window: self.attention_bias(mask, distances, window) for window, _ in self.kinds}
        rotations = {base: _rotation(places, self.head_size, base) for _, base in self.kinds}
        for block, (window, base) in zip(self.blocks, self.kinds, strict=True):
            x = block(x, biases[window], rotations[base])
        pad_id = self.config["pad_id"]
        if pad_id is not None:
            mask = ops.where(ops.equal(ids, pad_id), ops.zeros_like(mask), mask)
        return self.output_of(self.last_norm(x), mask)

    def attention_bias(self, mask: Tensor, distances: Tensor, window: int | None) -> Any:
        """Returns what is added to the scores of attention, float32 `(B, 1 or heads, L, L)`."""
        seen = ops.greater(mask, 0)[:, None, None, :]
        if window is not None:
            seen = ops.logical_and(seen, ops.less_equal(ops.abs(distances), window))
        if self.architecture.causal:
            seen = ops.logical_and(seen, ops.less_equal(distances, 0))
        bias = ops.where(seen, 0.0, _HIDDEN)
        if self.relative is None:
            return bias
        by_distance = ops.cast(self.relative(_buckets(self.max_positions)), "float32")
        of_heads = ops.take(by_distance, ops.add(distances, self.max_positions - 1), axis=0)
        return bias + ops.transpose(of_heads, (2, 0, 1))


def _norm(settings: Mapping[str, Any], **kwargs: Any) -> layers.Layer:
    if settings["norm"] == "rms":
        return layers.RMSNormalization(epsilon=settings["epsilon"], **kwargs)
    return layers.LayerNormalization(
        epsilon=settings["epsilon"], center=settings["use_bias"], **kwargs
    )


def _rotation(places: Any, size: int, base: float | None) -> Any:
    """Returns the cosine and sine of each position's angles, float32 `(L, 1, size / 2)`."""
    if base is None:
        return None
    frequencies = (1.0 / base ** (np.arange(0, size, 2) / size)).astype(np.float32)
    angles = ops.multiply(ops.cast(places, "float32")[:, None, None], frequencies)
    return ops.cos(angles), ops.sin(angles)


def _rotate(x: Any, cosine: Any, sine: Any) -> Any:
    cosine, sine = ops.cast(cosine, x.dtype), ops.cast(sine, x.dtype)
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def _buckets(length: int) -> Any:
    """Returns the bucket of each distance from `1 - length` to `length - 1`."""
    distances = np.arange(1 - length, length)
    half = _NUM_BUCKETS // 2
    exact = half // 2
    # Above `exact` a bucket's width grows in proportion to the distance. In float32, as there.
    ratio = np.maximum(np.abs(distances), 1).astype(np.float32) / exact
    steps = np.log(ratio) / np.float32(np.log(_MAX_DISTANCE / exact)) * (half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)
    near = np.abs(distances)
    return (np.where(near < exact, near, far) + half * (distances > 0)).astype(np.int32)


_ARGUMENTS = tuple(inspect.signature(TransformerEncoder.__init__).parameters)[1:-1]
