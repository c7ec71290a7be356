"""JAX: a stateful Keras function becomes one jitted pure function of the variables that it meets.

A function is run abstractly first, without its gradients and updates, under a `VariableRecorder`
that sees which Keras variables it reads and which it assigns. The compiled program takes (assigned
values, read values, arguments) and returns (new values, outputs); only the assigned values are
donated. A variable that is only read is an argument, never a constant of the program.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from polus.backends import jax_distribution
from polus.backends.base import as_arguments
from polus.backends.placement import Placement
from polus.backends.scopes import DryRun, VariableRecorder, active_dry_run, current_scope

Tree = Any
Values = list[Any]
COMPILES = True  # a new shape costs a compilation
TAKES_TEXT = False  # whether tensors may hold text
LONG_RUN_SECS: dict[bool, float] = {}  # each setting of `jit_compile` is worth a try in any run


def function(fn: Callable[..., Tree], jit_compile: bool | None = None) -> Callable[..., Tree]:
    """Compiles `fn`. `jit_compile=False` runs it eagerly, operation by operation, to debug it."""
    return fn if jit_compile is False else _Function(fn)


class _Missed(RuntimeError):
    """A function used other variables when it was traced than in its dry run."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(
            f"The function used other variables when it was traced again: {', '.join(paths)}. "
            "Which variables it reads and assigns may depend on its arguments, but not on other "
            "Python state."
        )


class _Stateful:
    """A function that uses variables, as a pure function of their values.

    Args:
        fn: The function.
        outer: The scope in which it runs, if any.

    Attributes:
        assigned: The variables that the function assigns, once they were found.
        read: Those that it only reads.
        with_gradients: Whether variables are looked for with gradients. It takes longer, and finds
            those that a custom gradient or a custom optimizer uses.
    """

    def __init__(self, fn: Callable[..., Tree], outer: VariableRecorder | None = None) -> None:
        self.fn = fn
        self.outer = outer
        self.assigned: list[Any] = []
        self.read: list[Any] = []
        self.with_gradients = False
        self._last: list[Any] = []

    @contextlib.contextmanager
    def finding_variables(self) -> Iterator[None]:
        """Finds the variables of the function, of which `call` has to be traced in the block."""
        # The trace ends before this scope, so variables that `fn` creates get real values.
        with (VariableRecorder if self.with_gradients else DryRun)((), self.outer) as scope:
            yield
        if isinstance(scope, DryRun):
            for optimizer, variables in scope.merged_updates():
                if not optimizer.built:
                    optimizer.build(variables)
                    scope.record_assigned(optimizer.variables)
        self.assigned = list(scope.assigned.values())
        self.read = [v for key, v in scope.read.items() if key not in scope.assigned]
        self._last = [None] * len(self.assigned)

    def call(self, *arguments: Any) -> Tree:
        """Runs the function as it is."""
        return _read_out(self.fn(*arguments))

    def pure(self, assigned: Values, read: Values, *arguments: Any) -> tuple[Tree, Values]:
        """Returns what the function returns, and the new values of the assigned variables.

        Raises:
            _Missed: If the function uses other variables than those that were found.
        """
        known = (*self.assigned, *self.read)
        values = zip(known, (*assigned, *read), strict=True)
        with VariableRecorder(values, self.outer, initialize_variables=False) as scope:
            outputs = _read_out(self.fn(*arguments))
            new = [scope.get_current_value(variable) for variable in self.assigned]
        may_assign = set(map(id, self.assigned))
        may_read = may_assign.union(map(id, self.read))
        missed = [v.path for key, v in scope.assigned.items() if key not in may_assign]
        missed += [v.path for key, v in scope.read.items() if key not in may_read]
        if missed:
            raise _Missed(missed)
        return outputs, new

    def look_closer(self) -> None:
        """Called in the handler of `_Missed`: looks with gradients from now on, or raises again."""
        if self.with_gradients:
            raise
        self.with_gradients = True

    def values(self) -> tuple[Values, Values]:
        """Returns the values of the assigned variables, to be donated, and of the read ones.

        A donated buffer is gone for everybody. So only what the program itself made is donated; a
        value from elsewhere, which somebody may still hold or share, is copied, once.
        """
        assigned = [
            value if (value := variable.value) is last else jax_distribution.copied(value)
            for variable, last in zip(self.assigned, self._last, strict=True)
        ]
        return assigned, [variable.value for variable in self.read]

    def assign(self, values: Values) -> None:
        """Assigns the new values that the program has made."""
        self._last = values
        for variable, value in zip(self.assigned, values, strict=True):
            variable.assign(value)


