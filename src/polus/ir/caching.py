"""Gradient caching: the exact gradient of a large batch in the memory of a small one.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
arXiv:2101.06983. A contrastive loss needs the representations of the whole batch, but not the
activations that they were computed from:

    representations = forward(texts)                     # in micro-batches, without gradients
    vector_gradients = gradient of loss(representations) # with respect to the representations
    gradients = backward(texts, vector_gradients)        # in micro-batches, recomputing each
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from polus.backends import backend
from polus.ir.scores import Representation
from polus.steps.update import loss_scale, times
from polus.types import Tensor

Represent = Callable[[Any], Any]
"""Maps the features of texts to vectors, or to a pair of vectors and mask."""


class GradientCache:
    """Runs the forward and the backward pass over a batch, `size` texts at a time.

    The backward pass recomputes what the forward pass did, in the same order and from the same
    state: dropout seeds and batch statistics are restored in between, so dropout is the same in
    both.

    Args:
        size: The number of texts in a micro-batch.
        weights: The variables to differentiate with respect to.
        state: The variables that the encoders may assign.
    """

    def __init__(
        self, size: int, weights: Sequence[keras.Variable], state: Sequence[keras.Variable]
    ) -> None:
        self.size = size
        self.weights = list(weights)
        self.state = list(state)
        self.totals = backend.accumulator(self.weights, backend.value_and_grad)

    def value_and_grad(
        self,
        represent: Sequence[Represent],
        texts: Sequence[Any],
        loss_fn: Callable[[list[Any]], tuple[Any, Any]],
        loss_weights: Sequence[keras.Variable] = (),
        scale: Callable[[Any], Any] = lambda loss: loss,
    ) -> tuple[Any, Any, list[Any]]:
        """Computes a loss over the representations of `texts`, and its gradients.

        Args:
            represent: For each of `texts`, the function that represents it.
            texts: The features of each kind of text.
            loss_fn: Takes the list of representations, returns the scalar loss and anything else.
            loss_weights: Those of `weights` that `loss_fn` reads itself.
            scale: Scales the loss for the backward pass. The gradients returned are unscaled.

        Returns:
            The loss, what else `loss_fn` returned, and the gradient for each weight, None for a
            weight that the loss doesn't depend on.
        """
        representations, start = self.forward(represent, texts)

        def scaled_loss(*vectors: Any) -> Any:
            replaced = [with_vectors(r, v) for r, v in zip(representations, vectors, strict=True)]
            return scale(loss_fn(replaced)[0])

        vectors = [vectors_of(each) for each in representations]
        _, vector_gradients = backend.value_and_input_grad(scaled_loss, vectors)
        loss, others = loss_fn(representations)
        gradients = self.backward(represent, texts, vector_gradients, start)
        if loss_weights:
            _, found = backend.value_and_grad(lambda: scaled_loss(*vectors), loss_weights)
            index = {id(weight): i for i, weight in enumerate(self.weights)}
            for weight, gradient in zip(loss_weights, found, strict=True):
                gradients[index[id(weight)]] = gradient
        factor = loss_scale(scale)
        return loss, others, gradients if factor is None else times(gradients, 1 / factor)

    def forward(
        self, represent: Sequence[Represent], texts: Sequence[Any]
    ) -> tuple[list[Any], tuple[Any, ...]]:
        """Computes the representations of each of `texts`, and what `backward` starts from.

        Only this pass changes the state, as a step without caching does.
        """
        start = [backend.copy(variable) for variable in self.state], backend.random_state()
        pairs = zip(represent, texts, strict=True)
        return [self._map_micro_batches(fn, text) for fn, text in pairs], start

    def backward(
        self,
        represent: Sequence[Represent],
        texts: Sequence[Any],
        vector_gradients: Sequence[Any],
        start: tuple[Any, ...],
    ) -> list[Any]:
        """Computes the gradients for the weights from those for the vectors.

        Returns None for a weight that the vectors don't depend on.
        """
        values, generators = start
        for variable, value in zip(self.state, values, strict=True):
            variable.assign(value)
        backend.set_random_state(generators)
        self.totals.start()

        def accumulate(fn: Represent, micro_batch: tuple[Any, Any]) -> Any:
            text, gradient = micro_batch
            value = self.totals.add(
                lambda: ops.sum(ops.cast(vectors_of(fn(text)) * gradient, "float32"))
            )
            return ops.reshape(value, (1,))  # the loop needs a row per micro-batch

        for fn, text, gradient in zip(represent, texts, vector_gradients, strict=True):
            self._map_micro_batches(functools.partial(accumulate, fn), (text, gradient))
        return self.totals.gradients()

    def _map_micro_batches(self, fn: Callable[[Any], Any], inputs: Any) -> Any:
        """Applies `fn` to each micro-batch in a loop that holds one at a time; concatenates."""
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


def vectors_of(representation: Representation) -> Tensor:
    """Returns the vectors, without the mask that late interaction has."""
    return representation[0] if isinstance(representation, (tuple, list)) else representation


def with_vectors(representation: Representation, vectors: Tensor) -> Representation:
    """Replaces the vectors of `representation`; the mask, which has no gradient, stays."""
    if isinstance(representation, (tuple, list)):
        return vectors, representation[1]
    return vectors
