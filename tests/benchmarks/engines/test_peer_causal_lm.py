"""transformers, the real one, on a tiny checkpoint; and optimum as a stand-in around the same model."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from helpers.tiny import CONFIG, VOCABULARY, tiny_checkpoint, tokenizer_json, write_folder
from pocketlm.sources import SourceFiles
from pocketlm_benchmarks.engines.optimum_engine import OptimumORT
from pocketlm_benchmarks.engines.protocol import EngineMissingError, EngineSpec, Query
from pocketlm_benchmarks.engines.transformers_engine import Transformers

TOKENIZER = Tokenizer.from_str(tokenizer_json())
PROMPTS = [(40, 41, 42, 43, 44, 45, 46), (7, 8, 9), (100, 3)]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The number of threads is the whole process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def spec(weights: Path, *, threads: int = 1) -> EngineSpec:
    return EngineSpec("transformers", str(weights), threads=threads, context_length=64)


def reference(folder: Path, prompt_ids: tuple[int, ...], new_tokens: int) -> str:
    """Greedy without a cache: each token from the whole sequence before it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = [*prompt_ids]
    for _ in range(new_tokens):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(TOKENIZER.decode(ids[len(prompt_ids) :], skip_special_tokens=False))


def test_greedy(tiny_source: SourceFiles) -> None:
    engine = Transformers(spec(tiny_source.path))
    query = Query(PROMPTS[0], 6)
    (first,), (again,) = engine.answer([query]), engine.answer([query])
    assert first.text == again.text == reference(tiny_source.path, PROMPTS[0], 6)
    assert (first.prompt_tokens, first.cached_tokens, first.new_tokens) == (7, 0, 6)
    assert first.decode_tokens == len(first.gaps_s) == 5
    assert first.prefill_s is not None and first.prefill_s > 0
    assert first.decode_s == pytest.approx(sum(first.gaps_s))
    engine.close()


def test_a_batch_answers_as_one_by_one(tiny_source: SourceFiles) -> None:
    """Prompts of different lengths, answers too."""
    queries = [Query(prompt, n) for prompt, n in zip(PROMPTS, (6, 3, 1), strict=True)]
    traces = Transformers(spec(tiny_source.path)).answer(queries)
    assert [trace.text for trace in traces] == [
        reference(tiny_source.path, query.prompt_ids, query.new_tokens) for query in queries
    ]
    assert [trace.new_tokens for trace in traces] == [6, 3, 1]
    assert [trace.prompt_tokens for trace in traces] == [7, 3, 2]
    assert traces[2].decode_s is None


def test_end_of_text_is_ignored(tmp_path: Path) -> None:
    """All logits are equal, so that token 0 comes each time; it is the end of text here."""
    head = np.zeros((VOCABULARY, CONFIG["hidden_size"]), np.float32)
    write_folder(tmp_path, tiny_checkpoint(change={"lm_head.weight": head}, eos_token_id=0))
    (trace,) = Transformers(spec(tmp_path)).answer([Query((5, 6), 4)])
    assert trace.text == TOKENIZER.decode([0] * 4)


def test_info(tiny_source: SourceFiles) -> None:
    info = Transformers(spec(tiny_source.path, threads=2)).info
    assert torch.get_num_threads() == 2
    assert info.version == f"{transformers.__version__}, torch {torch.__version__}"
    assert (info.name, info.precision) == ("transformers", "float32")
    tensors = tiny_checkpoint().tensors.values()
    assert info.weight_bytes == sum(tensor.nbytes for tensor in tensors)
    assert info.load_s is not None and info.load_s > 0
    assert info.sampling_included
    assert "one padded batch" in info.note


@pytest.mark.parametrize(
    ("stored", "has", "expected"),
    [
        ("bfloat16", {"avx2": True, "avx512_bf16": True}, "bfloat16"),
        ("bfloat16", {"avx2": True, "avx512_bf16": False}, "float32"),
        ("float32", {"amx_bf16": True}, "float32"),
    ],
)
def test_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: str, has: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    write_folder(tmp_path, tiny_checkpoint(dtype=stored))
    info = Transformers(spec(tmp_path)).info
    assert info.precision == expected
    tensors = tiny_checkpoint().tensors.values()
    assert info.weight_bytes == sum(t.size for t in tensors) * (2 if expected == "bfloat16" else 4)


def test_older_torch_has_no_capabilities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    write_folder(tmp_path, tiny_checkpoint(dtype="bfloat16"))
    assert Transformers(spec(tmp_path)).info.precision == "float32"


