"""Results as CSV for fleets: a line for each result, engine, case and metric, in columns that stay."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pocketlm_benchmarks.reports.formatting import quality_of
from pocketlm_benchmarks.result import OURS, EngineResult, Figure, Measurement, Result, Summary

COLUMNS = (
    *("created", "command", "pocketlm_version", "onnxruntime_version"),
    *("processor", "architecture", "physical_cores", "logical_cores", "memory_bytes", "system"),
    *("virtual_machine", "governor", "turbo", "power_source"),
    *("model", "family", "model_precision", "bundle_sha256", "source_weights_sha256"),
    *("engine", "engine_version", "engine_precision", "engine_weights", "engine_weights_sha256", "threads"),
    *("sampling_included", "kl_mean", "kl_text"),
    *("case", "case_kind", "prompt_tokens", "new_tokens", "concurrent", "case_sha256"),
    *("metric", "unit", "n", "median", "low", "high", "minimum", "maximum", "p95", "p99"),
    *("energy_kind", "energy_scope", "energy_source"),
    *("flags", "run_flags", "skipped"),
)
"""A new column goes to the end."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_ENERGY_UNITS = {
    "energy_j": "J",
    "marginal_energy_j": "J",
    "energy_per_prompt_token_j": "J",
    "energy_per_new_token_j": "J",
    "energy_wh": "Wh",
}

_Row = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class _Value:
    metric: str
    unit: str
    median: float
    low: float | None = None
    high: float | None = None
    rest: Summary | None = None


def to_csv(results: Sequence[Result]) -> str:
    """The heading and the lines, in SI units as in the JSON; empty is what was not measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in results:
        for row in _rows(result):
            writer.writerow({name: _safe(value) for name, value in row.items()})
    return text.getvalue()


def _safe(value: str | int | float | bool | None) -> str | int | float | bool | None:
    """Text that a spreadsheet does not run as a formula (OWASP, CSV injection)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _rows(result: Result) -> Iterator[_Row]:
    common = _common(result)
    for engine in result.engines:
        of_engine = common | _engine(result, engine)
        if engine.skipped is not None:
            yield of_engine | {"skipped": engine.skipped}
            continue
        yield from (of_engine | _value(value) for value in _engine_values(engine))
        for measurement in result.measurements:
            if measurement.engine == engine.name:
                yield from _measurement(result, of_engine, measurement)
        if engine.name == OURS and result.sustained is not None:
            share = _Value("sustained_last_over_first", "1", result.sustained.last_over_first)
            yield of_engine | _value(share) | {"flags": "; ".join(result.sustained.flags)}


def _measurement(result: Result, of_engine: _Row, measurement: Measurement) -> Iterator[_Row]:
    row = of_engine | _case(result, measurement.case) | {"flags": "; ".join(measurement.flags)}
    if measurement.skipped is not None:
        yield row | {"skipped": measurement.skipped}
        return
    for metric, summary in measurement.metrics.items():
        unit = "s" if metric.endswith("_s") and not metric.endswith("_per_s") else "tok/s"
        yield row | _value(_summary(metric, unit, summary))
    setup = result.energy
    for value in _energy_values(measurement):
        kind = {} if setup is None else _provenance(setup.kind, setup.scope, setup.source)
        yield row | _value(value) | kind
    physics = result.physics
    if physics is not None and measurement.engine == OURS:
        for metric, shares in (("mbu", physics.mbu), ("mfu", physics.mfu)):
            if measurement.case in shares:
                yield row | _value(_Value(metric, "1", shares[measurement.case]))


def _provenance(kind: str, scope: str, source: str) -> _Row:
    return {"energy_kind": kind, "energy_scope": scope, "energy_source": source}


def _common(result: Result) -> _Row:
    device, model = result.device, result.model
    return {
        "created": result.created,
        "command": result.command,
        "pocketlm_version": device.versions.get("pocketlm"),
        "onnxruntime_version": device.versions.get("onnxruntime"),
        "processor": device.processor,
        "architecture": device.architecture,
        "physical_cores": device.physical_cores,
        "logical_cores": device.logical_cores,
        "memory_bytes": device.memory_bytes,
        "system": device.system,
        "virtual_machine": device.virtual_machine,
        "governor": device.governor,
        "turbo": device.turbo,
        "power_source": device.power_source,
        "model": model.name,
        "family": model.family,
        "model_precision": model.precision,
        "bundle_sha256": model.bundle_sha256,
        "source_weights_sha256": model.weights_sha256,
        "run_flags": "; ".join(result.flags),
    }


def _engine(result: Result, engine: EngineResult) -> _Row:
    quality = quality_of(result.model) if engine.name == OURS else None
    return {
        "engine": engine.name,
        "engine_version": engine.version,
        "engine_precision": engine.precision,
        "engine_weights": engine.weights,
        "engine_weights_sha256": engine.weights_sha256,
        "threads": engine.threads,
        "sampling_included": engine.sampling_included,
        "kl_mean": None if quality is None else quality.kl_mean,
        "kl_text": None if quality is None else quality.text,
    }


def _engine_values(engine: EngineResult) -> Iterator[_Value]:
    if engine.load_cold_s is not None:
        yield _Value("load_cold_s", "s", engine.load_cold_s)
    if engine.load_warm_s is not None:
        yield _summary("load_warm_s", "s", engine.load_warm_s)
    if engine.weight_bytes is not None:
        yield _Value("weight_bytes", "B", engine.weight_bytes)
    if engine.memory is not None:
        for name in ("peak_bytes", "anonymous_bytes", "file_bytes"):
            value = getattr(engine.memory, name)
            if value is not None:
                yield _Value(f"memory_{name}", "B", value)


def _case(result: Result, name: str) -> _Row:
    case = next((case for case in result.cases if case.name == name), None)
    if case is None:
        return {"case": name}
    return {
        "case": name,
        "case_kind": case.kind,
        "prompt_tokens": case.prompt_tokens,
        "new_tokens": case.new_tokens,
        "concurrent": case.concurrent,
        "case_sha256": case.sha256,
    }


def _energy_values(measurement: Measurement) -> Iterator[_Value]:
    energy = measurement.energy
    if energy is None:
        return
    figures = {
        "energy_j": energy.total_j,
        "marginal_energy_j": energy.marginal_j,
        "energy_per_prompt_token_j": energy.per_prompt_token_j,
        "energy_per_new_token_j": energy.per_new_token_j,
        "energy_wh": energy.wh,
    }
    for metric, figure in figures.items():
        unit = _ENERGY_UNITS[metric]
        if isinstance(figure, Figure):
            yield _Value(metric, unit, figure.value, figure.low, figure.high)
        elif figure is not None:
            yield _Value(metric, unit, figure)


def _summary(metric: str, unit: str, summary: Summary) -> _Value:
    return _Value(metric, unit, summary.median, summary.low, summary.high, summary)


def _value(value: _Value) -> _Row:
    row: _Row = {
        "metric": value.metric,
        "unit": value.unit,
        "median": value.median,
        "low": value.low,
        "high": value.high,
    }
    if value.rest is not None:
        names = ("n", "minimum", "maximum", "p95", "p99")
        row |= {name: getattr(value.rest, name) for name in names}
    return row
