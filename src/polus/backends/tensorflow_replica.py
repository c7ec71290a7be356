"""A replica of a TensorFlow strategy as a single device, and how it meets the others.

Inside of `strategy.run`, the strategy in effect is TensorFlow's default one and Keras' variables
are the copies of the replica. So Keras neither divides losses nor sums gradients, and a step means
what it means on one device.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import keras
import tensorflow as tf

from polus.backends.placement import Placement, ReplicaState

P = ParamSpec("P")
R = TypeVar("R")
# Far apart, so that the replicas' random numbers don't meet; see `torch_distribution`.
SEED_STRIDE = 8_000_009
SUM, MEAN = tf.distribute.ReduceOp.SUM, tf.distribute.ReduceOp.MEAN


class Replica(tf.distribute.ReplicaContext):
    """The context of a step in one replica, which is a single device to Keras.

    Args:
        placement: All replicas.
        strategy: Their strategy.
        context: The strategy's own context of the replica; None in a dry run.
        whole: Whether each replica has the whole batch.

    Attributes:
        number: The number of the replica among all.
        local: Its number among those of its process.
        local_replicas: How many there are in its process.
        depth: How many gradients are being taken, one inside the other.
    """

    def __init__(self, placement: Placement, strategy: Any, context: Any, whole: bool) -> None:
        number = 0 if context is None else tf.get_static_value(context.replica_id_in_sync_group)
        super().__init__(default_strategy(), int(number))
        self.placement = placement
        self.of_strategy = strategy
        self.context = context
        self.whole = whole
        self.number = int(number)
        self.local_replicas = len(strategy.extended.worker_devices)
        self.local = self.number % self.local_replicas
        self.depth = 0

    def reduced(self, op: Any, tensor: Any) -> Any:
        """Returns the sum or mean of a tensor, or of each of a list, over all replicas."""
        if self.context is None:
            return tensor
        with self.context:
            return self.context.all_reduce(op, tf.nest.map_structure(tf.identity, tensor))

    def gathered(self, tensor: Any, axis: int = 0) -> Any:
        """Returns the rows of all replicas, each of which has a part of their gradient."""
        size = tf.shape(tensor)[axis] if tensor.shape[axis] is None else tensor.shape[axis]

        @tf.custom_gradient
        def gather(own: Any) -> Any:
            with self.context:  # on the replica's device: an argument of a function is on none
                rows = self.context.all_gather(tf.identity(own), axis)

            def gradient(upstream: Any) -> Any:
                total = self.reduced(SUM, upstream)
                return tf.gather(total, tf.range(size) + self.number * size, axis=axis)

            shape = own.shape.as_list()
            shape[axis] = None if shape[axis] is None else size * self.placement.replicas
            rows.set_shape(shape)
            return rows, gradient

        return gather(tensor)

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        """Reduces as the strategy does, for layers such as a synchronized batch norm.

        A list is what Keras' optimizers sum: gradients, which are averaged already.
        """

        @tf.custom_gradient
        def reduce(own: Any) -> Any:
            return self.reduced(reduce_op, own), lambda up: self.reduced(reduce_op, up)

        return value if isinstance(value, list) else reduce(value)

    def all_gather(self, value: Any, axis: Any, options: Any = None) -> Any:
        return value if self.context is None else self.gathered(value, axis)


class OwnVariables(keras.StatelessScope):
    """A scope in which Keras' variables are the copies that one replica has.

    Args:
        replica: The replica.
        variables: Those that the step is known to use. Where Keras casts what is read for mixed
            precision, the copies of a variable are not found any more.
    """

    def __init__(self, replica: Replica, variables: Iterable[keras.Variable]) -> None:
        super().__init__(collect_losses=True, initialize_variables=False)
        self.replica = replica
        self.copies = {id(variable): own_copy(variable, replica) for variable in variables}

    def get_current_value(self, variable: keras.Variable) -> Any:
        copy = self.copies.get(id(variable))
        return own_copy(variable, self.replica) if copy is None else copy

    def add_update(self, update: tuple[Any, Any]) -> None:
        variable, value = update
        copy = self.get_current_value(variable)
        copy.assign(tf.cast(value, copy.dtype))


@functools.cache
def default_strategy() -> Any:
    """Returns the strategy that TensorFlow has where none was entered: in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(tf.distribute.get_strategy).result()


