"""Batteries: fake /sys trees of Linux and Android, and what macOS' ioreg printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pocketlm.energy import battery
from pocketlm.energy.battery import parse_ioreg
from pocketlm.energy.reading import Absent, Reading
from pocketlm.energy.sampled import SampledProbe, WindowSpoiledError
from pocketlm.energy.tool import ToolError

# After a MacBook on battery: the sign is lost in an unsigned number, and braces hold other voltages.
IOREG = """\
+-o AppleSmartBattery  <class AppleSmartBattery, id 0x100000260, registered, matched, active>
    {
      "ExternalConnected" = No
      "TimeRemaining" = 271
      "CellVoltage" = (3994,4003,3978,0)
      "Voltage" = 11974
      "CurrentCapacity" = 4761
      "LegacyBatteryInfo" = {"Amperage"=18446744073709550563,"Flags"=4,"Voltage"=99999,"Cycle Count"=155}
      "InstantAmperage" = 18446744073709550616
      "Amperage" = 18446744073709550563
      "IsCharging" = No
      "DeviceName" = "bq20z451"
    }
"""


class Supplies:
    """/sys/class/power_supply below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "sys/class/power_supply"

    def set(self, name: str, **files: str | int) -> None:
        """Writes files of a supply; the folder is made if it is new."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_text(f"{content}\n")

    def find(self) -> SampledProbe | Absent:
        return battery.find(self.root, "linux")

    def probe(self) -> SampledProbe:
        found = self.find()
        assert isinstance(found, SampledProbe)
        return found

    def absent(self) -> Absent:
        found = self.find()
        assert isinstance(found, Absent)
        return found

    def read(self) -> Reading:
        """A window of no length to speak of."""
        probe = self.probe()
        reading = probe.begin().end()
        probe.close()
        return reading


@pytest.fixture
def supplies(tmp_path: Path) -> Supplies:
    return Supplies(tmp_path)


@pytest.fixture
def laptop(supplies: Supplies) -> Supplies:
    """On battery, at 7.5 W."""
    supplies.set("AC", type="Mains", online=0)
    supplies.set(
        "BAT0", type="Battery", status="Discharging", present=1, power_now=7_500_000, energy_now=41_000_000
    )
    return supplies


def watts(reading: Reading) -> float:
    assert reading.energy_j is not None, reading.reason
    assert reading.duration_s > 0
    return reading.energy_j / reading.duration_s


class TestSysfs:
    def test_power_now(self, laptop: Supplies) -> None:
        reading = laptop.read()
        assert watts(reading) == pytest.approx(7.5)
        assert (reading.source, reading.scope, reading.kind) == ("battery", "device", "measured")

    def test_windows_of_a_minute(self, laptop: Supplies) -> None:
        assert laptop.probe().least_window_s == 60

    @pytest.mark.parametrize("sign", [1, -1])
    def test_current_times_voltage(self, supplies: Supplies, sign: int) -> None:
        supplies.set(
            "battery", type="Battery", status="Discharging", current_now=sign * 412_000, voltage_now=3_850_000
        )
        assert watts(supplies.read()) == pytest.approx(0.412 * 3.85)

    def test_a_negative_power(self, laptop: Supplies) -> None:
        laptop.set("BAT0", power_now=-6_000_000)
        assert watts(laptop.read()) == pytest.approx(6)

    def test_a_power_of_zero_is_not_believed(self, laptop: Supplies) -> None:
        laptop.set("BAT0", power_now=0, current_now=500_000, voltage_now=12_000_000)
        assert watts(laptop.read()) == pytest.approx(6)

    def test_of_two_batteries_one_rests(self, laptop: Supplies) -> None:
        laptop.set("BAT1", type="Battery", status="Not charging", power_now=0)
        reading = laptop.read()
        assert watts(reading) == pytest.approx(7.5)
        assert reading.parts_j["BAT1"] == 0

    def test_two_batteries_add_up(self, laptop: Supplies) -> None:
        laptop.set("BAT1", type="Battery", status="Discharging", power_now=500_000)
        assert watts(laptop.read()) == pytest.approx(8)

    def test_peripherals_and_empty_bays_do_not_count(self, laptop: Supplies) -> None:
        laptop.set(
            "hidpp_battery_0", type="Battery", scope="Device", status="Discharging", power_now=9_000_000
        )
        laptop.set("BAT1", type="Battery", present=0, status="Unknown")
        laptop.set("wacom_ac", type="Mains", scope="Device", online=1)
        reading = laptop.read()
        assert list(reading.parts_j) == ["BAT0"]
        assert watts(reading) == pytest.approx(7.5)

    def test_androids_gauge_is_the_same_battery(self, supplies: Supplies) -> None:
        for name in ("battery", "maxfg"):
            supplies.set(
                name, type="Battery", status="Discharging", current_now=-300_000, voltage_now=4_000_000
            )
        supplies.set("usb", type="USB_PD", online=0)
        assert watts(supplies.read()) == pytest.approx(1.2)

    def test_an_android_of_todays_python(self, laptop: Supplies) -> None:
        assert isinstance(battery.find(laptop.root, "android"), SampledProbe)

    @pytest.mark.parametrize("online", [1, 2])
    @pytest.mark.parametrize(
        ("name", "kind"), [("AC", "Mains"), ("ucsi-1", "USB"), ("dock", "USB_PD"), ("qi", "Wireless")]
    )
    def test_the_charger_comes_in_the_middle(
        self, laptop: Supplies, name: str, kind: str, online: int
    ) -> None:
        probe = laptop.probe()
        window = probe.begin()
        laptop.set(name, type=kind, online=online)
        probe.sample_now()
        laptop.set(name, online=0)  # it goes again, but the window has seen it
        probe.sample_now()
        reading = window.end()
        probe.close()
        assert (reading.energy_j, reading.reason) == (None, f"a charger is plugged in ({name})")

    def test_charging_begins_in_the_middle(self, laptop: Supplies) -> None:
        probe = laptop.probe()
        window = probe.begin()
        laptop.set("BAT0", status="Charging")
        reading = window.end()
        probe.close()
        assert reading.reason == "the device does not run on battery (BAT0: Charging)"

    def test_the_battery_is_pulled_out_in_the_middle(self, laptop: Supplies) -> None:
        probe = laptop.probe()
        (laptop.folder / "BAT0" / "status").unlink()
        reading = probe.begin().end()
        probe.close()
        assert reading.energy_j is None
        assert "FileNotFoundError" in str(reading.reason)

    def test_a_later_window_is_free_of_what_spoiled_one(self, laptop: Supplies) -> None:
        probe = laptop.probe()
        laptop.set("AC", online=1)
        assert probe.begin().end().energy_j is None
        laptop.set("AC", online=0)
        assert watts(probe.begin().end()) == pytest.approx(7.5)
        probe.close()


class TestSysfsAbsent:
    @pytest.mark.parametrize("folder", [False, True])
    def test_no_battery(self, supplies: Supplies, folder: bool) -> None:
        if folder:
            supplies.set("AC", type="Mains", online=1)
        assert supplies.absent() == Absent("battery", "there is no battery here")

    def test_on_mains(self, laptop: Supplies) -> None:
        laptop.set("AC", online=1)
        assert laptop.absent() == Absent(
            "battery", "a charger is plugged in (AC)", "unplug the charger and measure on battery"
        )

    @pytest.mark.parametrize("status", ["Full", "Not charging", "Charging"])
    def test_a_status_of_mains(self, laptop: Supplies, status: str) -> None:
        laptop.set("BAT0", status=status)
        assert laptop.absent().reason == f"the device does not run on battery (BAT0: {status})"

    def test_an_unknown_status(self, laptop: Supplies) -> None:
        laptop.set("BAT0", status="Unknown")
        assert laptop.absent() == Absent("battery", "the battery does not say whether it discharges")

    def test_unreadable_files(self, laptop: Supplies) -> None:
        (laptop.folder / "BAT0" / "status").unlink()
        (laptop.folder / "BAT0" / "status").mkdir()  # a folder refuses to be read even to root
        assert "status" in laptop.absent().reason

    def test_neither_power_nor_current(self, laptop: Supplies) -> None:
        (laptop.folder / "BAT0" / "power_now").unlink()
        laptop.set("BAT0", voltage_now=12_000_000)
        assert laptop.absent().reason == "BAT0 gives neither power_now nor current_now with voltage_now"

    def test_garbage(self, laptop: Supplies) -> None:
        laptop.set("BAT0", power_now="7.5 W")
        assert "power_now holds '7.5 W'; a whole number is expected" in laptop.absent().reason

    @pytest.mark.parametrize("current", [412, 412_000_000_000])
    def test_a_current_in_another_unit(self, supplies: Supplies, current: int) -> None:
        supplies.set(
            "battery", type="Battery", status="Discharging", current_now=current, voltage_now=3_850_000
        )
        assert "some vendors do not count in µA" in supplies.absent().reason

    def test_another_platform(self, laptop: Supplies) -> None:
        found = battery.find(laptop.root, "win32")
        assert found == Absent("battery", "pocketlm cannot read a battery on win32")


class TestMac:
    def test_recorded(self) -> None:
        assert parse_ioreg(IOREG) == pytest.approx({"battery": 1.000 * 11.974})

    def test_a_current_with_its_sign(self) -> None:
        text = '"ExternalConnected" = No\n"InstantAmperage" = -1500\n"Voltage" = 12000\n'
        assert parse_ioreg(text) == pytest.approx({"battery": 18.0})

    @pytest.mark.parametrize("replaced", ['"InstantAmperage" = 0', '"Other" = 0'])
    def test_the_average_where_there_is_no_instant(self, replaced: str) -> None:
        text = IOREG.replace('"InstantAmperage" = 18446744073709550616', replaced)
        assert parse_ioreg(text) == pytest.approx({"battery": 1.053 * 11.974})

    def test_within_the_tree(self) -> None:
        text = (
            '  | |   "ExternalConnected" = No\n  | |   "InstantAmperage" = -1000\n  | |   "Voltage" = 12000\n'
        )
        assert parse_ioreg(text) == pytest.approx({"battery": 12.0})

    def test_plugged_in(self) -> None:
        with pytest.raises(WindowSpoiledError, match="a charger is plugged in"):
            parse_ioreg(IOREG.replace('"ExternalConnected" = No', '"ExternalConnected" = Yes'))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "there is no battery here"),
            ("garbage \x00\xff", "there is no battery here"),
            (IOREG.replace('"Voltage" =', '"Volts" ='), "no InstantAmperage or no Voltage"),
            (IOREG.replace("Amperage", "Amps"), "no InstantAmperage or no Voltage"),
            (IOREG.replace("= 11974", "= twelve"), "Voltage = 'twelve'; a whole number"),
            (IOREG.replace("= 18446744073709550616", "= 800"), "charged with 800 mA although no charger"),
            (IOREG.replace("= 11974", "= 2"), "a running device uses between"),
            (IOREG[: IOREG.index('"InstantAmperage"')], "no InstantAmperage or no Voltage"),
        ],
    )
    def test_damage(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_ioreg(text)

    def test_find(self) -> None:
        def run(command: Sequence[str]) -> str:
            assert list(command) == ["ioreg", "-rw0", "-c", "AppleSmartBattery"]
            return IOREG

        found = battery.find(platform="darwin", run=run)
        assert isinstance(found, SampledProbe)
        assert found.least_window_s == 300
        reading = found.begin().end()
        found.close()
        assert watts(reading) == pytest.approx(11.974)

    def test_the_charger_comes_in_the_middle(self) -> None:
        texts = [IOREG, IOREG, IOREG.replace('"ExternalConnected" = No', '"ExternalConnected" = Yes')]
        found = battery.find(platform="darwin", run=lambda command: texts.pop(0))
        assert isinstance(found, SampledProbe)
        window = found.begin()
        found.sample_now()
        reading = window.end()
        found.close()
        assert (reading.energy_j, reading.reason) == (None, "a charger is plugged in")

    def test_a_tool_that_fails(self) -> None:
        def run(command: Sequence[str]) -> str:
            raise ToolError("ioreg did not answer within 2 s")

        found = battery.find(platform="darwin", run=run)
        assert found == Absent("battery", "ioreg did not answer within 2 s")
