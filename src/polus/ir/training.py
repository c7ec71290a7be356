"""Training a dual encoder with the other documents of the batch as negatives."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from polus.backends import backend
from polus.backends.scopes import active_dry_run
from polus.core import function
from polus.data import as_arguments
from polus.ir.caching import GradientCache, vectors_of, with_vectors
from polus.ir.losses import MASKED
from polus.ir.scores import without_diagonal
from polus.training import BaseTrainer

METHODS = ("encode_query", "encode_document", "query_projection", "document_projection")
BESIDES = {"positive_ids", "relevant_ids", "negative_ids", "teacher_scores"}


class EfficientDenseRetrievalTrainer(BaseTrainer):
    """Trains `(query, document)` pairs: the documents of the other pairs are a query's negatives.

    It is efficient because the encoders are frozen: they run in inference mode and without
    gradients, and only the projections on top of them are trained. What is trained runs in training
    mode in a step (dropout, batch statistics), and in inference mode elsewhere.

    A batch is `(query, positive)` or `(query, positive, negatives)`, each a tensor or a dict of
    tensors, negatives with a second axis for the k negatives of each query. Last may stand a dict
    with any of

    - `"positive_ids"` (B,) int: which document each positive is; equal ones are never negatives;
    - `"relevant_ids"` (B, R) int: all documents relevant to each query, filled up with -1. None of
      them is a negative: its score is masked, in the batch and among the hard negatives;
    - `"negative_ids"` (B, k) int: which documents the negatives are, -1 where there is none;
    - `"teacher_scores"` (B, 1 + n): a third argument of the loss.

    Ids have 32 bits; row numbers will do.
    `polus.ir.data.PairBatches` makes such batches.

    ```python
    trainer = EfficientDenseRetrievalTrainer(
        DualEncoder(encoder), cosine, optimizer=keras.optimizers.Adam(3e-4), loss=InfoNCE()
    )
    trainer.train(PairBatches(queries, documents, relevant), epochs=10)
    ```

    Args:
        model: a `keras.Model` with `encode_query`, `encode_document`, `query_projection` and
            `document_projection`; see `polus.ir.models.DualEncoder`.
        compute_scores: `(queries, positives, *negatives) -> (positive_scores (B,), negative_scores
            (B, B - 1 + k))`; see `polus.ir.scores`. The columns are the batch's other documents in
            their order, then the query's own negatives.
        k_negatives: the number of own negatives that each query should bring. Batches may differ:
            all that came are used, and a batch without them is an error.
        trainable_weights: what is trained, less what is frozen; by default the projections, or with
            `freeze_encoder=False` all of the model. What the loss has (`trainable_variables`, a
            learned temperature) is trained as well.
        args, kwargs: as for `BaseTrainer`, from `optimizer` on. `post_process_prediction` is
            applied to each representation, `loss` is called with positive and negative scores.
        freeze_encoder: False trains the encoders as well, with dropout.
        encoded: whether batches hold what the encoders gave, from a `RepresentationStore`, so that
            the encoders are not run.
        micro_batch_size: with trained encoders, so many texts at a time are encoded, twice, and
            the gradient is that of the whole batch all the same (gradient caching, Gao et al. 2021,
            arXiv:2101.06983). Memory for activations is that of one such micro-batch. Losses that a
            layer adds while it runs (`add_loss`) don't count.
    """

    def __init__(
        self,
        model: keras.Model,
        compute_scores: Callable[..., tuple[Any, Any]],
        k_negatives: int = 0,
        trainable_weights: Sequence[keras.Variable] | None = None,
        *args: Any,
        freeze_encoder: bool = True,
        encoded: bool = False,
        micro_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if missing := [name for name in METHODS if not callable(getattr(model, name, None))]:
            raise TypeError(_without_methods(model, missing))
        super().__init__(model, *args, trainable_weights=trainable_weights, **kwargs)
        self.compute_scores = compute_scores
        self.k_negatives = k_negatives
        self.freeze_encoder = freeze_encoder
        self.encoded = encoded
        self.micro_batch_size = micro_batch_size
        self._check_settings()
        self._frozen: set[int] | None = None  # known from the first batch on
        self._represent_queries = function(self._represented_query)
        self._represent_documents = function(self._represented_document)

    # ------------------------------------------------------------------ what is trained

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """The variables that are trained; a frozen encoder's are never among them."""
        heads = self._heads()
        if self._trainable_weights is not None:
            weights = self._trainable_weights
        elif self.freeze_encoder and heads:
            weights = [weight for head in heads for weight in head.trainable_weights]
        elif self.encoded:
            raise ValueError(
                "query_projection and document_projection are no layers, so what they train is "
                "not known; say trainable_weights=[...]."
            )
        else:
            weights = self.model.trainable_weights
        return self._not_frozen([*weights, *self.loss_weights])

    @trainable_weights.setter
    def trainable_weights(self, weights: Sequence[keras.Variable] | None) -> None:
        self._trainable_weights = None if weights is None else list(weights)

    @property
    def loss_weights(self) -> list[keras.Variable]:
        """What the loss brings to be trained, such as a learned temperature."""
        return list(getattr(self.loss, "trainable_variables", ()))

    @property
    def changing_weights(self) -> list[keras.Variable]:
        """All that training may change: what is trained, and batch statistics and the like.

        Known once a batch was met, in a step or by `meet`.
        """
        return self._not_frozen([*self.model.weights, *self.trainable_weights])

    def meet(self, *inputs: Any) -> None:
        """Builds what isn't built yet, from one batch. Nothing is trained."""
        self._refresh()
        self._build(inputs)

    def _heads(self) -> list[keras.layers.Layer]:
        """The projections, where they are layers, so that their variables are known."""
        heads = [self.model.query_projection, self.model.document_projection]
        return heads if all(isinstance(head, keras.layers.Layer) for head in heads) else []

    def _not_frozen(self, variables: Sequence[keras.Variable]) -> list[keras.Variable]:
        """`variables`, each once, without those of a frozen encoder."""
        frozen: set[int] = set()
        if self.freeze_encoder and self._frozen is not None:
            frozen = self._frozen
        elif self.freeze_encoder and (heads := self._heads()):
            # No batch was met yet: whatever belongs to no projection is taken for the encoder's.
            own = {id(variable) for head in heads for variable in head.variables}
            frozen = {id(variable) for variable in self.model.variables} - own
        unique = {id(variable): variable for variable in variables}
        return [variable for key, variable in unique.items() if key not in frozen]

    def _made_of(self) -> list[Any]:
        settings = [self.freeze_encoder, self.encoded, self.micro_batch_size, self.compute_scores]
        return [*super()._made_of(), *settings]

    def _check_settings(self) -> None:
        if not self.freeze_encoder and self.encoded:
            raise ValueError(
                "encoded=True runs no encoder, so freeze_encoder=False has none to train; "
                "leave one of them out."
            )
        size = self.micro_batch_size
        if size is not None and (self.freeze_encoder or size < 1):
            raise ValueError(
                f"micro_batch_size={size} with freeze_encoder={self.freeze_encoder}: it is "
                "a positive number of texts, and saves memory where encoders are trained."
            )

    def _build(self, inputs: tuple[Any, ...]) -> None:
        _check_ids(_besides(inputs))  # here, where JAX has not cut them to 32 bits yet
        if self._built:
            return
        self._check_settings()
        if self.encoded:
            # No encoder runs, so a frozen one's weights are those that a step does not meet.
            met = backend.trace(
                lambda *x: self.loss(*as_arguments(self._forward(*x))), inputs
            ).variables
            known = {id(variable) for variable in self.model.variables}
            self._frozen = known - {id(variable) for variable in met}
        elif self.freeze_encoder:
            met = backend.trace(self.forward_without_grads, inputs).variables
            self._frozen = {id(variable) for variable in met}
        super()._build(inputs)
        if self.micro_batch_size is not None:
            # All that is met, and not what the model holds: a layer may draw from Keras' own seed.
            met = backend.trace(self._forward, self._few(inputs)).variables
            state = [variable for variable in met if not variable.trainable]
            self._cache = GradientCache(self.micro_batch_size, self.trainable_weights, state)

    def _forward(self, *inputs: Any) -> Any:
        return self.forward_with_grads(*self.forward_without_grads(*inputs))

    def _few(self, inputs: tuple[Any, ...]) -> Any:
        """A part of a batch, which meets all variables as well."""
        return keras.tree.map_structure(lambda x: x[: self.micro_batch_size], inputs)

    # ------------------------------------------------------------------ the step

    def forward_without_grads(self, *inputs: Any) -> Any:
        """The frozen encoders' vectors, or with trained encoders the batch as it is."""
        *texts, besides = self._parts(inputs)
        if self.freeze_encoder and not self.encoded:
            encode = (self._encode_query, self._encode_document, self._encode_negatives)
            texts = [f(text) for f, text in zip(encode, texts, strict=False)]
        return *texts, besides

    def forward_with_grads(self, *inputs: Any) -> Any:
        """Positive and negative scores, what is relevant masked, and a teacher's if there are."""
        *texts, besides = inputs
        if not self.freeze_encoder:
            encode = (self._encode_query, self._encode_document, self._encode_negatives)
            texts = [f(text, True) for f, text in zip(encode, texts, strict=False)]
        project = (self._project_query, self._project_document, self._project_negatives)
        return self._scores(
            [f(vectors, True) for f, vectors in zip(project, texts, strict=False)], besides
        )

    def train_step(self, *inputs: Any) -> Any:
        """One update; with `micro_batch_size`, the same one in little memory."""
        if self.micro_batch_size is None:
            return super().train_step(*inputs)
        if (dry_run := active_dry_run()) is not None:
            result = super().train_step(*self._few(inputs))
            dry_run.record_scratch(self._cache.totals if self._built else ())
            return result
        loss, gradients = self._cached_gradients(inputs)
        weights = self.trainable_weights

        def surrogate() -> dict[str, Any]:
            # Its gradients are those that were computed; its value is not the loss, and infinite
            # where a gradient is.
            products = [
                ops.sum(weight * gradient)
                for weight, gradient in zip(weights, gradients, strict=True)
                if gradient is not None
            ]
            total = sum(products, ops.zeros(()))
            penalties = sum(self.model.losses)
            return {"loss": total + penalties, "recorded": loss + penalties}

        result = self.minimize(surrogate, weights, self.optimizer)["recorded"]
        self.step_counter.assign_add(1)
        return result

    def metric_samples(self, *outputs: Any) -> tuple[Any, ...]:
        """The positive's place, 0, and the scores with the positive's first: a classification."""
        positive, negative, *_ = outputs
        if len(positive.shape) == 2:  # Matryoshka: the last, longest representation
            positive, negative = positive[..., -1], negative[..., -1]
        scores = ops.concatenate([positive[:, None], negative], axis=1)
        return ops.zeros_like(scores[:, 0], dtype="int32"), scores

    def evaluation_step(self, *inputs: Any) -> tuple[Any, ...]:
        """As `metric_samples`, of a batch in inference mode."""
        *texts, besides = self._parts(inputs)
        represent = (
            self._represented_query,
            self._represented_document,
            self._represented_negatives,
        )
        return self.metric_samples(
            *self._scores([f(text) for f, text in zip(represent, texts, strict=False)], besides)
        )

    # ------------------------------------------------------------------ for search

    def represent_queries(self, inputs: Any) -> Any:
        """The representations of a batch of queries, in inference mode."""
        return self._represent_queries(inputs)

    def represent_documents(self, inputs: Any) -> Any:
        """The representations of a batch of documents, in inference mode."""
        return self._represent_documents(inputs)

    # ------------------------------------------------------------------ how it is done

    def _parts(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Query, positive, perhaps negatives, and the dict of what stands besides."""
        besides = _besides(inputs)
        texts = inputs[:-1] if besides else inputs
        if len(texts) not in (2, 3):
            raise ValueError(
                f"A batch has {len(texts)} parts of texts; give (query, positive) or (query, "
                f"positive, negatives), and last, if at all, a dict of {sorted(BESIDES)}."
            )
        if self.k_negatives and len(texts) == 2:
            raise ValueError(
                f"k_negatives is {self.k_negatives}, and a batch came without negatives; give "
                "(query, positive, negatives), or leave k_negatives out."
            )
        _check_shapes(texts, besides)
        return *texts, besides

    def _encode_query(self, inputs: Any, training: bool = False) -> Any:
        return _encoded(self.model.encode_query, inputs, training)

    def _encode_document(self, inputs: Any, training: bool = False) -> Any:
        return _encoded(self.model.encode_document, inputs, training)

    def _encode_negatives(self, inputs: Any, training: bool = False) -> Any:
        flat, shape = _flat(inputs)
        return _unflat(self._encode_document(flat, training), shape)

    def _project_query(self, vectors: Any, training: bool = False) -> Any:
        return self.predicted(_called(self.model.query_projection, vectors, training))

    def _project_document(self, vectors: Any, training: bool = False) -> Any:
        return self.predicted(_called(self.model.document_projection, vectors, training))

    def _project_negatives(self, vectors: Any, training: bool = False) -> Any:
        flat, shape = _flat(vectors)
        return _unflat(self._project_document(flat, training), shape)

    def _represented_query(self, inputs: Any, training: bool = False) -> Any:
        vectors = inputs if self.encoded else self._encode_query(inputs, training)
        return self._project_query(vectors, training)

    def _represented_document(self, inputs: Any, training: bool = False) -> Any:
        vectors = inputs if self.encoded else self._encode_document(inputs, training)
        return self._project_document(vectors, training)

    def _represented_negatives(self, inputs: Any) -> Any:
        flat, shape = _flat(inputs)
        return _unflat(self._represented_document(flat), shape)

    def _scores(self, representations: Sequence[Any], besides: dict[str, Any]) -> tuple[Any, ...]:
        found = self.compute_scores(*representations)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise ValueError(
                f"compute_scores returned {found}; return the pair (positive_scores (B,), "
                "negative_scores (B, B - 1 + k)), as polus.ir.scores does."
            )
        # Neither -1e9 for a masked score nor a sum of exponentials fits in half precision.
        positive, negative = (ops.cast(each, "float32") for each in found)
        own = sum(vectors_of(each).shape[1] for each in representations[2:])
        if (mask := _relevant(besides, negative.shape[1], own)) is not None:
            if len(negative.shape) == 3:  # Matryoshka: one score for each length
                mask = mask[..., None]
            negative = ops.where(mask, MASKED, negative)
        teacher = [besides["teacher_scores"]] if "teacher_scores" in besides else []
        return positive, negative, *teacher

    def _cached_gradients(self, inputs: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        """The loss of a batch and its gradients, one micro-batch of activations at a time."""
        *texts, besides = self._parts(inputs)
        shape = None
        if len(texts) == 3:
            texts[2], shape = _flat(texts[2])
        functions = (
            self._represented_query,
            self._represented_document,
            self._represented_document,
        )
        represent = [functools.partial(f, training=True) for f in functions[: len(texts)]]
        representations, start = self._cache.forward(represent, texts)
        vectors = [vectors_of(each) for each in representations]

        def outputs(*vectors: Any) -> tuple[Any, ...]:
            whole = [with_vectors(r, v) for r, v in zip(representations, vectors, strict=True)]
            if shape is not None:
                whole[2] = _unflat(whole[2], shape)
            return self._scores(whole, besides)

        scale = self.optimizer.scale_loss
        _, by_vectors = backend.value_and_input_grad(
            lambda *vectors: scale(self.loss(*outputs(*vectors))), vectors
        )
        found = outputs(*vectors)
        loss, by_loss_weights = self.loss(*found), []
        if self.loss_weights:
            _, by_loss_weights = backend.value_and_grad(
                lambda: scale(self.loss(*found)), self.loss_weights
            )
        for metric in self.metrics:
            metric.samples_from_batch(self.metric_samples(*found))

        weights = self.trainable_weights
        gradients = self._cache.backward(represent, texts, by_vectors, start)
        place = {id(weight): i for i, weight in enumerate(weights)}
        for weight, gradient in zip(self.loss_weights, by_loss_weights, strict=True):
            gradients[place[id(weight)]] = gradient
        unscale = 1 / scale(ops.ones(()))
        return loss, [None if g is None else g * ops.cast(unscale, g.dtype) for g in gradients]


def _encoded(method: Callable[..., Any], inputs: Any, training: bool) -> Any:
    """As `_called`, but an encoder that is trained must be told so."""
    if training and not _takes_training(method):
        raise TypeError(
            f"{getattr(method, '__qualname__', method)} takes no argument training, so an encoder "
            "that is trained would run in inference mode. Write def encode_query(self, inputs, "
            "training=False): return self.encoder(inputs, training=training)"
        )
    return _called(method, inputs, training)


def _called(method: Callable[..., Any], inputs: Any, training: bool) -> Any:
    """`method(inputs)` in the mode asked for; one without `training` runs as Keras has it."""
    return method(inputs, training=training) if _takes_training(method) else method(inputs)


def _takes_training(method: Callable[..., Any]) -> bool:
    """Whether it can be called with `training=`, as each layer can (`*args, **kwargs`)."""
    parameters = inspect.signature(method).parameters
    return "training" in parameters or any(
        each.kind is each.VAR_KEYWORD for each in parameters.values()
    )


def _flat(inputs: Any) -> tuple[Any, tuple[Any, Any]]:
    """Negatives (B, k, ...) as (B * k, ...), and what `_unflat` needs."""
    first = ops.shape(keras.tree.flatten(inputs)[0])
    flat = keras.tree.map_structure(
        lambda x: ops.reshape(x, (first[0] * first[1], *ops.shape(x)[2:])), inputs
    )
    return flat, (first[0], first[1])


def _unflat(vectors: Any, shape: tuple[Any, Any]) -> Any:
    return keras.tree.map_structure(lambda x: ops.reshape(x, (*shape, *ops.shape(x)[1:])), vectors)


def _besides(inputs: Sequence[Any]) -> dict[str, Any]:
    """The dict of ids and the like that may stand last in a batch; empty where there is none."""
    last = inputs[-1] if inputs else None
    return last if isinstance(last, dict) and BESIDES.issuperset(last) else {}


def _check_shapes(texts: Sequence[Any], besides: dict[str, Any]) -> None:
    shapes = [tuple(keras.tree.flatten(text)[0].shape) for text in texts]
    size = shapes[0][0]
    if any(shape[0] != size for shape in shapes):
        raise ValueError(
            f"Queries, positives and negatives have the shapes {shapes}: each query has one "
            "positive, so the first axes must be equal."
        )
    if len(texts) == 3 and len(shapes[2]) != len(shapes[1]) + 1:
        raise ValueError(
            f"The third part of the batch has the shape {shapes[2]}, where positives have "
            f"{shapes[1]}: negatives have one axis more, (B, k, ...). If it is a dict of what "
            f"stands besides, its keys can be {sorted(BESIDES)}."
        )
    _check_ids(besides)
    for name, value in besides.items():
        axes = 1 if name == "positive_ids" else 2
        if len(value.shape) != axes or value.shape[0] != size:
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}, in a batch of {size} queries; give "
                f"({size}{', n' if axes == 2 else ','})."
            )


def _check_ids(besides: dict[str, Any]) -> None:
    for name, value in besides.items():
        if not hasattr(value, "dtype"):
            raise ValueError(
                f"{name} came as a {type(value).__name__}; give an array or a tensor, such as "
                f"np.array({name})."
            )
        if name == "teacher_scores":
            continue
        dtype, came = getattr(value.dtype, "name", str(value.dtype)), None
        if "int" not in dtype:
            came = f"the dtype {dtype}"
        elif isinstance(value, np.ndarray) and value.size:  # a tensor in a step has no values yet
            low, high = int(value.min()), int(value.max())
            if low < -(2**31) or high >= 2**31:
                came = f"numbers from {low} to {high}"
        if came is not None:
            raise ValueError(
                f"{name} has {came}; ids of documents are whole numbers of 32 bits, since JAX "
                "compares no more. Give row numbers: {id: row for row, id in "
                "enumerate(document_ids)} tells them, and polus.ir.data.PairBatches makes such "
                "batches."
            )


def _relevant(besides: dict[str, Any], columns: int, own: int) -> Any:
    """Which of the negative scores belong to relevant documents; None where no id is known."""
    if "positive_ids" not in besides:
        if {"relevant_ids", "negative_ids"} & besides.keys():
            raise ValueError(
                f"A batch has {sorted(besides)} and no 'positive_ids', so it is not known which of "
                "its documents are meant; add them."
            )
        return None
    positive = besides["positive_ids"]
    if columns != positive.shape[0] - 1 + own:
        raise ValueError(
            f"compute_scores returned {columns} negative scores per query, and the batch has "
            f"{positive.shape[0] - 1 + own} negatives: B - 1 + k. Return the other documents' "
            "scores in their order, then the query's own negatives'; "
            "polus.ir.scores.InBatchScores does so."
        )
    relevant = positive[:, None]
    if "relevant_ids" in besides:
        others = ops.cast(besides["relevant_ids"], relevant.dtype)
        relevant = ops.concatenate([relevant, others], axis=1)
    clash = ops.any(ops.equal(relevant[:, None, :], positive[None, :, None]), axis=-1)
    if "negative_ids" in besides:
        ids = ops.cast(besides["negative_ids"], relevant.dtype)
        judged = ops.any(ops.equal(relevant[:, None, :], ids[:, :, None]), axis=-1)
        judged = ops.logical_or(judged, ids < 0)
    else:
        judged = ops.zeros((positive.shape[0], own), "bool")
    return ops.concatenate([without_diagonal(clash), judged], axis=1)


def _without_methods(model: Any, missing: list[str]) -> str:
    return f"""{type(model).__name__} has no {", ".join(missing)}.
Use polus.ir.models.DualEncoder(encoder), which has the projections as well, or write

@keras.saving.register_keras_serializable()
class MyDualEncoder(polus.ir.models.DualEncoder):
    def encode_query(self, inputs, training=False):
        return self.query_encoder(inputs, training=training)

    def encode_document(self, inputs, training=False):
        return self.document_encoder(inputs, training=training)"""
