"""Executables that the process has compiled, for the next program of the very same operations.

JAX compiles each new function, however often it has compiled the same operations before. So the
next trial of a search, or the next run of a notebook's cell, would wait for XLA again.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax

MAX_KEPT = 32
MAX_CHARACTERS = 2**22  # constants in it, which take long to compare and much memory
LEVEL = "xla_backend_optimization_level"

_kept: OrderedDict[Any, Callable[..., Any]] = OrderedDict()


class Executable:
    """A jitted function of arguments of one signature, which compiles if nothing equal is kept.

    Args:
        jitted: The function. It keeps unused arguments: which ones it drops, its text doesn't say.
        outputs: The shapes of all that it returns, weak types included.
    """

    def __init__(self, jitted: Any, outputs: object) -> None:
        self.jitted = jitted
        self.outputs = str(jax.tree_util.tree_leaves(outputs))
        self.call: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.call is None:
            self.call = self._found(args)
        try:
            return self.call(*args)
        except ValueError:  # arrays that moved to another device, which a jitted function follows
            if self.call is self.jitted:
                raise
            self.call = self.jitted
            return self.call(*args)

    def _found(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        where = _place(args)
        if where is None:
            return self.jitted  # type: ignore[no-any-return]
        lowered = self.jitted.lower(*args)
        text = lowered.as_text()
        if "callback" in text or len(text) > MAX_CHARACTERS:  # a callback is one Python object's
            return self.jitted  # type: ignore[no-any-return]
        key = text, lowered.in_tree, lowered.out_tree, self.outputs, where
        found = _kept.pop(key, None) or _compiled(lowered)
        _kept[key] = found
        if len(_kept) > MAX_KEPT:
            _kept.popitem(last=False)
        return found


def _compiled(lowered: Any) -> Callable[..., Any]:
    """Compiles, on a CPU with fewer of LLVM's passes than XLA asks for unless told otherwise.

    XLA makes loops of vectors by itself. So what LLVM's level 3 adds to level 1 takes up to a third
    of a compilation, and gains nothing: not one bit of 35 operations and four models was another,
    and steps took as long or less, but for random numbers, which took a tenth more.
    """
    chosen = LEVEL in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.default_backend() != "cpu":
        return lowered.compile()  # type: ignore[no-any-return]
    try:
        return lowered.compile({LEVEL: 1})  # type: ignore[no-any-return]
    except jax.errors.JaxRuntimeError:  # an XLA without that option
        return lowered.compile()  # type: ignore[no-any-return]


def forget() -> None:
    """Forgets all executables, as a new process would."""
    _kept.clear()


def _place(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Returns where arguments are; None on several devices, and while something is debugged."""
    config: Any = jax.config
    if config.jax_debug_nans or config.jax_debug_infs or config.jax_disable_jit:
        return None
    arrays = [leaf for leaf in jax.tree_util.tree_leaves(args) if isinstance(leaf, jax.Array)]
    devices = frozenset(device for array in arrays for device in array.devices())
    committed = any(array.committed for array in arrays)
    return (devices, committed, config.jax_default_device) if len(devices) < 2 else None
