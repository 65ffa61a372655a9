"""What a report is made of, whatever it is written to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

NONE = "–"
"""Stands where there is no figure; the table's notes or the flags say why."""


class Cell(NamedTuple):
    text: str
    interval: str = ""  # "740–765"


EMPTY = Cell(NONE)


@dataclass(frozen=True)
class Column:
    """A narrow terminal leaves out first the intervals of `bare` columns, then the `optional` columns."""

    heading: str
    number: bool = True
    bare: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Table:
    """Its first column names the rows; neighbours that share the name belong together."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    points: tuple[str, ...] = ()  # a list of sentences

    @property
    def empty(self) -> bool:
        """Whether it says anything at all."""
        return not (self.text or self.points or any(table.rows for table in self.tables))


def pairs(caption: str, rows: dict[str, str]) -> Table:
    """Names and what there is to say of them."""
    columns = (Column("", number=False), Column("", number=False))
    return Table(caption, columns, tuple((Cell(name), Cell(text)) for name, text in rows.items()))


def plain(cell: Cell) -> str:
    """`753 (740–765)`."""
    return f"{cell.text} ({cell.interval})" if cell.interval else cell.text
