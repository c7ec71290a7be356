"""The trials of a study as a table."""

import optuna

COLUMNS = ("trial", "state", "value", "epochs", "secs")
ORDER = ("COMPLETE", "PRUNED", "RUNNING", "WAITING", "FAIL")


def report(study: optuna.Study) -> str:
    """Returns the trials of a study as a Markdown table, the best one first.

    Args:
        study: The study, as `search` returns it.
    """
    trials = study.get_trials(deepcopy=False)
    names = sorted({name for trial in trials for name in trial.params})
    highest_first = study.direction == optuna.study.StudyDirection.MAXIMIZE

    def place(trial: optuna.trial.FrozenTrial) -> tuple[int, float, int]:
        value = trial.value or 0.0
        return ORDER.index(trial.state.name), -value if highest_first else value, trial.number

    rows = [[*COLUMNS, *names, "why"]]
    rows += [_row(trial, names) for trial in sorted(trials, key=place)]
    rows = [[_cell(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _row(trial: optuna.trial.FrozenTrial, names: list[str]) -> list[str]:
    secs = "" if trial.duration is None else f"{trial.duration.total_seconds():.1f}"
    value = "" if trial.value is None else f"{trial.value:.5g}"
    params = [_short(trial.params[name]) if name in trial.params else "" for name in names]
    why = trial.user_attrs.get("why", "")
    epochs = str(len(trial.intermediate_values))
    return [str(trial.number), trial.state.name.lower(), value, epochs, secs, *params, why]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    """Returns the first line of a text, without what ends a cell."""
    return text.partition("\n")[0].replace("|", "/")
