"""Our own engine: the runtime on a bundle folder."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pocketlm_benchmarks.engines.arrivals import trace_of
from pocketlm_benchmarks.engines.protocol import EngineInfo, EngineSpec, Query, Trace


class PocketlmEngine:
    """Answers the queries that are handed over together together, each from an empty cache.

    Speculation is on for real prompts, as it is for users. In the synthetic grid it is off: what a model
    answers to random tokens repeats itself, and drafts of that would flatter the figures.
    """

    def __init__(self, spec: EngineSpec) -> None:
        """Raises what `pocketlm.load` raises."""
        from pocketlm.engine import load  # the packages behind it are not part of the loading time

        begun = time.perf_counter()
        self._model = load(
            Path(spec.weights),
            context_length=spec.context_length,
            threads=spec.threads,
            concurrency=16,
        )
        load_s = time.perf_counter() - begun
        manifest = self._model.manifest
        self.info = EngineInfo(
            name="pocketlm",
            version=importlib.metadata.version("pocketlm"),
            precision=manifest.precision.name,
            weight_bytes=manifest.bytes,
            load_s=load_s,
            sampling_included=True,
            note="checks the sha256 of its files while it loads them; speculation on real prompts only",
        )

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        with ThreadPoolExecutor(len(queries)) as threads:
            handed_over_s = time.perf_counter()
            return list(threads.map(lambda query: self._trace(query, handed_over_s), queries))

    def close(self) -> None:
        self._model.close()

    def _trace(self, query: Query, handed_over_s: float) -> Trace:
        stream = self._model.stream(
            query.prompt_ids,
            max_tokens=query.new_tokens,
            ignore_eos=True,
            cache_prompt=False,
            speculate=bool(query.messages),
        )
        arrivals_s: list[float] = []
        with stream:
            for _ in stream:
                arrivals_s.append(time.perf_counter())  # noqa: PERF401  # the clock is read between two tokens
        completion = stream.completion
        return trace_of(
            query,
            handed_over_s=handed_over_s,
            arrivals_s=arrivals_s,
            text=completion.text,
            cached_tokens=completion.usage.cached_tokens,
        )
