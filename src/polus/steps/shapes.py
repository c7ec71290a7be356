"""The shapes that a step's batches came in, and which of them share a program.

TensorFlow can trace a step for batches of any length, as `fit` does. What such a program computes
may differ in its last bits from one for a single shape. So a checkpoint has the shapes, and a
resumed run uses the programs that the run would have used.
"""

from dataclasses import dataclass, field
from typing import Any

from polus.state_tree import is_count

Shape = tuple[int | None, ...]
Lengths = tuple[Shape, ...]
SHAPES_LAYOUT = {...: {"own": [[[is_count]]], "open": [[lambda n: n is None or is_count(n)]]}}


@dataclass
class Kind:
    """Shapes of one number of arrays, with equal dtypes and numbers of axes."""

    own: list[Lengths] = field(default_factory=list)
    open: Lengths = ()

    def lengths(self, shapes: Lengths) -> Lengths | None:
        if shapes in self.own:
            return None
        if not self.own or (len(self.own) == 1 and _other_count_only(shapes, self.own[0])):
            self.own.append(shapes)
            return None
        self.open = tuple(map(_common, self.open or self.own[0], shapes))
        return self.open


class Shapes:
    """Says which batches have a program of their own.

    The first shape has one, and so has the first that differs from it in the number of examples
    only: the last, smaller batch of an epoch. All others share one, in which each length that was
    ever different is open.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self._newest: tuple[list[Any], Lengths | None] | None = None

    def lengths(self, signature: list[Any]) -> Lengths | None:
        """Returns the shapes to trace a step for, with None for a length that is open.

        Args:
            signature: What `signature_of` returns for the batch.

        Returns:
            The shape of each array; None where a batch of this shape has a program of its own.
        """
        if self._newest is not None and self._newest[0] == signature:
            return self._newest[1]
        parts = [part for part in signature if isinstance(part, tuple)]
        others = [part for part in signature if not isinstance(part, tuple)]
        shapes = tuple(shape for shape, _ in parts)
        key = repr([*((len(shape), dtype) for shape, dtype in parts), *others])
        found = self._kinds.setdefault(key, Kind()).lengths(shapes)
        self._newest = signature, found
        return found

    def get_state(self) -> dict[str, Any]:
        """Returns the shapes, as values that JSON can hold."""
        return {
            key: {"own": list(map(_as_lists, kind.own)), "open": _as_lists(kind.open)}
            for key, kind in self._kinds.items()
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues with the shapes that `get_state` returned."""
        self._newest = None
        self._kinds = {
            key: Kind(list(map(_as_tuples, kind["own"])), _as_tuples(kind["open"]))
            for key, kind in state.items()
        }


def _other_count_only(shapes: Lengths, first: Lengths) -> bool:
    return all(a[1:] == b[1:] for a, b in zip(shapes, first, strict=True))


def _common(a: Shape, b: Shape) -> Shape:
    return tuple(m if m == n else None for m, n in zip(a, b, strict=True))


def _as_lists(lengths: Lengths) -> list[list[int | None]]:
    return [list(shape) for shape in lengths]


def _as_tuples(lengths: list[list[int | None]]) -> Lengths:
    return tuple(map(tuple, lengths))
