"""Finds the Keras variables that a function reads and assigns, by watching it run."""

import dataclasses
import threading
from collections.abc import Callable, Iterable
from typing import Any

import keras

_local = threading.local()


@dataclasses.dataclass(frozen=True, eq=False)
class BackendVariable:
    """A variable that isn't Keras', with as much of its interface as saving and restoring takes."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]
    assign: Callable[[Any], Any]
    trainable = False

    @property
    def value(self) -> Any:
        """The present value, a tensor."""
        return self.read()


class VariableRecorder(keras.StatelessScope):
    """A scope in which assignments are recorded instead of carried out.

    What is read is met in `read`, what is assigned in `assigned`: variables by identity, in the
    order of the first meeting. A nested recorder starts from what the outer one holds, so that a
    value assigned earlier in a step is seen inside a gradient; what it reads counts as read outside
    too.

    Args:
        values: pairs of a variable and the value that stands for it in the scope.
        outer: the recorder around this one, if any.
        copies: gives the stand-in for a variable's own value; by default the value itself.
    """

    def __init__(
        self,
        values: Iterable[tuple[Any, Any]] = (),
        outer: "VariableRecorder | None" = None,
        copies: Any = None,
    ) -> None:
        super().__init__(collect_losses=True, initialize_variables=outer is None)
        self.outer = outer
        self.copies = copies
        self.read: dict[int, Any] = {}
        self.assigned: dict[int, Any] = {}
        # Not through the constructor: it converts and checks each value again.
        self.state_mapping.update({id(variable): value for variable, value in values})

    def __enter__(self) -> "VariableRecorder":
        self._before = current()
        _local.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        _local.recorder = self._before
        super().__exit__(*exception)

    def get_current_value(self, variable: Any) -> Any:
        self.read.setdefault(id(variable), variable)
        value = self.state_mapping.get(id(variable))
        if value is None and self.outer is not None:
            value = self.outer.get_current_value(variable)
        if value is None:
            # Never None from here: a regulariser takes what it is given as the weight's value.
            with keras.StatelessScope(initialize_variables=False):
                value = variable.value
            if self.copies is not None:
                value = self.state_mapping[id(variable)] = self.copies(value)
        return value

    def add_update(self, update: tuple[Any, Any]) -> None:
        variable, _ = update
        self.assigned.setdefault(id(variable), variable)
        super().add_update(update)

    @property
    def variables(self) -> list[Any]:
        """All variables read or assigned, in the order of the first meeting."""
        return list({**self.read, **self.assigned}.values())


def current() -> VariableRecorder | None:
    """The innermost active recorder of this thread."""
    return getattr(_local, "recorder", None)
