"""Backbones from elsewhere as encoders: Keras models, and KerasHub's if it is installed."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from polus.ir.models import PooledBackbone, load_encoder

IDS = np.array([[3, 7, 4, 9, 5, 8], [6, 3, 5, 1, 1, 1]], "int32")
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], "int32")
TOKENS = {"input_ids": IDS, "attention_mask": MASK}


def numpy(x):
    return ops.convert_to_numpy(x)


def small_backbone(segments, as_dict):
    """A model with the inputs and outputs of KerasHub's."""
    names = ["token_ids", "padding_mask", *(["segment_ids"] if segments else [])]
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in names}
    x = layers.Embedding(10, 4)(inputs["token_ids"]) * ops.cast(
        inputs["padding_mask"][..., None], "float32"
    )
    if segments:
        x = x + layers.Embedding(2, 4)(inputs["segment_ids"])
    return keras.Model(inputs, {"sequence_output": x, "pooled_output": x[:, 0]} if as_dict else x)


@pytest.mark.parametrize("bert_like", [False, True])
def test_token_vectors_of_a_backbone_are_pooled(tmp_path, bert_like):
    backbone = small_backbone(bert_like, bert_like)
    encoder = PooledBackbone(backbone, max_positions=8, normalize=True)
    found = numpy(encoder(TOKENS))
    given = {"token_ids": IDS, "padding_mask": MASK, "segment_ids": np.zeros_like(IDS)}
    vectors = backbone({name: each for name, each in given.items() if name in backbone.input})
    vectors = numpy(vectors["sequence_output"] if bert_like else vectors)
    mean = (vectors * MASK[..., None]).sum(1) / MASK.sum(1, keepdims=True)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    encoder.save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    np.testing.assert_allclose(numpy(loaded(TOKENS)), found, rtol=1e-6)
    with pytest.raises(ValueError, match=r"at most 8 tokens.* got 12"):
        encoder({name: np.tile(each, 2) for name, each in TOKENS.items()})


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "initializer_range": 0.5,
    "pad_token_id": 1,
}
FAMILIES = {
    "XLMRoberta": {"max_position_embeddings": 34, "type_vocab_size": 1},
    "Bert": {"max_position_embeddings": 32},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_backbones_of_keras_hub_give_the_vectors_of_load_encoder(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras_hub = pytest.importorskip("keras_hub", reason="KerasHub installs all of TensorFlow")
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(**SIZES, **FAMILIES[name])
        getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path)
        backbone = keras_hub.models.Backbone.from_preset(str(tmp_path), dtype="float32")
    pooling = "last" if name == "Qwen3" else "mean"
    encoder = PooledBackbone(backbone, pooling=pooling)
    expected = numpy(load_encoder(tmp_path)(TOKENS, training=False))
    # KerasHub's BERT has the approximate form of GELU.
    atol = 5e-3 if name == "Bert" else 1e-4
    np.testing.assert_allclose(numpy(encoder(TOKENS, training=False)), expected, atol=atol)
