"""From texts to vectors: a tokenizer, encoders and trainable projections."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
from keras import ops

from polus.ir.bert import BertEncoder
from polus.ir.families import FAMILIES, load_transformer
from polus.ir.pooled import PooledBackbone
from polus.ir.pretrained import (
    BERT_TYPES,
    PairTruncation,
    choose_prompt,
    model_config,
    text_settings,
    transformer_folder,
)
from polus.ir.scores import Representation
from polus.ir.search import check_positive
from polus.ir.tensors import damaged
from polus.ir.texts import as_texts, check_unicode
from polus.ir.transformer import TransformerEncoder

__all__ = [
    "BertEncoder",
    "DualEncoder",
    "IdentityProjection",
    "PooledBackbone",
    "TextTokenizer",
    "TransformerEncoder",
    "load_encoder",
]


def load_encoder(folder: str | Path, **overrides: Any) -> BertEncoder | TransformerEncoder:
    """Loads the encoder in a folder that transformers or sentence-transformers has saved.

    BERT, RoBERTa, XLM-RoBERTa and CamemBERT become a `BertEncoder`; MPNet, ModernBERT and Qwen3 a
    `TransformerEncoder`. Pooling, dense layers and normalization are those of
    sentence-transformers' `modules.json`. Without that file they are "mean" ("last" for Qwen3),
    none and no normalization.

    Args:
        folder: The folder of `config.json` and `model.safetensors` or its shards.
        overrides: Arguments of the class, such as `dropout=0.0`.

    Raises:
        FileNotFoundError: If there is no `config.json`, or no weights in the safetensors format.
        ValueError: If the model is of another family, or has a setting that isn't implemented.
    """
    folder = Path(folder)
    found = model_config(folder)["model_type"]
    if found in BERT_TYPES:
        return BertEncoder.from_pretrained(folder, **overrides)
    if found in FAMILIES:
        return load_transformer(folder, **overrides)
    raise ValueError(
        f"load_encoder reads the families {', '.join((*BERT_TYPES, *FAMILIES))}, got {found!r} in "
        f"{folder}. Use PooledBackbone with a model of KerasHub, or any Keras model from tokens to "
        "vectors, as the encoder; DualEncoder takes any."
    )


class TextTokenizer:
    """Tokenizes texts with a `tokenizer.json` of the `tokenizers` library.

    Called with N texts, it returns `{"input_ids": (N, L), "attention_mask": (N, L)}` of int32. L is
    the length of the longest text, rounded up to a multiple of `multiple`, so that an encoder is
    compiled for few shapes.

    A folder saved by sentence-transformers states the length at which texts are truncated, and for
    some models prompts that are prepended to queries or documents. Use a tokenizer for each kind of
    text then:

    ```python
    query_tokenizer = TextTokenizer(folder, prompt_name="query")
    document_tokenizer = TextTokenizer(folder, prompt_name="document")
    ```

    Args:
        path: The folder of `tokenizer.json`, or the path of that file.
        max_length: Longer texts are truncated; special tokens and the prompt count. Defaults to the
            length that the folder states, or to 256 if it states none.
        multiple: See above.
        prompt_name: The name of one of the folder's prompts. "query" and "document" are empty if
            the folder has none of that name, as in sentence-transformers. Defaults to the folder's
            own default.
        prompt: A text to prepend instead; "" for none.
        pair_truncation: How `pairs` truncates: "longest_first" removes the tokens of the longer
            text first, "only_second" those of the document alone, and raises ValueError if the
            query is too long. Defaults to the folder's, which is mostly "longest_first".

    Raises:
        FileNotFoundError: If there is no `tokenizer.json`.
        ImportError: If `tokenizers` isn't installed.
        ValueError: If the folder has prompts but no default, and neither `prompt_name` nor `prompt`
            is given, if it has a setting that isn't implemented, or if `max_length` leaves no room
            for a text.
    """

    def __init__(
        self,
        path: str | Path,
        max_length: int | None = None,
        multiple: int = 32,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        pair_truncation: PairTruncation | None = None,
    ) -> None:
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        settings = text_settings(folder)
        file = transformer_folder(folder) / "tokenizer.json" if path.is_dir() else path
        check_positive(multiple, "multiple")
        self.max_length = (settings.max_length or 256) if max_length is None else max_length
        self.multiple = multiple
        self.prompt = choose_prompt(folder, settings, prompt_name) if prompt is None else prompt
        self._truncation_side = settings.truncation_side
        self._pad_token = settings.pad_token
        self._tokenizer = _read_tokenizer(file, settings.lower_case)
        self._tokenizer.no_padding()
        self._check_room(self.max_length)
        self._tokenizer.enable_truncation(self.max_length, direction=settings.truncation_side)
        self._segment_ids = settings.segment_ids
        self._of_pairs = self._tokenizer
        self.pair_truncation = pair_truncation or settings.pair_truncation
        if self.pair_truncation == "only_second":
            self._of_pairs = type(self._tokenizer).from_str(self._tokenizer.to_str())
            self._of_pairs.enable_truncation(
                self.max_length, strategy="only_second", direction=settings.truncation_side
            )
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def _check_room(self, max_length: int) -> None:
        """Raises unless a token of a text fits beside the prompt and the special tokens."""
        check_positive(max_length, "max_length")
        self._tokenizer.no_truncation()
        taken = len(self._tokenizer.encode(self.prompt).ids)
        # Truncation at the left would cut the prompt.
        if max_length <= (taken if self._truncation_side == "right" else 1):
            raise ValueError(
                f"max_length must be larger than {taken}, the number of special tokens and those "
                f"of the prompt {self.prompt!r}, got {max_length}: nothing of a text would be left."
            )

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
        tokens = self._padded(self._encode(texts))
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def pairs(
        self, queries: Sequence[str], documents: Sequence[str]
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Tokenizes each query together with a document, for a cross-encoder.

        It returns `token_type_ids` too, as the tokenizer has them: 0 for the query and 1 for the
        document with BERT's, 0 with RoBERTa's. The prompt is prepended to the query.
        """
        queries = [self.prompt + each for each in as_texts(queries, "queries")]
        pairs = list(zip(queries, as_texts(documents, "documents"), strict=True))
        try:
            encodings = self._encodings(pairs, self._of_pairs)
        except ValueError:
            raise
        except Exception as error:  # the library raises no narrower one
            if self._of_pairs is self._tokenizer:
                raise
            raise ValueError(
                f"A query must leave room for the document in {self.max_length} tokens. Use "
                "pair_truncation='longest_first', or a larger max_length."
            ) from error
        tokens = self._padded(encodings)
        if not self._segment_ids:
            tokens["token_type_ids"][:] = 0
        return tokens

    def _padded(self, encodings: Sequence[Any]) -> dict[str, np.ndarray[Any, Any]]:
        longest = max((len(each.ids) for each in encodings), default=1)
        length = min(-(-longest // self.multiple) * self.multiple, max(self.max_length, longest))
        names = ("input_ids", "attention_mask", "token_type_ids")
        tokens = {name: np.zeros((len(encodings), length), np.int32) for name in names}
        for row, each in enumerate(encodings):
            count = len(each.ids)
            tokens["input_ids"][row, :count] = each.ids
            tokens["attention_mask"][row, :count] = 1
            tokens["token_type_ids"][row, :count] = each.type_ids
        return tokens

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Returns the number of tokens of each text."""
        return [len(each.ids) for each in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        return self._encodings([self.prompt + text for text in as_texts(texts)])

    def _encodings(
        self, given: Sequence[str | tuple[str, str]], tokenizer: Any = None
    ) -> list[Any]:
        try:
            return list((tokenizer or self._tokenizer).encode_batch(given))
        except TypeError:
            check_unicode(given)
            raise

    def save(
        self,
        folder: str | Path,
        pad_id: int = 0,
        *,
        segment_ids: bool = True,
        settings: Mapping[str, object] = MappingProxyType({}),
    ) -> int:
        """Writes `tokenizer.json` and the files that transformers needs beside it.

        Args:
            folder: An existing folder.
            pad_id: The id of the token for padding, if the tokenizer's folder names none.
            segment_ids: Whether the model takes segment ids.
            settings: Further settings of sentence-transformers' module Transformer.

        Returns:
            The id of the token for padding.
        """
        folder = Path(folder)
        pad_token = self._pad_token or self._tokenizer.id_to_token(pad_id)
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str(), "utf-8")
        names = ["input_ids", "token_type_ids", "attention_mask"]
        if not (segment_ids and self._segment_ids):
            names.remove("token_type_ids")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_length,
            "model_input_names": names,
            "pad_token": pad_token,
            "truncation_side": self._truncation_side,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        module = {"max_seq_length": self.max_length, "do_lower_case": False, **settings}
        (folder / "sentence_bert_config.json").write_text(json.dumps(module), "utf-8")
        known = None if pad_token is None else self._tokenizer.token_to_id(pad_token)
        return pad_id if known is None else known

    @property
    def fingerprint(self) -> str:
        """A digest that differs if the tokens of any text may differ."""
        return hashlib.sha256((self._tokenizer.to_str() + self.prompt).encode()).hexdigest()


def _read_tokenizer(path: Path, lower_case: bool) -> Any:
    try:
        from tokenizers import Tokenizer, normalizers
    except ImportError as error:
        raise ImportError("TextTokenizer needs tokenizers. Use: pip install tokenizers") from error
    if not path.exists():
        raise FileNotFoundError(
            f"{path} must be there for a TextTokenizer. Write it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own
        raise damaged(path, "a tokenizer.json of the library tokenizers", error) from error
    if lower_case:
        own = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return tokenizer


@keras.saving.register_keras_serializable(package="polus")
class IdentityProjection(keras.layers.Layer):
    """A linear projection without bias, initialized to the identity.

    A frozen encoder's vectors are good as they are. A random initialization would discard what the
    encoder knows, and would have to relearn it from the training pairs.

    Args:
        size: The size of the projected vectors. Defaults to that of the input. A smaller one keeps
            the first dimensions at first.
        kwargs: As for `keras.layers.Layer`.
    """

    def __init__(self, size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = size

    def build(self, input_shape: Sequence[int | None]) -> None:
        # The shape of a pair of vectors and mask is a pair of shapes.
        given = (input_shape[0] if isinstance(input_shape[0], tuple) else input_shape)[-1]
        self.kernel = self.add_weight(
            (given, self.size or given), initializer="identity", name="kernel"
        )

    def call(self, representation: Representation) -> Any:
        if isinstance(representation, (tuple, list)):  # late interaction
            vectors, mask = representation
            return self.call(vectors), mask
        sizes = self.kernel.shape[0], representation.shape[-1]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{self.name} must be given vectors of size {sizes[0]}, as at first, got "
                f"{sizes[1]}. Encoders of different sizes can't share a projection: leave out "
                "shared_projection, and set projection_size."
            )
        return ops.matmul(representation, self.kernel)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size}


@keras.saving.register_keras_serializable(package="polus")
class DualEncoder(keras.Model):
    """A query encoder and a document encoder, each with a projection on top.

    It has the four methods that `EfficientDenseRetrievalTrainer` calls. Called as a model with a
    pair of queries and documents, it returns the pair of their representations.

    Args:
        encoder: Any Keras model that maps a tensor, or a dict of tensors, to `(B, E)`, or for late
            interaction to `(vectors (B, L, E), mask (B, L))`.
        document_encoder: The encoder for documents. Defaults to `encoder`.
        projection_size: The size of the representations. Defaults to the encoder's.
        shared_projection: Whether queries and documents share one projection.
        kwargs: As for `keras.Model`; a `dtype` is that of the projections.

    Example:
        >>> model = DualEncoder(keras.Sequential([keras.layers.Dense(8)]))
        >>> queries, documents = model((np.ones((2, 4)), np.ones((3, 4))))
        >>> tuple(documents.shape)
        (3, 8)
    """

    def __init__(
        self,
        encoder: keras.Model,
        document_encoder: keras.Model | None = None,
        projection_size: int | None = None,
        shared_projection: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for each in (encoder, document_encoder):
            if isinstance(each, DualEncoder):
                raise TypeError(
                    "DualEncoder must be given an encoder, got a DualEncoder. Use its "
                    "query_encoder and document_encoder."
                )
        self.query_encoder = encoder
        self.document_encoder = document_encoder or encoder
        self.projection_size = projection_size
        self.shared_projection = shared_projection
        given = {"size": projection_size, "dtype": self.dtype_policy}
        self.query_projection = IdentityProjection(name="query_projection", **given)
        self.document_projection = (
            self.query_projection
            if shared_projection
            else IdentityProjection(name="document_projection", **given)
        )

    def encode_query(self, inputs: object, training: bool = False) -> Representation:
        """Returns the encoder's vectors of queries, before the projection."""
        outputs = self.query_encoder(inputs, training=training)
        vectors: Representation = _vectors(outputs, "query")
        return vectors

    def encode_document(self, inputs: object, training: bool = False) -> Representation:
        """Returns the encoder's vectors of documents, before the projection."""
        result: Representation = _vectors(
            self.document_encoder(inputs, training=training), "document"
        )
        return result

    def call(self, inputs: Any, training: bool = False) -> Any:
        queries, documents = inputs
        return (
            self.query_projection(self.encode_query(queries, training)),
            self.document_projection(self.encode_document(documents, training)),
        )

    @property
    def built(self) -> bool:
        """Whether its layers are built: a trainer calls them one by one, never the model."""
        return all(layer.built for layer in self.layers)

    @built.setter
    def built(self, built: bool) -> None:
        pass  # Keras assigns it

    def get_build_config(self) -> dict[str, Any]:
        heads = (self.query_projection, self.document_projection)
        return {"sizes": [head.kernel.shape[0] for head in heads]} if self.built else {}

    def build_from_config(self, config: dict[str, Any]) -> None:
        heads = (self.query_projection, self.document_projection)
        for head, size in zip(heads, config.get("sizes", ()), strict=False):
            if not head.built:
                head.build((None, size))

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        two = self.document_encoder is not self.query_encoder
        return {
            "name": self.name,
            "dtype": serialize(self.dtype_policy),
            "encoder": serialize(self.query_encoder),
            "document_encoder": serialize(self.document_encoder) if two else None,
            "projection_size": self.projection_size,
            "shared_projection": self.shared_projection,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DualEncoder":
        for name in ("encoder", "document_encoder"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)


def _vectors(outputs: Any, kind: str) -> Any:
    if not isinstance(outputs, dict):
        return outputs
    raise ValueError(
        f"The {kind} encoder must return one tensor, or a pair of vectors and mask, got a dict of "
        f"{list(outputs)}. Use a subclass of DualEncoder that selects one: def encode_query(self, "
        "inputs, training=False): return self.query_encoder(inputs, training=training)[name], and "
        "likewise encode_document with self.document_encoder."
    )
