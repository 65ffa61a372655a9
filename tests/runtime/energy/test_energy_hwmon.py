"""INA power monitors in fake hwmon trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.powercap import Clock
from pocketlm.energy import hwmon
from pocketlm.energy.hwmon import Rail, total_rails
from pocketlm.energy.reading import Absent, Reading
from pocketlm.energy.sampled import SampledProbe


def add_device(root: Path, number: int, name: str, **files: object) -> Path:
    folder = root / f"sys/class/hwmon/hwmon{number}"
    folder.mkdir(parents=True)
    for file, content in {"name": name, **files}.items():
        (folder / file).write_text(f"{content}\n")
    return folder


def ina3221(root: Path, number: int, rails: dict[str, tuple[int, int]]) -> Path:
    """An INA3221 as mainline Linux shows it: mV and mA of up to three rails, shunt voltages and a sum."""
    files: dict[str, object] = {"in7_label": "sum of shunt voltages", "in7_input": 760, "curr4_input": 9999}
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), start=1):
        files[f"in{channel}_label"] = label
        files[f"in{channel}_input"] = millivolts
        files[f"curr{channel}_input"] = milliamperes
        files[f"in{channel + 3}_input"] = 5
    return add_device(root, number, "ina3221", **files)


def found(root: Path, clock: Clock | None = None) -> SampledProbe:
    probe = hwmon.find(root, clock=clock or Clock())
    assert isinstance(probe, SampledProbe)
    return probe


def measure(root: Path, seconds: float = 1.0) -> Reading:
    clock = Clock()
    probe = found(root, clock)
    window = probe.begin()
    clock.now_s += seconds
    reading = window.end()
    probe.close()
    return reading


def test_a_board_with_an_input_rail(tmp_path: Path) -> None:
    ina3221(tmp_path, 3, {"VDD_IN": (5000, 1200), "VDD_CPU_GPU_CV": (5000, 600), "VDD_SOC": (5000, 300)})
    reading = measure(tmp_path)
    assert reading.energy_j == pytest.approx(6.0)
    assert reading.parts_j == {
        "VDD_IN": pytest.approx(6.0),
        "VDD_CPU_GPU_CV": pytest.approx(3.0),
        "VDD_SOC": pytest.approx(1.5),
    }
    assert (reading.source, reading.scope, reading.kind) == ("hwmon", "board", "measured")
    assert reading.flags == ("the window is 1 s long; hwmon needs 60 s",)


def test_a_board_without_one_is_summed_without_what_lies_behind_another_rail(tmp_path: Path) -> None:
    ina3221(
        tmp_path, 3, {"VDD_GPU_SOC": (12000, 250), "VDD_CPU_CV": (12000, 50), "VIN_SYS_5V0": (5000, 1000)}
    )
    ina3221(tmp_path, 4, {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (5000, 80)})
    reading = measure(tmp_path)
    assert reading.energy_j == pytest.approx(3.0 + 0.6 + 5.0)
    assert reading.parts_j["VDDQ_VDD2_1V8AO"] == pytest.approx(0.4)
    assert "NC" not in reading.parts_j
    assert reading.flags[0] == (
        "no rail is the board's input; the total is the sum of VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0"
    )


@pytest.mark.parametrize(
    ("names", "counted"),
    [
        (["VDD_GPU", "VIN", "VDD_IN"], ["VIN"]),
        (["POM_5V_IN", "POM_5V_GPU"], ["POM_5V_IN"]),
        (["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"], ["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"]),
        (["VDDQ_VDD2_1V8AO", "VDD_CPU_CV"], ["VDDQ_VDD2_1V8AO", "VDD_CPU_CV"]),
    ],
)
def test_the_rails_that_count(names: list[str], counted: list[str]) -> None:
    rails, flags = total_rails(names)
    assert list(rails) == counted
    assert bool(flags) == (len(counted) > 1)


def test_a_chip_with_a_power_file(tmp_path: Path) -> None:
    """Channel 0 of an INA226 is its shunt; power1_input is made from it and more precise than V × I."""
    add_device(
        tmp_path,
        0,
        "ina226",
        in0_input=3,
        in1_input=5000,
        curr1_input=1000,
        power1_input=5_025_000,
        label="VIN",
    )
    reading = measure(tmp_path)
    assert reading.parts_j == {"VIN": pytest.approx(5.025)}


def test_rails_without_labels_get_names_of_their_own(tmp_path: Path) -> None:
    add_device(tmp_path, 2, "ina219", power1_input=1_000_000)
    add_device(tmp_path, 10, "ina219", power1_input=2_000_000)
    add_device(
        tmp_path, 1, "ina3221", label="monitor", in2_input=5000, curr2_input=100, in3_input=0, curr3_input=0
    )
    reading = measure(tmp_path)
    assert reading.parts_j == {
        "ina3221-2": pytest.approx(0.5),
        "ina3221-3": 0.0,
        "ina219": pytest.approx(1.0),
        "ina219 (hwmon10-1)": pytest.approx(2.0),
    }
    assert reading.energy_j == pytest.approx(3.5)


def test_a_negative_current_flows_back(tmp_path: Path) -> None:
    ina3221(tmp_path, 0, {"VDD_IN": (5000, -8)})
    assert measure(tmp_path).energy_j == pytest.approx(-0.04)


@pytest.mark.parametrize(
    "name", ["coretemp", "nvme", "acpitz", "amdgpu", "k10temp", "power_meter", "inactive", ""]
)
def test_other_devices_are_no_rails(name: str, tmp_path: Path) -> None:
    add_device(
        tmp_path, 0, name, power1_average=9_000_000, power1_input=9_000_000, in1_input=800, curr1_input=1
    )
    assert hwmon.find(tmp_path) == Absent("hwmon", "no INA power monitor in /sys/class/hwmon")


def test_no_tree_and_no_name(tmp_path: Path) -> None:
    assert isinstance(hwmon.find(tmp_path), Absent)
    (add_device(tmp_path, 0, "ina219", power1_input=1) / "name").unlink()
    assert isinstance(hwmon.find(tmp_path), Absent)


def test_channels_that_are_off_or_incomplete_are_left_out(tmp_path: Path) -> None:
    folder = ina3221(tmp_path, 0, {"A": (5000, 100), "B": (5000, 100), "C": (5000, 100)})
    (folder / "in1_enable").write_text("0")
    (folder / "curr3_input").unlink()
    assert set(measure(tmp_path).parts_j) == {"B"}


def test_a_channel_that_does_not_answer_is_left_out(tmp_path: Path) -> None:
    folder = ina3221(tmp_path, 0, {"A": (5000, 100), "B": (5000, 100)})
    (folder / "curr1_input").write_text("")
    assert set(measure(tmp_path).parts_j) == {"B"}
    (folder / "curr2_input").unlink()
    (folder / "curr2_input").mkdir()
    none = hwmon.find(tmp_path)
    assert isinstance(none, Absent)
    assert none.reason.startswith("the rails of the INA power monitor cannot be read: ")


def test_a_rail_that_goes_away_during_the_window(tmp_path: Path) -> None:
    clock = Clock()
    folder = ina3221(tmp_path, 0, {"A": (5000, 100)})
    probe = found(tmp_path, clock)
    window = probe.begin()
    (folder / "curr1_input").unlink()
    clock.now_s += 30
    reason = window.end().reason
    probe.close()
    assert reason is not None
    assert reason.startswith(
        "no sample for 30 s, and at most 1 s can be bridged (last failure: FileNotFoundError"
    )


def test_a_rail_of_no_files() -> None:
    with pytest.raises(ValueError, match="rail A has neither a power nor a voltage and a current file"):
        Rail("A", None).read_w()
