"""Signed or unsigned weight bytes: what suits a processor, and that both mean the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.tiny import random_ids, run, tiny_checkpoint, write_folder
from pocketlm.session import Session
from pocketlm_exporters.export import export
from pocketlm_exporters.processor import WEIGHT_BYTES, weight_bytes
from pocketlm_exporters.quantize.rounding import round_channels

CPUINFO = "processor\t: 0\nmodel name\t: {}\nflags\t\t: fpu sse2 avx2 {}\nbugs\t\t:\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells")
@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "", "unsigned"),
        ("AMD64", "bmi2", "unsigned"),
        ("x86_64", "avx512_vnni", "signed"),
        ("x86_64", "avx_vnni", "signed"),
        ("x86_64", "amx_int8", "signed"),
        ("x86_64", "avx512_vnnix", "unsigned"),
        ("aarch64", "", "signed"),
    ],
)
def test_suits_the_processor(tmp_path: Path, machine: str, flags: str, expected: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO.format("A processor", flags))
    assert weight_bytes(machine, cpuinfo) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells")
def test_is_signed_where_the_system_does_not_tell(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\n")
    assert weight_bytes("x86_64", cpuinfo) == "signed"


def test_unsigned_weights_are_128_larger() -> None:
    signed = round_channels(np.array([[-1.0, 0.0, 1.0], [0.5, -0.5, 0.25]], np.float32))
    unsigned = signed.unsigned()
    assert unsigned.values.dtype == np.uint8
    assert (unsigned.values.astype(int) == signed.values.astype(int) + 128).all()
    assert (unsigned.scales == signed.scales).all()


def test_both_give_the_same_logits_to_the_last_bit(tmp_path: Path) -> None:
    ids = random_ids(40)
    source = write_folder(tmp_path / "source", tiny_checkpoint())
    logits = []
    for weights in WEIGHT_BYTES:
        folder = tmp_path / weights
        manifest = export(source, folder, max_kl=100.0, weights=weights)
        assert f" {weights} weights" in manifest.precision.recipe
        session = Session(folder / "model.onnx", manifest.dimensions, manifest.graph, threads=1)
        logits.append(run(session, ids))
    assert (logits[0] == logits[1]).all()
