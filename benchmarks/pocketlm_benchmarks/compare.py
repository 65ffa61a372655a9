"""Two results beside each other: what our engine gained and lost, and whether that is more than chance.

A change is compared on equal work only: the same case with the same token ids. Each ratio says how many times
better it has become, so above 1 is better in every row. A regression is a loss that chance does not explain
and that is larger than the tolerance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pocketlm.errors import InvalidSettingError
from pocketlm_benchmarks.figures import ENERGY, LOWER_IS_BETTER
from pocketlm_benchmarks.result import (
    OURS,
    Block,
    EngineResult,
    Figure,
    Measurement,
    QualityFigures,
    Result,
    ResultError,
    Summary,
)
from pocketlm_benchmarks.significance import holm, rank_sum_p, ratio_of_medians

__all__ = ["ALL", "ENERGY", "Change", "Comparison", "Verdict", "compare"]

Verdict = Literal["better", "worse", "same", "not comparable"]

ALPHA = 0.05
BLOCKS_FROM = 8
"""Rounds from which on whole blocks are compared. Queries of one block resemble each other, so to take each
for itself overstates certainty; but among fewer blocks no rank test finds anything."""
KL_FLOOR = 1e-4
"""Nats per token. Divergences below it are equal: processors add in different orders."""

ALL = "all"
"""The metric of a row that stands for a whole case."""
METRICS = (
    "ttft_s",
    "tpot_s",
    "e2el_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "throughput_tokens_per_s",
)
"""The metrics of a measurement that are compared."""


@dataclass(frozen=True)
class Change:
    """One metric of one case before and after."""

    case: str | None  # None for what belongs to no case: load time, memory, quality
    metric: str  # as in Measurement.metrics, energy_j (of a query), load_s, peak_bytes, kl_mean, or `ALL`
    before: float | None  # medians
    after: float | None
    better: Figure | None  # how many times better it has become; no interval for a single figure
    p: float | None  # corrected for the number of tests; None where there are no samples to test
    verdict: Verdict
    regression: bool
    reason: str | None = None  # why it cannot be compared


@dataclass(frozen=True)
class Comparison:
    """All changes, and what a reader has to know of them."""

    before: str  # names the result: model, precision and date
    after: str
    tolerance: float
    same_device: bool
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.regression)

    @property
    def comparable(self) -> bool:
        """Whether there is a case that could be compared; without one, no regression means nothing."""
        return any(map(_compares_a_case, self.changes))


def compare(before: Result, after: Result, *, tolerance: float) -> Comparison:
    """What changed for our engine. `tolerance` is a share: 0.05 lets a query take 5 % longer.

    Raises InvalidSettingError for a tolerance that is no number from 0 on, and ResultError for a result
    without our engine.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise InvalidSettingError(f"the tolerance is {tolerance!r}; a share from 0 on is expected, as 0.05.")
    engines = _ours(before, "first"), _ours(after, "second")
    same_device = _machine(before) == _machine(after)
    pairs = [
        *_cases(before, after),
        *_energies(before, after, same_device),
        *_single_figures(before, after, *engines),
    ]
    adjusted = iter(holm([pair.p for pair in pairs if pair.p is not None]))
    changes = [
        _judged(pair if pair.p is None else dataclasses.replace(pair, p=next(adjusted)), tolerance)
        for pair in pairs
    ]
    return Comparison(
        before=_label(before),
        after=_label(after),
        tolerance=tolerance,
        same_device=same_device,
        changes=tuple(changes),
        notes=tuple(_notes(before, after, changes, same_device)),
    )


def _ours(result: Result, which: str) -> EngineResult:
    for engine in result.engines:
        if engine.name == OURS:
            return engine
    raise ResultError(f"the {which} result holds no measurement of {OURS}, only that can be compared.")


def _cases(before: Result, after: Result) -> Iterator[Change]:
    """The metrics of each case of either result."""
    first, second = ({case.name: case for case in result.cases} for result in (before, after))
    for name in first | second:
        if name not in first or name not in second:
            yield _incomparable(name, ALL, f"only the {'first' if name in first else 'second'} has it")
        elif first[name].sha256 != second[name].sha256:
            yield _incomparable(name, ALL, "the prompts differ: another seed, tokenizer or set of prompts")
        else:
            yield from _metrics(name, before.measurement(OURS, name), after.measurement(OURS, name))


