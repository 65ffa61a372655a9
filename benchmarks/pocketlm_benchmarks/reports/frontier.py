"""What a precision buys: divergence from fp32 against speed and against energy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pocketlm_benchmarks.compare import KL_FLOOR
from pocketlm_benchmarks.reports.costs import provenance, typical_query
from pocketlm_benchmarks.reports.formatting import headlines, label, number, quality_of
from pocketlm_benchmarks.reports.plots import WIDTH, Plot
from pocketlm_benchmarks.reports.svg import Drawing, Scale, text_width
from pocketlm_benchmarks.result import OURS, Result

_TOP, _ALIKE, _LANE = 14.0, 190.0, 20.0
_LEFT, _RIGHT = 58.0, 16.0
_LABEL_OFFSETS = (-9, -27, 9, -45, 27)  # of a label's top to the middle of its mark

_Box = tuple[float, float, float, float]  # left, top, width, height


@dataclass(frozen=True)
class _Spot:
    """One engine on one model."""

    name: str
    series: int
    kl: float | None
    value: float


def frontier_plots(results: Sequence[Result]) -> list[Plot]:
    """For each model KL against decode speed and KL against joules, where there is anything to compare."""
    plots = []
    for model in dict.fromkeys(result.model.name for result in results):
        found = [result for result in results if result.model.name == model]
        for build in (_speed, _energy):
            plot = build(model, found)
            if plot is not None:
                plots.append(plot)
    return plots


def _speed(model: str, results: Sequence[Result]) -> Plot | None:
    cases = [case for result in results for case in result.cases if case.kind == "decode"]
    if not cases:
        return None
    names = [case.name for case in cases]
    case = max(cases, key=lambda c: names.count(c.name))
    metric = headlines(case)[0]

    def rate(result: Result, engine: str) -> float | None:
        measurement = result.measurement(engine, case.name)
        found = measurement.metrics.get(metric) if measurement else None
        return found.median if found else None

    note = f"{case.name}, medians. Further right and further down is better."
    return _plot(f"{model}: quality against speed", note, list(_spots(results, rate)), "decode tok/s")


def _energy(model: str, results: Sequence[Result]) -> Plot | None:
    query = next((found for result in results if (found := typical_query(result))), None)
    setups = {provenance(result.energy) for result in results if result.energy is not None}
    if query is None or len(setups) != 1:
        return None  # different scopes are never compared
    case = query[0]

    def joules(result: Result, engine: str) -> float | None:
        measurement = result.measurement(engine, case)
        return measurement.energy.total_j.value if measurement and measurement.energy else None

    note = f"{case}, {setups.pop()}. Further left and further down is better."
    return _plot(f"{model}: quality against energy", note, list(_spots(results, joules)), "J per query")


def _spots(results: Sequence[Result], value_of: Callable[[Result, str], float | None]) -> Iterator[_Spot]:
    for result in results:
        quality = quality_of(result.model)
        for n, engine in enumerate(result.engines):
            value = value_of(result, engine.name)
            if value is not None:
                known = _kl(quality.kl_mean) if quality is not None and engine.name == OURS else None
                yield _Spot(label(engine), n, known, value)


def _kl(value: float) -> float:
    """What cannot be told from no divergence at all is none."""
    return 0.0 if value < KL_FLOOR else value


def _plot(title: str, note: str, spots: Sequence[_Spot], unit: str) -> Plot | None:
    if len({spot.name for spot in spots}) < 2:
        return None
    known = [spot for spot in spots if spot.kl is not None]
    unknown = [spot for spot in spots if spot.kl is None]
    lanes = list(dict.fromkeys(spot.name for spot in unknown))
    lanes_top = _ALIKE + 12
    bottom = (lanes_top + 22 + _LANE * len(lanes)) if lanes else _ALIKE + 12
    drawing = Drawing(WIDTH, bottom + 44, f"{title}: KL to fp32 against {unit}")
    values = [spot.value for spot in spots]
    margin = 0.12 * (max(values) - min(values)) or 0.1 * values[0] or 1.0
    x = Scale(max(0.0, min(values) - margin), max(values) + margin, _LEFT, WIDTH - _RIGHT)
    drawing.x_axis(x, _TOP, bottom, unit)
    _draw_known(drawing, x, known, unit)
    if lanes:
        drawing.line((_LEFT, lanes_top), (WIDTH - _RIGHT, lanes_top), "axis")
        drawing.text((_LEFT + 6, lanes_top + 16), "KL not measured", "tick", font=12)
    for spot in unknown:
        y = lanes_top + 30 + _LANE * lanes.index(spot.name)
        drawing.mark(spot.series, (x(spot.value), y), f"mark hollow s{spot.series}", _tip(spot, unit))
    for n, name in enumerate(lanes):
        last = max((spot for spot in unknown if spot.name == name), key=lambda spot: spot.value)
        first = min((spot for spot in unknown if spot.name == name), key=lambda spot: spot.value)
        y = lanes_top + 34 + _LANE * n
        if x(last.value) + 12 + text_width(name) < WIDTH:
            drawing.text((x(last.value) + 11, y), name)
        else:
            drawing.text((x(first.value) - 11, y), name, anchor="end")
    return Plot(title, note, str(drawing))


def _draw_known(drawing: Drawing, x: Scale, spots: Sequence[_Spot], unit: str) -> None:
    """Points by KL on a logarithmic axis, which has no zero: fp32 gets a line of its own below."""
    positive = [spot.kl for spot in spots if spot.kl]
    zero = any(spot.kl == 0 for spot in spots)
    drawing.text((_LEFT - 44, _TOP - 1), "KL", "label")
    place = {0.0: _ALIKE}
    if zero:
        drawing.line((_LEFT, _ALIKE), (WIDTH - _RIGHT, _ALIKE), "grid")
        drawing.text((_LEFT - 7, _ALIKE + 4), "0", "tick", "end", 12)
    if positive:
        y = Scale(min(positive) / 2, max(positive) * 2, _ALIKE - 24 if zero else _ALIKE, _TOP + 12, log=True)
        drawing.y_axis(y, _LEFT, WIDTH - _RIGHT)
        place |= {kl: y(kl) for kl in positive}
    taken = [(x(spot.value) - 7, place[spot.kl or 0.0] - 7, 14.0, 14.0) for spot in spots]
    for spot in spots:
        centre = (x(spot.value), place[spot.kl or 0.0])
        drawing.mark(spot.series, centre, f"mark s{spot.series}", _tip(spot, unit), radius=6)
        box = _free_place(centre, text_width(spot.name), taken)
        taken.append(box)
        drawing.text((box[0], box[1] + 13), spot.name)


def _free_place(centre: tuple[float, float], width: float, taken: Sequence[_Box]) -> _Box:
    """Where a label stands beside its mark without touching another, if there is such a place."""
    x, y = centre
    around = [(left, y + down) for down in _LABEL_OFFSETS for left in (x + 11, x - 11 - width)]
    around[2:2] = [(x - width / 2, y - 27), (x - width / 2, y + 9)]
    boxes = [(left, top, width, 17.0) for left, top in around]
    inside = [box for box in boxes if box[0] >= _LEFT and box[0] + width <= WIDTH - 2]
    free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
    return next(iter(free or inside or boxes))


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _tip(spot: _Spot, unit: str) -> str:
    kl = "KL not measured" if spot.kl is None else f"KL {spot.kl:.4f}"
    return f"{spot.name}: {number(spot.value)} {unit}, {kl}"
