"""Gradients in PyTorch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras
import torch

from polus.backends import base, torch_distribution
from polus.backends.torch_compile import gradient_depth
from polus.types import Tensor

Tree = Any
R = TypeVar("R")


def mapped(fn: Callable[[Any], Any], tree: Tree) -> Tree:
    """`keras.tree.map_structure`, whose call takes ten times as long as a small operation."""
    if isinstance(tree, torch.Tensor):
        return fn(tree)
    if type(tree) is tuple or type(tree) is list:
        return type(tree)(mapped(fn, part) for part in tree)
    if type(tree) is dict:
        return {name: mapped(fn, part) for name, part in tree.items()}
    return None if tree is None else keras.tree.map_structure(fn, tree)  # None: left out of a batch


def value_and_grad(
    fn: Callable[..., R],
    variables: Sequence[keras.Variable],
    loss: Callable[[R], Tensor] | None = None,
    sparse: bool = False,
    inputs: Sequence[Tensor] = (),
) -> tuple[R, list[Tensor | None]]:
    """Returns `fn(*inputs)` and the gradients of its loss; see `Backend`.

    `sparse` changes nothing: only TensorFlow has sparse gradients.
    """
    depth = gradient_depth.value
    gradient_depth.value = depth + 1
    try:
        with torch.enable_grad():
            watched = [_watched(x, depth > 0) for x in inputs]
            result = fn(*watched)
            value: Any = result if loss is None else loss(result)
            weights = [variable.value for variable in variables]  # inputs are each replica's own
            # A gradient inside another one's function is itself differentiated.
            backward = functools.partial(_separate_gradients, value, weights, watched, depth > 0)
            gradients = backward() if depth else torch_distribution.gradients_of(weights, backward)
    finally:
        gradient_depth.value = depth
    if depth == 0:
        result = mapped(_detached, result)
    return result, gradients


def _watched(tensor: Any, nested: bool) -> Any:
    """Returns a tensor of its own to differentiate by, which an outer gradient flows through.

    The function may use the given one as well, or get it twice; only its argument counts.
    """
    if nested and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


def _separate_gradients(
    value: Any, weights: Sequence[Any], watched: Sequence[Any], nested: bool
) -> list[Tensor | None]:
    """Returns the gradients by weights and inputs, by each as if the others were constants."""
    found: list[Any] = _gradients(value, [*weights, *watched], nested)
    by_inputs = zip(watched, found[len(weights) :], strict=True)
    made = [(x, g) for x, g in by_inputs if g is not None and x.grad_fn is not None]
    if not made or not weights:
        return found
    # An input that was computed from a weight has passed its gradient on to it.
    inputs, slopes = zip(*made, strict=True)
    passed = torch.autograd.grad(inputs, weights, slopes, True, True, allow_unused=True)
    direct = [g if p is None else g - p for g, p in zip(found, passed, strict=False)]
    return [*direct, *found[len(weights) :]]


def _gradients(
    value: Any, tensors: Sequence[Any], create_graph: bool, retain_graph: bool | None = None
) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * len(tensors)
    wanted = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
    if value.requires_grad and wanted:
        found = torch.autograd.grad(
            value,
            [tensors[i] for i in wanted],
            allow_unused=True,
            create_graph=create_graph,
            retain_graph=retain_graph,
        )
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
    return gradients


def values_and_grads(
    fn: Callable[[], R],
    groups: Sequence[Sequence[keras.Variable]],
    losses: Callable[[R], Sequence[Tensor]],
) -> tuple[R, list[list[Tensor | None]]]:
    """Returns `fn()` and the gradients of several losses, each by its group; see `Backend`."""
    depth = gradient_depth.value
    gradient_depth.value = depth + 1
    try:
        with torch.enable_grad():
            result = fn()
            values = losses(result)
            gradients: list[list[Tensor | None]] = []
            for i, (value, variables) in enumerate(zip(values, groups, strict=True)):
                tensors = [variable.value for variable in variables]
                needed = depth > 0 or i + 1 < len(groups)  # by the losses that follow
                backward = functools.partial(_gradients, value, tensors, depth > 0, needed)
                found = backward() if depth else torch_distribution.gradients_of(tensors, backward)
                gradients.append(found)
    finally:
        gradient_depth.value = depth
    if depth == 0:
        result = mapped(_detached, result)
    return result, gradients


def value_and_input_grad(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Returns `fn(*inputs)` and its gradients with respect to the inputs; see `Backend`."""
    depth = gradient_depth.value
    gradient_depth.value = depth + 1
    try:
        with torch.enable_grad():
            own: list[Any] = list(inputs)
            tensors = [tensor.detach().requires_grad_() for tensor in own]
            value: Any = fn(*tensors)
            gradients = torch.autograd.grad(value, tensors, materialize_grads=True)
    finally:
        gradient_depth.value = depth
    return value.detach(), list(gradients)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


class _Accumulator(base.Accumulator):
    """Adds each gradient to its sum as soon as it is there, as PyTorch's `backward()` does.

    So no variables are kept, and no more than the sums and one gradient are in memory.
    """

    def __init__(
        self, weights: Sequence[keras.Variable], value_and_grad: base.ValueAndGrad
    ) -> None:
        self.weights = list(weights)
        self.value_and_grad = value_and_grad
        self.variables = []
        self.start()

    def start(self) -> None:
        self._sums: list[Any] = [None] * len(self.weights)

    def add(self, fn: Callable[[], Tensor]) -> Tensor:
        tensors: list[Any] = [weight.value for weight in self.weights]
        inside = gradient_depth.value or torch.compiler.is_compiling()
        leaves = all(tensor.is_leaf for tensor in tensors)
        if inside or not leaves or torch_distribution.is_distributed():
            value, found = self.value_and_grad(fn, self.weights)
            pairs = zip(self._sums, found, strict=True)
            self._sums = [b if a is None else a if b is None else a + b for a, b in pairs]
        else:
            value = self._backward(fn, tensors)
        return value  # type: ignore[no-any-return]

    def _backward(self, fn: Callable[[], Tensor], tensors: Sequence[Any]) -> Any:
        others = [tensor.grad for tensor in tensors]  # a user's own
        gradient_depth.value = 1
        try:
            for tensor, total in zip(tensors, self._sums, strict=True):
                tensor.grad = total
            with torch.enable_grad():
                value: Any = fn()
            wanted = [tensor for tensor in tensors if tensor.requires_grad]
            if value.requires_grad and wanted:
                value.backward(inputs=wanted)
            self._sums = [tensor.grad for tensor in tensors]
        finally:
            gradient_depth.value = 0
            for tensor, other in zip(tensors, others, strict=True):
                tensor.grad = other
        return value.detach()

    def gradients(self) -> list[Tensor | None]:
        sums = self._sums
        self.start()  # the optimizer has them; they take as much memory as the weights
        return sums


def accumulator(
    weights: Sequence[keras.Variable], value_and_grad: base.ValueAndGrad
) -> base.Accumulator:
    """Returns what adds up gradients; see `Backend`."""
    return _Accumulator(weights, value_and_grad)
