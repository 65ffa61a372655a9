"""Tables of what an answer costs: energy, load time, memory."""

from __future__ import annotations

import statistics

from pocketlm.cli.console import count
from pocketlm_benchmarks.reports.formatting import (
    label,
    minutes,
    number,
    of_figure,
    optional_number,
    size,
    spread,
)
from pocketlm_benchmarks.reports.layout import EMPTY, NONE, Cell, Column, Table
from pocketlm_benchmarks.reports.speed import measured_engines, ratio
from pocketlm_benchmarks.result import OURS, EnergySetup, EngineResult, Measurement, Reference, Result


def provenance(energy: EnergySetup) -> str:
    """`estimated, scope process, source estimate`: what no figure of energy is shown without."""
    return f"{energy.kind}, scope {energy.scope}, source {energy.source}"


def energy_text(result: Result) -> tuple[str, ...]:
    """How energy was measured, or that it was not."""
    energy = result.energy
    if energy is None:
        return ("Energy was not measured.",)
    details = [f"Energy is {provenance(energy)}."]
    if energy.note:
        details.append(energy.note)
    if energy.resolution_j is not None:
        details.append(f"Resolution {number(energy.resolution_j)} J.")
    details.append(f"Shortest window to trust: {minutes(energy.least_window_s)}.")
    idle = [window.power_w for window in energy.idle if window.power_w is not None]
    if idle and energy.scope != "process":  # its processor time while it waits is not the machine's power
        details.append(f"Idle, engines loaded: {number(statistics.median(idle))} W.")
    checks = [f"{name} {number(joules)} J" for name, joules in energy.cross_check.items()]
    if checks:
        details.append(f"Other programs say of the whole run, never mixed with ours: {', '.join(checks)}.")
    return (" ".join(details),)


def absent_sources(result: Result) -> tuple[str, ...]:
    """Sources of energy figures that could not be used, and why."""
    return tuple(f"{name}: {why}" for name, why in result.energy.absent.items()) if result.energy else ()


def energy_table(result: Result) -> Table:
    """Joules of a query, a row for each case and engine."""
    columns = (
        Column("case", number=False),
        Column("engine", number=False),
        Column("J per query"),
        Column("net J", bare=True),
        Column("J/token"),
        Column("Wh per query", optional=True),
        Column("ratio"),
    )
    rows = []
    for case in result.cases:
        for engine in measured_engines(result):
            measurement = result.measurement(engine.name, case.name)
            if measurement is None or measurement.energy is None:
                continue
            energy = measurement.energy
            per_token = energy.per_prompt_token_j if case.kind == "prefill" else energy.per_new_token_j
            times = ratio(result, engine.name, case.name, "energy_j")
            rows.append(
                (
                    Cell(case.name),
                    Cell(label(engine)),
                    of_figure(energy.total_j),
                    of_figure(energy.marginal_j),
                    optional_number(per_token),
                    optional_number(energy.wh),
                    of_figure(times.better if times else None, "×"),
                )
            )
    caption = "Energy" if result.energy is None else f"Energy of a query ({provenance(result.energy)})"
    notes = (
        "J/token: of the prompt in a prefill case, of the answer elsewhere. Net: without the power of "
        "the idle machine. Ratio: 1.50× means that a peer takes one and a half times as much.",
    )
    return Table(caption, columns, tuple(rows), notes if rows else ())


def typical_query(result: Result) -> tuple[str, Measurement] | None:
    """The case that stands for a query, with our figures: a chat, else another workload, else any."""
    rank = {"workload": 1, "decode": 2, "prefill": 3}
    for case in sorted(result.cases, key=lambda c: 0 if c.name == "chat" else rank[c.kind]):
        measurement = result.measurement(OURS, case.name)
        if measurement is not None and measurement.energy is not None:
            return case.name, measurement
    return None


def reference_table(result: Result) -> Table:
    """A query's watt-hours beside published figures."""
    columns = (
        Column("what", number=False),
        Column("Wh"),
        Column("times a query here"),
        Column("year"),
        Column("source", number=False),
    )
    query = typical_query(result)
    if query is None or result.energy is None or not result.energy.references:
        return Table("A query beside published figures", columns, ())
    case, measurement = query
    wh = measurement.energy.wh if measurement.energy else 0.0
    ours = (
        Cell(f"a {case} query here"),
        Cell(number(wh)),
        Cell("1"),
        Cell(result.created[:4]),
        Cell(provenance(result.energy)),
    )
    rows = [_reference(reference, wh) for reference in result.energy.references]
    notes = ("Published figures cover other scopes (a data centre with its cooling): an order of magnitude.",)
    return Table("A query beside published figures", columns, (ours, *rows), notes)


def _reference(reference: Reference, wh: float) -> tuple[Cell, ...]:
    times = number(reference.wh / wh) if wh > 0 else NONE
    year, source = str(reference.year), reference.source
    return Cell(reference.what), Cell(number(reference.wh)), Cell(times), Cell(year), Cell(source)


def memory_table(result: Result) -> Table:
    """Load time and memory, a row for each engine."""
    columns = (
        Column("engine", number=False),
        Column("version", number=False, optional=True),
        Column("weights"),
        Column("cold s"),
        Column("warm s", bare=True),
        Column("peak"),
        Column("own"),
        Column("mapped"),
        Column("threads", optional=True),
    )
    rows = tuple(_memory(engine) for engine in measured_engines(result))
    notes = (
        "Load time cold (with the files dropped from the page cache) and warm. Peak: resident memory. Own: "
        "the anonymous part. Mapped: files, which the system can drop and read again.",
    )
    return Table("Load time and memory of an engine's process", columns, rows, notes)


def engine_notes(result: Result) -> tuple[str, ...]:
    """What to know of an engine's figures."""
    return tuple(f"{label(engine)}: {engine.note}" for engine in measured_engines(result) if engine.note)


def engine_rows(result: Result) -> dict[str, str]:
    """Which engine ran which weights."""
    return {label(engine): _weights(engine) for engine in measured_engines(result)}


def _weights(engine: EngineResult) -> str:
    digest = f", sha256 {engine.weights_sha256[:12]}…" if engine.weights_sha256 else ""
    return f"{engine.version}, {engine.weights}{digest}, {count(engine.threads, 'thread')}"


def _memory(engine: EngineResult) -> tuple[Cell, ...]:
    warm, memory = engine.load_warm_s, engine.memory
    return (
        Cell(label(engine)),
        Cell(engine.version),
        Cell(size(engine.weight_bytes)),
        optional_number(engine.load_cold_s),
        EMPTY if warm is None else spread(warm.median, warm.low, warm.high),
        Cell(size(memory.peak_bytes if memory else None)),
        Cell(size(memory.anonymous_bytes if memory else None)),
        Cell(size(memory.file_bytes if memory else None)),
        Cell(str(engine.threads)),
    )
