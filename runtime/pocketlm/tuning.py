"""What is best for a bundle on this device, measured once and kept in the cache folder.

    <home>/tuning/<digits>.json  one for each graph, device and release of ONNX Runtime

Only speed depends on it: whatever the threads and the chunk, the logits are the same. What rows cost decides
how much is drafted; docs/determinism.md says what that may change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pocketlm import cache
from pocketlm.bundle import GRAPH_NAME, Bundle
from pocketlm.errors import PocketlmError
from pocketlm.files import atomic_write
from pocketlm.kv_cache import KVCache
from pocketlm.manifest import Manifest, parse_value
from pocketlm.power import BALANCED_SPIN_US, ECO_SPIN_US
from pocketlm.prefill import PREFILL_CHUNK
from pocketlm.progress import Progress, silent
from pocketlm.row_costs import RowCosts, measure
from pocketlm.session import Session
from pocketlm.threads import hardware_threads, physical_cores, processor_name

CHUNKS = (32, 64, 128, 256)

REQUEST = (256, 128)
"""Tokens of prompt and of answer that weigh prefill and decode against each other."""

CLEARLY = 0.95
"""What takes more than this share of what it is compared with is no faster: it may be chance."""
ECO_SLOWDOWN = 2.0
"""Eco may take this much longer than the fastest."""
UNDISTURBED = 0.8
"""With less of a core to itself, one thread says little about what two would do."""

_PROMPT, _STEPS = 256, 16  # tokens that one round prefills and decodes
_LONG_PROMPT = 512  # tokens that the chunks are tried with
_LEAST_ROUNDS = 3
_BUDGET_S = 1.5  # for the rounds of one trial


@dataclass(frozen=True)
class Device:
    processor: str
    cores: int  # physical ones that this process may use
    hardware_threads: int


@dataclass(frozen=True)
class ThreadTrial:
    """Seconds for a token: on the clock, of which the best round counts, and of processor time."""

    threads: int
    spin_us: int
    prefill_s: float
    decode_s: float
    prefill_cpu_s: float
    decode_cpu_s: float

    @property
    def request_s(self) -> float:
        return REQUEST[0] * self.prefill_s + REQUEST[1] * self.decode_s

    @property
    def request_cpu_s(self) -> float:
        return REQUEST[0] * self.prefill_cpu_s + REQUEST[1] * self.decode_cpu_s


@dataclass(frozen=True)
class ChunkTrial:
    chunk: int
    prefill_s: float  # for a token, in the best round


@dataclass(frozen=True)
class Tuning:
    graph_sha256: str
    device: Device
    onnxruntime: str  # its version
    measured_at: str  # UTC, ISO 8601
    core_share: float  # of a core's time that one thread got; the rest went to other programs
    threads: int
    eco_threads: int
    prefill_chunk: int  # tokens in one pass of a prompt
    row_costs: RowCosts  # with `threads`
    eco_row_costs: RowCosts  # with `eco_threads`
    thread_trials: tuple[ThreadTrial, ...]
    chunk_trials: tuple[ChunkTrial, ...]

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much of the device that its figures are not to be trusted."""
        return self.core_share < UNDISTURBED

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    def costs_with(self, threads: int) -> RowCosts | None:
        """What rows cost with that many threads; None if it was not measured."""
        costs = {self.eco_threads: self.eco_row_costs, self.threads: self.row_costs}
        return costs.get(threads)


def find_tuning(manifest: Manifest) -> Tuning | None:
    """What was measured for this graph on this device and ONNX Runtime; None if nothing (readable) was."""
    path, identity = tuning_path(manifest), _identity(manifest)
    try:
        tuning: Tuning = parse_value(Tuning, json.loads(path.read_text(encoding="utf-8")), "", str(path))
    except (OSError, ValueError, RecursionError, PocketlmError):
        return None  # it is measured again, as if it were not there
    sound = min(tuning.threads, tuning.eco_threads, tuning.prefill_chunk) >= 1
    return tuning if sound and (tuning.graph_sha256, tuning.device, tuning.onnxruntime) == identity else None


