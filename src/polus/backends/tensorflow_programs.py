"""A step as TensorFlow's programs: graphs, for batches of one shape or of several."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from polus.backends.base import Known, Unpack, as_arguments
from polus.backends.tensorflow_loops import (
    first_batch,
    loop_of,
    map_arrays,
    only_step,
    row_at,
    tracing,
)

Tree = Any
Lengths = Sequence[tuple[int | None, ...]]
logger = logging.getLogger("polus.backends")


def call_signature(tree: Tree) -> Any:
    """The structure, shapes, dtypes and Python values of a call's arguments."""
    if isinstance(tree, dict):
        return dict, *((name, call_signature(value)) for name, value in tree.items())
    if isinstance(tree, list | tuple):
        return type(tree), *map(call_signature, tree)
    if tf.is_tensor(tree):
        return tree.dtype, *tree.shape
    return type(tree), tree


def as_tensor(leaf: Any) -> Any:
    """Arrays become arguments of the graph; a Python value stays a constant of it."""
    if isinstance(leaf, keras.Variable):
        leaf = leaf.value
    return tf.convert_to_tensor(leaf) if hasattr(leaf, "__array__") else leaf


def read_out(tree: Tree) -> Tree:
    """Returns the tree with the present value of each variable in it, which changes no more."""
    return tf.nest.map_structure(
        lambda leaf: as_tensor(leaf) if isinstance(leaf, keras.Variable | tf.Variable) else leaf,
        tree,
    )


class Program:
    """A step, or a loop over many, compiled for each shape or for batches of any; see `program`."""

    def __init__(
        self,
        step: Callable[..., object],
        unpack: Unpack | None,
        many: bool,
        jit_compile: bool,
        lengths: Lengths | None,
    ) -> None:
        self.step = step
        self.unpack = unpack
        self.many = many
        self.stacked = many or unpack is not None
        self.jit_compile = jit_compile
        self.lengths = lengths
        self.programs: dict[Any, Callable[..., Tree]] = {}

    def __call__(self, *arguments: Any) -> Tree:
        arguments = keras.tree.map_structure(as_tensor, arguments)
        # A loop's capacity is a constant of it.
        key = call_signature(arguments) if self.lengths is None else arguments[1:2] * self.many
        program = self.programs.get(key)
        if program is not None:
            return program(*arguments)
        shapes = arguments if self.lengths is None else self._opened(arguments)
        batch = first_batch(self.unpack, shapes[-1]) if self.stacked else shapes
        graph = tf.function(self.step, autograph=False)
        # Traced here: so few frames are around the user's code.
        with self._closing(), tracing.by_xla(self.jit_compile):
            outputs = graph.get_concrete_function(*batch).structured_outputs
            program = self.programs[key] = self._whole(graph, outputs, shapes)
        return self(*arguments) if program is None else program(*arguments)

    def _whole(self, graph: Any, outputs: Tree, shapes: tuple[Any, ...]) -> Callable[..., Tree]:
        """Compiles the program around a traced step, for arguments of these shapes."""
        if self.many:
            whole = loop_of(graph, outputs, self.unpack, True)
        else:
            whole = only_step(graph, self.unpack) if self.stacked else lambda *batch: graph(*batch)
        compiled = tf.function(whole, jit_compile=self.jit_compile, autograph=False)
        program: Callable[..., Tree] = compiled.get_concrete_function(*shapes)
        return program

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """Where a step can't be traced for open lengths, makes each shape's program from now on."""
        try:
            yield
        except Exception as error:  # whatever it does with a length that is None
            if self.lengths is None:
                raise
            self.lengths = None
            logger.info(
                "Each shape of batches is compiled by itself, since the step can't be compiled for "
                "batches of any length: %s",
                error,
            )

    def _opened(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the arguments with the shapes of batches in place of these."""
        following = iter(self.lengths or ())

        def spec(array: Any) -> Any:
            return tf.TensorSpec((*array.shape[: int(self.stacked)], *next(following)), array.dtype)

        batches = arguments[-1:] if self.stacked else arguments
        return *arguments[: -len(batches)], *map_arrays(spec, batches)


def program(
    step: Callable[..., object],
    unpack: Unpack | None = None,
    many: bool = False,
    jit_compile: bool | None = None,
    held: bool = False,
    known: Known | None = None,
    convolutions: bool = False,
    lengths: Lengths | None = None,
) -> Callable[..., Any]:
    """Compiles a step to a graph, or many steps to one with a loop; see `Backend`.

    The step is a graph of its own inside the program, so that its Python runs once, and with little
    of ours around it.
    """
    return Program(step, unpack, many, bool(jit_compile), lengths)


def eager_program(step: Callable[..., object], unpack: Unpack | None = None) -> Callable[..., Any]:
    """Runs a step of one batch as it is written, operation by operation; see `Backend`."""

    def run(*arguments: Any) -> Tree:
        arguments = keras.tree.map_structure(as_tensor, arguments)
        if unpack is not None:
            arguments = as_arguments(row_at(unpack(*arguments), 0))
        return read_out(step(*arguments))

    return run
