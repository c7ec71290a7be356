"""Short trainings from one snapshot at several learning rates, successively halved.

The curve of a sweep cannot tell which of the rates around its minimum trains best. So they are
tried: all for a few steps, then half of them for more, until three are left (Jamieson and Talwalkar
2016, arXiv:1502.07943, figure 1). The paper keeps those with the lowest losses. Here the best rate
and its neighbours are kept: a high rate may lose more in its first steps than it gains, and the
loss has one minimum over the rate. Nothing here knows a trainer or an optimizer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np

from polus.data import StepBlock
from polus.host import counted, to_host
from polus.lr_finder.curve import Array
from polus.schedules import Constant, Cosine, Schedule
from polus.state import Snapshot, random_state_kept

PER_DECADE = 3  # rates per power of ten
MIN_RATES = 3  # fewer would not tell more than the curve
MIN_STEPS_OF_TRIAL = 8  # of the first round
MAX_STATE_BYTES = 2**31  # of the states of all trials, which are kept between rounds
WARMUP = 0.06  # of the run, for schedules that begin with a warm-up
WIDEST_TIE = 10.0  # between rates that trials leave open; beyond it they have decided nothing

Paused = Callable[[], AbstractContextManager[None]]

SCHEDULES: dict[str, type[Schedule]] = {"warmup_cosine": Cosine}


@dataclass(frozen=True, eq=False)
class Trial:
    """A short training at one learning rate.

    Attributes:
        rate: The learning rate; of a schedule, its peak.
        losses: The loss of each step, shape `(n,)`. It ends at the first one that is not finite.
        scores: The loss that each round was judged by, shape `(rounds,)`: the mean over the second
            half of the round's batches or over the validation batches. Infinite if it diverged.
        errors: The standard errors of `scores`, from the spread over batches, shape `(rounds,)`.
        judged: The losses that the last score is the mean of, by batch, the same for all trials of
            a round.
        dropped_after: The number of steps after which it was dropped. None if it lasted to the end.
    """

    rate: float
    losses: Array
    scores: Array
    errors: Array
    judged: Array
    dropped_after: int | None = None

    def __str__(self) -> str:
        score = "not judged"
        if len(self.scores):
            score = f"loss {self.scores[-1]:.4g} ± {self.errors[-1]:.2g}"
        dropped = "" if self.dropped_after is None else ", dropped"
        steps = counted(len(self.losses), "step")
        return f"trial at {self.rate:.1e}: {score} after {steps}{dropped}"


@dataclass(frozen=True)
class Plan:
    """The rates to try and the lengths of the rounds.

    Attributes:
        rates: The learning rates, increasing.
        rounds: For each round the number of trials and of steps that each of them runs.
    """

    rates: tuple[float, ...]
    rounds: tuple[tuple[int, int], ...]

    @property
    def num_steps(self) -> int:
        """The training steps of all trials together."""
        return sum(trials * steps for trials, steps in self.rounds)


def plan(lowest: float, highest: float, max_steps: int, max_trials: int) -> Plan:
    """Returns the trials of the rates between two, thirds of a power of ten apart.

    Each round has the same share of the steps. If the steps or the memory don't suffice for all
    rates, fewer are tried, further apart: on a large model few long trials tell more than many
    short ones.

    Args:
        lowest: The lowest rate.
        highest: The highest rate.
        max_steps: The number of training steps of all trials together at most.
        max_trials: The number of rates at most.

    Returns:
        The plan, empty if the steps don't suffice for three rates.
    """
    first = math.ceil(PER_DECADE * math.log10(lowest) - 1e-9)
    last = math.floor(PER_DECADE * math.log10(highest) + 1e-9)
    every = [10 ** (k / PER_DECADE) for k in range(first, last + 1)]
    for count in range(min(len(every), max_trials), MIN_RATES - 1, -1):
        chosen = np.unique(np.linspace(0, len(every) - 1, count).round().astype(int))
        sizes = [count]
        while sizes[-1] > MIN_RATES:
            sizes.append(-(-sizes[-1] // 2))
        rounds = tuple((size, max_steps // (len(sizes) * size)) for size in sizes)
        if rounds[0][1] >= MIN_STEPS_OF_TRIAL:
            return Plan(tuple(every[i] for i in chosen), rounds)
    return Plan((), ())


class Contest:
    """Trials in progress, each with the state that it has reached.

    Args:
        plan: The rates and the rounds.
        start: The state that each trial starts from.
        run_step: Runs a training step on a block at a rate and returns its loss.
        validate: Returns the losses of the validation batches, and leaves no trace. None without
            validation data.
        factor: The share of its rate that a trial has at a step, counted from 0.

    Attributes:
        trials: The trials so far.
    """

    def __init__(
        self,
        plan: Plan,
        start: Snapshot,
        run_step: Callable[[StepBlock, float], float],
        validate: Callable[[], list[float]] | None = None,
        factor: Callable[[int], float] = lambda step: 1.0,
    ) -> None:
        self.plan = plan
        self.run_step = run_step
        self.validate = validate
        self.factor = factor
        self.trials = [Trial(rate, *(np.zeros(0),) * 4) for rate in plan.rates]
        self._start = start
        self._states: dict[int, Snapshot] = {}

    @property
    def decided(self) -> bool:
        """Whether enough rounds were judged: all, or two. The first one's losses are few."""
        judged = max(len(trial.scores) for trial in self.trials)
        return judged >= min(2, len(self.plan.rounds))

    def run(
        self,
        blocks: Iterator[StepBlock],
        chunk: int,
        paused: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Runs all rounds. All trials of a round read the same batches.

        Args:
            blocks: The batches, without end.
            chunk: How many of them are held in memory at a time.
            paused: Returns a context in which no other thread makes batches: each trial restores
                the random state that it had.
        """
        alive = list(range(len(self.trials)))
        done = 0
        for number, (size, steps) in enumerate(self.plan.rounds):
            if number:
                alive = self._keep(alive, size, done)
            for begin in range(0, steps, chunk):
                held = [next(blocks) for _ in range(min(chunk, steps - begin))]
                with paused(), random_state_kept():
                    for index in alive:
                        self._advance(index, held, done + begin)
            done += steps
            with paused(), random_state_kept():
                self._judge(alive, steps)

    def _advance(self, index: int, blocks: Sequence[StepBlock], done: int) -> None:
        trial = self.trials[index]
        if len(trial.losses) < done or (done and not math.isfinite(trial.losses[-1])):
            return  # it has diverged
        state = self._states.get(index, self._start)
        state.restore()
        losses = trial.losses.tolist()
        try:
            for step, block in enumerate(blocks, done):
                losses.append(self.run_step(block, trial.rate * self.factor(step)))
                if not math.isfinite(losses[-1]):
                    break
        finally:  # an interrupted trial shows how far it came
            self.trials[index] = replace(trial, losses=np.array(losses))
        self._states[index] = Snapshot(state.variables)

    def _judge(self, alive: Sequence[int], steps: int) -> None:
        """Adds a score to the trials of a round, to all or, if interrupted, to none."""
        scored = []
        for index in alive:
            trial = self.trials[index]
            judged = trial.losses[-(steps - steps // 2) :]
            if not np.isfinite(trial.losses).all():
                judged = np.array([math.inf])
            elif self.validate is not None:
                self._states[index].restore()
                judged = np.array(self.validate())
            scored.append((index, judged, *_mean_and_error(judged)))
        for index, judged, score, error in scored:
            trial = self.trials[index]
            self.trials[index] = replace(
                trial,
                scores=np.append(trial.scores, score),
                errors=np.append(trial.errors, error),
                judged=judged,
            )

    def _keep(self, alive: Sequence[int], size: int, done: int) -> list[int]:
        """Drops trials until only the best one and its neighbours are left."""
        finite = [index for index in alive if math.isfinite(self.trials[index].scores[-1])]
        ranked = sorted(finite, key=lambda index: float(self.trials[index].scores[-1]))
        best = finite.index(ranked[0]) if ranked else 0
        begin = max(0, min(best - (size - 1) // 2, len(finite) - size))
        kept = finite[begin : begin + size]
        for index in set(alive) - set(kept):
            self.trials[index] = replace(self.trials[index], dropped_after=done)
            self._states.pop(index, None)
        return kept


def _mean_and_error(losses: Array) -> tuple[float, float]:
    if not np.isfinite(losses).all():
        return math.inf, math.inf
    error = losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf
    return float(losses.mean()), float(error)


def best_rate(trials: Sequence[Trial]) -> float | None:
    """Returns the best rate of the last round that was judged, or None if nothing is known of it.

    It is the lowest rate whose loss is not above the lowest one by more than the standard error of
    their difference, batch by batch. If such rates lie more than a factor of ten apart, the trials
    were too short to tell.
    """
    rounds = max((len(trial.scores) for trial in trials), default=0)
    last = [trial for trial in trials if rounds and len(trial.scores) == rounds]
    last = [trial for trial in last if math.isfinite(trial.scores[-1])]
    if not last:
        return None
    best = min(last, key=lambda trial: float(trial.scores[-1]))
    tied = [t.rate for t in last if _is_close(*_mean_and_error(t.judged - best.judged))]
    lowest = min([best.rate, *tied])
    return lowest if best.rate <= 1.001 * WIDEST_TIE * lowest else None


def _is_close(difference: float, error: float) -> bool:
    return math.isfinite(error) and difference <= error


def schedule_factor(
    schedule: str | None, plan: Plan, run_steps: int | None
) -> Callable[[int], float]:
    """Returns the share of its rate that a trial has at a step: the first part of a schedule.

    The warm-up is over in the middle of the first round at the latest, so that each trial is judged
    at its peak.

    Args:
        schedule: A name in `SCHEDULES`, or None for a constant rate.
        plan: The trials.
        run_steps: The steps of the run that the schedule is for. If they are not known, the rate
            stays at its peak.
    """
    if schedule is None:
        return lambda step: 1.0
    most = max(1, plan.rounds[0][1] // 2)
    warmup = most if run_steps is None else min(most, max(1, int(WARMUP * run_steps)))
    made = SCHEDULES[schedule] if run_steps is not None else Constant
    rates = made(1.0, warmup, run_steps)
    return lambda step: float(to_host(rates(step)))
