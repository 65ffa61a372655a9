"""The benchmark from a model's name to a result."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pocketlm.bundle import Bundle, open_bundle
from pocketlm.errors import InvalidSettingError
from pocketlm.files import sha256_of
from pocketlm.hub import find_bundle
from pocketlm.manifest import MANIFEST_NAME, Manifest
from pocketlm.progress import Progress, silent
from pocketlm.threads import thread_count
from pocketlm.tokenizer import Tokenizer
from pocketlm_benchmarks.cases import Work, grid, workload
from pocketlm_benchmarks.conditions import Conditions
from pocketlm_benchmarks.cross_check import codecarbon, load_codecarbon
from pocketlm_benchmarks.device import describe_device
from pocketlm_benchmarks.engines.process import EngineProcess
from pocketlm_benchmarks.engines.protocol import EngineError, EngineSpec
from pocketlm_benchmarks.engines.registry import PeerSpec
from pocketlm_benchmarks.figures import measurement, ratios
from pocketlm_benchmarks.loads import Start
from pocketlm_benchmarks.metering import Meter
from pocketlm_benchmarks.peaks import measure_peaks
from pocketlm_benchmarks.physics import physics, work_of
from pocketlm_benchmarks.quality import manifest_quality, measure_quality
from pocketlm_benchmarks.result import (
    OURS,
    EngineResult,
    Measurement,
    ModelInfo,
    QualityFigures,
    Ratio,
    Result,
    Settings,
    Sustained,
)
from pocketlm_benchmarks.runner import Contender, Plan, Run
from pocketlm_benchmarks.sustain import sustain


@dataclass(frozen=True)
class Options:
    """What to measure. Sizes are in tokens."""

    precision: str | None = None
    prompt_tokens: Sequence[int] = (512,)
    new_tokens: int = 128
    depths: Sequence[int] = (0, 512)
    workloads: Sequence[str] | None = None  # None: chat, where the model has a chat template
    peers: Sequence[PeerSpec] = ()
    peer_pythons: Mapping[str, str] = field(default_factory=dict)  # kind → interpreter
    llama_bench: str | None = None  # its program
    rounds: int = 10
    threads: int | None = None
    seed: int = 0
    quick: bool = False  # fewer warm-ups and loads, no energy
    energy: bool = True
    meter_log: Path | None = None
    cross_check: bool = False
    quality_text: Path | None = None
    reference: Path | None = None  # the fp32 bundle; None: the model's own, exported if needed
    sustain_s: float | None = None
    command: str = ""


def bench(
    name_or_path: str | Path, options: Options, *, progress: Progress = silent, start: Start = EngineProcess
) -> Result:
    """Measures a model on this device, fetched first if it has to be.

    Raises InvalidSettingError, EngineError if our own engine fails (a peer that fails is skipped and says
    why), and what `pocketlm.hub.pull` raises.
    """
    if options.rounds < 1:
        raise InvalidSettingError(f"repetitions is {options.rounds}; at least 1 is expected.")
    if options.sustain_s is not None and not options.depths:
        raise InvalidSettingError(
            "a sustained load decodes; it needs a decode case, and there are no depths."
        )
    for kind in options.peer_pythons.keys() - {peer.kind for peer in options.peers}:
        raise InvalidSettingError(f"--peer-python names {kind}, which --against does not.")
    begun_s = time.monotonic()
    bundle = open_bundle(find_bundle(name_or_path, precision=options.precision, progress=progress))
    threads = thread_count(options.threads)
    works = _works(bundle, options)
    context_length = max(work.context_length for work in works)
    sustained: list[Sustained] = []
    flags: list[str] = []
    with ExitStack() as stack:
        # Whatever may be wrong shows here, not behind an hour of measuring.
        work_of(bundle.manifest)
        if options.cross_check:
            load_codecarbon()
        meter = Meter(options.meter_log) if options.energy else None
        if meter is not None:
            stack.callback(meter.close)
        quality = _measured_quality(name_or_path, bundle, options, threads, progress)
        device = describe_device()
        peaks = measure_peaks(threads, progress)
        plan = Plan(
            engines=_specs(bundle, options, threads, context_length),
            works=works,
            rounds=options.rounds,
            seed=options.seed,
            warm_loads=1 if options.quick else 3,
            warm_up_most=2 if options.quick else 6,
        )
        run = Run(plan, start, meter, progress)
        conditions = Conditions(lambda: run.pids)

        def while_loaded(ours: Contender) -> None:
            if options.sustain_s is not None and ours.engine is not None:
                decode = next(work for work in works if work.case.kind == "decode")
                try:
                    sustained.append(sustain(ours.engine, decode, options.sustain_s, meter, progress))
                except EngineError as error:  # no reason to lose the rounds
                    flags.append(f"The sustained load failed: {error}")
            # Of a process that has ended, only Linux still tells the processor time.
            flags.extend(conditions.flags())

        with codecarbon(enabled=options.cross_check) as cross_check:
            run.measure(while_loaded)
    measurements = _measurements(run.contenders, works)
    cases = [work.case for work in works]
    return Result(
        format_version=1,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        duration_s=time.monotonic() - begun_s,
        command=options.command,
        device=device,
        model=_model_info(bundle, quality),
        settings=Settings(
            rounds=options.rounds,
            seed=options.seed,
            threads=threads,
            context_length=context_length,
            quick=options.quick,
            warm_up={each.name: each.warm_up for each in run.contenders},
        ),
        engines=[_engine_result(each) for each in run.contenders],
        cases=cases,
        measurements=measurements,
        ratios=_ratios(run, works),
        energy=None if meter is None else meter.setup(run.idle, cross_check),
        physics=physics(peaks, bundle.manifest, cases, measurements),
        sustained=sustained[0] if sustained else None,
        flags=flags,
    )


def _works(bundle: Bundle, options: Options) -> list[Work]:
    manifest = bundle.manifest
    tokenizer = Tokenizer(bundle.tokenizer_json, bundle.chat_template, manifest.tokens)
    special = {*manifest.tokens.eos, *([] if manifest.tokens.bos is None else [manifest.tokens.bos])}
    works = grid(
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        depths=options.depths,
        vocabulary=min(manifest.dimensions.vocabulary, tokenizer.vocabulary_size),
        seed=options.seed,
        special_ids=special,
    )
    trained = manifest.dimensions.context_length
    for work in works:
        if work.context_length > trained:
            raise InvalidSettingError(
                f"the case {work.case.name} needs a context of {work.context_length:,} tokens; "
                f"{manifest.name} was trained for {trained:,}. Ask for fewer."
            )
    names = options.workloads
    if names is None:
        names = ("chat",) if tokenizer.has_chat_template else ()
    works += [workload(name, tokenizer.encode_chat, trained) for name in names]
    if not works:
        raise InvalidSettingError("there is nothing to measure: no prompt sizes, no depths and no workloads.")
    return works


def _specs(bundle: Bundle, options: Options, threads: int, context_length: int) -> dict[str, EngineSpec]:
    specs = {OURS: EngineSpec(OURS, str(bundle.folder), threads, context_length)}
    for peer in options.peers:
        python = options.peer_pythons.get(peer.kind)
        program = options.llama_bench if peer.kind == "llama-bench" else None
        specs[_label(peer, options.peers, specs)] = EngineSpec(
            peer.kind, peer.weights, threads, context_length, python, program
        )
    return specs


def _label(peer: PeerSpec, peers: Sequence[PeerSpec], taken: Collection[str]) -> str:
    """The kind; with the weights where an engine runs on several, and a number if their name comes again."""
    if sum(other.kind == peer.kind for other in peers) == 1:
        return peer.kind
    name = f"{peer.kind} {_weights_name(peer.weights)}"
    number = 1 + sum(each == name or each.startswith(f"{name} ") for each in taken)
    return name if number == 1 else f"{name} {number}"


def _weights_name(weights: str) -> str:
    """Never a path of the machine, which is nobody's business."""
    return weights if "://" in weights else Path(weights).name


