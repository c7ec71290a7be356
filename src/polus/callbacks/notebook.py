"""Training progress in a notebook: one table, replaced while the run goes on."""

from html import escape

from IPython.display import display

from polus.figures import html_table

MAX_ROWS = 20  # the last epochs


class NotebookTable:
    """The output of a cell: what runs now, and below it a row for each epoch."""

    def __init__(self) -> None:
        self._rows: list[dict[str, str]] = []
        self._handle = display(_texts("", ""), raw=True, display_id=True)  # type: ignore[no-untyped-call]

    def add(self, row: dict[str, str]) -> None:
        """Adds the row of an epoch, which is seen with the next `show`."""
        self._rows.append(row)

    def show(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Replaces the output.

        Args:
            text: What runs now.
            done: How many steps of the epoch are done.
            total: How many it has; None for no bar.
        """
        bar = "" if not total else f'<progress value="{done}" max="{total}"></progress> '
        names = dict.fromkeys(name for row in self._rows for name in row)
        shown = self._rows[-MAX_ROWS:]
        columns = {name: [row.get(name, "") for row in shown] for name in names}
        table = html_table("", columns, len(self._rows) > MAX_ROWS) if self._rows else ""
        self._handle.update(_texts(text, f"<p>{bar}{escape(text)}</p>{table}"), raw=True)


def _texts(plain: str, html: str) -> dict[str, str]:
    return {"text/plain": plain, "text/html": html}
