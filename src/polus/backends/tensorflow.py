"""TensorFlow: `tf.function`, with XLA where it is asked for. Variables are captured as usual."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import keras
import numpy as np
import tensorflow as tf

from polus.backends import tensorflow_distribution
from polus.backends.base import Held, TensorFlowDataset
from polus.backends.base import accumulator as accumulator
from polus.backends.placement import Placement
from polus.backends.scopes import BackendVariable, DryRun, current_scope
from polus.backends.tensorflow_blocks import graph_blocks as graph_blocks
from polus.backends.tensorflow_blocks import padded
from polus.backends.tensorflow_loops import loop_of, row_at, row_specs, tracing
from polus.backends.tensorflow_programs import (
    as_tensor,
    call_signature,
    read_out,
)
from polus.backends.tensorflow_programs import eager_program as eager_program
from polus.backends.tensorflow_programs import program as program
from polus.backends.tensorflow_replica import alone, averaged, current, differentiating
from polus.sharded import ShardedArray, StoredArray
from polus.types import Tensor

Tree = Any
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
COMPILES = True  # a new shape costs a compilation
TAKES_TEXT = True  # whether tensors may hold text
OPEN_LENGTHS = True  # whether a program takes batches of several shapes
LANES = 16  # sums that XLA adds to at a time
LONG_RUN_SECS = {True: 30.0}  # from how long a run on XLA's compilation is worth a try


def function(fn: Callable[P, R], jit_compile: bool | None = None) -> Callable[P, R]:
    """Compiles `fn` to a graph; with XLA where `jit_compile` is True.

    Python control flow is not rewritten (no AutoGraph): what runs here runs on the other backends,
    and an error shows the line as it was written.
    """

    def compiled(run: Callable[..., Any]) -> Any:
        # Without defaults: where there are some, a program can't be called by itself.
        def tensors(*args: Any, **kwargs: Any) -> Tree:
            return read_out(run(*args, **kwargs))

        return tf.function(tensors, jit_compile=bool(jit_compile), autograph=False)

    graphs = compiled(alone(fn)), compiled(fn)  # the second for optimizers that scale losses
    programs: dict[Any, Callable[..., Tree]] = {}

    def call(*args: Any, **kwargs: Any) -> Tree:
        if tf.inside_function() or current_scope() is not None:
            return fn(*args, **kwargs)  # inside an active trace: inlined
        args, kwargs = keras.tree.map_structure(as_tensor, (args, kwargs))
        # One program for each signature is what is meant, not the accident of which tf.function
        # warns; and called by itself a program costs a fraction of tf.function's own look-up.
        key = call_signature((args, kwargs))
        program = programs.get(key)
        if program is None:
            try:
                program = graphs[0].get_concrete_function(*args, **kwargs)
            except ValueError as error:
                if "replica context" not in str(error):
                    raise
                program = graphs[1].get_concrete_function(*args, **kwargs)
            programs[key] = program
        return program(*args, **kwargs)

    return call


def value_and_grad(
    fn: Callable[..., R],
    variables: Sequence[keras.Variable],
    loss: Callable[[R], Tensor] | None = None,
    sparse: bool = False,
    inputs: Sequence[Tensor] = (),
) -> tuple[R, list[Tensor | None]]:
    """Returns `fn(*inputs)` and the gradients of its loss; see `Backend`.

    With `sparse`, the gradient of an embedding is a `tf.IndexedSlices` of the rows that were looked
    up, a repeated one several times. Keras' optimizers get it so in `fit`; arithmetic can't use it.
    """
    # TensorFlow orders the reads in here before an update that follows. One of ours between the
    # value and the update took its own away (its graph optimizer drops the one for the other, then
    # folds ours).
    inputs = [tf.identity(x) for x in inputs]  # `fn` may use the given ones as well: constants
    with differentiating() as replica, tf.GradientTape() as tape:
        tape.watch(inputs)
        result = fn(*inputs)
        value = result if loss is None else loss(result)
    gradients = tape.gradient(value, [*(variable.value for variable in variables), *inputs])
    by_inputs = gradients[len(variables) :]
    gradients = [g if v.trainable else None for g, v in zip(gradients, variables, strict=False)]
    gradients = averaged(replica, gradients) + by_inputs  # inputs are each replica's own
    if not sparse:
        gradients = [g if g is None else tf.convert_to_tensor(g) for g in gradients]
        # All of them before any is used: for an optimizer that is called by hand, the tie that
        # `apply_gradients` tells of becomes a real one.
        with tf.control_dependencies([g for g in gradients if g is not None]):
            gradients = [g if g is None else tf.identity(g) for g in gradients]
    return result, gradients


def values_and_grads(
    fn: Callable[[], R],
    groups: Sequence[Sequence[keras.Variable]],
    losses: Callable[[R], Sequence[Tensor]],
) -> tuple[R, list[list[Tensor | None]]]:
    """Returns `fn()` and the gradients of several losses, each by its group; see `Backend`."""
    with differentiating() as replica, tf.GradientTape(persistent=True) as tape:
        result = fn()
        values = losses(result)
    gradients: list[list[Tensor | None]] = []
    for value, variables in zip(values, groups, strict=True):
        found = tape.gradient(value, [variable.value for variable in variables])
        found = [None if g is None else tf.convert_to_tensor(g) for g in found]
        found = [g if v.trainable else None for g, v in zip(found, variables, strict=True)]
        gradients.append(averaged(replica, found))
    # All of them before any update: see `value_and_grad`.
    with tf.control_dependencies([g for group in gradients for g in group if g is not None]):
        same = [[None if g is None else tf.identity(g) for g in group] for group in gradients]
    return result, same


def value_and_input_grad(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Returns `fn(*inputs)` and its gradients with respect to the inputs; see `Backend`."""
    with differentiating(), tf.GradientTape() as tape:
        tape.watch(inputs)
        value = fn(*inputs)
    return value, tape.gradient(value, inputs, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def repeat(fn: Callable[[Any], R], count: int, rows: object) -> R:
    """Applies `fn` to each row and stacks what it returns, inside a step; see `Backend`."""
    if current() is not None:
        # Replicas meet in gradients, which they can't inside of a loop in the graph.
        results = [read_out(fn(row_at(rows, i))) for i in range(count)]
        joined: R = tf.nest.map_structure(lambda *each: tf.stack(each), *results)
        return joined

    def one(*arguments: Any) -> Tree:
        return read_out(fn(*arguments))

    graph = tf.function(one, autograph=False).get_concrete_function(row_specs(rows))
    outputs = graph.structured_outputs
    stacked: R = loop_of(graph, outputs, None)(tf.constant(count), count, (rows,))
    return stacked


def trace(fn: Callable[..., object], args: Sequence[object], eager: bool = False) -> DryRun:
    """Runs `fn(*args)` abstractly under a `DryRun`, which it returns. No variable changes.

    Variables of TensorFlow itself are found as well: a `tf.Variable`, the state of a
    `tf.random.Generator`. With `eager`, the values are real ones, and only Keras' are found.
    """
    if eager:
        with DryRun() as dry_run, tensorflow_distribution.dry_run():
            dry_run.result = fn(*tf.nest.map_structure(as_tensor, tuple(args)))
        return dry_run

    def call(*inputs: Any) -> Tree:
        return dry_run.returned(fn(*inputs))

    with DryRun() as dry_run, tensorflow_distribution.dry_run():
        graph = tf.function(call, autograph=False).get_concrete_function(
            *tf.nest.map_structure(as_tensor, args)
        )
    copies = tensorflow_distribution.own_variables
    of_keras = {id(copy) for each in dry_run.variables for copy in copies(each.value)}
    others = {id(v.handle): v for v in graph.variables if id(v) not in of_keras}
    # The captured inputs are in first-use order; the graph's own list of variables has none.
    captured = [others[id(t)] for t in graph.captured_inputs if id(t) in others]
    dry_run.backend_variables.extend(map(_backend_variable, captured))
    dry_run.result = graph.structured_outputs if dry_run.result is None else dry_run.result
    return dry_run


def _backend_variable(variable: tf.Variable) -> BackendVariable:
    name, shape = variable.name.partition(":")[0], tuple(variable.shape)
    return BackendVariable(name, shape, variable.dtype.name, variable.read_value, variable.assign)


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Tensor | None],
    variables: Sequence[keras.Variable],
) -> None:
    """Updates `variables` once by `optimizer`, which is built."""
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)  # asks for a replica
    (optimizer.apply if scaled else alone(optimizer.apply))(gradients, variables)


