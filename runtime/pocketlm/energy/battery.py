"""The battery of a device that runs on it: all that the device uses, screen and radio included.

Linux and Android: /sys/class/power_supply, whose files are in µW, µA and µV (kernel documentation,
ABI/testing/sysfs-class-power). macOS: the registry's AppleSmartBattery, in mA and mV. Power is sampled
(power_now, else current_now × voltage_now): the counters beside it (energy_now, charge_counter) step too
coarsely for a window of minutes. Gauges average over seconds and are refreshed rarely, so only long windows
mean something. Once a charger is plugged in, the figure no longer is the device's, and the window is spoiled.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from pocketlm.energy.reading import Absent
from pocketlm.energy.sampled import SampledProbe, WindowSpoiledError
from pocketlm.energy.tool import RunTool, ToolError, run_tool

SOURCE = "battery"
IOREG = ("ioreg", "-rw0", "-c", "AppleSmartBattery")

LEAST_PLAUSIBLE_W, MOST_PLAUSIBLE_W = 0.02, 500.0
SYSFS_INTERVAL_S, SYSFS_WINDOW_S = 1.0, 60.0
# macOS refreshes the registry's figures about once a minute, and each sample starts a process.
IOREG_INTERVAL_S, IOREG_WINDOW_S = 5.0, 300.0

_PROPERTY = re.compile(
    r'^[\s|]*"(\w+)" = (.+?)\s*$', re.MULTILINE
)  # not those inside {...}: they have no blanks


def find(
    root: Path = Path("/"), platform: str = sys.platform, run: RunTool = run_tool
) -> SampledProbe | Absent:
    """A probe for the battery if the device runs on it now, or why there is none.

    root: where /sys is. run: runs `ioreg` on macOS.
    """
    if platform == "darwin":
        read_power_w = _MacBattery(run).read_power_w
        interval_s, least_window_s, held_s = IOREG_INTERVAL_S, IOREG_WINDOW_S, IOREG_INTERVAL_S / 2
    elif platform in ("linux", "android"):
        batteries = _batteries(root)
        if not batteries:
            return Absent(SOURCE, "there is no battery here")
        read_power_w = _SysfsBatteries(root, batteries).read_power_w
        interval_s, least_window_s, held_s = SYSFS_INTERVAL_S, SYSFS_WINDOW_S, 0.0
    else:
        return Absent(SOURCE, f"pocketlm cannot read a battery on {platform}")
    try:
        read_power_w()
    except WindowSpoiledError as error:
        return Absent(SOURCE, str(error), "unplug the charger and measure on battery")
    except (OSError, ValueError, ToolError) as error:
        return Absent(SOURCE, str(error))
    return SampledProbe(
        SOURCE,
        "device",
        "measured",
        read_power_w,
        interval_s,
        least_window_s=least_window_s,
        held_s=held_s,
    )


class _SysfsBatteries:
    """The batteries under /sys/class/power_supply."""

    def __init__(self, root: Path, batteries: list[Path]) -> None:
        self._root = root
        self._batteries = batteries

    def read_power_w(self) -> dict[str, float]:
        """Watts by battery; one that rests while another discharges gives 0."""
        if charger := _charger(self._root):
            raise WindowSpoiledError(f"a charger is plugged in ({charger})")
        statuses = {battery: _text(battery / "status") for battery in self._batteries}
        if "Unknown" in statuses.values() and "Discharging" not in statuses.values():
            raise ValueError("the battery does not say whether it discharges")
        if "Charging" in statuses.values() or "Discharging" not in statuses.values():
            found = ", ".join(f"{battery.name}: {status}" for battery, status in statuses.items())
            raise WindowSpoiledError(f"the device does not run on battery ({found})")
        power_w = {
            battery.name: _discharge_w(battery) if status == "Discharging" else 0.0
            for battery, status in statuses.items()
        }
        return _plausible(power_w)


def _batteries(root: Path) -> list[Path]:
    """The folders of the batteries that run the device itself."""
    batteries = [
        supply
        for supply in _supplies(root)
        if _optional(supply / "type") == "Battery" and _optional(supply / "present") != "0"
    ]
    # Android calls the whole pack `battery` and may list the pack's gauges beside it, which count it again.
    return [supply for supply in batteries if supply.name == "battery"] or batteries


def _charger(root: Path) -> str | None:
    """The name of a supply that feeds the device now."""
    for supply in _supplies(root):
        kind = _optional(supply / "type") or ""
        if kind in ("Mains", "Wireless") or kind.startswith("USB"):
            online = _optional(supply / "online")
            if online not in (None, "0"):  # 2 is a charger of programmable voltage
                return supply.name
    return None


def _supplies(root: Path) -> list[Path]:
    """All supplies but those of peripherals: a mouse has a battery too."""
    folder = root / "sys/class/power_supply"
    try:
        supplies = sorted(folder.iterdir())
    except OSError:
        return []
    return [supply for supply in supplies if _optional(supply / "scope") != "Device"]


def _discharge_w(battery: Path) -> float:
    """Watts from power_now, or from current_now × voltage_now where that is missing or 0.

    The sign of a discharge differs by vendor (the kernel settled on minus in 2020), so it is dropped.
    """
    power_uw = _number(battery / "power_now")
    if power_uw:
        return abs(power_uw) * 1e-6
    current_ua, voltage_uv = _number(battery / "current_now"), _number(battery / "voltage_now")
    if current_ua is None or voltage_uv is None:
        raise ValueError(f"{battery.name} gives neither power_now nor current_now with voltage_now")
    return abs(current_ua) * 1e-6 * voltage_uv * 1e-6


def _text(path: Path) -> str:
    """Raises OSError, as a battery may be pulled out."""
    return path.read_text(encoding="utf-8", errors="replace").strip()


def _optional(path: Path) -> str | None:
    try:
        return _text(path)
    except OSError:
        return None


def _number(path: Path) -> int | None:
    """None for a file that a driver lacks or cannot fill now; raises ValueError for what is no number."""
    text = _optional(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        raise ValueError(f"{path} holds {text!r}; a whole number is expected") from None


def _plausible(power_w: Mapping[str, float]) -> dict[str, float]:
    total_w = sum(power_w.values())
    if not LEAST_PLAUSIBLE_W <= total_w <= MOST_PLAUSIBLE_W:
        raise ValueError(
            f"the battery gives {total_w:.3g} W, and a running device uses between {LEAST_PLAUSIBLE_W} and "
            f"{MOST_PLAUSIBLE_W:g}; some vendors do not count in µA as the kernel asks"
        )
    return dict(power_w)


class _MacBattery:
    """The battery in macOS' registry."""

    def __init__(self, run: RunTool) -> None:
        self._run = run

    def read_power_w(self) -> dict[str, float]:
        return parse_ioreg(self._run(IOREG))


