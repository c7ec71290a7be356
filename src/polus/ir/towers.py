"""The two towers of a dual encoder: what turns queries and documents into representations."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras

from polus.core import function
from polus.ir.batch import on_negatives
from polus.ir.scores import Representation

METHODS = ("encode_query", "encode_document", "query_projection", "document_projection")
"""The methods (or layers) that a dual encoder must have."""


@dataclasses.dataclass(frozen=True)
class Towers:
    """Runs a dual encoder's encoders and projections, in training or in inference mode.

    Args:
        model: A model with the four methods.
        encoded: Inputs are the encoders' vectors already, so the encoders are skipped.
        post_process: Applied to each projected representation.
    """

    model: keras.Model
    encoded: bool
    post_process: Callable[[Any], Any]

    def encode_query(self, inputs: Any, training: bool = False) -> Representation:
        """Returns the encoder's vectors of queries."""
        if not self.encoded:
            inputs = _encode(self.model.encode_query, inputs, training)
        vectors: Representation = inputs
        return vectors

    def encode_document(self, inputs: Any, training: bool = False) -> Representation:
        """Returns the encoder's vectors of documents."""
        if not self.encoded:
            inputs = _encode(self.model.encode_document, inputs, training)
        vectors: Representation = inputs
        return vectors

    def project_query(self, vectors: Representation, training: bool = False) -> Representation:
        """Returns the representations of encoded queries."""
        result: Representation = self.post_process(
            _call(self.model.query_projection, vectors, training)
        )
        return result

    def project_document(self, vectors: Representation, training: bool = False) -> Representation:
        """Returns the representations of encoded documents."""
        result: Representation = self.post_process(
            _call(self.model.document_projection, vectors, training)
        )
        return result

    def represent_query(self, inputs: object, training: bool = False) -> Representation:
        """Returns the representations of queries: encoded and projected."""
        return self.project_query(self.encode_query(inputs, training), training)

    def represent_document(self, inputs: object, training: bool = False) -> Representation:
        """Returns the representations of documents: encoded and projected."""
        return self.project_document(self.encode_document(inputs, training), training)

    def encode(self, texts: Sequence[Any], training: bool = False) -> list[Any]:
        """Encodes queries, positives and, if present, negatives (B, k, ...)."""
        return _map_texts(self.encode_query, self.encode_document, texts, training)

    def project(self, texts: Sequence[Any], training: bool = False) -> list[Any]:
        """Projects queries, positives and, if present, negatives (B, k, ...)."""
        return _map_texts(self.project_query, self.project_document, texts, training)


def _map_texts(
    query_fn: Callable[..., Any],
    document_fn: Callable[..., Any],
    texts: Sequence[Any],
    training: bool,
) -> list[Any]:
    queries, positives, *negatives = texts
    of_documents = functools.partial(document_fn, training=training)
    return [
        query_fn(queries, training=training),
        of_documents(positives),
        *[on_negatives(of_documents, each) for each in negatives],
    ]


class CompiledTowers:
    """The compiled `represent_*` of the latest towers; compiles again if the towers differ."""

    def __init__(self) -> None:
        self.towers: Towers | None = None
        self.programs: dict[str, Callable[..., Any]] = {}

    def represent(
        self, towers: Towers, kind: Literal["query", "document"], inputs: object
    ) -> Representation:
        """Returns `towers.represent_query(inputs)` or `towers.represent_document(inputs)`."""
        if towers != self.towers:
            self.programs = {
                "query": function(towers.represent_query),
                "document": function(towers.represent_document),
            }
            self.towers = towers
        result: Representation = self.programs[kind](inputs)
        return result


def check_methods(model: keras.Model) -> None:
    """Raises a TypeError, with the class to write, if the model lacks one of the four methods."""
    missing = [name for name in METHODS if not callable(getattr(model, name, None))]
    if missing:
        raise TypeError(_TEMPLATE.format(name=type(model).__name__, missing=", ".join(missing)))


def projection_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the two projections if both are layers, whose variables are known, else []."""
    projections = [model.query_projection, model.document_projection]
    is_layer = [isinstance(projection, keras.layers.Layer) for projection in projections]
    return projections if all(is_layer) else []


def _encode(method: Callable[..., Any], inputs: Any, training: bool) -> Any:
    """Calls an encoder; one that is trained must take `training`."""
    if training and not _takes_training(method):
        raise TypeError(
            f"{getattr(method, '__qualname__', method)} must take an argument training to be "
            "trained, or it would run in inference mode. Use def encode_query(self, inputs, "
            "training=False): return self.encoder(inputs, training=training)"
        )
    return _call(method, inputs, training)


def _call(method: Callable[..., Any], inputs: Any, training: bool) -> Any:
    """Calls `method` with `training` if it takes that argument."""
    return method(inputs, training=training) if _takes_training(method) else method(inputs)


def _takes_training(method: Callable[..., Any]) -> bool:
    """Returns True if `method` takes `training=`, as every layer does (`*args, **kwargs`)."""
    parameters = inspect.signature(method).parameters
    return "training" in parameters or any(
        each.kind is each.VAR_KEYWORD for each in parameters.values()
    )


_TEMPLATE = """{name} must have the methods of a dual encoder, but it lacks {missing}.
Use polus.ir.models.DualEncoder(encoder), which has them all, or a subclass:

@keras.saving.register_keras_serializable()
class MyDualEncoder(polus.ir.models.DualEncoder):
    def encode_query(self, inputs, training=False):
        return self.query_encoder(inputs, training=training)

    def encode_document(self, inputs, training=False):
        return self.document_encoder(inputs, training=training)"""
