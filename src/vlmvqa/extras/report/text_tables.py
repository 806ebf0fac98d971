"""Tables of text cells, the header first: aligned for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Collection

Table = list[list[str]]


def aligned(rows: Table, texts: Collection[str] = ()) -> str:
    """Return a table with aligned columns.

    Args:
        texts: headings of the columns aligned to the left, in addition to the first; the others hold numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = [number == 0 or heading in texts for number, heading in enumerate(rows[0])]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, left, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def piped(rows: Table) -> str:
    """Return a table in Markdown."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])
