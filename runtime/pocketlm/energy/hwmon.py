"""Power rails of Arm boards: Texas Instruments' INA monitors, read through Linux's hwmon tree.

    /sys/class/hwmon/hwmonN/name                    ina3221, ina219, ina226, …
                           /power1_label, in1_label the rail's name
                           /power1_input            µW, or
                           /in1_input, curr1_input  mV on the bus, mA

Only these chips are taken. Other hwmon devices have power files too that mean something else: a graphics
card's (amdgpu), a power supply's, a processor's model.

Sources: kernel.org, hwmon/sysfs-interface, hwmon/ina3221, hwmon/ina2xx; for the rails, NVIDIA's Jetson Linux
Developer Guide, "Platform Power and Performance".
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketlm.energy.reading import Absent
from pocketlm.energy.sampled import SampledProbe

SOURCE = "hwmon"
INTERVAL_S = 0.1

_CHIP = re.compile(r"ina\d+\w*")
_THREE_CHANNELS = re.compile(r"ina3221\w*")

# A module's or a board's whole input, most encompassing first: Jetson Thor's carrier board; TX1, TX2, Xavier
# NX, Orin Nano and NX; Nano.
_INPUTS = ("VIN", "VDD_IN", "5V_IN", "POM_5V_IN")

# Rails behind another one, so that a sum would count them twice.
_BEHIND = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}  # AGX Orin

_NOT_CONNECTED = "NC"


@dataclass(frozen=True)
class Rail:
    """One channel: a file in µW, or one in mV and one in mA."""

    name: str
    power: Path | None
    voltage: Path | None = None
    current: Path | None = None

    def read_w(self) -> float:
        """Watts now. Raises OSError and ValueError."""
        if self.power is not None:
            return int(self.power.read_text()) / 1e6
        if self.voltage is None or self.current is None:
            raise ValueError(f"rail {self.name} has neither a power nor a voltage and a current file")
        return int(self.voltage.read_text()) * int(self.current.read_text()) / 1e6


def find(root: Path = Path("/"), *, clock: Callable[[], float] = time.monotonic) -> SampledProbe | Absent:
    """A probe over all INA rails under `root`, or why there is none."""
    rails = tuple(_rails(root / "sys/class/hwmon"))
    if not rails:
        return Absent(SOURCE, "no INA power monitor in /sys/class/hwmon")
    readable, error = _readable(rails)
    if not readable:
        return Absent(SOURCE, f"the rails of the INA power monitor cannot be read: {error}")
    counted, flags = total_rails([rail.name for rail in readable])

    def read_power_w() -> Mapping[str, float]:
        return {rail.name: rail.read_w() for rail in readable}

    def total(power_w: Mapping[str, float]) -> float:
        return sum(power_w[name] for name in counted)

    return SampledProbe(
        SOURCE, "board", "measured", read_power_w, INTERVAL_S, total=total, flags=lambda: flags, clock=clock
    )


def total_rails(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which rails make the board's total, and what a reader has to know of it.

    The rail that is the input, where the board has one; else all that are not behind another, with a flag.
    """
    names = tuple(names)
    for board_input in _INPUTS:
        if board_input in names:
            return (board_input,), ()
    counted = tuple(name for name in names if _BEHIND.get(name) not in names)
    return counted, (f"no rail is the board's input; the total is the sum of {', '.join(counted)}",)


def _rails(folder: Path) -> Iterator[Rail]:
    taken: set[str] = set()
    for device in sorted(folder.glob("hwmon*"), key=_number):
        chip = _text(device / "name")
        if not _CHIP.fullmatch(chip):
            continue
        # Channels 4 to 6 of an INA3221 are shunt voltages, and its fourth current is a sum.
        channels = (1, 2, 3) if _THREE_CHANNELS.fullmatch(chip) else (1,)
        for channel in channels:
            label = _label(device, channel) or (_text(device / "label") if channels == (1,) else "")
            if label == _NOT_CONNECTED or _text(device / f"in{channel}_enable") == "0":
                continue
            name = label or (chip if channels == (1,) else f"{chip}-{channel}")
            name = f"{name} ({device.name}-{channel})" if name in taken else name
            rail = _rail(device, channel, name)
            if rail is not None:
                taken.add(name)
                yield rail


def _rail(device: Path, channel: int, name: str) -> Rail | None:
    power = device / f"power{channel}_input"
    if power.exists():
        return Rail(name, power)
    voltage, current = device / f"in{channel}_input", device / f"curr{channel}_input"
    return Rail(name, None, voltage, current) if voltage.exists() and current.exists() else None


def _readable(rails: Iterable[Rail]) -> tuple[tuple[Rail, ...], Exception | None]:
    """The rails that answer, and the last error of those that do not (a channel that is switched off)."""
    readable, last_error = [], None
    for rail in rails:
        try:
            rail.read_w()
            readable.append(rail)
        except (OSError, ValueError) as error:
            last_error = error
    return tuple(readable), last_error


def _label(device: Path, channel: int) -> str:
    for file in (f"power{channel}_label", f"in{channel}_label", f"curr{channel}_label"):
        if text := _text(device / file):
            return text
    return ""


def _number(device: Path) -> int:
    digits = device.name.removeprefix("hwmon")
    return int(digits) if digits.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
