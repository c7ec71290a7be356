"""Training loops for Keras 3: one step, written once, on TensorFlow, JAX and PyTorch.

`import polus` is enough: public names such as `polus.BaseTrainer`, and modules such as
`polus.metrics`, are imported on first use. `import polus` itself loads neither Keras nor a backend.
"""

from importlib import import_module

TYPE_CHECKING = False  # as type checkers read it; importing `typing` would take 10 ms
if TYPE_CHECKING:
    from polus import average as average
    from polus import callbacks as callbacks
    from polus import checkpoint as checkpoint
    from polus import core as core
    from polus import data as data
    from polus import errors as errors
    from polus import history as history
    from polus import hpo as hpo
    from polus import ir as ir
    from polus import lr_finder as lr_finder
    from polus import metrics as metrics
    from polus import optimizers as optimizers
    from polus import report as report
    from polus import runs as runs
    from polus import schedules as schedules
    from polus import training as training
    from polus.average import Average as Average
    from polus.callbacks import Callback as Callback
    from polus.callbacks import CallbackCoordinator as CallbackCoordinator
    from polus.callbacks import ConsoleLogCallback as ConsoleLogCallback
    from polus.callbacks import EarlyStop as EarlyStop
    from polus.callbacks import ICallback as ICallback
    from polus.callbacks import KerasCallback as KerasCallback
    from polus.callbacks import LearningRateScheduler as LearningRateScheduler
    from polus.callbacks import LossSmoothCallback as LossSmoothCallback
    from polus.callbacks import Phase as Phase
    from polus.callbacks import SaveModelCallback as SaveModelCallback
    from polus.callbacks import TensorBoardLog as TensorBoardLog
    from polus.callbacks import TimeLimit as TimeLimit
    from polus.callbacks import TimerCallback as TimerCallback
    from polus.callbacks import Unfreeze as Unfreeze
    from polus.callbacks import ValidationDataCallback as ValidationDataCallback
    from polus.checkpoint import Checkpoint as Checkpoint
    from polus.checkpoint import CheckpointError as CheckpointError
    from polus.core import BaseLogger as BaseLogger
    from polus.core import batch_loss as batch_loss
    from polus.core import function as function
    from polus.core import gather as gather
    from polus.core import get_jit_compile as get_jit_compile
    from polus.core import profile as profile
    from polus.core import set_deterministic as set_deterministic
    from polus.core import set_jit_compile as set_jit_compile
    from polus.core import set_tuning_cache as set_tuning_cache
    from polus.core import value_and_grad as value_and_grad
    from polus.data import from_arrays as from_arrays
    from polus.data import with_iterator_state as with_iterator_state
    from polus.errors import NonFiniteError as NonFiniteError
    from polus.history import History as History
    from polus.metrics import Accuracy as Accuracy
    from polus.metrics import IConfusionMatrix as IConfusionMatrix
    from polus.metrics import IMetric as IMetric
    from polus.metrics import MacroF1Score as MacroF1Score
    from polus.report import write_report as write_report
    from polus.training import BaseTrainer as BaseTrainer
    from polus.training import ClassifierTrainer as ClassifierTrainer

__version__ = "0.2.0.dev0"

# Each module's public names, as the type checker sees them above.
_NAMES = {
    "average": ("Average",),
    "callbacks": (
        "Callback",
        "CallbackCoordinator",
        "ConsoleLogCallback",
        "EarlyStop",
        "ICallback",
        "KerasCallback",
        "LearningRateScheduler",
        "LossSmoothCallback",
        "Phase",
        "SaveModelCallback",
        "TensorBoardLog",
        "TimeLimit",
        "TimerCallback",
        "Unfreeze",
        "ValidationDataCallback",
    ),
    "checkpoint": ("Checkpoint", "CheckpointError"),
    "core": (
        "BaseLogger",
        "batch_loss",
        "function",
        "gather",
        "get_jit_compile",
        "profile",
        "set_deterministic",
        "set_jit_compile",
        "set_tuning_cache",
        "value_and_grad",
    ),
    "data": ("from_arrays", "with_iterator_state"),
    "errors": ("NonFiniteError",),
    "history": ("History",),
    "hpo": (),
    "ir": (),
    "lr_finder": (),
    "optimizers": (),
    "report": ("write_report",),
    "runs": (),
    "schedules": (),
    "metrics": ("Accuracy", "IConfusionMatrix", "IMetric", "MacroF1Score"),
    "training": ("BaseTrainer", "ClassifierTrainer"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:  # with a __getattr__ in sight, a type checker accepts any name
    # No modules: `from polus import *` must not replace a user's `data` or `metrics`.
    __all__ = sorted(_MODULE_OF)

    def __getattr__(name):
        """Imports a public name or module when it is first used."""
        if name in _NAMES:
            return import_module(f"polus.{name}")  # this binds the name as well
        if name in _MODULE_OF:
            value = getattr(import_module(f"polus.{_MODULE_OF[name]}"), name)
            globals()[name] = value  # found directly from now on
            return value
        message = f"module 'polus' has no attribute {name!r}."
        if not name.startswith("_"):  # tools probe for private names
            from polus.host import did_you_mean

            message = f"{message} {did_you_mean(name, __dir__())}".rstrip()
        raise AttributeError(message, name=name)  # with `obj` Python would add a second hint

    def __dir__():
        """Lists the public names, for completion; most of them are not imported yet."""
        return sorted([*__all__, *_NAMES, "__version__"])
