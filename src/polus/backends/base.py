"""What the three backends have in common."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, Protocol, TypeVar

import keras
import numpy as np

from polus.backends.placement import Placement
from polus.backends.scopes import BackendVariable, DryRun
from polus.sharded import ShardedArray, StoredArray
from polus.types import Tensor

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Unpack = Callable[[Any], Any]
Known = tuple[Sequence[Any], Sequence[Any]]
Held = list[tuple[Any, Any]]
ValueAndGrad = Callable[..., tuple[Any, list[Any]]]


class GraphBlocks(Protocol):
    """Reads many batches in one call."""

    def read(self, first: T, want: int, secs: float) -> tuple[int, T, T | None]:
        """Reads batches of the shapes of `first`, which is the first of them.

        Args:
            first: The first batch.
            want: The number of batches at most.
            secs: After this time, and at least two batches, no more are read.

        Returns:
            The number of batches, the batches stacked to (count, ...), and the next batch if it has
            another shape, else None.
        """
        ...

    def pad(self, batches: T, capacity: int) -> T:
        """Fills the first axis of each tensor up to `capacity` with zeros."""
        ...

    def on_host(self, batches: T) -> T | None:
        """Returns arrays that share the memory of the tensors; None if they can't."""
        ...


class TensorFlowDataset(Protocol):
    """A `tf.data.Dataset`, which is read on every backend."""

    def __iter__(self) -> Iterator[Any]: ...
    def as_numpy_iterator(self) -> Iterator[Any]: ...


