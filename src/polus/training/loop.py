"""The training loop."""

import contextlib
import time

from polus.history import History
from polus.training.run import Run


def train_loop(run: Run) -> History:
    """Trains from where the run stands until its epochs are done or something stops it.

    ```
    while not run.finished:
        for block in the epoch:                  # some batches of equal shape
            outputs = program(*block)            # one compiled call: a step for each batch
            run.record(block, outputs)           # history, callbacks, checkpoint
        run.close_epoch()                        # metrics, means, callbacks
    ```
    """
    while not run.finished:
        data = run.open_epoch()
        run.executor.prepare(data.example)
        step = run.tuned_step(data)
        blocks = data.blocks(
            step.steps_per_execution,
            run.callbacks.steps_until_callback,
            run.handle_signals,
            step.pace,
        )
        with contextlib.closing(blocks):
            for block in blocks:
                run.block = block
                if block.count == 1:
                    run.callbacks.on_train_batch_begin()
                program, arguments = run.guarded.program(block)
                # Nothing interrupts between here and the record: signals wait to be handled.
                began = time.perf_counter()
                outputs = program(*arguments)
                step.pace.observe(block.count, outputs, began)
                run.record(block, run.guarded.checked(block, outputs))
                run.handle_signals()
                if run.stopping:
                    break
        run.close_epoch()
        run.handle_signals()
    run.executor.finalize()
    return run.history
