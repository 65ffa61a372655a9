"""From traces to metrics, joules a query and ratios."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.scripted import INFO, make_trace, make_work
from pocketlm.energy import Reading
from pocketlm_benchmarks.engines.protocol import Query, Trace
from pocketlm_benchmarks.figures import Raw, RawBlock, energy_per_query, measurement, ratios, samples_of
from pocketlm_benchmarks.result import Block, Case

DECODE, PREFILL = make_work().case, make_work("pp8", "prefill").case
CHAT, BATCH = make_work("chat", "workload").case, make_work("batch", "workload", concurrent=2).case

TRACE = Trace(
    prompt_tokens=10,
    cached_tokens=2,
    new_tokens=4,
    prefill_s=0.4,
    decode_s=0.6,
    decode_tokens=3,
    gaps_s=(0.1, 0.2, 0.3),
    text="",
)


def block(
    *traces: Trace, round_: int = 0, walls_s: tuple[float, ...] = (1.0,), joules: Any = None
) -> RawBlock:
    reading = None if joules is None else Reading("meter", "wall", "measured", 2.0, joules)
    return RawBlock(round_, 1e9, 2.0, list(traces), list(walls_s), reading)


def plain_block(**changes: Any) -> Block:
    fields: dict[str, Any] = {
        "round": 0,
        "started_unix_s": 1e9,
        "duration_s": 2.0,
        "queries": 4,
        "energy_j": 20.0,
        "low_j": None,
        "high_j": None,
        "idle_power_w": None,
    }
    return Block(**{**fields, **changes})


class TestSamples:
    def test_of_a_workload(self) -> None:
        samples = samples_of(CHAT, INFO, block(TRACE))
        assert samples.pop("itl_s") == [0.1, 0.2, 0.3]
        assert {metric: pytest.approx(values[0]) for metric, values in samples.items()} == {
            "ttft_s": 0.4,
            "prefill_tokens_per_s": 8 / 0.4,
            "tpot_s": (1.0 - 0.4) / 3,
            "decode_tokens_per_s": 3 / 0.6,
            "e2el_s": 1.0,
        }

    def test_a_prefill_case_says_nothing_of_decode_and_the_other_way_round(self) -> None:
        assert samples_of(PREFILL, INFO, block(TRACE)).keys() == {"ttft_s", "prefill_tokens_per_s"}
        assert samples_of(DECODE, INFO, block(TRACE)).keys() == {"tpot_s", "itl_s", "decode_tokens_per_s"}

    def test_without_sampling_there_is_no_time_to_a_first_token(self) -> None:
        info = replace(INFO, sampling_included=False)
        assert samples_of(PREFILL, info, block(TRACE)).keys() == {"prefill_tokens_per_s"}

    def test_what_an_engine_does_not_tell_is_not_there(self) -> None:
        silent = replace(TRACE, prefill_s=None, decode_s=None, gaps_s=())
        assert samples_of(CHAT, INFO, block(silent)) == {}

    def test_several_at_once_have_a_throughput(self) -> None:
        samples = samples_of(BATCH, INFO, block(TRACE, TRACE, TRACE, TRACE, walls_s=(2.0, 4.0)))
        assert samples["throughput_tokens_per_s"] == [8 / 2, 8 / 4]
        assert "decode_tokens_per_s" not in samples
        assert "prefill_tokens_per_s" not in samples
        assert len(samples["e2el_s"]) == 4


class TestEnergy:
    def test_a_query_takes_its_share_of_the_block(self) -> None:
        energy = energy_per_query(CHAT, [plain_block(), plain_block(energy_j=28.0)])
        assert energy is not None
        assert energy.total_j.value == 6
        assert energy.wh == pytest.approx(6 / 3600)
        assert energy.marginal_j is None
        assert energy.per_new_token_j == 6 / CHAT.new_tokens
        assert energy.per_prompt_token_j is None

    def test_idle_power_is_subtracted(self) -> None:
        energy = energy_per_query(CHAT, [plain_block(idle_power_w=4.0)] * 3)
        assert energy is not None
        assert energy.marginal_j is not None
        assert energy.marginal_j.value == (20 - 4 * 2) / 4
        assert energy.total_j.value == 5

    def test_an_estimate_keeps_its_bounds(self) -> None:
        for blocks in ([plain_block(low_j=4.0, high_j=60.0)], [plain_block(low_j=4.0, high_j=60.0)] * 5):
            energy = energy_per_query(CHAT, blocks)
            assert energy is not None
            assert (energy.total_j.low, energy.total_j.value, energy.total_j.high) == (1, 5, 15)

    def test_by_what_an_estimate_may_be_off_idle_is_too(self) -> None:
        energy = energy_per_query(CHAT, [plain_block(low_j=4.0, high_j=60.0, idle_power_w=4.0)] * 3)
        assert energy is not None
        marginal = energy.marginal_j
        assert marginal is not None
        assert (marginal.low, marginal.value, marginal.high) == pytest.approx((0.6, 3, 9))

    def test_one_measured_block_has_no_interval(self) -> None:
        energy = energy_per_query(CHAT, [plain_block()])
        assert energy is not None
        assert energy.total_j.low is energy.total_j.high is None

    def test_blocks_without_a_figure_do_not_count(self) -> None:
        assert energy_per_query(CHAT, [plain_block(energy_j=None)]) is None
        energy = energy_per_query(CHAT, [plain_block(energy_j=None), plain_block()])
        assert energy is not None
        assert energy.total_j.value == 5

    def test_tokens_are_those_of_a_block_of_their_own(self) -> None:
        deep = replace(DECODE, prompt_tokens=512.0)
        prefill = replace(PREFILL, prompt_tokens=8.0)
        for case, prompt, new in ((DECODE, None, 1.0), (deep, None, None), (prefill, 5 / 8, None)):
            energy = energy_per_query(case, [plain_block()])
            assert energy is not None
            assert (energy.per_prompt_token_j, energy.per_new_token_j) == (prompt, new)


def raw(*gaps_s: float, joules: float | None = None) -> Raw:
    query = Query((1,), 5)
    return Raw(
        INFO,
        [block(make_trace(query, gap_s=gap_s), round_=n, joules=joules) for n, gap_s in enumerate(gaps_s)],
    )


def measured(case: Case, *gaps_s: float) -> Any:
    return measurement("pocketlm", case, raw(*gaps_s))


class TestMeasurement:
    def test_holds_the_samples_in_order(self) -> None:
        made = measured(DECODE, 0.01, 0.02, 0.03)
        assert made.samples["tpot_s"] == [0.01, 0.02, 0.03]
        assert made.metrics["tpot_s"].median == 0.02
        assert made.metrics["itl_s"].n == 12
        assert [each.round for each in made.blocks] == [0, 1, 2]

    def test_an_interval_holds_how_rounds_differ(self) -> None:
        """Many gaps in three rounds are three samples of how fast the device is, not many."""
        itl = measured(DECODE, 0.01, 0.02, 0.03).metrics["itl_s"]
        assert (itl.low, itl.median, itl.high) == pytest.approx((0.01, 0.02, 0.03))

    def test_noise_is_flagged(self) -> None:
        assert measured(DECODE, *[0.01, 0.014] * 3).flags == [
            "noisy: the rounds' decode_tokens_per_s spread by 33% of their median"
        ]

    def test_slowing_down_is_flagged(self) -> None:
        flags = measured(DECODE, 0.01, 0.01, 0.0105, 0.0105, 0.011, 0.011).flags
        assert flags == ["slowed down: the last third of the rounds took 10% longer than the first"]

    def test_answers_that_ended_early_are_flagged(self) -> None:
        made = measurement("peer", CHAT, Raw(INFO, [block(TRACE, make_trace(Query((1,), 5)))]))
        assert made.flags == ["less work: 1 of 2 answers ended before their 5 tokens"]

    def test_a_steady_run_has_no_flag(self) -> None:
        assert measured(DECODE, *[0.01] * 6).flags == []

    def test_a_reading_that_failed_says_why(self) -> None:
        broken = block(TRACE)
        broken.reading = Reading("rapl", "package", "measured", 1.0, None, reason="it went away")
        made = measurement("pocketlm", CHAT, Raw(INFO, [broken]))
        assert made.blocks[0].flags == ["no energy: it went away"]
        assert made.energy is None


class TestRatios:
    def test_above_one_ours_is_better(self) -> None:
        found = {
            each.metric: each for each in ratios(DECODE, raw(0.01, 0.01, 0.01), "peer", raw(0.02, 0.02, 0.04))
        }
        assert found["decode_tokens_per_s"].better.value == pytest.approx(2)
        assert found["decode_tokens_per_s"].n == 3
        times = {each.metric: each for each in ratios(CHAT, raw(0.01), "peer", raw(0.02))}
        assert times["e2el_s"].better.value == pytest.approx(0.18 / 0.14)
        assert times["ttft_s"].better.value == pytest.approx(1)

    def test_energy_too(self) -> None:
        found = ratios(DECODE, raw(0.01, joules=2.0), "peer", raw(0.01, joules=5.0))
        assert [each.better.value for each in found if each.metric == "energy_j"] == [2.5]

    def test_only_rounds_that_both_have_are_compared(self) -> None:
        peer = raw(0.01, 0.02, 0.03)
        del peer.blocks[0]
        ratio = ratios(DECODE, raw(0.01, 0.01, 0.01), "peer", peer)[0]
        assert ratio.n == 2
        assert ratio.better.value == pytest.approx(2.5)

    def test_several_at_once_are_compared_by_throughput(self) -> None:
        ours = Raw(INFO, [block(TRACE, TRACE, walls_s=(1.0,))])
        peer = Raw(INFO, [block(TRACE, TRACE, walls_s=(3.0,))])
        found = {each.metric: each.better.value for each in ratios(BATCH, ours, "peer", peer)}
        assert found["throughput_tokens_per_s"] == pytest.approx(3)
