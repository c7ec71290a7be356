"""Deliberate faults, each of which a test has to find: `make mutants`.

A fault replaces one line in a copy of the source tree, and the tests beside it run on that copy. A
fault that no test finds lives: either a test is missing, or the line makes no difference. Those
that are known to live are listed with the reason.

    KERAS_BACKEND=torch python tests/mutants.py            all of them
    KERAS_BACKEND=torch python tests/mutants.py reader     those in files with this in their path
    python tests/mutants.py --check                        only that each line is there, once
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TIMEOUT_SECS = 300  # a fault may make the loop endless, and that is found as well
NO_TESTS = 5  # pytest's exit code where the selection is empty


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        path: The file, below src/polus.
        line: A part of it that occurs once.
        fault: What stands there instead.
        tests: A test file, and after it what `-k` selects.
        lives: Why no test finds it, if none does.
    """

    path: str
    line: str
    fault: str
    tests: str
    lives: str = ""


TRAINING, RUN, CALLBACKS = "test_training.py ", "test_run.py ", "test_callbacks.py "
TUNE, READER, RESUME = "test_autotune.py ", "test_reader.py ", "test_data_resume.py "
STORE, CHECKPOINT = "test_checkpoint_store.py ", "test_checkpoint.py "
PROGRAMS = "test_programs.py "
NONFINITE = "test_nonfinite.py "
FINDER, METRICS, HISTORY = "test_lr_finder.py ", "test_metrics.py ", "test_history.py "

