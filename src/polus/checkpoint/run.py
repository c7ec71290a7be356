"""What a run is: everything that the next step depends on, taken out of a run and put back."""

import importlib.metadata
import itertools
import logging
import os
import platform
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import ml_dtypes
import numpy as np

from polus.backends import backend
from polus.checkpoint.store import CheckpointError, Store, flatten_state
from polus.core import get_jit_compile
from polus.data import resume
from polus.state import layers_of, random_state, set_random_state

if TYPE_CHECKING:
    from polus.callbacks.base import CallbackCoordinator

Variables = list[keras.Variable]
Tree = dict[str, Any]

PACKAGES = "polus keras numpy tensorflow tensorflow-cpu jax jaxlib torch".split()  # noqa: SIM905
# Environment variables by which libraries are told how to compute.
FLAGS = re.compile(
    "XLA_FLAGS|TF_(XLA_FLAGS|ENABLE_ONEDNN_OPTS|DETERMINISTIC_OPS|NUM_.*)|JAX_.*|PYTHONHASHSEED"
    "|(OMP|MKL|OPENBLAS)_.*|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32.*"
)

logger = logging.getLogger("polus.checkpoint")


def run_state(run: "CallbackCoordinator", variables: Variables) -> Tree:
    """The run as it stands between two steps: nested dicts and lists, JSON values, NumPy arrays.

    Args:
        run: the run.
        variables: its variables, as `state_variables` of its trainer gives them.
    """
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
        "variables": [_variable_state(variable) for variable in variables],
        "random": random_state(),
        "data": resume.get_state(run.reader, run.epoch, run.step),
        "history": run.history.get_state(),
        "shared": {k: v for k, v in run.shared_dict.items() if _can_be_stored(k, v)},
        "callbacks": [[type(c).__name__, c.get_state()] for c in run.callbacks],
        "choices": trainer._choices | choices,
    }


def allocate_buffers(variables: Variables) -> dict[str, np.ndarray]:
    """Memory for a copy of the variables, by the names that they are stored under."""
    zeros = [{"value": np.broadcast_to(np.zeros((), v.dtype), v.shape)} for v in variables]
    return flatten_state({"variables": zeros}).arrays


def resume_run(run: "CallbackCoordinator", directory: str | os.PathLike[str]) -> None:
    """Lets a run go on from the newest valid checkpoint of a folder, where there is one.

    Raises:
        CheckpointError: if the checkpoint is of another run, or all are damaged.
    """
    run.reader.tracked = True
    saved = Store(directory).read_newest()
    if saved is None:
        logger.info("There is no checkpoint in %s: training starts from the beginning.", directory)
        return
    _say_what_changed(saved.path, saved.facts.get("environment", {}), environment(run))
    same_backend = saved.facts.get("backend") == keras.config.backend()
    try:
        _restore(run, saved.tree, same_backend)
    except ValueError as error:
        raise CheckpointError(
            f"{saved.path} is of another run, and nothing is trained: {error} Give the folder of "
            "this run's own checkpoints, or another one to start from the beginning."
        ) from error
    logger.info(
        "Continuing from %s: %d epochs and %d steps of %d epochs are done.",
        saved.path,
        run.epoch,
        run.step,
        run.epochs,
    )


def _restore(run: "CallbackCoordinator", tree: Tree, same_backend: bool) -> None:
    trainer, progress = run.trainer, tree["progress"]
    if differing := _differences(tree["kinds"], _kinds(run)):
        raise ValueError(f"{differing}.")
    run.epoch, run.step = progress["epoch"], progress["step"]
    run.steps = run.steps or progress["steps"]
    trainer._choices = tree["choices"] if same_backend else {}
    if not same_backend:  # whose generators are none of this one's
        data = tree["data"]
        begun = [data["begun"]] + [data["before"]["begun"]] * ("before" in data)
        for state in (tree["random"], *(b["random"] for b in begun)):
            state["backend"] = random_state()["backend"]
    epoch, random = resume.resume(
        run.reader, run.epoch, run.step, tree["data"], tree["random"], lambda: _stop_if_asked(run)
    )
    trainer._example = epoch.example
    # From here on nothing of the data is read any more, and what building draws is put back.
    if run.step:
        # For the callbacks that set themselves up there. What they change is overwritten below. As
        # it was then, only the first epoch begins with what isn't built yet.
        if run.epoch:
            trainer._build(trainer._example)
        run.on_epoch_begin()
        trainer._refresh()
    variables = trainer.state_variables()
    _check_variables(tree["variables"], variables, same_backend)
    for i, (then, now) in enumerate(itertools.zip_longest(tree["layers"], _layers(run))):
        if then != now:  # what has no variables may differ too
            raise ValueError(f"layer {i} of the model was {then}, and is {now}.")
    for variable, saved in zip(variables, tree["variables"], strict=True):
        variable.assign(saved["value"])
    run.batch_sizes = progress["batch_sizes"].tolist()
    run.history.set_state(tree["history"])
    run.shared_dict |= tree["shared"]
    _restore_callbacks(run, tree["callbacks"])
    trainer.early_stop = progress["early_stop"]
    set_random_state(random)


def _stop_if_asked(run: "CallbackCoordinator") -> None:
    """Lets a signal end the run before it goes on: a save would be of half a run."""
    if run.signals.pending is not None:
        logger.warning(
            "%s: the run has not gone on yet, and nothing is saved. The same program continues "
            "from the same checkpoint.",
            signal.Signals(run.signals.pending).name,
        )
        run.signals.check()


