"""Progress that can be watched: a bar in a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from polus.callbacks.base import Callback, Phase
from polus.callbacks.smooth import LossSmoothCallback

REFRESH_SECS = 0.2  # losses are read from the device only then
LINE_SECS = 30.0  # where there is no terminal, a long epoch says that it is alive


class ConsoleLogCallback(Callback):
    """Shows the loss, its smoothed value, steps and examples per second, and the remaining time.

    The remaining time is that of all epochs; the smoothed loss is shown where a
    `LossSmoothCallback` is among the callbacks. In a terminal there is a bar for the running epoch,
    and a line stays for each that ended. Where there is no terminal, there are only the lines. At
    the end a summary says how fast it was, and how much of the time went into waiting for data,
    where it is worth knowing.

    Args:
        console: where to write; standard output by default.
        clock: tells the time in seconds.
    """

    phase = Phase.REPORT  # the epoch's line has what the others found

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__()
        self.console = console
        self.clock = clock
        self._progress: Progress | None = None

    def on_train_begin(self) -> None:
        self._out = self.console or Console(highlight=False, soft_wrap=True)
        self._began = self._epoch_began = self._shown = self.clock()
        # When the first steps were done, how many they were, and their examples.
        self._first: tuple[float, int, int] | None = None
        self._waited = self.coordinator.reader.waited_secs
        self._steps = self._examples = self._epochs = 0
        self._smooth = next(
            (c for c in self.coordinator.callbacks if isinstance(c, LossSmoothCallback)), None
        )
        if self._out.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20, table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[left]}", markup=False),
                # Takes what is left of the line: a narrow terminal cuts it at its end.
                TextColumn(
                    "{task.fields[report]}",
                    markup=False,
                    table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                ),
                console=self._out,
                auto_refresh=False,  # no thread: the loop says when
                transient=True,
                expand=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("", left="", report="preparing the first step")
            self._shown = -math.inf

    def on_epoch_begin(self, epoch: int) -> None:
        self._epoch_began = now = self.clock()
        if self._progress is not None and now - self._shown >= REFRESH_SECS:
            self._shown = now
            self._progress.update(
                self._task,
                description=self._title(epoch),
                total=self.coordinator.steps,
                completed=self.coordinator.step,
                refresh=True,
            )

    def on_steps_end(self, epoch: int, steps: range, losses: Any) -> None:
        run = self.coordinator
        now = self.clock()
        examples = sum(run.batch_sizes[-len(steps) :])
        self._steps += len(steps)
        self._examples += examples
        if self._first is None:  # they wait for compilers, and say nothing of the speed
            np.asarray(losses)
            now = self.clock()
            self._first = (now, self._steps, self._examples)
        if now - self._shown < (REFRESH_SECS if self._progress is not None else LINE_SECS):
            return
        self._shown = now
        report = [f"{name} {np.asarray(values)[-1]:.4g}" for name, values in run.step_logs.items()]
        if self._smooth is not None:
            report.append(f"smooth loss {self._smooth.smooth_loss:.4g}")
        if rates := self._rates(now):
            report.append(rates)
        total = f"/{run.steps}" if run.steps else ""
        if self._progress is None:
            self._print(f"  step {steps.stop}{total}  {'  '.join(report)}")
            return
        self._progress.update(
            self._task,
            description=self._title(epoch),
            total=run.steps,
            completed=steps.stop,
            left=self._left(now),
            report=f"{steps.stop}{total}  {'  '.join(report)}",
            refresh=True,
        )

    def on_epoch_end(self, epoch: int) -> None:
        run = self.coordinator
        self._epochs += 1
        seconds = self.clock() - self._epoch_began
        values = "  ".join(f"{name} {_short(value)}" for name, value in run.logs.items())
        self._print(f"{self._title(epoch)}  {values}  {seconds:.1f} s")

    def on_train_end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._first is None:
            return
        now = self.clock()
        seconds = now - self._began
        first = self._first[0] - self._began
        epochs = f"{self._epochs} epoch{'s' * (self._epochs != 1)}, {self._steps:,} steps"
        summary = f"{epochs} in {seconds:.1f} s: {first:.1f} s to the first"
        if rates := self._rates(now):
            summary += f", then {rates}"
        waited = self.coordinator.reader.waited_secs - self._waited
        if waited >= max(1.0, 0.05 * seconds):
            share = waited / seconds
            summary += f"; input-bound: {share:.0%} of the time went into waiting for data"
        self._print(summary)

    def _print(self, line: str) -> None:
        self._out.print(line, markup=False)  # a name may have brackets

    def _title(self, epoch: int) -> str:
        epochs = self.coordinator.epochs
        return f"epoch {epoch + 1:{len(str(epochs))}}/{epochs}"

    def _left(self, now: float) -> str:
        """The remaining time of all epochs; empty where nothing tells it yet."""
        run = self.coordinator
        if run.steps is None or self._first is None or self._steps == self._first[1]:
            return ""
        secs_per_step = (now - self._first[0]) / (self._steps - self._first[1])
        seconds = round(((run.epochs - run.epoch) * run.steps - run.step) * secs_per_step)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def _rates(self, now: float) -> str:
        """Steps and examples per second since the first steps were done; empty before the next."""
        if self._first is None or self._steps == self._first[1]:
            return ""
        began, *before = self._first
        counts = (self._steps - before[0], self._examples - before[1])
        rates = [count / max(now - began, 1e-9) for count in counts]
        shown = [f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}" for rate in rates]
        return f"{shown[0]} steps/s, {shown[1]} examples/s"


def _short(value: Any) -> str:
    if np.ndim(value) == 0:
        return f"{value:.4g}"
    return np.array2string(np.asarray(value), precision=4)
