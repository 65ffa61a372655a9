"""`pocketlm doctor`: what this machine and this installation are like, and what to do about it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketlm.cli import console, options

if TYPE_CHECKING:
    from rich.table import Table

    from pocketlm.doctor.check import Check, Report, State
    from pocketlm.progress import Progress

_MARKS: dict[State, tuple[str, str, str]] = {
    "ok": ("✓", "ok", "green"),
    "absent": ("–", "absent", "dim"),
    "note": ("!", "note", "bold yellow"),
    "problem": ("✗", "PROBLEM", "bold red"),
}
"""On a terminal, elsewhere, and the style."""

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="What the self-test runs: a name from `pocketlm list` or a bundle's folder (default: the "
        "smallest).",
        show_default=False,
        autocompletion=options.complete_model,
    ),
]


def doctor(
    *,
    model: Model = None,
    no_self_test: Annotated[
        bool, typer.Option("--no-self-test", help="Do not run a model without network.")
    ] = False,
    no_bandwidth: Annotated[
        bool, typer.Option("--no-bandwidth", help="Do not measure how fast memory is read.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine, the installation and that no network is used.

    Takes a few seconds; nothing is fetched or changed. Ends with exit code 1 if something is wrong.
    """
    from pocketlm.doctor.examine import examine

    with _busy() as progress:
        report = examine(
            model,
            measure_bandwidth=not no_bandwidth,
            test_network=not no_self_test,
            progress=progress,
        )
    if as_json:
        console.write_json(as_object(report))
    else:
        print_report(report)
    if report.state == "problem":
        raise typer.Exit(1)


def as_object(report: Report) -> dict[str, Any]:
    """A report as `--json` prints it."""
    return {"state": report.state, "checks": [dataclasses.asdict(check) for check in report.checks]}


def print_report(report: Report) -> None:
    """The checks in groups, and the sum, on standard output."""
    out = console.out()
    pretty = out.is_terminal and out.encoding.lower().startswith("utf")
    width = max(len(check.name) for check in report.checks)
    for group, checks in groupby(report.checks, key=lambda check: check.group):
        out.print(group, style="bold")
        if pretty:
            out.print(_table(checks, width))
        else:
            console.write("".join(_lines(checks, width)))
        console.write("\n")
    out.print(_sum(report), style="bold")


def _table(checks: Iterator[Check], width: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, width=width)
    table.add_column(overflow="fold")
    for check in checks:
        mark, _, style = _MARKS[check.state]
        dim = "dim" if check.state == "absent" else ""
        text = Text(console.printable(check.text), style=dim)
        table.add_row(Text(f"  {mark}", style=style), Text(check.name, style=dim), text)
        if check.remedy:
            table.add_row("", "", Text(f"→ {console.printable(check.remedy)}", style=dim or "cyan"))
    return table


def _lines(checks: Iterator[Check], width: int) -> Iterator[str]:
    """Without marks and colours: a line for each check, and one for what to do."""
    for check in checks:
        yield f"  {_MARKS[check.state][1]:<8} {check.name:<{width}}  {check.text}\n"
        for line in (check.remedy or "").splitlines():
            yield f"  {'':<8} {'':<{width}}  -> {line}\n"


def _sum(report: Report) -> str:
    problems, notes = report.count("problem"), report.count("note")
    parts = [console.count(problems, "problem")] if problems else ["No problems"]
    if notes:
        parts.append(console.count(notes, "note"))
    return ", ".join(parts) + "."


@contextmanager
def _busy() -> Iterator[Progress]:
    """Says on a terminal what is being done, and leaves no trace of it."""
    if not sys.stderr.isatty():
        yield lambda task, done, total, unit: None
        return
    with console.err().status("Looking around", spinner="line") as status:
        yield lambda task, done, total, unit: status.update(task)
