"""The seam to the backends: one module per backend, the same few functions each, chosen once.

Every backend gives

- ``function(fn, jit_compile)``: compiles a stateful function of Keras variables;
- ``value_and_grad(fn, variables, has_aux, sparse, inputs)``: a function's value and gradients;
- ``values_and_grads(fn, groups, losses)``: those of several losses, each by its own variables, from
  one run of the function;
- ``value_and_input_grad(fn, inputs)``: the same by tensors instead of variables;
- ``eager_program(step, unpack)``: a step as it is written, to debug it;
- ``repeat(step, row)``: many steps as one function to compile, over stacked batches;
- ``trace(fn, args)``: runs ``fn`` abstractly under a `VariableRecorder`, to see what it would do;
- ``apply_gradients(optimizer, gradients, variables)``: one update;
- ``stack(batches, capacity)``, ``take``, ``to_device``, ``copy``, ``wait``: batches and arrays on
  the device; ``view``: a variable for the host to copy;
- ``COMPILES``, ``candidates()``, ``LONG_RUN_SECS``: whether a new shape costs a compilation, which
  settings of ``jit_compile`` are worth measuring, and from how long a run on;
- ``TAKES_TEXT``: whether tensors may hold text;
- ``describe()``: devices and threads;
- ``random_state()``, ``set_random_state(state)``: the backend's own generators.

The rest of Polus imports `backend` from here and knows no other.
"""

import importlib
from typing import Any

import keras

NAMES = ("tensorflow", "jax", "torch")


def load(name: str) -> Any:
    """Imports the module of the backend called `name`.

    Raises:
        ValueError: if Polus has no such backend.
    """
    if name not in NAMES:
        raise ValueError(
            f"Polus runs on the Keras backends {', '.join(NAMES)}, and KERAS_BACKEND is {name!r}. "
            "Set the environment variable KERAS_BACKEND to one of them before Keras is imported."
        )
    return importlib.import_module(f"polus.backends.{name}")


backend: Any = load(keras.config.backend())
