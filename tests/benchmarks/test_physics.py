"""What a model costs and what bounds it, from a manifest and from measurements."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest

from helpers.tiny_bundle import tiny_manifest
from pocketlm.bundle import GRAPH_NAME
from pocketlm.errors import ManifestError
from pocketlm.manifest import Dimensions, LayerPrecision, Manifest, Precision, read_manifest
from pocketlm_benchmarks.peaks import Peaks
from pocketlm_benchmarks.physics import Work, physics, work_of
from pocketlm_benchmarks.result import OURS, Case, Measurement, Physics, Summary

# Layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, context.
SIZES = Dimensions(2, 64, 96, 4, 2, 16, 1000, 512)
KINDS = ("qkv", "output", "gate_up", "down")
LAYER = 64 * (64 + 2 * 32) + 64 * 64 + 64 * 192 + 96 * 64  # weights
HEAD = 64 * 1000
NORMS = 5 * 64 * 4  # bytes


def manifest(
    precision: str = "int8-row", *, head: str | None = "int8-static", embedding: str | None = "int8-block32"
) -> Manifest:
    """With two layers of `precision`; without what is None."""
    paths = {f"layers.{layer}.{kind}": precision for layer in range(2) for kind in KINDS}
    paths |= {path: each for path, each in {"head": head, "embedding": embedding}.items() if each}
    layers = tuple(LayerPrecision(path, each, 0.0) for path, each in paths.items())
    name: Literal["fp32", "int8"] = "fp32" if precision == "fp32" else "int8"
    return dataclasses.replace(
        tiny_manifest(), dimensions=SIZES, precision=Precision(name, "for tests", layers)
    )


def case(name: str, kind: str, prompt_tokens: float, new_tokens: int, concurrent: int = 1) -> Case:
    fields: dict[str, Any] = {"kind": kind, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    return Case(name=name, concurrent=concurrent, sha256="0" * 64, **fields)


def measurement(name: str, engine: str = OURS, **medians: float) -> Measurement:
    metrics = {
        metric: Summary(n=1, median=value, low=None, high=None, minimum=value, maximum=value)
        for metric, value in medians.items()
    }
    return Measurement(engine=engine, case=name, metrics=metrics, samples={}, blocks=[], energy=None)


CASES = [case("pp512", "prefill", 512, 1), case("tg128", "decode", 1, 129), case("deep", "decode", 512, 129)]


def peaks_for(*, mbu: float = 0.5, mfu: float | None = 0.5) -> Peaks:
    """Of a device on which `measured()` uses these shares."""
    work = work_of(manifest())
    prefill_ops = (512 * work.ops_per_prompt_token + work.ops_of_head) / 512 * 1000
    return Peaks(
        threads=2,
        read_bytes_per_s=work.decode_bytes(65.5) / 0.01 / mbu,
        int8_ops_per_s=None if mfu is None else prefill_ops / mfu,
        fp32_flops_per_s=1.0,
    )


def measured(**shares: Any) -> Physics:
    """1,000 tok/s of prefill, 100 of decode and 80 behind a deep context."""
    measurements = [
        measurement("pp512", prefill_tokens_per_s=1000.0),
        measurement("tg128", tpot_s=0.01),
        measurement("deep", tpot_s=0.0125),
    ]
    return physics(peaks_for(**shares), manifest(), CASES, measurements)


class TestWork:
    @pytest.mark.parametrize("precision", ["int8", "fp32"])
    def test_bytes_are_those_of_the_graph(self, precision: str, int8_bundle: Path, fp32_bundle: Path) -> None:
        folder = int8_bundle if precision == "int8" else fp32_bundle
        graph = onnx.load(folder / GRAPH_NAME, load_external_data=False).graph
        stored = 0
        for tensor in graph.initializer:
            # Without the gathered table, the rotary tables, and the constants that are no weights.
            if tensor.name.startswith(("layers.", "head.", "final_norm.")) and len(tensor.dims):
                item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
                size = item
                for dimension in tensor.dims:
                    size *= dimension
                stored += size
        assert work_of(read_manifest(folder)).weight_bytes == stored

    def test_int8(self) -> None:
        outputs = 2 * (128 + 64 + 192 + 64) + 1000  # each has a scale
        assert work_of(manifest()) == Work(
            weight_bytes=2 * LAYER + HEAD + 4 * outputs + NORMS,
            kv_bytes_per_token=2 * 2 * 2 * 16 * 4,
            ops_per_prompt_token=2 * 2 * LAYER,
            ops_of_head=2 * HEAD,
            arithmetic="int8",
        )

    def test_fp32(self) -> None:
        work = work_of(manifest("fp32", head="fp32", embedding="fp32"))
        assert work.weight_bytes == 4 * (2 * LAYER + HEAD) + NORMS
        assert work.arithmetic == "fp32"

    @pytest.mark.parametrize(
        ("precision", "bytes_per_block", "zero_points"),
        # Two in a byte: one byte a row of 64 inputs, two a row of 96.
        [("int8-block32", 32 + 4, 0), ("int4-block32", 16 + 4, 128 + 64 + 192 + 2 * 64)],
    )
    def test_blocks(self, precision: str, bytes_per_block: int, zero_points: int) -> None:
        work = work_of(manifest(precision, head="fp32"))
        layer = LAYER // 32 * bytes_per_block + zero_points
        assert work.weight_bytes == 2 * layer + 4 * HEAD + NORMS
        assert work.arithmetic == "int8"

    def test_a_table_that_serves_as_the_head_is_read_as_it_is_stored(self) -> None:
        own, tied = manifest(head="int8-block32"), manifest(head=None, embedding="int8-block32")
        assert work_of(tied) == work_of(own)

    def test_a_table_that_is_only_gathered_from_does_not_count(self) -> None:
        assert work_of(manifest(embedding="fp32")) == work_of(manifest(embedding=None))

    def test_no_head_at_all(self) -> None:
        with pytest.raises(ManifestError, match="neither a head nor an embedding"):
            work_of(manifest(head=None, embedding=None))

    def test_an_unknown_layer(self) -> None:
        layers = (LayerPrecision("layers.0.experts", "int8-row", 0.0), LayerPrecision("head", "fp32", 0.0))
        unknown = dataclasses.replace(manifest(), precision=Precision("int8", "", layers))
        with pytest.raises(ManifestError, match=r"layer 'layers.0.experts', whose size .* expected are qkv"):
            work_of(unknown)

    def test_an_unknown_precision(self) -> None:
        with pytest.raises(ManifestError, match=r"stores a layer as 'ternary'.*Upgrade pocketlm"):
            work_of(manifest("ternary"))


class TestShares:
    def test_shares_of_the_peaks(self) -> None:
        found, work = measured(mbu=0.5, mfu=0.25), work_of(manifest())
        assert found.mbu["tg128"] == pytest.approx(0.5)
        # The mean context is the prompt and half of the answer.
        deep, short = work.decode_bytes(512 + 64.5), work.decode_bytes(1 + 64.5)
        assert found.mbu["deep"] == pytest.approx(0.5 * deep / short * 0.01 / 0.0125)
        assert found.mfu == {"pp512": pytest.approx(0.25)}
        assert (found.threads, found.fp32_flops_per_s) == (2, 1.0)
        assert found.bytes_per_token == work.weight_bytes
        assert found.kv_bytes_per_token == work.kv_bytes_per_token
        assert found.ops_per_prompt_token == work.ops_per_prompt_token

    def test_the_head_counts_for_one_row(self) -> None:
        short = [case("pp1", "prefill", 1, 1)]
        peaks = Peaks(1, 1e9, int8_ops_per_s=1e12, fp32_flops_per_s=None)
        found = physics(peaks, manifest(), short, [measurement("pp1", prefill_tokens_per_s=10.0)])
        assert found.mfu["pp1"] == pytest.approx(2 * (2 * LAYER + HEAD) * 10 / 1e12)

    def test_the_peak_of_the_arithmetic_in_use(self) -> None:
        peaks = Peaks(1, 1e9, int8_ops_per_s=4e12, fp32_flops_per_s=1e12)
        prefill = [measurement("pp512", prefill_tokens_per_s=10.0)]
        int8 = physics(peaks, manifest(), CASES, prefill)
        fp32 = physics(peaks, manifest("fp32"), CASES, prefill)
        assert fp32.mfu["pp512"] == pytest.approx(4 * int8.mfu["pp512"])

    def test_only_our_own_cases_of_the_grid_count(self) -> None:
        cases = [*CASES, case("batch", "decode", 1, 129, concurrent=8), case("chat", "workload", 50, 64)]
        found = physics(
            peaks_for(),
            manifest(),
            cases,
            [
                measurement("tg128", engine="llama.cpp", tpot_s=0.01),
                measurement("batch", tpot_s=0.01),
                measurement("chat", tpot_s=0.01, prefill_tokens_per_s=10.0),
                measurement("pp512", e2el_s=1.0),  # nothing of its rate
                measurement("unknown", tpot_s=0.01),
            ],
        )
        assert (found.mbu, found.mfu) == ({}, {})
        assert len(found.limits) == 1  # how many rows the weights are read for
        assert "rows" in found.limits[0]


class TestLimits:
    def test_in_numbers(self) -> None:
        found = measured(mbu=0.8, mfu=0.7)
        decode, deep, prefill, rows = found.limits
        rate = work_of(manifest()).decode_bytes(65.5) / 0.01
        assert f"Decode at 100 tok/s (tg128) reads {rate / 1e9:.1f} GB/s, 80% of" in decode
        assert decode.endswith(
            "bound by memory; fewer bytes a weight would help, faster arithmetic would not."
        )
        assert "Behind 576 tokens" in deep
        assert "decode runs at 80 instead of 100 tok/s" in deep
        assert "Prefill at 1,000 tok/s (pp512)" in prefill
        assert "70% of what the processor gives: it is bound by matrix products" in prefill
        assert "up to about" in rows

    @pytest.mark.parametrize(
        ("mbu", "part"),
        [
            (1.2, "caches keep part of the weights"),
            (0.9, "it is bound by memory"),
            (0.5, "would both help"),
            (0.1, "memory is not what bounds it"),
        ],
    )
    def test_decode(self, mbu: float, part: str) -> None:
        assert part in measured(mbu=mbu).limits[0]

    @pytest.mark.parametrize(
        ("mfu", "part"),
        [
            (1.1, "the device was busy"),
            (0.9, "bound by matrix products"),
            (0.5, "a good part"),
            (0.1, "the smaller part"),
        ],
    )
    def test_prefill(self, mfu: float, part: str) -> None:
        assert part in measured(mfu=mfu).limits[2]

    def test_without_a_peak_of_the_arithmetic(self) -> None:
        found = measured(mfu=None)
        assert found.mfu == {}
        assert found.limits[-1] == "The int8 peak could not be measured here: prefill stands beside nothing."

    def test_one_depth_is_not_compared_with_itself(self) -> None:
        found = physics(peaks_for(), manifest(), CASES, [measurement("tg128", tpot_s=0.01)])
        assert [limit.split()[0] for limit in found.limits] == ["Decode", "A"]

    def test_how_many_rows_memory_pays_for(self) -> None:
        work = work_of(manifest())
        bandwidth = 1e9
        row_s = work.weight_bytes / bandwidth / 12
        peaks = Peaks(1, bandwidth, (work.ops_per_prompt_token + work.ops_of_head) / row_s, None)
        assert "up to about 12 of them" in physics(peaks, manifest(), [], []).limits[0]