def _metrics(case: str, before: Measurement | None, after: Measurement | None) -> Iterator[Change]:
    if before is None or before.skipped is not None:
        yield _incomparable(case, ALL, f"skipped in the first: {_why_skipped(before)}")
    elif after is None or after.skipped is not None:
        yield _incomparable(case, ALL, f"skipped in the second: {_why_skipped(after)}")
    else:
        for metric in METRICS:
            first, second = (measured.samples.get(metric) for measured in (before, after))
            if first and second:
                mine, theirs = _by_block(first, before.blocks), _by_block(second, after.blocks)
                if min(len(mine), len(theirs)) >= BLOCKS_FROM:
                    first, second = [median(block) for block in mine], [median(block) for block in theirs]
                yield _tested(case, metric, first, second)
            elif first or second:
                yield _incomparable(case, metric, f"only the {'first' if first else 'second'} has it")


def _why_skipped(measurement: Measurement | None) -> str | None:
    return "it was not measured" if measurement is None else measurement.skipped


def _by_block(samples: Sequence[float], blocks: Sequence[Block]) -> list[Sequence[float]]:
    """The samples of each block; none if they cannot be told apart.

    Each query gave the same number of samples, which is below one where several share a figure.
    """
    queries = sum(block.queries for block in blocks)
    split = []
    begin = 0
    for block in blocks:
        count, rest = divmod(block.queries * len(samples), queries)
        if rest or not count:
            return []
        split.append(samples[begin : begin + count])
        begin += count
    return split


def _energies(before: Result, after: Result, same_device: bool) -> Iterator[Change]:
    """Joules of a query, from blocks; where they were measured in the same way."""
    if before.energy is None or after.energy is None:
        if before.energy is not after.energy:
            which = "second" if before.energy is None else "first"
            yield _incomparable(None, ENERGY, f"only the {which} has it")
        return
    first, second = (
        f"{setup.source}, {setup.scope}, {setup.kind}" for setup in (before.energy, after.energy)
    )
    if first != second:
        yield _incomparable(None, ENERGY, f"{first} in the first, {second} in the second")
        return
    if before.energy.kind == "estimated" and not same_device:
        yield _incomparable(None, ENERGY, "estimates of different devices")
        return
    for case in _equal_cases(before, after):
        samples = tuple(_joules(result.measurement(OURS, case)) for result in (before, after))
        if all(samples):
            yield _tested(case, ENERGY, *samples)


def _equal_cases(before: Result, after: Result) -> list[str]:
    hashes = {case.name: case.sha256 for case in after.cases}
    return [case.name for case in before.cases if hashes.get(case.name) == case.sha256]


def _joules(measurement: Measurement | None) -> list[float]:
    blocks = [] if measurement is None else measurement.blocks
    return [block.energy_j / block.queries for block in blocks if block.energy_j is not None]


def _single_figures(
    before: Result, after: Result, first: EngineResult, second: EngineResult
) -> Iterator[Change]:
    """What has no samples in a result: load time, memory and quality."""
    if first.load_warm_s is not None and second.load_warm_s is not None:
        yield _load(first.load_warm_s, second.load_warm_s)
    peaks = tuple(engine.memory.peak_bytes if engine.memory else None for engine in (first, second))
    if peaks[0] and peaks[1]:
        yield _change(None, "peak_bytes", peaks[0], peaks[1], Figure(peaks[0] / peaks[1], None, None))
    yield from _quality(before, after)


def _load(before: Summary, after: Summary) -> Change:
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return _incomparable(None, "load_s", "a single load tells nothing of its spread")
    better = Figure(before.median / after.median, before.low / after.high, before.high / after.low)
    return _change(None, "load_s", before.median, after.median, better)


def _quality(before: Result, after: Result) -> Iterator[Change]:
    """The divergence, preferably as the runs measured it, if it is on the same text."""
    models = before.model, after.model
    measured, shipped = (
        tuple(getattr(model, name) for model in models) for name in ("quality_measured", "quality_manifest")
    )
    pairs: list[tuple[QualityFigures, QualityFigures]] = [
        (first, second) for first, second in (measured, shipped) if first is not None and second is not None
    ]
    for first, second in pairs:
        if _text(first) == _text(second):
            better = Figure(max(first.kl_mean, KL_FLOOR) / max(second.kl_mean, KL_FLOOR), None, None)
            yield _change(None, "kl_mean", first.kl_mean, second.kl_mean, better)
            return
    if any((*measured, *shipped)):
        yield _incomparable(None, "kl_mean", "not on the same text" if pairs else "only one of them has it")


