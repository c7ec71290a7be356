"""What a model's class overrides for `fit`, which a trainer does not call."""

import keras

# What to write instead.
OF_FIT = {
    "train_step": (
        "Make it the step of a trainer: class Mine(polus.BaseTrainer) with "
        "def train_step(self, x, y), which calls self.minimize(...)."
    ),
    "compute_loss": (
        "Pass it as a function, ClassifierTrainer(model, optimizer, loss=...), which takes "
        "(y, prediction) and adds nothing of model.losses."
    ),
    "compute_metrics": "Pass ClassifierTrainer(..., metrics=[...]).",
    "test_step": (
        "Override evaluation_step and evaluation_loss in a subclass of ClassifierTrainer, which "
        "return what metrics take and the loss."
    ),
    "predict_step": (
        "Override prediction_step(self, x) in a subclass of the trainer, which returns what "
        "predict collects."
    ),
}


def check_not_overridden(model: keras.Model, *names: str) -> None:
    """Raises TypeError if a model's class overrides a method of `fit` that would be ignored.

    Args:
        model: The model.
        names: The names of methods that only `fit`, `evaluate` and `predict` of Keras call.
    """
    cls = type(model)
    hint = ""
    if getattr(model, "inputs", None):  # only a functional model has these before it is called
        hint = " The same layers without it are keras.Model(model.inputs, model.outputs)."
    for name in names:
        if getattr(cls, name) is not getattr(keras.Model, name):
            raise TypeError(
                f"{cls.__name__} overrides {name}, which Keras' fit calls and a trainer does not: "
                f"it would be ignored. {OF_FIT[name]}{hint}"
            )
