"""`torch.compile` of a step with its gradients and updates."""

import contextlib
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

Tree = Any


class GradientDepth(threading.local):
    """How many gradients are being taken in this thread, one inside the other."""

    value = 0


gradient_depth = GradientDepth()


def compiled(fn: Callable[..., Tree]) -> Callable[..., Tree]:
    """Returns `torch.compile` of `fn`, gradients and updates included."""

    def frame(*args: Any, **kwargs: Any) -> Tree:
        return fn(*args, **kwargs)

    # PyTorch keeps its programs by the code of a function, some few of each. With a code of its own
    # one trainer's step does not push out another's.
    own = types.FunctionType(frame.__code__.replace(), frame.__globals__, closure=frame.__closure__)
    program = torch.compile(own)

    def call(*args: Any, **kwargs: Any) -> Tree:
        gradient_depth.value = (
            gradient_depth.value
        )  # made before the program looks whether this thread has one
        with _gradients_traced(), warnings.catch_warnings():
            # Said once of Keras' caches, at the first compilation; their functions are pure.
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
            return program(*args, **kwargs)

    return call


def _gradients_traced() -> Any:
    """Lets `torch.compile` take a gradient into its program, where PyTorch can.

    By default a step is cut in two there. PyTorch's own message on that names this switch.
    """
    from torch import _dynamo

    if hasattr(_dynamo.config, "trace_autograd_ops"):
        return _dynamo.config.patch(trace_autograd_ops=True)
    return contextlib.nullcontext()
