"""Compiled JAX programs: a stateful function as one jitted pure function of its variables.

A function first runs abstractly, without its gradients and updates, under a `VariableRecorder`
that sees which Keras variables it reads and which it assigns. The compiled program takes (assigned
values, read values, arguments) and returns (outputs, new values); only the assigned values are
donated. A variable that is only read is an argument, never a constant of the program.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import keras
import numpy as np

from polus.backends import jax_distribution
from polus.backends.base import Known, as_arguments
from polus.backends.jax_executables import Executable
from polus.backends.jax_loops import Tree, Values, output_buffers, row_at, run_loop, written
from polus.backends.scopes import DryRun, VariableRecorder, current_scope

T = TypeVar("T")


class MissedVariablesError(RuntimeError):
    """A function used other variables when it was traced than in its dry run."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(
            f"The function used other variables when it was traced again: {', '.join(paths)}. "
            "Which variables it reads and assigns may depend on its arguments, but not on other "
            "Python state."
        )


class Stateful:
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
        assigned = list(scope.assigned.values())
        self.know(assigned, [v for key, v in scope.read.items() if key not in scope.assigned])

    def know(self, assigned: Sequence[Any], read: Sequence[Any]) -> None:
        """Sets the variables of the function."""
        self.assigned, self.read = list(assigned), list(read)
        self._last = [None] * len(self.assigned)

    def call(self, *arguments: Any) -> Tree:
        """Runs the function as it is."""
        return read_out(self.fn(*arguments))

    def pure(self, assigned: Values, read: Values, *arguments: Any) -> tuple[Tree, Values]:
        """Returns what the function returns, and the new values of the assigned variables.

        Raises:
            MissedVariablesError: If the function uses other variables than those that were found.
        """
        known = (*self.assigned, *self.read)
        values = zip(known, (*assigned, *read), strict=True)
        with VariableRecorder(values, self.outer, initialize_variables=False) as scope:
            outputs = read_out(self.fn(*arguments))
            new = [scope.get_current_value(variable) for variable in self.assigned]
        may_assign = set(map(id, self.assigned))
        may_read = may_assign.union(map(id, self.read))
        missed = [v.path for key, v in scope.assigned.items() if key not in may_assign]
        missed += [v.path for key, v in scope.read.items() if key not in may_read]
        if missed:
            raise MissedVariablesError(missed)
        return outputs, new

    def look_closer(self) -> None:
        """Looks with gradients from now on; raises the error being handled if it did already."""
        if self.with_gradients:
            raise
        self.with_gradients = True

    def values(self, held: bool = False) -> tuple[Values, Values]:
        """Returns the values of the assigned variables, to be donated, and of the read ones.

        A donated buffer is gone for everybody. So only what the program itself made is donated; a
        value from elsewhere, which somebody may still hold or share, is copied, once.
        """
        if held:
            return [v.value for v in self.assigned], [v.value for v in self.read]
        assigned = [
            value if (value := variable.value) is last else copied(value)
            for variable, last in zip(self.assigned, self._last, strict=True)
        ]
        return assigned, [variable.value for variable in self.read]

    def assign(self, values: Values) -> None:
        """Assigns the new values that the program has made."""
        self._last = values
        for variable, value in zip(self.assigned, values, strict=True):
            variable.assign(value)


class Arguments:
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


