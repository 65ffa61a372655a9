"""Numbers as a person reads them: three significant digits, units, intervals as precise as their value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pocketlm.files import readable_size
from pocketlm_benchmarks.figures import CONCURRENT_HEADLINES, HEADLINES
from pocketlm_benchmarks.reports.layout import EMPTY, NONE, Cell
from pocketlm_benchmarks.result import (
    OURS,
    Case,
    EngineResult,
    Figure,
    ModelInfo,
    QualityFigures,
    Result,
    Summary,
)

DIGITS = 3


@dataclass(frozen=True)
class Metric:
    """How a metric of the result is shown; `scale` turns its unit there into `unit`."""

    label: str
    unit: str
    scale: float = 1.0


METRICS = {
    "ttft_s": Metric("TTFT", "ms", 1000),
    "tpot_s": Metric("TPOT", "ms", 1000),
    "itl_s": Metric("ITL", "ms", 1000),
    "e2el_s": Metric("E2EL", "s"),
    "prefill_tokens_per_s": Metric("prefill", "tok/s"),
    "decode_tokens_per_s": Metric("decode", "tok/s"),
    "throughput_tokens_per_s": Metric("throughput", "tok/s"),
    "energy_j": Metric("energy", "J"),
}


def headlines(case: Case) -> tuple[str, ...]:
    """The metrics that sum up a case, the best first; of many queries at once it is their throughput."""
    return CONCURRENT_HEADLINES if case.concurrent > 1 else HEADLINES[case.kind]


def places(value: float, digits: int = DIGITS) -> int:
    """Decimal places that show `digits` significant digits of `value`."""
    if value == 0 or not math.isfinite(value):
        return 0
    rounded = float(f"{value:.{digits - 1}e}")  # 9.996 has one digit more once it is rounded
    return max(0, digits - 1 - math.floor(math.log10(abs(rounded))))


def number(value: float, digits: int = DIGITS) -> str:
    """`1,274`, `89.1`, `0.0108`: never an exponent."""
    return f"{value:,.{places(value, digits)}f}".replace("-", "−")


def spread(
    value: float, low: float | None, high: float | None, *, scale: float = 1.0, unit: str = ""
) -> Cell:
    """A value with its interval, which gets as many decimal places as the value."""
    text = number(value * scale) + unit
    if low is None or high is None:
        return Cell(text)
    precision = places(value * scale)
    ends = [f"{end * scale:,.{precision}f}".replace("-", "−") for end in (low, high)]
    return Cell(text, (" to " if min(low, high) < 0 else "–").join(ends))


def of_summary(summary: Summary | None, metric: str) -> Cell:
    """A metric's median, in the metric's unit but without naming it."""
    if summary is None:
        return EMPTY
    return spread(summary.median, summary.low, summary.high, scale=METRICS[metric].scale)


def of_figure(figure: Figure | None, unit: str = "") -> Cell:
    """A figure, with `unit` right behind the value."""
    return EMPTY if figure is None else spread(figure.value, figure.low, figure.high, unit=unit)


def optional_number(value: float | None, *, scale: float = 1.0, digits: int = DIGITS) -> Cell:
    """A number without an interval, or the sign for none."""
    return EMPTY if value is None else Cell(number(value * scale, digits))


def size(count: int | None) -> str:
    """`168.3 MB`, or the sign for none."""
    return NONE if count is None else readable_size(count)


def per_second(value: float, unit: str) -> str:
    """`14.2 GB/s`, `1.21 TFLOP/s`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{number(value / factor)} {prefix}{unit}/s"
    return f"{number(value)} {unit}/s"


def minutes(seconds: float) -> str:
    """`45 s`, `12 min 30 s`."""
    whole, rest = divmod(round(seconds), 60)
    return f"{rest} s" if not whole else f"{whole} min" + (f" {rest} s" if rest else "")


def label(engine: EngineResult) -> str:
    """`llama.cpp Q8_0`."""
    known = engine.precision not in {"", "unknown"} and engine.precision not in engine.name
    return f"{engine.name} {engine.precision}" if known else engine.name


def quality_of(model: ModelInfo) -> QualityFigures | None:
    """What this run measured, else what the exporter did."""
    return model.quality_measured or model.quality_manifest


def kl_of(result: Result, engine: str) -> str:
    """The divergence that stands beside an engine's speed; a peer's is not measured."""
    quality = quality_of(result.model) if engine == OURS else None
    return NONE if quality is None else f"{quality.kl_mean:.4f}"


def title(result: Result) -> str:
    """`smollm2-135m int8`."""
    return f"{result.model.name} {result.model.precision}"


def distinct(texts: Iterable[str]) -> str:
    """Each text once, in order, joined by semicolons."""
    return "; ".join(dict.fromkeys(text for text in texts if text))
