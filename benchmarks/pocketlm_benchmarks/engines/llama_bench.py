"""llama.cpp's own benchmark program, for the synthetic cases.

Each query is a run of the program of its own, with random token ids instead of the query's. The program
times prompt or answer alone, without tokenization and sampling, behind a run that warms it up. That run and
the loading lie in the window too, so the window's energy says nothing about the query.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from pocketlm_benchmarks.engines.protocol import (
    EngineError,
    EngineInfo,
    EngineMissingError,
    EngineSpec,
    Query,
    Trace,
)

PROGRAM = "llama-bench"
_STDERR_LINES_SHOWN = 8


class LlamaBench:
    """Runs the program anew for each query, on the processor, with flash attention."""

    def __init__(self, spec: EngineSpec) -> None:
        """`spec.weights` is a GGUF file. Raises EngineMissingError without the program, and EngineError."""
        program = shutil.which(spec.program or PROGRAM)
        if program is None:
            raise EngineMissingError(
                f"the program {spec.program or PROGRAM} was not found. It comes with llama.cpp "
                "(https://github.com/ggml-org/llama.cpp); put it on PATH."
            )
        # `-dev none`: no graphics card takes part. Flash attention as in the Python binding's adapter.
        self._command = [program, "-m", spec.weights, "-t", str(spec.threads)]
        self._command += ["-dev", "none", "-fa", "1", "-r", "1", "-o", "json"]
        facts = self._run("-p", "1", "-n", "0", "--no-warmup")
        self.info = EngineInfo(
            name=PROGRAM,
            version=f"build {facts['build_number']} ({facts['build_commit']})",
            precision=_precision(facts["model_type"]),
            weight_bytes=int(facts["model_size"]),
            load_s=None,
            sampling_included=False,
            note="random token ids, processor only, flash attention on, KV cache in 16 bits",
            energy_seen="never",
        )

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        for query in queries:
            if query.messages:
                raise EngineMissingError(f"{PROGRAM} runs no prompts, only the synthetic cases")
        return [self._trace(query) for query in queries]

    def close(self) -> None:
        """Nothing runs between two queries."""

    def _trace(self, query: Query) -> Trace:
        prompt, decoded = len(query.prompt_ids), query.new_tokens - 1
        if not decoded:
            run = self._run("-p", str(prompt), "-n", "0")
            return Trace(prompt, 0, 1, _sample_s(run), None, 0, (), "")
        run = self._run("-p", "0", "-n", str(decoded), "-d", str(prompt))
        return Trace(prompt, 0, query.new_tokens, None, _sample_s(run), decoded, (), "")

    def _run(self, *test: str) -> dict[str, Any]:
        """The one result of a test."""
        done = subprocess.run(
            [*self._command, *test],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode:
            last = "\n  ".join(done.stderr.splitlines()[-_STDERR_LINES_SHOWN:])
            raise EngineError(f"{PROGRAM} {' '.join(test)} ended with exit code {done.returncode}:\n  {last}")
        try:
            results: list[dict[str, Any]] = json.loads(done.stdout)
            (result,) = results
        except ValueError:
            raise EngineError(
                f"{PROGRAM} {' '.join(test)} printed {done.stdout[:200]!r}; one result as JSON is expected"
            ) from None
        return result


def _sample_s(run: dict[str, Any]) -> float:
    (sample_ns,) = run["samples_ns"]
    return float(sample_ns) / 1e9


def _precision(model_type: str) -> str:
    """`"llama 1B Q4_K - Medium"` → `"Q4_K - Medium"`."""
    words = model_type.split(" ", 2)
    return words[2] if len(words) == 3 else model_type
