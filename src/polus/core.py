"""The compiler setting, and the three functions that reach the backend."""

import contextlib
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, overload

import keras

from polus.backends import backend
from polus.backends.placement import gathers
from polus.files import check_directory, make_folder
from polus.log import BaseLogger as BaseLogger
from polus.types import Tensor
from polus.whole_batch import batch_loss as batch_loss

P = ParamSpec("P")
R = TypeVar("R")
JitMode = bool | Literal["auto"]
_jit: dict[str, JitMode] = {"mode": "auto", "timed": True}
_tuning_cache: dict[str, Path | None] = {}
_profiling = threading.Lock()
logger = logging.getLogger("polus.core")


def set_jit_compile(mode: JitMode) -> None:
    """Sets whether steps are compiled with XLA (`torch.compile` on PyTorch).

    Args:
        mode: True, False, or `"auto"` (the default): `train` times both on the first batch and
            keeps the faster one. Outside of `train`, `"auto"` is the backend's default: XLA
            on JAX, a plain graph on TensorFlow, eager execution on PyTorch.

    Raises:
        ValueError: For any other value.
    """
    if mode not in (True, False, "auto"):
        raise ValueError(f"mode must be True, False or 'auto', got {mode!r}.")
    _jit["mode"] = mode


def get_jit_compile() -> JitMode:
    """Returns the setting of `set_jit_compile`."""
    return _jit["mode"]


def set_deterministic(seed: int) -> None:
    """Seeds all generators, and lets the backend compute the same bits in each run.

    Call it before anything is built or computed. The same program then gives the same losses and
    weights on the same machine, with the same versions and number of threads; on another backend,
    processor or GPU it need not. What can't be promised here is logged as a warning. Deterministic
    operations may be slower, and on TensorFlow and PyTorch an operation that has no such form
    raises when it runs. Polus no longer times ways to run a step, since the clock would choose
    among programs that round differently: it takes the one that is usually best.

    Args:
        seed: Seeds Python, NumPy, Keras and the backend: an integer from 0 to 2**32 - 1.

    Raises:
        ValueError: For any other seed.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}.")
    keras.utils.set_random_seed(seed)
    _jit["timed"] = False
    for doubt in backend.set_deterministic():
        logger.warning("set_deterministic: %s", doubt)


@contextlib.contextmanager
def profile(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Writes a trace of what runs in its body, by the backend's own profiler.

    Logs how to open the trace. A trace of a minute may take gigabytes: run some steps. Each of
    several processes writes its own.

    ```python
    with polus.profile("runs/a/trace"):
        trainer.train(data, epochs=1, steps=50)
    ```

    Args:
        folder: Where the trace is written; made if it is missing.

    Raises:
        ValueError: If a file is in the way.
        RuntimeError: Within another block of `profile`: a backend has one trace at a time.
    """
    path = check_directory(folder, "folder")
    if not _profiling.acquire(blocking=False):  # PyTorch would end the process
        raise RuntimeError(
            "A block of polus.profile runs already, and a backend has one trace at a time. End it "
            "before this one begins."
        )
    try:
        make_folder(path)
        context, how = backend.profile(str(path))
        with context:
            yield
    finally:
        _profiling.release()
    if backend.placement().is_first:
        logger.info("The trace is in %s: %s.", path, how)


def times_ways() -> bool:
    """Returns whether Polus times ways to run a step: until `set_deterministic` is called."""
    return _jit["timed"] is True


def set_tuning_cache(path: str | os.PathLike[str] | None) -> None:
    """Sets the file that keeps how long steps took, for the next program to measure nothing again.

    `train` times ways to run a step where the run is long enough to win that back. What it measured
    serves all steps of the same kind on this machine: layers, optimizers, shapes and code alike,
    and the same versions. It changes how fast a run is, and may change roundings, as measuring
    does. A resumed run uses the choices of its checkpoint.

    Args:
        path: A file; `polus/tuning.json` in the user's cache folder unless set (`$XDG_CACHE_HOME`,
            or `~/.cache`). None: nothing is kept, and each trainer measures for itself.

    Raises:
        TypeError: If it is not a path.
        ValueError: If it is empty, or a folder.
    """
    if path is not None and not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the path of a file or None, got {path!r}.")
    if path is not None and (not os.fspath(path) or Path(path).expanduser().is_dir()):
        raise ValueError(f"path must be the path of a file, got the folder {os.fspath(path)!r}.")
    _tuning_cache["path"] = None if path is None else Path(path).expanduser().absolute()


def get_tuning_cache() -> Path | None:
    """Returns the file of `set_tuning_cache`; None if there is none, and no home folder either."""
    if "path" not in _tuning_cache:
        folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        known = not folder.startswith("~")  # a container may run as a user without a home
        _tuning_cache["path"] = Path(folder, "polus", "tuning.json").absolute() if known else None
    return _tuning_cache["path"]


@overload
def function(fn: Callable[P, R], *, jit_compile: bool | None = None) -> Callable[P, R]: ...


