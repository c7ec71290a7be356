"""TensorFlow on several devices: the replicas of a strategy, each with its own rows of every batch.

The strategy is that of the scope in which the model was made and is trained. `strategy.run` runs a
step on each replica, and inside of it the replica is a single device: the strategy in effect is the
default one, and variables are the replica's own copies. So Keras neither divides losses nor sums
gradients, and a step means what it means on one device. As on PyTorch, gradients are averaged where
they are taken, and outputs and moving statistics after the step. What metrics add up stays in each
replica, and TensorFlow sums it where it is read. A batch that does not divide by the number of
replicas runs whole in each of them, which is right for any loss.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from polus.backends.placement import (
    LOST_PROCESS,
    OwnRows,
    Placement,
    Program,
    ReplicaState,
    Stateful,
    report_idle,
)
from polus.backends.scopes import BackendVariable, current_scope
from polus.backends.tensorflow_replica import (
    SUM,
    OwnVariables,
    Replica,
    current,
    default_strategy,
    merged,
    own_rows,
    own_state,
)
from polus.types import Tensor

BROADCAST_SIZE = 2**22  # numbers sent at a time: they are 8 bytes each meanwhile
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
# How TensorFlow merges what metrics add up, where it is read.
_SUM = tf.VariableAggregation.SUM


class Replicas(Placement):
    """The replicas of a strategy.

    Args:
        strategy: The strategy in effect.
    """

    splits_steps = True

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.name = f"tf.distribute.{type(strategy).__name__}"
        self.replicas = int(strategy.num_replicas_in_sync)

    def compilers(self, mode: bool | str, candidates: Sequence[bool]) -> tuple[bool, ...]:
        if mode is True:
            raise NotImplementedError(
                f"XLA is asked for under {self.name}, and Polus runs steps there without it. Write "
                'polus.core.set_jit_compile(False), or "auto".'
            )
        return (False,)

    # ------------------------------------------------------------------ steps

    def step(self, step: Program, size: int, state: ReplicaState) -> Program:
        whole = not self.divides(size)

        def own(*batch: Any) -> Any:
            context = tf.distribute.get_replica_context()
            replica = Replica(self, self.strategy, context, whole)
            with replica, OwnVariables(replica, state.variables):
                with own_state(replica, state):
                    outputs = step(*own_rows(replica, batch))
                return merged(replica, outputs, state)

        def over_all(*batch: Any) -> Any:
            with _default_updates(state.optimizers):
                outputs = self.strategy.run(own, batch)
            return tf.nest.map_structure(self._first, outputs)

        return over_all

    def _first(self, value: Any) -> Any:
        return self.strategy.experimental_local_results(value)[0]

    @property
    def parts(self) -> int:
        replica = current()
        alone = replica is None or replica.whole or current_scope() is not None
        return 1 if alone else self.replicas

    def gather(self, tensor: Tensor) -> Tensor:
        replica = current()
        if replica is None or self.parts == 1:
            return tensor
        own = tf.convert_to_tensor(tensor)
        moved = tf.cast(own, tf.int32) if own.dtype == tf.bool else own
        rows: Tensor = tf.cast(replica.gathered(moved), own.dtype)
        return rows

    def own_rows(self, tensor: Tensor) -> Tensor:
        replica = current()
        if replica is None or self.parts == 1:
            return tensor
        part = tensor.shape[0] // self.replicas
        return tensor[replica.number * part : (replica.number + 1) * part]

    # ------------------------------------------------------------------ variables

    def check(self, parts: Iterable[object]) -> None:
        for part in parts:
            for each in _all_optimizers([part]):
                if each._distribution_strategy is not self.strategy:
                    raise RuntimeError(_made_outside(f"The optimizer {each.name!r}", self.name))
            for variable in _variables_of(part):
                _check_distributed(variable, self.name)

    def broadcast(self, variables: Iterable[Stateful]) -> None:
        for variable in variables:
            _check_distributed(variable, self.name)


class Workers(OwnRows, Replicas):
    """The replicas of several processes, each with one or more of them."""

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy)
        self.count = self.replicas // len(strategy.extended.worker_devices)
        resolver = strategy.cluster_resolver
        has_chief = "chief" in resolver.cluster_spec().jobs and resolver.task_type != "chief"
        self.index = int(resolver.task_id) + has_chief

    def program(self, program: Program, size: int, state: ReplicaState) -> Program:
        def run(*arguments: Any) -> Any:
            with _lost_processes_explained():
                return program(*arguments)

        return run

    # ------------------------------------------------------------------ agreement

    def agreed(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in self._table(values)[0]]

    def largest(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in self._table(values).max(axis=0)]

    def by_itself(self, function: Callable[..., Any], *arguments: Any) -> Any:
        # The scope of the strategy, in which each new variable is sent to all, is the thread's.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *arguments).result()

    def broadcast(self, variables: Iterable[Stateful]) -> None:
        variables = list(variables)
        super().broadcast(variables)
        for dtype in (tf.float64, tf.int64):
            group: list[Any] = []
            for variable in variables:
                value = variable.value
                # What metrics add up is each process's own.
                if value.dtype.is_floating == dtype.is_floating and value.aggregation != _SUM:
                    group.append(variable)
                if sum(v.value.shape.num_elements() for v in group) > BROADCAST_SIZE:
                    self._broadcast(group, dtype)
                    group = []
            self._broadcast(group, dtype)

    def _broadcast(self, variables: Sequence[Any], dtype: Any) -> None:
        """Gives variables the values of process 0, in one call."""
        if not variables:
            return
        parts = [tf.reshape(tf.cast(v.value, dtype), [-1]) for v in variables]
        own = tf.concat(parts, 0)
        first = _sums(self.strategy)(own if self.is_first else tf.zeros_like(own))
        values = tf.split(first, [part.shape[0] for part in parts])
        for variable, value in zip(variables, values, strict=True):
            variable.assign(tf.cast(tf.reshape(value, variable.shape), variable.value.dtype))

    def _table(self, values: Sequence[float]) -> Any:
        """Returns the numbers of all processes, a row for each."""
        table = np.zeros((self.count, len(values)))
        table[self.index] = values
        with _lost_processes_explained():
            return _sums(self.strategy)(tf.constant(table)).numpy()


@contextlib.contextmanager
def _lost_processes_explained() -> Iterator[None]:
    """Adds to an error of a collective call what it means for a run."""
    try:
        yield
    except LOST as error:
        error.add_note(LOST_PROCESS)
        raise


@functools.cache
def _sums(strategy: Any) -> Callable[[Any], Any]:
    """Returns a function that sums a tensor over the processes of a strategy."""

    def own(tensor: Any) -> Any:
        context = tf.distribute.get_replica_context()
        number = int(tf.get_static_value(context.replica_id_in_sync_group))
        counts = number % len(strategy.extended.worker_devices) == 0  # once for each process
        # On the replica's device: an argument of the function is on none.
        return context.all_reduce(SUM, tf.identity(tensor) if counts else tf.zeros_like(tensor))

    def summed(tensor: Any) -> Any:
        return strategy.experimental_local_results(strategy.run(own, (tensor,)))[0]

    compiled: Callable[[Any], Any] = tf.function(summed, autograph=False, reduce_retracing=True)
    return compiled


def active() -> Placement:
    """Returns where steps run now.

    Raises:
        NotImplementedError: Under a strategy that Polus does not serve.
    """
    if (replica := current()) is not None:
        return replica.placement
    if not tf.distribute.has_strategy():
        return OneDevice()
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return Workers(strategy)
    if isinstance(strategy, tf.distribute.MirroredStrategy):
        return Replicas(strategy)
    raise NotImplementedError(
        f"tf.distribute.{type(strategy).__name__} is active, and Polus trains under "
        "tf.distribute.MirroredStrategy and MultiWorkerMirroredStrategy. Use one of them, or leave "
        "out the strategy to train on one device."
    )


class OneDevice(Placement):
    """No strategy, in whose scope the model may still have been made."""

    def check(self, parts: Iterable[object]) -> None:
        for part in parts:
            for each in _all_optimizers([part]):
                if each._distribution_strategy is not default_strategy():
                    raise RuntimeError(_called_outside(f"The optimizer {each.name!r}"))
            self.broadcast(_variables_of(part))

    def broadcast(self, variables: Iterable[Stateful]) -> None:
        for variable in variables:
            if isinstance(variable.value, tf.distribute.DistributedValues):
                raise RuntimeError(_called_outside(f"The variable {variable.path}"))

    def report_layouts(self, variables: Sequence[keras.Variable]) -> None:
        kinds = "GPU", "CPU"
        counts = [len(tf.config.list_logical_devices(kind)) for kind in kinds]
        report_idle(
            counts[0] or counts[1],
            "write `with tf.distribute.MirroredStrategy().scope():` around the model, the "
            "optimizer, the metrics, the trainer and train(...)",
        )


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Traces in the block as the first replica, with the whole batch; does nothing elsewhere."""
    placement = None if current() is not None else active()
    if not isinstance(placement, Replicas):
        yield
        return
    with Replica(placement, placement.strategy, None, True):
        yield


