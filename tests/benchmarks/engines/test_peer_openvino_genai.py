"""OpenVINO GenAI's adapter, on a stand-in that behaves as version 2026.4 was seen to."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pocketlm_benchmarks.engines import openvino_genai
from pocketlm_benchmarks.engines.openvino_genai import OpenVINOGenAI
from pocketlm_benchmarks.engines.protocol import EngineError, EngineMissingError, EngineSpec, Query

END_OF_TEXT = 9
STEP_S = 0.25


class FakeHandle:
    """A request: the next token is the last one plus one."""

    def __init__(self, ids: list[int], config: Any) -> None:
        self._last, self._config = ids[-1], config
        self._new: list[int] = []
        self.left = config.max_new_tokens

    def advance(self) -> None:
        self._last += 1
        self._new.append(self._last)
        is_ended = self._last == END_OF_TEXT and not self._config.ignore_eos
        self.left = 0 if is_ended else self.left - 1

    def can_read(self) -> bool:
        return bool(self._new)

    def read(self) -> dict[int, Any]:
        assert self._new  # the real one waits for more
        new, self._new = self._new, []
        return {0: SimpleNamespace(generated_ids=new)}


class FakePipeline:
    def __init__(self, path: str, scheduler: Any, device: str, properties: dict[str, Any]) -> None:
        self.made_with = (path, device, properties)
        self.scheduler = scheduler
        self.now_s = 10.0
        self.requests: dict[int, FakeHandle] = {}
        self.refuses = False
        made.append(self)

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(decode=self._decode)

    def _decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        self.now_s += 100.0
        return " ".join(map(str, ids))

    def add_request(self, request_id: int, ids: Any, config: Any) -> FakeHandle:
        assert request_id not in self.requests
        assert (ids.dtype, ids.shape[0]) == (np.int64, 1)
        assert config.do_sample is False
        self.requests[request_id] = FakeHandle(ids[0].tolist(), config)
        return self.requests[request_id]

    def _running(self) -> list[FakeHandle]:
        return [handle for handle in self.requests.values() if handle.left]

    def has_non_finished_requests(self) -> bool:
        return bool(self._running()) and not self.refuses

    def step(self) -> None:
        self.now_s += STEP_S
        for handle in self._running():
            handle.advance()


made: list[FakePipeline] = []


def type_of(device: str, name: str) -> Any:
    assert device == "CPU"
    names = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "u8"}
    return SimpleNamespace(to_string=lambda: names[name])


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    genai = SimpleNamespace(
        __version__="2026.4.1",
        SchedulerConfig=lambda: SimpleNamespace(enable_prefix_caching=True, max_num_batched_tokens=256),
        GenerationConfig=lambda: SimpleNamespace(do_sample=True, ignore_eos=False),
        ContinuousBatchingPipeline=FakePipeline,
    )
    runtime = SimpleNamespace(Tensor=lambda array: array, Core=lambda: SimpleNamespace(get_property=type_of))
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    monkeypatch.setitem(sys.modules, "openvino", runtime)
    clock = SimpleNamespace(perf_counter=lambda: made[-1].now_s if made else 0.0)
    monkeypatch.setattr(openvino_genai, "time", clock)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF general.file_type\x04\0\0\0\x07\0\0\0")
    return path


def spec(weights: Path) -> EngineSpec:
    return EngineSpec("openvino", str(weights), threads=3, context_length=64)


def test_one_query(weights: Path) -> None:
    engine = OpenVINOGenAI(spec(weights))
    (trace,) = engine.answer([Query((4, 7), 4)])
    assert trace.text == "8 9 10 11"  # past the end of text
    assert (trace.prompt_tokens, trace.cached_tokens, trace.new_tokens, trace.decode_tokens) == (2, 0, 4, 3)
    assert trace.prefill_s == STEP_S
    assert trace.gaps_s == (STEP_S,) * 3
    assert engine.answer([Query((1,), 1)])[0].prefill_s == STEP_S
    assert not made[0].scheduler.enable_prefix_caching
    engine.close()


def test_several_queries(weights: Path) -> None:
    traces = OpenVINOGenAI(spec(weights)).answer([Query((4, 7), 3), Query((1,), 2), Query((2,), 1)])
    assert [trace.text for trace in traces] == ["8 9 10", "2 3", "3"]
    assert [trace.prefill_s for trace in traces] == [STEP_S] * 3
    assert [trace.gaps_s for trace in traces] == [(STEP_S, STEP_S), (STEP_S,), ()]


def test_a_request_that_it_gives_up(weights: Path) -> None:
    engine = OpenVINOGenAI(spec(weights))
    made[0].refuses = True
    with pytest.raises(EngineError, match="0 tokens came, 2 were asked for"):
        engine.answer([Query((1,), 2)])


def test_info_of_a_gguf_file(weights: Path) -> None:
    info = OpenVINOGenAI(spec(weights)).info
    assert made[0].made_with == (str(weights), "CPU", {"INFERENCE_NUM_THREADS": 3})
    assert (info.name, info.version, info.precision) == ("openvino", "2026.4.1", "Q8_0")
    assert info.weight_bytes == weights.stat().st_size
    assert info.load_s is not None
    assert info.note.startswith("computes in bf16, KV cache in u8, ")
    assert info.note.endswith("converts the GGUF file each time it is loaded")


def test_info_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.xml").write_text('<net><data element_type="i4" offset="0" size="90"/></net>')
    (tmp_path / "openvino_model.bin").write_bytes(bytes(1000))
    info = OpenVINOGenAI(spec(tmp_path)).info
    assert info.precision == "i4"
    assert info.weight_bytes == 1000 + (tmp_path / "openvino_model.xml").stat().st_size
    assert "GGUF" not in info.note


def test_another_folder(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no openvino_model\.xml.*optimum-cli export openvino"):
        OpenVINOGenAI(spec(tmp_path))


@pytest.mark.parametrize("package", ["openvino", "openvino_genai"])
def test_not_installed(monkeypatch: pytest.MonkeyPatch, weights: Path, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineMissingError, match="Install it with: pip install openvino-genai"):
        OpenVINOGenAI(spec(weights))
