"""`pocketlm tune` with measurements that are made up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from helpers.tiny_bundle import write_tiny_bundle
from helpers.tunings import a_tuning
from pocketlm import tuning
from pocketlm.bundle import Bundle
from pocketlm.cli import build_app
from pocketlm.manifest import read_manifest
from pocketlm.tuning import Tuning, find_tuning


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCKETLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("POCKETLM_THREADS", raising=False)
    monkeypatch.setattr(tuning, "this_device", lambda: a_tuning().device)
    monkeypatch.setattr("onnxruntime.__version__", a_tuning().onnxruntime)
    write_tiny_bundle(tmp_path / "tiny")
    return tmp_path / "tiny"


class Measurements:
    """Stands in for `tuning.tune`: counts its calls, and says that one thread got `core_share` of a core."""

    def __init__(self) -> None:
        self.count = 0
        self.core_share = 1.0

    def __call__(self, bundle: Bundle, *, context_length: int, progress: Any) -> Tuning:
        self.count += 1
        assert context_length == bundle.manifest.dimensions.context_length
        return dataclasses.replace(
            a_tuning(),
            graph_sha256=bundle.manifest.files["model.onnx"].sha256,
            core_share=self.core_share,
        )


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> Measurements:
    fake = Measurements()
    monkeypatch.setattr(tuning, "tune", fake)
    return fake


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(build_app(), ["tune", *arguments])
    assert result.exit_code == 0, result.stderr
    return result


def test_it_says_what_was_tried_and_what_won(bundle: Path, measurements: Measurements) -> None:
    result = run(str(bundle))
    assert result.stderr == ""
    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
        "tiny (int8) on Test Processor 9000, 2 cores, ONNX Runtime 1.0",
        "",
        "THREADS SPIN PREFILL DECODE CPU TIME",
        "1 none 500 tok/s 66.7 tok/s 15.0 ms/tok",
        "2 none 1,000 tok/s 62.5 tok/s 24.0 ms/tok",
        "2 50 µs 1,000 tok/s 100.0 tok/s 20.0 ms/tok",
        "",
        "CHUNK PREFILL",
        "64 1,250 tok/s",
        "128 1,000 tok/s",
        "",
        "Best: 2 threads, in eco 1; prompts in chunks of 64 tokens. A pass over 8 tokens takes as long as "
        "1.4 over one.",
    ]


def test_it_measures_once(bundle: Path, measurements: Measurements) -> None:
    first, second = run(str(bundle)), run(str(bundle))
    assert measurements.count == 1
    assert first.stdout == second.stdout
    assert second.stderr == ("Measured before, at 2026-01-02T03:04:05+00:00. Measure again with --force.\n")
    assert "Measured before" not in run(str(bundle), "--force").stderr
    assert measurements.count == 2


def test_json(bundle: Path, measurements: Measurements) -> None:
    found = json.loads(run(str(bundle), "--json").stdout)
    assert (found["name"], found["precision"], found["folder"], found["kept"]) == (
        *("tiny", "int8", str(bundle), True),
    )
    kept = find_tuning(read_manifest(bundle))
    assert kept is not None
    assert found["tuning"] == json.loads(kept.to_json())


def test_a_busy_device_is_not_kept_unless_forced(bundle: Path, measurements: Measurements) -> None:
    measurements.core_share = 0.43
    manifest = read_manifest(bundle)
    assert "one thread got 43% of a core. So this is not kept. Close them" in run(str(bundle)).stderr
    assert find_tuning(manifest) is None
    assert json.loads(run(str(bundle), "--json").stdout)["kept"] is False
    forced = run(str(bundle), "--force").stderr
    assert "got 43% of a core" in forced
    assert "not kept" not in forced
    assert find_tuning(manifest) is not None


def test_a_number_of_threads_from_outside_is_mentioned(
    bundle: Path, measurements: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETLM_THREADS", "3")
    assert "POCKETLM_THREADS is set, so its number of threads is used" in run(str(bundle)).stderr


def test_a_model_that_does_not_exist(bundle: Path, measurements: Measurements) -> None:
    result = CliRunner().invoke(build_app(), ["tune", str(bundle.parent / "nothing")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert measurements.count == 0


def test_an_interrupt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Tuning:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", interrupted)
    assert CliRunner().invoke(build_app(), ["tune", str(bundle)]).exit_code == 130
    assert find_tuning(read_manifest(bundle)) is None
