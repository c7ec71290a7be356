"""Gradients by inputs, and those of several losses from one forward pass."""

import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

from polus import core
from polus.backends import backend
from polus.training import BaseTrainer

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")


def host(value):
    return ops.convert_to_numpy(value)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_by_inputs_follow_those_of_variables(compiled):
    w = keras.Variable(np.float32([1, 2, 3, 4]))
    unused = keras.Variable(np.float32(1))
    other = np.float32([7])

    def gradients(x):
        return core.value_and_grad(
            lambda x, _: (ops.sum(w * x**2), x), [w, unused], has_aux=True, inputs=[x, other]
        )

    run = core.function(gradients) if compiled else gradients
    (value, aux), (by_w, by_unused, by_x, by_other) = run(X)
    np.testing.assert_allclose(host(value), np.sum(host(w) * X**2), rtol=1e-5)
    np.testing.assert_array_equal(host(aux), X)
    np.testing.assert_allclose(host(by_w), np.sum(X**2, 0), rtol=1e-5)
    np.testing.assert_allclose(host(by_x), 2 * host(w) * X, rtol=1e-5)
    assert by_unused is None
    assert by_other is None


def test_gradients_by_inputs_are_differentiated_by_outer_ones():
    """d/dw of (d/dx (w x)^2)^2 at an x that is w itself: x = w c, by hand."""
    w, c = keras.Variable(np.float32(3)), np.float32(2)

    def outer():
        x = w * c
        _, (slope,) = core.value_and_grad(lambda x: x**3, [], inputs=[x])  # 3 w^2 c^2
        return slope

    value, (gradient,) = core.function(lambda: core.value_and_grad(outer, [w]))()
    assert host(value) == pytest.approx(3 * 9 * 4)
    assert host(gradient) == pytest.approx(6 * 3 * 4)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_input_is_another_thing_than_what_it_was_made_from(compiled):
    """Of a * b * x * w at a = b = x = w = v, by each alone: v^3, however they hang together."""
    v = np.float32([2, 3])
    w = keras.Variable(v)

    def from_outside():
        x = ops.convert_to_tensor(v)
        return core.value_and_grad(lambda a, b: ops.sum(a * b * x * w), [w], inputs=[x, x])

    def from_a_variable():
        return core.value_and_grad(lambda a, b: ops.sum(a * b * w * w), [w], inputs=[w, w.value])

    run = core.function if compiled else lambda fn: fn
    for gradients, by_w in (from_outside, v**3), (from_a_variable, 2 * v**3):
        _, found = run(gradients)()
        for gradient, expected in zip(found, (by_w, v**3, v**3), strict=True):
            np.testing.assert_allclose(host(gradient), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_inner_gradient_separates_inputs_from_variables(compiled):
    """d/dw of (d/dx + d/du) of x^2 u w at x = u w: 2 x u w + x^2 w = 2 u^2 w^2 + u^2 w^3."""
    w, u = keras.Variable(np.float32(2)), keras.Variable(np.float32(3))

    def outer():
        x = u * w
        _, (by_u, by_x) = core.value_and_grad(lambda x: x**2 * u * w, [u], inputs=[x])
        return by_x + by_u, (by_u, by_x)

    run = core.function if compiled else lambda fn: fn
    take = run(lambda: core.value_and_grad(outer, [w, u], has_aux=True))
    (_, (by_u, by_x)), (by_w, again_by_u) = take()
    w, u = 2.0, 3.0
    assert host(by_u) == pytest.approx(u**2 * w**3)
    assert host(by_x) == pytest.approx(2 * u**2 * w**2)
    assert host(by_w) == pytest.approx(4 * u**2 * w + 3 * u**2 * w**2)
    assert host(again_by_u) == pytest.approx(4 * u * w**2 + 2 * u * w**3)


def test_gradients_by_inputs_that_are_not_real_raise():
    with pytest.raises(TypeError, match=r"floating point numbers, got .*int32.*ops\.cast"):
        core.value_and_grad(lambda x: ops.sum(x), [], inputs=[np.int32([1])])
    with pytest.raises(TypeError, match="passes the function its 1 inputs, which it does not take"):
        core.value_and_grad(lambda: 0.0, [], inputs=[X])


class Penalized(BaseTrainer):
    """A critic whose slope at its inputs is kept at one (Gulrajani et al., arXiv:1704.00028)."""

    def train_step(self, x):
        def loss():
            _, (slope,) = core.value_and_grad(
                lambda x: ops.sum(self.model(x, training=True)), [], inputs=[x]
            )
            return ops.mean((ops.sqrt(ops.sum(slope**2, -1)) - 1) ** 2)

        return {"loss": self.minimize(loss, self.trainable_weights)}


def test_a_gradient_penalty():
    """Of a linear critic it is (|w| - 1)^2, whose gradient is 2 (|w| - 1) w / |w|."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    w = host(model.weights[0]).copy()
    losses = Penalized(model, keras.optimizers.SGD(0.1)).train([X] * 5, 1, steps_per_execution=2)
    expected = []
    for _ in range(5):
        norm = np.linalg.norm(w)
        expected.append((norm - 1) ** 2)
        w = w - 0.1 * 2 * (norm - 1) * w / norm
    np.testing.assert_allclose(losses.steps["loss"], expected, rtol=1e-4)


# ---------------------------------------------------------------------- several losses


class Pair(BaseTrainer):
    """Two models that judge each other, with batch norm and random numbers in the forward pass."""

    def __init__(self, **arguments):
        keras.utils.set_random_seed(6)
        dense = lambda: keras.Sequential(  # noqa: E731
            [keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(4)]
        )
        super().__init__({"a": dense(), "b": dense()}, keras.optimizers.Adam(0.01), **arguments)
        self.b_optimizer = keras.optimizers.SGD(0.1)
        self.seed = keras.random.SeedGenerator(1)
        self.traces = 0

    def losses(self, x):
        self.traces += 1
        noise = keras.random.normal(ops.shape(x), seed=self.seed)
        made = self.model.a(x + noise, training=True)
        judged = self.model.b(made, training=True)
        return {
            "a": ops.mean((judged - 1) ** 2),
            "b": ops.mean(judged**2 + made**2),
            "other": judged[0, 0],
        }

    def groups(self):
        a, b = self.model.a.trainable_weights, self.model.b.trainable_weights
        return {"a": (a, self.optimizer), "b": (b, self.b_optimizer)}


class Together(Pair):
    def train_step(self, x):
        return self.minimize_together(lambda: self.losses(x), self.groups())


class ByHand(Pair):
    """All gradients by all weights of two forward passes; the state is that of the first."""

    def train_step(self, x):
        groups = self.groups()
        state = [*self.model.non_trainable_variables, self.seed.state]
        before = [ops.copy(v.value) for v in state]
        losses, by_a = core.value_and_grad(
            lambda: ((terms := self.losses(x))["a"], terms), groups["a"][0], has_aux=True
        )
        for variable, value in zip(state, before, strict=True):
            variable.assign(value)
        _, by_b = core.value_and_grad(lambda: self.losses(x)["b"], groups["b"][0])
        for (weights, optimizer), gradients in zip(groups.values(), (by_a, by_b), strict=True):
            optimizer.apply(gradients, weights)
        return losses[1]


def test_losses_minimized_together():
    trainer, reference = Together(), ByHand()
    for weights, optimizer in reference.groups().values():
        optimizer.build(weights)
    history = trainer.train([X] * 6, 1, steps_per_execution=3)
    expected = reference.train([X] * 6, 1, steps_per_execution=3)
    for name in ("a", "b", "other"):
        np.testing.assert_allclose(history.steps[name], expected.steps[name], rtol=2e-4, atol=1e-6)
    for ours, theirs in zip(trainer.model.variables, reference.model.variables, strict=True):
        np.testing.assert_allclose(host(ours), host(theirs), rtol=2e-3, atol=1e-5)
    before = trainer.traces
    trainer.train_step(X)
    trainer.train_step(X)
    # One pass a step; where steps are compiled, its passes are those of the compilation.
    assert keras.backend.backend() != "torch" or trainer.traces == before + 2


class Shared(BaseTrainer):
    """Two losses by two groups of weights and one optimizer."""

    def __init__(self):
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "tanh"), layers.Dense(4)])
        super().__init__(model, keras.optimizers.Adam(0.01))
        self.groups = model.weights[:2], model.weights[2:]

    def losses(self, x):
        y = self.model(x, training=True)
        return {"a": ops.mean(y**2), "b": ops.mean((y - x) ** 2)}

    def by_hand(self, x, name):
        index = ("a", "b").index(name)
        return core.value_and_grad(lambda: self.losses(x)[name], self.groups[index])


class SharedTogether(Shared):
    def train_step(self, x):
        groups = {n: (g, self.optimizer) for n, g in zip("ab", self.groups, strict=True)}
        return self.minimize_together(lambda: self.losses(x), groups)


class SharedByTurns(Shared):
    def train_step(self, x):
        a = self.minimize(lambda: self.losses(x)["a"], self.groups[0])
        return {"a": a, "b": self.minimize(lambda: self.losses(x)["b"], self.groups[1])}


class OneUpdate(Shared):
    def train_step(self, x):
        (a, by_a), (b, by_b) = self.by_hand(x, "a"), self.by_hand(x, "b")
        self.optimizer.apply([*by_a, *by_b], [*self.groups[0], *self.groups[1]])
        return {"a": a, "b": b}


class TwoUpdates(Shared):
    def train_step(self, x):
        a, by_a = self.by_hand(x, "a")
        self.optimizer.apply(by_a, self.groups[0])
        b, by_b = self.by_hand(x, "b")
        self.optimizer.apply(by_b, self.groups[1])
        return {"a": a, "b": b}


@pytest.mark.parametrize(
    ("ours", "hand", "steps"), [(SharedTogether, OneUpdate, 4), (SharedByTurns, TwoUpdates, 8)]
)
def test_one_optimizer_of_several_groups(ours, hand, steps):
    """It was built with the first group alone, and refused the second."""
    trainer, reference = ours(), hand()
    reference.optimizer.build(reference.model.trainable_weights)
    history = trainer.train([X] * 4, 1)
    expected = reference.train([X] * 4, 1)
    for name in "ab":
        np.testing.assert_allclose(history.steps[name], expected.steps[name], rtol=1e-4)
    assert int(host(trainer.optimizer.iterations)) == steps


def test_losses_minimized_together_that_are_wrong_raise():
    class Wrong(Pair):
        def train_step(self, x):
            return self.minimize_together(lambda: self.losses(x), self.change(self.groups()))

    def train(change):
        trainer = Wrong()
        trainer.change = change
        trainer.train([X], 1)

    with pytest.raises(ValueError, match=r"a loss for each group, 'a', 'c', got \['a', 'b'"):
        train(lambda groups: {"a": groups["a"], "c": groups["b"]})
    with pytest.raises(ValueError, match="'a' and 'b' of minimize_together share the variable"):
        train(lambda groups: {"a": groups["a"], "b": (groups["a"][0], groups["b"][1])})
    with pytest.raises(TypeError, match="Write minimize_together"):
        train(lambda groups: groups["a"])
    unrelated = [keras.Variable(np.float32(1), name="unrelated")]
    with pytest.raises(ValueError, match="depends on none of the"):
        train(lambda groups: {"a": (unrelated, groups["a"][1])})


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_weight_that_only_another_loss_reaches_has_no_gradient():
    """It stays as it is: an optimizer that decays weights skips those without a gradient."""
    seen, start = [], np.float32([1, 2])
    weights = [keras.Variable(start, name=name) for name in "abc"]

    class Crossed(BaseTrainer):
        def train_step(self, x):
            a, b, c = weights
            return self.minimize_together(
                lambda: {"first": ops.sum(a**2), "second": ops.sum(a * b * ops.mean(x)) + c[0]},
                {"first": ([a, b], self.optimizer), "second": ([c], self.other)},
            )

    decaying = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    trainer = Crossed(
        keras.Sequential([keras.Input((4,)), layers.Dense(1)]),
        decaying,
        post_process_grads=lambda found: seen.append([g is None for g in found]) or found,
    )
    trainer.other = keras.optimizers.SGD(0.1)
    trainer.train([X] * 3, 1, steps_per_execution=1)
    assert [False, True] in seen
    assert [False] in seen
    assert [False, False] not in seen
    np.testing.assert_array_equal(host(weights[1]), start)
    np.testing.assert_allclose(host(weights[2]), start - np.float32([0.3, 0]), rtol=1e-5)


def test_gradients_of_an_unscaled_loss_are_not_copied():
    """A copy of each would take as much memory as the weights once more."""
    taken, applied = [], []

    class Recorder(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            applied.extend(grads)
            super().apply(grads, trainable_variables)

    class Squares(BaseTrainer):
        def forward_with_grads(self, x):
            return ops.mean(self.model(x) ** 2)

    trainer = Squares(
        keras.Sequential([keras.Input((4,)), layers.Dense(1)]),
        Recorder(0.1),
        lambda loss: loss,
        post_process_grads=lambda found: taken.extend(found) or found,
    )
    trainer.train([X], 1)
    assert len(taken) >= 2
    assert all(ours is theirs for ours, theirs in zip(taken, applied, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_accumulator_adds_up_gradients(compiled):
    """Of sum(w x^2) and sum(3 w), by hand; nothing is left of the sums before."""
    w, unused = keras.Variable(np.float32([1, 2, 3, 4])), keras.Variable(np.float32(1))
    frozen = keras.Variable(np.float32(1), trainable=False)
    totals = backend.accumulator([w, unused, frozen], backend.value_and_grad)

    def gradients(x):
        totals.start()
        values = totals.add(lambda: ops.sum(w * x**2)), totals.add(lambda: ops.sum(3 * w + frozen))
        return values, totals.gradients()[0]

    run = core.function(gradients) if compiled else gradients
    for x in (X, 2 * X):
        (first, second), by_w = run(x)
        np.testing.assert_allclose(host(first), np.sum(host(w) * x**2), rtol=1e-5)
        np.testing.assert_allclose(host(second), 3 * 10 + 4, rtol=1e-5)
        np.testing.assert_allclose(host(by_w), np.sum(x**2, 0) + 3, rtol=1e-5)
    if not compiled:
        gradients(X)
        assert totals.gradients()[1:] == [None, None]


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch's memory")
def test_an_accumulator_takes_no_more_memory_than_pytorch_itself():
    """No array of a weight's size but its gradient, and none is kept; a user's `.grad` stays."""
    import torch

    x = torch.ones(8, 50)
    variable = keras.Variable(np.ones((50, 40), "float32"))
    weight = torch.nn.Parameter(torch.ones(50, 40))
    variable.value.grad = own = torch.zeros(50, 40)
    totals = backend.accumulator([variable], backend.value_and_grad)

    def num_arrays(add):
        add()
        with torch.profiler.profile(profile_memory=True) as profile:
            add()
        return sum(event.self_cpu_memory_usage >= 50 * 40 * 4 for event in profile.events())

    ours = num_arrays(lambda: totals.add(lambda: ops.sum(ops.matmul(x, variable) ** 2)))
    assert ours == num_arrays(lambda: torch.sum(torch.matmul(x, weight) ** 2).backward())
    (found,) = totals.gradients()
    np.testing.assert_allclose(host(found), host(weight.grad))
    assert variable.value.grad is own
    assert totals.variables == []
    kept = weakref.ref(found)
    del found
    assert kept() is None
