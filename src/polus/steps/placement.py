"""Interim."""


def current_placement() -> None:
    """Interim."""
