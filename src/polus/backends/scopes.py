"""Scopes that watch a function run: which variables it reads, assigns, and would update."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import keras

from polus.learning_rate import schedule_of
from polus.types import Tensor

_local = threading.local()


@dataclasses.dataclass(frozen=True, eq=False)
class BackendVariable:
    """A variable of the backend itself, with the part of Keras' interface that checkpoints use.

    Examples are the running averages of a PyTorch `BatchNorm1d` and the state of a
    `tf.random.Generator`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]
    assign: Callable[[Any], Any]
    trainable = False

    @property
    def value(self) -> Any:
        """The current value, a tensor."""
        return self.read()


class VariableRecorder(keras.StatelessScope):
    """A scope that records assignments instead of carrying them out.

    A nested recorder starts from the values of the outer one, so that code inside a gradient sees
    what was assigned earlier in the step. What it reads counts as read outside, too.

    Args:
        values: Pairs of a variable and the value that it has inside the scope.
        outer: The recorder around this one, if any.
        copies: Makes the stand-in for a variable's own value. By default the value itself is used.
        initialize_variables: Whether variables that are created inside get their initial values
            when the scope ends. Not so while a compiler traces: they would hold tracers.

    Attributes:
        read: The variables that were read, by identity, in the order of their first read.
        assigned: The variables that were assigned, likewise.
    """

    def __init__(
        self,
        values: Iterable[tuple[Any, Any]] = (),
        outer: "VariableRecorder | None" = None,
        copies: Callable[[Any], Any] | None = None,
        initialize_variables: bool = True,
    ) -> None:
        super().__init__(
            collect_losses=True, initialize_variables=initialize_variables and outer is None
        )
        self.outer = outer
        self.copies = copies
        self.read: dict[int, Any] = {}
        self.assigned: dict[int, Any] = {}
        self._used: dict[int, Any] = {}
        self._enclosing: VariableRecorder | None = None
        # Not through the constructor, which converts and checks each value again.
        self.state_mapping.update({id(variable): value for variable, value in values})

    @property
    def variables(self) -> list[Any]:
        """All variables that were read or assigned, in first-use order."""
        return list(self._used.values())

    def __enter__(self) -> Self:
        self._enclosing = current_scope()
        _local.scope = self
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        _local.scope = self._enclosing
        super().__exit__(*exception)

    def get_current_value(self, variable: keras.Variable) -> Tensor:
        self.read.setdefault(id(variable), variable)
        self._used.setdefault(id(variable), variable)
        value = self.state_mapping.get(id(variable))
        if value is None and self.outer is not None:
            value = self.outer.get_current_value(variable)
        if value is None:
            # Never return None: a regularizer takes what it is given as the weight's value.
            with keras.StatelessScope(initialize_variables=False):
                value = variable.value
            if self.copies is not None:
                value = self.state_mapping[id(variable)] = self.copies(value)
        result: Tensor = value
        return result

    def add_update(self, update: tuple[Any, Any]) -> None:
        self.record_assigned([update[0]])
        super().add_update(update)

    def record_assigned(self, variables: Iterable[Any]) -> None:
        """Marks variables as assigned. They keep their values."""
        for variable in variables:
            self.assigned.setdefault(id(variable), variable)
            self._used.setdefault(id(variable), variable)


class DryRun(VariableRecorder):
    """A scope in which a step runs without gradients and updates, to show its variables.

    It serves all who need to know what a step would do: the trainer, which builds models and
    optimizers and looks for the variables to save, and JAX, where a compiled function takes its
    variables as arguments. No variable changes, and `minimize` computes no gradient: it calls its
    closure and records the update.

    Attributes:
        updates: Each optimizer with the variables that it would have updated, in order.
        num_decisions: How often updates were made, of which several may go together.
        by_hand: Whether the function called an optimizer itself.
        backend_variables: The backend's own variables that were used.
        differentiated: The variables that were read where gradients flow.
        settings: The names of settings of the trainer that a step has to use, and has used.
        result: What the function returned: tensors, or descriptions of them.
    """

    def __init__(
        self,
        values: Iterable[tuple[Any, Any]] = (),
        outer: VariableRecorder | None = None,
        copies: Callable[[Any], Any] | None = None,
        initialize_variables: bool = True,
    ) -> None:
        super().__init__(values, outer, copies, initialize_variables)
        self.updates: list[tuple[keras.optimizers.Optimizer, list[keras.Variable]]] = []
        self.num_decisions = 0
        self.by_hand = False
        self.backend_variables: list[BackendVariable] = []
        self.differentiated: list[keras.Variable] = []
        self.settings: set[str] = set()
        self.result: Any = None

    def returned(self, result: object) -> Any:
        """Returns the result of a function that is traced, for the tracer.

        A result with Python values in it is kept as it is, for whoever checks it, and not traced: a
        tracer turns a number into a tensor, or refuses a string in words of its own.
        """
        if all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(result)):
            return result
        self.result = result
        return None

    @contextlib.contextmanager
    def differentiating(self) -> Iterator[None]:
        """Notes the variables that are first read in the block as read where gradients flow."""
        before = set(self.read)
        try:
            yield
        finally:
            self.differentiated += [v for key, v in self.read.items() if key not in before]

    @property
    def variables(self) -> list[Any]:
        """All variables of Keras in first-use order, then `backend_variables`."""
        return [*super().variables, *self.backend_variables]

    def record_updates(
        self,
        *updates: tuple[keras.optimizers.Optimizer, Sequence[keras.Variable]],
        by_hand: bool = False,
    ) -> None:
        """Notes updates that are made together, in place of carrying them out."""
        self.num_decisions += 1
        self.by_hand |= by_hand
        for optimizer, variables in updates:
            self.updates.append((optimizer, list(variables)))
            self.record_assigned(variables)
            if optimizer.built:
                self.record_assigned(optimizer.variables)
            for variable in getattr(schedule_of(optimizer), "variables", ()):
                self.get_current_value(variable)

    def record_scratch(self, variables: Iterable[keras.Variable]) -> None:
        """Marks variables that a step overwrites before it reads them.

        A compiled program has to know them, a checkpoint has not: they are not in `variables`.
        """
        self.assigned.update((id(variable), variable) for variable in variables)

    def merged_updates(self) -> list[tuple[keras.optimizers.Optimizer, list[keras.Variable]]]:
        """Returns each optimizer once, with all variables that it would have updated."""
        merged: dict[int, tuple[Any, dict[int, Any]]] = {}
        for optimizer, variables in self.updates:
            _, known = merged.setdefault(id(optimizer), (optimizer, {}))
            known.update((id(variable), variable) for variable in variables)
        return [(optimizer, list(known.values())) for optimizer, known in merged.values()]


def current_scope() -> VariableRecorder | None:
    """Returns the innermost active recorder of this thread."""
    return getattr(_local, "scope", None)


def active_dry_run() -> DryRun | None:
    """Returns the innermost active `DryRun` of this thread, also from scopes nested inside it."""
    scope = current_scope()
    while scope is not None and not isinstance(scope, DryRun):
        scope = scope._enclosing
    return scope
