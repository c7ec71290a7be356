"""Rules of the source that a reader would otherwise have to check, read off its syntax trees.

Each test lists its offenders. The rules are those of `CONTRIBUTING.md`; ruff checks complexity and
the number of statements, and these tests what ruff has no rule for.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

SOURCE = Path(__file__).parent.parent / "src"
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 40  # the docstring not counted
MAX_ANY_SHARE = 0.08

# Private names of other libraries that nothing public stands for. A test of each says what is
# relied on.
UNAVOIDABLE = {
    "layer._layers",  # the layers that a custom layer holds; only models have a public name for it
    "from torch import _dynamo",  # the switch that PyTorch's own message names
    "dataset._inputs",  # whether a tf.data pipeline repeats or shuffles: nothing public tells
    "loader._iterator",  # the workers of a DataLoader, which can't be copied
    "getattr(callback, '_should_trace', False)",  # whether Keras' TensorBoard profiles a batch
    "getattr(getattr(metric, 'metric', metric), '_direction', None)",  # which way is better
    "each._distribution_strategy",  # the strategy whose variables an optimizer updates
    "owner._learning_rate",  # the schedule itself; Keras' property returns its present value
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """A source file and its syntax tree.

    Attributes:
        path: The file.
        name: The name that imports it, `polus.data.reader`.
        lines: The number of its lines.
        tree: Its syntax tree.
    """

    def __init__(self, path: Path) -> None:
        parts = path.relative_to(SOURCE).with_suffix("").parts
        self.path = path
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        self.lines = text.count("\n")
        self.tree = ast.parse(text)

    def at(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(SOURCE.parent)}:{node.lineno}"


MODULES = {module.name: module for module in map(Module, sorted(SOURCE.rglob("*.py")))}


# The methods of a named tuple begin with an underscore so that fields can have any name.
NAMED_TUPLE = ("_asdict", "_replace", "_make", "_fields")


def is_private(name: str) -> bool:
    return (
        name not in NAMED_TUPLE
        and name.startswith("_")
        and not (name.startswith("__") and name.endswith("__"))
    )


def listed(offenders: list[str]) -> str:
    return f"{len(offenders)}:\n  " + "\n  ".join(offenders)


# ---------------------------------------------------------------------- private names


def assigned_targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.For | ast.NamedExpr):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        targets = [node.optional_vars]
    else:
        targets = []
    for target in targets:  # grows while it is read
        if isinstance(target, ast.Tuple | ast.List):
            targets += target.elts
    return targets


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_members(tree: ast.AST) -> set[str]:
    """The private attributes and methods that the classes in this tree define themselves."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, Function):
                    names.add(statement.name)
                names |= {t.id for t in assigned_targets(statement) if isinstance(t, ast.Name)}
        for target in assigned_targets(node):
            if isinstance(target, ast.Attribute) and is_self(target.value):
                names.add(target.attr)
    return set(filter(is_private, names))


def imported_names(tree: ast.AST) -> set[str]:
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def private_accesses(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.expr | None, str]]:
    """Each use of a private name of something: where, of what, and the name."""
    by_name = {"getattr", "setattr", "hasattr", "delattr"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node, node.value, node.attr
        elif isinstance(node, ast.ImportFrom):
            for name in [*(node.module or "").split("."), *(alias.name for alias in node.names)]:
                if is_private(name):
                    yield node, None, name
        elif isinstance(node, ast.Import):
            for name in ".".join(alias.name for alias in node.names).split("."):
                if is_private(name):
                    yield node, None, name
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in by_name
            and len(node.args) > 1
            and isinstance(name := node.args[1], ast.Constant)
            and isinstance(name.value, str)
            and is_private(name.value)
        ):
            yield node, node.args[0], name.value


def foreign_private_names(module: Module) -> Iterator[str]:
    own, imported = private_members(module.tree), imported_names(module.tree)
    for node, owner, name in private_accesses(module.tree):
        of_an_import = isinstance(owner, ast.Name) and owner.id in imported
        text = ast.unparse(node).splitlines()[0]
        if (owner is None or of_an_import or name not in own) and text not in UNAVOIDABLE:
            yield f"{module.at(node)}: {text}"


def test_no_module_uses_a_private_name_of_another():
    """Neither of our own modules nor of another library; by `getattr` with a name neither."""
    offenders = [line for module in MODULES.values() for line in foreign_private_names(module)]
    assert not offenders, listed(offenders)


