"""Encoders for the tasks of the Massive Text Embedding Benchmark."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from polus.ir.encoding import TextEncoder
from polus.ir.models import TextTokenizer


class MTEBEncoder:
    """An encoder as `mteb` calls it (Muennighoff et al. 2023, arXiv:2210.07316).

    ```python
    model = MTEBEncoder(
        load_encoder(folder),
        TextTokenizer(folder, prompt_name="document"),
        TextTokenizer(folder, prompt_name="query"),
        name="me/my-encoder",
    )
    results = mteb.evaluate(model, mteb.get_tasks(["SciFact"]))
    ```

    Similarity is the cosine. Results are `mteb`'s, so they don't depend on `polus.ir.evaluation`.

    Args:
        encoder: A Keras model from tokens to one vector per text.
        tokenizer: Maps documents, and texts of tasks without queries, to the encoder's input.
        query_tokenizer: Maps queries to the encoder's input. Defaults to `tokenizer`.
        name: The model's name in the results, `organization/model`.
        batch_size: The number of texts encoded at a time.
    """

    def __init__(
        self,
        encoder: keras.Model,
        tokenizer: TextTokenizer,
        query_tokenizer: TextTokenizer | None = None,
        name: str = "polus/encoder",
        batch_size: int = 64,
    ) -> None:
        self.name = name
        self.encode_document = TextEncoder(encoder, tokenizer, batch_size)
        self.encode_query = (
            TextEncoder(encoder, query_tokenizer, batch_size)
            if query_tokenizer
            else self.encode_document
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        prompt_type: str | None = None,
        **task: object,
    ) -> Any:
        """Returns the vectors `(N, E)` of batches of texts, those of queries by their tokenizer."""
        texts = [text for batch in inputs for text in batch["text"]]
        is_query = getattr(prompt_type, "value", prompt_type) == "query"
        return (self.encode_query if is_query else self.encode_document)(texts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosines of all pairs, `(N, M)`."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of each pair, `(N,)`."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(axis=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """What `mteb` writes into its results about the model."""
        try:
            from mteb.models import ModelMeta  # type: ignore[import-not-found]  # optional
        except ImportError as error:
            raise ImportError("MTEBEncoder needs mteb. Use: pip install mteb") from error
        return ModelMeta.create_empty({"name": self.name, "revision": "local"})


def _unit(vectors: Any) -> Any:
    vectors = np.atleast_2d(np.asarray(vectors, np.float32))
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