class _Arguments:
    """The arguments of a call: the arrays among them, and the structure around the arrays."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self.structure = jax.tree_util.tree_flatten((args, kwargs))
        self.leaves = [leaf.value if isinstance(leaf, keras.Variable) else leaf for leaf in leaves]
        self.arrays = [leaf for leaf in self.leaves if _is_array(leaf)]
        self.key = (self.structure, *map(_signature, self.leaves))

    def filled(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the positional and the named arguments with other arrays."""
        following = iter(arrays)
        leaves = [next(following) if _is_array(leaf) else leaf for leaf in self.leaves]
        return jax.tree_util.tree_unflatten(self.structure, leaves)  # type: ignore[no-any-return]


class _Program:
    """A stateful function, compiled once per signature of its arguments.

    As in `tf.function`, an array is an argument of the compiled program, any other Python value is
    a constant of it.
    """

    def __init__(self) -> None:
        self.compiled: dict[Any, tuple[_Stateful, Callable[..., Any]]] = {}

    def traced(self, arguments: _Arguments) -> tuple[Callable[..., Tree], Sequence[Any]]:
        """Returns the function to trace, and arrays or their shapes to trace it with."""
        raise NotImplementedError

    def whole(self, pure: Callable[..., Any], outputs: Tree, arguments: _Arguments) -> Any:
        """Returns the program to compile around the traced function."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        arguments = _Arguments(args, kwargs)
        program = self.compiled.get(arguments.key)
        if program is None:
            fn, sample = self.traced(arguments)
            stateful = _Stateful(fn)
            while True:
                with stateful.finding_variables():
                    jax.eval_shape(functools.partial(stateful.call), *sample)
                # Traced here, and not inside the program: so few frames are around the user's code.
                pure = jax.jit(functools.partial(stateful.pure), inline=True)
                values = [v.value for v in stateful.assigned], [v.value for v in stateful.read]
                try:
                    outputs, _ = jax.eval_shape(pure, *values, *sample)
                    break
                except _Missed:
                    stateful.look_closer()
            layouts = jax_distribution.output_shardings(values[0])
            whole = jax.jit(self.whole(pure, outputs, arguments), donate_argnums=0, **layouts)
            program = self.compiled[arguments.key] = stateful, whole
        stateful, compiled = program
        outputs, new = compiled(*stateful.values(), *arguments.arrays)
        stateful.assign(new)
        return outputs


class _Function(_Program):
    """A compiled function with any arguments. Called in an active trace, it is inlined."""

    def __init__(self, fn: Callable[..., Tree]) -> None:
        super().__init__()
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        leaves = jax.tree_util.tree_leaves((args, kwargs))
        if current_scope() is not None or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self.fn(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def traced(self, arguments: _Arguments) -> tuple[Callable[..., Tree], Sequence[Any]]:
        def call(*arrays: Any) -> Tree:
            args, kwargs = arguments.filled(arrays)
            return self.fn(*args, **kwargs)

        return call, arguments.arrays

    def whole(self, pure: Callable[..., Any], outputs: Tree, arguments: _Arguments) -> Any:
        return pure


class _Step(_Program):
    """A compiled step of one batch: its arguments are that batch, or a payload to unpack."""

    def __init__(self, step: Callable[..., Tree], unpack: Callable[[Any], Any] | None) -> None:
        super().__init__()
        self.step = step
        self.unpack = unpack

    def batches(self, payload: Any) -> tuple[Any, ...]:
        """Returns the step's arguments, with an axis for the batches."""
        return as_arguments(payload if self.unpack is None else self.unpack(payload))

    def first(self, payload: Any) -> tuple[Any, ...]:
        """Returns the first batch of a payload."""
        return tuple(_row(self.batches(payload), 0))

    def traced(self, arguments: _Arguments) -> tuple[Callable[..., Tree], Sequence[Any]]:
        args, _ = arguments.filled(arguments.arrays)
        return self.step, args if self.unpack is None else jax.eval_shape(self.first, *args)

    def whole(self, pure: Callable[..., Any], outputs: Tree, arguments: _Arguments) -> Any:
        def single(assigned: Values, read: Values, *arrays: Any) -> tuple[Tree, Values]:
            args, _ = arguments.filled(arrays)
            batch = args if self.unpack is None else self.first(*args)
            return pure(assigned, read, *batch)  # type: ignore[no-any-return]

        return single


