"""Encoders exported to ONNX, beside their own vectors."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

from polus.ir.models import BertEncoder, TransformerEncoder
from polus.ir.onnx import export_onnx

SIZES = (50, 16, 2, 4, 32, 64)
ENCODERS = {
    "BERT": (BertEncoder, {"pooling": ["mean", "last", "max"], "normalize": True}),
    "MPNet": (
        TransformerEncoder,
        {"architecture": {"norm_first": False, "position_offset": 2, "relative_bias": True}},
    ),
    "ModernBERT": (
        TransformerEncoder,
        {
            "architecture": {
                "use_bias": False,
                "gated": True,
                "rotary_bases": [1e5, 1e4],
                "windows": [None, 3],
            },
            "dense": [{"units": 5}],
        },
    ),
    "Qwen3": (
        TransformerEncoder,
        {
            "num_kv_heads": 2,
            "pooling": "last",
            "architecture": {
                "norm": "rms",
                "embedding_norm": False,
                "qk_norm": True,
                "activation": "silu",
                "gated": True,
                "causal": True,
                "rotary_bases": 1e6,
            },
        },
    ),
}
BACKEND = keras.backend.backend()


def numpy(x):
    return ops.convert_to_numpy(x)


def built(name="BERT", **kwargs):
    kind, settings = ENCODERS[name]
    encoder = kind(*SIZES, **settings, **kwargs)
    encoder.build_on_tokens()
    return encoder


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch exports")
@pytest.mark.parametrize("name", ENCODERS)
def test_onnxruntime_gives_the_vectors_of_the_encoder(tmp_path, name):
    """For batches and lengths that differ, with padding."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder = built(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_onnx(tmp_path / "encoder.onnx", encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    rng = np.random.default_rng(0)
    for batch, length in ((1, 2), (3, 17), (2, 40)):
        tokens = {
            "input_ids": rng.integers(1, 50, (batch, length), dtype="int32"),
            "attention_mask": np.ones((batch, length), "int32"),
        }
        tokens["attention_mask"][0, -(-length // 2) :] = 0
        [found] = session.run(None, tokens)
        np.testing.assert_allclose(found, numpy(encoder(tokens, training=False)), atol=1e-4)


@pytest.mark.skipif(BACKEND == "torch", reason="of the other backends")
def test_other_backends_are_refused_with_what_to_write(tmp_path):
    with pytest.raises(
        NotImplementedError, match=rf"backend is {BACKEND}.*encoder\.save\('encoder\.keras"
    ):
        export_onnx(tmp_path / "encoder.onnx", built())


@pytest.mark.skipif(BACKEND != "torch", reason="refused before")
def test_missing_packages_half_precision_and_huge_encoders_raise(tmp_path, monkeypatch):
    encoder = built()
    monkeypatch.setattr("polus.ir.onnx.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs .*onnx.*pip install .*onnx"):
        export_onnx(tmp_path / "encoder.onnx", encoder)
    monkeypatch.setattr("polus.ir.onnx.find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"float32 to be exported, got mixed_bfloat16"):
        export_onnx(tmp_path / "encoder.onnx", built(dtype="mixed_bfloat16"))
    monkeypatch.setattr("polus.ir.onnx._LARGEST", 1000)
    with pytest.raises(ValueError, match=r"holds at most 1,000 bytes"):
        export_onnx(tmp_path / "encoder.onnx", encoder)
    assert not list(tmp_path.iterdir())