class Backend(Protocol):
    """The functions of a backend's module; mypy checks each module against it.

    Attributes:
        COMPILES: Whether a new shape costs a compilation.
        TAKES_TEXT: Whether tensors may hold text.
        OPEN_LENGTHS: Whether a program may serve batches of several shapes.
        LONG_RUN_SECS: The expected time of training from which on a setting of `jit_compile` is
            worth timing; a setting that is not in it is worth that in any run.
    """

    COMPILES: bool
    TAKES_TEXT: bool
    OPEN_LENGTHS: bool
    LONG_RUN_SECS: dict[bool, float]

    def function(self, fn: Callable[P, R], jit_compile: bool | None = None) -> Callable[P, R]:
        """Compiles a stateful function of Keras variables.

        Arrays are arguments of the program, any other Python value is a constant of it. A variable
        in the result becomes its present value.
        """
        ...

    def value_and_grad(
        self,
        fn: Callable[..., R],
        variables: Sequence[keras.Variable],
        loss: Callable[[R], Tensor] | None = None,
        sparse: bool = False,
        inputs: Sequence[Tensor] = (),
    ) -> tuple[R, list[Tensor | None]]:
        """Returns `fn(*inputs)` and the gradients of its loss.

        Args:
            fn: Takes the inputs. It may assign variables.
            variables: The variables.
            loss: Takes the scalar to differentiate out of the result. By default the result itself.
            sparse: Whether gradients may be sparse, where the backend has such.
            inputs: Tensors, whose gradients follow those of the variables.

        Returns:
            The result, and per variable and input its gradient; None if there is none.
        """
        ...

    def values_and_grads(
        self,
        fn: Callable[[], R],
        groups: Sequence[Sequence[keras.Variable]],
        losses: Callable[[R], Sequence[Tensor]],
    ) -> tuple[R, list[list[Tensor | None]]]:
        """Returns `fn()`, which runs once, and the gradients of several losses.

        Args:
            fn: Takes nothing. It may assign variables.
            groups: For each loss the variables.
            losses: Takes the scalars to differentiate out of the result.

        Returns:
            The result, and for each group the gradients of its loss.
        """
        ...

    def accumulator(
        self, weights: Sequence[keras.Variable], value_and_grad: ValueAndGrad
    ) -> "Accumulator":
        """Returns what adds up gradients with respect to `weights`, one function at a time."""
        ...

    def value_and_input_grad(
        self, fn: Callable[..., Tensor], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns `fn(*inputs)`, a scalar, and its gradients with respect to the inputs.

        `fn` may read variables; it assigns none.
        """
        ...

    def program(
        self,
        step: Callable[..., object],
        unpack: Unpack | None = None,
        many: bool = False,
        jit_compile: bool | None = None,
        held: bool = False,
        known: Known | None = None,
        convolutions: bool = False,
        lengths: Sequence[tuple[int | None, ...]] | None = None,
    ) -> Callable[..., Any]:
        """Compiles a step, or a loop over many steps.

        Args:
            step: A stateful function of a batch's arguments.
            unpack: Takes the batches out of a payload, stacked along a new first axis. None if the
                payload is a batch, or with `many` stacked batches.
            many: Whether the program runs many steps. It takes their number, the capacity of the
                payload and the payload, and returns scalars stacked to (capacity,) or (count,),
                and of other outputs the last step's.
            jit_compile: The compiler setting; None for the backend's own.
            held: Whether what `hold` returned before a call is there after it.
            known: The variables that the step assigns, and those that it only reads, if a dry run
                has shown them: JAX then traces the step once less.
            convolutions: Whether the step has convolutions, which XLA is slow at in a loop on a
                CPU: JAX then runs many steps one by one.
            lengths: The shape of each array of a batch, with None for a length that is open, where
                the backend has `OPEN_LENGTHS`.
        """
        ...

    def eager_program(
        self, step: Callable[..., object], unpack: Unpack | None = None
    ) -> Callable[..., Any]:
        """Returns a program that runs a step of one batch as it is written, to debug it."""
        ...

    def repeat(self, fn: Callable[[Any], R], count: int, rows: object) -> R:
        """Applies `fn` to each of `count` rows, and stacks what it returns, inside a step."""
        ...

    def trace(
        self, fn: Callable[..., object], args: Sequence[object], eager: bool = False
    ) -> DryRun:
        """Runs `fn(*args)` under a `DryRun`, which it returns. No variable changes.

        With `eager` its values are real ones on each backend, for a step that looks at them.
        """
        ...

    def apply_gradients(
        self,
        optimizer: keras.optimizers.Optimizer,
        gradients: Sequence[Tensor | None],
        variables: Sequence[keras.Variable],
    ) -> None:
        """Updates `variables` once by `optimizer`, which is built."""
        ...

    def only_if(
        self, finite: Tensor, update: Callable[[], None], variables: Sequence[keras.Variable]
    ) -> None:
        """Runs `update`, which assigns no other variables than these, if `finite` is True.

        Where the backend can't leave it out, it runs, and changes nothing.
        """
        ...

    def trace_id(self) -> object:
        """Returns an object that tells a trace from one nested inside it."""
        ...

    def total(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns a sum of all values, a scalar which is finite if they all are."""
        ...

    def squared_norm(self, tensor: Tensor) -> Tensor:
        """Returns the sum of the squares of all values, in float32."""
        ...

    def hold(self, variables: Sequence[keras.Variable | BackendVariable]) -> Held:
        """Returns variables with their present values, which no later step changes.

        On JAX a call of a program changes them unless it was made with `held`.
        """
        ...

    def settle(self, finite: Tensor, held: Held) -> None:
        """Gives variables the values that they had unless `finite`, a scalar, is True."""
        ...

    def stack(self, batches: Sequence[T], capacity: int) -> T:
        """Stacks batches of equal structure and shape on the device.

        The new first axis has the length `capacity` where a program is compiled for it, else the
        number of batches.
        """
        ...

    def to_device(self, array: object, shared: bool = False) -> Tensor:
        """Returns an array-like as a tensor on the device.

        Args:
            array: The array-like.
            shared: Whether it may use the array's memory, where the device reads it.
        """
        ...

    def take(self, array: Tensor, indices: Tensor) -> Tensor:
        """Returns the rows `indices` of `array`, which are within its bounds."""
        ...

    def assign(self, variable: keras.Variable | BackendVariable, value: Any) -> None:
        """Gives a variable a value that `copy`, `view` or `hold` returned, on all devices."""
        ...

    def copy(self, variable: keras.Variable | BackendVariable) -> Tensor:
        """Returns a copy of a variable's value that later steps leave alone."""
        ...

    def view(self, variable: keras.Variable | BackendVariable) -> np.ndarray[Any, Any]:
        """Returns a variable's value, perhaps a view: copy it before the next step."""
        ...

    def sharded(self, variable: keras.Variable | BackendVariable) -> ShardedArray | None:
        """Returns a variable's value in the parts that processes have; None if each has all."""
        ...

    def assign_stored(self, variable: keras.Variable | BackendVariable, value: StoredArray) -> None:
        """Gives a variable a value out of files, of which only this process's part is read."""
        ...

    def wait(self, tree: object) -> None:
        """Returns when every tensor of a structure has been computed."""
        ...

    def iterate(self, dataset: TensorFlowDataset) -> Iterator[Any]:
        """Yields the batches of a `tf.data.Dataset`: tensors on TensorFlow, else NumPy arrays."""
        ...

    def graph_blocks(self, iterator: object) -> GraphBlocks | None:
        """Returns a reader of many batches in one call; None if `iterator` has none."""
        ...

    def candidates(self) -> tuple[bool, ...]:
        """Returns the settings of `jit_compile` that are worth timing here."""
        ...

    def ways(self, convolutions: bool) -> Sequence[tuple[bool, bool] | tuple[bool, bool, int]]:
        """Returns the ways to run a step that are worth considering, the usual one first.

        Args:
            convolutions: Whether the model has convolutions, which XLA is slow at on a CPU.

        Returns:
            Of each a setting of `jit_compile`, whether many steps run in one call, and perhaps how
            many at most.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Returns what the bits of a result depend on: devices, threads of one operation."""
        ...

    def peak_device_bytes(self) -> int | None:
        """Returns the most memory of its device that the process had; None if it has none."""
        ...

    def set_deterministic(self) -> list[str]:
        """Makes operations compute the same bits in each run. Returns what can't be promised."""
        ...

    def profile(self, folder: str) -> tuple[AbstractContextManager[Any], str]:
        """Returns what writes a trace of its body into a folder, and how to open the trace."""
        ...

    def placement(self) -> Placement:
        """Returns where steps run now.

        Raises:
            NotImplementedError: Under an engine for several devices that Polus does not serve.
            RuntimeError: If several programs were started that don't know of each other.
        """
        ...

    def random_state(self) -> dict[str, Any]:
        """Returns the states of the backend's own global generators, as NumPy arrays."""
        ...

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Restores what `random_state` returned."""
        ...


def as_arguments(batch: object) -> tuple[Any, ...]:
    """Returns the step's arguments: a tuple or list is unpacked, anything else is one argument."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


class Accumulator:
    """Adds up gradients in variables, the only thing that a compiled loop can add to.

    Args:
        weights: The variables to differentiate with respect to.
        value_and_grad: The function of the backend.

    Attributes:
        variables: The variables that it keeps, which `start` overwrites.
    """

    def __init__(self, weights: Sequence[keras.Variable], value_and_grad: ValueAndGrad) -> None:
        self.weights = list(weights)
        self.value_and_grad = value_and_grad
        self.variables = [
            keras.Variable(keras.ops.zeros(weight.shape), dtype=weight.dtype, trainable=False)
            for weight in self.weights
        ]
        self._connected = [False] * len(self.weights)

    def start(self) -> None:
        """Begins a new sum."""
        self._connected = [False] * len(self.weights)
        for variable in self.variables:
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))

    def add(self, fn: Callable[[], Tensor]) -> Tensor:
        """Returns `fn()`, a scalar, and adds its gradients."""
        value, gradients = self.value_and_grad(fn, self.weights)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self._connected[i] = True
                gradient = keras.ops.convert_to_tensor(gradient)
                self.variables[i].assign_add(keras.ops.cast(gradient, self.variables[i].dtype))
        return value  # type: ignore[no-any-return]

    def gradients(self) -> list[Tensor | None]:
        """Returns the sums, which hold until `start`; None for a weight without a gradient."""
        return [
            keras.ops.convert_to_tensor(variable) if there else None
            for variable, there in zip(self.variables, self._connected, strict=True)
        ]


def accumulator(weights: Sequence[keras.Variable], value_and_grad: ValueAndGrad) -> Accumulator:
    """Returns what adds up gradients; see `Backend`."""
    return Accumulator(weights, value_and_grad)
