"""Losses over the score of a positive and the scores of its negatives.

Each is called as `loss(positive_scores (B,), negative_scores (B, N))` and returns a float32 scalar;
distillation losses take `teacher_scores (B, 1 + n)` as well, and the others raise ValueError if
they are given any. All of them ignore masked scores (`MASKED`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from polus.ir.scores import Representation, without_diagonal
from polus.types import Tensor

MASKED = -1e9
"""The score of a masked document.

Finite, since -inf times the zero gradient of a learned temperature is NaN.
"""


def _mean_of_unmasked(values: Any, negative_scores: Any) -> Any:
    counted = ops.cast(negative_scores > MASKED / 2, "float32")
    # Masked before the sum: a masked value squared may be infinite.
    total = ops.sum(ops.where(counted > 0, values, 0.0))
    return total / ops.maximum(ops.sum(counted), 1.0)


def _check_temperatures(**temperatures: float) -> None:
    for name, value in temperatures.items():
        if not value > 0:  # NaN isn't either
            raise ValueError(f"{name} must be positive, got {value}. Use 0.05 with cosines.")


class RetrievalLoss:
    """A callable loss, whose `trainable_variables` are trained along with the model."""

    trainable_variables: Sequence[keras.Variable] = ()


def _refuse(loss: RetrievalLoss, teacher_scores: Sequence[Any]) -> None:
    if teacher_scores:
        raise ValueError(
            f"{type(loss).__name__} takes no teacher_scores, but the batch has them. Use MarginMSE "
            "or TeacherKL, or leave them out: batches.teacher_scores = None for PairBatches."
        )


class InfoNCE(RetrievalLoss):
    """The cross-entropy of classifying the positive among the positive and its negatives.

    Oord et al. 2018, arXiv:1807.03748, equation 4; with in-batch negatives, Karpukhin et al. 2020,
    arXiv:2004.04906, equation 2.

    Args:
        temperature: The divisor of the scores. 0.05 suits cosines (SimCSE, arXiv:2104.08821);
            use 1 with plain inner products.
        learned: Whether to train the temperature, as the logarithm of its inverse, with the inverse
            clipped to 100 (Radford et al. 2021, arXiv:2103.00020, section 2.5).
    """

    def __init__(self, temperature: float = 0.05, learned: bool = False) -> None:
        _check_temperatures(temperature=temperature)
        self.temperature = temperature
        self.log_scale: keras.Variable | None = None
        if learned:
            start = np.float32(np.log(1 / temperature))
            self.log_scale = keras.Variable(start, dtype="float32", name="log_scale")
            self.trainable_variables = (self.log_scale,)

    def __call__(
        self, positive_scores: Tensor, negative_scores: Tensor, *teacher_scores: Tensor
    ) -> Tensor:
        _refuse(self, teacher_scores)
        scale = 1 / self.temperature
        if self.log_scale is not None:
            scale = ops.minimum(ops.exp(self.log_scale), 100.0)
        scores = ops.concatenate([positive_scores[:, None], negative_scores], axis=1) * scale
        result: Tensor = ops.mean(ops.logsumexp(scores, axis=1) - scores[:, 0])
        return result


class Symmetric(RetrievalLoss):
    """The mean of a loss from queries to documents and of the same loss from documents to queries.

    For a document, the other queries of the batch are the negatives (Radford et al. 2021,
    arXiv:2103.00020, section 2.3). Hard negatives count in the first direction only.

    Args:
        loss: A loss of positive and negative scores, such as `InfoNCE()`.
    """

    def __init__(self, loss: Callable[[Any, Any], Any]) -> None:
        self.loss = loss
        self.trainable_variables = tuple(getattr(loss, "trainable_variables", ()))

    def __call__(
        self, positive_scores: Tensor, negative_scores: Tensor, *teacher_scores: Tensor
    ) -> Tensor:
        _refuse(self, teacher_scores)
        size = positive_scores.shape[0]
        if len(positive_scores.shape) != 1 or negative_scores.shape[1] < size - 1:
            raise ValueError(
                "Symmetric must have scores (B,) and (B, N) with N at least B - 1, got the shapes "
                f"{tuple(positive_scores.shape)} and {tuple(negative_scores.shape)}. Inside "
                "Matryoshka, use Matryoshka(Symmetric(loss), ...)."
            )
        # The scores of the other documents, with the diagonal back in its place.
        others = ops.reshape(negative_scores[:, : size - 1], (size - 1, size))
        filled = ops.concatenate([ops.zeros((size - 1, 1)), others], axis=1)
        matrix = ops.reshape(ops.append(ops.reshape(filled, (-1,)), 0.0), (size, size))
        backward = self.loss(positive_scores, without_diagonal(ops.transpose(matrix)))
        result: Tensor = 0.5 * (self.loss(positive_scores, negative_scores) + backward)
        return result


class BinaryCrossEntropy(RetrievalLoss):
    """The cross-entropy of classifying each pair by itself, for the scores of a cross-encoder.

    Nogueira and Cho 2019, arXiv:1901.04085, equation 1. The mean over all pairs that aren't masked.
    """

    def __call__(
        self, positive_scores: Tensor, negative_scores: Tensor, *teacher_scores: Tensor
    ) -> Tensor:
        _refuse(self, teacher_scores)
        scores = ops.concatenate([-positive_scores[:, None], negative_scores], axis=1)
        result: Tensor = _mean_of_unmasked(ops.softplus(scores), scores)
        return result


class PairwiseHinge(RetrievalLoss):
    """The mean of `max(0, margin - positive + negative)` over all pairs.

    Joachims 2002 (RankSVM); Schroff et al. 2015, arXiv:1503.03832, equation 3, over similarities.
    The default margin is theirs for unit vectors, 0.2.
    """

    def __init__(self, margin: float = 0.2) -> None:
        self.margin = margin

    def __call__(
        self, positive_scores: Tensor, negative_scores: Tensor, *teacher_scores: Tensor
    ) -> Tensor:
        _refuse(self, teacher_scores)
        values = ops.relu(self.margin - positive_scores[:, None] + negative_scores)
        result: Tensor = _mean_of_unmasked(values, negative_scores)
        return result


class PairwiseLogistic(RetrievalLoss):
    """The mean of `log(1 + exp((negative - positive) / temperature))` over all pairs.

    Burges et al. 2005 (RankNet), equation 3 with a target probability of 1. The temperature is as
    in `InfoNCE`.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        _check_temperatures(temperature=temperature)
        self.temperature = temperature

    def __call__(
        self, positive_scores: Tensor, negative_scores: Tensor, *teacher_scores: Tensor
    ) -> Tensor:
        _refuse(self, teacher_scores)
        values = ops.softplus((negative_scores - positive_scores[:, None]) / self.temperature)
        result: Tensor = _mean_of_unmasked(values, negative_scores)
        return result


