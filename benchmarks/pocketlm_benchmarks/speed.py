"""Prefill and decode rates, load time and memory of one model on this device.

What bounds them: decoding reads every weight once for each token, so its rate is the memory bandwidth
divided by the bundle's size. Prefill uses each weight for many tokens, so its rate is the processor's
integer arithmetic divided by two operations for each weight and token. Attention comes on top of both and
grows with the context.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil

import pocketlm
from pocketlm.engine import Model, finish
from pocketlm.errors import InvalidSettingError
from pocketlm.hub import find_bundle
from pocketlm.progress import Progress, silent
from pocketlm.threads import thread_count

_SEED = 0
_LOADS = 3


@dataclass(frozen=True)
class Rate:
    """Tokens a second over the repetitions. Sampling and detokenization are included."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class SpeedReport:
    model: str
    precision: str
    bundle_bytes: int
    kl_mean: float | None  # the manifest's: speed is never shown without what it cost
    processor: str
    threads: int
    onnxruntime: str
    pocketlm: str
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    prefill: Rate  # of prompt_tokens, from an empty context
    decode_empty: Rate  # of new_tokens behind one token
    decode_deep: Rate  # of new_tokens behind prompt_tokens
    load_s: float  # median, files in the page cache, hashes checked
    resident_bytes: int  # of the whole process behind one answer of new_tokens to prompt_tokens
    peak_resident_bytes: int  # until then


def measure(
    name_or_path: str | Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repetitions: int = 5,
    threads: int | None = None,
    progress: Progress = silent,
) -> SpeedReport:
    """Speed of a model, fetched first if it has to be; the cache holds prompt and answer and no more.

    Raises InvalidSettingError for counts below one (two new tokens are the least), and what `pocketlm.load`
    raises.
    """
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("repetitions", repetitions, 1),
    ):
        if value < least:
            raise InvalidSettingError(f"{name} is {value}; at least {least} is expected.")
    folder = find_bundle(name_or_path, progress=progress)
    context_length = prompt_tokens + new_tokens

    def timed_load() -> tuple[Model, float]:
        begun = time.perf_counter()
        model = pocketlm.load(folder, context_length=context_length, threads=threads)
        return model, time.perf_counter() - begun

    model, first_load_s = timed_load()
    with model:
        rates = _Rates(model, prompt_tokens, new_tokens)
        rates.measure()  # to warm up
        memory, peak = psutil.Process().memory_info().rss, _peak_resident_bytes()
        prefill, empty, deep = rates.repeat(repetitions, progress)
    loads = [first_load_s]
    while len(loads) < _LOADS:
        model, load_s = timed_load()
        model.close()
        loads.append(load_s)
    quality = model.manifest.quality
    return SpeedReport(
        model=model.name,
        precision=model.manifest.precision.name,
        bundle_bytes=model.manifest.bytes,
        kl_mean=None if quality is None else quality.kl_mean,
        processor=_processor(),
        threads=thread_count(threads),
        onnxruntime=ort.__version__,
        pocketlm=importlib.metadata.version("pocketlm"),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        prefill=_rate(prefill),
        decode_empty=_rate(empty),
        decode_deep=_rate(deep),
        load_s=statistics.median(loads),
        resident_bytes=memory,
        peak_resident_bytes=peak,
    )


class _Rates:
    """Measures with new prompts each time, so that no cached prefix shortens the work."""

    def __init__(self, model: Model, prompt_tokens: int, new_tokens: int) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._new_tokens = new_tokens
        self._random = np.random.default_rng(_SEED)
        self._vocabulary = min(model.manifest.dimensions.vocabulary, model.tokenizer.vocabulary_size)

    def measure(self) -> tuple[float, float, float]:
        """Tokens a second: prefill, decode behind one token, decode behind the prompt."""
        prompt = self._random.integers(0, self._vocabulary, self._prompt_tokens).tolist()
        long, short = (
            finish(self._model.stream(ids, max_tokens=self._new_tokens, ignore_eos=True)).timings
            for ids in (prompt, prompt[:1])
        )
        return (
            long.prefill_tokens_per_s or 0.0,
            short.decode_tokens_per_s or 0.0,
            long.decode_tokens_per_s or 0.0,
        )

    def repeat(self, repetitions: int, progress: Progress) -> Iterator[tuple[float, ...]]:
        """For each of the three rates all of its repetitions."""
        measured = []
        for repetition in range(repetitions):
            progress("Measuring", repetition, repetitions, "repetitions")
            measured.append(self.measure())
        progress("Measuring", repetitions, repetitions, "repetitions")
        return zip(*measured, strict=True)


def _rate(rates: Sequence[float]) -> Rate:
    return Rate(statistics.median(rates), min(rates), max(rates))


def _peak_resident_bytes() -> int:
    """The most memory that this process has held so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
