"""A result as sections, in the order in which a reader asks: how fast, how good, how much energy, why."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from pocketlm_benchmarks.reports import costs, setting, speed
from pocketlm_benchmarks.reports.formatting import headlines, of_figure, of_summary, quality_of, size, title
from pocketlm_benchmarks.reports.layout import EMPTY, NONE, Cell, Column, Section, Table
from pocketlm_benchmarks.result import OURS, Device, Result

SPEED, ENERGY, SUSTAINED = "Speed", "Energy", "Sustained load"
"""Titles of the sections that the page puts plots into."""

_PLACES = 3
_PERCENTAGE = re.compile(r"\d+(?=%)")


def sections(result: Result, *, narrow: bool = False) -> list[Section]:
    """All sections that say something; `narrow` for a terminal, where each engine gets a row of its own."""
    grid = speed.speed_list(result) if narrow else speed.speed_table(result)
    found = [
        Section(SPEED, tables=(grid, speed.latency_table(result))),
        Section("Quality", tables=(setting.quality_table([result]),)),
        _energy(result),
        Section("Load and memory", tables=(costs.memory_table(result),), points=costs.engine_notes(result)),
        _physics(result),
        _sustained(result),
        Section("Not measured", points=speed.not_measured(result)),
        Section("What to know", points=flags(result)),
    ]
    return [section for section in found if not section.empty]


def flags(result: Result) -> tuple[str, ...]:
    """The run's flags and those of single measurements, each once, with the places it concerns.

    Flags that differ only in a percentage become one with the range of it.
    """
    places: dict[str, list[str]] = {flag: [] for flag in result.flags}
    shares: dict[str, set[int]] = {}
    for measurement in result.measurements:
        where = f"{measurement.case} {measurement.engine}"
        for flag in (*measurement.flags, *(flag for block in measurement.blocks for flag in block.flags)):
            if flag in result.flags:
                continue
            kind = _PERCENTAGE.sub("{share}", flag, count=1)
            shares.setdefault(kind, set()).update(map(int, _PERCENTAGE.findall(flag)[:1]))
            if where not in places.setdefault(kind, []):
                places[kind].append(where)
    return tuple(
        f"{kind.replace('{share}', _range(shares.get(kind, set())))}{_where(where)}"
        for kind, where in places.items()
    )


def _range(shares: Collection[int]) -> str:
    if not shares:
        return ""
    return str(min(shares)) if len(shares) == 1 else f"{min(shares)} to {max(shares)}"


def _where(places: Sequence[str]) -> str:
    """` (chat llama.cpp)`; many places are only counted."""
    if not places:
        return ""
    return f" ({', '.join(places)})" if len(places) <= _PLACES else f" (in {len(places)} measurements)"


def overview(results: Sequence[Result]) -> Table:
    """A row for each result: what it costs in quality, memory and energy, and how fast it is."""
    cases = {kind: _common_case(results, kind) for kind in ("prefill", "decode")}
    query = costs.typical_query(results[0]) if results else None
    columns = (
        Column("model", number=False),
        Column("size"),
        Column("KL to fp32"),
        Column("same top token"),
        *(Column(f"{case} tok/s") for case in cases.values() if case),
        *((Column(f"J per {query[0]} query"),) if query else ()),
        Column("peak memory"),
    )
    names = [case for case in cases.values() if case]
    rows = tuple(_overview_row(result, names, query[0] if query else None) for result in results)
    measured = [result.energy for result in results if result.energy is not None]
    notes = [f"Energy is {kind}." for kind in dict.fromkeys(map(costs.provenance, measured))] if query else []
    return Table("All results at a glance (pocketlm)", columns, rows, tuple(notes))


def devices(results: Sequence[Result]) -> list[tuple[list[Device], list[Result]]]:
    """Results by the machine that they come from, with the states it was in."""
    groups: list[tuple[list[Device], list[Result]]] = []
    for result in results:
        group = next((g for g in groups if setting.same_device(g[0][0], result.device)), None)
        if group is None:
            groups.append(([result.device], [result]))
        else:
            group[0].append(result.device)
            group[1].append(result)
    return groups


def _energy(result: Result) -> Section:
    return Section(
        ENERGY,
        text=costs.energy_text(result),
        tables=(costs.energy_table(result), costs.reference_table(result)),
        points=tuple(f"Not used: {line}" for line in costs.absent_sources(result)),
    )


def _physics(result: Result) -> Section:
    heading = "What limits this model here"
    if result.physics is None:
        return Section(heading)
    return Section(
        heading,
        tables=(setting.physics_table(result.physics), setting.use_table(result.physics)),
        text=tuple(result.physics.limits),
    )


def _sustained(result: Result) -> Section:
    if result.sustained is None:
        return Section(SUSTAINED)
    return Section(
        SUSTAINED,
        text=setting.sustained_text(result.sustained),
        tables=(setting.sustained_table(result.sustained),),
    )


def _common_case(results: Sequence[Result], kind: str) -> str | None:
    """The first case of a kind that most results hold."""
    names = [case.name for result in results for case in result.cases if case.kind == kind]
    return max(dict.fromkeys(names), key=names.count, default=None)


def _overview_row(result: Result, cases: Sequence[str], query: str | None) -> tuple[Cell, ...]:
    quality = quality_of(result.model)
    cells = [
        Cell(title(result)),
        Cell(size(result.model.bundle_bytes)),
        Cell(f"{quality.kl_mean:.4f}" if quality else NONE),
        Cell(f"{quality.top1_agreement:.1%}" if quality else NONE),
    ]
    for name in cases:
        case = next((c for c in result.cases if c.name == name), None)
        metric = headlines(case)[0] if case else ""
        measurement = result.measurement(OURS, name)
        cells.append(of_summary(measurement.metrics.get(metric), metric) if measurement else EMPTY)
    if query:
        measurement = result.measurement(OURS, query)
        cells.append(of_figure(measurement.energy.total_j if measurement and measurement.energy else None))
    ours = next((engine for engine in result.engines if engine.name == OURS), None)
    cells.append(Cell(size(ours.memory.peak_bytes if ours and ours.memory else None)))
    return tuple(cells)
