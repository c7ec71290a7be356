"""Loss scaling, which training in float16 needs: small gradients would be zero."""

from typing import Any

import keras


def loss_scaled(
    optimizer: keras.optimizers.Optimizer, model: keras.Model, name: str = "optimizer"
) -> keras.optimizers.Optimizer:
    """Returns the optimizer, with loss scaling under mixed_float16, as `compile` adds it.

    Args:
        optimizer: The optimizer.
        model: The model, whose policy decides.
        name: Where the trainer has it, for the names of its variables.
    """
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scaled or not _in_float16(model):
        return optimizer
    name = "loss_scale_optimizer" if name == "optimizer" else f"loss_scale_{name}"
    return keras.optimizers.LossScaleOptimizer(optimizer, name=name)


def scale_losses(trainer: Any) -> None:
    """Gives all of a trainer's optimizers loss scaling, those in its lists and dicts too.

    An optimizer that is held twice, in a dict beside `trainer.optimizer` for example, stays one.
    """
    trainer.optimizer = loss_scaled(trainer.optimizer, trainer.model)
    if not _in_float16(trainer.model):
        return
    known = {id(getattr(trainer.optimizer, "inner_optimizer", None)): trainer.optimizer}

    def scaled(part: Any, name: str) -> Any:
        if isinstance(part, keras.optimizers.Optimizer):
            if id(part) not in known:
                known[id(part)] = loss_scaled(part, trainer.model, name)
            return known[id(part)]
        if type(part) is dict:
            new: Any = {key: scaled(each, f"{name}_{key}") for key, each in part.items()}
            return part if all(new[key] is each for key, each in part.items()) else new
        if type(part) in (list, tuple):
            new = type(part)(scaled(each, f"{name}_{i}") for i, each in enumerate(part))
            return part if all(a is b for a, b in zip(new, part, strict=True)) else new
        return part

    for name, value in list(vars(trainer).items()):
        if (new := scaled(value, name)) is not value:
            setattr(trainer, name, new)


def _in_float16(model: keras.Model) -> bool:
    return getattr(model.dtype_policy, "name", None) == "mixed_float16"
