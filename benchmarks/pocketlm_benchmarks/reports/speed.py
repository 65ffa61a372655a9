"""Tables of speed and latency. The divergence from fp32 stands in each: speed alone is worth nothing."""

from __future__ import annotations

from collections.abc import Iterator

from pocketlm_benchmarks.reports.formatting import (
    METRICS,
    headlines,
    kl_of,
    label,
    number,
    of_figure,
    of_summary,
)
from pocketlm_benchmarks.reports.layout import EMPTY, NONE, Cell, Column, Table
from pocketlm_benchmarks.result import OURS, Case, EngineResult, Measurement, Ratio, Result, Summary

_LATENCIES = {"ttft_s", "tpot_s", "itl_s", "e2el_s"}


def measured_engines(result: Result) -> list[EngineResult]:
    """Those that ran."""
    return [engine for engine in result.engines if engine.skipped is None]


def headline(result: Result, case: Case) -> str | None:
    """The metric that sums up the case, of those that our engine tells, else any engine."""
    told: list[Measurement] = [m for m in result.measurements if m.case == case.name]
    told.sort(key=lambda m: m.engine != OURS)
    for measurement in told:
        for metric in headlines(case):
            if metric in measurement.metrics:
                return metric
    return None


def ratio(result: Result, peer: str, case: str, metric: str | None) -> Ratio | None:
    """Ours beside a peer's on a case."""
    wanted = (peer, case, metric)
    return next((r for r in result.ratios if (r.peer, r.case, r.metric) == wanted), None)


def speed_table(result: Result) -> Table:
    """A row for each case, a column for each engine: the median of the case's headline metric."""
    engines = measured_engines(result)
    peers = [engine for engine in engines if engine.name != OURS]
    columns = [Column("case", number=False), Column("what", number=False)]
    columns += [Column(label(engine)) for engine in engines]
    columns += [Column(f"ours against {label(peer)}") for peer in peers]
    quality = [Cell("KL to fp32"), Cell("nats")]
    quality += [Cell(kl_of(result, engine.name)) for engine in engines] + [EMPTY for _ in peers]
    rows = [tuple(quality)]
    for case in result.cases:
        metric = headline(result, case)
        unit = NONE if metric is None else _named(metric)
        cells = [_value(result, engine.name, case.name, metric) for engine in engines]
        ratios = [_times(ratio(result, peer.name, case.name, metric)) for peer in peers]
        rows.append((Cell(case.name), Cell(unit), *cells, *ratios))
    return Table("Medians (95 % intervals)", tuple(columns), tuple(rows), _notes(result))


def speed_list(result: Result) -> Table:
    """The same with a row for each case and engine, which fits a terminal however many engines there are."""
    columns = (
        Column("case", number=False),
        Column("engine", number=False),
        Column("KL"),
        Column("median"),
        Column("ratio"),
        Column("rounds", optional=True),
    )
    rows = []
    for case in result.cases:
        metric = headline(result, case)
        if metric is None:
            continue
        for engine, _ in _rows_of(result, case):
            times = ratio(result, engine.name, case.name, metric)
            rows.append(
                (
                    Cell(f"{case.name}, {_named(metric)}"),
                    Cell(label(engine)),
                    Cell(kl_of(result, engine.name)),
                    _value(result, engine.name, case.name, metric),
                    _times(times),
                    Cell(str(times.n)) if times else EMPTY,
                )
            )
    return Table("Medians (95 % intervals)", columns, tuple(rows), _notes(result))


