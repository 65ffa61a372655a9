"""llama.cpp through its Python binding, llama-cpp-python.

Its loop for text is left out: this one puts token ids in and takes the likeliest token out, which is the
least that its own library has to do.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Any

from pocketlm_benchmarks.engines.arrivals import trace_of
from pocketlm_benchmarks.engines.protocol import EngineInfo, EngineMissingError, EngineSpec, Query, Trace

INSTALL = "pip install llama-cpp-python"


class LlamaCpp:
    """Answers one query after the other, each from an empty cache, on the processor, with flash attention."""

    def __init__(self, spec: EngineSpec) -> None:
        """`spec.weights` is a GGUF file. Raises EngineMissingError, and what llama-cpp-python raises."""
        try:
            llama_cpp: Any = importlib.import_module("llama_cpp")
            self._np: Any = importlib.import_module("numpy")
        except ImportError as error:
            raise EngineMissingError(f"{error}. Install it with: {INSTALL}") from None
        self._llama_cpp = llama_cpp
        begun = time.perf_counter()
        self._llm: Any = llama_cpp.Llama(
            spec.weights,
            n_gpu_layers=0,
            offload_kqv=False,
            op_offload=False,
            n_ctx=spec.context_length,
            n_threads=spec.threads,
            n_threads_batch=spec.threads,
            flash_attn=True,
            no_perf=True,
        )
        load_s = time.perf_counter() - begun
        self.info = EngineInfo(
            name="llama.cpp",
            version=f"llama-cpp-python {llama_cpp.__version__}",
            precision=self._precision(),
            weight_bytes=int(llama_cpp.llama_model_size(self._llm.model)),
            load_s=load_s,
            sampling_included=True,
            note=f"processor only, flash attention on, KV cache in 16 bits, built with {self._features()}",
        )

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        handed_over_s = time.perf_counter()
        return [self._trace(query, handed_over_s) for query in queries]

    def close(self) -> None:
        self._llm.close()

    def _trace(self, query: Query, handed_over_s: float) -> Trace:
        llm, arrivals_s, text = self._llm, [], b""
        llm.reset()
        llm.eval(query.prompt_ids)
        for remaining in range(query.new_tokens - 1, -1, -1):
            token_id = self._likeliest()
            text += llm.detokenize([token_id])
            arrivals_s.append(time.perf_counter())
            if remaining:
                llm.eval([token_id])
        return trace_of(
            query,
            handed_over_s=handed_over_s,
            arrivals_s=arrivals_s,
            text=text.decode("utf-8", errors="replace"),
        )

    def _likeliest(self) -> int:
        """The token with the highest logit behind the last one that was put in."""
        logits = self._llama_cpp.llama_get_logits_ith(self._llm.ctx, -1)
        return int(self._np.ctypeslib.as_array(logits, shape=(self._llm.n_vocab(),)).argmax())

    def _precision(self) -> str:
        """The name of the file's type, after llama.cpp's own table."""
        file_type = self._llm.metadata.get("general.file_type")
        names: dict[str, Any] = vars(self._llama_cpp)
        for prefix in ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"):
            for name, value in names.items():
                if name.startswith(prefix) and str(value) == file_type:
                    return name.removeprefix(prefix)
        return "unknown"

    def _features(self) -> str:
        """The instruction sets that the library was compiled for: "AVX2, FMA"."""
        printed: str = self._llama_cpp.llama_print_system_info().decode()
        pairs = (entry.partition("=") for entry in printed.rpartition("CPU :")[2].split("|"))
        return (
            ", ".join(name.strip() for name, _, value in pairs if value.strip() == "1") or "unknown features"
        )
