"""Searches for a better classifier of handwritten digits than that of the demo, in two minutes.

python examples/search.py

Trial 0 has the demo's settings. Trials are judged on images held out of the training set; the test
set is looked at once, at the end, with the models of trial 0 and of the best trial. Run it again
with more `--secs`, or in a second terminal at the same time: the trials are shared.
"""

import argparse
from pathlib import Path

import keras
import optuna
from keras import layers
from sklearn.model_selection import train_test_split

import polus
from polus import demo

DEMO = {"filters": 32, "blocks": 1, "units": 64, "dropout": 0.3, "rate": 2e-3}


def build(trial: optuna.Trial) -> keras.Model:
    """Returns a convolutional network: the demo's, and wider and deeper ones."""
    filters = trial.suggest_int("filters", 16, 64, step=16)
    parts = [keras.Input((8, 8, 1))]
    blocks = trial.suggest_int("blocks", 1, 2)
    padding = "same" if blocks > 1 else "valid"
    for block in range(blocks):
        parts.append(layers.Conv2D(filters * 2**block, 3, padding=padding, activation="relu"))
        parts.append(layers.MaxPooling2D())
    dropout = trial.suggest_float("dropout", 0.1, 0.6)
    units = trial.suggest_int("units", 64, 256, step=64)
    parts += [layers.Flatten(), layers.Dropout(dropout), layers.Dense(units, "relu")]
    return keras.Sequential([*parts, layers.Dense(10)])


def main(
    secs: float = 120, epochs: int = 15, trials: int = 200, runs: Path = Path("runs")
) -> dict[str, float]:
    """Returns the loss on the test set of the demo's settings and of the best trial."""
    (x, y), (x_test, y_test) = demo.load(None)
    x, x_val, y, y_val = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def make_trainer(trial: optuna.Trial) -> polus.ClassifierTrainer:
        rate = trial.suggest_float("rate", 5e-4, 1e-2, log=True)
        adam = keras.optimizers.Adam(rate)
        trainer = polus.ClassifierTrainer(build(trial), adam, loss, [polus.MacroF1Score(10)])
        trainer.changing_train_config(
            tf_dataset=polus.from_arrays((x, y), batch_size=32),
            callbacks=[polus.ValidationDataCallback(polus.from_arrays((x_val, y_val), 256))],
        )
        return trainer

    folder = runs / "search"
    folder.parent.mkdir(parents=True, exist_ok=True)
    where = {"study_name": "search", "storage": f"sqlite:///{folder}.db"}
    study = optuna.create_study(**where, load_if_exists=True)
    if not study.trials:
        study.enqueue_trial(DEMO)
    study = polus.hpo.search(
        make_trainer,
        n_trials=trials,
        metric="val_loss",
        directory=folder,
        seed=0,
        timeout_secs=secs,
        epochs=epochs,
        **where,
    )
    print(polus.hpo.report(study))

    test = polus.from_arrays((x_test, y_test), batch_size=256, shuffle=False)
    scores = {}
    for name, trial in {"demo": study.trials[0], "best": study.best_trial}.items():
        model = keras.saving.load_model(f"{trial.user_attrs['run_dir']}/best.keras")
        judge = polus.ClassifierTrainer(
            model, keras.optimizers.SGD(), loss, [polus.MacroF1Score(10)]
        )
        scores[name] = judge.evaluate(test)
        print(
            f"{name}: trial {trial.number}, validation loss {trial.value:.4f}; on "
            f"{len(x_test)} images of the test set loss {scores[name]['loss']:.4f}, macro-F1 "
            f"{scores[name]['macro_f1']:.4f}"
        )
    return {name: score["loss"] for name, score in scores.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--secs", type=float, default=120)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--trials", type=int, default=200)
    main(**vars(parser.parse_args()))
