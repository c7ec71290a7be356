"""Errors that several parts of the package raise or tell apart."""


class AnotherRunError(ValueError):
    """A saved state is not of the present run: its data, model or settings are other ones."""


class RefusedStateError(ValueError):
    """A part of the run, such as a callback or a dataset, does not take its saved state."""
