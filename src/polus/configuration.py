"""The settings of a run, and how they differ from those that a checkpoint was saved with.

Some differences make another run: the architecture, the loss, the class of an optimizer. A
checkpoint of another run is refused. Others may be meant: a learning rate, a weight decay, a rate
of dropout. They are refused as well, by name, until the user accepts them.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from polus.describe import Description, describe
from polus.errors import AnotherRunError
from polus.state_tree import printable

logger = logging.getLogger("polus.checkpoint")

# Settings of a layer that may change on the way. Any other makes another architecture.
ADJUSTABLE = re.compile(
    r"rate|.*dropout|stddev|momentum|epsilon|dtype|.*_regularizer|.*_constraint"
)
# Kinds of objects, another class of which makes another run.
ESSENTIAL = ("$trainer", "$layer", "$loss", "$optimizer", "$metric")
# How a difference counts: in a layer or a loss it makes another run, a mere setting does not.
Rule = Literal["layer", "loss", "setting"]
OWN_RULES: dict[str, Rule] = {"$layer": "layer", "$loss": "loss"}
PART_RULES: dict[str, Rule] = {"loss": "loss", "trainable_weights": "layer"}
SHOWN = 100  # characters of a value in a message


class ChangedError(ValueError):
    """Settings have changed that the user has not accepted."""


class Difference(NamedTuple):
    """A setting that is not what it was.

    Attributes:
        name: Its dotted path, such as `optimizer.learning_rate`.
        before: Its description in the checkpoint.
        after: Its description now.
        kind: "run" if that makes another run, "change" if a run may continue with it.
    """

    name: str
    before: Description
    after: Description
    kind: Literal["run", "change"]

    def __str__(self) -> str:
        if self.name.endswith(".code"):
            return f"the code of {self.name.removesuffix('.code')} has changed"
        return f"{self.name} was {_shown(self.before)} and is {_shown(self.after)}"


def describe_parts(parts: Mapping[str, Any]) -> dict[str, Description]:
    """Describes the parts of a run by their names, as `differences` compares them.

    A part named "loss" or "trainable_weights" is that; any other is what its type says.
    """
    return {"python": _python(), **{name: describe(part) for name, part in parts.items()}}


def differences(saved: object, now: Mapping[str, Description]) -> list[Difference]:
    """Returns the settings of `now` that are not those of `saved`.

    Parts that only one of the two has do not count. Code is compared only if the version of
    Python (x.y) is the same, whose bytecode it is.
    """
    saved = saved if isinstance(saved, dict) else {}
    with_code = saved.get("python") == now.get("python")
    found: list[Difference] = []
    for name in now.keys() & saved.keys() - {"python"}:
        found += _compare(name, saved[name], now[name], PART_RULES.get(name, "setting"))
    kept = [each for each in found if with_code or not each.name.endswith(".code")]
    return sorted(kept, key=lambda each: (each.kind != "run", each.name))


def changes_since(
    first: object, newest: object, now: Mapping[str, Description]
) -> list[Difference]:
    """Returns the settings that are neither as the run began with them nor as it was saved.

    A callback may have changed a setting while the run trained. A new process begins with the
    first value, a second `train` of the same process with the newest.
    """
    names = {each.name for each in differences(newest, now)}
    return [each for each in differences(first, now) if each.name in names]


def check_changes(found: Sequence[Difference], accept: bool) -> None:
    """Raises for settings that have changed, or warns of those that were accepted.

    Raises:
        AnotherRunError: If they make another run.
        ChangedError: If the run may continue with them, and `accept` is False.
    """
    if other := [str(each) for each in found if each.kind == "run"]:
        raise AnotherRunError(f"{'; '.join(other)}.")
    changed = "; ".join(map(str, found))
    if found and not accept:
        raise ChangedError(
            f"Settings have changed since it was saved: {changed}. To continue with the new ones, "
            'train(..., resume_changes="accept"); otherwise set the old ones.'
        )
    if found:
        logger.warning("The run continues with changed settings: %s.", changed)


def _compare(name: str, before: Any, after: Any, rule: Rule) -> Iterator[Difference]:
    if isinstance(before, dict) and isinstance(after, dict):
        yield from _compare_dicts(name, before, after, rule)
    elif _are_parallel(before, after):
        for i, (then, now) in enumerate(zip(before, after, strict=True)):
            yield from _compare(f"{name}[{i}]", then, now, rule)
    elif before != after and repr(before) != repr(after):  # not a number differs from itself
        essential = rule != "setting" or _are_essential(before) or _are_essential(after)
        yield Difference(name, before, after, "run" if essential else "change")


def _are_essential(description: Description) -> bool:
    """Returns whether this is a list of layers, losses, optimizers or metrics."""
    parts = description if isinstance(description, list) else []
    return any(isinstance(part, dict) and _marker_of(part) in ESSENTIAL for part in parts)


def _are_parallel(before: Any, after: Any) -> bool:
    """Returns whether both are lists of as many parts; of plain values there may be very many."""
    if not isinstance(before, list) or not isinstance(after, list):
        return False
    return len(before) == len(after) and any(isinstance(each, dict | list) for each in after)


def _compare_dicts(
    name: str, before: dict[str, Any], after: dict[str, Any], rule: Rule
) -> Iterator[Difference]:
    marker = _marker_of(after)
    other = marker != _marker_of(before) or before.get(marker) != after.get(marker)
    if other and not ("code" in before and "code" in after):  # a function may get another name
        essential = rule != "setting" or marker in ESSENTIAL
        yield Difference(name, before, after, "run" if essential else "change")
        return  # all else follows from that
    if rule != "loss":
        rule = OWN_RULES.get(marker, rule)
    # What only one of them has is new in a version of Keras; but a method is the user's.
    for key in before:
        if key in after and key != "methods" and not key.startswith("$"):
            adjustable = rule == "layer" and ADJUSTABLE.fullmatch(key)
            label = f"{name}.{printable(key, SHOWN)}"
            yield from _compare(label, before[key], after[key], "setting" if adjustable else rule)
    then, now = before.get("methods"), after.get("methods")
    then, now = (each if isinstance(each, dict) else {} for each in (then, now))
    for key in dict.fromkeys([*then, *now]):
        of_method: Rule = "loss" if rule == "loss" else "setting"
        yield from _compare(
            f"{name}.{printable(key, SHOWN)}", then.get(key), now.get(key), of_method
        )


def _marker_of(description: dict[str, Any]) -> str:
    return next((key for key in description if key.startswith("$")), "")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        marker = _marker_of(value)
        settings = [f"{key}={_shown(each)}" for key, each in value.items() if key != marker]
        text = str(value.get(marker, ""))
        text += f"({', '.join(settings)})" if settings else ""
    elif isinstance(value, list):
        text = f"[{', '.join(map(_shown, value))}]"
    else:
        text = repr(value)
    return printable(text, SHOWN)


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