def save(tuning: Tuning, manifest: Manifest) -> Path:
    """Keeps it for `find_tuning`; returns its file. Raises StorageError."""
    path = tuning_path(manifest)
    with cache.locked(path):
        atomic_write(path, tuning.to_json())
    return path


def tuning_path(manifest: Manifest) -> Path:
    """Where the tuning is kept, or would be."""
    graph_sha256, device, version = _identity(manifest)
    key = json.dumps([graph_sha256, dataclasses.astuple(device), version])
    return cache.home() / "tuning" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def this_device() -> Device:
    return Device(processor_name(), physical_cores(), hardware_threads())


def _identity(manifest: Manifest) -> tuple[str, Device, str]:
    """What a tuning holds for. The weights are not in it: a product takes as long whatever they are."""
    import onnxruntime  # not at the top: `pocketlm.session` sets its environment before it is loaded

    return manifest.files[GRAPH_NAME].sha256, this_device(), onnxruntime.__version__


def tune(bundle: Bundle, *, context_length: int | None = None, progress: Progress = silent) -> Tuning:
    """Tries threads, then chunks, then numbers of rows; below a minute for a model of 135 M parameters.

    `context_length` is the caches' capacity in tokens, by default what the model was trained for. What is
    kept is for the caller to `save`. Raises BundleError if ONNX Runtime refuses the graph.
    """
    capacity = context_length or bundle.manifest.dimensions.context_length
    graph_sha256, device, version = _identity(bundle.manifest)
    settings = list(_thread_settings(device))
    report = _Report(progress, f"Tuning {bundle.manifest.name}", len(settings) + 3)
    trials, cores_had = [], []
    for threads, spin_us in settings:
        report.next()
        trial, cores = _try_threads(_open(bundle, threads, spin_us), threads, spin_us, capacity)
        trials.append(trial)
        cores_had.append(cores)
    threads, eco_threads = fastest_threads(trials), thriftiest_threads(trials)
    report.next()
    session = _open(bundle, threads, BALANCED_SPIN_US)
    chunk_trials = _try_chunks(session, capacity)
    report.next()
    row_costs = eco_row_costs = measure(session, context_length=capacity)
    report.next()
    if eco_threads != threads:
        del session  # one at a time in memory
        eco_row_costs = measure(_open(bundle, eco_threads, ECO_SPIN_US), context_length=capacity)
    report.next()
    return Tuning(
        graph_sha256=graph_sha256,
        device=device,
        onnxruntime=version,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        core_share=min(1.0, cores_had[0]),
        threads=threads,
        eco_threads=eco_threads,
        prefill_chunk=best_chunk(chunk_trials),
        row_costs=row_costs,
        eco_row_costs=eco_row_costs,
        thread_trials=tuple(trials),
        chunk_trials=tuple(chunk_trials),
    )


def fastest_threads(trials: Sequence[ThreadTrial]) -> int:
    """The fewest threads that are not clearly slower than any other number, for a request."""
    best_s = min(trial.request_s for trial in trials)
    return min(trial.threads for trial in trials if CLEARLY * trial.request_s <= best_s)


def thriftiest_threads(trials: Sequence[ThreadTrial]) -> int:
    """The threads with the least processor time for a request, of those that are not much slower.

    Only trials without spinning count, as eco has none.
    """
    eco = [trial for trial in trials if trial.spin_us == ECO_SPIN_US]
    most_s = ECO_SLOWDOWN * min(trial.request_s for trial in eco)
    return min(
        (trial for trial in eco if trial.request_s <= most_s),
        key=lambda trial: (trial.request_cpu_s, trial.threads),
    ).threads


def best_chunk(trials: Sequence[ChunkTrial]) -> int:
    """The fastest chunk, if it is clearly faster than the default."""
    best = min(trials, key=lambda trial: trial.prefill_s)
    default = next((trial for trial in trials if trial.chunk == PREFILL_CHUNK), None)
    if default is not None and best.prefill_s > CLEARLY * default.prefill_s:
        return PREFILL_CHUNK
    return best.chunk


