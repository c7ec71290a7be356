"""Checkpoints of a run: saved by a callback, continued by `train(..., resume=directory)`."""

from polus.checkpoint.callback import Checkpoint
from polus.checkpoint.resume import resume_run
from polus.checkpoint.store import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "resume_run"]