class MarginMSE(RetrievalLoss):
    """The squared error between the student's and the teacher's margins (positive minus negative).

    Hofstätter et al. 2020, arXiv:2010.02666, equation 8. `teacher_scores (B, 1 + n)` belong to the
    positive and the last n columns of `negative_scores`: with `n = k`, the query's hard negatives.
    """

    def __call__(
        self, positive_scores: Tensor, negative_scores: Tensor, teacher_scores: Tensor | None = None
    ) -> Tensor:
        negatives = _judged(negative_scores, teacher_scores)
        student = positive_scores[:, None] - negatives
        assert teacher_scores is not None  # or `_judged` has raised
        teacher = ops.cast(teacher_scores[:, :1] - teacher_scores[:, 1:], "float32")
        result: Tensor = _mean_of_unmasked(ops.square(student - teacher), negatives)
        return result


class TeacherKL(RetrievalLoss):
    """The KL divergence from the teacher's distribution over documents to the student's.

    Santhanam et al. 2022 (ColBERTv2), arXiv:2112.01488, section 3.2. `teacher_scores` are as in
    `MarginMSE`.

    Args:
        temperature: The divisor of the student's scores, as in `InfoNCE`.
        teacher_temperature: The divisor of the teacher's scores; 1 takes them as logits.
    """

    def __init__(self, temperature: float = 0.05, teacher_temperature: float = 1.0) -> None:
        _check_temperatures(temperature=temperature, teacher_temperature=teacher_temperature)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature

    def __call__(
        self, positive_scores: Tensor, negative_scores: Tensor, teacher_scores: Tensor | None = None
    ) -> Tensor:
        negatives = _judged(negative_scores, teacher_scores)
        student = ops.concatenate([positive_scores[:, None], negatives], axis=1)
        masked = student <= MASKED / 2
        teacher = ops.where(masked, MASKED, ops.cast(teacher_scores, "float32"))
        target = ops.softmax(teacher / self.teacher_temperature, axis=1)
        log_target = ops.log_softmax(teacher / self.teacher_temperature, axis=1)
        log_student = ops.log_softmax(student / self.temperature, axis=1)
        result: Tensor = ops.mean(ops.sum(target * (log_target - log_student), axis=1))
        return result


