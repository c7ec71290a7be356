"""Continues a run from the newest valid checkpoint of a folder."""

import logging
import os
import zlib
from typing import Any, Protocol

import keras

from polus.backends.placement import check_same
from polus.callbacks.base import RunView
from polus.checkpoint.store import CheckpointError, Store
from polus.configuration import ChangedError
from polus.environment import describe_environment, warn_of_changes
from polus.errors import AnotherRunError, RefusedStateError
from polus.host import counted

logger = logging.getLogger("polus.checkpoint")


class ResumableRun(RunView, Protocol):
    """A run that can continue from a saved state."""

    id: str

    def check_state(self, facts: dict[str, Any], state: object) -> None: ...
    def set_state(self, state: dict[str, Any], same_backend: bool) -> None: ...


def resume_run(run: ResumableRun, directory: str | os.PathLike[str]) -> None:
    """Puts a run where the newest valid checkpoint of a folder has it, if there is one.

    Raises:
        CheckpointError: If the checkpoint is of another run, a part of the run refuses its state,
            or all checkpoints are damaged.
    """
    run.reader.tracked = True
    message = (
        f"The processes of this run don't see the same checkpoints in {directory}. It has to be a "
        "folder on a file system that all of them share."
    )
    store = Store(directory)
    names = [path.name for path in store.paths()]
    check_same(run.placement, zlib.crc32(f"{run.resuming} {names}".encode()), message)
    saved = store.read_newest(run.check_state, run.placement)
    if saved is None:
        logger.info("There is no checkpoint in %s: training starts from the beginning.", directory)
        return
    environment = describe_environment(run.trainer.model, run.steps_per_execution)
    warn_of_changes(saved.path.name, saved.facts.get("environment"), environment)
    try:
        run.set_state(saved.tree, saved.facts.get("backend") == keras.config.backend())
    except (ChangedError, RefusedStateError) as error:
        raise CheckpointError(f"{saved.path}: nothing is trained. {error}") from error
    except AnotherRunError as error:
        raise CheckpointError(
            f"{saved.path} is of another run, and nothing is trained: {error} Give the folder of "
            "this run's own checkpoints, or another one to start from the beginning."
        ) from error
    if isinstance(saved.facts.get("run"), str):
        run.id = saved.facts["run"]
    check_same(run.placement, zlib.crc32(f"{run.id} {saved.path.name}".encode()), message)
    logger.info(
        "Continuing from %s after %s and %s.",
        saved.path,
        counted(run.epoch, "epoch"),
        counted(run.step, "step"),
    )


def has_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Returns whether a folder has checkpoints to continue from."""
    return bool(Store(directory).paths())
