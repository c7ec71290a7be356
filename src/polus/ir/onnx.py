"""Exports encoders to ONNX, with PyTorch."""

from importlib.util import find_spec
from pathlib import Path

import keras

from polus.files import atomic_write

_INPUTS = ("input_ids", "attention_mask")
_NEEDED = ("onnx", "onnxscript")  # by PyTorch's exporter
_LARGEST = 2**31 - 1  # bytes, the limit of protobuf


def export_onnx(path: str | Path, encoder: keras.Model) -> None:
    """Writes an encoder as an ONNX file, which runs without Keras and Polus.

    ```python
    export_onnx("encoder.onnx", encoder)
    session = onnxruntime.InferenceSession("encoder.onnx")
    [vectors] = session.run(None, TextTokenizer(folder)(texts))
    ```

    The inputs are `input_ids` and `attention_mask`, both int32 `(batch, length)` of any size; the
    output is what the encoder returns in inference mode. The tokenizer is not part of it.

    Args:
        path: The file, which replaces an older one.
        encoder: An encoder in float32, such as those of `polus.ir.models`.

    Raises:
        ImportError: If a package is missing.
        NotImplementedError: On another backend than PyTorch. TensorFlow's converter, tf2onnx 1.17,
            does not know the exact GELU of most encoders.
        ValueError: If the encoder doesn't compute in float32, or has more than 2 GiB of weights,
            which an ONNX file can't hold.
    """
    if (backend := keras.backend.backend()) != "torch":
        raise NotImplementedError(
            f"export_onnx works with PyTorch, but the backend is {backend}. Use "
            "encoder.save('encoder.keras') here. Then run this with KERAS_BACKEND=torch: "
            "import polus.ir.models; "
            "export_onnx('encoder.onnx', keras.saving.load_model('encoder.keras'))"
        )
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ImportError(
            f"export_onnx needs {' and '.join(missing)}. Use: pip install {' '.join(missing)}"
        )
    if encoder.dtype_policy.compute_dtype != "float32":
        raise ValueError(
            f"An encoder must compute in float32 to be exported, got {encoder.dtype_policy.name}. "
            "Save its weights, and load them into one with dtype='float32'."
        )
    if (size := 4 * encoder.count_params()) >= _LARGEST:
        raise ValueError(
            f"An ONNX file holds at most {_LARGEST:,} bytes, but the encoder has {size:,} bytes of "
            "weights. Serve it with Keras."
        )
    with atomic_write(path) as temporary:
        _export(str(temporary), encoder)


def _export(path: str, encoder: keras.Model) -> None:
    """Exports by PyTorch itself: Keras 3.15 exports with inputs of one token, and fails on them."""
    import torch

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            vectors: torch.Tensor = self.encoder(
                {"input_ids": input_ids, "attention_mask": attention_mask}, training=False
            )
            return vectors

    tokens = torch.ones((2, 3), dtype=torch.int32)
    any_size = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    torch.onnx.export(
        Flat().eval(),
        (tokens, tokens.clone()),
        path,
        input_names=_INPUTS,
        output_names=("vectors",),
        dynamic_shapes=(any_size, any_size),
        external_data=False,
        dynamo=True,
        verbose=False,
    )
