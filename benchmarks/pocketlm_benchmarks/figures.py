"""From traces and windows to the figures of a result, in the field's terms (as vLLM's benchmarks use them).

ttft: from handing the prompt over to the first token. itl: the gaps between tokens. e2el: the whole answer.
tpot = (e2el − ttft) / (output tokens − 1).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from pocketlm.energy.reading import JOULES_PER_WH, Reading
from pocketlm_benchmarks.engines.protocol import EngineInfo, Trace
from pocketlm_benchmarks.result import Block, Case, EnergyPerQuery, Figure, Measurement, Ratio
from pocketlm_benchmarks.statistics import drift, figure, summarize_rounds

ENERGY = "energy_j"
"""Of a query, idle power included."""
LOWER_IS_BETTER = frozenset({"ttft_s", "tpot_s", "itl_s", "e2el_s", ENERGY})
HEADLINES = {
    "prefill": ("prefill_tokens_per_s",),
    "decode": ("decode_tokens_per_s",),
    "workload": ("e2el_s", "ttft_s", "decode_tokens_per_s"),
}
"""By the kind of case, the metrics by which engines are compared."""
CONCURRENT_HEADLINES = ("throughput_tokens_per_s", "e2el_s")

NOISY_FROM = 0.25  # spread of the rounds, lowest to highest, as a share of their median
SLOWED_FROM = 1.05  # time of the last third of the rounds over the first third's

Samples = dict[str, list[float]]


@dataclass
class RawBlock:
    """What came of one block: its queries' traces and its energy window."""

    round: int
    started_unix_s: float
    duration_s: float
    traces: list[Trace]
    walls_s: list[float]  # one for each group of queries that was handed over at once
    reading: Reading | None
    idle_power_w: float | None = None
    flags: list[str] = field(default_factory=list)


def samples_of(case: Case, info: EngineInfo, block: RawBlock) -> Samples:
    """Each metric's samples in one block; a metric that the engine does not tell is not there."""
    samples: Samples = defaultdict(list)
    for trace in block.traces:
        computed = trace.prompt_tokens - trace.cached_tokens
        if case.kind != "decode" and trace.prefill_s:
            # Without sampling it is no time to a first token, only the prompt's share of it.
            if info.sampling_included:
                samples["ttft_s"].append(trace.prefill_s)
            if case.concurrent == 1:  # several prompts at once share their time
                samples["prefill_tokens_per_s"].append(computed / trace.prefill_s)
        if case.kind != "prefill" and trace.decode_s and trace.decode_tokens:
            samples["tpot_s"].append(trace.decode_s / trace.decode_tokens)
            samples["itl_s"] += trace.gaps_s
            if case.concurrent == 1:
                samples["decode_tokens_per_s"].append(trace.decode_tokens / trace.decode_s)
        if case.kind == "workload" and trace.prefill_s and trace.decode_s is not None:
            samples["e2el_s"].append(trace.prefill_s + trace.decode_s)
    if case.concurrent > 1:
        per_group = len(block.traces) // len(block.walls_s)
        for n, wall_s in enumerate(block.walls_s):
            group = block.traces[n * per_group : (n + 1) * per_group]
            samples["throughput_tokens_per_s"].append(sum(trace.new_tokens for trace in group) / wall_s)
    return {metric: values for metric, values in samples.items() if values}


@dataclass
class Raw:
    """All blocks of one engine on one case."""

    info: EngineInfo
    blocks: list[RawBlock] = field(default_factory=list)


def measurement(engine: str, case: Case, raw: Raw) -> Measurement:
    """The figures of all rounds."""
    by_round = [
        {metric: [round(value, 9) for value in values] for metric, values in samples.items()}
        for samples in (samples_of(case, raw.info, block) for block in raw.blocks)
    ]
    blocks = [_block(block) for block in raw.blocks]
    rounds: dict[str, list[list[float]]] = defaultdict(list)
    for each in by_round:
        for metric, values in each.items():
            rounds[metric].append(values)
    return Measurement(
        engine=engine,
        case=case.name,
        metrics={metric: summarize_rounds(values) for metric, values in rounds.items()},
        samples={metric: list(chain.from_iterable(values)) for metric, values in rounds.items()},
        blocks=blocks,
        energy=energy_per_query(case, blocks),
        flags=[*_cut_short(case, raw.blocks), *_flags(case, by_round)],
    )


