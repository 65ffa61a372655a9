"""The page's plots: latency distributions, ratios, energy, load over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocketlm_benchmarks.reports.costs import provenance
from pocketlm_benchmarks.reports.formatting import METRICS, label, number, of_figure
from pocketlm_benchmarks.reports.layout import plain
from pocketlm_benchmarks.reports.speed import headline, measured_engines, ratio
from pocketlm_benchmarks.reports.svg import Drawing, Point, Scale, text_width, tick_text
from pocketlm_benchmarks.result import (
    OURS,
    Case,
    EngineResult,
    Figure,
    Ratio,
    Result,
    Sustained,
    SustainedPoint,
)

WIDTH = 460.0
_RIGHT = 14.0
_ROW = 21.0
_CURVE_POINTS = 160
_LOG_FROM = 6.0  # a span of values from which on a logarithmic axis reads better


@dataclass(frozen=True)
class Plot:
    title: str
    note: str
    svg: str


def result_plots(result: Result) -> dict[str, list[Plot]]:
    """The plots of one result by what they belong to: speed, energy, sustained; without what lacks data."""
    speed = [ratio_plot(result), latency_plot(result, "itl_s"), latency_plot(result, "ttft_s")]
    sustained = sustained_plot(result.sustained) if result.sustained else None
    found = {"speed": speed, "energy": [energy_plot(result)], "sustained": [sustained]}
    return {name: [plot for plot in plots if plot is not None] for name, plots in found.items()}


def latency_plot(result: Result, metric: str) -> Plot | None:
    """Which share of a metric's samples took at most how long, a curve for each engine."""
    case = _case_with_samples(result, metric)
    if case is None:
        return None
    series = {n: values for n, _, values in _samples(result, case, metric)}
    labels = {n: label(engine) for n, engine, _ in _samples(result, case, metric)}
    shown = METRICS[metric]
    name = {"itl_s": "Gaps between tokens", "ttft_s": "Time to the first token"}[metric]
    drawing = Drawing(WIDTH, 300, f"{name}, {case}: distribution for {', '.join(labels.values())}")
    top = _legend(drawing, labels, 16)
    # The last half per cent of a long tail would squeeze the rest.
    ends = [np.quantile(values, [0, 0.995]) * shown.scale for values in series.values()]
    low, high = float(min(e[0] for e in ends)) * 0.98, float(max(e[1] for e in ends)) * 1.02
    x = Scale(low, high, 50, WIDTH - _RIGHT, log=high > _LOG_FROM * low > 0)
    y = Scale(0, 100, 250, top)
    drawing.x_axis(x, top, 250, f"{shown.unit}")
    for share in (0, 25, 50, 75, 100):
        drawing.line((x.start, y(share)), (x.end, y(share)), "grid")
        drawing.text((x.start - 7, y(share) + 4), f"{share} %", "tick", "end", 12)
    for n, values in series.items():
        drawing.path(list(_steps(values * shown.scale, x, y)), f"curve s{n}")
        median = float(np.median(values)) * shown.scale
        tip = f"{labels[n]}: median {number(median)} {shown.unit}"
        drawing.mark(n, (x(median), y(50)), f"mark s{n}", tip)
    counts = ", ".join(f"{labels[n]} {len(values):,}" for n, values in series.items())
    note = f"{case}. Share of samples that took at most so long; further left is better. Samples: {counts}."
    return Plot(name, note, str(drawing))


