"""Copies of trainers: each compiles, trains and counts for itself."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras

from polus.host import to_host
from polus.metrics import KerasMetric, OutputMetric
from polus.optimizers import of_same_config
from polus.state import layers_of
from polus.steps.variables import held

T = TypeVar("T")
Finish = Callable[[Any], None]


def shallow_copy(trainer: T, finish: Finish) -> T:
    """Returns a trainer of the same model, optimizer, loss and metrics.

    Args:
        trainer: The trainer.
        finish: Gives the copy an engine of its own.
    """
    new = _bare(trainer)
    for name, value in vars(trainer).items():
        vars(new)[name] = list(value) if type(value) is list else value
    vars(new)["step_counter"] = copy_variable(vars(trainer)["step_counter"])
    finish(new)
    return new


def deep_copy(trainer: T, memo: dict[int, Any], finish: Finish) -> T:
    """Returns a trainer of copied models, optimizers and attributes.

    Models are copied first, then what refers to their variables: optimizers and lists of weights.

    Args:
        trainer: The trainer.
        memo: The copies made so far, by identity, as `copy.deepcopy` has it.
        finish: Gives the copy an engine of its own.
    """
    new = _bare(trainer)
    memo[id(trainer)] = new
    parts = list(held(trainer))
    for kind in (keras.Model, keras.layers.Layer):
        for part in parts:
            if isinstance(part, kind) and id(part) not in memo:
                _copy_with_variables(part, memo)
    for part in parts:
        if isinstance(part, keras.metrics.Metric) and id(part) not in memo:
            _copy_with_variables(part, memo)
        if isinstance(part, keras.Variable) and id(part) not in memo:
            memo[id(part)] = copy_variable(part)
    weights = getattr(trainer, "trainable_weights", [])
    layers = [p.trainable_variables for p in parts if isinstance(p, keras.layers.Layer)]
    for part in parts:
        if isinstance(part, keras.optimizers.Optimizer) and id(part) not in memo:
            memo[id(part)] = _copy_optimizer(part, [weights, *layers], memo)
    for name, value in vars(trainer).items():
        if name not in ENGINE:
            vars(new)[name] = copy.deepcopy(value, memo)
    finish(new)
    return new


ENGINE = ("_engine",)


def copy_variable(variable: keras.Variable) -> keras.Variable:
    """Returns a new variable of the same value."""
    return keras.Variable(
        to_host(variable),
        dtype=variable.dtype,
        trainable=variable.trainable,
        name=variable.name,
    )


def _bare(trainer: T) -> T:
    return type(trainer).__new__(type(trainer))


def _copy_with_variables(part: Any, memo: dict[int, Any]) -> None:
    """Copies a layer, model or metric, and notes which part and variable of the copy is which."""
    if isinstance(part, KerasMetric):
        _copy_with_variables(part.metric, memo)
        new = KerasMetric(memo[id(part.metric)], part.reduce_f, part.name)
    elif isinstance(part, OutputMetric):
        _copy_with_variables(part.metric, memo)
        new = OutputMetric(memo[id(part.metric)], part.output, part.name)
    elif isinstance(part, keras.metrics.Metric):
        new = _copy_metric(part, memo)
    else:
        new = copy.deepcopy(part, memo)
    memo[id(part)] = new
    for old, own in zip(part.variables, new.variables, strict=True):
        memo.setdefault(id(old), own)
    if isinstance(part, keras.layers.Layer):
        for old, own in zip(layers_of(part), layers_of(new), strict=True):
            memo.setdefault(id(old), own)


def _copy_metric(metric: keras.metrics.Metric, memo: dict[int, Any]) -> keras.metrics.Metric:
    """Copies a metric by its attributes: Keras' own copy needs a configuration, which few have."""
    for variable in metric.variables:
        memo[id(variable)] = copy_variable(variable)
    new = object.__new__(type(metric))
    memo[id(metric)] = new
    for name, value in vars(metric).items():
        object.__setattr__(new, name, copy.deepcopy(value, memo))
    return new


def _copy_optimizer(optimizer: Any, candidates: Sequence[list[Any]], memo: dict[int, Any]) -> Any:
    """Returns an optimizer of the same configuration and state for the copied variables.

    Which variables it was built for, Keras doesn't tell: of the candidates the first that leads to
    slots of the same shapes.
    """
    shapes = [tuple(variable.shape) for variable in optimizer.variables]
    for variables in candidates if optimizer.built else ():
        copies = [memo.get(id(variable), variable) for variable in variables]
        new = of_same_config(optimizer, list(zip(variables, copies, strict=True)))
        new.build(copies)
        if [tuple(variable.shape) for variable in new.variables] == shapes:
            for old, own in zip(optimizer.variables, new.variables, strict=True):
                own.assign(to_host(old))  # on JAX two variables would share an array else
                memo.setdefault(id(old), own)
            return new
    every = [v for variables in candidates for v in variables if id(v) in memo]
    return of_same_config(optimizer, [(v, memo[id(v)]) for v in every])
