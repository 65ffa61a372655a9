"""The result of a benchmark: all that was measured, and all that it takes to repeat it.

These records are the one contract between the runner, the reports and `compare`; as JSON they follow
docs/bench-schema.json, which is made from them. Units stand in the names. What was not measured is None, and
the field beside it or a flag says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pocketlm.errors import PocketlmError
from pocketlm.files import atomic_write

FORMAT_VERSION = 1
OURS = "pocketlm"
"""The name of our own engine in a result."""

_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ResultError(PocketlmError):
    """A file is not the result of a benchmark, or a newer pocketlm wrote it."""


@dataclass(frozen=True, config=_CONFIG)
class Figure:
    """A value with an interval."""

    value: float
    low: float | None
    """Lower end of the interval; None where one sample gives none."""
    high: float | None


@dataclass(frozen=True, config=_CONFIG)
class Summary:
    """A metric over its samples."""

    n: int
    """How many samples."""
    median: float
    low: float | None
    """The median's 95 % bootstrap interval, which draws whole rounds; None for a single sample."""
    high: float | None
    minimum: float
    maximum: float
    p95: float | None = None
    """95th percentile; None below 20 samples."""
    p99: float | None = None
    """99th percentile; None below 100 samples."""


@dataclass(frozen=True, config=_CONFIG)
class Device:
    """The machine. None is what it does not tell."""

    processor: str
    architecture: str
    """x86_64, arm64, …"""
    features: list[str]
    """Instruction sets that matter here: avx2, avx512f, avx512_vnni, amx_int8, asimddp, i8mm, …"""
    physical_cores: int | None
    logical_cores: int
    memory_bytes: int
    system: str
    """Operating system and its release."""
    microcode: str | None
    virtual_machine: str | None
    """The hypervisor's name, "unknown" if only its presence shows, None on bare metal."""
    governor: str | None
    """The processor's frequency policy, for example performance, powersave, schedutil."""
    turbo: bool | None
    power_source: Literal["mains", "battery"] | None
    thermal_throttles: int | None
    """The sum of the system's throttling counters when the run began."""
    versions: dict[str, str]
    """python, pocketlm, onnxruntime, numpy."""


@dataclass(frozen=True, config=_CONFIG)
class QualityFigures:
    """Against the fp32 graph of the same weights, teacher-forced."""

    text: str
    """Which text: a name, never a path."""
    text_sha256: str | None
    """None for the text that the exporter ships."""
    tokens: int
    perplexity: float
    perplexity_fp32: float
    kl_mean: float
    """Nats per token, KL(fp32 ‖ this)."""
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True, config=_CONFIG)
class ModelInfo:
    """The bundle."""

    name: str
    family: str
    precision: str
    recipe: str
    parameters: int
    """Weights of the linears and the norms. An embedding table counts as the head that shares it."""
    bundle_bytes: int
    bundle_sha256: str
    """Of manifest.json, which holds the sha256 of every other file."""
    weights_sha256: str
    """Of the source that the bundle was made from."""
    source: str
    quality_manifest: QualityFigures | None
    """As the exporter measured it."""
    quality_measured: QualityFigures | None
    """As this run measured it (`--quality`)."""


@dataclass(frozen=True, config=_CONFIG)
class Memory:
    """Of an engine's process, after its largest case."""

    peak_bytes: int | None
    """The most resident memory so far."""
    anonymous_bytes: int | None
    """Resident now, its own."""
    file_bytes: int | None
    """Resident now, mapped from files: the system can drop it and read it again."""


@dataclass(frozen=True, config=_CONFIG)
class EngineResult:
    """An engine: ours is the first."""

    name: str
    version: str
    precision: str
    weights: str
    """File or folder name, or URL."""
    weight_bytes: int | None
    weights_sha256: str | None
    threads: int
    sampling_included: bool
    """Whether its times hold sampling and detokenization."""
    load_cold_s: float | None
    """With the files dropped from the page cache; None where the system does not allow that."""
    load_warm_s: Summary | None
    memory: Memory | None
    note: str = ""
    skipped: str | None = None
    """Why nothing was measured; None if something was."""


@dataclass(frozen=True, config=_CONFIG)
class Case:
    """What was asked: a point of the synthetic grid or a workload of real prompts."""

    name: str
    """pp512, tg128, tg128@d512, chat, summarize, …"""
    kind: Literal["prefill", "decode", "workload"]
    prompt_tokens: float
    """Mean over its queries."""
    new_tokens: int
    """For each query."""
    concurrent: int
    """Queries handed over at once."""
    sha256: str
    """Of the queries' token ids and lengths: equal hash, equal work."""
    description: str = ""


@dataclass(frozen=True, config=_CONFIG)
class Block:
    """Queries measured in one window, for speed and energy at once."""

    round: int
    started_unix_s: float
    """Wall-clock time, to join a meter's log."""
    duration_s: float
    queries: int
    energy_j: float | None
    low_j: float | None
    high_j: float | None
    idle_power_w: float | None
    """Mean of the idle windows before and after the round."""
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True, config=_CONFIG)
class EnergyPerQuery:
    """Joules of one query. An estimate's interval holds the estimate's own uncertainty too."""

    total_j: Figure
    marginal_j: Figure | None
    """Idle power subtracted."""
    per_prompt_token_j: float | None
    """Total, of a prefill case."""
    per_new_token_j: float | None
    """Total, of a decode case or a workload."""
    wh: float


