"""The JAX backend: gradients, updates and arrays; `jax_programs` compiles."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import keras
import numpy as np

from polus.backends import jax_distribution
from polus.backends.base import Held, Known, TensorFlowDataset, Unpack
from polus.backends.base import accumulator as accumulator
from polus.backends.jax_gradients import one_by_one, watched
from polus.backends.jax_loops import Values, branched, row_at, run_loop
from polus.backends.jax_programs import (
    Function,
    MissedVariablesError,
    Stateful,
    Step,
    Steps,
    StepsOneByOne,
    copied,
    eager,
    read_out,
)
from polus.backends.placement import Placement
from polus.backends.scopes import (
    BackendVariable,
    DryRun,
    VariableRecorder,
    active_dry_run,
    current_scope,
)
from polus.sharded import ShardedArray, StoredArray
from polus.types import Tensor

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
COMPILES = True  # a new shape costs a compilation
TAKES_TEXT = False  # whether tensors may hold text
OPEN_LENGTHS = False  # whether a program takes batches of several shapes
LONG_RUN_SECS: dict[bool, float] = {}  # each setting of `jit_compile` is worth a try in any run


def function(fn: Callable[P, R], jit_compile: bool | None = None) -> Callable[P, R]:
    """Compiles `fn`. `jit_compile=False` runs it eagerly, operation by operation, to debug it."""
    return fn if jit_compile is False else Function(fn)


class _Detaching(VariableRecorder):
    """The scope of a gradient: a variable is assigned a value, not the way to it.

    As on the other backends, the gradient by a variable that is assigned inside is that at the new
    value: `SpectralNormalization` assigns the weight that it normalises.
    """

    def __init__(self, variables: Sequence[Any], values: Sequence[Any], outer: Any) -> None:
        super().__init__(zip(variables, values, strict=True), outer)
        self.by = {id(variable): value for variable, value in zip(variables, values, strict=True)}

    def add_update(self, update: tuple[Any, Any]) -> None:
        variable, value = update
        value = jax.lax.stop_gradient(value)
        if (by := self.by.get(id(variable))) is not None:
            value = value + (by - jax.lax.stop_gradient(by))  # zero, with a gradient of one
        super().add_update((variable, value))


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
    outer = current_scope()
    if (dry_run := active_dry_run()) is not None:  # stand-ins of the right shape
        result = fn(*inputs)
        if loss is not None:
            loss(result)
        found = [v.trainable and id(v) in dry_run.read for v in variables]
        by_variables = [v.value if f else None for v, f in zip(variables, found, strict=True)]
        return result, [*by_variables, *inputs]
    trainable = [variable for variable in variables if variable.trainable]
    connected = [False] * (len(trainable) + len(inputs))
    assigned: list[Any] = []

    def differentiated(values: Values) -> tuple[Any, tuple[R, Values]]:
        values = watched(values, connected)
        with _Detaching(trainable, values[: len(trainable)], outer) as scope:
            result = read_out(fn(*values[len(trainable) :]))
            value = result if loss is None else loss(result)
        # What was assigned inside leaves as an output, else tracers would leak.
        assigned[:] = scope.assigned.values()
        return value, (result, [scope.state_mapping[id(variable)] for variable in assigned])

    (_, (result, new)), gradients = jax.value_and_grad(differentiated, has_aux=True)(
        [*(variable.value for variable in trainable), *inputs]
    )
    for variable, value in zip(assigned, new, strict=True):
        variable.assign(value)
    known = [g if c else None for g, c in zip(gradients, connected, strict=True)]
    by_id = {id(v): g for v, g in zip(trainable, known, strict=False)}
    return result, [*(by_id.get(id(v)) for v in variables), *known[len(trainable) :]]


def values_and_grads(
    fn: Callable[[], R],
    groups: Sequence[Sequence[keras.Variable]],
    losses: Callable[[R], Sequence[Tensor]],
) -> tuple[R, list[list[Tensor | None]]]:
    """Returns `fn()` and the gradients of several losses, each by its group; see `Backend`."""
    outer = current_scope()
    trainable = [v for variables in groups for v in variables if v.trainable]
    connected = [False] * len(trainable)
    assigned: list[Any] = []
    current = [0]

    def differentiated(values: Values) -> tuple[Values, tuple[R, Values]]:
        values = watched(values, connected)
        with _Detaching(trainable, values, outer) as scope:
            result = read_out(fn())
            found = one_by_one(list(losses(result)), current)
        assigned[:] = scope.assigned.values()
        return found, (result, [scope.state_mapping[id(variable)] for variable in assigned])

    values, backward, (result, new) = jax.vjp(
        differentiated, [variable.value for variable in trainable], has_aux=True
    )
    for variable, value in zip(assigned, new, strict=True):
        variable.assign(value)
    gradients: list[list[Tensor | None]] = []
    for i, variables in enumerate(groups):
        current[0], connected[:] = i, [False] * len(trainable)
        (found,) = backward([jnp.ones_like(value) for value in values])
        by_id = {id(v): g for v, g, c in zip(trainable, found, connected, strict=True) if c}
        gradients.append([by_id.get(id(variable)) for variable in variables])
    return result, gradients


def value_and_input_grad(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Returns `fn(*inputs)` and its gradients with respect to the inputs; see `Backend`."""
    value, gradients = jax.value_and_grad(lambda tensors: fn(*tensors))(list(inputs))
    return value, gradients