def ratio_plot(result: Result) -> Plot | None:
    """How many times faster ours is, a row for each case and peer."""
    rows = list(_ratios(result))
    if not rows:
        return None
    values = [v for _, _, r in rows for v in (r.better.value, r.better.low, r.better.high) if v is not None]
    low, high = min(0.8, min(values) * 0.92), max(1.25, max(values) * 1.08)
    left = 14 + max(text_width(case.name) for _, case, _ in rows)
    peers = {n: label(result.engines[n]) for n, _, _ in rows}
    drawing = Drawing(WIDTH, 0, "Ratios of speed to the peers")
    top = _legend(drawing, peers, 16)
    bottom = top + 8 + _ROW * len(rows)
    drawing.height = bottom + 44
    x = Scale(low, high, left, WIDTH - 62, log=True)
    drawing.x_axis(x, top, bottom, "times as fast as the peer")
    drawing.line((x(1), top), (x(1), bottom), "axis")
    above = ""
    for i, (n, case, found) in enumerate(rows):
        y = top + 8 + _ROW * (i + 0.5)
        if case.name != above:
            drawing.text((left - 8, y + 4), case.name, anchor="end")
            if above:
                drawing.line((0, y - _ROW / 2), (WIDTH, y - _ROW / 2), "grid")
            above = case.name
        tip = f"{case.name} against {peers[n]}: {plain(of_figure(found.better, '×'))}"
        _whisker(drawing, x, y, found.better, n)
        drawing.mark(n, (x(found.better.value), y), f"mark s{n}", tip)
        drawing.text((WIDTH - 4, y + 4), f"{number(found.better.value)}×", "value", "end")
    note = "Median of the pairs measured in turn, with its 95 % interval. Right of 1, pocketlm is faster."
    return Plot("Beside the peers", note, str(drawing))


def energy_plot(result: Result) -> Plot | None:
    """Joules of a query, a bar for each case and engine."""
    rows = [
        (n, engine, case, found.energy)
        for case in result.cases
        for n, engine in _engines(result)
        if (found := result.measurement(engine.name, case.name)) and found.energy
    ]
    if not rows or result.energy is None:
        return None
    names = {n: label(engine) for n, engine, _, _ in rows}
    left = 14 + max(text_width(case.name) for _, _, case, _ in rows)
    ends = [max(e.total_j.value, e.total_j.high or 0.0) for _, _, _, e in rows]
    drawing = Drawing(WIDTH, 0, f"Energy of a query by case and engine, {provenance(result.energy)}")
    top = _legend(drawing, names, 16)
    x = Scale(0, max(ends) or 1.0, left, WIDTH - 58)
    cases = [case.name for _, _, case, _ in rows]
    bottom = top + _ROW * len(rows) + 8 * len(set(cases))
    drawing.x_axis(x, top, bottom, "J per query")
    y = top
    for i, (n, engine, case, energy) in enumerate(rows):
        if i == 0 or cases[i - 1] != case.name:
            y += 8
            drawing.text((left - 8, y + 15), case.name, anchor="end")
        tip = f"{case.name}, {label(engine)}: {plain(of_figure(energy.total_j, ' J'))}"
        drawing.rect(left, y + 3, x(energy.total_j.value) - left, _ROW - 6, f"bar s{n}", tip)
        if energy.marginal_j is not None and energy.marginal_j.value > 0:
            drawing.rect(left, y + 3, x(energy.marginal_j.value) - left, _ROW - 6, f"inner s{n}", tip)
        _whisker(drawing, x, y + _ROW / 2, energy.total_j, n)
        drawing.text((WIDTH - 4, y + 15), number(energy.total_j.value), "value", "end")
        y += _ROW
    drawing.height = bottom + 44
    note = (
        f"{provenance(result.energy).capitalize()}. The full bar is the total, its strong part what is above "
        "idle; the whisker is the interval."
    )
    return Plot("Joules of a query", note, str(drawing))


_PANELS: tuple[tuple[str, Callable[[SustainedPoint], float | None]], ...] = (
    ("tok/s", lambda p: p.decode_tokens_per_s),
    ("W", lambda p: p.power_w),
    ("°C", lambda p: p.temperature_c),
    ("GHz", lambda p: None if p.frequency_hz is None else p.frequency_hz / 1e9),
)


