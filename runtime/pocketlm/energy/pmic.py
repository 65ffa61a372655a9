"""The power chip (PMIC) of a Raspberry Pi 5 or Compute Module 5, which measures the rails it makes.

`vcgencmd pmic_read_adc` prints each rail's current and voltage (Raspberry Pi documentation, "vcgencmd").
The rails leave out what hangs on the 5 V supply directly (USB devices, fan, HATs) and the losses of
conversion. A comparison with a meter at the USB-C plug found plug = 1.13 × rails + 0.64 W
(github.com/jfikar/RPi5-power), so readings of this probe are not comparable with a meter's.
"""

from __future__ import annotations

import re

from pocketlm.energy.reading import Absent
from pocketlm.energy.sampled import SampledProbe
from pocketlm.energy.tool import RunTool, ToolError, run_tool

SOURCE = "pmic"
COMMAND = ("vcgencmd", "pmic_read_adc")
INTERVAL_S = 1.0  # each sample starts a process; ten a second already slow a model down
BEYOND_THE_RAILS = (
    "without what hangs on the board's 5 V supply (USB, fan, HATs) and without conversion losses"
)

_LINE = re.compile(r"^\s*(\w+)_([AV]) +(?:current|volt)\(\d+\)=(-?\d+(?:\.\d+)?)[AV]\s*$", re.MULTILINE)


def parse_rails(text: str) -> dict[str, float]:
    """Watts by rail from `3V3_SYS_A current(1)=0.0624A` and `3V3_SYS_V volt(9)=3.306V`, paired by name.

    The input (EXT5V) and the clock's cell (BATT) have no current and so no power. Raises ValueError where no
    rail has both.
    """
    values: dict[str, dict[str, float]] = {"A": {}, "V": {}}
    for rail, unit, number in _LINE.findall(text):
        values[unit][rail] = float(number)
    power_w = {
        rail: amperes * values["V"][rail] for rail, amperes in values["A"].items() if rail in values["V"]
    }
    if not power_w:
        raise ValueError(f"no rail has both a current and a voltage in {' '.join(text.split())[:200]!r}")
    return power_w


def find(run: RunTool = run_tool) -> SampledProbe | Absent:
    """A probe for the board's rails, or why there is none."""

    def read_power_w() -> dict[str, float]:
        return parse_rails(run(COMMAND))

    try:
        read_power_w()
    except ToolError as error:
        return _absent(str(error))
    except ValueError as error:
        return Absent(SOURCE, str(error))
    return SampledProbe(
        SOURCE,
        "board",
        "measured",
        read_power_w,
        INTERVAL_S,
        held_s=INTERVAL_S / 2,
        flags=lambda: (BEYOND_THE_RAILS,),
    )


def _absent(reason: str) -> Absent:
    if "not installed" in reason:
        return Absent(SOURCE, f"{reason}; it comes with Raspberry Pi OS")
    if "not registered" in reason:
        return Absent(SOURCE, "this Raspberry Pi does not measure its rails; a Raspberry Pi 5 does")
    if "/dev/vcio" in reason:
        remedy = "sudo usermod -aG video $USER, then log in again"
        return Absent(SOURCE, f"only the group `video` may ask the firmware: {reason}", remedy)
    return Absent(SOURCE, reason)
