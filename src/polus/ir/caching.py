"""Gradient caching: the exact gradient of a large batch in the memory of a small one.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
arXiv:2101.06983. A contrastive loss needs the representations of the whole batch, but not the
activations that led to them:

    representations = forward(texts)                     # in micro-batches, without gradients
    by_representations = gradient of loss(representations)
    by_weights = backward(texts, by_representations)     # in micro-batches, each computed again
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from polus.backends import backend

Represent = Callable[[Any], Any]
"""From the features of texts to vectors, or a pair of vectors and mask."""


class GradientCache:
    """Both passes over a batch, `size` texts at a time.

    The second pass computes what the first one did, in the same order and from the same state:
    seeds of dropout and batch statistics are put back in between, so dropout is the same in both.

    Args:
        size: texts in a micro-batch.
        weights: what gradients are taken by.
        state: variables that `represent` may assign.
    """

    def __init__(
        self, size: int, weights: Sequence[keras.Variable], state: Sequence[keras.Variable]
    ) -> None:
        self.size = size
        self.weights = list(weights)
        self.state = list(state)
        # Variables, since the loop over micro-batches can add to nothing else.
        self.totals = [
            keras.Variable(ops.zeros(weight.shape), dtype=weight.dtype, trainable=False)
            for weight in self.weights
        ]

    def forward(
        self, represent: Sequence[Represent], texts: Sequence[Any]
    ) -> tuple[list[Any], tuple[Any, ...]]:
        """The representations of each of `texts` by its function, and what `backward` starts from.

        Only here the state changes, as in a step without caching.
        """
        start = [backend.copy(variable) for variable in self.state], backend.random_state()
        with_each = zip(represent, texts, strict=True)
        return [self._in_micro_batches(f, text) for f, text in with_each], start

    def backward(
        self,
        represent: Sequence[Represent],
        texts: Sequence[Any],
        by_vectors: Sequence[Any],
        start: tuple[Any, ...],
    ) -> list[Any]:
        """The gradients by the weights, of those by the vectors; None for one without effect."""
        values, generators = start
        for variable, value in zip(self.state, values, strict=True):
            variable.assign(value)
        backend.set_random_state(generators)
        for total in self.totals:
            total.assign(ops.zeros(total.shape, total.dtype))
        connected = [False] * len(self.weights)

        def carry_on(f: Represent, micro_batch: tuple[Any, Any]) -> Any:
            text, gradient = micro_batch

            def product() -> Any:
                return ops.sum(ops.cast(vectors_of(f(text)) * gradient, "float32"))

            value, gradients = backend.value_and_grad(product, self.weights)
            for i, each in enumerate(gradients):
                if each is not None:
                    connected[i] = True
                    each = ops.cast(ops.convert_to_tensor(each), self.totals[i].dtype)
                    self.totals[i].assign_add(each)
            return ops.reshape(value, (1,))  # something with a row for each micro-batch

        for f, text, gradient in zip(represent, texts, by_vectors, strict=True):
            self._in_micro_batches(functools.partial(carry_on, f), (text, gradient))
        return [
            ops.convert_to_tensor(total) if there else None
            for total, there in zip(self.totals, connected, strict=True)
        ]

    def _in_micro_batches(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        """`fn` of each micro-batch of `inputs`, in a loop that holds one at a time; joined."""
        size = self.size
        whole, rest = divmod(keras.tree.flatten(inputs)[0].shape[0], size)
        results = []
        if whole:
            payload = keras.tree.map_structure(
                lambda x: ops.reshape(x[: whole * size], (whole, size, *x.shape[1:])), inputs
            )
            rows = backend.repeat(fn, whole, payload)
            results.append(
                keras.tree.map_structure(lambda x: ops.reshape(x, (-1, *x.shape[2:])), rows)
            )
        if rest:
            results.append(fn(keras.tree.map_structure(lambda x: x[whole * size :], inputs)))
        return keras.tree.map_structure(lambda *parts: ops.concatenate(parts), *results)


def vectors_of(representation: Any) -> Any:
    """The vectors, without the mask that late interaction has."""
    return representation[0] if isinstance(representation, (tuple, list)) else representation


def with_vectors(representation: Any, vectors: Any) -> Any:
    """`representation` with other vectors; the mask, which has no gradient, stays."""
    if isinstance(representation, (tuple, list)):
        return vectors, representation[1]
    return vectors
