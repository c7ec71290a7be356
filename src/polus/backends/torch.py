"""PyTorch: eager, and `torch.compile` where it is asked for."""

import functools
import importlib.util
import operator
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import keras
import numpy as np
import torch

from polus.backends import torch_distribution, torch_dtensor
from polus.backends.base import Held, Known, TensorFlowDataset, Unpack, as_arguments
from polus.backends.placement import Placement
from polus.backends.scopes import BackendVariable, DryRun
from polus.backends.torch_adam import apply_adam
from polus.backends.torch_compile import compiled, gradient_depth
from polus.backends.torch_gradients import accumulator as accumulator
from polus.backends.torch_gradients import mapped
from polus.backends.torch_gradients import value_and_grad as value_and_grad
from polus.backends.torch_gradients import value_and_input_grad as value_and_input_grad
from polus.backends.torch_gradients import values_and_grads as values_and_grads
from polus.sharded import ShardedArray, StoredArray
from polus.types import Tensor

Tree = Any
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
COMPILES = False  # a new shape costs nothing
TAKES_TEXT = False  # whether tensors may hold text
OPEN_LENGTHS = False  # whether a program takes batches of several shapes
COMPILERS = "g++", "clang++", "cl"  # of C++, which `torch.compile` needs on a CPU
SHARED = {"float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"}
LONG_RUN_SECS = {True: 300.0}  # `torch.compile` takes up to a minute, and may be slower


def function(fn: Callable[P, R], jit_compile: bool | None = None) -> Callable[P, R]:
    """`fn` with no gradient recorded but inside `value_and_grad`; compiled where asked for."""
    run = compiled(fn) if jit_compile else fn

    def call(*args: Any, **kwargs: Any) -> Tree:
        if gradient_depth.value or torch.compiler.is_compiling():
            return fn(*args, **kwargs)  # inside a gradient or another program: part of it
        args, kwargs = mapped(_tensor, (args, kwargs))
        with torch.no_grad():
            return _read_out(run(*args, **kwargs))

    return call


def _read_out(tree: Tree) -> Tree:
    """`tree` with a copy of each variable in it, for they are assigned in place."""

    def read(leaf: object) -> Any:
        value = leaf.value if isinstance(leaf, keras.Variable) else leaf
        return value.detach().clone() if isinstance(value, torch.nn.Parameter) else value

    return mapped(read, tree)


def _tensor(leaf: Any) -> Any:
    """Arrays become tensors on Keras' device; a Python value stays what it is."""
    if isinstance(leaf, keras.Variable | np.ndarray | np.generic | torch.Tensor):
        return to_device(leaf)
    return leaf


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
    """Compiles a step where that is asked for; see `Backend`. Many steps are a Python loop.

    Of an output that is no scalar, such as samples to draw, many steps return the last one's.
    """
    run = compiled(step) if jit_compile else step

    def single(*arguments: Any) -> Tree:
        if unpack is not None:
            arguments = as_arguments(mapped(operator.itemgetter(0), unpack(*arguments)))
        with torch.no_grad():
            return _read_out(run(*arguments))

    def loop(count: Any, capacity: int, payload: Any) -> Tree:
        batches = as_arguments(payload if unpack is None else unpack(payload))
        outputs = []
        with torch.no_grad():
            for i in range(int(count)):
                outputs.append(_read_out(run(*mapped(operator.itemgetter(i), batches))))
        return keras.tree.map_structure(
            lambda *rows: rows[-1] if rows[0].ndim else torch.stack(rows), *outputs
        )

    return loop if many else single


def eager_program(step: Callable[..., object], unpack: Unpack | None = None) -> Callable[..., Any]:
    """Runs a step of one batch as it is written, operation by operation; see `Backend`."""
    return program(step, unpack)


def repeat(fn: Callable[[Any], R], count: int, rows: object) -> R:
    """Applies `fn` to each row and stacks what it returns, inside a step; see `Backend`."""
    each = [fn(mapped(operator.itemgetter(i), rows)) for i in range(count)]
    stacked: R = keras.tree.map_structure(lambda *rows: torch.stack(rows), *each)
    return stacked


