"""Run directories: `train(..., run_dir="runs/a")`, and what can be read from one afterwards."""

from polus.runs.directory import RunDirectory
from polus.runs.history_file import read_history

__all__ = ["RunDirectory", "read_history"]
