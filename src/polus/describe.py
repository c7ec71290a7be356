"""Keras objects, functions and plain values as JSON, to be compared with those of another process.

Two descriptions are equal if the objects compute the same, as far as that can be told from outside:
names that Keras counts, initial values and seeds are left out. Functions are described by their
bytecode and by the values that they take from elsewhere:

    {"$function": "loss", "code": "8c1f...", "globals": {"ALPHA": 0.3}}

A key with a dollar sign says what kind of object it is. Descriptions are made to be compared: see
`polus.configuration`.
"""

import dis
import functools
import glob
import hashlib
import inspect
import os
import re
import sys
import sysconfig
import types
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from polus.optimizers import Groups

Description = Any  # JSON

MAX_DEPTH = 12
MAX_ITEMS = 200  # of lists and characters; of longer ones the checksum
MAX_BYTES = 2**16  # of data: larger things are data, not settings

# Keys of configurations that have no effect on a run that continues: names, and what only the
# first values depend on. Seeds are variables, which a checkpoint restores.
WITHOUT_EFFECT = re.compile(
    "name|trainable|seed|.*_initializer|module|registered_name|build_config|build_input_shape"
    "|batch_shape|batch_input_shape|compile_config"
)
COUNTER = re.compile(r"_\d+(?=/|$)")  # by which Keras tells names of a process apart
# Methods of classes that compute nothing.
NOT_COMPUTED = {"get_config", "from_config", "__repr__", "__str__", "__doc__"}

KINDS: dict[str, Any] = {
    "layer": keras.layers.Layer,
    "optimizer": keras.optimizers.Optimizer,
    "loss": keras.losses.Loss,
    "metric": keras.metrics.Metric,
    "schedule": keras.optimizers.schedules.LearningRateSchedule,
    "regularizer": keras.regularizers.Regularizer,
    "constraint": keras.constraints.Constraint,
}


@functools.cache
def keras_names() -> frozenset[str]:
    """Returns the attributes that Keras gives each model and layer, and metrics' `has_samples`.

    Not made on import: a layer fixes Keras' dtype policy, and `set_floatx` would come too late.
    """
    loops = ("stop_training", "stop_evaluating", "stop_predicting", "optimizer", "history")
    of_keras = (*vars(keras.Model(name="any")), *vars(keras.layers.Layer(name="any")))
    return frozenset((*of_keras, *loops, "metrics", "has_samples"))