class Program:
    """A stateful function, compiled once per signature of its arguments.

    As in `tf.function`, an array is an argument of the compiled program, any other Python value is
    a constant of it.

    Args:
        held: Whether the values that variables have before a call stay there after it.
        known: The variables that the function assigns, and those that it only reads, if somebody
            has looked before.
    """

    def __init__(self, held: bool = False, known: Known | None = None) -> None:
        self.donated = () if held else (0,)
        self.known = known
        self.compiled: dict[Any, tuple[Stateful, Callable[..., Any]]] = {}

    def traced(self, arguments: Arguments) -> tuple[Callable[..., Tree], Sequence[Any]]:
        """Returns the function to trace, and arrays or their shapes to trace it with."""
        raise NotImplementedError

    def whole(
        self, pure: Callable[..., Any], outputs: Tree, arguments: Arguments
    ) -> Callable[..., tuple[Any, Values]]:
        """Returns the program to compile around the traced function."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        arguments = Arguments(args, kwargs)
        program = self.compiled.get(arguments.key)
        if program is None:
            fn, sample = self.traced(arguments)
            stateful = Stateful(fn)
            known = self.known is not None
            if self.known is not None:
                stateful.know(*self.known)
            while True:
                if not known:
                    with stateful.finding_variables():
                        jax.eval_shape(functools.partial(stateful.call), *sample)
                # Traced here, and not inside the program: so few frames are around the user's code.
                pure = jax.jit(functools.partial(stateful.pure), inline=True)
                values = [v.value for v in stateful.assigned], [v.value for v in stateful.read]
                try:
                    outputs, new = jax.eval_shape(pure, *values, *sample)
                    break
                except MissedVariablesError:
                    if not known:
                        stateful.look_closer()
                    known = False  # with other arguments it may use others
            self.known = stateful.assigned, stateful.read  # a new shape is traced once
            layouts = jax_distribution.output_shardings(values[0])
            whole = jax.jit(
                self.whole(pure, outputs, arguments),
                donate_argnums=self.donated,
                keep_unused=True,
                **layouts,
            )
            program = self.compiled[arguments.key] = stateful, Executable(whole, (outputs, new))
        return self.run(*program, arguments)

    def run(self, stateful: Stateful, compiled: Callable[..., Any], arguments: Arguments) -> Tree:
        """Calls the compiled program, and gives the variables what it has made."""
        outputs, new = compiled(*stateful.values(not self.donated), *arguments.arrays)
        stateful.assign(new)
        return outputs


class Function(Program):
    """A compiled function with any arguments. Called in an active trace, it is inlined."""

    def __init__(self, fn: Callable[..., Tree]) -> None:
        super().__init__()
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        leaves = jax.tree_util.tree_leaves((args, kwargs))
        if current_scope() is not None or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self.fn(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def traced(self, arguments: Arguments) -> tuple[Callable[..., Tree], Sequence[Any]]:
        def call(*arrays: Any) -> Tree:
            args, kwargs = arguments.filled(arrays)
            return self.fn(*args, **kwargs)

        return call, arguments.arrays

    def whole(
        self, pure: Callable[..., Any], outputs: Tree, arguments: Arguments
    ) -> Callable[..., tuple[Any, Values]]:
        return pure


class Step(Program):
    """A compiled step of one batch: its arguments are that batch, or a payload to unpack."""

    def __init__(
        self,
        step: Callable[..., Tree],
        unpack: Callable[[Any], Any] | None,
        held: bool = False,
        known: Known | None = None,
    ) -> None:
        super().__init__(held, known)
        self.step = step
        self.unpack = unpack

    def batches(self, payload: object) -> tuple[Any, ...]:
        """Returns the step's arguments, with an axis for the batches."""
        return as_arguments(payload if self.unpack is None else self.unpack(payload))

    def first(self, payload: object) -> tuple[Any, ...]:
        """Returns the first batch of a payload."""
        return tuple(row_at(self.batches(payload), 0))

    def traced(self, arguments: Arguments) -> tuple[Callable[..., Tree], Sequence[Any]]:
        args, _ = arguments.filled(arguments.arrays)
        return self.step, args if self.unpack is None else jax.eval_shape(self.first, *args)

    def whole(
        self, pure: Callable[..., Any], outputs: Tree, arguments: Arguments
    ) -> Callable[..., tuple[Any, Values]]:
        def single(assigned: Values, read: Values, *arrays: Any) -> tuple[Tree, Values]:
            args, _ = arguments.filled(arrays)
            batch = args if self.unpack is None else self.first(*args)
            return pure(assigned, read, *batch)  # type: ignore[no-any-return]

        return single