@dataclass(frozen=True, config=_CONFIG)
class Measurement:
    """One engine on one case."""

    engine: str
    case: str
    metrics: dict[str, Summary]
    """ttft_s, tpot_s, itl_s, e2el_s, prefill_tokens_per_s, decode_tokens_per_s, throughput_tokens_per_s, each
    only where the engine tells it and the case holds it. tpot = (e2el − ttft) / (output tokens − 1)."""
    samples: dict[str, list[float]]
    """The metrics' samples in the order in which they were taken."""
    blocks: list[Block]
    energy: EnergyPerQuery | None
    flags: list[str] = field(default_factory=list)
    skipped: str | None = None


@dataclass(frozen=True, config=_CONFIG)
class Ratio:
    """Ours beside a peer's, from the pairs that were measured right after one another."""

    peer: str
    case: str
    metric: str
    """As in Measurement.metrics, or energy_j."""
    better: Figure
    """How many times better ours is: above 1 ours is faster, or takes less."""
    n: int


@dataclass(frozen=True, config=_CONFIG)
class Reference:
    """A figure published elsewhere, to put a query beside."""

    what: str
    wh: float
    year: int
    source: str


@dataclass(frozen=True, config=_CONFIG)
class IdleWindow:
    """Engines loaded, nothing asked of them: before and behind each round."""

    started_unix_s: float
    duration_s: float
    power_w: float | None


@dataclass(frozen=True, config=_CONFIG)
class EnergySetup:
    """How energy was measured."""

    source: str
    scope: str
    kind: Literal["measured", "estimated"]
    resolution_j: float | None
    least_window_s: float
    note: str
    absent: dict[str, str]
    """Sources that could not be used, and why."""
    cross_check: dict[str, float]
    """Joules of the whole run after other programs (codecarbon), never mixed with ours."""
    references: list[Reference]
    idle: list[IdleWindow]
    """One more than there are rounds."""


@dataclass(frozen=True, config=_CONFIG)
class Physics:
    """What the device can do, measured in a few seconds, and what share of it the model uses."""

    threads: int
    read_bytes_per_s: float
    int8_ops_per_s: float | None
    fp32_flops_per_s: float | None
    bytes_per_token: int
    """Weights that a decode step reads."""
    kv_bytes_per_token: int
    ops_per_prompt_token: float
    """Two for each weight that is multiplied."""
    mbu: dict[str, float]
    """Decode case → bytes read / tpot / measured bandwidth."""
    mfu: dict[str, float]
    """Prefill case → operations × rate / measured peak of the arithmetic that the bundle uses."""
    limits: list[str]
    """Sentences for a person: what bounds this model here."""


@dataclass(frozen=True, config=_CONFIG)
class SustainedPoint:
    t_s: float
    """Middle of the interval, since the load began."""
    decode_tokens_per_s: float
    power_w: float | None
    temperature_c: float | None
    frequency_hz: float | None


@dataclass(frozen=True, config=_CONFIG)
class Sustained:
    """The same load without a pause."""

    duration_s: float
    """Until its last answer."""
    points: list[SustainedPoint]
    last_over_first: float
    """Rate of the last third over the first third's."""
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True, config=_CONFIG)
class Settings:
    """What the run was told."""

    rounds: int
    seed: int
    threads: int
    context_length: int
    quick: bool
    warm_up: dict[str, int]
    """Engine → warm-up queries until its speed settled."""


@dataclass(frozen=True, config=_CONFIG)
class Result:
    """One run of `pocketlm bench`."""

    format_version: Literal[1]
    created: str
    """ISO 8601, UTC."""
    duration_s: float
    command: str
    """What repeats it, with the names of files instead of their paths on this machine."""
    device: Device
    model: ModelInfo
    settings: Settings
    engines: list[EngineResult]
    cases: list[Case]
    measurements: list[Measurement]
    ratios: list[Ratio]
    energy: EnergySetup | None
    physics: Physics | None
    sustained: Sustained | None
    flags: list[str]
    """What a reader has to know: noise, throttling, battery, another load."""

    def measurement(self, engine: str, case: str) -> Measurement | None:
        """What one engine did on one case."""
        return next((m for m in self.measurements if (m.engine, m.case) == (engine, case)), None)


_RESULT = TypeAdapter(Result)


def to_json(result: Result) -> dict[str, Any]:
    """The result as JSON values."""
    return dict(_RESULT.dump_python(result, mode="json"))


def write_result(result: Result, path: Path) -> None:
    """Writes the result as JSON, atomically."""
    atomic_write(path, json.dumps(to_json(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def parse_result(data: Mapping[str, Any] | Any, *, where: str) -> Result:
    """The result from JSON values; `where` names them in an error. Raises ResultError."""
    if not isinstance(data, Mapping) or "format_version" not in data:
        raise ResultError(
            f"{where} is not the result of a benchmark. Make one with: pocketlm bench --json FILE"
        )
    if data["format_version"] != FORMAT_VERSION:
        raise ResultError(
            f"{where} has format version {data['format_version']!r}, this pocketlm reads {FORMAT_VERSION}. "
            "Read it with the version that wrote it, or measure again."
        )
    try:
        return _RESULT.validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ResultError(
            f"{where} does not follow docs/bench-schema.json at {place}: {first['msg']}."
        ) from None


def read_result(path: Path) -> Result:
    """The result in a JSON file. Raises ResultError, and OSError for a file that cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} is not JSON: {error}.") from None
    return parse_result(data, where=str(path))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a result (draft 2020-12), published as docs/bench-schema.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_RESULT.json_schema(mode="serialization"),
    }
