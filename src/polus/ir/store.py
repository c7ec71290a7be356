"""What a frozen encoder gives is computed once and kept on disk."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from polus.core import BaseLogger, function
from polus.files import atomic_write
from polus.ir.data import Features
from polus.ir.encoding import Vectors, encode, stack_vectors
from polus.ir.models import TextTokenizer

TEXTS_PER_FILE = 10_000  # what a crash can cost


class RepresentationStore(BaseLogger):
    """Calling it with texts gives the encoder's vectors; a text it has seen is read, not encoded.

    A folder per encoder: its name is made from weights, configuration, precision and tokenizer, so
    that vectors of a changed encoder are never mixed up with those of the former. In it is one
    or more safetensors files per call that met new texts.

    The configuration is what `get_config()` gives of the encoder and of each layer in it. A class
    of yours that has no `get_config` counts by its public attributes: numbers, texts, NumPy arrays,
    functions (by name), and lists, tuples and dicts of these. Other code in its `call` is not
    noticed: then delete the folder.

    Args:
        folder: where vectors are kept; it can be deleted at any time.
        encoder: a Keras model; `model.query_encoder` of a `DualEncoder`, for example.
        tokenizer: what makes the encoder's input of texts; another than a `TextTokenizer` needs
            its `lengths` and `fingerprint` as well.
        batch_size: texts encoded at a time.

    Calling it gives `(N, E)` float32, or for an encoder of pairs (late interaction) the pair
    `(vectors (N, L, E), mask (N, L))` with L the longest text's number of tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: keras.Model,
        tokenizer: TextTokenizer,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        missing = [name for name in ("lengths", "fingerprint") if not hasattr(tokenizer, name)]
        if missing:
            raise TypeError(
                f"The tokenizer, a {type(tokenizer).__name__}, has no {' and no '.join(missing)}; "
                "give a TextTokenizer, or write a class with __call__(texts) for the encoder's "
                "input, lengths(texts) for numbers of tokens, and fingerprint, a string that "
                "differs where tokens may differ."
            )
        self.folder = Path(folder)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._folder: Path | None = None
        self.encoded = 0
        """How many texts have been encoded by this object."""

    def __call__(self, texts: Iterable[str]) -> Any:
        texts = _listed(texts)
        if not self.encoder.built:  # its weights do not exist, so they can't be compared yet
            self.encoder(self.tokenizer(texts[:1]), training=False)
        folder = self.folder / self.fingerprint
        if folder != self._folder:
            # Not at each call, since a compiled program is kept with the function that it is of;
            # but that of a changed encoder would go on as before.
            self._run = function(lambda tokens: self.encoder(tokens, training=False))
            self._folder = folder
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        known = self._known(folder, set(keys))
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if new:
            self.logger.info("Encoding %d texts, %d are in %s", len(new), len(known), folder)
        for start in range(0, len(new), TEXTS_PER_FILE):
            part = dict(list(new.items())[start : start + TEXTS_PER_FILE])
            vectors = self._encode(list(part.values()))
            _write(folder, list(part), vectors)
            known |= dict(zip(part, vectors, strict=True))
            self.encoded += len(part)
        return stack_vectors([known[key] for key in keys])

    def _known(self, folder: Path, wanted: set[str]) -> dict[str, Vectors]:
        known: dict[str, Vectors] = {}
        for path in sorted(folder.glob("[!.]*.safetensors")):
            try:
                known |= _read(path, wanted)
            except SafetensorError as error:
                self.logger.warning(
                    "%s is damaged (%s): its texts are encoded again; delete it", path, error
                )
        return known

    def _encode(self, texts: list[str]) -> list[Vectors]:
        # By falling length, which saves most of the padding.
        order = np.argsort([-length for length in self.tokenizer.lengths(texts)], kind="stable")
        features = Features.of_texts(texts, self.tokenizer)
        vectors = encode(self._run, features, self.batch_size, order)
        broken = [i for i, vector in enumerate(vectors) if not np.isfinite(vector).all()]
        if broken:  # stored, they would outlive the cause
            raise ValueError(
                f"The encoder gave NaN or infinity for {len(broken)} of {len(texts)} texts, such "
                f"as {texts[broken[0]][:80]!r}; none of these texts is stored. Look for such "
                "numbers among its weights, and whether it takes texts of that length."
            )
        return vectors

    @property
    def fingerprint(self) -> str:
        """Differs where the vectors of a text may differ."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        digest.update(_description(self.encoder).encode())
        for weight in self.encoder.weights:
            value = ops.convert_to_numpy(weight)
            digest.update(str(value.shape).encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()[:32]


def _listed(texts: Iterable[str]) -> list[str]:
    """Texts as a list, or what is wrong with them."""
    if isinstance(texts, str):
        raise TypeError(f"The text {texts[:80]!r} was given; give a list: [text].")
    texts = list(texts)
    if not texts:
        raise ValueError("No texts were given; there is nothing to represent.")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Text number {place} is {text!r}; give strings.")
    return texts


# What of a configuration changes from run to run, or by freezing, and decides on no vector: among
# it shapes, which are those of the first texts that an encoder has met.
_WITHOUT_EFFECT = {"build_config", "build_input_shape", "batch_shape", "trainable"}


# What a model has once it was compiled, trained, evaluated or asked to predict.
_OF_KERAS_LOOPS = ("stop_training", "stop_evaluating", "stop_predicting")


def _description(encoder: keras.Model) -> str:
    """What, beside the weights, decides on a vector: classes, precision and configuration."""
    names: dict[str, str] = {}
    # Layer by layer: an encoder without a configuration can have layers with one.
    described = [
        [
            type(layer).__name__,
            layer.dtype_policy.name,
            _plain(_config(layer), names),
            _plain(_attributes(layer), names),
        ]
        for layer in _layers(encoder, {})
    ]
    return json.dumps(described, sort_keys=True)


def _layers(layer: keras.layers.Layer, met: dict[int, Any]) -> list[keras.layers.Layer]:
    """The layer and those in it, each once: a model's, or what public attributes hold."""
    if id(layer) not in met:
        met[id(layer)] = layer
        if isinstance(layer, keras.Model):
            held = layer.layers
        else:
            held = keras.tree.flatten([v for k, v in vars(layer).items() if not k.startswith("_")])
        for each in held:
            if isinstance(each, keras.layers.Layer):
                _layers(each, met)
    return list(met.values())


