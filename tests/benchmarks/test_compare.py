"""Two results beside each other: verdicts, regressions, and what is refused to be compared."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from helpers.results import a_device, a_model, a_quality, a_result, measured
from pocketlm.errors import InvalidSettingError
from pocketlm_benchmarks.compare import ALL, Change, Comparison, compare
from pocketlm_benchmarks.result import OURS, EngineResult, Measurement, ModelInfo, Result, ResultError
from pocketlm_benchmarks.statistics import summarize

DECODE = "decode_tokens_per_s"


@cache
def a_run(*, faster: float = 1.0, seed: int = 0, metered: bool = False) -> Result:
    """Made once for each setting, as its intervals take a while; changed by replacing parts only."""
    return a_result(faster=faster, seed=seed, energy=measured() if metered else None)


def of_model(model: ModelInfo) -> Result:
    return replace(a_run(), model=model)


def find(comparison: Comparison, case: str | None, metric: str) -> Change:
    (change,) = (each for each in comparison.changes if (each.case, each.metric) == (case, metric))
    return change


def with_measurement(result: Result, case: str, **changes: Any) -> Result:
    """The result with our measurement of `case` changed."""
    return replace(
        result,
        measurements=[
            replace(each, **changes) if (each.engine, each.case) == (OURS, case) else each
            for each in result.measurements
        ],
    )


def with_engine(result: Result, **changes: Any) -> Result:
    """The result with our engine's record changed."""
    first: EngineResult = replace(result.engines[0], **changes)
    return replace(result, engines=[first, *result.engines[1:]])


def with_rates(blocks: Sequence[Sequence[float]]) -> Result:
    """A result whose tg128 has these decode rates, by block."""
    result = a_run()
    found = result.measurement(OURS, "tg128")
    assert found is not None
    samples = [rate for block in blocks for rate in block]
    return with_measurement(
        result,
        "tg128",
        samples={DECODE: samples},
        metrics={DECODE: summarize(samples)},
        blocks=[replace(found.blocks[0], round=n, queries=len(block)) for n, block in enumerate(blocks)],
    )


def test_nothing_changed() -> None:
    comparison = compare(a_run(seed=1), a_run(seed=2), tolerance=0.05)
    assert {change.verdict for change in comparison.changes} == {"same"}
    assert comparison.regressions == ()
    assert comparison.comparable
    assert comparison.same_device
    assert comparison.before == "smollm2-135m int8, 2026-11-22T10:00:00Z"
    cases = {(change.case, change.metric) for change in comparison.changes}
    assert {("pp512", "prefill_tokens_per_s"), ("tg128@d512", DECODE), ("chat", "ttft_s")} <= cases
    assert {("batch", "throughput_tokens_per_s"), ("chat", "energy_j"), (None, "kl_mean")} <= cases
    assert {(None, "load_s"), (None, "peak_bytes")} <= cases
    json.dumps(dataclasses.asdict(comparison), allow_nan=False)


@pytest.mark.parametrize("faster", [2.0, 0.5])
def test_above_one_is_better_in_every_row(faster: float) -> None:
    comparison = compare(a_run(), a_run(faster=faster, seed=1), tolerance=0.05)
    rows = [change for change in comparison.changes if change.case is not None]
    assert {change.metric for change in rows} == {
        "ttft_s",
        "tpot_s",
        "e2el_s",
        "prefill_tokens_per_s",
        DECODE,
        "throughput_tokens_per_s",
        "energy_j",
    }
    for change in rows:
        assert change.better is not None
        assert change.better.low is not None
        assert change.better.high is not None
        assert change.better.value == pytest.approx(faster, rel=0.15)
        assert change.better.low < change.better.value < change.better.high
        assert change.p is not None
        assert change.p < 0.01
        assert change.verdict == ("better" if faster > 1 else "worse")
        assert change.regression is (faster < 1)
    assert len(comparison.regressions) == (0 if faster > 1 else len(rows))