def program(
    step: Callable[..., object],
    unpack: Unpack | None = None,
    many: bool = False,
    jit_compile: bool | None = None,
    held: bool = False,
    known: Known | None = None,
    convolutions: bool = False,
    lengths: Sequence[tuple[int | None, ...]] | None = None,
) -> Callable[..., Any]:
    """Compiles a step, or a loop over many; see `Backend`.

    `jit_compile=False` runs it eagerly, operation by operation, to debug it.
    """
    if jit_compile is False:
        return eager(step, unpack, many)
    slow = convolutions and jax.default_backend() == "cpu" and not keras.distribution.distribution()
    loop = StepsOneByOne if slow else Steps
    return (loop if many else Step)(step, unpack, held, known)


def eager_program(step: Callable[..., object], unpack: Unpack | None = None) -> Callable[..., Any]:
    """Runs a step of one batch as it is written, operation by operation; see `Backend`."""
    return program(step, unpack, jit_compile=False)


def repeat(fn: Callable[[Any], R], count: int, rows: object) -> R:
    """Applies `fn` to each row and stacks what it returns, inside a step; see `Backend`."""
    stateful = Stateful(lambda i: fn(row_at(rows, i)), current_scope())
    stacks: R
    if active_dry_run() is not None:
        outputs = stateful.call(0)
        stacks = jax.tree_util.tree_map(lambda o: jnp.broadcast_to(o, (count, *o.shape)), outputs)
        return stacks
    while True:
        with stateful.finding_variables():
            outputs = jax.eval_shape(functools.partial(stateful.call), jnp.int32(0))
        assigned, read = ([v.value for v in part] for part in (stateful.assigned, stateful.read))
        room = jax.tree_util.tree_map(lambda o: jnp.zeros((count, *o.shape), o.dtype), outputs)
        body = functools.partial(_repeated, stateful, read)
        try:
            stacks, new = run_loop(body, count, assigned, room)
        except MissedVariablesError:
            stateful.look_closer()
        else:
            stateful.assign(new)
            return stacks


def _repeated(stateful: Stateful, read: Values, i: Any, values: Values) -> tuple[Any, Values]:
    return stateful.pure(values, read, i)


def trace(fn: Callable[..., object], args: Sequence[object], eager: bool = False) -> DryRun:
    """Runs `fn(*args)` abstractly under a `DryRun`, which it returns. No variable changes.

    With `eager`, the values are real ones.
    """
    if eager:
        with DryRun() as dry_run:
            dry_run.result = fn(*jax.tree_util.tree_map(jnp.asarray, tuple(args)))
        return dry_run
    with DryRun() as dry_run:

        def call(*inputs: Any) -> object:
            return dry_run.returned(fn(*inputs))

        # A new function each time: JAX would remember the old one's trace, and run nothing.
        result = jax.eval_shape(call, *args)
    dry_run.result = result if dry_run.result is None else dry_run.result
    return dry_run


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Tensor | None],
    variables: Sequence[keras.Variable],
) -> None:
    """Updates `variables` once by `optimizer`, which is built."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # Its apply() assigns inside the branches of a condition, from where no value comes out.
        weights, state = optimizer.stateless_apply(
            [v.value for v in optimizer.variables], gradients, [v.value for v in variables]
        )
        updated = [*variables, *optimizer.variables]
        for variable, value in zip(updated, [*weights, *state], strict=True):
            variable.assign(value)
    else:
        optimizer.apply(gradients, variables)


def only_if(
    finite: Tensor, update: Callable[[], None], variables: Sequence[keras.Variable]
) -> None:
    """Runs `update`, which changes these variables if `finite` is True; see `Backend`."""
    if branched(finite, update, variables):
        return
    held = hold(variables)
    update()
    settle(finite, held)


def trace_id() -> object:
    """Returns an object that tells a trace from one nested inside it."""
    return current_scope()


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Returns a sum of all values, which is finite if they all are."""
    found: Any = tensors
    return sum((jnp.sum(t.astype(jnp.float32)) for t in found), start=jnp.zeros(()))


def squared_norm(tensor: Tensor) -> Tensor:
    """Returns the sum of the squares of all values, in float32."""
    squared: Tensor = jnp.sum(jnp.square(jnp.asarray(tensor, jnp.float32)))
    return squared