def latency_table(result: Result) -> Table:
    """All latencies, a row for each case and engine."""
    columns = (
        Column("case", number=False),
        Column("engine", number=False),
        Column("KL"),
        Column("TTFT ms", bare=True),
        Column("TPOT ms", bare=True),
        Column("ITL p50", bare=True),
        Column("p95"),
        Column("p99"),
        Column("E2EL s", bare=True),
        Column("tok/s", bare=True, optional=True),
        Column("queries", optional=True),
    )
    rows = []
    for case in result.cases:
        for engine, measurement in _rows_of(result, case):
            metrics = measurement.metrics
            if not _LATENCIES & metrics.keys():
                continue
            gaps = metrics.get("itl_s")
            rows.append(
                (
                    Cell(case.name),
                    Cell(label(engine)),
                    Cell(kl_of(result, engine.name)),
                    of_summary(metrics.get("ttft_s"), "ttft_s"),
                    of_summary(metrics.get("tpot_s"), "tpot_s"),
                    of_summary(gaps, "itl_s"),
                    _milliseconds(gaps.p95 if gaps else None),
                    _milliseconds(gaps.p99 if gaps else None),
                    of_summary(metrics.get("e2el_s"), "e2el_s"),
                    _rate(metrics),
                    Cell(str(sum(block.queries for block in measurement.blocks))),
                )
            )
    return Table(
        "Latencies: medians (95 % intervals)",
        columns,
        tuple(rows),
        (
            "TTFT: time to the first token. TPOT: (E2EL − TTFT) / (tokens − 1). ITL: the gaps between "
            "tokens, in ms, p95 from 20 and p99 from 100 samples on. E2EL: the whole answer. KL: nats per "
            "token from fp32.",
        ),
    )


def case_table(result: Result) -> Table:
    """What was asked."""
    columns = (
        Column("case", number=False),
        Column("prompt tokens"),
        Column("new tokens"),
        Column("at once"),
        Column("sha256", number=False, optional=True),
        Column("what", number=False),
    )
    rows = tuple(
        (
            Cell(case.name),
            Cell(number(case.prompt_tokens)),
            Cell(f"{case.new_tokens:,}"),
            Cell(str(case.concurrent)),
            Cell(case.sha256[:12]),
            Cell(case.description or NONE),
        )
        for case in result.cases
    )
    return Table("What was asked; equal hashes are equal work", columns, rows)


def not_measured(result: Result) -> tuple[str, ...]:
    """Engines and cases without figures, each with its reason."""
    engines = [f"{label(e)}: {e.skipped}" for e in result.engines if e.skipped is not None]
    cases = [f"{m.engine} on {m.case}: {m.skipped}" for m in result.measurements if m.skipped is not None]
    return (*engines, *cases)


def _rows_of(result: Result, case: Case) -> Iterator[tuple[EngineResult, Measurement]]:
    for engine in measured_engines(result):
        measurement = result.measurement(engine.name, case.name)
        if measurement is not None and measurement.skipped is None:
            yield engine, measurement


def _value(result: Result, engine: str, case: str, metric: str | None) -> Cell:
    measurement = result.measurement(engine, case)
    if measurement is None or metric is None:
        return EMPTY
    return of_summary(measurement.metrics.get(metric), metric)


def _times(found: Ratio | None) -> Cell:
    return of_figure(found.better if found else None, "×")


def _rate(metrics: dict[str, Summary]) -> Cell:
    for metric in ("throughput_tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s"):
        if metric in metrics:
            return of_summary(metrics[metric], metric)
    return EMPTY


def _milliseconds(seconds: float | None) -> Cell:
    return EMPTY if seconds is None else Cell(number(seconds * 1000))


def _named(metric: str) -> str:
    return f"{METRICS[metric].label} {METRICS[metric].unit}"


def _notes(result: Result) -> tuple[str, ...]:
    notes = ["KL: nats per token from the fp32 graph of the same weights."]
    if any(engine.name != OURS for engine in measured_engines(result)):
        notes.append("A peer's KL is not measured.")
        notes.append("Ratio: 1.50× means that ours is one and a half times as fast, from pairs in turn.")
    outside = [label(e) for e in measured_engines(result) if not e.sampling_included]
    if outside:
        notes.append(f"Without sampling and detokenization: {', '.join(outside)}.")
    return (" ".join(notes),)
