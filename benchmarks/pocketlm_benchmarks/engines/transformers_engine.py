"""transformers' models on torch, on the processor."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocketlm_benchmarks.engines.causal_lm import CausalLM, read_tokenizer
from pocketlm_benchmarks.engines.protocol import EngineInfo, EngineMissingError, EngineSpec, Query, Trace
from pocketlm_benchmarks.engines.weight_files import gguf_type

INSTALL = 'pip install "transformers>=4.56" torch'
_FOR_GGUF = ("gguf", "accelerate")
# Instructions that multiply bfloat16, as torch.cpu.get_capabilities names them on x86 and on Arm.
_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


class Transformers:
    """Answers queries together, each from an empty cache."""

    def __init__(self, spec: EngineSpec) -> None:
        """`spec.weights` is a checkpoint folder or a GGUF file, whose weights transformers turns into floats.

        Raises EngineMissingError, and what transformers raises for weights that it cannot read.
        """
        path = Path(spec.weights)
        folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
        more = _FOR_GGUF if options else ()
        try:
            torch: Any = importlib.import_module("torch")
            transformers: Any = importlib.import_module("transformers")
            for package in more:
                importlib.import_module(package)
        except ImportError as error:
            install = " ".join([INSTALL, *more])
            raise EngineMissingError(f"{error}. Install it with: {install}") from None
        torch.set_num_threads(spec.threads)
        begun = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=_fast_type(torch, path), local_files_only=True, **options
        ).eval()
        self._lm = CausalLM(model, read_tokenizer(folder, **options))
        load_s = time.perf_counter() - begun
        self.info = EngineInfo(
            name="transformers",
            version=f"{transformers.__version__}, torch {torch.__version__}",
            precision=str(model.dtype).removeprefix("torch."),
            weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            load_s=load_s,
            sampling_included=True,
            note=f"eager, {model.config._attn_implementation} attention, several queries as one padded batch"
            + (f", weights of type {gguf_type(path)} turned into floats" if options else ""),
        )

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        return self._lm.answer(queries)

    def close(self) -> None:
        del self._lm


def _fast_type(torch: Any, weights: Path) -> Any:
    """bfloat16 if a checkpoint folder says so and the processor multiplies it; else float32.

    Without such instructions torch emulates bfloat16, several times slower than float32.
    """
    path = weights / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stored = config.get("dtype", config.get("torch_dtype"))
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_native = any(has.get(name, False) for name in _BFLOAT16)
    return torch.bfloat16 if stored == "bfloat16" and is_native else torch.float32