def _config(layer: keras.layers.Layer) -> Any:
    try:
        return layer.get_config()
    except NotImplementedError:  # a class that takes what Keras can't describe
        return {}


def _attributes(layer: keras.layers.Layer) -> dict[str, Any]:
    """The public attributes of a class that leaves its configuration to Keras.

    Keras knows the arguments of its `__init__` at best, as they were at the start.
    """
    kind = type(layer)
    described = not kind.get_config.__module__.startswith("keras.")
    if described or kind.__module__.startswith("keras."):
        return {}
    ignored = {*vars(keras.Model(name="any")), *_OF_KERAS_LOOPS}
    return {
        name: value
        for name, value in vars(layer).items()
        if not name.startswith("_") and name not in ignored
    }


def _plain(value: Any, names: dict[str, str]) -> Any:
    """`value` for JSON, the same in each run; None for what can't be compared.

    Layers are called by the order in which they come: `dense_3` is a matter of what else has been
    made before, but how layers are wired stands in the configuration by their names.
    """
    if isinstance(value, dict):
        if isinstance(name := value.get("name"), str) and name not in names:
            names[name] = re.sub(r"_\d+$", "", name) + f"#{len(names)}"
        plain = {
            str(key): _plain(each, names)
            for key, each in value.items()
            if key not in _WITHOUT_EFFECT
        }
        return {key: each for key, each in plain.items() if each is not None}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(each, names) for each in value]
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, (bool, int, float)):
        return value
    return getattr(value, "__qualname__", None)  # a function or a class


def _read(path: Path, wanted: set[str]) -> dict[str, Vectors]:
    with safe_open(str(path), "numpy") as file:
        keys = [row.tobytes().hex() for row in file.get_tensor("keys")]
        if wanted.isdisjoint(keys):
            return {}
        vectors, lengths = file.get_tensor("vectors"), file.get_tensor("lengths")
    ends = np.cumsum(np.maximum(lengths, 1))
    return {
        # Length 0 stands for a text that is one vector, without an axis of tokens.
        key: vectors[end - length : end] if length else vectors[end - 1]
        for key, length, end in zip(keys, lengths, ends, strict=True)
        if key in wanted
    }


def _write(folder: Path, keys: list[str], vectors: list[Vectors]) -> None:
    rows = [np.frombuffer(bytes.fromhex(key), np.uint8) for key in keys]
    lengths = [len(each) if each.ndim == 2 else 0 for each in vectors]
    # Named after its content: two processes that write at once do not meet.
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
    with atomic_write(folder / f"{name}.safetensors") as temporary:
        save_file(
            {
                "keys": np.stack(rows),
                "vectors": np.concatenate([np.atleast_2d(each) for each in vectors]),
                "lengths": np.array(lengths, np.int32),
            },
            str(temporary),
        )
