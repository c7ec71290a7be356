"""Where a step runs: on one device, so far."""

from polus.backends import backend


def require_one_device() -> None:
    """Refuses to train under an engine for several devices, which Polus does not serve yet.

    Without this each process would train a model of its own, or each device the whole batch.

    Raises:
        NotImplementedError: If such an engine is active; the message says what to write instead.
    """
    if engine := backend.distribution():
        raise NotImplementedError(
            f"{engine} is active, and Polus trains on one device only: each process would train a "
            "model of its own, or each device the whole batch. Start one process without it, and "
            "choose the device with CUDA_VISIBLE_DEVICES."
        )
