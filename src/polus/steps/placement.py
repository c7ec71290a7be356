"""Where a step runs. So far on one device; several are not served yet."""


def current_placement() -> None:
    """Does nothing: every step runs on one device."""