def energy_per_query(case: Case, blocks: Sequence[Block]) -> EnergyPerQuery | None:
    """Joules of one query from the blocks that have a figure; None if none has."""
    total = _per_query(blocks, idle=False)
    if total is None:
        return None
    return EnergyPerQuery(
        total_j=total,
        marginal_j=_per_query(blocks, idle=True),
        per_prompt_token_j=total.value / case.prompt_tokens if case.kind == "prefill" else None,
        # A decode case behind a long prompt holds the energy of that prompt too.
        per_new_token_j=None
        if case.kind != "workload" and case.prompt_tokens > 1
        else total.value / case.new_tokens,
        wh=total.value / JOULES_PER_WH,
    )


def ratios(case: Case, ours: Raw, peer_name: str, peer: Raw) -> list[Ratio]:
    """How many times better ours is: the median over the rounds, each compared within itself."""
    mine, theirs = (_medians_by_round(case, raw) for raw in (ours, peer))
    headlines = CONCURRENT_HEADLINES if case.concurrent > 1 else HEADLINES[case.kind]
    found = []
    for metric in (*headlines, ENERGY):
        pairs = [
            (mine[n][metric], theirs[n][metric])
            for n in mine.keys() & theirs.keys()
            if mine[n].get(metric) and theirs[n].get(metric)
        ]
        if pairs:
            lower = metric in LOWER_IS_BETTER
            better = figure([their / my if lower else my / their for my, their in pairs])
            found.append(Ratio(peer_name, case.name, metric, better, len(pairs)))
    return found


def _medians_by_round(case: Case, raw: Raw) -> dict[int, dict[str, float]]:
    medians: dict[int, dict[str, float]] = {}
    for block in raw.blocks:
        medians[block.round] = {
            metric: statistics.median(values) for metric, values in samples_of(case, raw.info, block).items()
        }
        if block.reading is not None and block.reading.energy_j is not None:
            medians[block.round][ENERGY] = block.reading.energy_j / len(block.traces)
    return medians


def _block(raw: RawBlock) -> Block:
    reading = raw.reading
    return Block(
        round=raw.round,
        started_unix_s=raw.started_unix_s,
        duration_s=raw.duration_s,
        queries=len(raw.traces),
        energy_j=None if reading is None else reading.energy_j,
        low_j=None if reading is None else reading.low_j,
        high_j=None if reading is None else reading.high_j,
        idle_power_w=raw.idle_power_w,
        flags=[*raw.flags, *reading_flags(reading)],
    )


def reading_flags(reading: Reading | None) -> list[str]:
    """What a reader has to know of a block's energy."""
    if reading is None:
        return []
    return [*reading.flags, *([] if reading.reason is None else [f"no energy: {reading.reason}"])]


def _per_query(blocks: Sequence[Block], idle: bool) -> Figure | None:
    """Joules a query, with the idle power subtracted or not; the interval holds an estimate's own bounds."""
    used: list[tuple[float, float, float]] = []
    for block in blocks:
        if block.energy_j is None or (idle and block.idle_power_w is None):
            continue
        value = block.energy_j - ((block.idle_power_w or 0.0) * block.duration_s if idle else 0.0)
        # By whatever factor an estimate is off, its idle power is too.
        ends = [
            value if end is None or not block.energy_j else value * (end / block.energy_j)
            for end in (block.low_j, block.high_j)
        ]
        used.append((value / block.queries, min(ends) / block.queries, max(ends) / block.queries))
    if not used:
        return None
    values, lows, highs = zip(*used, strict=True)
    spread = figure(values)
    if spread.low is None or spread.high is None:
        return Figure(spread.value, min(lows), max(highs)) if lows != values else spread
    return Figure(
        spread.value, min(spread.low, statistics.median(lows)), max(spread.high, statistics.median(highs))
    )


def _cut_short(case: Case, blocks: Sequence[RawBlock]) -> Iterator[str]:
    traces = [trace for block in blocks for trace in block.traces]
    short = sum(trace.new_tokens < case.new_tokens for trace in traces)
    if short:
        yield f"less work: {short} of {len(traces)} answers ended before their {case.new_tokens} tokens"


def _flags(case: Case, by_round: Sequence[Samples]) -> Iterator[str]:
    metric = CONCURRENT_HEADLINES[0] if case.concurrent > 1 else HEADLINES[case.kind][0]
    medians = [statistics.median(each[metric]) for each in by_round if metric in each]
    if len(medians) < 3:
        return
    spread = (max(medians) - min(medians)) / statistics.median(medians)
    if spread > NOISY_FROM:
        yield f"noisy: the rounds' {metric} spread by {spread:.0%} of their median"
    slower = drift(medians) if metric in LOWER_IS_BETTER else 1 / drift(medians)
    if slower > SLOWED_FROM:
        yield f"slowed down: the last third of the rounds took {slower - 1:.0%} longer than the first"