def _kinds(run: "CallbackCoordinator") -> dict[str, str]:
    """Of what kind the parts of a run are: a checkpoint of others is none of this run."""
    trainer = run.trainer
    return {
        "trainer": type(trainer).__name__,
        "model": type(trainer.model).__name__,
        "optimizer": type(trainer.optimizer).__name__,
        "loss": getattr(trainer.loss, "__name__", type(trainer.loss).__name__),
        "metrics": ", ".join(metric.name for metric in trainer.metrics),
    }


def _layers(run: "CallbackCoordinator") -> list[str]:
    return [type(layer).__name__ for layer in layers_of(run.trainer.model)]


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys([*saved, *now])
        if saved.get(name) != now.get(name)
    )


def _variable_state(variable: keras.Variable) -> Tree:
    value = backend.view(variable)
    # PyTorch gives bfloat16 as float32: the same numbers, and not what the variable is.
    dtype = getattr(ml_dtypes, variable.dtype, value.dtype)
    return {"path": variable.path, "value": value.astype(dtype, copy=False)}


def _check_variables(saved: list[Tree], variables: Variables, same_backend: bool) -> None:
    """Raises ValueError where a variable has another path, shape or dtype, or there are others."""
    now = [(v.path, tuple(v.shape), v.dtype) for v in variables]
    then = [(s["path"], s["value"].shape, s["value"].dtype.name) for s in saved]
    paths = zip(_canonical([p for p, *_ in then]), _canonical([p for p, *_ in now]), strict=False)
    for i, (canonical_then, canonical_now) in enumerate(paths):
        # Seed generators are uint32 on one backend and int64 on another.
        kinds = slice(1, 3 if same_backend else 2)
        if canonical_then != canonical_now or then[i][kinds] != now[i][kinds]:
            raise ValueError(f"variable {i} was {_shown(then[i])}, and is {_shown(now[i])}.")
    if len(then) != len(now):
        longer, name = (then, "the saved") if len(then) > len(now) else (now, "the present")
        extra = ", ".join(map(_shown, longer[min(len(then), len(now)) :][:3]))
        raise ValueError(
            f"it has {len(then)} variables, and the present run has {len(now)}. "
            f"Among {name} ones are {extra}."
        )


def _shown(variable: tuple[str, tuple[int, ...], str]) -> str:
    path, shape, dtype = variable
    return f"{path} {shape} {dtype}"


def _canonical(paths: list[str]) -> list[str]:
    """Paths in which the numbers that Keras counts layers with are replaced by their rank.

    The same model is dense, dense_1 when it is made first in a process and dense_2, dense_3 when
    it is made again; two layers that were exchanged still differ.
    """
    split = [
        [re.fullmatch(r"(.*?)(?:_(\d+))?", re.sub(r"_\d+(?=_)", "", part)) for part in p.split("/")]
        for p in paths
    ]
    parts = [[(m[1], int(m[2] or 0)) for m in parts if m is not None] for parts in split]
    numbers: dict[str, set[int]] = {}
    for name, number in (part for path in parts for part in path):
        numbers.setdefault(name, set()).add(number)
    ranks = {name: sorted(found) for name, found in numbers.items()}
    return ["/".join(f"{name}#{ranks[name].index(n)}" for name, n in path) for path in parts]


def _restore_callbacks(run: "CallbackCoordinator", saved: list[tuple[str, Tree]]) -> None:
    """Gives each callback the state of that of its class, the n-th of a class that of the n-th."""
    states = {(name, n): state for (name, state), n in _counted(saved, lambda item: item[0])}
    for callback, n in _counted(run.callbacks, lambda callback: type(callback).__name__):
        state = states.pop((type(callback).__name__, n), None)
        if state is not None:
            callback.set_state(state)
    if lost := [name for (name, _), state in states.items() if state]:
        logger.warning("The checkpoint has the state of callbacks that are gone: %s.", lost)


def _counted(items: list[Any], name_of: Any) -> list[tuple[Any, int]]:
    seen: Counter[str] = Counter()
    numbered = []
    for item in items:
        numbered.append((item, seen[name_of(item)]))
        seen[name_of(item)] += 1
    return numbered


def _can_be_stored(name: str, value: Any) -> bool:
    try:
        flatten_state(value)
    except TypeError as error:
        logger.warning("shared_dict[%r] will not be there after a resume: %s", name, error)
        return False
    return True


def environment(run: "CallbackCoordinator") -> dict[str, Any]:
    """What the bits of a result depend on besides the steps: settings, versions, processor."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = getattr(sys.modules.get(name), "__version__", "")
    return {
        "backend": keras.config.backend(),
        "floatx": keras.config.floatx(),
        "dtype policies": sorted({x.dtype_policy.name for x in layers_of(run.trainer.model)}),
        "jit_compile": get_jit_compile(),
        "steps_per_execution": run.steps_per_execution,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "processor": _processor(),
        **backend.describe(),
        "system": platform.platform(),
        **{f"version of {name}": version for name, version in versions.items() if version},
        **{name: os.environ[name] for name in sorted(os.environ) if FLAGS.fullmatch(name)},
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _say_what_changed(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if differing := _differences(saved, now):
        logger.warning(
            "The run goes on in another environment than %s was saved in, so the results may not "
            "be bit by bit those of an uninterrupted run: %s.",
            path.name,
            differing,
        )
