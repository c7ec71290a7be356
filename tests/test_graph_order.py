"""TensorFlow runs at once what has no order: each read of a variable has one to each change."""

import graphlib
import itertools
from collections import defaultdict

import keras
import pytest
from conformance import ROWS, X, build
from keras import ops

from polus import core
from polus.training import BaseTrainer

if keras.backend.backend() != "tensorflow":
    pytest.skip(
        "JAX passes values, and PyTorch runs one operation after the other",
        allow_module_level=True,
    )


def optimized_graphs(run, folder):
    """The graphs that TensorFlow executed in `run()`, after all its optimizations."""
    import tensorflow as tf

    tf.summary.trace_on(graph=True)
    run()
    with tf.summary.create_file_writer(str(folder)).as_default():
        tf.summary.trace_export("run", step=0)
    for record in tf.data.TFRecordDataset([str(path) for path in folder.iterdir()]):
        for value in tf.compat.v1.Event.FromString(record.numpy()).summary.value:
            trace = tf.compat.v1.RunMetadata.FromString(tf.make_ndarray(value.tensor).item())
            for graphs in trace.function_graphs:
                yield graphs.post_optimization_graph


def unordered(graph):
    """The pairs of a variable's reads and assignments, one an assignment, without a path."""
    nodes = {node.name: node for node in graph.node}
    inputs = {name: [_name(i) for i in node.input] for name, node in nodes.items()}
    for name, node in nodes.items():
        if node.op == "Exit":  # after what its loop computed last
            merge = inputs[inputs[name][0]][0]
            inputs[name] += [i for i in inputs[merge] if nodes[i].op == "NextIteration"]
    for name, node in nodes.items():
        if node.op == "Merge":  # the way back is no order within one turn
            inputs[name] = [i for i in inputs[name] if nodes[i].op != "NextIteration"]

    before: dict[str, set[str]] = {}
    for name in graphlib.TopologicalSorter(inputs).static_order():
        before[name] = set(inputs[name]).union(*(before[i] for i in inputs[name]))

    uses = defaultdict(list)
    for name, node in nodes.items():
        if "VariableOp" in node.op or node.op.startswith("Resource"):
            variable = inputs[name][0]
            while nodes[variable].op in ("Enter", "Identity", "Switch"):
                variable = inputs[variable][0]
            uses[variable].append(name)
    for first, second in itertools.chain(*(itertools.combinations(u, 2) for u in uses.values())):
        reads = all(nodes[n].op in ("ReadVariableOp", "ResourceGather") for n in (first, second))
        ordered = first in before[second] or second in before[first]
        if not (reads or ordered or _exclusive(first, second)):
            yield first, second


def _name(edge):
    return edge.lstrip("^").split(":")[0]


def _exclusive(first, second):
    """Whether two nodes are in the two branches of one condition."""
    parts = zip(first.split("/"), second.split("/"), strict=False)
    return next({a, b} == {"then", "else"} for a, b in parts if a != b)


@pytest.fixture(autouse=True)
def without_xla():  # which orders everything
    core.set_jit_compile(False)
    yield
    core.set_jit_compile("auto")


@pytest.mark.parametrize("at_a_time", [1, 2])
@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_read_while_a_step_changes_it(name, at_a_time, tmp_path):
    case = build(name)

    def train():
        case.trainer.train(case.batches[:2], epochs=1, steps_per_execution=at_a_time)

    graphs = list(optimized_graphs(train, tmp_path))
    assert any("Assign" in node.op for graph in graphs for node in graph.node)
    assert [pair for graph in graphs for pair in unordered(graph)] == []


class OneUpdate(BaseTrainer):
    """Two gradients before one update, by an optimizer that the step calls itself."""

    def train_step(self, x):
        first, second = self.model.weights[:2], self.model.weights[2:]
        a, by_first = core.value_and_grad(lambda: ops.mean(self.model(x) ** 2), first)
        b, by_second = core.value_and_grad(lambda: ops.mean((self.model(x) - 1) ** 2), second)
        self.optimizer.apply([*by_first, *by_second], [*first, *second])
        return {"a": a, "b": b}


def test_nor_where_a_trainers_step_calls_its_optimizer(tmp_path):
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((4,)), dense(3, "tanh"), dense(4)])
    trainer = OneUpdate(model, keras.optimizers.Adam(0.01))
    batches = [ops.ones((8, 4))] * 2

    graphs = list(
        optimized_graphs(lambda: trainer.train(batches, 1, steps_per_execution=2), tmp_path)
    )
    assert any("Assign" in node.op for graph in graphs for node in graph.node)
    assert [pair for graph in graphs for pair in unordered(graph)] == []


def test_nor_where_a_function_updates_by_several_gradients(tmp_path):
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((4,)), dense(3, "tanh"), dense(4)])
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    first, second = model.weights[:2], model.weights[2:]

    @core.function
    def step(x):
        a, by_first = core.value_and_grad(lambda: ops.mean(model(x) ** 2), first)
        b, by_second = core.value_and_grad(lambda: ops.mean((model(x) - 1) ** 2), second)
        optimizer.apply([*by_first, *by_second], [*first, *second])
        return a, b

    graphs = list(optimized_graphs(lambda: step(ops.ones((8, 4))), tmp_path))
    assert any("Assign" in node.op for graph in graphs for node in graph.node)
    assert [pair for graph in graphs for pair in unordered(graph)] == []


def test_nor_where_the_optimizer_is_called_by_hand(tmp_path):
    trainer = build("ema_target_network").trainer
    model, optimizer = trainer.model, trainer.optimizer

    @core.function
    def step(x):
        value, gradients = core.value_and_grad(
            lambda: ops.mean((model(x) - 1.0) ** 2) + 0.1 * ops.mean(model(x)),
            model.trainable_variables,
        )
        optimizer.apply(gradients, model.trainable_variables)
        return value

    graphs = list(optimized_graphs(lambda: step(X[0]), tmp_path))
    assert any("Assign" in node.op for graph in graphs for node in graph.node)
    assert [pair for graph in graphs for pair in unordered(graph)] == []
