"""optimum's ORTModelForCausalLM: transformers' interface on an ONNX Runtime session, on the processor."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocketlm_benchmarks.engines.causal_lm import CausalLM, read_tokenizer
from pocketlm_benchmarks.engines.protocol import EngineInfo, EngineMissingError, EngineSpec, Query, Trace
from pocketlm_benchmarks.engines.weight_files import bytes_of

INSTALL = 'pip install "optimum-onnx[onnxruntime]" torch'


class OptimumORT:
    """Answers queries together, each from an empty cache."""

    def __init__(self, spec: EngineSpec) -> None:
        """`spec.weights` is a folder that optimum exported, or a checkpoint folder, which it exports first.

        Raises EngineMissingError, and what optimum raises for weights that it cannot read.
        """
        try:
            onnxruntime: Any = importlib.import_module("onnxruntime")
            optimum: Any = importlib.import_module("optimum.onnxruntime")
        except ImportError as error:
            raise EngineMissingError(f"{error}. Install it with: {INSTALL}") from None
        folder = Path(spec.weights)
        is_exported = any(folder.glob("**/*.onnx"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec.threads
        begun = time.perf_counter()
        self._model: Any = optimum.ORTModelForCausalLM.from_pretrained(
            folder,
            export=not is_exported,
            session_options=options,
            provider="CPUExecutionProvider",
            local_files_only=True,
        )
        self._lm = CausalLM(self._model, read_tokenizer(folder), all_logits=True)
        load_s = time.perf_counter() - begun
        self.info = EngineInfo(
            name="optimum",
            version=f"optimum-onnx {importlib.metadata.version('optimum-onnx')}, "
            f"onnxruntime {onnxruntime.__version__}",
            precision=_precision(self._model, folder),
            weight_bytes=bytes_of(_graph_files(self._model)) if is_exported else None,
            load_s=load_s if is_exported else None,
            sampling_included=True,
            note="several queries as one padded batch, logits of every prompt position"
            + ("" if is_exported else ", exported when it was loaded: its memory holds the exporter's"),
        )

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        return self._lm.answer(queries)

    def close(self) -> None:
        del self._lm, self._model


def _precision(model: Any, folder: Path) -> str:
    """The weights' type after optimum's own record of a quantization; without one the graph's type."""
    path = folder / "ort_config.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    quantized = (record.get("quantization") or {}).get("weights_dtype")
    return quantized or str(model.dtype).removeprefix("torch.")


def _graph_files(model: Any) -> list[Path]:
    """The graph and the files with its weights: model.onnx, model.onnx_data or model.onnx.data."""
    graph = Path(model.path)
    return sorted(graph.parent.glob(f"{graph.name}*"))