def alone(fn: Callable[P, R]) -> Callable[P, R]:
    """Returns `fn` that runs as on no replica where there is one alone, and else as it is.

    Without replicas there is nothing to sum over them. Keras' sum over the only one ties all
    gradients of an update together, and TensorFlow's graph optimizer takes the tie, which it
    removes later, for a reason to drop the order between the read of a weight and its update: on a
    busy machine a step in some thousands was computed with weights half updated, and many more
    where the gradients of several calls meet in one update.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        context = tf.distribute.get_replica_context()
        if context is None or tf.distribute.has_strategy():
            return fn(*args, **kwargs)
        result: R = context.merge_call(lambda _: fn(*args, **kwargs))
        return result

    return call


def current() -> Replica | None:
    """Returns the replica whose step runs or is traced, else None."""
    context = tf.distribute.get_replica_context()
    return context if isinstance(context, Replica) else None


def own_copy(variable: keras.Variable, replica: Replica) -> Any:
    """Returns the `tf.Variable` that a replica has of a distributed variable."""
    with keras.StatelessScope(initialize_variables=False):
        value = variable.value
    if not isinstance(value, tf.distribute.DistributedValues):
        raise RuntimeError(
            f"The step uses the variable {variable.path}, which was not made in the scope of the "
            f"strategy before the step: {replica.placement.name} has no copy of it on each device. "
            "Make it where the model is made. For random numbers in a step, hold a "
            "keras.random.SeedGenerator(seed) in the trainer and pass it as `seed`."
        )
    return replica.of_strategy.experimental_local_results(value)[replica.local]


def own_rows(replica: Replica, batch: Any) -> Any:
    """Returns a replica's rows of the arrays that have an axis of examples; others as they are."""
    count = replica.local_replicas
    arrays = [leaf for leaf in tf.nest.flatten(batch) if getattr(leaf, "shape", None) is not None]
    if replica.whole or count == 1 or not arrays:
        return batch
    size = arrays[0].shape[0]
    own = slice(replica.local * size // count, (replica.local + 1) * size // count)

    def rows(leaf: Any) -> Any:
        shape: Any = getattr(leaf, "shape", ())
        has_rows = len(shape) > 0 and shape[0] == size
        return leaf[own] if has_rows else leaf

    return tf.nest.map_structure(rows, batch)


@contextlib.contextmanager
def own_state(replica: Replica, state: ReplicaState) -> Iterator[None]:
    """Gives a replica random numbers of its own, and counts a whole batch in one replica only.

    The seeds are those of the first replica again afterwards, so a checkpoint does not depend on
    the number of replicas.
    """
    stride = 0 if replica.whole else replica.number * SEED_STRIDE
    counts = replica.number == 0 or not replica.whole
    summed = [] if counts else [own_copy(variable, replica) for variable in state.summed]
    before = [tf.identity(copy) for copy in summed]
    seeds = [own_copy(seed, replica) for seed in state.seeds] if stride else []
    for seed in seeds:
        _shift(seed, stride)
    yield
    for seed in seeds:
        _shift(seed, -stride)
    for copy, value in zip(summed, before, strict=True):
        copy.assign(value)


def _shift(seed: Any, stride: int) -> None:
    value = seed.read_value()
    first = tf.cast(tf.cast(value[:1], tf.int64) + stride, value.dtype)
    seed.assign(tf.concat([first, value[1:]], 0))


def merged(replica: Replica, outputs: Any, state: ReplicaState) -> Any:
    """Averages the scalars that a step returned, and moving statistics, in one call."""
    leaves = [_value(leaf) for leaf in tf.nest.flatten(outputs)]
    scalars = [i for i, leaf in enumerate(leaves) if _is_number(leaf)]
    copies = [own_copy(variable, replica) for variable in state.averaged]
    parts = [*(leaves[i] for i in scalars), *copies]
    if not parts:
        return outputs
    packed = tf.concat([tf.reshape(tf.cast(part, tf.float64), [-1]) for part in parts], 0)
    sizes = [part.shape.num_elements() for part in parts]
    means = tf.split(replica.reduced(MEAN, packed), sizes)
    for i, mean in zip(scalars, means, strict=False):
        dtype = leaves[i].dtype if leaves[i].dtype.is_floating else tf.float64
        leaves[i] = tf.cast(tf.reshape(mean, []), dtype)
    for copy, mean in zip(copies, means[len(scalars) :], strict=True):
        copy.assign(tf.cast(tf.reshape(mean, copy.shape), copy.dtype))
    return tf.nest.pack_sequence_as(outputs, leaves)


def _value(leaf: Any) -> Any:
    if isinstance(leaf, keras.Variable):
        leaf = leaf.value
    return tf.convert_to_tensor(leaf) if isinstance(leaf, tf.Variable) else leaf


def _is_number(leaf: Any) -> bool:
    if not tf.is_tensor(leaf) or leaf.shape.rank != 0:
        return False
    return bool(leaf.dtype.is_floating or leaf.dtype.is_integer or leaf.dtype.is_bool)


@contextlib.contextmanager
def differentiating() -> Iterator[Replica | None]:
    """Yields the replica whose gradients in the block have to be averaged.

    None on one device, and inside another gradient's function.
    """
    replica = current()
    if replica is None:
        yield None
        return
    replica.depth += 1
    try:
        yield replica if replica.depth == 1 else None
    finally:
        replica.depth -= 1


def averaged(replica: Replica | None, gradients: list[Any]) -> list[Any]:
    """Returns the means of gradients over the replicas; the same list where there is only one."""
    if replica is None:
        return gradients
    found: list[Any] = [_dense(g) for g in gradients]
    dense = [i for i, g in enumerate(found) if tf.is_tensor(g) and not _is_sparse(g)]
    means = replica.reduced(MEAN, [found[i] for i in dense]) if dense else []
    for i, mean in zip(dense, means, strict=True):
        found[i] = mean
    return [_all_slices(replica, g) if _is_sparse(g) else g for g in found]


def _is_sparse(gradient: Any) -> bool:
    return isinstance(gradient, tf.IndexedSlices)


def _dense(gradient: Any) -> Any:
    """Returns a gradient as a tensor, slices only where TensorFlow can gather those of others."""
    keeps = gradient is None or (_is_sparse(gradient) and not tf.executing_eagerly())
    return gradient if keeps else tf.convert_to_tensor(gradient)


def _all_slices(replica: Replica, slices: Any) -> Any:
    """Returns the slices of all replicas: as many as one device has of the batch."""
    if replica.whole:
        return slices
    values, indices = (replica.gathered(part) for part in (slices.values, slices.indices))
    return tf.IndexedSlices(values / replica.placement.replicas, indices, slices.dense_shape)