def test_a_loss_within_the_tolerance_is_no_regression() -> None:
    before, after = a_run(), a_run(faster=0.8)
    change = find(compare(before, after, tolerance=0.3), "tg128", DECODE)
    assert (change.verdict, change.regression) == ("worse", False)
    assert change.before is not None
    assert change.after == pytest.approx(0.8 * change.before)
    assert find(compare(before, after, tolerance=0.24), "tg128", DECODE).regression  # 25 % longer
    assert not find(compare(before, after, tolerance=0.26), "tg128", DECODE).regression


def test_a_loss_that_may_be_chance_is_no_regression() -> None:
    random = np.random.default_rng(0)
    steady = with_rates([[100 * noise] for noise in random.lognormal(0, 0.5, 10).tolist()])
    slower = with_rates([[85 * noise] for noise in random.lognormal(0, 0.5, 10).tolist()])
    change = find(compare(steady, slower, tolerance=0.0), "tg128", DECODE)
    assert change.p is not None
    assert change.p > 0.05
    assert (change.verdict, change.regression) == ("same", False)


def test_p_values_are_corrected_for_their_number() -> None:
    many = compare(a_run(), a_run(faster=0.5), tolerance=0.05)
    tests = sum(change.p is not None for change in many.changes)
    separated = 2 / math.comb(20, 10)  # ten samples each, none of them in the other's range
    assert find(many, "tg128", DECODE).p == pytest.approx(tests * separated)


def test_queries_of_a_block_are_no_independent_samples() -> None:
    """On a machine whose speed wanders from block to block they would convince; the blocks do not."""
    wandering = [[100.0 + block + query / 100 for query in range(30)] for block in range(16)]
    one = [wandering[n] for n in (0, 1, 2, 4, 5, 8, 10, 12)]
    other = [wandering[n] for n in (3, 6, 7, 9, 11, 13, 14, 15)]
    change = find(compare(with_rates(one), with_rates(other), tolerance=0.0), "tg128", DECODE)
    assert change.verdict == "same"
    assert change.before == pytest.approx(np.median([np.median(block) for block in one]))
    few = compare(with_rates(one[:7]), with_rates(other[:7]), tolerance=0.0)
    assert find(few, "tg128", DECODE).verdict == "better"
    assert any("Some cases have 7 blocks only" in note for note in few.notes)


def test_blocks_that_cannot_be_told_apart_are_taken_as_samples() -> None:
    before = with_rates([[90.0 + n] for n in range(10)])
    found = before.measurement(OURS, "tg128")
    assert found is not None
    odd = with_measurement(before, "tg128", samples={DECODE: [*found.samples[DECODE], 100.0]})
    change = find(compare(odd, odd, tolerance=0.05), "tg128", DECODE)
    assert change.before == 95.0  # the median of all eleven


@pytest.mark.parametrize("tolerance", [-0.01, math.nan, math.inf])
def test_a_tolerance_that_makes_no_sense(tolerance: float) -> None:
    with pytest.raises(InvalidSettingError, match=r"tolerance is .*; a share from 0 on"):
        compare(a_run(), a_run(), tolerance=tolerance)


def test_a_result_without_our_engine() -> None:
    peers = replace(a_run(), engines=a_run().engines[1:])
    with pytest.raises(ResultError, match="the second result holds no measurement of pocketlm"):
        compare(a_run(), peers, tolerance=0.05)
    with pytest.raises(ResultError, match="the first result"):
        compare(peers, a_run(), tolerance=0.05)


def test_cases_that_are_not_the_same() -> None:
    before = a_run()
    cases = [replace(case, sha256="ff" * 32) if case.name == "chat" else case for case in before.cases[1:]]
    after = with_measurement(replace(before, cases=cases), "batch", skipped="it crashed", samples={})
    comparison = compare(before, after, tolerance=0.05)
    for case, reason in (
        ("pp512", "only the first has it"),
        ("chat", "the prompts differ"),
        ("batch", "skipped in the second: it crashed"),
    ):
        change = find(comparison, case, ALL)
        assert change.verdict == "not comparable"
        assert change.reason is not None
        assert change.reason.startswith(reason)
        assert (change.before, change.after, change.better, change.regression) == (None, None, None, False)
    assert find(comparison, "tg128", DECODE).verdict == "same"
    assert find(compare(after, before, tolerance=0.05), "pp512", ALL).reason == "only the second has it"
    assert (
        find(compare(after, before, tolerance=0.05), "batch", ALL).reason
        == "skipped in the first: it crashed"
    )
    assert not [c for c in comparison.changes if c.metric == "energy_j" and c.case in {"pp512", "chat"}]


