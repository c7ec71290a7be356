"""What all encoders have on top of their blocks: pooling, dense layers and normalization."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import layers, ops

from polus.ir.pooling import Pooling, check_pooling, pool


class PooledEncoder(keras.Model):
    """A model from tokens to one vector per text, or with `pooling=None` to one per token.

    A subclass computes the vectors of all tokens, and ends its `call` with `output_of`.

    Attributes:
        config: The arguments of the subclass, which `get_config` returns.
        pooling: See `add_output_layers`.
        normalize: See `add_output_layers`.
        dense: The dense layers after pooling, and the norms among them.
    """

    config: dict[str, Any]
    max_positions: int

    def add_output_layers(
        self,
        pooling: Pooling | Sequence[Pooling] | None,
        normalize: bool,
        dense: Sequence[Mapping[str, object]],
    ) -> None:
        """Adds what follows the blocks.

        Args:
            pooling: A mode, or several whose vectors are concatenated; see
                `polus.ir.pooling.pool`. None returns the vectors of all tokens.
            normalize: Whether to scale vectors to unit length, at the end.
            dense: The arguments of `keras.layers.Dense` for each layer after pooling; without
                `units`, those of a `keras.layers.LayerNormalization`.
        """
        check_pooling(pooling)
        self.pooling = pooling
        self.normalize = normalize
        self.dense: list[keras.layers.Layer] = [
            layers.Dense(**{"name": f"dense_{i}", "dtype": self.dtype_policy, **each})
            if "units" in each
            else layers.LayerNormalization(
                **{"name": f"dense_{i}_norm", "dtype": self.dtype_policy, **each}
            )
            for i, each in enumerate(dense)
        ]

    def output_of(self, x: Any, mask: Any) -> Any:
        """Returns the output for token vectors `(B, L, E)` and their mask `(B, L)`."""
        if self.pooling is not None:
            x = pool(x, mask, self.pooling)
        for layer in self.dense:
            x = layer(x)
        if self.normalize:
            x = ops.normalize(x, axis=-1)
        return (x, mask) if self.pooling is None else x

    def tokens_of(self, inputs: Any) -> tuple[Any, Any]:
        """Returns the ids and the mask of a batch.

        Raises:
            TypeError: If the inputs aren't a dict of both.
            ValueError: If there are more tokens than the encoder has positions.
        """
        if not isinstance(inputs, Mapping) or not {"input_ids", "attention_mask"} <= set(inputs):
            raise TypeError(
                f"{type(self).__name__} must be called with a dict of input_ids and "
                f"attention_mask, got {inputs!r:.80}. Use TextTokenizer(folder)(texts)."
            )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        length = ids.shape[1]
        if isinstance(length, int) and length > self.max_positions:
            raise ValueError(  # JAX would give NaN
                f"A text must have at most {self.max_positions} tokens, as many as the encoder has "
                f"positions, got {length} (padding included). Use TextTokenizer(path, "
                f"max_length={self.max_positions}) to truncate texts."
            )
        return ids, mask

    def build_on_tokens(self) -> None:
        """Creates all variables, by encoding two tokens."""
        tokens = ops.ones((1, 2), "int32")
        self({"input_ids": tokens, "attention_mask": tokens})

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Creates all variables of a model that is loaded; shapes alone don't make tokens."""
        self.build_on_tokens()

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
        } | self.config


@keras.saving.register_keras_serializable(package="polus")
class PooledBackbone(PooledEncoder):
    """Pools the token vectors of any Keras model, such as a backbone of KerasHub.

    ```python
    backbone = keras_hub.models.Backbone.from_preset(folder)
    encoder = PooledBackbone(backbone, max_positions=512, pooling="mean", normalize=True)
    ```

    Maps `{"input_ids": (B, L) int, "attention_mask": (B, L)}` to `(B, E)`, or with `pooling=None`,
    for late interaction, to `(vectors (B, L, E), mask (B, L))`. The backbone gets them by the names
    in KerasHub, `{"token_ids", "padding_mask"}`, with zeros as `"segment_ids"` if it has such an
    input, and returns `(B, L, E)` or a dict with that as `"sequence_output"`.

    Args:
        backbone: A functional Keras model.
        max_positions: The longest sequence. A longer one raises ValueError.
        pooling: A mode, or several whose vectors are concatenated; see `polus.ir.pooling.pool`.
        normalize: Whether to scale vectors to unit length, at the end.
        dense: The arguments of `keras.layers.Dense` for each layer after pooling.
        kwargs: As for `keras.Model`. The backbone has its own `dtype`.
    """

    def __init__(
        self,
        backbone: keras.Model,
        max_positions: int = 512,
        pooling: Pooling | Sequence[Pooling] | None = "mean",
        normalize: bool = False,
        dense: Sequence[Mapping[str, object]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = {
            "max_positions": max_positions,
            "pooling": pooling,
            "normalize": normalize,
            "dense": [dict(each) for each in dense],
        }
        self.backbone = backbone
        self.max_positions = max_positions
        self.add_output_layers(pooling, normalize, dense)

    def call(self, inputs: dict[str, Any], training: bool | None = None) -> Any:
        ids, mask = self.tokens_of(inputs)
        given = {"token_ids": ids, "padding_mask": mask}
        if "segment_ids" in self.backbone.input:
            given["segment_ids"] = ops.zeros_like(ids)
        found = self.backbone(given, training=training)
        return self.output_of(found["sequence_output"] if isinstance(found, dict) else found, mask)

    def get_config(self) -> dict[str, Any]:
        serialized = keras.saving.serialize_keras_object(self.backbone)
        return super().get_config() | {"backbone": serialized}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PooledBackbone":
        config["backbone"] = keras.saving.deserialize_keras_object(config["backbone"])
        return cls(**config)
