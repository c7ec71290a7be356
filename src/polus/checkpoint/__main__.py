"""Looks at a folder of checkpoints: `python -m polus.checkpoint ls|verify|show DIR`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polus.checkpoint.store import ARRAY, CheckpointError, DamagedError, Store, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit code: 1 if a checkpoint is damaged or there is none."""
    parser = argparse.ArgumentParser(prog="python -m polus.checkpoint")
    parser.add_argument(
        "command",
        choices=["ls", "verify", "show"],
        help="ls: what there is. verify: the same, and reads every byte. show: what the newest "
        "checkpoint holds, or the one whose folder is given.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    given = parser.parse_args(arguments)
    store = Store(given.directory)
    paths = store.paths() or [p for p in [given.directory] if (p / "manifest.json").exists()]
    if not paths and not store.damaged():
        print(f"There is no checkpoint in {given.directory}.", file=sys.stderr)
        return 1
    if given.command == "show":
        return _show(paths[-1:] or store.damaged()[-1:])
    return max([_line(path, given.command == "verify") for path in paths + store.damaged()])


def _line(path: Path, every_byte: bool) -> int:
    try:
        facts = (verify(path) if every_byte else _manifest(path))["facts"]
    except CheckpointError as error:
        print(f"{path.name}  DAMAGED: {error}")
        return 1
    size = sum(file.stat().st_size for file in path.iterdir())
    print(
        f"{path.name}  {facts.get('saved', '')}  epoch {facts.get('epoch')} of "
        f"{facts.get('epochs')}, step {facts.get('step')}  {facts.get('backend')}  {size:,} bytes"
        f"{'  verified' if every_byte else ''}"
    )
    return 0


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
        return manifest | {"facts": dict(manifest["facts"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path / 'manifest.json'} can't be read: {error!r}") from error


def _show(paths: Sequence[Path]) -> int:
    try:
        manifest = verify(paths[0])
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    print(paths[0])
    for name, value in manifest["facts"].items():
        if isinstance(value, dict):
            print(f"{name}:", *(f"  {key}: {item}" for key, item in value.items()), sep="\n")
        else:
            print(f"{name}: {value}")
    print("state:")
    _print_tree(manifest["tree"], "  ")
    return 0


def _print_tree(node: Any, indent: str) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        if isinstance(value, dict) and ARRAY in value:
            print(f"{indent}{name}: {value['dtype']} {value['shape']}")
        elif isinstance(value, dict) and value.keys() == {"path", "value"}:
            _print_tree({f"{name} {value['path']}": value["value"]}, indent)
        elif isinstance(value, dict) or (isinstance(value, list) and not _is_plain(value)):
            print(f"{indent}{name}:")
            _print_tree(value, indent + "  ")
        else:
            text = json.dumps(value)
            print(f"{indent}{name}: {text if len(text) < 80 else text[:76] + ' ...'}")


def _is_plain(values: list[Any]) -> bool:
    return not any(isinstance(value, dict | list) for value in values)


if __name__ == "__main__":
    sys.exit(main())