def test_a_case_that_was_not_measured() -> None:
    before = a_run()
    others = [each for each in before.measurements if (each.engine, each.case) != (OURS, "tg128")]
    comparison = compare(before, replace(before, measurements=others), tolerance=0.05)
    assert find(comparison, "tg128", ALL).reason == "skipped in the second: it was not measured"


def test_when_nothing_is_comparable() -> None:
    before = a_run()
    after = replace(before, cases=[replace(case, sha256="ff" * 32) for case in before.cases])
    comparison = compare(before, after, tolerance=0.05)
    assert not comparison.comparable
    assert comparison.notes[0].startswith("NO CASE CAN BE COMPARED")
    assert find(comparison, None, "kl_mean").verdict == "same"


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ({"tpot_s": [0.1]}, "only the first has it"),
        ({DECODE: [90.0]}, "a single sample tells nothing of its spread; measure more rounds"),
        ({DECODE: [90.0, 0.0, 91.0]}, "there are samples of 0 or below"),
    ],
)
def test_metrics_that_cannot_be_compared(samples: dict[str, list[float]], reason: str) -> None:
    after = with_measurement(a_run(), "tg128", samples=samples)
    change = find(compare(a_run(), after, tolerance=0.05), "tg128", DECODE)
    assert (change.verdict, change.reason) == ("not comparable", reason)


def test_energy_needs_the_same_source() -> None:
    both = compare(a_run(metered=True), a_run(metered=True), tolerance=0.05)
    assert find(both, "chat", "energy_j").verdict == "same"
    mixed = find(compare(a_run(), a_run(metered=True), tolerance=0.05), None, "energy_j")
    assert mixed.verdict == "not comparable"
    assert mixed.reason == "estimate, process, estimated in the first, rapl, package, measured in the second"
    without = replace(a_run(), energy=None)
    lost = find(compare(a_run(), without, tolerance=0.05), None, "energy_j")
    assert lost.reason == "only the first has it"
    found = find(compare(without, a_run(), tolerance=0.05), None, "energy_j")
    assert found.reason == "only the second has it"
    neither = compare(without, without, tolerance=0.05)
    assert "energy_j" not in {change.metric for change in neither.changes}


def test_estimates_of_different_devices_say_nothing() -> None:
    other = replace(a_device(), processor="Cortex-A76", architecture="arm64")
    guessed = compare(a_run(), replace(a_run(), device=other), tolerance=0.05)
    assert find(guessed, None, "energy_j").reason == "estimates of different devices"
    metered = compare(a_run(metered=True), replace(a_run(metered=True), device=other), tolerance=0.05)
    assert find(metered, "chat", "energy_j").verdict == "same"
    assert not metered.same_device
    assert metered.notes[0].startswith("DIFFERENT DEVICES: AMD EPYC 7B13 before, Cortex-A76 after")


@pytest.mark.parametrize(
    ("seconds", "verdict", "regression"),
    [
        ([0.49, 0.5, 0.54], "same", False),
        ([0.9, 1.0, 1.1], "worse", True),
        ([0.2, 0.21, 0.22], "better", False),
        ([0.54, 0.56, 0.58], "same", False),  # the intervals overlap
    ],
)
def test_load_time(seconds: list[float], verdict: str, regression: bool) -> None:
    after = with_engine(a_run(), load_warm_s=summarize(seconds))
    change = find(compare(a_run(), after, tolerance=0.05), None, "load_s")
    assert (change.verdict, change.regression, change.p) == (verdict, regression, None)
    assert change.better is not None
    assert change.better.value == pytest.approx(0.5 / seconds[1])


def test_load_time_that_is_not_known() -> None:
    once = with_engine(a_run(), load_warm_s=summarize([0.5]))
    change = find(compare(a_run(), once, tolerance=0.05), None, "load_s")
    assert change.reason == "a single load tells nothing of its spread"
    never = with_engine(a_run(), load_warm_s=None, memory=None)
    metrics = {each.metric for each in compare(a_run(), never, tolerance=0.05).changes}
    assert not metrics & {"load_s", "peak_bytes"}


