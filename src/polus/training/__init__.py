"""The trainers: one step, described by its user, and the loop around it."""

from polus.training.trainer import BaseTrainer, ClassifierTrainer

__all__ = ["BaseTrainer", "ClassifierTrainer"]
