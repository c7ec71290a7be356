"""Files that are whole or absent, whatever happens while they are written."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` once the block has ended without an error.

    What is written may be a file or a folder; a file replaces an older one of that name, a folder
    needs a name that is free. After a crash or a power cut `path` is what it was before, or the
    whole of what was written: it is flushed to the disk before it gets its name.

        with atomic_write("best.keras") as temporary:
            model.save(temporary)

    Args:
        path: Where the result shall stand. Its folder is made if there is none.

    Yields:
        A path in the same folder (renaming over to another disk would be a copy), with the same
        suffix (Keras chooses the format by it). Nothing stands there yet.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    # The new name is an entry of the folder: without this a power cut can still take it back.
    flush_entry(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            flush(child)
    flush_entry(path)


def flush_entry(path: Path) -> None:
    """Waits until this file's content, or this folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there; what can't be removed is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