def _text(quality: QualityFigures) -> tuple[object, ...]:
    """What makes two texts one: the name counts only for those that the exporter ships."""
    return quality.tokens, quality.text_sha256 or quality.text


def _tested(case: str, metric: str, before: Sequence[float], after: Sequence[float]) -> Change:
    """The medians' ratio with its interval, and the p value that is still to be corrected."""
    if min(len(before), len(after)) < 2:
        return _incomparable(case, metric, "a single sample tells nothing of its spread; measure more rounds")
    if min(*before, *after) <= 0:
        return _incomparable(case, metric, "there are samples of 0 or below")
    lower = metric in LOWER_IS_BETTER
    better = ratio_of_medians(before, after) if lower else ratio_of_medians(after, before)
    change = _change(case, metric, median(before), median(after), better)
    return dataclasses.replace(change, p=rank_sum_p(before, after))


def _change(case: str | None, metric: str, before: float, after: float, better: Figure) -> Change:
    return Change(case, metric, before, after, better, p=None, verdict="same", regression=False)


def _incomparable(case: str | None, metric: str, reason: str | None) -> Change:
    return Change(case, metric, None, None, None, None, "not comparable", regression=False, reason=reason)


def _judged(change: Change, tolerance: float) -> Change:
    """With its verdict, once p is corrected."""
    if change.better is None:
        return change
    ratio, low, high = change.better.value, change.better.low, change.better.high
    loss, gain = ratio < 1 / (1 + tolerance), ratio > 1 + tolerance
    if change.p is not None:
        certain = change.p < ALPHA
    elif low is not None and high is not None:
        certain = not low <= 1 <= high
    else:
        certain = loss or gain  # a single figure
    verdict: Verdict = "same" if not certain or ratio == 1 else "worse" if ratio < 1 else "better"
    return dataclasses.replace(change, verdict=verdict, regression=verdict == "worse" and loss)


def _label(result: Result) -> str:
    return f"{result.model.name} {result.model.precision}, {result.created}"


def _machine(result: Result) -> tuple[object, ...]:
    device = result.device
    return device.processor, device.architecture, device.physical_cores, device.logical_cores


def _notes(before: Result, after: Result, changes: Sequence[Change], same_device: bool) -> Iterator[str]:
    """Everything beside the software that can make a difference, the gravest first."""
    if not same_device:
        yield (
            f"DIFFERENT DEVICES: {before.device.processor} before, {after.device.processor} after. A change "
            "may be the device's, not the software's."
        )
    if not any(map(_compares_a_case, changes)):
        yield "NO CASE CAN BE COMPARED, so that there is no regression means nothing."
    blocks = [len(each.blocks) for each in before.measurements + after.measurements if each.engine == OURS]
    if 0 < (least := min(filter(None, blocks), default=0)) < BLOCKS_FROM:
        yield (
            f"Some cases have {least} blocks only: their queries are compared one by one, which overstates "
            "certainty, and so few blocks cannot tell a change of energy from chance. Measure "
            f"{BLOCKS_FROM} rounds or more."
        )
    for what, first, second in _differences(before, after):
        if first != second:
            yield f"{what}: {_said(first)} before, {_said(second)} after"
    for when, result in (("before", before), ("after", after)):
        yield from (f"{when}: {flag}" for flag in result.flags)


def _compares_a_case(change: Change) -> bool:
    return change.case is not None and change.better is not None


def _differences(before: Result, after: Result) -> Iterator[tuple[str, object, object]]:
    """What is set beside each other, with its name."""
    for part, names in _SET_BESIDE.items():
        for name in names:
            first, second = (getattr(getattr(each, part), name) for each in (before, after))
            yield name.replace("_", " "), first, second
    old, new = before.device.versions, after.device.versions
    for name in sorted(old | new):
        yield name, old.get(name), new.get(name)


_SET_BESIDE = {
    "model": ("name", "precision", "recipe", "weights_sha256", "bundle_sha256"),
    "settings": ("threads", "context_length", "quick", "rounds", "seed"),
    "device": (
        *("features", "memory_bytes", "system", "microcode", "virtual_machine"),
        *("governor", "turbo", "power_source"),
    ),
}


def _said(value: object) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return "unknown" if value is None else str(value)
