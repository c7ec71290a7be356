"""JAX: a stateful Keras function becomes one jitted pure function of the variables that it meets.

A function is run abstractly first, without its gradients and updates, under a `VariableRecorder`
that sees which Keras variables it reads and which it assigns. The compiled program takes (assigned
values, read values, arguments) and returns (new values, outputs); only the assigned values are
donated. A variable that is only read is an argument, never a constant of the program.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from polus.backends.scopes import DryRun, VariableRecorder, active_dry_run, current_scope

Tree = Any
COMPILES = True  # a new shape costs a compilation
TAKES_TEXT = False  # whether tensors may hold text
LONG_RUN_SECS: dict[bool, float] = {}  # each setting of `jit_compile` is worth a try in any run


def function(fn: Callable[..., Tree], jit_compile: bool | None = None) -> Callable[..., Tree]:
    """Compiles `fn`. `jit_compile=False` runs it eagerly, operation by operation, to debug it."""
    return fn if jit_compile is False else _Function(fn)


class _Function:
    """A stateful function, with one compiled program per signature of its arguments."""

    def __init__(self, fn: Callable[..., Tree]) -> None:
        self.fn = fn
        self.programs: dict[Any, _Program] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        leaves, structure = jax.tree_util.tree_flatten((args, kwargs))
        if current_scope() is not None or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self.fn(*args, **kwargs)  # inside an active trace: inlined
        leaves = [leaf.value if isinstance(leaf, keras.Variable) else leaf for leaf in leaves]
        # As in tf.function, a Python value is a constant of the program, an array is an argument.
        key = (structure, *(_signature(leaf) for leaf in leaves))
        program = self.programs.get(key)
        if program is None:
            program = self.programs[key] = _Program(self.fn, leaves, structure)
        return program([leaf for leaf in leaves if _is_array(leaf)])


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if _is_array(leaf) else (type(leaf), leaf)


class _Missed(Exception):
    """Names variables that a function used when it was traced, but not in its dry run."""


class _Program:
    """One compiled program: the variables it assigns and reads, and the jitted pure function."""

    def __init__(self, fn: Callable[..., Tree], leaves: list[Any], structure: Any) -> None:
        slots = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        constants = [None if _is_array(leaf) else leaf for leaf in leaves]

        def call(arrays: Sequence[Any]) -> Tree:
            filled = list(constants)
            for slot, array in zip(slots, arrays, strict=True):
                filled[slot] = array
            args, kwargs = jax.tree_util.tree_unflatten(structure, filled)
            return _read_out(fn(*args, **kwargs))

        self.call = call
        self.with_gradients = False
        self._find_variables([leaves[slot] for slot in slots])

    def _find_variables(self, arrays: list[Any]) -> None:
        with VariableRecorder() if self.with_gradients else DryRun() as met:
            # Outside the trace this scope ends, so variables that `fn` creates get real values.
            jax.eval_shape(lambda arrays: self.call(arrays), arrays)
        if isinstance(met, DryRun):
            for optimizer, variables in met.merged_updates():
                if not optimizer.built:
                    optimizer.build(variables)
                    met.record_assigned(optimizer.variables)
        self.assigned = list(met.assigned.values())
        self.read = [v for key, v in met.read.items() if key not in met.assigned]
        self.last: list[Any] = [None] * len(self.assigned)

        def pure(assigned: list[Any], read: list[Any], arrays: list[Any]) -> tuple[Tree, list[Any]]:
            known = (*self.assigned, *self.read)
            with VariableRecorder(zip(known, (*assigned, *read), strict=True)) as scope:
                outputs = self.call(arrays)
                new = [scope.get_current_value(v) for v in self.assigned]
            missed = [v.path for key, v in scope.assigned.items() if key not in met.assigned]
            missed += [v.path for v in scope.read.values() if id(v) not in met.read | met.assigned]
            if missed:
                raise _Missed(missed)
            return outputs, new

        self.compiled = jax.jit(pure, donate_argnums=0)

    def __call__(self, arrays: list[Any]) -> Tree:
        # A donated buffer is gone for everybody. So only what this program made itself is donated;
        # a value from elsewhere, which somebody may still hold or share, is copied, once.
        assigned = [
            value if (value := variable.value) is last else _copied(value)
            for variable, last in zip(self.assigned, self.last, strict=True)
        ]
        try:
            outputs, self.last = self.compiled(assigned, [v.value for v in self.read], arrays)
        except _Missed as missed:
            if not self.with_gradients:  # a custom gradient or an optimizer may use them
                self.with_gradients = True
                self._find_variables(arrays)
                return self(arrays)
            raise RuntimeError(
                f"The function used other variables when it was traced again: {missed}. Which "
                "variables it reads and assigns may depend on its arguments, but not on other "
                "Python state."
            ) from None
        for variable, value in zip(self.assigned, self.last, strict=True):
            variable.assign(value)
        return outputs


def _copied(array: Any) -> Any:
    """A copy on the same devices; unlike `jnp.copy` it compiles no program for each shape."""
    return jax.device_put(array, may_alias=False)


def _read_out(tree: Tree) -> Tree:
    """`tree` with the present value of each variable in it: what is returned changes no more."""
    return keras.tree.map_structure(
        lambda leaf: leaf.value if isinstance(leaf, keras.Variable) else leaf, tree
    )


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
    fn: Callable[[], Tree], variables: Sequence[Any], has_aux: bool = False, sparse: bool = False
) -> tuple[Tree, list[Any]]:
    """`fn()` and its gradients: None for a variable without effect, or not trainable.

    `sparse` changes nothing: only TensorFlow has sparse gradients.
    """
    outer = current_scope()
    if (dry_run := active_dry_run()) is not None:  # stand-ins of the right shape
        result = fn()
        found = [v.trainable and id(v) in dry_run.read for v in variables]
        return result, [v.value if f else None for v, f in zip(variables, found, strict=True)]
    by = [variable for variable in variables if variable.trainable]
    connected = [False] * len(by)
    assigned: list[Any] = []

    def pure(values: list[Any]) -> tuple[Any, Tree]:
        values = _watched(values, connected)
        with _Detaching(by, values, outer) as scope:
            result = _read_out(fn())
        # What was assigned inside leaves as an output, else tracers would leak.
        assigned[:] = scope.assigned.values()
        new = [scope.state_mapping[id(variable)] for variable in assigned]
        value, aux = result if has_aux else (result, None)
        return value, (result if has_aux else value, aux, new)

    (_, (result, _, new)), gradients = jax.value_and_grad(pure, has_aux=True)(
        [variable.value for variable in by]
    )
    for variable, value in zip(assigned, new, strict=True):
        variable.assign(value)
    by_id = {id(v): g for v, g, c in zip(by, gradients, connected, strict=True) if c}
    return result, [by_id.get(id(variable)) for variable in variables]


def value_and_input_grad(fn: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """`fn(*inputs)`, a scalar, and its gradients by the inputs, which are tensors.

    `fn` may read variables; it assigns none.
    """
    value, gradients = jax.value_and_grad(lambda tensors: fn(*tensors))(list(inputs))
    return value, gradients


def _watched(values: list[Any], connected: list[bool]) -> list[Any]:
    """`values`, and `connected` set where a gradient came back through them.

    JAX gives zeros where there is no path; the other backends give None, and Keras' optimizers skip
    None. Symbolic zeros tell the two apart.
    """

    @jax.custom_vjp
    def identity(values: list[Any]) -> list[Any]:
        return values

    def forward(values: list[Any]) -> tuple[list[Any], None]:
        return [v.value for v in values], None

    def backward(_: None, cotangents: list[Any]) -> tuple[list[Any]]:
        def used(i: int, cotangent: Any) -> Any:
            if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
                return jnp.zeros(cotangent.shape, cotangent.dtype)
            connected[i] = True
            return cotangent

        return ([used(i, c) for i, c in enumerate(cotangents)],)

    identity.defvjp(forward, backward, symbolic_zeros=True)
    return identity(values)


def repeat(step: Callable[..., Tree], row: Callable[[Tree, Any], tuple[Any, ...]]) -> Any:
    """Many steps as one function `(count, capacity, batches) -> outputs`, for `function`.

    The number of steps is an argument of a `while` loop, so that one compiled program serves every
    count up to `capacity`. Outputs are stacked to (capacity, ...); rows past `count` are zero.
    """

    def many(count: Any, capacity: int, batches: Tree) -> Tree:
        def one(i: Any) -> Tree:
            return _read_out(step(*row(batches, i)))

        outer = current_scope()
        if active_dry_run() is not None:
            return jax.tree_util.tree_map(
                lambda o: jnp.broadcast_to(o, (capacity, *o.shape)), one(0)
            )
        with DryRun((), outer) as met:
            outputs = jax.eval_shape(one, jax.ShapeDtypeStruct((), jnp.int32))
        variables = list(met.assigned.values())
        rows = jax.tree_util.tree_map(lambda o: jnp.zeros((capacity, *o.shape), o.dtype), outputs)

        def body(carry: tuple[Any, list[Any], Tree]) -> tuple[Any, list[Any], Tree]:
            i, values, rows = carry
            with VariableRecorder(zip(variables, values, strict=True), outer) as scope:
                output = one(i)
                values = [scope.get_current_value(variable) for variable in variables]
            if missed := scope.assigned.keys() - met.assigned.keys():
                raise _Missed([scope.assigned[key].path for key in missed])
            rows = jax.tree_util.tree_map(lambda row, new: row.at[i].set(new), rows, output)
            return i + 1, values, rows

        start = (jnp.int32(0), [variable.value for variable in variables], rows)
        _, values, rows = jax.lax.while_loop(lambda carry: carry[0] < count, body, start)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        return rows

    return many


def trace(fn: Callable[..., Tree], args: Sequence[Any]) -> DryRun:
    """Runs `fn(*args)` abstractly under a `DryRun`, which it returns. No variable changes."""
    with DryRun() as dry_run:
        # A new function each time: JAX would remember the old one's trace, and run nothing.
        dry_run.result = jax.eval_shape(functools.partial(fn), *args)
    return dry_run


def apply_gradients(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """One update of `variables` by `optimizer`, which is built."""
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


def stack(batches: Sequence[Tree], capacity: int) -> Tree:
    """Batches of equal structure and shape as one tree of arrays (capacity, ...) on the device."""

    def join(*rows: Any) -> Any:
        first = np.asarray(rows[0])
        joined = np.zeros((capacity, *first.shape), first.dtype)
        for i, row in enumerate(rows):
            joined[i] = row
        return jax.device_put(joined)

    return jax.tree_util.tree_map(join, *batches)


def to_device(array: Any) -> Any:
    """An array-like as an array on the device."""
    return array if isinstance(array, jax.Array) else jax.device_put(np.asarray(array))


def index(array: Any, i: Any) -> Any:
    """Row `i` of `array`."""
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False)


def take(array: Any, indices: Any) -> Any:
    """The rows `indices` of `array`, which are within its bounds."""
    # Apart from what follows: merged into a convolution, it takes XLA longer to compile.
    return jax.lax.optimization_barrier(array.at[indices].get(mode="promise_in_bounds"))


def copy(variable: Any) -> Any:
    """A copy of a variable's value that later steps leave alone."""
    return _copied(variable.value)


def view(variable: Any) -> Any:
    """A variable's value as a NumPy array, perhaps a view: copy it before the next step."""
    return np.asarray(variable.value)


def wait(tree: Tree) -> None:
    """Returns when everything in `tree` has been computed."""
    jax.block_until_ready(tree)


def iterate(dataset: Any) -> Iterator[Any]:
    """The batches of a `tf.data.Dataset`, as NumPy arrays."""
    return dataset.as_numpy_iterator()  # type: ignore[no-any-return]


def graph_blocks(iterator: Any) -> None:
    """Only TensorFlow reads many batches in one call."""
    return


def candidates() -> tuple[bool, ...]:
    """The settings of `jit_compile` that are worth measuring here."""
    return (True,)


def describe() -> dict[str, Any]:
    """What the bits of a result depend on: devices. JAX doesn't say how many threads it has."""
    return {"devices": [device.device_kind for device in jax.devices()]}


def random_state() -> dict[str, Any]:
    """The state of the backend's own generators: JAX has none, its keys are values."""
    return {}


def set_random_state(state: dict[str, Any]) -> None:
    """Puts `random_state()` back."""
