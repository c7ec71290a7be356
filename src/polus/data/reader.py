"""Reads a dataset epoch by epoch, and continues in a new process where a checkpoint was saved."""

import logging
from typing import Any

from polus.data import iterator_state
from polus.data.epoch import BatchReader, Callback, EpochReader, State, do_nothing
from polus.data.resume import (
    IteratorSnapshot,
    check_same_dataset,
    check_same_leaves,
    warn_if_another,
)
from polus.errors import RefusedStateError
from polus.state import random_state

logger = logging.getLogger("polus.data")


class DataReader(BatchReader):
    """Reads a dataset epoch by epoch.

    Args:
        adapter: The dataset.
        transform: A Python function applied to each batch, or None.
        steps: The number of batches per epoch at most, or None.
        first_epoch: The number that the dataset knows epoch 0 by: how many epochs of it were
            trained before. `set_state` restores it.
        check: Called with batches in host memory; see `BatchReader`.

    Attributes:
        current: The epoch that was begun last.
    """

    current: EpochReader | None = None
    _resumed: EpochReader | None = None

    def epoch(self, epoch: int, start: int = 0) -> EpochReader:
        """Returns the batches of an epoch from batch `start` on."""
        resumed, self._resumed = self._resumed, None
        self.current = resumed or EpochReader(self, epoch, start)
        return self.current

    # ------------------------------------------------------------------ resuming

    def get_state(self, epoch: int, step: int) -> State:
        """Returns what `set_state` needs to continue before `step` of `epoch`."""
        state: State = {"dataset": self._facts(), "first_epoch": self.first_epoch}
        if self.current is None:
            return state | {"epoch_start": self.generators()}
        state["leaves"] = self.current.leaves
        if self.current.number == epoch:
            return state | self.current.get_state(step)
        return state | self._state_between_epochs(self.current)

    def _state_between_epochs(self, previous: EpochReader) -> State:
        state: State = {"checksum": None, "iterator": None, "epoch_start": self.generators()}
        if self.adapter.can_reread(self.steps):
            state["previous_epoch"] = {
                "epoch_start": previous.epoch_start,
                "checksum": previous.checksum,
            }
        read_all = self.steps is None or self.steps == self.adapter.num_batches
        if read_all and (at_end := self.adapter.epoch_end_state()) is not None:
            state["iterator_at_epoch_end"] = iterator_state.encode(at_end)
        return state

    def set_state(
        self,
        state: State,
        epoch: int,
        step: int,
        random: State,
        handle_signals: Callback = do_nothing,
    ) -> State:
        """Lets the next call of `epoch` continue before `step` of `epoch`.

        Args:
            state: What `get_state` returned there. The reader itself has not been read yet.
            epoch: The number of the epoch.
            step: The number of steps that were run in it.
            random: `random_state()` there. It may be ahead of the data, which is prefetched.
            handle_signals: Called before each batch that is read and dropped; may raise.

        Returns:
            The random state to train with.

        Raises:
            ValueError: If the dataset is of another kind or shape, or ends before that step.
        """
        check_same_dataset(state["dataset"], self._facts())
        self.first_epoch = state["first_epoch"]
        self._return_to_epoch(state, epoch)
        saved = state.get("iterator") if step else None
        snapshot = None if saved is None else IteratorSnapshot.from_tree(saved)
        strategy = self.adapter.resume_strategy(snapshot, self.transform is not None)
        drawn = strategy.resume(self, epoch, step, state, handle_signals)
        assert self.current is not None  # the strategy has opened it
        self._resumed = self.current
        self.current.epoch_start = state["epoch_start"]
        check_same_leaves(state.get("leaves"), self.current.leaves)
        # Before the first step, reading the first batch has moved the generators as it would have
        # in an uninterrupted run.
        return random | drawn if step else random_state()

    def _return_to_epoch(self, state: State, epoch: int) -> None:
        """Brings the dataset of a new process to where it was before `epoch` began."""
        at_end = state.get("iterator_at_epoch_end")
        # A dataset whose state is restored need not go through the epoch before.
        previous = state.get("previous_epoch") if at_end is None else None
        self.adapter.rewind(epoch if previous is None else epoch - 1, self.steps)
        if previous is not None:
            self._repeat_epoch(epoch - 1, previous)
        if self.adapter.unrepeatable:
            logger.warning("The order of the data may not repeat: %s", self.adapter.unrepeatable)
        self.restore_generators(state["epoch_start"])
        if at_end is not None:
            self._restore_epoch_end(epoch, at_end)
            self.restore_generators(state["epoch_start"])

    def _restore_epoch_end(self, epoch: int, state: State) -> None:
        try:
            self.adapter.restore_epoch_end(self.first_epoch + epoch, iterator_state.decode(state))
        except Exception as error:  # whatever the dataset's library raises for a state it refuses
            raise RefusedStateError(
                f"The dataset does not take its saved state between two epochs ({error!r})."
            ) from error

    def _repeat_epoch(self, epoch: int, saved: State) -> None:
        """Begins an earlier epoch again, checks its first batch and leaves behind what it left."""
        self.restore_generators(saved["epoch_start"])
        data = self.open_epoch(epoch, 0)
        data.set_example(data.peek())
        warn_if_another(epoch, saved["checksum"], data.checksum)
        while self.adapter.state_depends_on_reads and data.skip() is not None:
            pass
        self.adapter.end_epoch()

    def open_epoch(
        self, epoch: int, start: int = 0, snapshot: IteratorSnapshot | None = None
    ) -> EpochReader:
        """Begins an epoch at batch `start`, where the iterator has the state of `snapshot`."""
        self.current = EpochReader(self, epoch, start, snapshot)
        return self.current

    def first_batch(self, epoch: int) -> tuple[Any, ...] | None:
        """Returns the step's arguments from the first batch of an epoch; None if it has none."""
        for batch in self.adapter.batches(self.first_epoch + epoch):
            return self.arguments(batch)
        return None

    def _facts(self) -> State:
        """Returns what tells the dataset from others."""
        kind = type(self.adapter.dataset)
        # The class of a tf.data pipeline is named after its last operation.
        name = "tf.data.Dataset" if kind.__module__.startswith("tensorflow.") else kind.__qualname__
        return {"kind": name, "num_batches": self.num_batches, **self.adapter.facts()}
