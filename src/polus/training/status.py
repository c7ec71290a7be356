"""The states of a run, and which follows which."""

import enum


class RunStatus(enum.Enum):
    """The states of a run."""

    CREATED = "created"
    RESTORED = "restored"
    RUNNING = "running"
    EPOCH_END = "epoch_end"
    COMPLETED = "completed"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


ENDED = (RunStatus.COMPLETED, RunStatus.STOPPED, RunStatus.INTERRUPTED, RunStatus.FAILED)
TRANSITIONS = {
    RunStatus.CREATED: (RunStatus.RESTORED, RunStatus.RUNNING, *ENDED),
    RunStatus.RESTORED: (RunStatus.RUNNING, *ENDED),
    RunStatus.RUNNING: (RunStatus.EPOCH_END, *ENDED),
    RunStatus.EPOCH_END: (RunStatus.RUNNING, *ENDED),
}