@pytest.mark.parametrize(
    ("peak", "verdict", "regression"),
    [(320, "same", False), (400, "worse", True), (200, "better", False)],
)
def test_memory(peak: int, verdict: str, regression: bool) -> None:
    memory = a_run().engines[0].memory
    assert memory is not None
    after = with_engine(a_run(), memory=replace(memory, peak_bytes=peak * 10**6))
    change = find(compare(a_run(), after, tolerance=0.05), None, "peak_bytes")
    assert (change.verdict, change.regression) == (verdict, regression)
    assert change.better is not None
    assert change.better == replace(change.better, value=312 / peak, low=None, high=None)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (0.0108, 0.0109, "same"),
        (0.0108, 0.0200, "worse"),
        (0.0108, 0.0030, "better"),
        (0.0, 0.0108, "worse"),
        (0.0108, 0.0, "better"),
        (0.0, 0.00009, "same"),  # rounding
        (0.0, 0.0, "same"),
    ],
)
def test_quality(before: float, after: float, verdict: str) -> None:
    first, second = (of_model(a_model(kl_mean=kl)) for kl in (before, after))
    change = find(compare(first, second, tolerance=0.05), None, "kl_mean")
    assert (change.before, change.after, change.verdict) == (before, after, verdict)
    assert change.regression is (verdict == "worse")


def test_quality_on_the_users_text_counts_first() -> None:
    def on_text(sha256: str | None, kl: float, shipped: float | None = 0.0108) -> Result:
        quality = replace(a_quality(kl), text="mine", text_sha256=sha256 and sha256 * 64)
        return of_model(replace(a_model(kl_mean=shipped), quality_measured=quality))

    change = find(compare(on_text("a", 0.02), on_text("a", 0.04), tolerance=0.05), None, "kl_mean")
    assert (change.before, change.after) == (0.02, 0.04)
    change = find(compare(on_text("a", 0.02), on_text("b", 0.04), tolerance=0.05), None, "kl_mean")
    assert (change.before, change.after) == (0.0108, 0.0108)
    change = find(
        compare(on_text("a", 0.02, None), on_text("b", 0.04, None), tolerance=0.05), None, "kl_mean"
    )
    assert (change.verdict, change.reason) == ("not comparable", "not on the same text")
    unknown = of_model(a_model(kl_mean=None))
    change = find(compare(a_run(), unknown, tolerance=0.05), None, "kl_mean")
    assert change.reason == "only one of them has it"
    neither = compare(unknown, unknown, tolerance=0.05)
    assert "kl_mean" not in {change.metric for change in neither.changes}


def test_notes_of_all_that_differs() -> None:
    before = a_run()
    device = replace(
        before.device,
        governor="powersave",
        features=["avx2"],
        versions={**before.device.versions, "onnxruntime": "1.32.0", "torch": "2.13.0"},
    )
    after = replace(
        before,
        device=device,
        model=replace(before.model, precision="fp32", bundle_sha256="ab" * 32),
        settings=replace(before.settings, threads=4),
        flags=["throttled 3 times"],
    )
    comparison = compare(before, after, tolerance=0.05)
    assert comparison.same_device
    assert comparison.notes == (
        "precision: int8 before, fp32 after",
        f"bundle sha256: {'0f' * 32} before, {'ab' * 32} after",
        "threads: 2 before, 4 after",
        "features: avx2 fma before, avx2 after",
        "governor: unknown before, powersave after",
        "onnxruntime: 1.31.1 before, 1.32.0 after",
        "torch: unknown before, 2.13.0 after",
        "before: Other processes used 14 % of the processor.",
        "after: throttled 3 times",
    )


def test_an_estimate_is_compared_where_the_device_is_the_same() -> None:
    comparison = compare(a_run(), a_run(), tolerance=0.05)
    change = find(comparison, "chat", "energy_j")
    found = a_run().measurement(OURS, "chat")
    assert isinstance(found, Measurement)
    assert change.before == pytest.approx(np.median([(b.energy_j or 0) / b.queries for b in found.blocks]))
