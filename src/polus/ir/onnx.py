"""Exports encoders to ONNX."""

from importlib.util import find_spec
from pathlib import Path

import keras

from polus.files import atomic_write

_INPUTS = ("input_ids", "attention_mask")
# What Keras' exporter needs on each backend.
_NEEDED = {"tensorflow": ("tf2onnx", "onnx"), "torch": ("onnx", "onnxscript")}
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
        NotImplementedError: On JAX.
        ValueError: If the encoder doesn't compute in float32, or has more than 2 GiB of weights,
            which an ONNX file can't hold.
    """
    backend = keras.backend.backend()
    if backend not in _NEEDED:
        raise NotImplementedError(
            f"export_onnx works with TensorFlow or PyTorch, but the backend is {backend}. Use "
            "encoder.save('encoder.keras') here. Then run this with KERAS_BACKEND=torch: "
            "import polus.ir.models; "
            "export_onnx('encoder.onnx', keras.saving.load_model('encoder.keras'))"
        )
    missing = [name for name in _NEEDED[backend] if find_spec(name) is None]
    if missing:
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
    signature = [
        {name: keras.InputSpec(shape=(None, None), dtype="int32", name=name) for name in _INPUTS}
    ]
    with atomic_write(path) as temporary:
        encoder.export(str(temporary), format="onnx", input_signature=signature, verbose=False)