_folders = sysconfig.get_paths()
LIBRARIES = (
    *(_folders[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    os.path.dirname(__file__),
    os.path.dirname(keras.__file__),
    "<frozen",
)


def describe(value: object) -> Description:
    """Describes a Keras object, a function, a plain value, or lists and dicts of them."""
    return _Describer().value(value)


def describe_object(
    value: object, kind: str = "object", ignored: Collection[str] = ()
) -> dict[str, Description]:
    """Describes an object by its class, the code of its methods and its attributes.

    Args:
        value: The object.
        kind: The kind of object.
        ignored: The attributes to leave out.
    """
    return _Describer().object(value, kind, ignored)


class _Describer:
    """One description. Each layer or function is described where it is first met."""

    def __init__(self) -> None:
        self.met: set[int] = set()
        self.depth = 0

    def value(self, value: object) -> Description:
        if value is None or isinstance(value, bool | int | float | complex | str | np.generic):
            return _plain(value)
        if self.depth > MAX_DEPTH:
            return {"$object": type(value).__name__}
        self.depth += 1
        try:
            return self.composed(value)
        finally:
            self.depth -= 1

    def composed(self, value: object) -> Description:
        if isinstance(value, np.ndarray):
            text = f"array {value.dtype.name} {value.shape}"
            return _checksum(value.tobytes(), text) if value.nbytes <= MAX_BYTES else text
        if isinstance(value, list | tuple | set | Mapping) and len(value) > MAX_BYTES:
            return {"$object": f"{type(value).__name__} of {len(value)}"}
        if isinstance(value, list | tuple):
            return _shortened([self.value(each) for each in value])
        if isinstance(value, set | frozenset):
            return _shortened(sorted((self.value(each) for each in value), key=repr))
        if isinstance(value, Mapping):
            return {str(key): self.value(each) for key, each in value.items()}
        if isinstance(value, keras.DTypePolicy):
            return value.name
        if isinstance(value, keras.layers.Layer):
            return self.layer(value)
        for kind, of_kind in KINDS.items():
            if isinstance(value, of_kind):
                return self.configured(value, kind)
        return self.code_of(value)

    def code_of(self, value: object) -> Description:
        """Describes what is called, and any other object by its class alone."""
        if isinstance(value, functools.partial):
            called = {"args": self.value(value.args), "keywords": self.value(value.keywords)}
            return {"$object": "partial", "func": self.value(value.func), **called}
        if isinstance(value, types.MethodType):
            return self.value(value.__func__)
        wrapped = inspect.unwrap(value) if callable(value) else value
        if isinstance(wrapped, types.FunctionType):
            return self.function(wrapped)
        if isinstance(value, type):
            return {"$class": value.__qualname__, **self.methods(value)}
        if callable(value) and not hasattr(value, "__self__") and hasattr(value, "__dict__"):
            ignored = [name for name in vars(value) if name.startswith("_") or name == "training"]
            return self.object(value, "object", ignored)
        return {"$object": getattr(value, "__qualname__", type(value).__qualname__)}

    # ------------------------------------------------------------------ Keras objects

    def layer(self, layer: keras.layers.Layer) -> dict[str, Description]:
        kind = {"$layer": type(layer).__name__}
        if id(layer) in self.met:
            return {**kind, "described": "before"}
        self.met.add(id(layer))
        if isinstance(layer, keras.Sequential) or hasattr(layer, "operations"):
            parts = {"dtype": layer.dtype_policy.name, "layers": [*map(self.value, layer.layers)]}
            return {**kind, **parts, **_wiring(layer), **self.methods(type(layer))}
        if isinstance(layer, keras.layers.TorchModuleWrapper):
            return {**kind, "module": _plain(repr(layer.module))}
        return self.configured(layer, "layer")

    def configured(self, value: Any, kind: str) -> dict[str, Description]:
        """Describes what Keras describes by `get_config`, and adds what that does not tell."""
        described = {f"${kind}": type(value).__name__}
        if isinstance(value, keras.metrics.Metric):
            described["name"] = COUNTER.sub("", value.name)
        try:
            config = _uncounted(value, value.get_config())
        except Exception:  # whatever a class raises that cannot be described
            config = None
        for key, entry in (config or {}).items():
            if not WITHOUT_EFFECT.fullmatch(key):
                live = getattr(value, key, None)
                # Keras gives the name of a function, or a dump that changes with its line number.
                is_function = isinstance(live, types.FunctionType)
                described[key] = self.value(live) if is_function else self.config(entry)
        if config is None or not _is_keras(type(value)):
            ignored = {*(config or {}), *keras_names()}
            for name, each in self.attributes(value, ignored):
                if name not in described and not WITHOUT_EFFECT.fullmatch(name):
                    described[name] = each
        elif kind == "layer":  # a wrapper of Keras' around a layer of the user's
            for name, layer in _layers_in(value):
                if not _is_keras(type(layer)) and id(layer) not in self.met:
                    described[name] = self.value(layer)
        # Whose configuration fails with that of its schedule.
        schedule = vars(value).get("_learning_rate") if kind == "optimizer" else None
        if config is None and isinstance(schedule, KINDS["schedule"]):
            described["learning_rate"] = self.value(schedule)
        return described | self.methods(type(value))

    def config(self, entry: object) -> Description:
        """Describes a value out of `get_config`."""
        if isinstance(entry, list | tuple):
            return _shortened([self.config(each) for each in entry])
        if not isinstance(entry, Mapping):
            return self.value(entry)
        name, config = entry.get("class_name"), entry.get("config")
        if name == "DTypePolicy" and isinstance(config, Mapping):
            return config.get("name")
        if isinstance(name, str) and not isinstance(config, Mapping):
            return _plain(config)  # the name of a function
        if isinstance(name, str):
            return {"$object": name.strip("_"), **(self.config(config) if name[0] != "_" else {})}
        kept = {key: each for key, each in entry.items() if not WITHOUT_EFFECT.fullmatch(str(key))}
        return {str(key): self.config(each) for key, each in kept.items()}

    # ------------------------------------------------------------------ objects and their code

    def object(self, value: Any, kind: str, ignored: Collection[str]) -> dict[str, Description]:
        attributes = {name: each for name, each in self.attributes(value, ignored, private=True)}
        return {f"${kind}": type(value).__qualname__, **attributes, **self.methods(type(value))}

    def attributes(
        self, value: Any, ignored: Collection[str], private: bool = False
    ) -> Iterator[tuple[str, Description]]:
        # PyTorch keeps the layers of a layer where `vars` does not show them.
        for name, each in {**vars(value), **dict(_layers_in(value))}.items():
            hidden = name.startswith("_") and not (private or isinstance(each, keras.layers.Layer))
            if name not in ignored and not hidden:
                yield name, self.value(each)

    def methods(self, kind: type) -> dict[str, Description]:
        """Describes the methods of a user's class."""
        methods: dict[str, Description] = {}
        for base in reversed(kind.__mro__):
            if _is_library(_file_of(base)):
                continue
            for name, member in vars(base).items():
                function = getattr(member, "fget", getattr(member, "__func__", member))
                function = inspect.unwrap(function)
                if isinstance(function, types.FunctionType) and name not in NOT_COMPUTED:
                    methods[name] = self.function(function)
        return {"methods": methods} if methods else {}

    def function(self, function: types.FunctionType) -> dict[str, Description]:
        described: dict[str, Description] = {"$function": function.__name__}
        if id(function) in self.met:
            return described
        if not _is_library(function.__code__.co_filename):
            self.met.add(id(function))
            described["code"] = code_hash(function)
            described["globals"] = dict(self.globals(function))
        described["defaults"] = self.value(function.__defaults__ or ())
        described["keywords"] = self.value(function.__kwdefaults__ or {})
        described["closure"] = dict(self.closure(function))
        return {name: each for name, each in described.items() if each not in ([], {})}

    def globals(self, function: types.FunctionType) -> Iterator[tuple[str, Description]]:
        """Describes plain values, functions and classes of the user's that a function reads."""
        for name in sorted(_global_names(function.__code__)):
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType | type):
                if _is_library(_file_of(value)):
                    continue
            elif not isinstance(value, bool | int | float | str | tuple | functools.partial):
                continue
            yield name, self.value(value)

    def closure(self, function: types.FunctionType) -> Iterator[tuple[str, Description]]:
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            if name not in ("self", "__class__"):
                yield name, self.value(value)


def code_hash(function: Callable[..., Any]) -> str:
    """Returns a checksum of what a function does; comments, lines and its docstring don't count.

    It is the same in each process of one version of Python (x.y).
    """
    parts = _code_parts(inspect.unwrap(function).__code__, function.__doc__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _code_parts(code: types.CodeType, doc: str | None = None) -> list[Any]:
    constants = [
        _code_parts(each)
        if isinstance(each, types.CodeType)
        else sorted(map(repr, each))  # whose order is another one in each process
        if isinstance(each, frozenset)
        else repr(None if each == doc else each)
        for each in code.co_consts
    ]
    arguments = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    return [code.co_code, code.co_names, constants, *arguments]


def _uncounted(value: object, config: Any) -> Any:
    """Returns a configuration without Keras' counters in the paths of variables.

    `layerwise` has the paths of a model's weights; the patterns of `by_name` are the user's.
    """
    if not isinstance(value, Groups):
        return config
    patterns = [
        (path if glob.has_magic(path) else COUNTER.sub("", path), index)
        for path, index in value.patterns
    ]
    return config | {"patterns": patterns}


def _global_names(code: types.CodeType) -> set[str]:
    names, stored = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            stored.add(instruction.argval)  # a counter, not a setting
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            names |= _global_names(each)
    return {name for name in names - stored if not name.startswith("__")}


def _layers_in(value: Any) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yields the layers that are attributes of an object, which PyTorch keeps elsewhere."""
    if isinstance(value, keras.layers.Layer) and hasattr(value, "named_children"):
        yield from ((n, v) for n, v in value.named_children() if isinstance(v, keras.layers.Layer))
    yield from ((n, v) for n, v in vars(value).items() if isinstance(v, keras.layers.Layer))


def _wiring(model: keras.Model) -> dict[str, str]:
    """Describes which layers of a functional model are connected, by a checksum."""
    if isinstance(model, keras.Sequential):
        return {}
    try:
        config = model.get_config()
        layers = config["layers"]
        connected = [[each["class_name"], each.get("inbound_nodes")] for each in layers]
        ends = config.get("input_layers"), config.get("output_layers")
    except Exception:  # a layer of the user's that cannot be described
        return {}
    text = repr((connected, ends))
    for i, each in enumerate(layers):  # whose names count what was made before
        text = text.replace(repr(each["name"]), f"layer {i}")
    return {"connections": _checksum(text.encode(), "")}


def _is_keras(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "keras"


def _file_of(value: Any) -> str:
    """Returns the file of the module that a class or function is from."""
    return getattr(sys.modules.get(value.__module__), "__file__", None) or ""


def _is_library(file: str) -> bool:
    return file.startswith(LIBRARIES)


def _plain(value: Any) -> Description:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and len(value) > MAX_ITEMS:
        return _checksum(value.encode("utf-8", "replace"), f"text of {len(value)} characters")
    return value if isinstance(value, str | bool | int | float | None) else repr(value)


def _shortened(items: list[Description]) -> Description:
    if len(items) <= MAX_ITEMS:
        return items
    return _checksum(repr(items).encode(), f"list of {len(items)}")


def _checksum(content: bytes, what: str) -> str:
    return f"{what} {zlib.crc32(content):08x}".strip()
