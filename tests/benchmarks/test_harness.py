"""From a model's name to a result, on a tiny bundle; our engine runs in this process to save its start."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.scripted import ScriptedEngine
from pocketlm.energy import MeterLogError
from pocketlm.errors import InvalidSettingError, ManifestError, ModelNotFoundError
from pocketlm_benchmarks import harness, physics
from pocketlm_benchmarks.cross_check import CrossCheckError
from pocketlm_benchmarks.engines.pocketlm_engine import PocketlmEngine
from pocketlm_benchmarks.engines.process import Answered
from pocketlm_benchmarks.engines.protocol import EngineError, EngineMissingError, EngineSpec, Query
from pocketlm_benchmarks.engines.registry import PeerSpec
from pocketlm_benchmarks.harness import Options, bench
from pocketlm_benchmarks.peaks import Peaks
from pocketlm_benchmarks.result import OURS, Result, parse_result, read_result, to_json, write_result

SMALL: dict[str, Any] = {
    "prompt_tokens": (16,),
    "new_tokens": 4,
    "depths": (0, 16),
    "workloads": (),
    "rounds": 3,
    "threads": 1,
    "quick": True,
    "energy": False,
}


class InProcess:
    """Our engine, here."""

    pid = os.getpid()

    def __init__(self, spec: EngineSpec) -> None:
        self._engine = PocketlmEngine(spec)
        self.info = self._engine.info

    def answer(self, queries: Sequence[Query]) -> Answered:
        begun_s = time.perf_counter()
        traces = self._engine.answer(queries)
        return Answered(tuple(traces), (time.perf_counter() - begun_s,))

    def close(self) -> None:
        self._engine.close()


def start(spec: EngineSpec) -> Any:
    if spec.kind == OURS:
        return InProcess(spec)
    if spec.weights == "missing":
        raise EngineMissingError("it is not installed")
    if spec.kind == "openvino":
        raise EngineError(f"{spec.weights} is damaged, says {spec.python}")
    return ScriptedEngine(spec, pid=os.getpid())


@pytest.fixture(autouse=True)
def peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's peaks take seconds to measure, and have tests of their own."""
    monkeypatch.setattr(harness, "measure_peaks", lambda threads, progress: Peaks(threads, 1e10, 1e11, 1e10))


def run(bundle: Path, **changes: Any) -> Result:
    return bench(bundle, Options(**{**SMALL, **changes}), start=start)


