"""Results as Markdown (GitHub's tables), with the commands that repeat them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pocketlm_benchmarks.reports import setting
from pocketlm_benchmarks.reports.costs import engine_rows
from pocketlm_benchmarks.reports.formatting import title
from pocketlm_benchmarks.reports.layout import Section, Table, pairs, plain
from pocketlm_benchmarks.reports.sections import devices, overview, sections
from pocketlm_benchmarks.reports.speed import case_table
from pocketlm_benchmarks.result import Device, Result

_SPECIAL = re.compile(r"[\\`*<>|\[\]&~]|(?<!\w)_|_(?!\w)")  # an underscore within a word is only itself
_MARKER = re.compile(r"^(\d*)([#+.)=-])(?![^\s#=-])")


def to_markdown(results: Sequence[Result]) -> str:
    """All results, those of one device together; nothing but a heading for none."""
    lines = ["# Benchmarks", ""]
    groups = devices(results)
    for states, found in groups:
        lines += _device(states, found, heading=f"## {_escape(states[0].processor)}")
    return "\n".join(lines).rstrip("\n") + "\n"


def _device(states: Sequence[Device], results: Sequence[Result], *, heading: str) -> Iterator[str]:
    yield from (heading, "")
    yield from _table(setting.device_table(states), caption=False)
    if len(results) > 1:
        yield from _table(overview(results), caption=True)
    for result in results:
        yield from (f"### {_escape(title(result))}", "", _escape(setting.model_line(result)) + ".", "")
        for section in sections(result):
            yield from _section(section)
        yield from _repeat(result)


def _section(section: Section) -> Iterator[str]:
    yield from (f"#### {_escape(section.title)}", "")
    for line in section.text:
        yield from (_line(line), "")
    tables = [table for table in section.tables if table.rows]
    for table in tables:
        yield from _table(table, caption=len(tables) > 1 or bool(section.text))
    if section.points:
        yield from (*(f"- {_line(point)}" for point in section.points), "")


def _repeat(result: Result) -> Iterator[str]:
    table = setting.repeat_table(result)
    yield from (f"#### {table.caption}", "", *_fenced(result.command), "")
    rows = {row[0].text: row[1].text for row in table.rows if row[1].text != result.command}
    yield from _table(pairs(table.caption, rows | engine_rows(result)), caption=False)
    yield from _table(case_table(result), caption=True)


def _fenced(command: str) -> Iterator[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    yield from (f"{fence}sh", " ".join(command.splitlines()), fence)


def _table(table: Table, *, caption: bool) -> Iterator[str]:
    if caption:
        yield from (f"**{_escape(table.caption)}**", "")
    yield _row([column.heading for column in table.columns])
    yield _row(["---:" if column.number else "---" for column in table.columns], escape=False)
    yield from (_row([plain(cell) for cell in row]) for row in table.rows)
    yield ""
    for note in table.notes:
        yield from (_line(note), "")


def _row(cells: Sequence[str], *, escape: bool = True) -> str:
    return f"| {' | '.join(_escape(cell) if escape else cell for cell in cells)} |"


def _line(text: str) -> str:
    """A line of its own, which does not become a heading or a list by how it begins."""
    return _MARKER.sub(r"\1\\\2", _escape(text))


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))