MUTANTS = [
    # The loop and the run.
    Mutant("training/trainer.py", "if run.stopping:", "if False:", TRAINING + "early_stop"),
    Mutant("training/run.py", "if block.count == 1:", "if False:", CALLBACKS + "batch_events_come"),
    Mutant("training/trainer.py", "run.executor.finalize()", "pass", TRAINING + "ema_weights"),
    Mutant("training/run.py", "self.step = steps.stop", "self.step += 1", TUNE + "as_many_steps"),
    Mutant(
        "training/evaluation.py",
        "[block.batch_size] * block.count",
        "[1] * block.count",
        TRAINING + "weighted_by_examples",
    ),
    Mutant(
        "training/run.py",
        "self.epoch, self.step = self.epoch + 1, 0",
        "self.epoch += 1",
        TRAINING + "early_stop or pydataset_epoch",
    ),
    Mutant(
        "training/run.py", "return self.epoch >= self.epochs or", "return", TRAINING + "early_stop"
    ),
    Mutant(
        "training/run.py",
        "metric.reset()",
        "pass",
        TRAINING + "without_samples or undisturbed or does_not_disturb or same_weights_as_fit",
        "`evaluate` resets at an epoch's end, and "
        "dry runs and evaluations restore: it matters after an epoch that failed only.",
    ),
    Mutant("training/run.py", "self.trainer.early_stop = True", "pass", RUN + "stopping_ends"),
    Mutant(
        "training/run.py",
        "self.history.add_validation(self.epoch, self.step - 1, name",
        "self.history.add_validation(self.epoch, self.step, name",
        CALLBACKS + "validation_every_n_steps",
    ),
    Mutant(
        "training/run.py",
        "self._move(RunStatus.INTERRUPTED if interrupted else RunStatus.FAILED)",
        "self._move(RunStatus.FAILED)",
        RUN + "signal_interrupts",
    ),
    Mutant(
        "callbacks/coordinator.py",
        "left = n - step % n",
        "left = n",
        TUNE + "as_many_steps or at_their_own_steps",
    ),
    Mutant(
        "callbacks/coordinator.py",
        "limit = left if limit is None else min(limit, left)",
        "limit = left",
        TUNE + "at_their_own_steps",
    ),
    Mutant(
        "callbacks/coordinator.py",
        "key=lambda callback: callback.phase",
        "key=lambda callback: 0",
        CALLBACKS + "several_validation_sets or smooth_loss_is",
    ),
    Mutant(
        "callbacks/coordinator.py", "ended = ended or exit_", "raise", CHECKPOINT + "every_check"
    ),
    Mutant("training/config.py", "optimizer.learning_rate = before", "pass", TRAINING + "one_run"),
    # Steps that are not finite, the record and the folder of a run.
    Mutant("steps/guard.py", "backend.settle(finite, held)", "pass", NONFINITE + "skipped_steps"),
    Mutant(
        "steps/guard.py",
        "ops.where(finite, 0, bad + 1)",
        "ops.where(finite, 0, bad)",
        NONFINITE + "too_many or those_before",
    ),
    Mutant("steps/guard.py", "return [*weights, *(", "return [*(", NONFINITE + "by and hand"),
    Mutant(
        "steps/finite.py",
        "return all(read) and bool(to_host(seen))",
        "return all(read)",
        NONFINITE + "those_before and finite",
    ),
    Mutant(
        "steps/finite.py", "backend.assign(variable, value)", "pass", NONFINITE + "those_before"
    ),
    Mutant(
        "training/nonfinite.py",
        "block.batch_size * bool(good)",
        "block.batch_size",
        NONFINITE + "skipped_steps",
    ),
    Mutant("training/nonfinite.py", "return i + 1", "pass", NONFINITE + "stop_ends"),
    Mutant(
        "steps/norms.py",
        "of_taken = scale if scaled else 1.0",
        "of_taken = 1.0",
        "test_record.py under_loss_scaling",
    ),
    Mutant("steps/update.py", "if finite is None:", "if True:", NONFINITE + "raise"),
    Mutant(
        "runs/history_file.py",
        "        _remove_cut_line(path)\n",
        "\n",
        "test_runs.py crashed",
    ),
    Mutant("runs/history_file.py", "values[:count] for", "values for", "test_runs.py within"),
    # The step.
    Mutant(
        "steps/finish.py",
        "counter.assign_add(1)",
        "pass",
        PROGRAMS + "a_step_without_a_loss_trains_as_one_with_it",
    ),
    Mutant(
        "training/trainer.py",
        "checks.add_penalties(self.loss(*outputs), self.model.losses)",
        "self.loss(*outputs)",
        TRAINING + "same_weights_as_fit and regularised",
    ),
    Mutant(
        "steps/update.py",
        "gradients = _times(gradients, 1 / optimizer.scale_loss(ops.ones(())))",
        "pass",
        TRAINING + "loss_scaling",
    ),
    Mutant(
        "steps/update.py",
        "if post_process_grads is not None or not scaled:",
        "if False:",
        TRAINING + "loss_scaling",
    ),
    Mutant(
        "steps/update.py",
        "gradients = _post_processed(gradients, post_process_grads)",
        "_post_processed(gradients, post_process_grads)",
        TRAINING + "post_process_grads",
    ),
    Mutant(
        "steps/executor.py",
        "if same_parts and not changes:",
        "if True:",
        TRAINING + "parts_replaced",
        "An eager step of PyTorch reads the parts each time; the test finds it on JAX and "
        "TensorFlow.",
    ),
    Mutant("steps/executor.py", "snapshot.restore()", "pass", TUNE + "leaves_no_trace"),
    Mutant(
        "steps/compiled.py",
        "block.unpack, many, self.placement",
        "block.unpack, self.placement",
        TUNE + "programs_of_their_own",
    ),
    # Autotuning.
    Mutant(
        "steps/autotune.py",
        "(0.0 if tuning in self.compiled else compile_secs)",
        "0.0",
        "test_tuning_cache.py short_run",
    ),
    Mutant(
        "steps/tuning_cache.py",
        "signature_of(example),",
        "None,",
        "test_tuning_cache.py another_kind",
    ),
    Mutant(
        "steps/autotune.py",
        "min(known, key=lambda",
        "max(known, key=lambda",
        TUNE + "win_that_back",
    ),
    Mutant(
        "steps/autotune.py",
        "TIMED_STEPS <= limits.total_steps < math.inf",
        "True",
        TUNE + "win_that_back",
    ),
    Mutant(
        "steps/autotune.py",
        "MAX_STEPS) < 2 * self.max_steps",
        "MAX_STEPS) > 0",
        TUNE + "longer_calls",
    ),
    Mutant("steps/autotune.py", "least /= 10", "pass", TUNE + "slow_compiler"),
    Mutant(
        "steps/autotune.py",
        "worth = secs > LONG_STEP_SECS",
        "worth = True",
        TUNE + "without_a_loop",
    ),
    Mutant("steps/pace.py", "if self._calls == 1:", "if False:", TUNE + "some_milliseconds"),
    Mutant(
        "data/blocks.py",
        "max(pace.steps, 1 if is_rest else 2)",
        "pace.steps",
        TUNE + "changes_no_bit",
    ),
    # Data.
    Mutant(
        "data/arrays.py",
        'np.argsort(raw, kind="stable")',
        'np.argsort(raw[::-1], kind="stable")',
        READER + "a_seed_fixes",
    ),
    Mutant("data/arrays.py", "[self.seed, epoch]", "[self.seed, 0]", READER + "a_seed_fixes"),
    Mutant(
        "data/arrays.py",
        "range(skip, len(self))",
        "range(len(self))",
        READER + "opened_in_its_middle",
    ),
    Mutant(
        "data/blocks.py",
        "if signature_of(following[0]) != signature_of(first):",
        "if False:",
        READER + "blocks",
    ),
    Mutant("data/blocks.py", "self._pending = following", "pass", READER + "one_shape"),
    Mutant(
        "data/epoch.py",
        "left = capacity if steps is None else min(capacity, steps - step)",
        "left = capacity",
        READER + "steps_limits",
    ),
    Mutant(
        "data/epoch.py",
        "return left if allowed is None else min(left, allowed)",
        "return left",
        READER + "longer_than_callbacks",
    ),
    Mutant(
        "data/resume.py",
        "if 0 < snapshot.num_read <= step and",
        "if 0 < snapshot.num_read and",
        RESUME + "same_batches",
    ),
    Mutant("data/prefetch.py", "put(exception)", "put(None)", READER + "exception"),
    Mutant("data/prefetch.py", "maxsize=depth", "maxsize=0", READER + "bounded"),
    Mutant(
        "data/resume.py",
        "data.skip_to(step, handle_signals)\n    data.peek()",
        "data.peek()",
        RESUME + "same_batches",
    ),
    # Checkpoints.
    Mutant(
        "checkpoint/store.py",
        'raise ValueError("its checksum differs")',
        "pass",
        STORE + "flipped_bit or falls_back",
    ),
    Mutant("checkpoint/store.py", "[:-keep]", "[: 1 - keep]", STORE + "keep_removes"),
    Mutant(
        "checkpoint/store.py",
        "for path in reversed(self.paths()):",
        "for path in self.paths():",
        STORE + "falls_back or round_trips",
    ),
    Mutant(
        "checkpoint/store.py", "1 + max(map(number_of", "max(map(number_of", STORE + "keep_removes"
    ),
    Mutant(
        "checkpoint/callback.py",
        "run.step % self.every_steps == 0",
        "run.step % self.every_steps == 1",
        CHECKPOINT + "on_schedule",
    ),
    Mutant(
        "checkpoint/callback.py",
        "raise SystemExit(128 + number)",
        "raise SystemExit(number)",
        CHECKPOINT + "signal_saves",
    ),
    Mutant("training/run.py", "set_random_state(random)", "pass", CHECKPOINT + "repeatedly"),
    Mutant(
        "training/run.py",
        "restore_callbacks(self.callbacks.callbacks, state",
        "str(state",
        CHECKPOINT + "repeatedly",
    ),
    # Metrics and history.
    Mutant(
        "metrics/confusion.py", "self.num_invalid.assign_add(", "str(", METRICS + "out_of_range"
    ),
    Mutant(
        "metrics/confusion.py", "y_pred = y_pred > 0.5", "y_pred = y_pred > 0", METRICS + "one_half"
    ),
    Mutant(
        "metrics/confusion.py",
        "ops.stack([true, predicted]",
        "ops.stack([predicted, true]",
        METRICS + "scikit or shapes or own",
        "accuracy and macro-F1 are symmetric in the matrix; "
        "a metric that is not would be the first to notice.",
    ),
    Mutant(
        "metrics/base.py",
        "self.reset()",
        "pass",
        METRICS + "other_tuples_reach_all_metrics_as_they_are",
    ),
    # The learning-rate range test.
    Mutant(
        "lr_finder/curve.py",
        "rates[losses.argmin()]) / 10",
        "rates[losses.argmin()])",
        FINDER + "tenth or fastai",
    ),
    Mutant(
        "lr_finder/curve.py",
        "np.clip(share, 0, 1)",
        "share",
        FINDER + "do_not_follow or in_proportion",
    ),
    Mutant("lr_finder/curve.py", "> 5 * errors", "> 0 * errors", FINDER + "pure_noise"),
    Mutant("lr_finder/sweep.py", "set_rate(0.0)", "pass", FINDER + "rate_zero"),
    Mutant(
        "lr_finder/sweep.py",
        "if not math.isfinite(losses[-1]):",
        "if False:",
        FINDER + "non_finite",
    ),
    Mutant(
        "lr_finder/sweep.py",
        "        finally:\n            snapshot.restore()",
        "        finally:\n            pass",
        FINDER + "ended_by_an_error",
    ),
]