class Steps(Step):
    """Many steps as one compiled program: its arguments are count, capacity and a payload.

    The number of steps is an argument of a `while` loop, so that one compiled program serves every
    count up to the capacity. Scalars are stacked to (capacity,); rows past `count` are zero. Of any
    other output, such as samples to draw, the last step's is returned.

    The room for them is an argument of the program: made inside, it is one more kernel to compile.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stacks: dict[Any, Tree] = {}

    def traced(self, arguments: Arguments) -> tuple[Callable[..., Tree], Sequence[Any]]:
        (_, _, payload), _ = arguments.filled(arguments.arrays)
        return self.step, jax.eval_shape(self.first, payload)

    def whole(
        self, pure: Callable[..., Any], outputs: Tree, arguments: Arguments
    ) -> Callable[..., tuple[Any, Values]]:
        (_, capacity, _), _ = arguments.filled(arguments.arrays)
        self.stacks[arguments.key] = output_buffers(outputs, capacity)

        def loop(assigned: Values, read: Values, stacks: Tree, *arrays: Any) -> tuple[Tree, Values]:
            (count, _, payload), _ = arguments.filled(arrays)
            batches = self.batches(payload)

            def body(i: Any, values: Values) -> tuple[Tree, Values]:
                return pure(values, read, *row_at(batches, i))  # type: ignore[no-any-return]

            return run_loop(body, count, assigned, stacks)

        return loop

    def run(self, stateful: Stateful, compiled: Callable[..., Any], arguments: Arguments) -> Tree:
        """Runs the steps of a payload."""
        stacks = self.stacks[arguments.key]
        outputs, new = compiled(*stateful.values(not self.donated), stacks, *arguments.arrays)
        stateful.assign(new)
        return outputs


class StepsOneByOne(Steps):
    """Many steps as calls of a program of one, for what is slow inside a compiled loop.

    The variables are read before the first step and assigned after the last one: for CycleGAN's
    four models and optimizers that takes 0.4 ms, beside a step of 6 ms.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._unpacked = self.batches if self.unpack is None else jax.jit(self.batches)

    def whole(
        self, pure: Callable[..., Any], outputs: Tree, arguments: Arguments
    ) -> Callable[..., tuple[Any, Values]]:
        def single(
            assigned: Values, read: Values, i: Any, batches: tuple[Any, ...], stacks: Tree
        ) -> tuple[Tree, Values]:
            new, values = pure(assigned, read, *row_at(batches, i))
            return written(stacks, new, i), values

        (_, capacity, _), _ = arguments.filled(arguments.arrays)
        self.stacks[arguments.key] = output_buffers(outputs, capacity)
        return single

    def run(self, stateful: Stateful, compiled: Callable[..., Any], arguments: Arguments) -> Tree:
        """Runs the steps of a payload."""
        (count, _, payload), _ = arguments.filled(arguments.arrays)
        batches, stacks = self._unpacked(payload), self.stacks[arguments.key]
        values, read = stateful.values(not self.donated)
        try:
            for i in range(int(count)):
                stacks, values = compiled(values, read, np.int32(i), batches, stacks)
        finally:  # what was donated is gone
            stateful.assign(values)
        return stacks


def eager(
    step: Callable[..., Tree], unpack: Callable[[Any], Any] | None, many: bool
) -> Callable[..., Tree]:
    """Returns a program of one step or of many that runs them operation by operation."""

    def single(*arguments: Any) -> Tree:
        if unpack is not None:
            arguments = as_arguments(row_at(unpack(*arguments), 0))
        return read_out(step(*arguments))

    def loop(count: Any, capacity: int, payload: Any) -> Tree:
        batches = as_arguments(payload if unpack is None else unpack(payload))
        outputs = []
        for i in range(int(count)):
            outputs.append(read_out(step(*row_at(batches, i))))
        return jax.tree_util.tree_map(
            lambda *rows: rows[-1] if rows[0].ndim else jnp.stack(rows), *outputs
        )

    return loop if many else single


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if _is_array(leaf) else (type(leaf), leaf)


def copied(array: Any) -> jax.Array:
    """Returns a copy on the same devices. Unlike `jnp.copy` it compiles no program per shape."""
    # Only on several devices with its layout, which would tie other arrays to those devices.
    traced = isinstance(array, jax.core.Tracer)
    layout = None if traced or len(array.sharding.device_set) < 2 else array.sharding
    copy: jax.Array = jax.device_put(array, layout, may_alias=False)
    return copy


def read_out(tree: T) -> T:
    """Replaces each variable of a structure by its present value, which changes no more."""
    present: T = keras.tree.map_structure(
        lambda leaf: leaf.value if isinstance(leaf, keras.Variable) else leaf, tree
    )
    return present
