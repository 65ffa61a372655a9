"""A Raspberry Pi 5's power chip, on what `vcgencmd pmic_read_adc` printed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pocketlm.energy import pmic
from pocketlm.energy.pmic import parse_rails
from pocketlm.energy.reading import Absent
from pocketlm.energy.sampled import SampledProbe
from pocketlm.energy.tool import RunTool, ToolError

RECORDED = """\
 3V7_WL_SW_A current(0)=0.00000000A
   3V3_SYS_A current(1)=0.06245952A
   1V8_SYS_A current(2)=0.16102850A
  DDR_VDD2_A current(3)=0.00780744A
  DDR_VDDQ_A current(4)=0.00000000A
   1V1_SYS_A current(5)=0.17566740A
    0V8_SW_A current(6)=0.32791250A
  VDD_CORE_A current(7)=10.87674000A
   3V3_DAC_A current(17)=0.00036630A
   3V3_ADC_A current(18)=0.00042735A
   0V8_AON_A current(16)=0.00579975A
      HDMI_A current(22)=0.01367520A
 3V7_WL_SW_V volt(8)=3.79999600V
   3V3_SYS_V volt(9)=3.30632200V
   1V8_SYS_V volt(10)=1.79828900V
  DDR_VDD2_V volt(11)=1.10292900V
  DDR_VDDQ_V volt(12)=0.60476130V
   1V1_SYS_V volt(13)=1.10439400V
    0V8_SW_V volt(14)=0.80256330V
  VDD_CORE_V volt(15)=0.89745940V
   3V3_DAC_V volt(20)=3.30494200V
   3V3_ADC_V volt(21)=3.30219400V
   0V8_AON_V volt(19)=0.79736190V
      HDMI_V volt(23)=5.07056000V
     EXT5V_V volt(24)=5.06788000V
      BATT_V volt(25)=3.01110800V
"""
RECORDED_W = 10.7999  # the twelve products, added by hand


class Firmware:
    """Prints one text after another, the last one again and again; an error is raised."""

    def __init__(self, *answers: str | ToolError) -> None:
        self.answers = list(answers)

    def __call__(self, command: Sequence[str]) -> str:
        assert list(command) == ["vcgencmd", "pmic_read_adc"]
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, ToolError):
            raise answer
        return answer


def fails(message: str) -> RunTool:
    return Firmware(ToolError(message))


def test_recorded_rails() -> None:
    rails = parse_rails(RECORDED)
    assert len(rails) == 12
    assert rails["VDD_CORE"] == pytest.approx(10.87674 * 0.8974594)
    assert rails["DDR_VDDQ"] == 0
    assert sum(rails.values()) == pytest.approx(RECORDED_W, abs=1e-3)


def test_the_input_and_the_clocks_cell_have_no_power() -> None:
    assert not {"EXT5V", "BATT"} & parse_rails(RECORDED).keys()


def test_pairs_are_made_by_name_and_not_by_number() -> None:
    assert parse_rails("X_A current(1)=2A\nY_V volt(1)=9V\nX_V volt(7)=3.5V") == {"X": 7.0}


def test_a_negative_current_stays_negative() -> None:
    assert parse_rails("X_A current(0)=-0.01A\nX_V volt(1)=3V") == pytest.approx({"X": -0.03})


@pytest.mark.parametrize(
    "text",
    ["", "garbage\n= \x00", "X_A current(0)=1A", "X_V volt(0)=1V", "X_A current(0)=nanA\nX_V volt(0)=1V"],
)
def test_no_rail_at_all(text: str) -> None:
    with pytest.raises(ValueError, match="no rail has both a current and a voltage"):
        parse_rails(text)


def probe_of(firmware: RunTool) -> SampledProbe:
    found = pmic.find(firmware)
    assert isinstance(found, SampledProbe)
    return found


def test_a_window() -> None:
    probe = probe_of(Firmware(RECORDED))
    reading = probe.begin().end()
    probe.close()
    assert reading.energy_j == pytest.approx(RECORDED_W * reading.duration_s, rel=1e-4)
    assert (reading.source, reading.scope, reading.kind) == ("pmic", "board", "measured")
    assert pmic.BEYOND_THE_RAILS in reading.flags
    assert len(reading.parts_j) == 12


def test_a_tool_that_hangs_in_the_window() -> None:
    probe = probe_of(Firmware(RECORDED, ToolError("vcgencmd did not answer within 2 s")))
    reading = probe.begin().end()
    probe.close()
    assert reading.energy_j is None
    assert "vcgencmd did not answer within 2 s" in str(reading.reason)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("vcgencmd is not installed", "vcgencmd is not installed; it comes with Raspberry Pi OS"),
        (
            'vcgencmd ends with status 255: error=1 error_msg="Command not registered"',
            "this Raspberry Pi does not measure its rails; a Raspberry Pi 5 does",
        ),
        ("vcgencmd did not answer within 2 s", "vcgencmd did not answer within 2 s"),
    ],
)
def test_absent(message: str, reason: str) -> None:
    assert pmic.find(fails(message)) == Absent("pmic", reason)


def test_the_group_is_missing() -> None:
    found = pmic.find(fails("vcgencmd ends with status 255: Can't open device file: /dev/vcio"))
    assert isinstance(found, Absent)
    assert found.remedy == "sudo usermod -aG video $USER, then log in again"


def test_a_tool_that_prints_something_else() -> None:
    found = pmic.find(Firmware("temp=46.6'C"))
    assert isinstance(found, Absent)
    assert 'no rail has both a current and a voltage in "temp=46.6\'C"' in found.reason
