"""Losses over a positive's score and its negatives' scores.

Each is called as `loss(positive_scores (B,), negative_scores (B, N))`, those that learn from a
teacher with `teacher_scores (B, 1 + n)` as well, and gives a float32 scalar. A score that is masked
(`MASKED`) takes no part in any of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

MASKED = -1e9
"""What stands for the score of a document that is no negative.

Finite, since -inf times the zero gradient of a learned temperature is NaN.
"""


def _mean_of_unmasked(values: Any, negative_scores: Any) -> Any:
    counted = ops.cast(negative_scores > MASKED / 2, "float32")
    # where before the product: a masked value squared may be infinite.
    total = ops.sum(ops.where(counted > 0, values, 0.0))
    return total / ops.maximum(ops.sum(counted), 1.0)


class RetrievalLoss:
    """A callable loss; `trainable_variables` are what the trainer trains besides the model."""

    trainable_variables: Sequence[keras.Variable] = ()


class InfoNCE(RetrievalLoss):
    """Cross-entropy of picking the positive out of the positive and its negatives.

    Oord et al. 2018, arXiv:1807.03748, equation 4; with the documents of the batch as negatives,
    Karpukhin et al. 2020, arXiv:2004.04906, equation 2.

    Args:
        temperature: scores are divided by it. 0.05 suits cosines (SimCSE, arXiv:2104.08821);
            with plain inner products use 1.
        learned: whether the temperature is trained, as the logarithm of its inverse with the
            inverse held at or below 100 (Radford et al. 2021, arXiv:2103.00020, section 2.5).
    """

    def __init__(self, temperature: float = 0.05, learned: bool = False) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it divides the scores: give one > 0.")
        self.temperature = temperature
        self.log_scale: keras.Variable | None = None
        if learned:
            start = np.float32(np.log(1 / temperature))
            self.log_scale = keras.Variable(start, dtype="float32", name="log_scale")
            self.trainable_variables = (self.log_scale,)

    def __call__(self, positive_scores: Any, negative_scores: Any) -> Any:
        scale = 1 / self.temperature
        if self.log_scale is not None:
            scale = ops.minimum(ops.exp(self.log_scale), 100.0)
        scores = ops.concatenate([positive_scores[:, None], negative_scores], axis=1) * scale
        return ops.mean(ops.logsumexp(scores, axis=1) - scores[:, 0])


class PairwiseHinge(RetrievalLoss):
    """`max(0, margin - positive + negative)`, the mean over all pairs.

    Joachims 2002 (RankSVM); Schroff et al. 2015, arXiv:1503.03832, equation 3, over similarities,
    whose margin of 0.2 for vectors of length one is the default.
    """

    def __init__(self, margin: float = 0.2) -> None:
        self.margin = margin

    def __call__(self, positive_scores: Any, negative_scores: Any) -> Any:
        values = ops.relu(self.margin - positive_scores[:, None] + negative_scores)
        return _mean_of_unmasked(values, negative_scores)


class PairwiseLogistic(RetrievalLoss):
    """`log(1 + exp((negative - positive) / temperature))`, the mean over all pairs.

    Burges et al. 2005 (RankNet), equation 3 with a target probability of 1. The temperature is
    that of `InfoNCE`.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        self.temperature = temperature

    def __call__(self, positive_scores: Any, negative_scores: Any) -> Any:
        values = ops.softplus((negative_scores - positive_scores[:, None]) / self.temperature)
        return _mean_of_unmasked(values, negative_scores)


class MarginMSE(RetrievalLoss):
    """Squared error between the student's and the teacher's margin, positive minus negative.

    Hofstätter et al. 2020, arXiv:2010.02666, equation 8. `teacher_scores (B, 1 + n)` are the
    teacher's for the positive and for the last n columns of `negative_scores`: with `n = k` the
    query's own negatives.
    """

    def __call__(
        self, positive_scores: Any, negative_scores: Any, teacher_scores: Any = None
    ) -> Any:
        negatives = _judged(negative_scores, teacher_scores)
        student = positive_scores[:, None] - negatives
        teacher = ops.cast(teacher_scores[:, :1] - teacher_scores[:, 1:], "float32")
        return _mean_of_unmasked(ops.square(student - teacher), negatives)