def test_a_gguf_file(monkeypatch: pytest.MonkeyPatch, tiny_source: SourceFiles, tmp_path: Path) -> None:
    """What transformers is asked for; its own reader of GGUF files is not under test."""
    expected = reference(tiny_source.path, PROMPTS[1], 3)
    real, asked = transformers.AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(folder: Path, **options: Any) -> Any:
        asked.append((folder, options.pop("gguf_file")))
        return real(tiny_source.path, **options)

    def tokenizer(folder: Path, **options: Any) -> Any:
        asked.append((folder, options["gguf_file"]))
        return SimpleNamespace(backend_tokenizer=TOKENIZER)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF general.file_type\x04\0\0\0\x07\0\0\0")
    engine = Transformers(spec(tmp_path / "m.gguf"))
    assert asked == [(tmp_path, "m.gguf")] * 2
    assert engine.info.note.endswith("weights of type Q8_0 turned into floats")
    assert engine.answer([Query(PROMPTS[1], 3)])[0].text == expected


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_gguf_file_needs_more_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None if name == package else ModuleType(name))
    with pytest.raises(EngineMissingError, match=rf"{package}.* torch gguf accelerate$"):
        Transformers(spec(tmp_path / "m.gguf"))


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineMissingError, match=rf'{package}.*Install it with: pip install "transformers'):
        Transformers(spec(tmp_path))


class FakeORTModel:
    """optimum's interface around a model of transformers: no choice of logits, a tuple for a cache."""

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self.asked = asked
        self.path = folder / "model.onnx"
        self.dtype = torch.float32
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: tuple[Any, ...] | None,
        position_ids: torch.Tensor,
        use_cache: bool,
    ) -> Any:
        cache = transformers.DynamicCache()
        for layer, (keys, values) in enumerate(past_key_values or ()):
            cache.update(keys, values, layer)
        logits = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=use_cache,
        ).logits
        kept = tuple((layer.keys, layer.values) for layer in cache.layers)
        return SimpleNamespace(logits=logits, past_key_values=kept)


@pytest.fixture
def optimum(monkeypatch: pytest.MonkeyPatch) -> list[FakeORTModel]:
    """Stands in for the package; holds the models that were loaded."""
    loaded: list[FakeORTModel] = []

    def from_pretrained(folder: Path, **options: Any) -> FakeORTModel:
        loaded.append(FakeORTModel(folder, options))
        return loaded[-1]

    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1.0" if name == "optimum-onnx" else version(name)
    )
    package = SimpleNamespace(ORTModelForCausalLM=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", package)
    return loaded


def exported(folder: Path) -> Path:
    write_folder(folder, tiny_checkpoint())
    (folder / "model.onnx").write_bytes(bytes(10))
    (folder / "model.onnx_data").write_bytes(bytes(500))
    return folder


def test_optimum(optimum: list[FakeORTModel], tmp_path: Path) -> None:
    engine = OptimumORT(spec(exported(tmp_path), threads=3))
    queries = [Query(prompt, n) for prompt, n in zip(PROMPTS, (6, 3, 1), strict=True)]
    expected = [reference(tmp_path, query.prompt_ids, query.new_tokens) for query in queries]
    assert [engine.answer([query])[0].text for query in queries] == expected
    assert [trace.text for trace in engine.answer(queries)] == expected
    asked = optimum[0].asked
    assert asked.pop("session_options").intra_op_num_threads == 3
    assert asked == {"export": False, "provider": "CPUExecutionProvider", "local_files_only": True}
    assert engine.info.version.startswith("optimum-onnx 0.1.0, onnxruntime ")
    assert (engine.info.precision, engine.info.weight_bytes) == ("float32", 510)
    assert engine.info.load_s is not None
    assert "exported when" not in engine.info.note
    engine.close()


def test_optimum_names_the_type_of_quantized_weights(optimum: list[FakeORTModel], tmp_path: Path) -> None:
    record = {"quantization": {"weights_dtype": "QInt8", "activations_dtype": "QUInt8"}}
    (exported(tmp_path) / "ort_config.json").write_text(json.dumps(record))
    assert OptimumORT(spec(tmp_path)).info.precision == "QInt8"
    (tmp_path / "ort_config.json").write_text(json.dumps({"quantization": None}))
    assert OptimumORT(spec(tmp_path)).info.precision == "float32"


def test_optimum_exports_a_checkpoint(optimum: list[FakeORTModel], tiny_source: SourceFiles) -> None:
    info = OptimumORT(spec(tiny_source.path)).info
    assert optimum[0].asked["export"] is True
    assert info.load_s is None
    assert info.weight_bytes is None
    assert "exported when it was loaded" in info.note


def test_optimum_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", None)
    with pytest.raises(EngineMissingError, match=r'Install it with: pip install "optimum-onnx'):
        OptimumORT(spec(tmp_path))
