r"""Writes fastai_suggestions.json: curves recorded by fastai, with the rates that it suggests.

fastai is not a dependency. Made with fastai 2.8.12, PyTorch 2.13.0 and scikit-learn 1.9.1:

    pip install --target elsewhere --no-deps fastai fastcore fasttransform fastdownload \
        fastprogress==1.0.3 plum-dispatch pyyaml
    PYTHONPATH=elsewhere python tests/data/fastai_suggestions.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from fastai.basics import DataLoader, DataLoaders, Learner, tensor
from fastai.callback.schedule import LRFinder, minimum, slide, steep, valley
from fastai.optimizer import SGD, Adam
from sklearn.datasets import load_digits

NUM_STEPS = 100


def record(optimizer, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rates and the smoothed losses of fastai's range test on the digits."""
    x, y = load_digits(return_X_y=True)
    samples = list(zip(tensor(x).float() / 16, tensor(y), strict=True))
    model = torch.nn.Sequential(
        torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
    )
    loaders = DataLoaders(DataLoader(samples, bs=64, shuffle=True), DataLoader(samples, bs=64))
    learner = Learner(loaders, model, loss_func=torch.nn.CrossEntropyLoss(), opt_func=optimizer)
    with learner.no_logging(), learner.no_bar():
        learner.fit(NUM_STEPS // len(loaders.train) + 1, cbs=LRFinder(num_it=NUM_STEPS))
    return tensor(learner.recorder.lrs), tensor(learner.recorder.losses)


def suggest(rates: torch.Tensor, losses: torch.Tensor) -> dict:
    # Polus looks for the steepest descent before the minimum only, so fastai is shown no more.
    until = int(losses.argmin()) + 1
    suggestions = {f.__name__: f(rates, losses, NUM_STEPS)[0] for f in (valley, slide, minimum)}
    suggestions["steep"] = steep(rates[:until], losses[:until], NUM_STEPS)[0]
    return {"rates": rates.tolist(), "losses": losses.tolist(), "suggestions": suggestions}


def main() -> None:
    torch.manual_seed(0)
    curves = {
        f"digits MLP of width {width}, {optimizer.__name__}": suggest(*record(optimizer, width))
        for optimizer in (SGD, Adam)
        for width in (16, 256)
    }
    # Rough curves on a coarse grid of losses: many descents are equally long.
    generator = np.random.default_rng(0)
    for n in (20, 60, 100):
        rates = torch.logspace(-7, 1, n)
        walk = np.round(generator.normal(-0.05, 0.3, n).cumsum() * 4) / 4
        recorded = suggest(rates, tensor(walk).float())
        del recorded["suggestions"]["steep"]  # several equal slopes: rounding decides
        curves[f"random walk of {n} steps with ties"] = recorded
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    main()
