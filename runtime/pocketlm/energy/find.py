"""Which source of energy figures this machine has: the most trusted one that works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pocketlm.energy import estimate
from pocketlm.energy.meter_log import MeterLog, read_log
from pocketlm.energy.reading import Absent, CpuSeconds, Probe

_LINUX = ("linux", "android")  # Android names itself since Python 3.13
_NVIDIA = ("linux", "win32")

_Find = Callable[[Path, str], Probe | Absent]


@dataclass(frozen=True)
class Found:
    """The probe to use, what else there is, and what there is not."""

    probe: Probe
    others: tuple[Probe, ...]
    """Less trusted, or of a part only (graphics cards). Never to be added to `probe`: their scopes differ."""
    absent: tuple[Absent, ...]
    """Sources of this platform that cannot be used, in the order of trust."""


def find_probe(
    *,
    meter: Path | None = None,
    cpu_seconds: CpuSeconds | None = None,
    root: Path = Path("/"),
    platform: str = sys.platform,
) -> Found:
    """Looks for all sources of the platform, most trusted first: an external meter's log (`meter`), a board's
    rails, the processor's counters (RAPL, EMI, Apple's), the battery where it is what the machine runs on, a
    Raspberry Pi's power chip; last an estimate from `cpu_seconds` (this process's by default), so that there
    always is one. An NVIDIA card's counter is never the first, as it leaves out the processor.

    `root` stands for / in what is read from /sys and /proc. Raises MeterLogError for a `meter` that cannot be
    read or understood, and InvalidSettingError for a wrong POCKETLM_TDP_W.
    """
    found: list[Probe] = []
    absent: list[Absent] = []
    if meter is not None:
        read_log(meter, growing=True)  # whoever names a meter wants it, and no silent replacement
        found.append(MeterLog(meter))
    finders: list[_Find] = [find for platforms, find in _IN_ORDER_OF_TRUST if platform in platforms]
    finders.append(lambda root, platform: estimate.find(cpu_seconds, root))
    if platform in _NVIDIA:
        finders.append(_nvml)
    for find in finders:
        probe = find(root, platform)
        if isinstance(probe, Absent):
            absent.append(probe)
        else:
            found.append(probe)
    return Found(found[0], tuple(found[1:]), tuple(absent))


# Each imports its module when it is asked, so that no platform loads another one's.


def _hwmon(root: Path, platform: str) -> Probe | Absent:
    from pocketlm.energy import hwmon

    return hwmon.find(root)


def _rapl(root: Path, platform: str) -> Probe | Absent:
    from pocketlm.energy import rapl

    return rapl.find(root)


def _emi(root: Path, platform: str) -> Probe | Absent:
    from pocketlm.energy import emi

    return emi.find()


def _apple(root: Path, platform: str) -> Probe | Absent:
    from pocketlm.energy import apple

    return apple.find(platform=platform)


def _battery(root: Path, platform: str) -> Probe | Absent:
    from pocketlm.energy import battery

    return battery.find(root, platform)


def _pmic(root: Path, platform: str) -> Probe | Absent:
    from pocketlm.energy import pmic

    return pmic.find()


def _nvml(root: Path, platform: str) -> Probe | Absent:
    from pocketlm.energy import nvml

    return nvml.find()


_IN_ORDER_OF_TRUST: tuple[tuple[tuple[str, ...], _Find], ...] = (
    (_LINUX, _hwmon),
    (_LINUX, _rapl),
    (("win32",), _emi),
    (("darwin",), _apple),
    ((*_LINUX, "darwin"), _battery),
    (_LINUX, _pmic),
)
