"""Files that are whole or absent, and files from strangers that are opened with care."""

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"

# O_NOFOLLOW: a link is an error. O_NONBLOCK: opening a FIFO does not wait for a writer.
CAREFUL = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[Path]:
    """Yields a path to write to, and renames it to `path` if the block raises no error.

    The block may write a file or a folder. A file replaces an existing one of that name; a folder
    needs a name that is free. After a crash or a power cut, `path` is either what it was before or
    complete: the data is flushed to the disk before the rename.

        with atomic_write("best.keras") as temporary:
            model.save(temporary)

    Args:
        path: The final name. Missing parent folders are created.
        temporary: A path in the same folder to write to, if it has to be known before. It may
            exist.

    Yields:
        A path in the same folder (a rename to another disk would be a copy) with the same suffix
        (Keras chooses the format by it). Nothing exists there yet,
        unless `temporary` was given.
    """
    path = Path(path)
    make_folder(path.parent)
    if temporary is None:
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    # The new name is an entry of the folder: a power cut can take it back until that is flushed.
    flush_entry(path.parent)


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, and flushes each new name to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        flush_entry(folder.parent)


def flush(path: Path) -> None:
    """Waits until a file, or a folder with everything in it, is on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            flush(child)
    flush_entry(path)


def flush_entry(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or folder if it exists; what cannot be removed is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a regular file for reading.

    A link, folder, device or FIFO raises at once: reading `/dev/zero` would never end, and opening
    a FIFO would wait for a writer.

    Raises:
        OSError: If the file cannot be opened; with `errno.EINVAL` if it is not a regular file.
    """
    _check_regular(os.lstat(path), path)  # before: to open some devices has an effect of its own
    descriptor = os.open(path, CAREFUL)
    try:
        _check_regular(os.fstat(descriptor), path)  # it may have been replaced since
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def check_directory(path: str | os.PathLike[str], name: str = "directory") -> Path:
    """Returns the absolute path of a folder that exists or can be created.

    Args:
        path: The folder, in which "~" stands for the user's. A relative path is resolved now: a
            later `os.chdir` does not move it.
        name: The argument's name, for the error message.

    Raises:
        TypeError: If `path` is not a path.
        ValueError: If it is empty or contains a NUL character, or if a file, a broken link or a
            folder that cannot be read is in the way.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{name} must be the path of a folder, got {path!r}.")
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"{name} must be the path of a folder, got {text!r}.")
    folder = Path(os.path.abspath(os.path.expanduser(text)))
    try:
        _check_folder(folder)
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{name} must be a folder, got {text!r}: {reason}.") from error
    return folder


def _check_folder(folder: Path) -> None:
    for path in (folder, *folder.parents):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # it would be created below the nearest parent that exists
        if not os.path.exists(path):
            raise ValueError(f"{path} is a link to {os.readlink(path)!r}, which does not exist")
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder")
        if path == folder:
            os.scandir(path).close()
        return
