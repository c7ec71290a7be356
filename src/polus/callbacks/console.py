"""Training progress: a bar in a terminal, a table in a notebook, plain lines elsewhere."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from polus.callbacks.base import Callback, Phase
from polus.callbacks.checks import check_callable
from polus.callbacks.epoch_table import EpochTable
from polus.callbacks.smooth import LossSmoothCallback
from polus.host import as_number, counted, to_host
from polus.metrics import results_by_name
from polus.steps.norms import NORM

if TYPE_CHECKING:
    from polus.callbacks.notebook import NotebookTable

REFRESH_SECS = 0.2  # losses are read from the device only at a refresh
METRICS_SECS = 2.0  # an epoch shows its metrics from then on: some compile what they compute
LINE_SECS = 30.0  # without a terminal, a long epoch prints a line this often


class ConsoleLogCallback(Callback):
    """Shows the loss, steps and examples per second, and the remaining time of the whole run.

    The smoothed loss is shown as well if a `LossSmoothCallback` is among the callbacks. A terminal
    shows a bar for the current epoch, with the metrics so far once it takes seconds, and finished
    epochs as the rows of a table, of which it shows the columns that fit. A notebook shows a bar
    and a table, which it updates in place; other outputs get a line for each epoch. A summary at
    the end reports the speed and, if it was noticeable, the time spent waiting for data.

    Args:
        console: The console to write to; standard output by default.
        clock: Returns the current time in seconds.
    """

    phase = Phase.REPORT  # the epoch's line shows the results of the other callbacks

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__()
        if console is not None and not isinstance(console, Console):
            raise TypeError(f"console must be a rich.console.Console, got {console!r}.")
        check_callable("clock", clock)
        self.console = console
        self.clock = clock
        self._progress: Progress | None = None
        self._table: NotebookTable | None = None

    def on_train_begin(self) -> None:
        silent = not self.coordinator.run.placement.is_first
        self._out = Console(quiet=True) if silent else self.console or Console(highlight=False)
        self._began = self._epoch_began = self._shown = self.clock()
        # The time at which the first block of steps ended, its steps and its examples.
        self._first: tuple[float, int, int] | None = None
        self._waited = self.coordinator.run.reader.waited_secs
        self._steps = self._examples = self._epochs = 0
        self._smooth = next(
            (c for c in self.coordinator.callbacks if isinstance(c, LossSmoothCallback)), None
        )
        self._shows_bar = self._out.is_terminal
        self._rows = EpochTable(self._out.width)
        if self._out.is_jupyter and self.console is None and not silent:
            from polus.callbacks.notebook import NotebookTable

            self._table, self._shows_bar = NotebookTable(), True
            self._table.show("preparing the first step")
        elif self._out.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20, table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[left]} ", markup=False),
                # Takes the rest of the line, so a narrow terminal truncates only this column.
                TextColumn(
                    "{task.fields[report]}",
                    markup=False,
                    table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                ),
                console=self._out,
                auto_refresh=False,  # the loop refreshes it; no thread
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
                total=self.coordinator.run.steps,
                completed=self.coordinator.run.step,
                refresh=True,
            )

    def on_steps_end(self, epoch: int, steps: range, losses: Sequence[float] | None) -> None:
        run = self.coordinator.run
        now = self.clock()
        examples = sum(run.batch_sizes[-len(steps) :])
        self._steps += len(steps)
        self._examples += examples
        if self._first is None:  # compilation is part of it, so it is excluded from the rates
            np.asarray(next(iter(run.step_logs.values())))
            now = self.clock()
            self._first = (now, self._steps, self._examples)
        if now - self._shown < (REFRESH_SECS if self._shows_bar else LINE_SECS):
            return
        self._shown = now
        report = [f"{name} {np.asarray(values)[-1]:.4g}" for name, values in run.step_logs.items()]
        if self._smooth is not None:
            report.append(f"smooth loss {self._smooth.smooth_loss:.4g}")
        if self._shows_bar and now - self._epoch_began >= METRICS_SECS:
            report += self._metrics()
        if rates := self._rates(now):
            report.append(rates)
        total = f"/{run.steps}" if run.steps else ""
        self._show(epoch, steps.stop, f"{steps.stop}{total}  {'  '.join(report)}", self._left(now))

    def _show(self, epoch: int, step: int, report: str, left: str) -> None:
        steps, title = self.coordinator.run.steps, self._title(epoch)
        if self._table is not None:
            self._table.show(f"{title}  {report}  {left}", step, steps)
        elif self._progress is not None:
            self._progress.update(
                self._task,
                description=title,
                total=steps,
                completed=step,
                left=left,
                report=report,
                refresh=True,
            )
        else:
            self._print(f"  step {report}")

    def on_epoch_end(self, epoch: int) -> None:
        run = self.coordinator.run
        self._epochs += 1
        seconds = self.clock() - self._epoch_began
        values = {name: _short(value) for name, value in run.logs.items()}
        if self._table is not None:
            self._table.add({"epoch": str(epoch + 1), **values, "time": f"{seconds:.1f} s"})
            self._table.show(self._title(epoch), run.step, run.steps)
            return
        if self._out.is_terminal:
            for line in self._rows.lines(
                self._title(epoch).removeprefix("epoch "),
                {name: value for name, value in values.items() if "\n" not in value},
                f"{seconds:.1f} s",
                self._by_importance(values),
            ):
                self._out.print(line, markup=False, soft_wrap=True)
            return
        line = "  ".join(f"{name} {value}" for name, value in values.items())
        self._print(f"{self._title(epoch)}  {line}  {seconds:.1f} s")

    def _by_importance(self, names: Iterable[str]) -> list[str]:
        """Returns the loss, validations, other results, and last how the epoch went."""
        run = self.coordinator.run
        results = {"loss", *run.history.validation_logs(run.epoch)}

        def rank(name: str) -> int:
            how = name in run.history.record[-1] or NORM in name
            return 0 if name in results else 2 if how else 1

        return sorted(names, key=rank)

    def on_train_end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._first is None:
            return
        now = self.clock()
        seconds = now - self._began
        first = self._first[0] - self._began
        epochs = f"{counted(self._epochs, 'epoch')}, {counted(self._steps, 'step')}"
        summary = f"{epochs} in {seconds:.1f} s: {first:.1f} s to the first"
        if rates := self._rates(now):
            summary += f", then {rates}"
        waited = self.coordinator.run.reader.waited_secs - self._waited
        if waited >= max(1.0, 0.05 * seconds):
            share = waited / seconds
            summary += f"; input-bound: {share:.0%} of the time was spent waiting for data"
        if self._table is not None:
            self._table.show(summary)
            self._table = None
        else:
            self._print(summary)

    def _print(self, line: str) -> None:
        # Names may contain brackets. A terminal breaks lines between words, a file never.
        self._out.print(line, markup=False, soft_wrap=not self._out.is_terminal)

    def _title(self, epoch: int) -> str:
        epochs = self.coordinator.run.epochs
        if self.coordinator.run.open_ended:
            return f"epoch {epoch + 1}"
        return f"epoch {epoch + 1:{len(str(epochs))}}/{epochs}"

    def _left(self, now: float) -> str:
        """Returns the remaining time of all epochs, or "" while it is unknown."""
        run = self.coordinator.run
        if run.steps is None or self._first is None or self._steps == self._first[1]:
            return ""
        secs_per_step = (now - self._first[0]) / (self._steps - self._first[1])
        seconds = round(((run.epochs - run.epoch) * run.steps - run.step) * secs_per_step)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        shown = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"{shown} left"

    def _metrics(self) -> list[str]:
        """Returns what metrics are so far. Of several processes all would have to compute them."""
        run, found = self.coordinator.run, []
        for metric in run.metrics if run.placement.count == 1 else ():
            with contextlib.suppress(Exception):  # it may be made for whole epochs
                results = results_by_name([metric], lambda metric: metric.result())
                values = {name: to_host(value) for name, value in results.items()}
                found += [f"{n} {_short(v)}" for n, v in values.items() if np.ndim(v) == 0]
        return found

    def _rates(self, now: float) -> str:
        """Returns the speed in steps and examples since the first block, or "" until the second."""
        if self._first is None or self._steps == self._first[1]:
            return ""
        began, *before = self._first
        steps, examples = self._steps - before[0], self._examples - before[1]
        seconds = max(now - began, 1e-9)
        speed = f"{_rate(steps / seconds)} steps/s"
        if seconds > steps:
            speed = f"{_rate(seconds / steps)} s/step"
        return f"{speed}, {_rate(examples / seconds)} examples/s"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _short(value: Any) -> str:
    if (number := as_number(value)) is not None:
        return f"{number:.4g}"
    if np.ndim(value) == 0:
        return str(value)  # whatever a callback has put into the logs
    return np.array2string(np.asarray(value), precision=4)
