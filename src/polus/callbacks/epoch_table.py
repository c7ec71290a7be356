"""Epochs as the rows of a table in a terminal."""

from collections.abc import Mapping, Sequence

NUMBER = 9  # characters, as in -1.23e+04: columns stay where they are


class EpochTable:
    """Makes lines of a table that is as wide as a terminal.

    The columns that fit are shown, and how many are not: "+3". The header is repeated where the
    columns change.

    Args:
        width: The characters of a line.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._names: list[str] = []
        self._header = ""

    def lines(
        self, title: str, values: Mapping[str, str], end: str, by_importance: Sequence[str]
    ) -> list[str]:
        """Returns the row of an epoch, after a header if there was none like it.

        Args:
            title: The first cell, always shown.
            values: The other cells by the names of their columns, on one line each.
            end: The last cell, always shown: the time.
            by_importance: The names, those first that are to be shown.
        """
        # A validation that runs in some epochs keeps its columns.
        self._names += [name for name in values if name not in self._names]
        widths = {n: max(len(n), NUMBER, len(values.get(n, ""))) for n in self._names}
        shown = self._fitting(widths, len(f"{title:5}  {end:>4}  +99"), by_importance)
        cells = [("epoch".ljust(len(title)), title.ljust(5))]
        cells += [(n.rjust(widths[n]), values.get(n, "").rjust(widths[n])) for n in shown]
        cells.append(("time".rjust(len(end)), end.rjust(4)))
        header, row = ("  ".join(column) for column in zip(*cells, strict=True))
        left_out = len(self._names) - len(shown)
        header += f"  +{left_out}" if left_out else ""
        new, self._header = header != self._header, header
        return [header, row] if new else [row]

    def _fitting(
        self, widths: Mapping[str, int], taken: int, by_importance: Sequence[str]
    ) -> list[str]:
        found, room = set(), self.width - taken
        for name in dict.fromkeys([*by_importance, *self._names]):
            if name in widths and widths[name] + 2 <= room:
                found.add(name)
                room -= widths[name] + 2
        return [name for name in self._names if name in found]
