"""onnxruntime-genai's adapter, on a stand-in that behaves as version 0.18 was seen to."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pocketlm_benchmarks.engines import onnxruntime_genai
from pocketlm_benchmarks.engines.onnxruntime_genai import OnnxRuntimeGenAI
from pocketlm_benchmarks.engines.protocol import EngineError, EngineMissingError, EngineSpec, Query

END_OF_TEXT = 9
PREFILL_S, STEP_S = 0.5, 0.125
NO_ERROR = 0


class FakeGenAI:
    """The package. The next token is the last one plus one; 9 ends a text unless that is too short."""

    EngineErrorCode = SimpleNamespace(NONE=NO_ERROR)

    def __init__(self) -> None:
        self.now_s = 100.0
        self.overlays: list[dict[str, Any]] = []
        self.searches: list[dict[str, Any]] = []
        self.requests: list[FakeRequest] = []
        self.engines = 0
        self.telemetry = True
        self.error_code = NO_ERROR

    def disable_telemetry_events(self) -> None:
        self.telemetry = False

    def Config(self, folder: str) -> Any:  # noqa: N802
        return SimpleNamespace(overlay=lambda text: self.overlays.append(json.loads(text)))

    def Model(self, config: Any) -> Any:  # noqa: N802
        return self

    def Tokenizer(self, model: Any) -> Any:  # noqa: N802
        return SimpleNamespace(create_stream=lambda: SimpleNamespace(decode=lambda token: f"<{token}>"))

    def GeneratorParams(self, model: Any) -> Any:  # noqa: N802
        return SimpleNamespace(set_search_options=lambda **options: self.searches.append(options))

    def Generator(self, model: Any, parameters: Any) -> FakeGenerator:  # noqa: N802
        return FakeGenerator(self)

    def Engine(self, model: Any) -> FakeEngine:  # noqa: N802
        self.engines += 1
        return FakeEngine(self)

    def RequestOptions(self) -> Any:  # noqa: N802
        options = SimpleNamespace()
        options.set_max_session_tokens = lambda n: setattr(options, "room", n)
        return options

    def TurnOptions(self, request: FakeRequest) -> Any:  # noqa: N802
        turn = SimpleNamespace()
        turn.set_do_sample = lambda value: setattr(turn, "do_sample", value)
        turn.set_min_generated_tokens = lambda n: setattr(turn, "least", n)
        turn.set_max_generated_tokens = lambda n: setattr(turn, "most", n)
        return turn


class FakeGenerator:
    def __init__(self, package: FakeGenAI) -> None:
        self._package = package
        self._ids: list[int] = []
        self._is_ended = False

    def append_tokens(self, ids: Any) -> None:
        assert ids.dtype == np.int32
        self._package.now_s += PREFILL_S
        self._ids += ids.tolist()

    def generate_next_token(self) -> None:
        self._package.now_s += STEP_S
        self._ids.append(self._ids[-1] + 1)
        too_short = len(self._ids) < self._package.searches[-1]["min_length"]
        self._is_ended = self._ids[-1] == END_OF_TEXT and not too_short

    def get_next_tokens(self) -> Any:
        return np.array(self._ids[-1:], dtype=np.int32)

    def is_done(self) -> bool:
        return self._is_ended or len(self._ids) >= self._package.searches[-1]["max_length"]


class FakeRequest:
    def __init__(self, room: int) -> None:
        self.room = room
        self.ids: list[int] = []
        self.left = 0
        self.closed = False

    def begin_turn(self, ids: Any, turn: Any) -> None:
        assert ids.dtype == np.int32
        assert turn.do_sample is False
        assert turn.least == turn.most
        assert len(ids) + turn.most == self.room
        self.ids, self.left = ids.tolist(), turn.most

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """Static batches of four: a next one begins when all of the last have finished."""

    def __init__(self, package: FakeGenAI) -> None:
        self._package = package
        self._running: list[FakeRequest] = []

    def create_event_buffer(self, capacity: int) -> int:
        return capacity

    def create_request(self, *, options: Any) -> FakeRequest:
        self._package.requests.append(FakeRequest(options.room))
        return self._package.requests[-1]

    def _waiting(self) -> list[FakeRequest]:
        return [request for request in self._package.requests if request.left]

    def has_pending_requests(self) -> bool:
        return bool(self._waiting())

    def run(self, events: int) -> Iterator[Any]:
        if not any(request.left for request in self._running):
            self._running = self._waiting()[:4]
            self._package.now_s += PREFILL_S
        self._package.now_s += STEP_S
        for request in self._running:
            if request.left:
                request.left -= 1
                request.ids.append(request.ids[-1] + 1)
                yield SimpleNamespace(
                    request=request, token=request.ids[-1], error_code=self._package.error_code
                )
                if not request.left:
                    yield SimpleNamespace(request=request, token=None, error_code=NO_ERROR)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> FakeGenAI:
    fake = FakeGenAI()
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", fake)
    monkeypatch.setattr(onnxruntime_genai, "time", SimpleNamespace(perf_counter=lambda: fake.now_s))
    monkeypatch.setattr(importlib.metadata, "version", {"onnxruntime-genai": "0.18.0"}.__getitem__)
    return fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"model": {"decoder": {"filename": "decoder.onnx"}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    (tmp_path / "decoder.onnx").write_bytes(b"\x0a\x04bits\x18\x08")
    (tmp_path / "decoder.onnx.data").write_bytes(bytes(1000))
    return tmp_path


def spec(folder: Path) -> EngineSpec:
    return EngineSpec("onnxruntime-genai", str(folder), threads=3, context_length=64)


def test_one_query(package: FakeGenAI, folder: Path) -> None:
    (trace,) = OnnxRuntimeGenAI(spec(folder)).answer([Query((4, 7), 4)])
    assert trace.text == "<8><9><10><11>"  # past the end of text
    assert (trace.prompt_tokens, trace.cached_tokens, trace.new_tokens, trace.decode_tokens) == (2, 0, 4, 3)
    assert trace.prefill_s == PREFILL_S + STEP_S
    assert trace.gaps_s == (STEP_S,) * 3
    assert trace.decode_s == 3 * STEP_S
    assert package.searches == [{"do_sample": False, "max_length": 6, "min_length": 6}]
    assert package.engines == 0


def test_several_queries(package: FakeGenAI, folder: Path) -> None:
    engine = OnnxRuntimeGenAI(spec(folder))
    queries = [Query((4, 7), 3), Query((1,), 2), Query((2,), 1), Query((3,), 2), Query((5,), 1)]
    traces = engine.answer(queries)
    assert [trace.text for trace in traces] == ["<8><9><10>", "<2><3>", "<3>", "<4><5>", "<6>"]
    first_s = PREFILL_S + STEP_S
    assert [trace.prefill_s for trace in traces] == [first_s] * 4 + [first_s + 2 * STEP_S + first_s]
    assert traces[0].gaps_s == (STEP_S, STEP_S)
    assert all(request.closed for request in package.requests)
    engine.answer(queries)
    assert package.engines == 1
    engine.close()


def test_a_failed_request(package: FakeGenAI, folder: Path) -> None:
    package.error_code = 7
    with pytest.raises(EngineError, match="gave up on a query: 7"):
        OnnxRuntimeGenAI(spec(folder)).answer([Query((1,), 2), Query((2,), 2)])
    assert [request.closed for request in package.requests] == [True, True]


def test_older_releases_answer_single_queries(
    package: FakeGenAI, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FakeGenAI, "TurnOptions")
    monkeypatch.delattr(FakeGenAI, "disable_telemetry_events")
    engine = OnnxRuntimeGenAI(spec(folder))
    assert engine.answer([Query((1,), 2)])[0].text == "<2><3>"
    with pytest.raises(EngineMissingError, match=r"several queries at once.*0\.18 or newer"):
        engine.answer([Query((1,), 2)] * 2)


def test_info(package: FakeGenAI, folder: Path) -> None:
    info = OnnxRuntimeGenAI(spec(folder)).info
    assert (info.name, info.version, info.precision) == ("onnxruntime-genai", "0.18.0", "int8")
    assert info.weight_bytes == 1008
    assert info.load_s == 0.0
    assert info.sampling_included
    assert package.overlays == [{"model": {"decoder": {"session_options": {"intra_op_num_threads": 3}}}}]
    assert not package.telemetry


def test_another_folder(package: FakeGenAI, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no genai_config\.json.*models\.builder"):
        OnnxRuntimeGenAI(spec(tmp_path))


def test_not_installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(EngineMissingError, match="Install it with: pip install onnxruntime-genai"):
        OnnxRuntimeGenAI(spec(folder))
