"""Tables of where a run took place: device, model, physics, load over minutes, and how to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pocketlm.cli.console import count
from pocketlm.files import readable_size
from pocketlm_benchmarks.reports.formatting import (
    distinct,
    minutes,
    number,
    optional_number,
    per_second,
    quality_of,
    title,
)
from pocketlm_benchmarks.reports.layout import EMPTY, NONE, Cell, Column, Table, pairs
from pocketlm_benchmarks.result import Device, Physics, QualityFigures, Result, Sustained, SustainedPoint

_SUSTAINED_ROWS = 8


def same_device(one: Device, other: Device) -> bool:
    """Whether two results come from one machine, as far as they tell; its settings may have changed."""
    keys = ("processor", "architecture", "physical_cores", "logical_cores", "virtual_machine")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def device_line(result: Result) -> str:
    """The device in one line, without what it does not tell."""
    device = result.device
    parts = [
        device.processor,
        _cores(device),
        count(result.settings.threads, "thread"),
        _machine(device) if device.virtual_machine else "",
        device.system,
        f"ONNX Runtime {device.versions['onnxruntime']}" if "onnxruntime" in device.versions else "",
    ]
    return ", ".join(part for part in parts if part)


def device_table(devices: Sequence[Device]) -> Table:
    """What is known of one machine; several values where it changed between results."""

    def row(value: Callable[[Device], str]) -> str:
        return distinct(map(value, devices)) or NONE

    rows = {
        "Processor": row(lambda d: f"{d.processor}, {d.architecture}"),
        "Cores": row(_cores),
        "Instructions": row(lambda d: ", ".join(d.features)),
        "Memory": row(lambda d: readable_size(d.memory_bytes)),
        "System": row(lambda d: d.system),
        "Machine": row(_machine),
        "Frequency": row(_frequency),
        "Power": row(lambda d: d.power_source or ""),
        "Microcode": row(lambda d: d.microcode or ""),
        "Software": row(lambda d: ", ".join(f"{k} {v}" for k, v in d.versions.items())),
    }
    return pairs("Device", rows)


def _cores(device: Device) -> str:
    if device.physical_cores is None:
        return count(device.logical_cores, "logical core")
    cores = count(device.physical_cores, "core")
    same = device.physical_cores == device.logical_cores
    return cores if same else f"{cores}, {device.logical_cores} hardware threads"


def _machine(device: Device) -> str:
    if device.virtual_machine is None:
        return "bare metal"
    known = device.virtual_machine != "unknown"
    return f"virtual machine ({device.virtual_machine})" if known else "virtual machine"


def _frequency(device: Device) -> str:
    turbo = {True: "turbo on", False: "turbo off", None: ""}[device.turbo]
    return ", ".join(part for part in (device.governor or "", turbo) if part)


def model_line(result: Result) -> str:
    """The model in one line, quality included."""
    model, quality = result.model, quality_of(result.model)
    divergence = "KL to fp32 not measured"
    if quality is not None:
        divergence = (
            f"KL to fp32 {quality.kl_mean:.4f} nats per token, same top token {quality.top1_agreement:.1%}"
        )
    return f"{readable_size(model.bundle_bytes)}, {_parameters(model.parameters)} parameters, {divergence}"


def quality_table(results: Sequence[Result]) -> Table:
    """What the precision cost, a row for each text that it was measured on."""
    columns = (
        Column("model", number=False),
        Column("KL mean"),
        Column("KL p99", optional=True),
        Column("same top token"),
        Column("perplexity"),
        Column("fp32"),
        Column("tokens", optional=True),
        Column("text", number=False),
    )
    rows = []
    for result in results:
        figures = (
            (result.model.quality_manifest, "exporter"),
            (result.model.quality_measured, "this run"),
        )
        found = [_quality(title(result), quality, by) for quality, by in figures if quality is not None]
        rows += found or [(Cell(title(result)), *([EMPTY] * 6), Cell("not measured"))]
    notes = (
        "Against the fp32 graph of the same weights, teacher-forced; KL in nats per token. "
        "Peers' quality is not measured.",
    )
    return Table("Quality", columns, tuple(rows), notes)


def _quality(model: str, quality: QualityFigures, by: str) -> tuple[Cell, ...]:
    return (
        Cell(model),
        Cell(f"{quality.kl_mean:.4f}"),
        Cell(f"{quality.kl_p99:.3f}"),
        Cell(f"{quality.top1_agreement:.1%}"),
        Cell(f"{quality.perplexity:.3f}"),
        Cell(f"{quality.perplexity_fp32:.3f}"),
        Cell(f"{quality.tokens:,}"),
        Cell(f"{quality.text} ({by})"),
    )


def physics_table(physics: Physics) -> Table:
    """What the device can do and what the model asks of it."""

    def optional_rate(value: float | None, unit: str) -> str:
        return NONE if value is None else per_second(value, unit)

    rows = {
        f"Memory reads, {count(physics.threads, 'thread')}": per_second(physics.read_bytes_per_s, "B"),
        "Integer products (8 bits)": optional_rate(physics.int8_ops_per_s, "OP"),
        "Float products (fp32)": optional_rate(physics.fp32_flops_per_s, "FLOP"),
        "Read for each new token": readable_size(physics.bytes_per_token),
        "And for each token of context": readable_size(physics.kv_bytes_per_token),
        "Work for each prompt token": f"{_parameters(physics.ops_per_prompt_token)} operations",
    }
    return pairs("What the device can do, and what the model asks for", rows)


def use_table(physics: Physics) -> Table:
    """The share of the device that each case uses."""
    columns = (Column("case", number=False), Column("share of what", number=False), Column("used"))
    rows = [(Cell(n), Cell("memory bandwidth (MBU)"), Cell(f"{v:.0%}")) for n, v in physics.mbu.items()]
    rows += [(Cell(n), Cell("arithmetic peak (MFU)"), Cell(f"{v:.0%}")) for n, v in physics.mfu.items()]
    return Table("How much of it is used", columns, tuple(rows))


def sustained_text(sustained: Sustained) -> tuple[str, ...]:
    """The load over minutes in a sentence."""
    change = (
        f"{minutes(sustained.duration_s)} without a pause: the last third runs at "
        f"{sustained.last_over_first:.1%} of the first third's rate."
    )
    return (change, *sustained.flags)


def sustained_table(sustained: Sustained) -> Table:
    """Some of the points, evenly spread."""
    columns = (
        Column("after", number=False),
        Column("tok/s"),
        Column("W"),
        Column("°C"),
        Column("GHz"),
    )
    points = sustained.points
    step = max(1, -(-len(points) // _SUSTAINED_ROWS))
    return Table("Load over time", columns, tuple(_point(point) for point in points[::step]))


def _point(point: SustainedPoint) -> tuple[Cell, ...]:
    return (
        Cell(minutes(point.t_s)),
        Cell(number(point.decode_tokens_per_s)),
        optional_number(point.power_w),
        optional_number(point.temperature_c),
        optional_number(point.frequency_hz, scale=1e-9),
    )


def repeat_table(result: Result) -> Table:
    """All that it takes to run it again."""
    model, settings = result.model, result.settings
    warm_up = ", ".join(f"{engine} {queries}" for engine, queries in settings.warm_up.items())
    rows = {
        "Command": result.command,
        "Measured": f"{result.created}, in {minutes(result.duration_s)}",
        "Model": f"{model.family}, {model.source}",
        "Source weights": f"sha256 {model.weights_sha256}",
        "Bundle": f"{model.precision}: {model.recipe}",
        "Bundle manifest": f"sha256 {model.bundle_sha256}",
        "Settings": (
            f"{count(settings.rounds, 'round')}, seed {settings.seed}, {count(settings.threads, 'thread')}, "
            f"context {settings.context_length:,}" + (", quick" if settings.quick else "")
        ),
        "Warm-up queries": warm_up or NONE,
    }
    return pairs("How to repeat it", rows)


def _parameters(value: float) -> str:
    for factor, name in ((1e9, "billion"), (1e6, "million")):
        if value >= factor:
            return f"{number(value / factor)} {name}"
    return number(value)