def _without_paths(message: str, spec: EngineSpec) -> str:
    """What an engine said, with names instead of paths of the machine."""
    for path in (spec.weights, spec.python, spec.program):
        message = message.replace(path, _weights_name(path)) if path else message
    return message.replace(str(Path.home()), "~")


def _measurements(contenders: Sequence[Contender], works: Sequence[Work]) -> list[Measurement]:
    found = []
    for each in contenders:
        for work in works:
            name = work.case.name
            if name in each.raw and each.raw[name].blocks:
                found.append(measurement(each.name, work.case, each.raw[name]))
            elif name in each.refused:
                why = _without_paths(each.refused[name], each.spec)
                found.append(Measurement(each.name, name, {}, {}, [], None, skipped=why))
    return found


def _ratios(run: Run, works: Sequence[Work]) -> list[Ratio]:
    ours = run.ours
    return [
        ratio
        for peer in run.contenders
        for work in works
        if peer is not ours and work.case.name in peer.raw
        for ratio in ratios(work.case, ours.raw[work.case.name], peer.name, peer.raw[work.case.name])
    ]


def _engine_result(each: Contender) -> EngineResult:
    info = next((raw.info for raw in each.raw.values()), None)
    path = Path(each.spec.weights)
    return EngineResult(
        name=each.name,
        version=info.version if info else "unknown",
        precision=info.precision if info else "unknown",
        weights=_weights_name(each.spec.weights),
        weight_bytes=info.weight_bytes if info else None,
        weights_sha256=sha256_of(path) if path.is_file() else None,
        threads=each.spec.threads,
        sampling_included=info.sampling_included if info else False,
        load_cold_s=each.loads.cold_s if each.loads else None,
        load_warm_s=each.loads.warm_s if each.loads else None,
        memory=each.memory,
        note=info.note if info else "",
        skipped=None if each.skipped is None else _without_paths(each.skipped, each.spec),
    )


def _model_info(bundle: Bundle, measured: QualityFigures | None) -> ModelInfo:
    manifest = bundle.manifest
    return ModelInfo(
        name=manifest.name,
        family=manifest.family,
        precision=manifest.precision.name,
        recipe=manifest.precision.recipe,
        parameters=_parameters(manifest),
        bundle_bytes=manifest.bytes,
        bundle_sha256=sha256_of(bundle.folder / MANIFEST_NAME),
        weights_sha256=manifest.source.sha256,
        source=_source(manifest),
        quality_manifest=manifest_quality(manifest),
        quality_measured=measured,
    )


def _parameters(manifest: Manifest) -> int:
    work, sizes = work_of(manifest), manifest.dimensions
    norms = (2 * sizes.layers + 1) * sizes.hidden
    return (work.ops_per_prompt_token + work.ops_of_head) // 2 + norms


def _source(manifest: Manifest) -> str:
    source = manifest.source
    return source.location if source.revision is None else f"{source.location}@{source.revision}"


def _measured_quality(
    name_or_path: str | Path, bundle: Bundle, options: Options, threads: int, progress: Progress
) -> QualityFigures | None:
    if options.quality_text is None:
        return None
    reference = options.reference
    if reference is None:
        reference = find_bundle(name_or_path, precision="fp32", progress=progress)
    return measure_quality(bundle.folder, reference, options.quality_text, threads=threads, progress=progress)
