"""A meter's log joined with a result that is there already: the blocks' times say which joules are theirs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from pocketlm.energy.meter_log import Log, MeterLog, integrate, read_log
from pocketlm_benchmarks.figures import ENERGY, energy_per_query, reading_flags
from pocketlm_benchmarks.metering import note
from pocketlm_benchmarks.result import Block, IdleWindow, Result, ResultError, Sustained


def join(result: Result, log: Path) -> Result:
    """`result` with the energy of a log of timestamps and watts in place of its own.

    Ratios of energy and the sustained curve's watts are left out: they came from the other source.
    Raises ResultError for a run without idle windows, and what reading the log raises.
    """
    if result.energy is None:
        raise ResultError(
            "the result was made with --no-energy, so it has no idle windows. Measure again without it."
        )
    samples, probe = read_log(log), MeterLog(log)
    idle = [_idle(window, samples) for window in result.energy.idle]
    cases = {case.name: case for case in result.cases}
    measurements = []
    for each in result.measurements:
        blocks = [_block(block, idle, samples, probe.least_window_s) for block in each.blocks]
        energy = energy_per_query(cases[each.case], blocks)
        measurements.append(dataclasses.replace(each, blocks=blocks, energy=energy))
    return dataclasses.replace(
        result,
        measurements=measurements,
        ratios=[ratio for ratio in result.ratios if ratio.metric != ENERGY],
        energy=dataclasses.replace(
            result.energy,
            source=probe.source,
            scope=probe.scope,
            kind=probe.kind,
            resolution_j=probe.resolution_j,
            least_window_s=probe.least_window_s,
            note=note(probe.scope, probe.kind),
            idle=idle,
        ),
        sustained=None if result.sustained is None else _without_power(result.sustained),
    )


def _idle(window: IdleWindow, log: Log) -> IdleWindow:
    reading = integrate(log, window.started_unix_s, window.started_unix_s + window.duration_s)
    return dataclasses.replace(window, power_w=reading.power_w)


def _block(block: Block, idle: Sequence[IdleWindow], log: Log, least_window_s: float) -> Block:
    reading = integrate(log, block.started_unix_s, block.started_unix_s + block.duration_s)
    flags = reading_flags(reading)
    # A block's length was chosen for another source.
    if reading.energy_j is not None and block.duration_s < least_window_s:
        flags.append(
            f"the window is {block.duration_s:.3g} s long; {reading.source} needs {least_window_s:g} s"
        )
    around_w = [window.power_w for window in idle[block.round : block.round + 2]]
    known_w = [power_w for power_w in around_w if power_w is not None]
    return dataclasses.replace(
        block,
        energy_j=reading.energy_j,
        low_j=reading.low_j,
        high_j=reading.high_j,
        idle_power_w=statistics.fmean(known_w) if len(known_w) == 2 else None,
        flags=flags,
    )


def _without_power(sustained: Sustained) -> Sustained:
    points = [dataclasses.replace(point, power_w=None) for point in sustained.points]
    return dataclasses.replace(sustained, points=points)