class _Steps(_Step):
    """Many steps as one compiled program: its arguments are count, capacity and a payload.

    The number of steps is an argument of a `while` loop, so that one compiled program serves every
    count up to the capacity. Outputs are stacked to (capacity, ...); rows past `count` are zero.
    """

    def traced(self, arguments: _Arguments) -> tuple[Callable[..., Tree], Sequence[Any]]:
        (_, _, payload), _ = arguments.filled(arguments.arrays)
        return self.step, jax.eval_shape(self.first, payload)

    def whole(self, pure: Callable[..., Any], outputs: Tree, arguments: _Arguments) -> Any:
        def loop(assigned: Values, read: Values, *arrays: Any) -> tuple[Tree, Values]:
            (count, capacity, payload), _ = arguments.filled(arrays)
            batches = self.batches(payload)

            def body(i: Any, values: Values) -> tuple[Tree, Values]:
                return pure(values, read, *_row(batches, i))  # type: ignore[no-any-return]

            return _loop(body, count, assigned, _zeros(outputs, capacity))

        return loop


def _row(batches: Tree, i: Any) -> Tree:
    return jax.tree_util.tree_map(
        lambda rows: jax.lax.dynamic_index_in_dim(rows, i, keepdims=False), batches
    )


def _zeros(outputs: Tree, capacity: int) -> Tree:
    """Returns room for the outputs of `capacity` steps."""
    return jax.tree_util.tree_map(lambda o: jnp.zeros((capacity, *o.shape), o.dtype), outputs)


def _loop(
    body: Callable[[Any, Values], tuple[Tree, Values]], count: Any, values: Values, stacks: Tree
) -> tuple[Tree, Values]:
    """Runs `body(i, values) -> (outputs, new values)` and writes the outputs into row i."""

    def turn(carry: tuple[Any, Values, Tree]) -> tuple[Any, Values, Tree]:
        i, values, stacks = carry
        outputs, values = body(i, values)
        stacks = jax.tree_util.tree_map(lambda rows, new: rows.at[i].set(new), stacks, outputs)
        return i + 1, values, stacks

    start = (jnp.int32(0), values, stacks)
    _, values, stacks = jax.lax.while_loop(lambda carry: carry[0] < count, turn, start)
    return stacks, values


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if _is_array(leaf) else (type(leaf), leaf)


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
    fn: Callable[[], Tree],
    variables: Sequence[Any],
    loss: Callable[[Tree], Any] | None = None,
    sparse: bool = False,
) -> tuple[Tree, list[Any]]:
    """Returns `fn()` and the gradients of its loss; see `Backend`.

    `sparse` changes nothing: only TensorFlow has sparse gradients.
    """
    outer = current_scope()
    if (dry_run := active_dry_run()) is not None:  # stand-ins of the right shape
        result = fn()
        if loss is not None:
            loss(result)
        found = [v.trainable and id(v) in dry_run.read for v in variables]
        return result, [v.value if f else None for v, f in zip(variables, found, strict=True)]
    trainable = [variable for variable in variables if variable.trainable]
    connected = [False] * len(trainable)
    assigned: list[Any] = []

    def differentiated(values: Values) -> tuple[Any, tuple[Tree, Values]]:
        values = _watched(values, connected)
        with _Detaching(trainable, values, outer) as scope:
            result = _read_out(fn())
            value = result if loss is None else loss(result)
        # What was assigned inside leaves as an output, else tracers would leak.
        assigned[:] = scope.assigned.values()
        return value, (result, [scope.state_mapping[id(variable)] for variable in assigned])

    (_, (result, new)), gradients = jax.value_and_grad(differentiated, has_aux=True)(
        [variable.value for variable in trainable]
    )
    for variable, value in zip(assigned, new, strict=True):
        variable.assign(value)
    by_id = {id(v): g for v, g, c in zip(trainable, gradients, connected, strict=True) if c}
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


