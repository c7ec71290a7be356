"""A search for hyperparameters with Optuna: trials that are pruned, resumed and reported.

```python
def make_trainer(trial):
    model = build(width=trial.suggest_int("width", 16, 128, log=True))
    adam = keras.optimizers.Adam(trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True))
    return polus.ClassifierTrainer(model, adam, loss, metrics=[polus.Accuracy(10)])


study = polus.hpo.search(
    make_trainer, n_trials=30, metric="val_accuracy", tf_dataset=data, epochs=10,
    callbacks=[polus.ValidationDataCallback(held_out)],
)
print(study.best_params)
```

It requires optuna. See docs/hyperparameters.md.
"""

try:
    import optuna  # noqa: F401
except ImportError as error:
    raise ImportError("polus.hpo requires optuna. Run `pip install optuna`.") from error

from polus.hpo.callback import ReportTrial
from polus.hpo.original import HPO_Objective, HPOPruneCallback, parameter
from polus.hpo.report import report
from polus.hpo.search import search

__all__ = [
    "HPOPruneCallback",
    "HPO_Objective",
    "ReportTrial",
    "parameter",
    "report",
    "search",
]
