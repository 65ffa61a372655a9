"""OpenVINO GenAI's continuous batching pipeline, on the processor.

Its LLMPipeline is the same pipeline behind a thread that hands the tokens over, so that the times would be
the thread's. By default it also keeps prompts and computes none of them twice.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocketlm_benchmarks.engines.arrivals import trace_of
from pocketlm_benchmarks.engines.protocol import (
    EngineError,
    EngineInfo,
    EngineMissingError,
    EngineSpec,
    Query,
    Trace,
)
from pocketlm_benchmarks.engines.weight_files import bytes_of, gguf_type, openvino_type

INSTALL = "pip install openvino-genai"
# As LLMPipeline has it: prompts are computed in one piece, as long as memory allows.
_TOKENS_PER_STEP = 1 << 31


class OpenVINOGenAI:
    """Answers queries together, each from an empty cache."""

    def __init__(self, spec: EngineSpec) -> None:
        """`spec.weights` is an OpenVINO model folder, or a GGUF file, which it converts when it is loaded.

        Raises EngineMissingError, EngineError for a folder of another kind, and what the package raises.
        """
        try:
            self._numpy: Any = importlib.import_module("numpy")
            self._openvino: Any = importlib.import_module("openvino")
            self._genai: Any = importlib.import_module("openvino_genai")
        except ImportError as error:
            raise EngineMissingError(f"{error}. Install it with: {INSTALL}") from None
        path = Path(spec.weights)
        precision, weight_bytes = _weights(path)
        scheduler = self._genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = _TOKENS_PER_STEP
        begun = time.perf_counter()
        properties = {"INFERENCE_NUM_THREADS": spec.threads}
        self._pipeline: Any = self._genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", properties)
        self._tokenizer: Any = self._pipeline.get_tokenizer()
        load_s = time.perf_counter() - begun
        self._requests = 0
        self.info = EngineInfo(
            name="openvino",
            version=self._genai.__version__,
            precision=precision,
            weight_bytes=weight_bytes,
            load_s=load_s,
            sampling_included=True,
            note=self._note(is_gguf=path.is_file()),
        )

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        handed_over_s = time.perf_counter()
        handles = [self._request(query) for query in queries]
        token_ids: list[list[int]] = [[] for _ in queries]
        arrivals_s: list[list[float]] = [[] for _ in queries]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for row, handle in enumerate(handles):
                new = _read(handle)
                token_ids[row] += new
                arrivals_s[row] += [time.perf_counter()] * len(new)
        return [
            trace_of(query, handed_over_s=handed_over_s, arrivals_s=arrivals, text=self._decode(ids))
            for query, ids, arrivals in zip(queries, token_ids, arrivals_s, strict=True)
        ]

    def close(self) -> None:
        del self._tokenizer, self._pipeline

    def _request(self, query: Query) -> Any:
        config = self._genai.GenerationConfig()
        config.do_sample = False
        config.ignore_eos = True
        config.max_new_tokens = query.new_tokens
        self._requests += 1
        ids = self._openvino.Tensor(self._numpy.array([query.prompt_ids], dtype=self._numpy.int64))
        return self._pipeline.add_request(self._requests, ids, config)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _note(self, *, is_gguf: bool) -> str:
        """What it chose for itself on this processor."""
        core = self._openvino.Core()
        computes, caches = (
            core.get_property("CPU", name).to_string()
            for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        )
        return (
            f"computes in {computes}, KV cache in {caches}, no prefix cache, several queries in one batch, "
            "detokenization not timed as its streamer does it beside the model"
            + (", converts the GGUF file each time it is loaded" if is_gguf else "")
        )


def _read(handle: Any) -> list[int]:
    """The tokens of a request that came since the last time."""
    outputs = handle.read().values() if handle.can_read() else ()
    return [token_id for output in outputs for token_id in output.generated_ids]


def _weights(path: Path) -> tuple[str, int]:
    """Precision and size."""
    if path.is_file():
        return gguf_type(path), path.stat().st_size
    graph = path / "openvino_model.xml"
    if not graph.is_file():
        raise EngineError(
            f"{path} has no openvino_model.xml. Export one with: "
            "optimum-cli export openvino --model CHECKPOINT_FOLDER FOLDER; or give a GGUF file."
        )
    return openvino_type(graph), bytes_of([graph, graph.with_suffix(".bin")])