def program(
    step: Callable[..., Tree],
    unpack: Callable[[Any], Any] | None = None,
    many: bool = False,
    jit_compile: bool | None = None,
) -> Callable[..., Tree]:
    """Compiles a step, or a loop over many; see `Backend`.

    `jit_compile=False` runs it eagerly, operation by operation, to debug it.
    """
    if jit_compile is not False:
        return _Steps(step, unpack) if many else _Step(step, unpack)

    def single(*arguments: Any) -> Tree:
        if unpack is not None:
            arguments = as_arguments(_row(unpack(*arguments), 0))
        return _read_out(step(*arguments))

    def loop(count: Any, capacity: int, payload: Any) -> Tree:
        batches = as_arguments(payload if unpack is None else unpack(payload))
        outputs = []
        for i in range(int(count)):
            outputs.append(_read_out(step(*_row(batches, i))))
        return jax.tree_util.tree_map(lambda *rows: jnp.stack(rows), *outputs)

    return loop if many else single


def repeat(fn: Callable[..., Tree], count: int, rows: Tree) -> Tree:
    """Applies `fn` to each row and stacks what it returns, inside a step; see `Backend`."""
    stateful = _Stateful(lambda i: fn(_row(rows, i)), current_scope())
    if active_dry_run() is not None:
        outputs = stateful.call(0)
        return jax.tree_util.tree_map(lambda o: jnp.broadcast_to(o, (count, *o.shape)), outputs)
    while True:
        with stateful.finding_variables():
            outputs = jax.eval_shape(functools.partial(stateful.call), jnp.int32(0))
        assigned, read = ([v.value for v in part] for part in (stateful.assigned, stateful.read))
        body = functools.partial(_repeated, stateful, read)
        try:
            stacks, new = _loop(body, count, assigned, _zeros(outputs, count))
        except _Missed:
            stateful.look_closer()
        else:
            stateful.assign(new)
            return stacks


def _repeated(stateful: _Stateful, read: Values, i: Any, values: Values) -> tuple[Tree, Values]:
    return stateful.pure(values, read, i)


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
        return jax.device_put(jax_distribution.join_rows(rows, capacity))

    return jax.tree_util.tree_map(join, *batches)


def to_device(array: Any) -> Any:
    """An array-like as an array on the device."""
    return array if isinstance(array, jax.Array) else jax.device_put(np.asarray(array))


def take(array: Any, indices: Any) -> Any:
    """The rows `indices` of `array`, which are within its bounds."""
    # Apart from what follows: merged into a convolution, it takes XLA longer to compile.
    return jax.lax.optimization_barrier(array.at[indices].get(mode="promise_in_bounds"))


def copy(variable: Any) -> Any:
    """A copy of a variable's value that later steps leave alone."""
    return jax_distribution.copied(variable.value)


def view(variable: Any) -> Any:
    """A variable's value as a NumPy array, perhaps a view: copy it before the next step."""
    return jax_distribution.on_host(variable.value)


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


def placement() -> Placement:
    """Where steps run now: see `jax_distribution.active`."""
    return jax_distribution.active()


def random_state() -> dict[str, Any]:
    """The state of the backend's own generators: JAX has none, its keys are values."""
    return {}


def set_random_state(state: dict[str, Any]) -> None:
    """Puts `random_state()` back."""
