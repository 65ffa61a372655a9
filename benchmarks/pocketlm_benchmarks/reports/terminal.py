"""A result on standard output: tables that fit an 80-column terminal, and all of them in a pipe."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from typing import Literal

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from pocketlm.cli import console
from pocketlm_benchmarks.compare import Comparison
from pocketlm_benchmarks.reports import setting
from pocketlm_benchmarks.reports.changes import REGRESSION, comparison_sections, conclusion
from pocketlm_benchmarks.reports.formatting import title
from pocketlm_benchmarks.reports.layout import Cell, Column, Section, Table, plain
from pocketlm_benchmarks.reports.sections import sections
from pocketlm_benchmarks.result import Result

_GAP = 2  # characters between two columns of a table

_STYLES = {"better": "green", "worse": "yellow", REGRESSION: "bold red"}

_STEPS = (
    (False, False, True),
    (True, False, True),
    (False, True, True),
    (True, True, True),
    (False, True, False),
    (True, True, False),
)
"""What gives way on a narrow terminal: the first column becomes lines between the rows, then see `Column`."""


def print_result(result: Result) -> None:
    """The whole result, the command that repeats it at its end."""
    out = console.out()
    out.print(_text(title(result), "bold"))
    out.print(_text(setting.model_line(result)))
    out.print(_text(setting.device_line(result), "dim"))
    print_sections(out, sections(result, narrow=True))
    repeat = setting.repeat_table(result)
    print_sections(out, [Section(repeat.caption, tables=(repeat,))])


def print_comparison(comparison: Comparison) -> None:
    """What changed, and at the end whether anything became worse than the tolerance allows."""
    out = console.out()
    out.print(_text("Comparison", "bold"))
    print_sections(out, comparison_sections(comparison))
    out.print()
    bad = bool(comparison.regressions) or not comparison.comparable
    out.print(_text(conclusion(comparison), "bold red" if bad else "bold green"))


def print_sections(out: Console, found: Iterable[Section]) -> None:
    """Sections under their headings."""
    for section in found:
        out.print()
        out.print(_text(section.title, "bold"))
        for line in section.text:
            out.print(_text(line))
        tables = [table for table in section.tables if table.rows]
        for i, table in enumerate(tables):
            if i or section.text:
                out.print()
            _print_table(out, table, captioned=table.caption != section.title)
        for point in section.points:
            _print_point(out, point)


def _print_table(out: Console, table: Table, *, captioned: bool) -> None:
    if captioned:
        out.print(_text(table.caption, "italic"))
    out.print(_fitted(out, table))
    for note in table.notes:
        out.print(_text(note, "dim"))


def _fitted(out: Console, table: Table) -> Grid:
    """The most of a table that the width holds: see `Column` for what gives way."""
    names = [row[0].text for row in table.rows]
    groups = any(name == following for name, following in itertools.pairwise(names))
    for grouped, bare, optional in _STEPS:
        if grouped and not groups:
            continue
        grid = _grid(table, grouped=grouped, bare=bare, optional=optional)
        if out.measure(grid, options=out.options.update(width=1000)).maximum <= out.width:
            break
    return grid


def _grid(table: Table, *, grouped: bool, bare: bool, optional: bool) -> Grid:
    kept = [i for i, column in enumerate(table.columns) if optional or not column.optional]
    names, shown = [row[0].text for row in table.rows], kept[1:] if grouped else kept
    columns = [table.columns[i] for i in shown]
    headed = any(column.heading for column in columns)
    grid = Grid(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim", show_header=headed)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.number else "left"
        grid.add_column(_text(column.heading), justify=justify, no_wrap=column.number, overflow="fold")
    for i, row in enumerate(table.rows):
        cells = [_shown(row[j], table.columns[j], bare=bare) for j in shown]
        same = i > 0 and names[i - 1] == names[i]
        if grouped and not same:
            grid.add_row(_text(names[i], "bold"))
        if same and not grouped and sys.stdout.isatty():
            cells[0] = _text("")
        grid.add_row(*([_text("  ") + cells[0]] if grouped else cells[:1]), *cells[1:])
    return grid


def _shown(cell: Cell, column: Column, *, bare: bool) -> Text:
    return _text(cell.text if bare and column.bare else plain(cell), _STYLES.get(cell.text, ""))


def _print_point(out: Console, point: str) -> None:
    grid = Grid.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("•", _text(point))
    out.print(grid)


def _text(text: str, style: str = "") -> Text:
    return Text(console.printable(text), style=style)