def own_variables(variable: Any) -> tuple[Any, ...]:
    """Returns the variables of a distributed one, a tuple of the variable itself for any other."""
    found: tuple[Any, ...] = tf.distribute.get_strategy().experimental_local_results(variable)
    return found


@contextlib.contextmanager
def _default_updates(optimizers: Iterable[Any]) -> Iterator[None]:
    """Lets Keras' optimizers update what a replica has, not the copies of all replicas.

    They keep the strategy in which they were made, under a name that is not public.
    """
    found = list({id(each): each for each in _all_optimizers(optimizers)}.values())
    before = [each._distribution_strategy for each in found]
    for each in found:
        each._distribution_strategy = default_strategy()
    try:
        yield
    finally:
        for each, strategy in zip(found, before, strict=True):
            each._distribution_strategy = strategy


def _all_optimizers(optimizers: Iterable[Any]) -> Iterator[Any]:
    for optimizer in optimizers:
        inner = [getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())]
        yield from _all_optimizers(each for each in inner if each is not None)
        if isinstance(optimizer, keras.optimizers.Optimizer):
            yield optimizer


def _check_distributed(variable: Stateful, name: str) -> None:
    if isinstance(variable, BackendVariable):
        raise NotImplementedError(
            f"The step uses {variable.path}, a variable of TensorFlow itself, which Polus does not "
            f"train under {name}. Use keras.Variable, and keras.random with a SeedGenerator."
        )
    if not isinstance(variable.value, tf.distribute.DistributedValues):
        raise RuntimeError(_made_outside(f"The variable {variable.path}", name))


def _made_outside(what: str, name: str) -> str:
    return (
        f"{what} was made outside of the scope of {name}, so only one device has it. Write `with "
        "strategy.scope():` around the model, the optimizer, the metrics and the trainer."
    )


def _called_outside(what: str) -> str:
    return (
        f"{what} was made in the scope of a tf.distribute strategy, and this call is outside of "
        "it: one device would be used. Write `with strategy.scope():` around the call as well."
    )


def _variables_of(part: object) -> list[Any]:
    """Returns the variables of a layer, an optimizer or a metric; none of anything else."""
    kinds = keras.layers.Layer, keras.optimizers.Optimizer, keras.metrics.Metric
    return list(part.variables) if isinstance(part, kinds) else []


def assign(variable: Any, value: Any) -> None:
    """Assigns what was read of a variable; a sum goes to the first replica, whole."""
    held = variable.value
    if not isinstance(held, tf.distribute.DistributedValues) or held.aggregation != _SUM:
        variable.assign(value)
        return
    placement = active()
    for i, copy in enumerate(own_variables(held)):
        whole = placement.is_first and i == 0
        copy.assign(tf.cast(value, copy.dtype) if whole else tf.zeros(copy.shape, copy.dtype))