def only_if(
    finite: Tensor, update: Callable[[], None], variables: Sequence[keras.Variable]
) -> None:
    """Runs `update` if `finite` is True; see `Backend`."""

    def updated() -> Any:
        update()
        return tf.constant(True)

    tf.cond(finite, updated, lambda: tf.constant(False))


def trace_id() -> object:
    """Returns an object that tells a trace from one nested inside it."""
    return tf.compat.v1.get_default_graph()


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Returns a sum of all values, which is finite if they all are."""
    found: Any = [t.values if isinstance(t, tf.IndexedSlices) else t for t in tensors]
    sums = [tf.reduce_sum(tf.cast(t, tf.float32)) for t in found]
    added: Tensor = tf.add_n(sums) if sums else tf.constant(0.0)
    return added


def squared_norm(tensor: Tensor) -> Tensor:
    """Returns the sum of the squares of all values, in float32."""
    dense: Any = tf.cast(tf.convert_to_tensor(tensor), tf.float32)
    if not tracing.for_xla or (dense.shape.num_elements() or 1) % LANES:
        squared: Tensor = 2 * tf.nn.l2_loss(dense)
        return squared
    # On a CPU XLA adds number after number, four times as long as several sums side by side take.
    # It would make one sum of two, but for what stands between them, and changes nothing.
    lanes = tf.abs(tf.reduce_sum(tf.square(tf.reshape(dense, (-1, LANES))), 0))
    added: Tensor = tf.reduce_sum(lanes)
    return added


def hold(variables: Sequence[keras.Variable | BackendVariable]) -> Held:
    """Returns variables with their present values, which no later step changes."""
    return [(variable, tf.identity(variable.value)) for variable in variables]


def settle(finite: Tensor, held: Held) -> None:
    """Gives variables the values that they had unless the step was finite."""
    for variable, old in held:
        variable.assign(tf.where(finite, variable.value, old))


def stack(batches: Sequence[T], capacity: int) -> T:
    """Batches of equal structure and shape as one tree of tensors (capacity, ...) on the device."""

    def join(*rows: Any) -> Any:
        if tf.is_tensor(rows[0]):
            return padded(tf.stack(rows), capacity)
        # In host memory first: tf.stack would make a tensor of each row.
        joined = np.zeros((capacity, *rows[0].shape), rows[0].dtype)
        for i, row in enumerate(rows):
            joined[i] = row
        return tf.convert_to_tensor(joined)

    stacked: T = keras.tree.map_structure(join, *batches)
    return stacked


def to_device(array: object, shared: bool = False) -> Tensor:
    """Returns an array-like as a tensor on the device."""
    tensor: Tensor = tf.convert_to_tensor(array)
    return tensor


def take(array: Tensor, indices: Tensor) -> Tensor:
    """Returns the rows `indices` of `array`, which are within its bounds."""
    rows: Tensor = tf.gather(array, indices)
    return rows


def assign(variable: keras.Variable | BackendVariable, value: Any) -> None:
    """Gives a variable a value that was read of it, on all devices."""
    tensorflow_distribution.assign(variable, value)


def copy(variable: keras.Variable | BackendVariable) -> Tensor:
    """Returns a copy of a variable's value that later steps leave alone."""
    copied: Tensor = tf.identity(variable.value)
    return copied


