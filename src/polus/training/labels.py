"""Labels that are no class of the model: not every backend notices them."""

from typing import Any

import keras
import numpy as np

from polus.host import to_host


def num_classes(trainer: Any, traced: tuple[int | None, ...] | None, labels: object) -> int | None:
    """Returns the number of classes that integer labels count; None if it is not known.

    It is known where one output is trained by `SparseCategoricalCrossentropy` as it comes, over its
    last axis: of a built Functional or Sequential model, and of any other once a step was traced.

    Args:
        trainer: The trainer.
        traced: The shape of the output when a step was last traced, if one was.
        labels: The labels, of which there is one for each vector along the last axis.
    """
    if type(trainer.loss) is not keras.losses.SparseCategoricalCrossentropy:
        return None
    shape = getattr(trainer.model, "output_shape", None) if trainer.model.built else None
    shape = traced if shape is None else shape
    if trainer.post_process_logits is not None or not isinstance(shape, tuple):
        return None
    known = shape and isinstance(shape[-1], int) and _one_for_each(labels, shape[:-1])
    return shape[-1] if known else None


def _one_for_each(labels: Any, shape: tuple[Any, ...]) -> bool:
    """Returns whether the labels have this shape: those of a loss with another `axis` have not."""
    own = tuple(getattr(labels, "shape", shape))
    own = own[:-1] if len(own) == len(shape) + 1 and own[-1] == 1 else own
    return len(own) == len(shape) and all(
        None in pair or pair[0] == pair[1] for pair in zip(own[1:], shape[1:], strict=True)
    )


def check_labels(labels: object, classes: int, ignored: int | None, where: str) -> None:
    """Raises a ValueError if a label in host memory is not one of 0 to `classes - 1`.

    JAX computes a loss of zero for such a label, and TensorFlow with XLA computes NaN. Tensors on
    an accelerator are not read back.

    Args:
        labels: Integers of any shape.
        classes: The number of classes.
        ignored: A label that the loss leaves out, or None.
        where: The words for where the labels are, such as "Batch 3 of epoch 1".
    """
    if labels is None or not _on_host(labels):
        return
    labels = to_host(labels)
    if not labels.size or labels.dtype.kind not in "iuf" or _in_range(labels, classes):
        return
    wrong = labels[(labels < 0) | (labels >= classes)]
    wrong = wrong if ignored is None else wrong[wrong != ignored]
    if wrong.size:
        raise ValueError(
            f"{where} has the label {wrong[0]}, and the model has {classes} outputs: labels must "
            f"be 0 to {classes - 1}. Correct the labels, or give the model more outputs. To leave "
            "a label out of the loss, use keras.losses.SparseCategoricalCrossentropy("
            f"ignore_class={wrong[0]}, ...)."
        )


def _on_host(labels: Any) -> bool:
    if type(labels) is np.ndarray or not keras.ops.is_tensor(labels):
        return True
    # "cpu" in PyTorch, "/job:localhost/.../device:CPU:0" in TensorFlow, "TFRT_CPU_0" in JAX.
    return "cpu" in str(getattr(labels, "device", "")).lower()


def _in_range(labels: np.ndarray[Any, Any], classes: int) -> bool:
    if labels.dtype.kind == "i":  # a negative number is a large one without its sign: one pass
        return bool(labels.view(labels.dtype.str.replace("i", "u")).max() < classes)
    return bool(labels.min() >= 0 and labels.max() < classes)
