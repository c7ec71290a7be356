"""Several models as one: what a trainer's `model` is where a dict of models was given."""

import copy
from collections.abc import ItemsView, Iterator, Mapping
from typing import Any, Self

import keras


@keras.saving.register_keras_serializable(package="polus")
class Models(keras.Model):
    """A model that consists of named models, which are trained, saved and logged together.

    Each is an item and, unless `keras.Model` has something of that name, an attribute:
    `models["generator"]`, `models.generator`. Its weights are those of all of them in order. It is
    not called itself.

    Args:
        models: The models by name.
    """

    def __init__(self, models: Mapping[str, keras.Model]) -> None:
        policies = [model.dtype_policy for model in models.values()]
        scaled = [policy for policy in policies if policy.name == "mixed_float16"]
        super().__init__(name="models", dtype=scaled[0] if scaled else None)
        self._parts = dict(models)
        self.built = True  # there is nothing to build but the parts

    def __getitem__(self, name: str) -> keras.Model:
        if name not in self._parts:
            raise KeyError(f"There is no model named {name!r}, only {', '.join(self._parts)}.")
        return self._parts[name]

    def __getattr__(self, name: str) -> Any:
        parts = vars(self).get("_parts", {})
        if name in parts:
            return parts[name]
        inherited = getattr(super(), "__getattr__", None)  # PyTorch's modules have one
        if inherited is not None:
            return inherited(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def items(self) -> ItemsView[str, keras.Model]:
        """Returns the names and the models."""
        return self._parts.items()

    def call(self, *inputs: object, **named: object) -> None:
        names = ", ".join(self._parts)
        raise TypeError(
            f"The trainer's model is a dict of models ({names}), which is not called itself. Call "
            f"one of them: self.model[{next(iter(self._parts))!r}](x)."
        )

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {"models": {name: serialize(model) for name, model in self._parts.items()}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        deserialize = keras.saving.deserialize_keras_object
        return cls({name: deserialize(model) for name, model in config["models"].items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)({n: copy.deepcopy(model, memo) for n, model in self._parts.items()})


def models_of(model: keras.Model) -> dict[str, keras.Model]:
    """Returns the models that a trainer's `model` consists of by name; of one, by its own name."""
    return dict(model.items()) if isinstance(model, Models) else {model.name: model}


def named_parts(owner: object) -> Iterator[tuple[str, Any]]:
    """Yields what an object's attributes hold by name: "d_optimizer", "targets.actor", "heads.0".

    The key or index of what a dict or list holds stands behind a dot.
    """
    for name, value in vars(owner).items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", part) for key, part in value.items())
        elif isinstance(value, list | tuple):
            yield from ((f"{name}.{i}", part) for i, part in enumerate(value))
        else:
            yield name, value


def describe_model(model: keras.Model) -> str:
    """Returns class and name of a model, or of each model of several."""
    if not isinstance(model, Models):
        return f"{type(model).__name__} {model.name!r}"
    parts = (f"{name}: {describe_model(part)}" for name, part in model.items())
    return f"{{{', '.join(parts)}}}"
