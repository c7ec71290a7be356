"""Shows the checkpoints of a folder: `python -m polus.checkpoint ls|verify|show DIR`.

Everything printed may come from a stranger's file, so no control character of it reaches the
terminal.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polus.checkpoint.store import CheckpointError, DamagedError, Store, read, read_manifest
from polus.state_tree import ARRAY, SHARDED, printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 1 if there is no checkpoint or a damaged one."""
    parser = argparse.ArgumentParser(prog="python -m polus.checkpoint")
    parser.add_argument(
        "command",
        choices=["ls", "verify", "show"],
        help="ls: lists the checkpoints. verify: lists them and reads every byte. show: prints the "
        "newest checkpoint's content, or that of the checkpoint whose folder is given.",
    )
    parser.add_argument("directory", metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        return _run(options.command, options.directory)
    except (CheckpointError, OSError, ValueError) as error:
        print(printable(error), file=sys.stderr)
        return 1


def _run(command: str, directory: str) -> int:
    store = Store(directory)
    damaged = store.damaged()
    itself = [store.directory] if os.path.lexists(store.directory / "manifest.json") else []
    paths = store.paths() or itself
    if not paths and not damaged:
        print(f"There is no checkpoint in {printable(directory)}.", file=sys.stderr)
        return 1
    if command == "show":
        _show((paths or damaged)[-1])
        return 0
    return max([_line(path, command == "verify") for path in paths + damaged])


def _line(path: Path, every_byte: bool) -> int:
    try:
        facts = read(path).facts if every_byte else read_manifest(path).facts
        size = sum(os.lstat(file).st_size for file in path.iterdir())
    except (CheckpointError, OSError) as error:
        kind = "DAMAGED" if isinstance(error, DamagedError) else "NOT READ"
        print(f"{printable(path.name)}  {kind}: {printable(error)}")
        return 1
    progress = "{saved}  epoch {epoch} of {epochs}, step {step}  {backend}".format(
        **{
            name: printable(facts.get(name, ""))
            for name in ("saved", "epoch", "epochs", "step", "backend")
        }
    )
    verified = "  verified" if every_byte else ""
    print(f"{printable(path.name)}  {progress}  {size:,} bytes{verified}")
    return 0


def _show(path: Path) -> None:
    read(path)  # every byte
    manifest = read_manifest(path)
    print(printable(path))
    for name, value in manifest.facts.items():
        if isinstance(value, dict):
            print(f"{printable(name)}:")
            for key, item in value.items():
                print(f"  {printable(key)}: {printable(item)}")
        else:
            print(f"{printable(name)}: {printable(value)}")
    for line in _lines({"state": manifest.skeleton}, ""):
        print(line)


def _lines(node: Any, indent: str) -> Iterator[str]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        label = f"{indent}{printable(name)}"
        if isinstance(value, dict) and ARRAY in value:
            yield f"{label}: {printable(value['dtype'])} {printable(value['shape'])}"
        elif isinstance(value, dict) and SHARDED in value:
            parts = f"in {len(value['files'])} parts"
            yield f"{label}: {printable(value['dtype'])} {printable(value['shape'])} {parts}"
        elif isinstance(value, dict) and value.keys() == {"path", "value"}:
            yield from _lines({f"{name} {value['path']}": value["value"]}, indent)
        elif isinstance(value, dict) or (isinstance(value, list) and not _is_plain(value)):
            yield f"{label}:"
            yield from _lines(value, indent + "  ")
        else:
            text = json.dumps(value)
            yield f"{label}: {text if len(text) < 80 else text[:76] + ' ...'}"


def _is_plain(values: list[Any]) -> bool:
    return not any(isinstance(value, dict | list) for value in values)


if __name__ == "__main__":
    sys.exit(main())
