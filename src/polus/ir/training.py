"""Trains a dual encoder with the other documents of the batch as negatives."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from polus.backends import backend
from polus.backends.base import as_arguments
from polus.backends.scopes import active_dry_run
from polus.core import gather
from polus.ir.batch import (
    check_ids,
    extras_of,
    first_rows,
    flatten_negatives,
    relevant_mask,
    split_batch,
    teacher_scores,
    unflatten_negatives,
)
from polus.ir.caching import GradientCache, vectors_of
from polus.ir.losses import MASKED
from polus.ir.scores import Representation
from polus.ir.towers import CompiledTowers, Towers, check_methods, projection_layers
from polus.steps.update import apply_gradients
from polus.training import BaseTrainer


class EfficientDenseRetrievalTrainer(BaseTrainer):
    """Trains on pairs `(query, document)`, with the batch's other documents as negatives.

    It is efficient because the encoders are frozen: they run in inference mode and without
    gradients, and only the projections on top of them are trained. What is trained runs in training
    mode during a step (dropout, batch statistics), and in inference mode elsewhere.

    A batch is `(query, positive)` or `(query, positive, negatives)`. Each part is a tensor or a
    dict of tensors; negatives have a second axis for the k hard negatives of each query. A dict of
    extras may come last, with any of

    - `"relevant_mask"` (B, B + k) bool: True for documents that are no negatives of a query. The
      columns are the positives of the batch in order, then the query's hard negatives. It takes the
      place of ids.
    - `"positive_ids"` (B,) int: The document id of each positive. Equal ids are never negatives.
    - `"relevant_ids"` (B, R) int: All documents relevant to each query, padded with -1. They are
      masked, both among the batch's other documents and among the hard negatives.
    - `"negative_ids"` (B, k) int: The document ids of the hard negatives, -1 for padding.
    - `"teacher_scores"` (B, 1 + n): The third argument of the loss.

    Ids have 32 bits; row numbers will do. `polus.ir.data.PairBatches` makes such batches.

    ```python
    trainer = EfficientDenseRetrievalTrainer(
        DualEncoder(encoder), cosine, optimizer=keras.optimizers.Adam(3e-4), loss=InfoNCE()
    )
    trainer.train(PairBatches(queries, documents, relevant), epochs=10)
    ```

    Args:
        model: A `keras.Model` with `encode_query`, `encode_document`, `query_projection` and
            `document_projection`, such as `polus.ir.models.DualEncoder`.
        compute_scores: Maps `(queries, positives, *negatives)` to `(positive_scores (B,),
            negative_scores (B, B - 1 + k))`; see `polus.ir.scores`. The columns are the batch's
            other documents in order, then the query's hard negatives.
        k_negatives: The expected number of hard negatives per query. A batch without any raises.
            Batches may differ: all negatives that a batch has are used.
        trainable_weights: The variables to train, of which frozen ones are left out. Defaults to
            the projections, or with `freeze_encoder=False` to the whole model. The variables of the
            loss (`trainable_variables`, such as a learned temperature) are always trained.
        args: As for `BaseTrainer`, from `optimizer` on.
        freeze_encoder: If False, the encoders are trained as well, with dropout.
        encoded: Batches hold the encoders' vectors, from a `RepresentationStore`, so the encoders
            don't run.
        micro_batch_size: With trained encoders, the number of texts encoded at a time. Each is
            encoded twice, and the gradient is still that of the whole batch (gradient caching, Gao
            et al. 2021, arXiv:2101.06983). Activations take the memory of one micro-batch. Losses
            that a layer adds during its call (`add_loss`) are ignored.
        kwargs: As for `BaseTrainer`. `post_process_prediction` is applied to each representation,
            `loss` is called with positive and negative scores.

    Raises:
        TypeError: If the model lacks one of the four methods, or `compute_scores` isn't a function.
        ValueError: If `encoded`, `freeze_encoder` and `micro_batch_size` contradict each other.
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
        check_methods(model)
        if not callable(compute_scores):
            raise TypeError(
                "compute_scores must be a function of representations, such as "
                f"polus.ir.scores.cosine, got {compute_scores!r}."
            )
        super().__init__(model, *args, trainable_weights=trainable_weights, **kwargs)
        self.compute_scores = compute_scores
        self.k_negatives = k_negatives
        self.freeze_encoder = freeze_encoder
        self.encoded = encoded
        self.micro_batch_size = micro_batch_size
        _check_settings(freeze_encoder, encoded, micro_batch_size)
        self._retrieval = _Prepared()

    # ------------------------------------------------------------------ trainable variables

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """The variables to train, never those of a frozen encoder."""
        projections = projection_layers(self.model)
        explicit = self.explicit_trainable_weights
        if explicit is not None:
            weights = explicit
        elif self.freeze_encoder and projections:
            weights = [w for projection in projections for w in projection.trainable_weights]
        elif self.encoded:
            raise ValueError(
                "trainable_weights must be given if query_projection and document_projection "
                "aren't layers, since the variables that they train are unknown. Use "
                "trainable_weights=[...]."
            )
        else:
            weights = self.model.trainable_weights
        return self._without_frozen([*weights, *self.loss_weights])

    @trainable_weights.setter
    def trainable_weights(self, weights: Sequence[keras.Variable] | None) -> None:
        self.set_trainable_weights(weights)

    @property
    def loss_weights(self) -> list[keras.Variable]:
        """The trainable variables of the loss, such as a learned temperature."""
        return list(getattr(self.loss, "trainable_variables", ()))

    @property
    def changing_weights(self) -> list[keras.Variable]:
        """All variables that training may change, batch statistics included.

        Known from the first batch on, be it in a step or in `build_on`.
        """
        return self._without_frozen([*self.model.weights, *self.trainable_weights])

    def _without_frozen(self, variables: Sequence[keras.Variable]) -> list[keras.Variable]:
        """Removes duplicates and a frozen encoder's variables."""
        unique = {id(variable): variable for variable in variables}
        frozen = self._frozen_ids() if self.freeze_encoder else frozenset()
        return [variable for key, variable in unique.items() if key not in frozen]

    def _frozen_ids(self) -> frozenset[int]:
        if self._retrieval.model is self.model:
            return self._retrieval.frozen
        # Before the first batch: assume that what isn't in a projection belongs to the encoder.
        projections = projection_layers(self.model)
        projected = {id(v) for projection in projections for v in projection.variables}
        everything = {id(v) for v in self.model.variables} if projections else set()
        return frozenset(everything - projected)

    def step_parts(self) -> list[Any]:
        """Returns the objects that a compiled step is made of."""
        return [*super().step_parts(), self.compute_scores]

    def prepare_step(self, *inputs: Any, **kwargs: Any) -> None:
        """Finds the frozen encoder's variables, and allocates the gradient cache."""
        super().prepare_step(*inputs)
        check_ids(extras_of(inputs))  # here, before JAX truncates them to 32 bits
        _check_settings(self.freeze_encoder, self.encoded, self.micro_batch_size)
        frozen: set[int] = set()
        if self.encoded:
            # The encoder doesn't run: a frozen encoder's variables are those that a step never
            # reads.
            seen = backend.trace(lambda *x: self.loss(*as_arguments(self._forward(*x))), inputs)
            frozen = {id(v) for v in self.model.variables} - {id(v) for v in seen.variables}
        elif self.freeze_encoder:
            seen = backend.trace(self.forward_without_grads, inputs)
            frozen = {id(v) for v in seen.variables}
        self._retrieval = _Prepared(self.model, frozenset(frozen))
        if self.micro_batch_size is not None:
            # What the step reads, not what the model holds: a layer may draw from Keras' own seed.
            seen = backend.trace(self._forward, first_rows(inputs, self.micro_batch_size))
            state = [variable for variable in seen.variables if not variable.trainable]
            cache = GradientCache(self.micro_batch_size, self.trainable_weights, state)
            self._retrieval = dataclasses.replace(self._retrieval, cache=cache)

    # ------------------------------------------------------------------ the step

    def forward_without_grads(self, *inputs: Any) -> Any:
        """Runs frozen encoders; returns `(*texts, extras)`."""
        texts, extras = self._split(inputs)
        return *(self._towers().encode(texts) if self.freeze_encoder else texts), extras

    def forward_with_grads(self, *inputs: Any) -> Any:
        """Runs what is trained; returns positive and negative scores, and a teacher's if given."""
        *texts, extras = inputs
        towers = self._towers()
        vectors = texts if self.freeze_encoder else towers.encode(texts, training=True)
        return self._score(towers.project(vectors, training=True), extras)

    def train_step(self, *inputs: Any) -> Any:
        """Does one update; with `micro_batch_size`, the same one in less memory."""
        if self.micro_batch_size is None:
            return super().train_step(*inputs)
        if (dry_run := active_dry_run()) is not None:
            result = super().train_step(*first_rows(inputs, self.micro_batch_size))
            if self._retrieval.cache is not None:
                dry_run.record_scratch(self._retrieval.cache.totals.variables)
            return result
        loss, gradients = self._cached_gradients(inputs)
        weights = self.trainable_weights
        if self.model.losses:
            penalty, by_weights = backend.value_and_grad(lambda: sum(self.model.losses), weights)
            gradients = [_plus(a, b) for a, b in zip(gradients, by_weights, strict=True)]
            loss = loss + penalty
        apply_gradients([(self.optimizer, gradients, weights)], self.post_process_grads)
        self.step_counter.assign_add(1)
        return loss

    def metric_samples(self, *outputs: Any) -> tuple[Any, ...]:
        """Returns `(y_true, y_pred)` of a classification: the positive is class 0."""
        own_rows = backend.placement().own_rows  # each example counts in one replica
        positive, negative, *_ = map(own_rows, outputs)
        if len(positive.shape) == 2:  # Matryoshka: use the last, longest representation
            positive, negative = positive[..., -1], negative[..., -1]
        scores = ops.concatenate([positive[:, None], negative], axis=1)
        return ops.zeros_like(scores[:, 0], dtype="int32"), scores

    def evaluation_step(self, *inputs: Any) -> tuple[Any, ...]:
        """Returns the same as `metric_samples`, in inference mode."""
        texts, extras = self._split(inputs)
        towers = self._towers()
        return self.metric_samples(*self._score(towers.project(towers.encode(texts)), extras))

    # ------------------------------------------------------------------ for search

    def represent_queries(self, inputs: object) -> Representation:
        """Returns the representations of a batch of queries, in inference mode."""
        return self._retrieval.programs.represent(self._towers(), "query", inputs)

    def represent_documents(self, inputs: object) -> Representation:
        """Returns the representations of a batch of documents, in inference mode."""
        return self._retrieval.programs.represent(self._towers(), "document", inputs)

    # ------------------------------------------------------------------ parts of the step

    def _towers(self) -> Towers:
        return Towers(self.model, self.encoded, self.predicted)

    def _split(self, inputs: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
        return split_batch(inputs, self.k_negatives > 0, backend.placement().parts)

    def _forward(self, *inputs: Any) -> Any:
        return self.forward_with_grads(*self.forward_without_grads(*inputs))

    def _score(self, representations: Sequence[Any], extras: dict[str, Any]) -> tuple[Any, ...]:
        """Returns the loss's arguments: scores with relevant documents masked, and a teacher's.

        Replicas that have a part of the batch each score the whole batch.
        """
        representations = keras.tree.map_structure(gather, representations)
        extras = {name: gather(value) for name, value in extras.items()}
        found = self.compute_scores(*representations)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise ValueError(
                "compute_scores must return a pair (positive_scores (B,), negative_scores (B, B - "
                f"1 + k)), as polus.ir.scores does, got {found}."
            )
        # Neither -1e9 for a masked score nor a sum of exponentials fits in half precision.
        positive, negative = (ops.cast(each, "float32") for each in found)
        num_hard_negatives = sum(vectors_of(each).shape[1] for each in representations[2:])
        mask = relevant_mask(extras, negative.shape[1], num_hard_negatives)
        if mask is not None:
            if len(negative.shape) == 3:  # Matryoshka: one score for each length
                mask = mask[..., None]
            negative = ops.where(mask, MASKED, negative)
        teacher = teacher_scores(extras, negative.shape[1], num_hard_negatives)
        return positive, negative, *teacher

    def _cached_gradients(self, inputs: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        """Returns a batch's loss and gradients, with the activations of one micro-batch."""
        texts, extras = self._split(inputs)
        shape = None
        if len(texts) == 3:
            texts[2], shape = flatten_negatives(texts[2])
        query, document = (
            functools.partial(fn, training=True)
            for fn in (self._towers().represent_query, self._towers().represent_document)
        )

        def loss_fn(representations: list[Any]) -> tuple[Any, tuple[Any, ...]]:
            if shape is not None:
                negatives = unflatten_negatives(representations[2], shape)
                representations = [*representations[:2], negatives]
            outputs = self._score(representations, extras)
            return self.loss(*outputs), outputs

        assert self._retrieval.cache is not None  # built before the step is traced
        loss, outputs, gradients = self._retrieval.cache.value_and_grad(
            [query, document, document][: len(texts)],
            texts,
            loss_fn,
            self.loss_weights,
            self.optimizer.scale_loss,
        )
        for metric in self.metrics:
            metric.samples_from_batch(self.metric_samples(*outputs))
        return loss, gradients


def _plus(gradient: Any, other: Any) -> Any:
    """Adds two gradients, either of which may be None."""
    if gradient is None or other is None:
        return other if gradient is None else gradient
    return gradient + other


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What a trainer has found out from its first batch. Replaced as a whole, never changed."""

    model: keras.Model | None = None
    """The model that it was found out about."""
    frozen: frozenset[int] = frozenset()
    """The ids of the frozen encoder's variables."""
    cache: GradientCache | None = None
    programs: CompiledTowers = dataclasses.field(default_factory=CompiledTowers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Prepared":
        return _Prepared()  # a copied trainer has variables of its own


def _check_settings(freeze_encoder: bool, encoded: bool, micro_batch_size: int | None) -> None:
    if not freeze_encoder and encoded:
        raise ValueError(
            "encoded=True and freeze_encoder=False contradict each other: with encoded=True no "
            "encoder runs that could be trained. Leave one of them out."
        )
    if micro_batch_size is not None and (freeze_encoder or micro_batch_size < 1):
        raise ValueError(
            "micro_batch_size must be a positive integer, used with freeze_encoder=False to save "
            f"memory while encoders are trained, got micro_batch_size={micro_batch_size} with "
            f"freeze_encoder={freeze_encoder}."
        )
