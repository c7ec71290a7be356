"""The trainers, and the loop that runs their steps."""

from polus.training.classifier import ClassifierTrainer
from polus.training.trainer import BaseTrainer

__all__ = ["BaseTrainer", "ClassifierTrainer"]