def _judged(negative_scores: Any, teacher_scores: Any) -> Any:
    """Returns the columns of `negative_scores` that the teacher has scored: the last ones."""
    if teacher_scores is None:
        raise ValueError(
            "A distillation loss needs teacher_scores, but the batch has none. Use batches (query, "
            'positive, negatives, {"teacher_scores": scores}), with scores (B, 1 + k), the '
            "positive first."
        )
    scored, available = teacher_scores.shape[1] - 1, negative_scores.shape[1]
    if scored < 1 or (available is not None and scored > available):
        raise ValueError(
            "teacher_scores must be (B, 1 + k), the positive first, got "
            f"{scored + 1} columns with {available} negatives."
        )
    return negative_scores[:, -scored:]


class Matryoshka(RetrievalLoss):
    """The sum of a loss over the first 64, 128, ... dimensions of the representations.

    Kusupati et al. 2022, arXiv:2205.13147, equation 1. Truncated vectors stay useful, so an index
    can be made smaller afterwards. Since it needs the representations, pass it twice:

        matryoshka = Matryoshka(InfoNCE(), cosine, [64, 128, 384])
        EfficientDenseRetrievalTrainer(model, matryoshka.compute_scores, loss=matryoshka, ...)

    Args:
        loss: Any loss of this module.
        compute_scores: Any scores of `polus.ir.scores`.
        dimensions: The truncated sizes, none larger than the representation.
        weights: The weight of the loss at each size; 1 each, as in the paper.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        compute_scores: Callable[..., tuple[Any, Any]],
        dimensions: Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> None:
        self.loss = loss
        self.dimensions = tuple(dimensions)
        if not self.dimensions or min(self.dimensions) < 1:
            raise ValueError(
                "dimensions must be the sizes to train, at least one of 1 or more, got "
                f"{list(self.dimensions)}. Use, for example, [64, 128, 384]."
            )
        self.weights = tuple(weights or [1.0] * len(self.dimensions))
        if len(self.weights) != len(self.dimensions):
            raise ValueError(
                "weights must have one weight for each of the dimensions "
                f"{list(self.dimensions)}, got {list(self.weights)}."
            )
        self._compute_scores = compute_scores
        self.trainable_variables = tuple(getattr(loss, "trainable_variables", ()))

    def compute_scores(self, *representations: Representation) -> tuple[Any, Any]:
        """Returns scores with a last axis for the D sizes: `(B, D)` and `(B, N, D)`."""
        size = keras.tree.flatten(representations[0])[0].shape[-1]
        if max(self.dimensions) > size:
            raise ValueError(
                f"dimensions must not exceed the size of a representation, {size}, got "
                f"{list(self.dimensions)}."
            )
        scores = [
            self._compute_scores(*[_truncated(each, length) for each in representations])
            for length in self.dimensions
        ]
        return ops.stack([each[0] for each in scores], -1), ops.stack(
            [each[1] for each in scores], -1
        )

    def __call__(
        self, positive_scores: Tensor, negative_scores: Tensor, *teacher_scores: Tensor
    ) -> Tensor:
        if len(positive_scores.shape) != 2:
            raise ValueError(
                "Matryoshka must have the scores of its own compute_scores, a column for each "
                f"size, got the shape {tuple(positive_scores.shape)}. Give the trainer both: "
                "compute_scores=matryoshka.compute_scores, loss=matryoshka."
            )
        losses = [
            weight * self.loss(positive_scores[..., i], negative_scores[..., i], *teacher_scores)
            for i, weight in enumerate(self.weights)
        ]
        result: Tensor = sum(losses)
        return result


def _truncated(representation: Any, length: int) -> Any:
    if isinstance(representation, (tuple, list)):  # late interaction: the mask stays as it is
        vectors, mask = representation
        return vectors[..., :length], mask
    return representation[..., :length]
