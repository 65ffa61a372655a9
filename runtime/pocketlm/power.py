"""How much of the device an answer may use: threads, how long they spin, and speculation.

A thread that has no work looks for some for a while before it sleeps: it spins. The next operator of a
forward pass then starts at once, but all the while the core draws power, and so it does for a while behind
each pass. docs/power.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from pocketlm.errors import InvalidSettingError, did_you_mean
from pocketlm.threads import physical_cores, wanted_threads

if TYPE_CHECKING:
    from pocketlm.tuning import Tuning

PowerMode = Literal["eco", "balanced", "fast"]
"""eco: the least processor time for a token. balanced: all cores, which sleep between passes. fast: all
cores, which spin as long as ONNX Runtime lets them."""

ECO_SPIN_US = 0
BALANCED_SPIN_US = 50
"""Most gaps between the operators of a pass are shorter, those between two passes longer."""


@dataclass(frozen=True)
class Power:
    """What a mode comes to on this device."""

    threads: int
    spin_us: int | None  # how long a thread without work spins; None: as long as ONNX Runtime has it
    speculate: bool


def power(mode: PowerMode, *, threads: int | None = None, tuning: Tuning | None = None) -> Power:
    """The mode on this device, with what `tuning` has measured if there is one.

    `threads`, or else POCKETLM_THREADS, goes before all else. Raises InvalidSettingError for a mode that does
    not exist and for a number of threads out of range.
    """
    if mode not in get_args(PowerMode):
        known = get_args(PowerMode)
        raise InvalidSettingError(
            f"The power mode is {mode!r}; {', '.join(known)} are expected.{did_you_mean(str(mode), known)}"
        )
    wanted = wanted_threads(threads)
    spin_us = {"eco": ECO_SPIN_US, "balanced": BALANCED_SPIN_US, "fast": None}[mode]
    # Several rows share one reading of the weights, so drafts that hold save processor time as well.
    return Power(_threads(mode, tuning) if wanted is None else wanted, spin_us, speculate=True)


def _threads(mode: PowerMode, tuning: Tuning | None) -> int:
    if tuning is not None:
        return tuning.eco_threads if mode == "eco" else tuning.threads
    cores = physical_cores()
    return max(1, cores // 2) if mode == "eco" else cores
