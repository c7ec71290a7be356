"""TensorFlow on several devices: not served yet."""

import tensorflow as tf

from polus.backends.placement import Placement


def active() -> Placement:
    """Returns where steps run now.

    Raises:
        NotImplementedError: Under a strategy of `tf.distribute`.
    """
    if tf.distribute.has_strategy():
        name = type(tf.distribute.get_strategy()).__name__
        raise NotImplementedError(
            f"tf.distribute.{name} is active, and on TensorFlow Polus trains on one device only: "
            "losses and gradients would not be those of the global batch. Leave out the strategy "
            "and choose the device with CUDA_VISIBLE_DEVICES, or train on JAX or PyTorch "
            "(KERAS_BACKEND), where the same step runs on several devices."
        )
    return Placement()
