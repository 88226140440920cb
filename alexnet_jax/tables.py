"""Tables of text."""

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[Sequence[Any]], header: Sequence[str], markdown: bool = False) -> str:
    """Return a table as text: in plain form with aligned columns, numbers to the right, or in Markdown."""
    cells = [[str(x) for x in row] for row in [header, *rows]]
    if markdown:
        return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(header), *cells[1:]))
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]

    def line(row: list[str]) -> str:
        columns = zip(row, widths, right, strict=True)
        return "  ".join(cell.rjust(width) if r else cell.ljust(width) for cell, width, r in columns).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])