def trace(fn: Callable[..., object], args: Sequence[object], eager: bool = True) -> DryRun:
    """Runs `fn(*args)` on copies under a `DryRun`, which it returns. No variable changes.

    Buffers of PyTorch modules are found as well: the running averages of a `BatchNorm1d`. It runs
    eagerly in any case.
    """

    def stand_in(value: Any) -> Any:
        # Keras' PyTorch optimizers write into a variable's tensor in place, past every scope.
        return value.detach().clone().requires_grad_(value.requires_grad)

    dry_run = DryRun(copies=stand_in)
    modules: set[torch.nn.Module] = set()
    values: list[torch.Tensor] = []

    def find_buffers(module: torch.nn.Module, _: object) -> None:
        if module not in modules:
            modules.add(module)
            found = [_buffer(module, name) for name, _ in module.named_buffers(recurse=False)]
            dry_run.backend_variables.extend(found)
            values.extend(buffer.value.clone() for buffer in found)

    before = random_state()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(find_buffers)
    try:
        with torch.no_grad(), dry_run:
            dry_run.result = fn(*keras.tree.map_structure(_tensor, args))
    finally:
        hook.remove()
        dry_run.state_mapping.clear()  # copies of all weights
        for buffer, value in zip(dry_run.backend_variables, values, strict=True):
            buffer.assign(value)
        set_random_state(before)
    return dry_run


def _buffer(module: torch.nn.Module, name: str) -> BackendVariable:
    def read() -> Any:  # by name: a module may put another tensor in its place
        return getattr(module, name)

    @torch.no_grad()
    def assign(value: object) -> None:
        read().copy_(keras.ops.convert_to_tensor(value, dtype))

    tensor = read()
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return BackendVariable(
        f"{type(module).__name__}/{name}", tuple(tensor.shape), dtype, read, assign
    )


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Tensor | None],
    variables: Sequence[keras.Variable],
) -> None:
    """Updates `variables` once by `optimizer`, which is built."""
    with torch.no_grad():
        if not apply_adam(optimizer, gradients, variables):
            optimizer.apply(gradients, variables)


def only_if(
    finite: Tensor, update: Callable[[], None], variables: Sequence[keras.Variable]
) -> None:
    """Runs `update` if `finite` is True; see `Backend`."""
    if torch.compiler.is_compiling():
        held = hold(variables)
        update()
        settle(finite, held)
    elif finite:
        update()


def trace_id() -> object:
    """Returns an object that tells a trace from one nested inside it."""
    return gradient_depth.value


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Returns a sum of all values, which is finite if they all are."""
    found: Any = tensors
    sums = [t.sum(dtype=torch.float32) for t in found] or [torch.zeros(())]
    summed: Tensor = torch_dtensor.whole(torch.stack(sums).sum())
    return summed


def squared_norm(tensor: Tensor) -> Tensor:
    """Returns the sum of the squares of all values, in float32."""
    return tensor.float().square().sum()  # type: ignore[attr-defined,no-any-return]


def hold(variables: Sequence[keras.Variable | BackendVariable]) -> Held:
    """Returns variables with copies of their present values, which no later step changes."""
    return [(variable, variable.value.detach().clone()) for variable in variables]


def settle(finite: Tensor, held: Held) -> None:
    """Gives variables the values that they had unless the step was finite."""
    if torch.compiler.is_compiling():
        flag: Any = finite
        for variable, old in held:
            variable.assign(torch.where(flag, variable.value, old))
    elif not finite:
        for variable, old in held:
            variable.assign(old)


def stack(batches: Sequence[T], capacity: int) -> T:
    """Batches of equal structure and shape as one tree of tensors (steps, ...) on the device."""
    convert = keras.ops.convert_to_tensor
    stacked: T = keras.tree.map_structure(
        lambda *rows: torch.stack([convert(row) for row in rows]), *batches
    )
    return stacked


def to_device(array: object, shared: bool = False) -> Tensor:
    """Returns an array-like as a tensor on Keras' device; Keras' own conversion copies it."""
    if shared and isinstance(array, np.ndarray) and array.flags.writeable:
        on_cpu = keras.ops.ones(()).device.type == "cpu"
        if on_cpu and array.dtype.name in SHARED and min(array.strides, default=0) >= 0:
            return torch.from_numpy(array)
    tensor: Tensor = keras.ops.convert_to_tensor(array)
    return tensor


def take(array: Tensor, indices: Tensor) -> Tensor:
    """Returns the rows `indices` of `array`, which are within its bounds."""
    return array[indices]


def assign(variable: keras.Variable | BackendVariable, value: Any) -> None:
    """Gives a variable a value that was read of it."""
    variable.assign(value)


def copy(variable: keras.Variable | BackendVariable) -> Tensor:
    """Returns a copy of a variable's value that later steps leave alone."""
    copied: Tensor = variable.value.detach().clone()
    return copied


