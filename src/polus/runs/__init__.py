"""Run directories: `train(..., run_dir="runs/a")`, and what can be read from one afterwards."""

from typing import TYPE_CHECKING

from polus.runs.history_file import read_history

if TYPE_CHECKING:
    from polus.runs.directory import RunDirectory as RunDirectory

__all__ = ["RunDirectory", "read_history"]

if not TYPE_CHECKING:

    def __getattr__(name):
        """Imports `RunDirectory` on first use: whoever reads a record waits for no backend."""
        if name == "RunDirectory":
            from polus.runs.directory import RunDirectory

            return RunDirectory
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