def test_each_unavoidable_private_name_is_still_used():
    used = {
        ast.unparse(node)
        for module in MODULES.values()
        for node, _, _ in private_accesses(module.tree)
    }
    assert used >= UNAVOIDABLE


def private_names_of_class(name: str) -> set[str]:
    (found,) = [
        node
        for module in MODULES.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return private_members(found)


def test_the_trainers_have_one_private_name():
    """Users subclass them, so each further private name is one that they may hit by chance."""
    assert private_names_of_class("BaseLogger") == set()
    assert private_names_of_class("ClassifierTrainer") == set()
    assert private_names_of_class("BaseTrainer") == {"_engine"}


# ---------------------------------------------------------------------- import circles


def imports(module: Module) -> set[str]:
    """Our own modules that this one imports anywhere in its text.

    Imports inside functions and under TYPE_CHECKING count: who reads one module of a circle has to
    know all of it, whenever the import runs. That a package's `__init__` runs before its modules
    does not count.
    """
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.at(node)}: imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else str(node.module))
    return {name for name in found if name in MODULES}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The circles of a graph that a walk through it in depth meets, each from its first node."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_no_import_circles():
    found = circles({name: imports(module) for name, module in MODULES.items()})
    assert not found, listed([" -> ".join(circle) for circle in found])


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert circles({"a": {"a"}}) == [["a", "a"]]


# ---------------------------------------------------------------------- length


def code_lines(function: Function) -> int:
    """From `def` to the last line, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_files_are_short():
    offenders = [
        f"{module.path.relative_to(SOURCE.parent)}: {module.lines} lines"
        for module in MODULES.values()
        if module.lines > MAX_FILE_LINES
    ]
    assert not offenders, listed(offenders)


def test_functions_are_short():
    offenders = [
        f"{module.at(node)}: {node.name} has {code_lines(node)} lines"
        for module in MODULES.values()
        for node in ast.walk(module.tree)
        if isinstance(node, Function) and code_lines(node) > MAX_FUNCTION_LINES
    ]
    assert not offenders, listed(offenders)


# ---------------------------------------------------------------------- types


def public_functions(
    body: list[ast.stmt], in_class: bool = False
) -> Iterator[tuple[Function, int]]:
    """The public functions and methods, each with the number of its bound parameters."""
    for node in body:
        if isinstance(node, Function) and (
            not node.name.startswith("_") or node.name in ("__init__", "__call__")
        ):
            static = any(
                isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list
            )
            yield node, int(in_class and not static)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, in_class=True)
        elif isinstance(node, ast.If | ast.Try):
            yield from public_functions(node.body, in_class)


def signature_slots(module: Module) -> Iterator[tuple[str, ast.expr | None]]:
    """Each parameter and each return value of the public functions, with its annotation."""
    for node, bound in public_functions(module.tree.body):
        arguments = node.args
        parameters = [*arguments.posonlyargs, *arguments.args][bound:] + arguments.kwonlyargs
        parameters += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        for parameter in parameters:
            yield f"{module.at(node)}: {node.name}({parameter.arg})", parameter.annotation
        returns = ast.Constant(None) if node.name == "__init__" else node.returns
        yield f"{module.at(node)}: {node.name} -> Any", returns


def names_of_any(module: Module) -> set[str]:
    """`Any`, and what this module calls it: an alias of it tells a type checker no more."""
    names = {"Any"}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Name):
            targets = [t.id for t in assigned_targets(node) if isinstance(t, ast.Name)]
            if node.value.id in names:
                names.update(targets)
    return names


def test_few_signatures_say_any():
    """Of the parameters and return values of public functions few are annotated as bare `Any`."""
    aliases = set().union(*map(names_of_any, MODULES.values()))
    slots = [slot for module in MODULES.values() for slot in signature_slots(module)]
    offenders = [
        where
        for where, annotation in slots
        if isinstance(annotation, ast.Name) and annotation.id in aliases
    ]
    share = len(offenders) / len(slots)
    assert share <= MAX_ANY_SHARE, f"{share:.1%} of {len(slots)}: {listed(offenders)}"


def test_all_signatures_are_annotated():
    """`Any` is said where it is meant: the share above counts what is written."""
    offenders = [
        where
        for module in MODULES.values()
        for where, annotation in signature_slots(module)
        if annotation is None
    ]
    assert not offenders, listed(offenders)
