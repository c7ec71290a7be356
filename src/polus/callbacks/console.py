"""Progress that can be watched: a bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polus.callbacks.base import Callback
from polus.callbacks.smooth import LossSmoothCallback

REFRESH_SECS = 0.2  # losses are read from the device only then
LINE_SECS = 30.0  # where there is no terminal, a long epoch says that it is alive


class ConsoleLogCallback(Callback):
    """Shows the loss, its smoothed value, steps and examples per second, and the remaining time.

    In a terminal there is a bar for the running epoch, and a line stays for each that ended. Where
    there is no terminal, there are only the lines. At the end a summary says how fast it was, and
    how much of the time went into waiting for data, where it is worth knowing.

    Args:
        console: where to write; standard output by default.
        clock: tells the time in seconds.
    """

    order = 1  # the epoch's line has what the others found

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__()
        self.console = console
        self.clock = clock
        self._progress: Progress | None = None

    def on_train_begin(self) -> None:
        self._out = self.console or Console(highlight=False, soft_wrap=True)
        self._began = self.clock()
        self._first: tuple[float, int, int] | None = None  # when the first steps were done, and what
        self._waited = self.coordinator.feed.waited_secs
        self._steps = self._examples = self._epochs = 0
        self._smooth = next(
            (c for c in self.coordinator.callbacks if isinstance(c, LossSmoothCallback)), None
        )
        if self._out.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[report]}"),
                TimeRemainingColumn(compact=True),
                console=self._out,
                auto_refresh=False,  # no thread: the loop says when
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("", report="")

    def on_epoch_begin(self, epoch: int) -> None:
        run = self.coordinator
        self._epoch_began = self._shown = self.clock()
        if self._progress is not None:
            title = f"epoch {epoch + 1}/{run.epochs}"
            self._progress.reset(self._task, total=run.steps, description=title, report="")

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
        report.append(self._rates(now))
        total = f"/{run.steps}" if run.steps else ""
        if self._progress is None:
            self._out.print(f"  step {steps.stop}{total}  {'  '.join(report)}")
            return
        text = f"{steps.stop}{total}  {'  '.join(report)}"
        self._progress.update(self._task, completed=steps.stop, report=text, refresh=True)

    def on_epoch_end(self, epoch: int) -> None:
        run = self.coordinator
        self._epochs += 1
        seconds = self.clock() - self._epoch_began
        values = "  ".join(f"{name} {_short(value)}" for name, value in run.logs.items())
        width = len(str(run.epochs))
        self._out.print(f"epoch {epoch + 1:{width}}/{run.epochs}  {values}  {seconds:.1f} s")

    def on_train_end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if not self._epochs:
            return
        now = self.clock()
        seconds = now - self._began
        first = self._first[0] - self._began if self._first is not None else 0.0
        epochs = f"{self._epochs} epoch{'s' * (self._epochs != 1)}, {self._steps:,} steps"
        summary = f"{epochs} in {seconds:.1f} s: {first:.1f} s to the first, then {self._rates(now)}"
        waited = (self.coordinator.feed.waited_secs - self._waited) / seconds
        if waited >= 0.05:
            summary += f"; input-bound: {waited:.0%} of the time went into waiting for data"
        self._out.print(summary)

    def _rates(self, now: float) -> str:
        """Steps and examples per second since the first steps were done."""
        began, *before = self._first or (now, 0, 0)
        counts = (self._steps - before[0], self._examples - before[1])
        rates = [count / max(now - began, 1e-9) for count in counts]
        shown = [f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}" for rate in rates]
        return f"{shown[0]} steps/s, {shown[1]} examples/s"


def _short(value: Any) -> str:
    return f"{value:.4g}" if np.ndim(value) == 0 else np.array2string(np.asarray(value), precision=4)
