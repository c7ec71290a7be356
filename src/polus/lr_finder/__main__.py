"""Runs the range test from the command line."""

import argparse
import importlib
import sys
from typing import Any, get_args

from polus.lr_finder import SCHEDULES, SuggestionName
from polus.training import BaseTrainer


def main(arguments: list[str] | None = None) -> int:
    """Runs the range test of a trainer, prints the suggestions and saves the plot.

    Returns:
        The exit code: 0, or 1 if the curve suggests no learning rate.
    """
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    path = options.pop("plot")
    trainer = _load_trainer(parser, options.pop("function"))
    result = trainer.lr_finder(**options)
    for method, rate in result.suggestions.items():
        print(f"{method:8} {rate:.2e}{'  (suggested)' if method == result.method else ''}")
    for trial in result.trials:
        print(trial)
    if result.failure_reason:
        print(f"No learning rate suggested. {result.failure_reason}", file=sys.stderr)
    if result.caution:
        print(result.caution, file=sys.stderr)
    result.plot(path)
    print(f"Plot saved to {path}")
    return int(bool(result.failure_reason))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m polus.lr_finder",
        description="Runs the learning-rate range test of a trainer.",
        argument_default=argparse.SUPPRESS,  # leaves defaults to lr_finder
    )
    parser.add_argument(
        "function",
        help="package.module:init_trainer, a function without arguments that returns a trainer "
        "whose dataset is set: trainer.changing_train_config(tf_dataset=...)",
    )
    parser.add_argument("--plot", default="lr_finder.png", help="the file to save the plot to")
    parser.add_argument("--start-lr", type=float)
    parser.add_argument("--end-lr", type=float)
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--stop-factor", type=float)
    parser.add_argument("--suggestion", choices=get_args(SuggestionName))
    parser.add_argument("--max-steps", type=int, help="of all trials together")
    parser.add_argument("--for-schedule", choices=SCHEDULES)
    parser.add_argument("--optimizer", help="the name of the one to sweep, such as d_optimizer")
    parser.add_argument("--monitor", help="the term of the step's result to read, such as d_loss")
    return parser


def _load_trainer(parser: argparse.ArgumentParser, path: str) -> BaseTrainer:
    """Imports `package.module:function` and returns the trainer that the function makes."""
    module, _, name = path.partition(":")
    if not name:
        parser.error(f"function must have the form package.module:function, got {path!r}")
    try:
        function: Any = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not module.startswith(str(error.name)):  # raised by an import of the user's module
            raise
        parser.error(f"there is no module named {error.name!r} here or installed")
    if not callable(function):
        parser.error(f"the module {module!r} has no function {name!r}")
    trainer = function()
    if not isinstance(trainer, BaseTrainer):
        parser.error(f"{path} must return a trainer, got {trainer!r}")
    return trainer


if __name__ == "__main__":
    sys.exit(main())
