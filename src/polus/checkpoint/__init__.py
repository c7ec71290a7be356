"""Checkpoints of a run: saved by a callback, continued by `train(..., resume=directory)`."""

from polus.checkpoint.callback import Checkpoint
from polus.checkpoint.resume import has_checkpoint, resume_run
from polus.checkpoint.store import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "has_checkpoint", "resume_run"]
