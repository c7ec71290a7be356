"""Parts of a run's state: its variables and its callbacks, saved and compared with what is there.

A run's state is a tree as `polus.state_tree` takes it. Errors are ValueErrors that say what
differs; who restores a run adds which checkpoint it was.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import keras
import ml_dtypes
import numpy as np

from polus.backends import backend
from polus.errors import AnotherRunError, RefusedStateError
from polus.sharded import Array, ShardedArray, StoredArray
from polus.state import random_state, set_random_state
from polus.state_tree import flatten_state, printable

Variables = Sequence[keras.Variable]
Tree = dict[str, Any]
T = TypeVar("T")

logger = logging.getLogger("polus.checkpoint")

# From so many bytes of variables that are split over processes, each process saves its own parts.
# Below, the first one saves all of them: a single file, and no process waits for another.
SHARD_BYTES = 2**30


class Stateful(Protocol):
    """An object with a state of its own, such as a callback."""

    def get_state(self) -> Tree:
        """Returns the state."""

    def set_state(self, state: Tree) -> None:
        """Restores what `get_state` returned."""


# The layout of `variables_state` and `callbacks_state`: see `check_layout`.
VARIABLES_LAYOUT = [{"path": str, "value": np.ndarray | StoredArray}]
CALLBACKS_LAYOUT = [(str, dict)]

# ------------------------------------------------------------------ variables


def variables_state(variables: Variables) -> list[Tree]:
    """Returns path and value of each variable. The values may be views: copy them before a step.

    Values that are split over processes are a `ShardedArray` if they are `SHARD_BYTES` together.
    Otherwise they are whole, and all processes have to call this.
    """
    sharded = sharded_variables(variables)
    return [
        _variable_state(variable)
        if (parts := sharded.get(i)) is None
        else {"path": variable.path, "value": parts}
        for i, variable in enumerate(variables)
    ]


def sharded_variables(variables: Variables) -> dict[int, ShardedArray]:
    """Returns the variables of which each process saves a part, by their numbers.

    No value is copied from the device yet, so nothing may have changed them when it is.
    """
    found = {i: backend.sharded(variable) for i, variable in enumerate(variables)}
    sharded = {i: array for i, array in found.items() if array is not None}
    size = sum(array.nbytes for array in sharded.values())
    return sharded if size >= SHARD_BYTES else {}


def only_sharded(state: Tree) -> Tree | None:
    """Returns a state with nothing in it but sharded variables; None if it has none."""
    values = [each["value"] for each in state["variables"]]
    if not any(isinstance(value, ShardedArray) for value in values):
        return None
    kept = [{"value": v} if isinstance(v, ShardedArray) else None for v in values]
    return {"variables": kept}


def allocate_buffers(
    variables: Variables, name: str = "variables", without: Container[int] = ()
) -> dict[str, Array]:
    """Allocates memory for a copy of variables, as the `into` of `flatten_state`.

    Memory that is fresh from the system costs many times the copy: let a thread fetch it early.

    Args:
        variables: The variables.
        name: Where in the state tree their `variables_state` is.
        without: The numbers of those that need no memory.
    """
    zeros = [
        {"value": np.broadcast_to(np.zeros((), v.dtype), v.shape)} if i not in without else None
        for i, v in enumerate(variables)
    ]
    return flatten_state({name: zeros}).arrays


def check_variables(saved: Sequence[Tree], variables: Variables, same_backend: bool) -> None:
    """Compares saved variables with those of this run.

    Args:
        saved: A result of `variables_state`.
        variables: The variables of this run.
        same_backend: Whether the dtypes must agree too: seed generators are uint32 on one backend
            and int64 on another.

    Raises:
        AnotherRunError: If a variable has another path, shape or dtype, or there are more or fewer.
    """
    now = [(v.path, tuple(v.shape), v.dtype) for v in variables]
    then = [(s["path"], s["value"].shape, s["value"].dtype.name) for s in saved]
    compared = slice(1, 3 if same_backend else 2)
    paths = [canonical_paths([path for path, *_ in each]) for each in (then, now)]
    for i, (path_then, path_now) in enumerate(zip(*paths, strict=False)):
        if path_then != path_now or then[i][compared] != now[i][compared]:
            raise AnotherRunError(f"variable {i} was {_shown(then[i])}, and is {_shown(now[i])}.")
    if len(then) != len(now):
        longer, whose = (then, "saved") if len(then) > len(now) else (now, "present")
        extra = ", ".join(map(_shown, longer[min(len(then), len(now)) :][:3]))
        raise AnotherRunError(
            f"it has {len(then)} variables, and the present run has {len(now)}. Only among the "
            f"{whose} ones: {extra}."
        )


def restore_variables(saved: Sequence[Tree], variables: Variables) -> None:
    """Assigns the values of `variables_state`; call `check_variables` before."""
    for variable, state in zip(variables, saved, strict=True):
        value = state["value"]
        if isinstance(value, StoredArray):
            backend.assign_stored(variable, value)
        else:
            backend.assign(variable, value)


def without_learning_rates(
    saved: Sequence[Tree], variables: Variables
) -> tuple[list[Tree], list[keras.Variable]]:
    """Leaves out the learning rates, where a run continues with those that the program sets.

    A rate that is a schedule is no variable, so a run can change from one to the other.
    """
    return (
        [state for state in saved if not state["path"].endswith("/learning_rate")],
        [variable for variable in variables if not variable.path.endswith("/learning_rate")],
    )


def canonical_paths(paths: Sequence[str]) -> list[str]:
    """Replaces the numbers by which Keras counts layers by their rank.

    The same model has the layers dense and dense_1 when it is the first in a process, and dense_2
    and dense_3 when it is made again. Two layers that were exchanged still differ.
    """
    split = [
        [re.fullmatch(r"(.*?)(?:_(\d+))?", re.sub(r"_\d+(?=_)", "", part)) for part in p.split("/")]
        for p in paths
    ]
    parts = [[(m[1], int(m[2] or 0)) for m in parts if m is not None] for parts in split]
    numbers: dict[str, set[int]] = {}
    for name, number in (part for path in parts for part in path):
        numbers.setdefault(name, set()).add(number)
    ranks = {name: {n: i for i, n in enumerate(sorted(found))} for name, found in numbers.items()}
    return ["/".join(f"{name}#{ranks[name][n]}" for name, n in path) for path in parts]


def _variable_state(variable: keras.Variable) -> Tree:
    value = backend.view(variable)
    # PyTorch's bfloat16 arrives as float32: the same numbers, but not the variable's dtype.
    dtype = getattr(ml_dtypes, variable.dtype, value.dtype)
    return {"path": variable.path, "value": value.astype(dtype, copy=False)}


def _shown(variable: tuple[str, tuple[int, ...], str]) -> str:
    path, shape, dtype = variable
    return f"{printable(path)} {shape} {dtype}"


# ------------------------------------------------------------------ random generators


def check_random_state(saved: Tree, same_backend: bool) -> None:
    """Checks a `polus.state.random_state()` from a file, and changes nothing.

    Args:
        saved: The state.
        same_backend: Whether its generators are those of this backend.

    Raises:
        ValueError: If the generators do not take it.
    """
    before = random_state()
    try:
        # NumPy takes any position, and reads memory that is not its own there.
        if not 0 <= int(saved["numpy"][2]) <= 624:
            raise ValueError("NumPy's generator has 624 positions")
        set_random_state(saved if same_backend else saved | {"backend": before["backend"]})
    except Exception as error:  # whatever their libraries raise
        raise ValueError(f"the state of the random generators is none: {error!r}") from error
    finally:
        set_random_state(before)


# ------------------------------------------------------------------ callbacks


def callbacks_state(callbacks: Iterable[Stateful]) -> list[list[Any]]:
    """Returns the class name and the state of each callback."""
    return [[type(callback).__name__, callback.get_state()] for callback in callbacks]


def restore_callbacks(callbacks: Sequence[Stateful], saved: Sequence[Any]) -> None:
    """Gives each callback the state of its class; the second of a class that of the second.

    Warns if the checkpoint has a state that no callback takes, and logs which callbacks are new.

    Raises:
        ValueError: If a callback's `set_state` fails; it names the callback.
    """
    states = {(name, n): state for (name, state), n in _numbered(saved, lambda item: item[0])}
    for callback, n in _numbered(callbacks, lambda callback: type(callback).__name__):
        state = states.pop((type(callback).__name__, n), None)
        if state is not None:
            _restore_callback(callback, state)
        else:
            logger.info("The callback %s is new to the run.", type(callback).__name__)
    if lost := [name for (name, _), state in states.items() if state]:
        logger.warning("The checkpoint has the state of callbacks that are gone: %s.", lost)


def _restore_callback(callback: Stateful, state: Tree) -> None:
    try:
        callback.set_state(state)
    except Exception as error:  # what the author of a callback did not expect
        raise RefusedStateError(
            f"The callback {type(callback).__name__} does not take its saved state ({error!r}). "
            "Leave it out of callbacks to continue without its state."
        ) from error


def storable(values: Tree) -> Tree:
    """Returns the entries of `shared_dict` that can be stored; warns of the others."""
    return {name: value for name, value in values.items() if _can_be_stored(name, value)}


def _can_be_stored(name: str, value: Any) -> bool:
    try:
        flatten_state(value)
    except TypeError as error:
        logger.warning("shared_dict[%r] will not be there after a resume: %s", name, error)
        return False
    return True


def _numbered(items: Iterable[T], name_of: Callable[[T], str]) -> list[tuple[T, int]]:
    """Returns each item with its number among those of its name."""
    seen: Counter[str] = Counter()
    numbered = []
    for item in items:
        numbered.append((item, seen[name_of(item)]))
        seen[name_of(item)] += 1
    return numbered