def hold(variables: Sequence[keras.Variable | BackendVariable]) -> Held:
    """Returns variables with their present values, which no later step changes."""
    return [(variable, variable.value) for variable in variables]


def settle(finite: Tensor, held: Held) -> None:
    """Gives variables the values that they had unless the step was finite."""
    flag: Any = finite
    for variable, old in held:
        if (new := variable.value) is not old:
            variable.assign(jnp.where(flag, new, old))


def stack(batches: Sequence[T], capacity: int) -> T:
    """Batches of equal structure and shape as one tree of arrays (capacity, ...) on the device."""

    def join(*rows: Any) -> Any:
        return jax.device_put(jax_distribution.join_rows(rows, capacity))

    stacked: T = jax.tree_util.tree_map(join, *batches)
    return stacked


def to_device(array: object, shared: bool = False) -> Tensor:
    """Returns an array-like as an array on the device."""
    return array if isinstance(array, jax.Array) else jax.device_put(np.asarray(array))


def take(array: Tensor, indices: Tensor) -> Tensor:
    """Returns the rows `indices` of `array`, which are within its bounds."""
    examples: Any = array  # JAX's own
    rows = examples.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)
    # Apart from what follows: merged into a convolution, it takes XLA longer to compile.
    taken: Tensor = jax.lax.optimization_barrier(rows)
    return taken


def assign(variable: keras.Variable | BackendVariable, value: Any) -> None:
    """Gives a variable a value that was read of it."""
    variable.assign(value)


def copy(variable: keras.Variable | BackendVariable) -> Tensor:
    """Returns a copy of a variable's value that later steps leave alone."""
    return copied(variable.value)


def view(variable: keras.Variable | BackendVariable) -> np.ndarray[Any, Any]:
    """Returns a variable's value, perhaps a view: copy it before the next step."""
    return jax_distribution.on_host(variable.value)


def sharded(variable: keras.Variable | BackendVariable) -> ShardedArray | None:
    """Returns a variable's value in the parts that processes have; None if each has all of it."""
    return jax_distribution.in_parts(variable.value)


def assign_stored(variable: keras.Variable | BackendVariable, value: StoredArray) -> None:
    """Gives a variable a value out of files, of which only this process's part is read."""
    variable.assign(jax_distribution.from_parts(value, variable.value))


def wait(tree: object) -> None:
    """Returns when every tensor of a structure has been computed."""
    jax.block_until_ready(tree)


def iterate(dataset: TensorFlowDataset) -> Iterator[Any]:
    """Yields the batches of a `tf.data.Dataset`, as NumPy arrays."""
    return dataset.as_numpy_iterator()


def graph_blocks(iterator: object) -> None:
    """Returns None: only TensorFlow reads many batches in one call."""
    return


def candidates() -> tuple[bool, ...]:
    """Returns the settings of `jit_compile` that are worth timing here."""
    return (True,)


def ways(convolutions: bool) -> Sequence[tuple[bool, bool] | tuple[bool, bool, int]]:
    """The ways to run a step that are worth considering, the usual first; see `Backend`.

    On the CPU, XLA's convolutions take twice as long inside a loop: `program` makes none, and few
    steps per call are enough.
    """
    if convolutions and jax.default_backend() == "cpu":
        return ((True, not keras.distribution.distribution(), 16),)
    return (True, True), (True, False)


def describe() -> dict[str, Any]:
    """What the bits of a result depend on: devices. JAX doesn't say how many threads it has."""
    return {"devices": [device.device_kind for device in jax.devices()]}


def peak_device_bytes() -> int | None:
    """Returns the most memory of its device that the process had; None if it has none."""
    stats = jax.local_devices()[0].memory_stats()  # None on a CPU
    return None if stats is None else stats.get("peak_bytes_in_use")


def set_deterministic() -> list[str]:
    """Makes operations compute the same bits in each run. Returns what can't be promised."""
    flag = "--xla_gpu_deterministic_ops=true"
    if jax.default_backend() == "gpu" and flag not in os.environ.get("XLA_FLAGS", ""):
        return [f"On a GPU, start the program with XLA_FLAGS={flag}, or sums may differ."]
    return []


def profile(folder: str) -> tuple[AbstractContextManager[Any], str]:
    """Returns what writes a trace of its body into a folder, and how to open the trace."""
    how = "open perfetto_trace.json.gz in https://ui.perfetto.dev"
    return jax.profiler.trace(folder, create_perfetto_trace=True), how


def placement() -> Placement:
    """Returns where steps run now: see `jax_distribution.active`."""
    return jax_distribution.active()


def random_state() -> dict[str, Any]:
    """The state of the backend's own generators: JAX has none, its keys are values."""
    return {}


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned."""