@overload
def function(
    fn: None = None, *, jit_compile: bool | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def function(fn: Any = None, *, jit_compile: bool | None = None) -> Any:
    """Compiles a stateful Keras function, on any backend: a decorator of functions and methods.

    The variables that `fn` reads or assigns are found, not declared. Arrays among the arguments are
    inputs of the compiled program, one program for each combination of shapes and dtypes; any other
    Python value is a constant of it. Called inside another compiled function, it is inlined.

    ```python
    counter = keras.Variable(0, trainable=False)

    @polus.core.function
    def count(x):
        counter.assign_add(1)
        return x * counter

    count(np.ones(3))
    ```

    Args:
        fn: A function or method that takes and returns any structure of tensors.
        jit_compile: Overrides `set_jit_compile` for this function.
    """
    if jit_compile not in (True, False, None):
        raise ValueError(f"jit_compile must be True, False or None, got {jit_compile!r}.")
    if fn is None:
        return functools.partial(function, jit_compile=jit_compile)
    if not callable(fn):
        raise TypeError(f"polus.core.function takes a function, got {fn!r}.")
    return _Compiled(fn, jit_compile)


class _Compiled:
    """A compiled function that also works as a method, compiled once per object."""

    def __init__(self, fn: Callable[..., Any], jit_compile: bool | None) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.jit_compile = jit_compile
        self._call: Callable[..., Any] | None = None

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        bound = _Compiled(functools.partial(self.fn, instance), self.jit_compile)
        # Python finds it there from now on, before it asks this descriptor again.
        return instance.__dict__.setdefault(self.name, bound)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            # At the first call, so that a setting made after the definition counts.
            mode = get_jit_compile() if self.jit_compile is None else self.jit_compile
            self._call = backend.function(self.fn, None if mode == "auto" else mode)
        return self._call(*args, **kwargs)


def value_and_grad(
    fn: Callable[..., Any],
    variables: Sequence[keras.Variable],
    has_aux: bool = False,
    *,
    inputs: Sequence[Any] = (),
) -> tuple[Any, list[Any]]:
    """Computes the value of a closure and its gradients, inside or outside a compiled function.

    ```python
    loss, gradients = polus.core.value_and_grad(
        lambda: keras.ops.mean((model(x) - y) ** 2), model.trainable_variables
    )
    ```

    With `inputs`, the function takes them as its arguments, and their gradients follow those of the
    variables:

    ```python
    score, (slope,) = polus.core.value_and_grad(
        lambda image: keras.ops.sum(critic(image)), [], inputs=[image]
    )
    ```

    Calls can be nested, for a gradient of a gradient. Assignments are not differentiated: a value
    assigned to a variable inside the closure is treated as a constant.

    Args:
        fn: Takes nothing, or the `inputs`, and returns a scalar tensor, or with `has_aux` a pair of
            a scalar and any structure of tensors. It may assign variables.
        variables: The variables to differentiate with respect to.
        has_aux: Whether `fn` returns such a pair.
        inputs: Tensors, arrays or variables of floating point numbers. Only what `fn` does with its
            arguments counts: one of them that it also reads from outside is a constant there.

    Returns:
        What `fn` returned, and a list with one gradient per variable, then one per input, of the
        same shape; None if the value does not depend on it, or a variable is not trainable.

    Raises:
        ValueError: If the value is not a scalar.
    """
    if not callable(fn):
        raise TypeError(f"value_and_grad takes a function to differentiate, got {fn!r}.")
    for variable in variables if isinstance(variables, Sequence) else [variables]:
        if not isinstance(variable, keras.Variable):
            raise TypeError(f"variables must be a list of keras.Variable, got {variable!r}.")

    def scalar(result: Any) -> Any:
        if has_aux and not (isinstance(result, tuple | list) and len(result) == 2):
            raise ValueError(f"With has_aux=True, fn must return a pair, got {result!r}.")
        value = result[0] if has_aux else result
        if (shape := getattr(value, "shape", None)) is None or len(shape):
            came = f"shape {tuple(shape)}" if shape is not None else f"a {type(value).__name__}"
            raise ValueError(
                f"A gradient is taken of a scalar tensor, and the function returned {came}. "
                "Reduce it, for example with keras.ops.mean(...); a keras.losses class does so "
                "by itself, where the function of the same name returns one value per example."
            )
        return value

    tensors = [_differentiable(value) for value in inputs]
    if tensors:
        _check_takes(fn, tensors)
    return backend.value_and_grad(fn, variables, scalar, inputs=tensors)


def _check_takes(fn: Callable[..., Any], inputs: Sequence[Any]) -> None:
    try:
        inspect.signature(fn).bind(*inputs)
    except TypeError:
        raise TypeError(
            f"value_and_grad passes the function its {len(inputs)} inputs, which it does not take. "
            "Write, for example, value_and_grad(lambda x: keras.ops.sum(model(x)), [], inputs=[x])."
        ) from None
    except ValueError:  # a function that Python knows no signature of
        return


def _differentiable(value: Any) -> Any:
    value = value.value if isinstance(value, keras.Variable) else value
    tensor = keras.ops.convert_to_tensor(value)
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
        raise TypeError(
            f"A gradient is taken by inputs of floating point numbers, got {tensor.dtype}. Cast "
            'it: keras.ops.cast(x, "float32").'
        )
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """Returns the rows of a tensor from all replicas that share a batch, in the batch's order.

    A step that compares examples with each other, such as a loss with in-batch negatives, needs all
    rows of the batch. Where each replica runs the step on its own rows (PyTorch, TensorFlow), this
    concatenates them along the first axis; gradients flow back to each replica's own. Where a step
    sees the whole batch (one device, JAX), it returns the tensor itself. All replicas have to call
    it.

    ```python
    def forward_with_grads(self, queries, documents):
        return polus.core.gather(self.model(queries)), polus.core.gather(self.model(documents))
    ```

    Args:
        tensor: A tensor whose first axis has the replica's examples, (B / replicas, ...).

    Returns:
        A tensor (B, ...) of the same dtype.
    """
    gathers.count += 1
    return backend.placement().gather(tensor)
