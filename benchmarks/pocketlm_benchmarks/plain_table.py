"""The tables that the scripts beside `pocketlm bench` print."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be: the first to the left, the others, figures, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the rounds' ratios."""
    return f"{median(one / other for one, other in zip(ours, theirs, strict=True)):.2f}"
