"""Keeps a step that is not finite from changing anything; decided inside the compiled step.

The step assigns, and at its end every variable gets back the value that it had unless all was
finite. Where a single batch runs per call, or the model is large, and the step minimizes once, the
updates wait for all gradients instead: no copy of weights and slots is needed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
from keras import ops

from polus.backends import backend
from polus.learning_rate import schedule_of
from polus.optimizers import MultiOptimizer
from polus.steps.compiled import as_terms
from polus.steps.variables import StepVariables, unique
from polus.steps.watching import Watching
from polus.types import Tensor

Step = Callable[..., Any]


class Guard:
    """Makes of a step one that changes nothing if it is not finite.

    Args:
        variables: What the step's dry run has seen.
        metrics: The variables of metrics, whose values may be anything.
        optimizers: The optimizers of the trainer: the step may call them itself.
        primary: The name of the term that is the loss.
        limit: After how many consecutive steps that were not finite no step changes anything.
        agree: Returns the rows that all replicas have of a tensor.
        gates: Whether the updates of a step that minimizes once wait for its gradients.

    Attributes:
        checked: The variables that have to be finite.
        assigned: The variables that the step assigns.
        monitored_names: The terms that have to be finite.
    """

    def __init__(
        self,
        variables: StepVariables,
        metrics: Iterable[keras.Variable] = (),
        optimizers: Iterable[keras.optimizers.Optimizer] = (),
        primary: str | None = None,
        limit: int = 1,
        agree: Callable[[Tensor], Tensor] | None = None,
        gates: bool = False,
    ) -> None:
        self.primary = primary
        self.limit = limit
        self.agree = agree
        by_hand = _updated_by_hand(variables, optimizers)
        self.assigned = unique([*variables.assigned, *by_hand])
        ignored = set(map(id, metrics))
        self.checked = [v for v in self.assigned if id(v) not in ignored and _is_float(v.dtype)]
        terms = as_terms(variables.result, primary)
        scalars = [n for n, v in terms.items() if not len(getattr(v, "shape", ()))]
        self.monitored_names = ["loss"] if "loss" in scalars else scalars
        once = variables.num_decisions == 1 and not variables.by_hand
        self.gates = gates and once and not by_hand
        self.kept = self.assigned
        if self.gates:
            updated = [v for u in variables.updates for v in (*u.variables, *u.optimizer.variables)]
            gated = set(map(id, updated))
            self.kept = [v for v in self.assigned if id(v) not in gated]

    def wrap(self, step: Step, bad: keras.Variable, detail: bool = False) -> Step:
        """Returns the guarded step, which returns a dict: "result", and "finite" for whether it is.

        Args:
            step: The step.
            bad: Counts the consecutive steps that were not finite; an int32 variable.
            detail: Whether it returns "details" as well: a flag for each value that was checked.
        """

        def guarded(*inputs: Any, **named: Any) -> dict[str, Any]:
            held = backend.hold(self.kept)
            with Watch(self, bad) as watch:
                result = step(*inputs, **named)
            finite = watch.finite(result)
            details = watch.details(result) if detail else {}
            backend.settle(finite, held)
            bad.assign(ops.where(finite, 0, bad + 1))
            return {"result": result, "finite": finite, **details}

        return guarded

    def monitored(self, result: object) -> list[Tensor]:
        """Returns the loss out of what a step returned; all scalar terms if none is the loss."""
        terms = as_terms(result, self.primary)
        return [terms[name] for name in self.monitored_names]


class Watch(Watching):
    """Collects what a step computes that has to be finite, while the step runs or is traced.

    Args:
        guard: The guard.
        bad: Counts the consecutive steps that were not finite.
    """

    def __init__(self, guard: Guard, bad: keras.Variable) -> None:
        super().__init__()
        self.guard = guard
        self.bad = bad
        self.gradients: dict[str, Tensor] = {}
        self._values: list[Any] = []
        self._decided: Any = None

    def see(
        self,
        optimizer: keras.optimizers.Optimizer,
        gradients: Sequence[Tensor | None],
        variables: Sequence[keras.Variable],
    ) -> None:
        """Adds an update.

        Args:
            optimizer: The optimizer. The gradients of a scaled loss may overflow: it skips these.
            gradients: The gradients that it gets.
            variables: Their variables.
        """
        found = zip(variables, gradients, strict=True)
        known = {v.path: gradient for v, gradient in found if gradient is not None}
        self.gradients |= known
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            self._values.append(backend.total(list(known.values())))
            self._values += _rates(optimizer)

    def decide(self, loss: Tensor | None) -> Tensor | None:
        """Returns whether the updates may be applied; None if they are undone afterwards.

        Args:
            loss: The loss, unscaled.
        """
        self._values += [] if loss is None else [loss]
        if not self.guard.gates:
            return None
        self._decided = self._all_finite()
        return self._decided  # type: ignore[no-any-return]

    def finite(self, result: object) -> Tensor:
        """Returns whether the step was finite, given what it returned."""
        if self._decided is None:
            self._values += self.guard.monitored(result)
            self._values.append(backend.total([v.value for v in self.guard.checked]))
            self._decided = self._all_finite()
        return self._decided  # type: ignore[no-any-return]

    def details(self, result: object) -> dict[str, Any]:
        """Returns, of each gradient and each variable, whether it is finite."""
        return {
            "gradients": {n: backend.total([g]) for n, g in self.gradients.items()},
            "variables": {v.path: backend.total([v.value]) for v in self.guard.checked},
        }

    def _all_finite(self) -> Tensor:
        finite = ops.less(self.bad, self.guard.limit)
        for value in self._values:
            finite = ops.logical_and(finite, ops.isfinite(value))
        if self.guard.agree is not None:
            finite = ops.all(self.guard.agree(ops.reshape(finite, (1,))))
        return finite  # type: ignore[no-any-return]


def _updated_by_hand(variables: StepVariables, optimizers: Iterable[Any]) -> list[keras.Variable]:
    """Returns the variables that a step may update by an optimizer that it calls itself.

    On PyTorch a dry run does not see that they are assigned.
    """
    called = [update.optimizer for update in variables.updates]
    called += [inner for each in called for inner in getattr(each, "optimizers", ())]
    known = set(map(id, called))
    idle = [optimizer for optimizer in optimizers if id(optimizer) not in known]
    updated = {id(v) for update in variables.updates for v in update.variables}
    assigned = {id(v) for v in variables.assigned}
    weights = [v for v in variables.used if v.trainable and id(v) not in updated]
    if not idle:
        return [v for v in weights if id(v) in assigned]
    return [*weights, *(v for optimizer in idle for v in optimizer.variables)]


def _is_float(dtype: object) -> bool:
    return bool(keras.backend.is_float_dtype(keras.backend.standardize_dtype(dtype)))


def _rates(optimizer: Any) -> list[Tensor]:
    """Returns the learning rate if it is a number: a schedule would be computed once more."""
    if isinstance(optimizer, MultiOptimizer):
        return []
    rate = schedule_of(optimizer)
    return [rate.value] if isinstance(rate, keras.Variable) else []
