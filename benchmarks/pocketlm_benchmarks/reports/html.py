"""Results as one page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2

from pocketlm_benchmarks.reports import costs, setting
from pocketlm_benchmarks.reports.formatting import (
    distinct,
    headlines,
    of_figure,
    of_summary,
    quality_of,
    size,
    title,
)
from pocketlm_benchmarks.reports.frontier import frontier_plots
from pocketlm_benchmarks.reports.layout import EMPTY, Cell, Section, Table, pairs
from pocketlm_benchmarks.reports.plots import Plot, result_plots
from pocketlm_benchmarks.reports.sections import ENERGY, SPEED, SUSTAINED, devices, overview, sections
from pocketlm_benchmarks.reports.speed import case_table
from pocketlm_benchmarks.result import OURS, Device, Result

_FOLDER = resources.files("pocketlm_benchmarks.reports") / "templates"
_PLOTS = {SPEED: "speed", ENERGY: "energy", SUSTAINED: "sustained"}


@dataclass(frozen=True)
class _Tile:
    """A headline figure."""

    label: str
    cell: Cell
    unit: str
    detail: str = ""


@dataclass(frozen=True)
class _Part:
    section: Section
    plots: list[Plot]


@dataclass(frozen=True)
class _Run:
    anchor: str
    title: str
    line: str
    tiles: list[_Tile]
    parts: list[_Part]
    repeat: list[Table]


@dataclass(frozen=True)
class _Group:
    """The results of one device."""

    name: str
    device: Table
    overview: Table | None
    frontier: list[Plot]
    runs: list[_Run]


def to_html(results: Sequence[Result]) -> str:
    """The page. Everything that comes from a result is escaped; the policy in it allows no script at all."""
    style = (_FOLDER / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((_FOLDER / "report.html.jinja2").read_text(encoding="utf-8"))
    return template.render(
        style=style,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        heading=distinct(result.model.name for result in results) or "no results",
        when=distinct(result.created[:10] for result in results),
        groups=list(_groups(results)),
    )


def _groups(results: Sequence[Result]) -> Iterator[_Group]:
    number = 0
    for states, found in devices(results):
        runs = [_run(result, f"run-{number + i}") for i, result in enumerate(found)]
        number += len(found)
        yield _group(states, found, runs)


def _group(states: Sequence[Device], found: Sequence[Result], runs: list[_Run]) -> _Group:
    return _Group(
        name=states[0].processor,
        device=setting.device_table(states),
        overview=overview(found) if len(found) > 1 else None,
        frontier=frontier_plots(found),
        runs=runs,
    )


def _run(result: Result, anchor: str) -> _Run:
    plots = result_plots(result)
    repeat = setting.repeat_table(result)
    engines = pairs("Which engine ran which weights", costs.engine_rows(result))
    return _Run(
        anchor=anchor,
        title=title(result),
        line=setting.model_line(result),
        tiles=list(_tiles(result)),
        parts=[_Part(section, plots.get(_PLOTS.get(section.title, ""), [])) for section in sections(result)],
        repeat=[repeat, engines, case_table(result)],
    )


def _tiles(result: Result) -> Iterator[_Tile]:
    """What a reader wants first; quality stands beside speed."""
    for kind, name in (("decode", "Decode"), ("prefill", "Prefill")):
        case = next((case for case in result.cases if case.kind == kind), None)
        measurement = result.measurement(OURS, case.name) if case else None
        if case is not None and measurement is not None:
            metric = headlines(case)[0]
            cell = of_summary(measurement.metrics.get(metric), metric)
            yield _Tile(name, cell, "tok/s", f"{case.name}, median")
    quality = quality_of(result.model)
    divergence = Cell("not measured") if quality is None else Cell(f"{quality.kl_mean:.4f}")
    agreement = f"same top token {quality.top1_agreement:.1%}" if quality else ""
    yield _Tile("KL to fp32", divergence, "nats" if quality else "", agreement)
    query = costs.typical_query(result)
    if query is not None and result.energy is not None and query[1].energy is not None:
        joules = of_figure(query[1].energy.total_j)
        yield _Tile(f"Energy, {query[0]} query", joules, "J", costs.provenance(result.energy))
    ours = next((engine for engine in result.engines if engine.name == OURS), None)
    peak = ours.memory.peak_bytes if ours and ours.memory else None
    yield _Tile("Peak memory", EMPTY if peak is None else Cell(size(peak)), "", "resident")