def parse_ioreg(text: str) -> dict[str, float]:
    """Watts from what `ioreg` prints of AppleSmartBattery.

    Currents are signed, but printed as unsigned 64-bit numbers. Raises WindowSpoiledError with a charger
    plugged in, ValueError where there is no battery, a property is missing or the figures make no sense.
    """
    properties = dict(_PROPERTY.findall(text))
    if not properties:
        raise ValueError("there is no battery here")
    if properties.get("ExternalConnected") == "Yes":
        raise WindowSpoiledError("a charger is plugged in")
    current_ma = _signed(properties, "InstantAmperage") or _signed(properties, "Amperage")
    voltage_mv = _signed(properties, "Voltage")
    if current_ma is None or voltage_mv is None:
        raise ValueError("AppleSmartBattery gives no InstantAmperage or no Voltage")
    if current_ma > 0:
        raise ValueError(f"the battery is charged with {current_ma} mA although no charger is plugged in")
    return _plausible({"battery": -current_ma * 1e-3 * voltage_mv * 1e-3})


def _signed(properties: Mapping[str, str], name: str) -> int | None:
    text = properties.get(name)
    try:
        value = None if text is None else int(text)
    except ValueError:
        raise ValueError(f"AppleSmartBattery gives {name} = {text!r}; a whole number is expected") from None
    return value - 2**64 if value is not None and value >= 2**63 else value
