"""Quality on a text of the user's own: measured as the exporter does, against the right reference only."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.tiny import tiny_bundle, tiny_checkpoint
from helpers.tiny_bundle import tiny_manifest
from pocketlm.bundle import TOKENIZER_NAME, WEIGHTS_NAME, open_bundle, write_manifest
from pocketlm.errors import BundleError, InvalidSettingError
from pocketlm.manifest import Manifest, Tokens
from pocketlm.session import Session
from pocketlm.tokenizer import Tokenizer
from pocketlm_benchmarks.quality import manifest_quality, measure_quality
from pocketlm_benchmarks.result import QualityFigures
from pocketlm_exporters import verify

PROSE = "The ferry leaves at nine,\r\nbut the captain never hurries. Über allem liegt Nebel. " * 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_bytes(PROSE.encode())
    return path


def changed(bundle: Path, folder: Path, change: Callable[[Manifest], Manifest]) -> Path:
    """A copy of a bundle with another manifest, and with another tokenizer.json if that is there before."""
    shutil.copytree(bundle, folder)
    write_manifest(folder, change(open_bundle(folder).manifest))
    return folder


def measured_slowly(candidate: Path, reference: Path) -> QualityFigures:
    """Windows of 511 tokens by hand; the tiny model adds no begin-of-text token."""
    first, second = open_bundle(reference), open_bundle(candidate)
    ids = Tokenizer(first.tokenizer_json, None, first.manifest.tokens).encode(PROSE)
    windows = [ids[begin : begin + verify.WINDOW] for begin in range(0, len(ids), verify.WINDOW)]
    assert len(windows) > 1
    sessions = [
        Session(each.graph_path, each.manifest.dimensions, each.manifest.graph, threads=1)
        for each in (first, second)
    ]
    quality = verify.compare(sessions[0], sessions[1], windows, text="prose.txt", progress=lambda *_: None)
    return QualityFigures(
        **dataclasses.asdict(quality), text_sha256=hashlib.sha256(PROSE.encode()).hexdigest()
    )


def test_as_the_exporter_measures(int8_bundle: Path, fp32_bundle: Path, text: Path) -> None:
    calls: list[tuple[str, int, int, str]] = []
    quality = measure_quality(
        int8_bundle, fp32_bundle, text, threads=1, progress=lambda *call: calls.append(call)
    )
    assert quality == measured_slowly(int8_bundle, fp32_bundle)
    assert quality.kl_mean > 0
    assert calls[-1] == ("Verifying", quality.tokens, quality.tokens, "tokens")


def test_fp32_is_its_own_reference(fp32_bundle: Path, text: Path) -> None:
    quality = measure_quality(fp32_bundle, fp32_bundle, text, threads=1)
    assert (quality.kl_mean, quality.top1_agreement) == (0.0, 1.0)
    assert quality.perplexity == quality.perplexity_fp32 > 1


def test_a_byte_order_mark_is_no_text(fp32_bundle: Path, text: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    first, second = (measure_quality(fp32_bundle, fp32_bundle, each, threads=1) for each in (text, marked))
    assert first.perplexity == second.perplexity
    assert first.text_sha256 != second.text_sha256


def test_a_reference_that_is_not_fp32(int8_bundle: Path, fp32_bundle: Path, text: Path) -> None:
    with pytest.raises(InvalidSettingError, match=r"is int8, expected fp32\. Make one with: pocketlm pull"):
        measure_quality(fp32_bundle, int8_bundle, text, threads=1)


def test_a_reference_of_other_weights(int8_bundle: Path, text: Path, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path, "fp32", checkpoint=tiny_checkpoint(seed=1))
    with pytest.raises(InvalidSettingError, match=r"is not the fp32 form of .* its source is [0-9a-f]{64}"):
        measure_quality(int8_bundle, other, text, threads=1)


def test_a_reference_with_another_tokenizer(
    int8_bundle: Path, fp32_bundle: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(fp32_bundle, tmp_path / "other")
    tokenizer = tmp_path / "other" / TOKENIZER_NAME
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    write_manifest(tmp_path / "other", open_bundle(fp32_bundle).manifest)
    with pytest.raises(InvalidSettingError, match=r"its tokenizer is [0-9a-f]{64}, expected"):
        measure_quality(int8_bundle, tmp_path / "other", text, threads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda manifest: dataclasses.replace(
                manifest, dimensions=dataclasses.replace(manifest.dimensions, vocabulary=999)
            ),
            "its vocabulary is 999, expected 267",
        ),
        (
            lambda manifest: dataclasses.replace(manifest, tokens=Tokens(1, (2,), True)),
            "its special tokens is",
        ),
    ],
)
def test_a_reference_with_other_ids(
    change: Callable[[Manifest], Manifest],
    message: str,
    int8_bundle: Path,
    fp32_bundle: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        measure_quality(int8_bundle, changed(fp32_bundle, tmp_path / "other", change), text, threads=1)


def test_a_damaged_reference(int8_bundle: Path, fp32_bundle: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(fp32_bundle, tmp_path / "other")
    weights = tmp_path / "other" / WEIGHTS_NAME
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(BundleError, match="is altered"):
        measure_quality(int8_bundle, tmp_path / "other", text, threads=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"A B C D", "short.txt has 7 tokens; at least 64 are expected"),
        (b"", "short.txt has 0 tokens"),
        (b"Stra\xdfe", "short.txt is not UTF-8: .* at byte 4"),
        (None, "short.txt cannot be read"),
    ],
)
def test_a_text_that_is_no_use(data: bytes | None, message: str, fp32_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InvalidSettingError, match=message):
        measure_quality(fp32_bundle, fp32_bundle, path, threads=1)


def test_of_the_manifest(int8_bundle: Path) -> None:
    manifest = open_bundle(int8_bundle).manifest
    quality = manifest_quality(manifest)
    assert quality is not None
    assert quality.text_sha256 is None
    assert manifest.quality is not None
    assert (quality.text, quality.kl_mean) == (manifest.quality.text, manifest.quality.kl_mean)
    assert manifest_quality(tiny_manifest()) is None
