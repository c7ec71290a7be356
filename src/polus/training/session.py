"""A run whose loop is the user's own."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from polus.callbacks.base import ICallback, KerasCallbackLike
from polus.data import PushedAdapter, StepBlock
from polus.history import History
from polus.host import to_host
from polus.training.config import OPEN_END, TrainConfig
from polus.training.run import Run


class _StoppedError(Exception):
    """Ends the block of a session that was stopped."""


class Session:
    """The steps of a run, one by one, with all that `train` has around them.

    It has the attributes of the run, except `step`, which runs one.

    Args:
        run: The run.
        data: What its batches are pushed to.

    Attributes:
        run: The run, as callbacks see it.
    """

    def __init__(self, run: Run, data: PushedAdapter) -> None:
        self.run = run
        self._data = data
        self._blocks: Generator[StepBlock] | None = None
        self._ended = False

    @property
    def history(self) -> History:
        """What was recorded so far."""
        return self.run.history

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; of a resumed session, where to go on."""
        return self.run.epoch

    @property
    def num_steps(self) -> int:
        """The number of steps of the current epoch so far."""
        return self.run.step

    @property
    def stopping(self) -> bool:
        """Whether the session was stopped. Its block then ends at the next step."""
        return self.run.stopping

    def stop(self, reason: str) -> None:
        """Ends the session in order: the next step leaves its block."""
        self.run.stop(reason)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)  # its logs, its status, why it was stopped

    def step(self, *batch: Any) -> Any:
        """Runs one compiled step on a batch: the arguments of `train_step`.

        Returns:
            What the step returned, on the device.

        Raises:
            RuntimeError: If the block of the session has ended.
        """
        run = self.run
        if self._ended:
            raise RuntimeError(
                "The session has ended with its `with` block. Open another: "
                "with trainer.session(...) as run."
            )
        if run.stopping:
            raise _StoppedError
        self._data.push(batch)
        if self._blocks is None:
            data = run.open_epoch()
            run.executor.prepare(data.example)
            self._blocks = run.blocks(data)
        block = next(self._blocks)
        program, arguments = run.begin(block)
        return run.record(block, program(*arguments))

    def end_epoch(self, **logs: Any) -> dict[str, Any]:
        """Ends an epoch: its metrics, means, callbacks.

        Args:
            logs: Values of the user's own for the epoch's logs, which callbacks may monitor.

        Returns:
            The logs of the epoch.

        Raises:
            ValueError: If it has no step, or the epoch has a value of this name already.
        """
        if self._blocks is None:
            raise ValueError("The epoch has no step to end. Call run.step(*batch) before.")
        known = {"epoch", "step", *self.run.step_logs, *(m.name for m in self.run.metrics)}
        if taken := known & set(logs):
            raise ValueError(
                f"end_epoch got {min(taken)!r}, which the epoch's logs have already: its number, "
                "or a term or metric of its steps. Give the value another name."
            )
        blocks, self._blocks = self._blocks, None
        blocks.close()
        self.run.logs.update({name: to_host(value).tolist() for name, value in logs.items()})
        self.run.close_epoch()
        return self.run.logs

    def close(self) -> None:
        """Ends an epoch that is still open, and the session."""
        self._ended = True
        if self._blocks is not None:
            self.end_epoch()


@contextlib.contextmanager
def open_session(
    start: Callable[[TrainConfig], contextlib.AbstractContextManager[Run]],
    callbacks: Sequence[ICallback | KerasCallbackLike] | None,
    arguments: dict[str, Any],
) -> Iterator[Session]:
    """Begins a session, and ends it in order; see `BaseTrainer.session`.

    Args:
        start: Begins a run.
        callbacks: The callbacks of the run.
        arguments: Other arguments of `train`.
    """
    data = PushedAdapter()
    given = {"tf_dataset": data, "epochs": OPEN_END, "callbacks": callbacks or [], **arguments}
    with start(TrainConfig.checked(given)) as run:
        run.open_ended = True
        session = Session(run, data)
        with contextlib.suppress(_StoppedError):
            yield session
        session.close()
        if run.epoch and not run.stopping:
            run.epochs = run.epoch  # this was the end: now a checkpoint of it is due
            run.callbacks.on_boundary()
        run.executor.finalize()