def check() -> list[str]:
    """Returns what is wrong with the list: each line has to occur once in its file."""
    problems = []
    for mutant in MUTANTS:
        text = (ROOT / "src" / "polus" / mutant.path).read_text()
        if (count := text.count(mutant.line)) != 1:
            problems.append(f"{mutant.path}: {mutant.line!r} occurs {count} times")
    return problems


def is_found(mutant: Mutant, tree: Path) -> tuple[bool, str]:
    """Puts the fault into the copy of the tree, runs its tests, and takes it out again."""
    path = tree / "src" / "polus" / mutant.path
    text = path.read_text()
    path.write_text(text.replace(mutant.line, mutant.fault))
    file, _, selection = mutant.tests.partition(" ")
    command = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"tests/{file}",
        "-k",
        selection,
    ]
    try:
        result = subprocess.run(
            [sys.executable, *command],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree / "src")},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECS,
        )
    except subprocess.TimeoutExpired:
        return True, "it ran for too long"
    finally:
        path.write_text(text)
    if result.returncode == NO_TESTS:
        raise ValueError(f"{mutant.tests!r} selects no test:\n{result.stdout}")
    lines = result.stdout.strip().splitlines()
    return result.returncode != 0, lines[-1] if lines else result.stderr


def main(arguments: list[str]) -> int:
    """Runs the faults whose file has one of the arguments in its path, and prints which live."""
    if problems := check():
        print("\n".join(problems))
        return 1
    if arguments == ["--check"]:
        return 0
    chosen = [m for m in MUTANTS if not arguments or any(a in m.path for a in arguments)]
    unexplained = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("src", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        for i, mutant in enumerate(chosen):
            found, said = is_found(mutant, tree)
            unexplained += not found and not mutant.lives
            state = "found" if found else f"LIVES ({mutant.lives or 'UNEXPLAINED'})"
            line = mutant.line.strip().splitlines()[0]
            print(f"{i + 1}/{len(chosen)} {mutant.path}: {line!r}: {state}: {said}", flush=True)
    print(f"{unexplained} of {len(chosen)} faults live without an explanation")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
