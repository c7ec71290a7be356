"""Callbacks: what runs between the steps. Keras' own callbacks work as they are."""

from polus.callbacks.base import Callback, CallbackCoordinator, ICallback

__all__ = ["Callback", "CallbackCoordinator", "ICallback"]