def view(variable: keras.Variable | BackendVariable) -> np.ndarray[Any, Any]:
    """Returns a variable's value, perhaps a view: copy it before the next step."""
    return np.asarray(tf.convert_to_tensor(variable.value))


def sharded(variable: keras.Variable | BackendVariable) -> ShardedArray | None:
    """Returns None: each process has whole variables."""
    return None


def assign_stored(variable: keras.Variable | BackendVariable, value: StoredArray) -> None:
    """Gives a variable a value out of files."""
    assign(variable, value.read())


def wait(tree: object) -> None:
    """Returns when every tensor of a structure has been computed."""
    for leaf in tf.nest.flatten(tree):
        leaf.numpy()


def iterate(dataset: TensorFlowDataset) -> Iterator[Any]:
    """Yields the batches of a `tf.data.Dataset`, as tensors."""
    return iter(dataset)


def candidates() -> tuple[bool, ...]:
    """Returns the settings of `jit_compile` that are worth timing here."""
    return (False, True)


def ways(convolutions: bool) -> tuple[tuple[bool, bool], ...]:
    """Pairs of `jit_compile` and whether to loop that are worth considering, the usual first.

    On the CPU, XLA's convolutions take several times as long.
    """
    if convolutions and not tf.config.list_physical_devices("GPU"):
        return ((False, True),)
    return (False, True), (True, True)


def describe() -> dict[str, Any]:
    """What the bits of a result depend on: devices, and threads of one operation (0: by itself)."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", "") for gpu in gpus]
    return {"devices": names, "threads": tf.config.threading.get_intra_op_parallelism_threads()}


def peak_device_bytes() -> int | None:
    """Returns the most memory of its device that the process had; None if it has none."""
    if not tf.config.list_logical_devices("GPU"):
        return None
    return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])


def set_deterministic() -> list[str]:
    """Makes operations compute the same bits in each run. Returns what can't be promised."""
    tf.config.experimental.enable_op_determinism()
    return []


def profile(folder: str) -> tuple[AbstractContextManager[Any], str]:
    """Returns what writes a trace of its body into a folder, and how to open the trace."""
    how = f"pip install tensorboard tensorboard-plugin-profile, then: tensorboard --logdir {folder}"
    return tf.profiler.experimental.Profile(folder), how


def placement() -> Placement:
    """Returns where steps run now: see `tensorflow_distribution.active`."""
    return tensorflow_distribution.active()


def random_state() -> dict[str, Any]:
    """The state of the backend's own generators (`tf.random`'s global one, where it was made)."""
    return {}


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned."""