class TeacherKL(RetrievalLoss):
    """Kullback-Leibler divergence from the teacher's distribution over documents to the student's.

    Santhanam et al. 2022 (ColBERTv2), arXiv:2112.01488, section 3.2. Which columns
    `teacher_scores` stand for: see `MarginMSE`.

    Args:
        temperature: divides the student's scores (that of `InfoNCE`).
        teacher_temperature: divides the teacher's; 1 takes them as logits.
    """

    def __init__(self, temperature: float = 0.05, teacher_temperature: float = 1.0) -> None:
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature

    def __call__(
        self, positive_scores: Any, negative_scores: Any, teacher_scores: Any = None
    ) -> Any:
        negatives = _judged(negative_scores, teacher_scores)
        student = ops.concatenate([positive_scores[:, None], negatives], axis=1)
        masked = student <= MASKED / 2
        teacher = ops.where(masked, MASKED, ops.cast(teacher_scores, "float32"))
        target = ops.softmax(teacher / self.teacher_temperature, axis=1)
        log_target = ops.log_softmax(teacher / self.teacher_temperature, axis=1)
        log_student = ops.log_softmax(student / self.temperature, axis=1)
        return ops.mean(ops.sum(target * (log_target - log_student), axis=1))


def _judged(negative_scores: Any, teacher_scores: Any) -> Any:
    """The columns of `negative_scores` that the teacher has scored: the last ones."""
    if teacher_scores is None:
        raise ValueError(
            "This loss learns from a teacher, and the batch has no scores of one. Put a dict last: "
            '(query, positive, negatives, {"teacher_scores": ...}), (B, 1 + k), the positive first.'
        )
    scored, available = teacher_scores.shape[1] - 1, negative_scores.shape[1]
    if scored < 1 or (available is not None and scored > available):
        raise ValueError(
            f"teacher_scores has {scored + 1} columns: 1 for the positive and {scored} for "
            f"negatives, where there are {available}. Give (B, 1 + k), the positive first."
        )
    return negative_scores[:, -scored:]


class Matryoshka(RetrievalLoss):
    """The sum of a loss over the first 64, 128, ... numbers of the representations.

    Kusupati et al. 2022, arXiv:2205.13147, equation 1. Truncated vectors stay useful, so an index
    can be made smaller afterwards. It stands in two places, since it needs the representations:

        matryoshka = Matryoshka(InfoNCE(), cosine, [64, 128, 384])
        EfficientDenseRetrievalTrainer(model, matryoshka.compute_scores, loss=matryoshka, ...)

    Args:
        loss: any loss of this module.
        compute_scores: any scores of `polus.ir.scores`.
        dimensions: the lengths, each at most that of the representation.
        weights: of each length's loss; 1 each, as in the paper.
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
        self.weights = tuple(weights or [1.0] * len(self.dimensions))
        if len(self.weights) != len(self.dimensions):
            raise ValueError(
                f"{len(self.weights)} weights for the {len(self.dimensions)} dimensions "
                f"{self.dimensions}; give one weight for each."
            )
        self._compute_scores = compute_scores
        self.trainable_variables = tuple(getattr(loss, "trainable_variables", ()))

    def compute_scores(self, *representations: Any) -> tuple[Any, Any]:
        """Scores with a last axis of their own for the lengths: `(B, D)` and `(B, N, D)`."""
        size = keras.tree.flatten(representations[0])[0].shape[-1]
        if max(self.dimensions) > size:
            raise ValueError(
                f"Matryoshka(dimensions={list(self.dimensions)}) over representations of "
                f"{size} numbers; leave out what is above {size}."
            )
        scores = [
            self._compute_scores(*[_truncated(each, length) for each in representations])
            for length in self.dimensions
        ]
        return ops.stack([each[0] for each in scores], -1), ops.stack(
            [each[1] for each in scores], -1
        )

    def __call__(self, positive_scores: Any, negative_scores: Any, *teacher_scores: Any) -> Any:
        losses = [
            weight * self.loss(positive_scores[..., i], negative_scores[..., i], *teacher_scores)
            for i, weight in enumerate(self.weights)
        ]
        return sum(losses)


def _truncated(representation: Any, length: int) -> Any:
    if isinstance(representation, (tuple, list)):  # late interaction: the mask stays whole
        vectors, mask = representation
        return vectors[..., :length], mask
    return representation[..., :length]
