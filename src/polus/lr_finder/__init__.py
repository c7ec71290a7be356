"""The learning-rate range test, then short trials: finds a learning rate to train with.

```python
result = trainer.lr_finder(dataset)
print(result.suggestion, result.suggestions)
result.plot("lr_finder.png")
```

From the command line, for a function that returns a trainer with its training configuration:

    python -m polus.lr_finder package.module:init_trainer
"""

from polus.lr_finder.adapter import find
from polus.lr_finder.curve import (
    MIN_STEPS,
    SUGGESTIONS,
    SuggestionName,
    has_descent,
    highest_allowed,
    minimum,
    noise,
    remove_batch_noise,
    slide,
    smooth,
    steep,
    valley,
)
from polus.lr_finder.result import LRFinderResult
from polus.lr_finder.sweep import StepFunctions, SweepSettings, run_range_test
from polus.lr_finder.trials import SCHEDULES, Trial, best_rate

__all__ = [
    "MIN_STEPS",
    "SCHEDULES",
    "SUGGESTIONS",
    "LRFinderResult",
    "StepFunctions",
    "SuggestionName",
    "SweepSettings",
    "Trial",
    "best_rate",
    "find",
    "has_descent",
    "highest_allowed",
    "minimum",
    "noise",
    "remove_batch_noise",
    "run_range_test",
    "slide",
    "smooth",
    "steep",
    "valley",
]