def test_a_whole_result(int8_bundle: Path, tmp_path: Path) -> None:
    result = run(int8_bundle, command="pocketlm bench tiny")
    assert [case.name for case in result.cases] == ["pp16", "tg4", "tg4@d16"]
    assert [(each.engine, each.case) for each in result.measurements] == [
        (OURS, case.name) for case in result.cases
    ]
    prefill = result.measurement(OURS, "pp16")
    assert prefill is not None
    assert prefill.metrics.keys() == {"ttft_s", "prefill_tokens_per_s"}
    assert prefill.metrics["ttft_s"].n == 3
    decode = result.measurement(OURS, "tg4@d16")
    assert decode is not None
    assert decode.metrics["itl_s"].n == 12
    assert decode.energy is None
    assert result.model.name == "tiny"
    assert result.model.precision == "int8"
    assert result.model.quality_manifest is not None
    assert result.model.quality_measured is None
    assert result.energy is None
    assert result.sustained is None
    assert result.physics is not None
    assert result.physics.mbu.keys() == {"tg4", "tg4@d16"}
    assert result.physics.mfu.keys() == {"pp16"}
    assert result.engines[0].weights == int8_bundle.name
    assert result.settings.warm_up == {OURS: 6}
    assert result.command == "pocketlm bench tiny"
    write_result(result, tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == result
    assert str(tmp_path.parent) not in (tmp_path / "result.json").read_text()


def test_energy_and_speed_come_from_the_same_blocks(int8_bundle: Path) -> None:
    result = run(int8_bundle, energy=True, depths=(0,), rounds=1)
    assert result.energy is not None
    assert len(result.energy.idle) == 2
    decode = result.measurement(OURS, "tg4")
    assert decode is not None
    assert decode.energy is not None
    assert decode.energy.total_j.value > 0
    assert decode.energy.per_new_token_j is not None
    block = decode.blocks[0]
    assert len(decode.samples["tpot_s"]) == block.queries
    assert block.energy_j is not None
    assert decode.energy.total_j.value == pytest.approx(block.energy_j / block.queries)


def test_a_workload_runs_its_prompts(int8_bundle: Path) -> None:
    with pytest.raises(InvalidSettingError, match=r"(?s)extract.*context"):
        run(int8_bundle, workloads=("extract",))


def test_peers_stand_beside(int8_bundle: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    result = run(
        int8_bundle,
        peers=[PeerSpec("llama.cpp", str(gguf)), PeerSpec("openvino", "missing")],
        peer_pythons={"llama.cpp": "/other/python"},
    )
    assert [engine.name for engine in result.engines] == [OURS, "llama.cpp", "openvino"]
    assert [engine.skipped for engine in result.engines] == [None, None, "it is not installed"]
    assert result.engines[1].weights == "model.gguf"
    assert result.engines[1].weights_sha256 is not None
    assert {ratio.peer for ratio in result.ratios} == {"llama.cpp"}
    assert {(ratio.case, ratio.metric) for ratio in result.ratios} == {
        ("pp16", "prefill_tokens_per_s"),
        ("tg4", "decode_tokens_per_s"),
        ("tg4@d16", "decode_tokens_per_s"),
    }
    assert parse_result(json.loads(json.dumps(to_json(result))), where="here") == result


def test_the_same_peer_on_several_weights_gets_their_names(int8_bundle: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    peers = [PeerSpec("llama.cpp", str(tmp_path / name)) for name in ("a.gguf", "b.gguf")]
    result = run(int8_bundle, peers=peers)
    assert [engine.name for engine in result.engines] == [OURS, "llama.cpp a.gguf", "llama.cpp b.gguf"]


def test_weights_of_the_same_name_are_told_apart(int8_bundle: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.gguf").write_bytes(b"GGUF")
    peers = [PeerSpec("llama.cpp", str(tmp_path / name / "model.gguf")) for name in ("a", "b")]
    result = run(int8_bundle, peers=peers)
    names = [OURS, "llama.cpp model.gguf", "llama.cpp model.gguf 2"]
    assert [engine.name for engine in result.engines] == names


def test_the_sustained_load_comes_behind(int8_bundle: Path) -> None:
    result = run(int8_bundle, sustain_s=0.5)
    assert result.sustained is not None
    assert len(result.sustained.points) >= 3


def test_a_sustained_load_that_fails_leaves_the_rest(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise EngineError("it crashed")

    monkeypatch.setattr(harness, "sustain", fail)
    result = run(int8_bundle, sustain_s=0.5)
    assert result.sustained is None
    assert "The sustained load failed: it crashed" in result.flags
    assert result.measurements[0].metrics


def test_the_engines_are_known_to_the_watch_while_they_run(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside Linux the processor time of an ended process is nobody's: it would be another's load."""
    seen: list[list[int]] = []

    class Watch:
        def __init__(self, own_pids: Callable[[], list[int]]) -> None:
            self._own_pids = own_pids

        def flags(self) -> list[str]:
            seen.append(self._own_pids())
            return ["something happened"]

    monkeypatch.setattr(harness, "Conditions", Watch)
    assert run(int8_bundle).flags == ["something happened"]
    assert seen == [[os.getpid()]]


def test_what_is_missing_shows_before_anything_is_measured(
    int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise ManifestError("a layer that is not known")

    def measure_peaks(*_: Any) -> Peaks:
        raise AssertionError("measured")

    monkeypatch.setattr(harness, "measure_peaks", measure_peaks)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with monkeypatch.context() as patch, pytest.raises(ManifestError):
        patch.setattr(physics, "_stored_bytes", refuse)
        run(int8_bundle)
    with pytest.raises(CrossCheckError):
        run(int8_bundle, cross_check=True)
    with pytest.raises(MeterLogError):
        run(int8_bundle, energy=True, meter_log=tmp_path / "nothing.csv")


def test_no_path_of_the_machine_is_in_why_a_peer_was_skipped(int8_bundle: Path, tmp_path: Path) -> None:
    peers = [PeerSpec("openvino", str(tmp_path / "model.gguf"))]
    result = run(int8_bundle, peers=peers, peer_pythons={"openvino": "/v/bin/python"})
    assert result.engines[1].skipped == "model.gguf is damaged, says python"


def test_quality_is_measured_against_fp32(int8_bundle: Path, fp32_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "letter.txt"
    text.write_text("It was a bright cold day in April. " * 40)
    result = run(int8_bundle, quality_text=text, reference=fp32_bundle)
    measured = result.model.quality_measured
    assert measured is not None
    assert measured.text == "letter.txt"
    assert measured.kl_mean > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "repetitions is 0"),
        ({"prompt_tokens": (), "depths": ()}, "nothing to measure"),
        ({"prompt_tokens": (10_000,)}, r"pp10000 needs a context of 10,001 tokens; tiny was trained for 512"),
        ({"prompt_tokens": (0,)}, "prompt_tokens"),
        ({"threads": 0}, "threads"),
        ({"depths": (), "sustain_s": 5.0}, "sustain"),
        ({"peer_pythons": {"openvino": "python"}}, "--peer-python names openvino"),
    ],
)
def test_what_cannot_be_measured(int8_bundle: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        run(int8_bundle, **changes)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        run(tmp_path / "nothing")
