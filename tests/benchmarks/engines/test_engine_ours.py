"""Our own engine and the worker's requests, in this process; and what the arrivals of tokens become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import pocketlm
from pocketlm.errors import InvalidSettingError
from pocketlm_benchmarks.engines.arrivals import trace_of
from pocketlm_benchmarks.engines.pocketlm_engine import PocketlmEngine
from pocketlm_benchmarks.engines.protocol import EngineError, EngineSpec, Query
from pocketlm_benchmarks.engines.registry import OURS, adapter_of
from pocketlm_benchmarks.engines.worker import serve

PROMPT = tuple(range(5, 45))


def spec(bundle: Path, context_length: int = 64) -> EngineSpec:
    return EngineSpec(OURS, str(bundle), threads=1, context_length=context_length)


def test_answers_as_the_model_does(int8_bundle: Path) -> None:
    engine = PocketlmEngine(spec(int8_bundle))
    with pocketlm.load(int8_bundle, threads=1) as model:
        manifest = model.manifest
        expected = model.generate(PROMPT, max_tokens=6, ignore_eos=True).text
    assert (engine.info.name, engine.info.precision) == ("pocketlm", "int8")
    assert engine.info.weight_bytes == manifest.bytes
    assert engine.info.load_s is not None
    assert engine.info.load_s > 0
    for _ in range(2):  # the second time nothing is reused either
        (trace,) = engine.answer([Query(PROMPT, 6)])
        assert (trace.prompt_tokens, trace.cached_tokens, trace.new_tokens) == (40, 0, 6)
        assert trace.text == expected
        assert trace.decode_tokens == len(trace.gaps_s) == 5
        assert trace.decode_s == pytest.approx(sum(trace.gaps_s))
    engine.close()


def test_several_queries_are_handed_over_together(int8_bundle: Path) -> None:
    engine = PocketlmEngine(spec(int8_bundle))
    first, second = engine.answer([Query(PROMPT, 3), Query(PROMPT[:5], 1)])
    engine.close()
    assert first.prefill_s is not None
    assert first.decode_s is not None
    assert second.prefill_s is not None
    assert (first.new_tokens, second.new_tokens) == (3, 1)
    # Each from an empty cache, computed together: neither has anything of the other.
    assert (first.cached_tokens, second.cached_tokens) == (0, 0)
    assert (second.decode_s, second.decode_tokens, second.gaps_s) == (None, 0, ())


def test_an_answer_that_does_not_fit(int8_bundle: Path) -> None:
    engine = PocketlmEngine(spec(int8_bundle, context_length=42))
    with pytest.raises(EngineError, match="2 tokens came, 6 were asked for"):
        engine.answer([Query(PROMPT, 6)])
    engine.close()


def test_a_context_that_the_model_lacks(int8_bundle: Path) -> None:
    with pytest.raises(InvalidSettingError, match="context_length is 100,000"):
        PocketlmEngine(spec(int8_bundle, context_length=100_000))


def test_trace_of_arrivals() -> None:
    trace = trace_of(
        Query((1, 2), 3), handed_over_s=1.0, arrivals_s=(1.5, 1.75, 2.25), text="x", cached_tokens=1
    )
    assert (trace.prefill_s, trace.decode_s, trace.gaps_s) == (0.5, 0.75, (0.25, 0.5))
    assert (trace.prompt_tokens, trace.cached_tokens, trace.new_tokens, trace.decode_tokens) == (2, 1, 3, 2)
    for arrivals_s in ((), (1.5,)):
        with pytest.raises(EngineError, match=f"{len(arrivals_s)} tokens came, 3 were asked for"):
            trace_of(Query((1, 2), 3), handed_over_s=1.0, arrivals_s=arrivals_s, text="")


def served(*requests: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    replies: list[Mapping[str, Any]] = []
    serve([json.dumps(request).encode() for request in requests], replies.append)
    return replies


def test_the_worker_serves_our_engine(int8_bundle: Path) -> None:
    fields = {"kind": OURS, "weights": str(int8_bundle), "threads": 1, "context_length": 64}
    query = {"prompt_ids": list(PROMPT), "new_tokens": 2, "messages": []}
    info, answer = served(
        {"open": fields, "adapter": adapter_of(OURS)},
        {"answer": {"queries": [query], "repeat": 2}},
        {"close": True},
        {"answer": {"queries": [query], "repeat": 1}},  # nobody hears this
    )
    assert info["info"]["name"] == "pocketlm"
    assert [trace["new_tokens"] for trace in answer["traces"]] == [2, 2]
    assert len(answer["walls_s"]) == 2
    json.dumps(answer, allow_nan=False)


def test_the_worker_reports_errors(capfd: pytest.CaptureFixture[str]) -> None:
    fields = {"kind": OURS, "weights": "nowhere", "threads": 1, "context_length": 64}
    early, unknown, adapter = served(
        {"answer": {"queries": [], "repeat": 1}},
        {"open": fields, "adapter": adapter_of(OURS)},
        {"open": fields, "adapter": "pocketlm_benchmarks.engines.nothing:Nothing"},
    )
    assert early["error"] == {"kind": "failed", "message": "the engine was asked before it was opened"}
    assert "nowhere" in unknown["error"]["message"]
    assert adapter["error"]["message"].startswith("ModuleNotFoundError: No module named")
    assert "Traceback" in capfd.readouterr().err  # of the last one, which nobody expects
