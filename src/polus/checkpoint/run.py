"""Continues a run from the newest valid checkpoint of a folder."""

import itertools
import logging
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from polus.checkpoint.environment import describe_environment, warn_of_changes
from polus.checkpoint.store import CheckpointError, Store
from polus.data import resume
from polus.history import History
from polus.state import layers_of, random_state, set_random_state
from polus.state_tree import check_layout, is_count
from polus.training_state import (
    CALLBACKS_LAYOUT,
    VARIABLES_LAYOUT,
    callbacks_state,
    check_random_state,
    check_variables,
    restore_callbacks,
    restore_variables,
    storable,
    variables_state,
)

if TYPE_CHECKING:
    from polus.callbacks.base import CallbackCoordinator

Tree = dict[str, Any]

logger = logging.getLogger("polus.checkpoint")


def resume_run(run: "CallbackCoordinator", directory: str | os.PathLike[str]) -> None:
    """Puts a run where the newest valid checkpoint of a folder has it, if there is one.

    Raises:
        CheckpointError: If the checkpoint is of another run, or all are damaged.
    """
    run.reader.tracked = True
    saved = Store(directory).read_newest(check_state)
    if saved is None:
        logger.info("There is no checkpoint in %s: training starts from the beginning.", directory)
        return
    environment = describe_environment(run.trainer.model, run.steps_per_execution)
    warn_of_changes(saved.path.name, saved.facts.get("environment"), environment)
    try:
        _restore(run, saved.tree, saved.facts.get("backend") == keras.config.backend())
    except ValueError as error:
        raise CheckpointError(
            f"{saved.path} is of another run, and nothing is trained: {error} Give the folder of "
            "this run's own checkpoints, or another one to start from the beginning."
        ) from error
    if isinstance(saved.facts.get("run"), str):
        run.id = saved.facts["run"]
    logger.info(
        "Continuing from %s: %d epochs and %d steps of %d epochs are done.",
        saved.path,
        run.epoch,
        run.step,
        run.epochs,
    )


# ------------------------------------------------------------------ a run's state

# See `polus.state_tree.check_layout`; the rest is for its owners to check.
STATE_LAYOUT = {
    "progress": {
        "epoch": is_count,
        "step": is_count,
        "steps": lambda steps: steps is None or is_count(steps),
        "early_stop": bool,
        "batch_sizes": lambda sizes: isinstance(sizes, np.ndarray) and sizes.dtype == np.int64,
    },
    "kinds": {...: str},
    "layers": [str],
    "variables": VARIABLES_LAYOUT,
    "random": dict,
    "data": dict,
    "history": dict,
    "shared": dict,
    "callbacks": CALLBACKS_LAYOUT,
    "choices": {...: (bool | None, is_count)},
}


def check_state(facts: Tree, tree: Any) -> None:
    """Checks a state from a file as far as that is possible without a run, and changes nothing.

    Raises:
        ValueError: If it is no state of a run.
    """
    check_layout(tree, STATE_LAYOUT)
    check_random_state(tree["random"], facts.get("backend") == keras.config.backend())
    try:
        history = History()
        history.set_state(tree["history"])
        repr(history)  # reads all of it
    except Exception as error:
        raise ValueError(f"its history cannot be read: {error!r}") from error


def run_state(run: "CallbackCoordinator", variables: Sequence[keras.Variable]) -> Tree:
    """Returns the run as it is between two steps: nested dicts and lists, JSON values, arrays."""
    trainer = run.trainer
    choices = {str(k): [d.jit_compile, d.capacity] for k, d in trainer._dispatches.items()}
    return {
        "progress": {
            "epoch": run.epoch,
            "step": run.step,
            "steps": run.steps,
            "early_stop": trainer.early_stop,
            "batch_sizes": np.array(run.batch_sizes, np.int64),
        },
        "kinds": _kinds(run),
        "layers": _layers(run),
        "variables": variables_state(variables),
        "random": random_state(),
        "data": resume.get_state(run.reader, run.epoch, run.step),
        "history": run.history.get_state(),
        "shared": storable(run.shared_dict),
        "callbacks": callbacks_state(run.callbacks),
        "choices": trainer._choices | choices,
    }


def _restore(run: "CallbackCoordinator", tree: Tree, same_backend: bool) -> None:
    trainer, progress = run.trainer, tree["progress"]
    _check_kinds(tree["kinds"], _kinds(run))
    run.epoch, run.step = progress["epoch"], progress["step"]
    run.steps = run.steps or progress["steps"]
    trainer._choices = tree["choices"] if same_backend else {}
    if not same_backend:  # its generators mean nothing here
        data = tree["data"]
        begun = [data["begun"]] + [data["before"]["begun"]] * ("before" in data)
        for state in (tree["random"], *(b["random"] for b in begun)):
            state["backend"] = random_state()["backend"]
    epoch, random = resume.resume(
        run.reader, run.epoch, run.step, tree["data"], tree["random"], lambda: _stop_if_asked(run)
    )
    trainer._example = epoch.example
    # From here on no data is read, and what building draws is put back.
    if run.step:
        # For callbacks that set themselves up there. What they change is overwritten below. As in
        # the first process, only the first epoch begins with a model that is not built yet.
        if run.epoch:
            trainer._build(trainer._example)
        run.on_epoch_begin()
        trainer._refresh()
    variables = trainer.state_variables()
    check_variables(tree["variables"], variables, same_backend)
    for i, (then, now) in enumerate(itertools.zip_longest(tree["layers"], _layers(run))):
        if then != now:  # layers without variables may differ too
            raise ValueError(f"layer {i} of the model was {then}, and is {now}.")
    restore_variables(tree["variables"], variables)
    run.batch_sizes = progress["batch_sizes"].tolist()
    run.history.set_state(tree["history"])
    run.shared_dict |= tree["shared"]
    restore_callbacks(run.callbacks, tree["callbacks"])
    trainer.early_stop = progress["early_stop"]
    set_random_state(random)


def _stop_if_asked(run: "CallbackCoordinator") -> None:
    """Lets a signal end the run before it continues: a save would be of half a run."""
    if run.signals.pending is not None:
        logger.warning(
            "%s: the run has not continued yet, and nothing is saved. The same program continues "
            "from the same checkpoint.",
            signal.Signals(run.signals.pending).name,
        )
        run.signals.check()


def _kinds(run: "CallbackCoordinator") -> dict[str, str]:
    trainer = run.trainer
    return {
        "trainer": type(trainer).__name__,
        "model": type(trainer.model).__name__,
        "optimizer": type(trainer.optimizer).__name__,
        "loss": getattr(trainer.loss, "__name__", type(trainer.loss).__name__),
        "metrics": ", ".join(metric.name for metric in trainer.metrics),
    }


def _check_kinds(saved: Tree, now: Tree) -> None:
    differing = [
        f"{k} was {saved.get(k)!r} and is {v!r}" for k, v in now.items() if saved.get(k) != v
    ]
    if differing:
        raise ValueError(f"{', '.join(differing)}.")


def _layers(run: "CallbackCoordinator") -> list[str]:
    return [type(layer).__name__ for layer in layers_of(run.trainer.model)]
