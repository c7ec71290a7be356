"""Cross-encoders: a model reads a query and a document together, and scores the pair.

Slower than vectors, which are computed once per document, a cross-encoder reranks what a search has
found, and its scores teach a dual encoder (`losses.MarginMSE`, `losses.TeacherKL`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from polus.core import function
from polus.ir.batch import flatten_negatives, unflatten_negatives
from polus.ir.data import Features, Rows
from polus.ir.encoding import encode
from polus.ir.evaluation import Run, ranked
from polus.ir.families import assign_slots
from polus.ir.heads import HEADS
from polus.ir.losses import MASKED
from polus.ir.models import BertEncoder, TextTokenizer, TransformerEncoder, load_encoder
from polus.ir.pretrained import (
    dense_folders,
    model_config,
    score_activation,
    text_settings,
    transformer_folder,
)
from polus.ir.search import check_positive
from polus.ir.tensors import CheckpointTensors
from polus.ir.texts import as_texts, check_texts_by_id
from polus.training import BaseTrainer


def load_cross_encoder(folder: str | Path, **overrides: Any) -> BertEncoder | TransformerEncoder:
    """Loads a classifier of pairs with one label, which maps them to `(B, 1)`.

    It is a ForSequenceClassification of BERT, RoBERTa, XLM-RoBERTa, CamemBERT, MPNet, ModernBERT or
    Qwen3, as transformers and sentence-transformers save it, or one of these encoders with modules
    Pooling and Dense on top. Its score is the logit; `PairScorer.from_pretrained` applies the
    folder's activation too. To train one from an encoder's weights, use
    `load_encoder(folder, pooling="first", normalize=False, dense=[{"units": 1}])`.

    Args:
        folder: A folder that transformers or sentence-transformers has saved.
        overrides: Arguments of the encoder, such as `dropout=0.0`.

    Raises:
        FileNotFoundError: If there is no `config.json`, or no weights in the safetensors format.
        ValueError: If the model isn't such a model.
    """
    folder = Path(folder)
    config = model_config(folder)
    if dense_folders(folder):
        model = load_encoder(folder, **overrides)
        _check_labels(folder, model.config["dense"][-1]["units"])
        return model
    head = HEADS.get(config["model_type"])
    tensors = CheckpointTensors(transformer_folder(folder))
    if head is None or any(f"{name}.weight" not in tensors for _, name in head.names):
        raise ValueError(
            f"A cross-encoder must be a ForSequenceClassification of {', '.join(HEADS)}, but "
            f"{folder} has {config.get('architectures') or config['model_type']}. Any Keras model "
            "that maps tokens to (B, 1) serves as one: PairScorer(model, tokenizer)."
        )
    _check_labels(folder, len(tensors[f"{head.names[-1][1]}.weight"]))
    model = load_encoder(folder, **{**head.settings(config), **overrides})
    assign_slots(head.slots(model), tensors)
    return model


def _check_labels(folder: Path, labels: int) -> None:
    if labels != 1:
        raise ValueError(f"A cross-encoder must have one label, got {labels} in {folder}.")


class PairScorer:
    """Scores pairs of texts with a cross-encoder, in inference mode.

    Called with N queries and N documents, it returns `(N,)` float32. A model that doesn't return
    one score for each pair raises ValueError.

    Args:
        model: Maps `tokenizer.pairs(queries, documents)` to `(B, 1)`.
        tokenizer: The model's tokenizer.
        batch_size: The number of pairs scored at a time.
        activation: The name of a Keras activation for the model's output. The default returns it
            as it is, the logit: `MarginMSE` and `TeacherKL` need logits. "sigmoid" maps it to
            (0, 1) in the same order, as `CrossEncoder.predict` of sentence-transformers does.
    """

    def __init__(
        self,
        model: keras.Model,
        tokenizer: TextTokenizer,
        batch_size: int = 32,
        activation: str = "linear",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.activation = activation
        self._score = function(self._activated)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, batch_size: int = 32, **overrides: Any
    ) -> "PairScorer":
        """Returns a scorer whose scores are those of sentence-transformers' `CrossEncoder(folder)`.

        Its activation is the folder's, or a sigmoid if the folder names none. Its prompt, if any,
        is the folder's default.

        Args:
            folder: As for `load_cross_encoder`, with the tokenizer.
            batch_size: The number of pairs scored at a time.
            overrides: As for `load_cross_encoder`.

        Raises:
            FileNotFoundError: As `load_cross_encoder` does.
            ValueError: If the model, its tokenizer or its activation isn't implemented.
        """
        folder = Path(folder)
        settings = text_settings(folder)
        prompt = settings.prompts.get(settings.default_prompt or "", "")
        # PyTorch runs eagerly, where padding costs time. Elsewhere few shapes save compiling.
        multiple = 1 if keras.config.backend() == "torch" else 32
        tokenizer = TextTokenizer(folder, multiple=multiple, prompt=prompt)
        model = load_cross_encoder(folder, **overrides)
        return cls(model, tokenizer, batch_size, score_activation(folder))

    def _activated(self, tokens: Any) -> Any:
        scores = ops.cast(_checked_scores(self.model(tokens, training=False)), "float32")
        return keras.activations.get(self.activation)(scores)

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        queries, documents = as_texts(queries, "queries"), as_texts(documents, "documents")
        if len(queries) != len(documents):
            raise ValueError(
                f"A scorer needs as many queries as documents, got {len(queries)} and "
                f"{len(documents)}."
            )
        # By length, which saves most of the padding.
        order = np.argsort([len(a) + len(b) for a, b in zip(queries, documents, strict=True)])
        pairs = Features(
            lambda rows: self.tokenizer.pairs(
                [queries[order[row]] for row in rows], [documents[order[row]] for row in rows]
            ),
            len(queries),
        )
        scores = np.empty(len(queries), np.float32)
        scores[order] = [each[0] for each in encode(self._score, pairs, self.batch_size)]
        return scores


def _checked_scores(scores: Any) -> Any:
    """Returns what a model has computed, or raises unless it is `(N, 1)`."""
    if len(scores.shape) != 2 or scores.shape[1] != 1:
        raise ValueError(
            f"A cross-encoder must return (N, 1), a score for each pair, got the shape "
            f"{tuple(scores.shape)}. Use dense=[{{'units': 1}}] at its end."
        )
    return scores


def rerank(
    run: Run,
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    score: Callable[[Sequence[str], Sequence[str]], Iterable[float]],
    depth: int = 100,
) -> dict[str, dict[str, float]]:
    """Returns a run of the best documents of each query, scored anew, the best first.

    Args:
        run: What a search has found.
        queries: `{id: text}`.
        documents: `{id: text}`.
        score: A `PairScorer`, or any function of N queries and N documents to N scores.
        depth: How many documents of each query are scored; the others are left out.

    Raises:
        ValueError: If a query or document of the run has no text, depth isn't positive, or `score`
            doesn't return one number for each pair.
    """
    check_texts_by_id(queries, "queries")
    check_texts_by_id(documents, "documents")
    check_positive(depth, "depth")
    pairs = [
        (query, document) for query, found in run.items() for document in ranked(found)[:depth]
    ]
    for query, document in pairs:
        if query not in queries or document not in documents:
            raise ValueError(
                f"queries and documents must have the texts of the run's ids, but of query "
                f"{query!r} and document {document!r} at least one is missing. Ids are compared "
                "with their types."
            )
    texts = [queries[query] for query, _ in pairs], [documents[each] for _, each in pairs]
    reranked: dict[str, dict[str, float]] = {query: {} for query in run}
    for (query, document), value in zip(pairs, _scored(score, *texts), strict=True):
        reranked[query][document] = float(value)
    return {
        query: {document: found[document] for document in ranked(found)}
        for query, found in reranked.items()
    }


def _scored(
    score: Callable[[Sequence[str], Sequence[str]], Iterable[float]],
    queries: Sequence[str],
    documents: Sequence[str],
) -> NDArray[Any]:
    """Returns the scores `(N,)` of N pairs, and raises unless they are that many numbers."""
    scores = np.array(list(score(queries, documents)))
    if scores.shape != (len(queries),):
        raise ValueError(
            f"score must return a number for each of {len(queries)} pairs, got the shape "
            f"{scores.shape}. Use PairScorer(model, tokenizer)."
        )
    if np.isnan(scores).any():
        row = int(np.isnan(scores).argmax())
        raise ValueError(
            f"score must return numbers, got {scores[row]} for the query {queries[row]!r:.80} and "
            f"the document {documents[row]!r:.80}."
        )
    return scores


def score_candidates(
    pairs: Rows,
    negatives: Rows,
    queries: Sequence[str],
    documents: Sequence[str],
    score: Callable[[Sequence[str], Sequence[str]], Iterable[float]],
) -> NDArray[np.float32]:
    """Returns the scores of pairs and their hard negatives, `(P, 1 + k)`, the positive first.

    They are what `PairBatches.teacher_scores` takes. Padding (-1) has `losses.MASKED`.

    Args:
        pairs: `PairBatches.pairs`, `(P, 2)`.
        negatives: `PairBatches.negatives`, `(P, k)`.
        queries: The texts of the queries, by row.
        documents: The texts of the documents, by row.
        score: A `PairScorer`, or any such function.

    Raises:
        ValueError: If a shape is wrong, a row has no text, or `score` doesn't return one number for
            each pair.
    """
    queries, documents = as_texts(queries, "queries"), as_texts(documents, "documents")
    _check_candidates(pairs, negatives, 2, 0)
    rows = np.concatenate([pairs[:, 1:], negatives], axis=1)
    for name, texts, last in (
        ("queries", queries, pairs[:, 0].max(initial=-1)),
        ("documents", documents, rows.max(initial=-1)),
    ):
        if last >= len(texts):
            raise ValueError(f"{name} must have a text for row {last}, got {len(texts)} texts.")
    place, column = np.nonzero(rows >= 0)
    scores = np.full(rows.shape, MASKED, np.float32)
    scores[place, column] = _scored(
        score,
        [queries[row] for row in pairs[place, 0]],
        [documents[row] for row in rows[place, column]],
    )
    return scores


def _check_candidates(
    beside: NDArray[Any], negatives: Rows, columns: int, per_negative: int
) -> None:
    """Raises unless negatives are `(P, k)`, and `beside` is `(P, columns + per_negative * k)`."""
    shape, wanted = np.shape(beside), np.shape(negatives)
    if len(wanted) != 2 or shape != (wanted[0], columns + per_negative * wanted[1]):
        names = "scores (P, 1 + k)" if per_negative else "pairs (P, 2)"
        raise ValueError(
            f"negatives must be (P, k) rows and {names}, got the shapes {wanted} and {shape}. "
            "PairBatches has pairs and, after mining, negatives."
        )


def drop_false_negatives(negatives: Rows, scores: NDArray[np.float32], margin: float = 0.0) -> Rows:
    """Returns negatives, with padding for those that score above the positive less a margin.

    Args:
        negatives: `(P, k)` rows.
        scores: `(P, 1 + k)`, as `score_candidates` returns them.
        margin: In units of the scores.

    Raises:
        ValueError: If the shapes don't match, or a score is NaN.
    """
    _check_candidates(scores, negatives, 1, 1)
    if np.isnan(scores).any():
        raise ValueError("scores must be numbers, got NaN.")
    return np.where(scores[:, 1:] > scores[:, :1] - margin, -1, negatives)


class CrossEncoderTrainer(BaseTrainer):
    """Trains a cross-encoder on batches of candidates, of which the first is relevant.

    A batch is `(tokens,)` or `(tokens, extras)`: a dict of tensors `(B, 1 + n, L)`, for each query
    its relevant document, then n that aren't. `candidate_tokens` makes one. Losses are those of
    `polus.ir.losses`: `InfoNCE(1.0)` is the listwise one, `BinaryCrossEntropy()` takes each pair
    by itself. `extras["teacher_scores"]`, `(B, 1 + n)`, are for `TeacherKL` and `MarginMSE`.

    Args: as for `BaseTrainer`; `model` maps tokens `(N, L)` to `(N, 1)`.
    """

    def forward_with_grads(self, tokens: Any, extras: Mapping[str, Any] | None = None) -> Any:
        """Returns the scores of the relevant documents `(B,)`, of the others `(B, n)`, a teacher's.

        Without a teacher's scores in the batch, only the first two.
        """
        given = dict(extras or {})
        teacher = given.pop("teacher_scores", None)
        if given:
            raise ValueError(
                "The dict after the tokens of a batch must have teacher_scores alone, got "
                f"{', '.join(map(repr, given))} too."
            )
        scores = self._scores(tokens, training=True)
        return scores if teacher is None else (*scores, teacher)

    def evaluation_step(self, tokens: Any, *_: Any) -> Any:
        """Returns the same, in inference mode, as `metric_samples` does."""
        return self.metric_samples(*self._scores(tokens, training=False))

    def metric_samples(self, *outputs: Any) -> tuple[Any, ...]:
        """Returns `(y_true, y_pred)` of a classification: the relevant document is class 0."""
        positive, negative, *_ = outputs
        scores = ops.concatenate([positive[:, None], negative], axis=1)
        return ops.zeros_like(scores[:, 0], dtype="int32"), scores

    def _scores(self, tokens: Any, training: bool) -> tuple[Any, Any]:
        for each in keras.tree.flatten(tokens):
            if len(each.shape) != 3:
                raise ValueError(
                    f"tokens must be (B, 1 + n, L), those of the candidates of B queries, got the "
                    f"shape {tuple(each.shape)}. candidate_tokens makes them."
                )
        flat, shape = flatten_negatives(tokens)
        scores = _checked_scores(self.model(flat, training=training))
        scores = unflatten_negatives(ops.cast(scores[:, 0], "float32"), shape)
        return scores[:, 0], scores[:, 1:]


def candidate_tokens(
    tokenizer: TextTokenizer, queries: Sequence[str], candidates: Sequence[Sequence[str]]
) -> dict[str, NDArray[np.int32]]:
    """Tokenizes each query with each of its documents, to a batch for `CrossEncoderTrainer`.

    Args:
        tokenizer: The model's tokenizer.
        queries: B texts.
        candidates: For each of them 1 + n texts, the relevant one first.

    Raises:
        ValueError: If there are not as many candidates for each query.
    """
    texts = [as_texts(each, "candidates") for each in candidates]
    counts = {len(each) for each in texts}
    queries = as_texts(queries, "queries")
    if len(texts) != len(queries) or len(counts) != 1:
        raise ValueError(
            f"Each query must have as many candidates as the others, got {len(queries)} queries "
            f"and {len(texts)} lists of {sorted(counts)} candidates."
        )
    (count,) = counts
    repeated = [query for query in queries for _ in range(count)]
    flat = [document for each in texts for document in each]
    tokens = tokenizer.pairs(repeated, flat)
    return {name: value.reshape(-1, count, value.shape[1]) for name, value in tokens.items()}
