"""Training loops for Keras 3: one step, written once, on TensorFlow, JAX and PyTorch."""

__version__ = "0.1.0"
