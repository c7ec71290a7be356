"""Callbacks: what runs between the steps. Keras' own callbacks work as they are."""

from polus.callbacks.base import Callback, ICallback, Phase
from polus.callbacks.console import ConsoleLogCallback
from polus.callbacks.coordinator import CallbackCoordinator
from polus.callbacks.early_stop import EarlyStop
from polus.callbacks.keras_callback import KerasCallback
from polus.callbacks.rates import LearningRateScheduler
from polus.callbacks.save_model import SaveModelCallback
from polus.callbacks.smooth import LossSmoothCallback
from polus.callbacks.tensorboard import TensorBoardLog
from polus.callbacks.time_limit import TimeLimit
from polus.callbacks.timer import TimerCallback
from polus.callbacks.unfreeze import Unfreeze
from polus.callbacks.validation import ValidationDataCallback

__all__ = [
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
]
