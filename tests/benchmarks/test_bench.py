"""The speed benchmark on a tiny bundle: sane figures, and no figures for nonsense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pocketlm.cli import build_app
from pocketlm.errors import InvalidSettingError
from pocketlm.manifest import read_manifest
from pocketlm_benchmarks.speed import Rate, measure

COUNTS = ["--prompt-tokens", "16", "--new-tokens", "4", "--repetitions", "3", "--threads", "1"]


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(build_app(), ["bench", *arguments])


def test_measures_what_it_says(int8_bundle: Path) -> None:
    calls: list[tuple[str, int, int, str]] = []
    report = measure(
        int8_bundle,
        prompt_tokens=16,
        new_tokens=4,
        repetitions=3,
        threads=1,
        progress=lambda *call: calls.append(call),
    )
    assert (report.prompt_tokens, report.new_tokens, report.repetitions, report.threads) == (16, 4, 3, 1)
    assert (report.model, report.precision) == ("tiny", "int8")
    manifest = read_manifest(int8_bundle)
    assert manifest.quality is not None
    assert report.kl_mean == manifest.quality.kl_mean
    assert (
        report.bundle_bytes
        == manifest.bytes
        == sum((int8_bundle / name).stat().st_size for name in manifest.files)
    )
    for rate in (report.prefill, report.decode_empty, report.decode_deep):
        assert isinstance(rate, Rate)
        assert 0 < rate.lowest <= rate.median <= rate.highest < 1e7
    assert 0 < report.load_s < 30
    assert 10 << 20 < report.resident_bytes <= report.peak_resident_bytes
    assert report.processor
    measuring = [call for call in calls if call[0] == "Measuring"]
    assert measuring[0] == ("Measuring", 0, 3, "repetitions")
    assert measuring[-1] == ("Measuring", 3, 3, "repetitions")


def test_json(int8_bundle: Path) -> None:
    result = bench(str(int8_bundle), *COUNTS, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report.keys() == {
        "model",
        "precision",
        "bundle_bytes",
        "kl_mean",
        "processor",
        "threads",
        "onnxruntime",
        "pocketlm",
        "prompt_tokens",
        "new_tokens",
        "repetitions",
        "prefill",
        "decode_empty",
        "decode_deep",
        "load_s",
        "resident_bytes",
        "peak_resident_bytes",
    }
    assert report["prefill"].keys() == {"median", "lowest", "highest"}
    assert report["decode_deep"]["median"] > 0


def test_table(int8_bundle: Path) -> None:
    result = bench(str(int8_bundle), *COUNTS)
    assert result.exit_code == 0
    for part in ("tiny int8", "nats from fp32", "prefill 16 tokens", "decode 4 tokens behind 16", "median"):
        assert part in result.stdout
    assert "1 thread, " in result.stdout


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0; at least 1"),
        ({"new_tokens": 1}, "new_tokens is 1; at least 2"),
        ({"repetitions": 0}, "repetitions is 0; at least 1"),
        ({"prompt_tokens": 500, "new_tokens": 64}, "context_length is 564; tiny was trained for 512"),
        ({"threads": 0}, "number of threads is 0"),
    ],
)
def test_bad_counts(counts: dict[str, int], message: str, int8_bundle: Path) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        measure(int8_bundle, **{"prompt_tokens": 16, "new_tokens": 4, **counts})


def test_bad_counts_on_the_command_line(int8_bundle: Path) -> None:
    result = bench(str(int8_bundle), "--repetitions", "0")
    assert result.exit_code == 1
    assert "error: repetitions is 0" in result.stderr
    assert result.stdout == ""


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = bench(str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert "nothing" in result.stderr