def view(variable: keras.Variable | BackendVariable) -> np.ndarray[Any, Any]:
    """Returns a variable's value, perhaps a view: copy it before the next step."""
    return torch_dtensor.on_host(variable.value.detach())


def sharded(variable: keras.Variable | BackendVariable) -> ShardedArray | None:
    """Returns a variable's value in the parts that processes have; None if each has all of it."""
    return torch_dtensor.in_parts(variable.value)


def assign_stored(variable: keras.Variable | BackendVariable, value: StoredArray) -> None:
    """Gives a variable a value out of files, of which only this process's part is read."""
    variable.assign(torch_dtensor.from_parts(value, variable.value))


def wait(tree: object) -> None:
    """Returns when every tensor of a structure has been computed."""
    for leaf in keras.tree.flatten(tree):
        if leaf.device.type != "cpu":
            leaf.cpu()


def iterate(dataset: TensorFlowDataset) -> Iterator[Any]:
    """Yields the batches of a `tf.data.Dataset`, as NumPy arrays."""
    return dataset.as_numpy_iterator()


def graph_blocks(iterator: object) -> None:
    """Returns None: only TensorFlow reads many batches in one call."""
    return


def candidates() -> tuple[bool, ...]:
    """Returns the settings of `jit_compile` that are worth timing here."""
    if keras.ops.ones(()).device.type == "cpu":
        there = _has_program(os.environ.get("CXX", "")) or any(map(_has_program, COMPILERS))
    else:
        there = importlib.util.find_spec("triton") is not None
    return (False, True) if there else (False,)


@functools.cache
def _has_program(name: str) -> bool:
    """Returns whether there is such a program; a look at every folder takes a millisecond."""
    return shutil.which(name) is not None


def ways(convolutions: bool) -> tuple[tuple[bool, bool], ...]:
    """Pairs of `jit_compile` and whether to loop that are worth considering, the usual first."""
    return tuple((jit_compile, True) for jit_compile in candidates())


def describe() -> dict[str, Any]:
    """What the bits of a result depend on: devices, and threads of one operation."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"devices": names, "threads": torch.get_num_threads()}


def peak_device_bytes() -> int | None:
    """Returns the most memory of its device that the process had; None if it has none."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def set_deterministic() -> list[str]:
    """Makes operations compute the same bits in each run. Returns what can't be promised."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        return ["On a GPU, start the program with CUBLAS_WORKSPACE_CONFIG=:4096:8, or it raises."]
    return []


def profile(folder: str) -> tuple[AbstractContextManager[Any], str]:
    """Returns what writes a trace of its body into a folder, and how to open the trace."""
    write = torch.profiler.tensorboard_trace_handler(folder)
    how = "open its .pt.trace.json in https://ui.perfetto.dev"
    return torch.profiler.profile(on_trace_ready=write), how


def placement() -> Placement:
    """Returns where steps run now: see `torch_distribution.active`."""
    return torch_distribution.active()


def random_state() -> dict[str, Any]:
    """The states of PyTorch's global generators, as NumPy arrays."""
    state = {"cpu": torch.get_rng_state().numpy().copy()}
    if torch.cuda.is_available():
        state |= {f"cuda:{i}": s.numpy() for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned."""
    torch.set_rng_state(torch.from_numpy(state["cpu"].copy()))
    for name, value in state.items():
        if name != "cpu":
            torch.cuda.set_rng_state(torch.from_numpy(value.copy()), name)