@dataclass
class _Report:
    progress: Progress
    task: str
    total: int
    done: int = 0

    def next(self) -> None:
        """Says that a measurement begins, or that none is left."""
        self.progress(self.task, self.done, self.total, "measurements")
        self.done += 1


def _thread_settings(device: Device) -> Iterator[tuple[int, int]]:
    """Threads and how long they spin, one thread first: doubling up to the cores, and what SMT adds."""
    counts = {1, device.cores, device.hardware_threads}
    count = 1
    while count < device.cores:
        counts.add(count)
        count *= 2
    for threads in sorted(counts):
        yield threads, ECO_SPIN_US
        if threads > 1:  # one alone has nobody to wait for
            yield threads, BALANCED_SPIN_US


def _open(bundle: Bundle, threads: int, spin_us: int) -> Session:
    manifest = bundle.manifest
    return Session(bundle.graph_path, manifest.dimensions, manifest.graph, threads=threads, spin_us=spin_us)


def _try_threads(session: Session, threads: int, spin_us: int, capacity: int) -> tuple[ThreadTrial, float]:
    """The trial, and how many cores' time it got."""
    kv_cache = session.new_cache(capacity)
    prompt = min(_PROMPT, capacity // 2)
    steps = min(_STEPS, capacity - prompt)

    def decode() -> None:
        for _ in range(steps):
            session.forward([0], kv_cache)

    def prefill() -> None:
        kv_cache.truncate(0)
        _prefill(session, kv_cache, prompt, PREFILL_CHUNK)

    prefill_clock, decode_clock = _timed(prefill, decode)
    trial = ThreadTrial(
        threads,
        spin_us,
        prefill_s=prefill_clock.best_s / prompt,
        decode_s=decode_clock.best_s / steps,
        prefill_cpu_s=prefill_clock.mean_cpu_s / prompt,
        decode_cpu_s=decode_clock.mean_cpu_s / steps,
    )
    clocks = (prefill_clock, decode_clock)
    return trial, sum(clock.cpu_s for clock in clocks) / sum(clock.elapsed_s for clock in clocks)


def _try_chunks(session: Session, capacity: int) -> list[ChunkTrial]:
    """The chunks take turns, so that a busy moment does not hit one of them alone."""
    kv_cache = session.new_cache(capacity)
    prompt = min(_LONG_PROMPT, capacity)
    chunks = [chunk for chunk in CHUNKS if chunk <= prompt] or [prompt]

    def prefill(chunk: int) -> None:
        kv_cache.truncate(0)
        _prefill(session, kv_cache, prompt, chunk)

    clocks = _timed(*(partial(prefill, chunk) for chunk in chunks))
    return [ChunkTrial(chunk, clock.best_s / prompt) for chunk, clock in zip(chunks, clocks, strict=True)]


def _prefill(session: Session, kv_cache: KVCache, tokens: int, chunk: int) -> None:
    for start in range(0, tokens, chunk):
        session.forward([0] * min(chunk, tokens - start), kv_cache)


@dataclass
class _Clock:
    best_s: float = math.inf
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    rounds: int = 0

    @property
    def mean_cpu_s(self) -> float:
        """Not the least: some systems count processor time in steps of 10 ms and more."""
        return self.cpu_s / self.rounds


def _timed(*work: Callable[[], None]) -> list[_Clock]:
    """Does all of `work` in turn, again and again; the first time only warms up."""
    for each in work:
        each()
    clocks = [_Clock() for _ in work]
    started = time.perf_counter()
    while clocks[-1].rounds < _LEAST_ROUNDS or time.perf_counter() - started < _BUDGET_S:
        for clock, each in zip(clocks, work, strict=True):
            begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
            each()
            elapsed_s = time.perf_counter() - begun_s
            clock.best_s = min(clock.best_s, elapsed_s)
            clock.elapsed_s += elapsed_s
            clock.cpu_s += time.process_time() - begun_cpu_s
            clock.rounds += 1
    return clocks