def sustained_plot(sustained: Sustained) -> Plot | None:
    """Rate, watts, temperature and frequency over time, with gaps where a sensor says nothing."""
    told = [(unit, f) for unit, f in _PANELS if any(f(point) is not None for point in sustained.points)]
    silent = [unit for unit, _ in _PANELS if unit not in dict(told)]
    if len(sustained.points) < 2:
        return None
    height = 108.0
    drawing = Drawing(WIDTH, 50 + height * len(told), "Load over time: " + ", ".join(u for u, _ in told))
    x = Scale(0, sustained.duration_s / 60, 50, WIDTH - _RIGHT)
    for i, (unit, value) in enumerate(told):
        top, bottom = 20 + i * height, 20 + i * height + height - 26
        points = [(point.t_s / 60, value(point)) for point in sustained.points]
        values = [v for _, v in points if v is not None]
        margin = 0.1 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
        # A rate from zero shows how much of it is lost; degrees and watts have no such zero.
        low = 0.0 if i == 0 else min(values) - margin
        y = Scale(low, max(values) + margin, bottom, top)
        drawing.y_axis(y, x.start, x.end, 3)
        drawing.text((x.start, top - 6), unit, "label")
        for part in _parts(points):
            drawing.path([(x(t), y(v)) for t, v in part], f"curve s{i}")
    bottom = 20 + height * len(told) - 26
    for tick in x.ticks(8):
        drawing.text((x(tick), bottom + 18), tick_text(tick), "tick", "middle", 12)
    drawing.text(((x.start + x.end) / 2, bottom + 38), "minutes", "label", "middle")
    missing = f" No sensor for {', '.join(silent)}." if silent else ""
    note = f"The last third runs at {sustained.last_over_first:.1%} of the first third's rate.{missing}"
    return Plot("Load without a pause", note, str(drawing))


def _engines(result: Result) -> Iterator[tuple[int, EngineResult]]:
    """The engines that ran, each with the number of its colour, which it keeps in all plots."""
    ran = measured_engines(result)
    yield from ((n, engine) for n, engine in enumerate(result.engines) if engine in ran)


def _case_with_samples(result: Result, metric: str) -> str | None:
    """The case that shows a metric best: a chat, else another workload, else the last that has samples."""
    rank = {"workload": 1, "prefill": 2, "decode": 2}
    for case in sorted(result.cases, key=lambda c: 0 if c.name == "chat" else rank[c.kind]):
        if any(len(values) > 1 for _, _, values in _samples(result, case.name, metric)):
            return case.name
    return None


def _samples(
    result: Result, case: str, metric: str
) -> Iterator[tuple[int, EngineResult, NDArray[np.float64]]]:
    for n, engine in _engines(result):
        measurement = result.measurement(engine.name, case)
        if measurement is not None and measurement.samples.get(metric):
            yield n, engine, np.sort(np.asarray(measurement.samples[metric], np.float64))


def _steps(values: NDArray[np.float64], x: Scale, y: Scale) -> Iterator[Point]:
    """The distribution's staircase, thinned to what an eye can see."""
    count = len(values)
    kept = sorted({round(i) for i in np.linspace(0, count - 1, min(count, _CURVE_POINTS))})
    reached = y(0)
    for i in kept:
        place = x(float(values[i]))
        yield (place, reached)
        reached = y(100 * (i + 1) / count)
        yield (place, reached)


def _ratios(result: Result) -> Iterator[tuple[int, Case, Ratio]]:
    for case in result.cases:
        metric = headline(result, case)
        for n, engine in _engines(result):
            found = ratio(result, engine.name, case.name, metric) if engine.name != OURS else None
            if found is not None:
                yield n, case, found


def _legend(drawing: Drawing, labels: dict[int, str], top: float) -> float:
    """The engines' marks and names in as many lines as they need; where the plot may begin."""
    x, y = 8.0, top
    for n, name in labels.items():
        width = 26 + text_width(name)
        if x > 8 and x + width > drawing.width:
            x, y = 8.0, y + 20
        drawing.mark(n, (x + 6, y - 4), f"mark s{n}")
        drawing.text((x + 17, y), name)
        x += width + 6
    return y + 14


def _whisker(drawing: Drawing, x: Scale, y: float, ends: Figure, series: int) -> None:
    low, high = ends.low, ends.high
    if low is None or high is None:
        return
    drawing.line((x(low), y), (x(high), y), f"whisker s{series}")
    for end in (low, high):
        drawing.line((x(end), y - 4), (x(end), y + 4), f"whisker s{series}")


def _parts(points: Sequence[tuple[float, float | None]]) -> Iterator[list[Point]]:
    """The stretches in which each point has a value."""
    part: list[Point] = []
    for t, value in points:
        if value is None:
            if len(part) > 1:
                yield part
            part = []
        else:
            part.append((t, value))
    if len(part) > 1:
        yield part
