"""Which probe a machine gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pocketlm.energy
from helpers.powercap import add_cpuinfo, add_zone
from pocketlm.energy import Absent, Found, MeterLogError, Probe, SampledProbe, find_probe
from pocketlm.errors import InvalidSettingError

RUNTIME = Path(pocketlm.energy.__file__).parents[2]


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POCKETLM_TDP_W", raising=False)


@pytest.fixture(autouse=True)
def no_devices_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks beyond `root` finds nothing, on whichever machine the tests run."""
    for name in ("emi", "apple", "pmic", "nvml"):
        answer(monkeypatch, name, Absent(name, "not here"))


def answer(monkeypatch: pytest.MonkeyPatch, name: str, probe: Probe | Absent) -> None:
    monkeypatch.setattr(f"pocketlm.energy.{name}.find", lambda *args, **kwargs: probe)


def fake(source: str) -> SampledProbe:
    return SampledProbe(source, "board", "measured", lambda: {"rail": 1.0}, 3600.0)


def sources(found: Found) -> list[str]:
    return [probe.source for probe in (found.probe, *found.others)]


def add_ina(root: Path) -> None:
    folder = root / "sys/class/hwmon/hwmon0"
    folder.mkdir(parents=True)
    for file, content in {"name": "ina219", "power1_input": "5000000"}.items():
        (folder / file).write_text(content)


def add_battery(root: Path, status: str) -> None:
    folder = root / "sys/class/power_supply/BAT0"
    folder.mkdir(parents=True)
    for file, content in {
        "type": "Battery",
        "status": status,
        "power_now": "9000000",
        "present": "1",
    }.items():
        (folder / file).write_text(content)


def test_a_machine_without_sensors_gets_the_estimate(tmp_path: Path) -> None:
    found = find_probe(root=tmp_path, platform="linux")
    assert sources(found) == ["cpu-time"]
    assert [absent.source for absent in found.absent] == ["hwmon", "rapl", "battery", "pmic", "nvml"]


def test_all_of_linux_in_the_order_of_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.csv"
    log.write_text("")
    add_ina(tmp_path)
    add_zone(tmp_path, "intel-rapl:0", "package-0")
    add_battery(tmp_path, "Discharging")
    answer(monkeypatch, "pmic", fake("pmic"))
    answer(monkeypatch, "nvml", fake("nvml"))
    found = find_probe(meter=log, root=tmp_path, platform="linux")
    assert sources(found) == ["meter", "hwmon", "rapl", "battery", "pmic", "cpu-time", "nvml"]
    assert found.absent == ()
    found = find_probe(root=tmp_path, platform="linux")
    assert found.probe.source == "hwmon"


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging"])
def test_a_battery_counts_only_unplugged(status: str, tmp_path: Path) -> None:
    add_battery(tmp_path, status)
    found = find_probe(root=tmp_path, platform="linux")
    assert sources(found) == ["cpu-time"]
    assert "battery" in {absent.source for absent in found.absent}


def test_a_graphics_card_is_never_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "nvml", fake("nvml"))
    assert sources(find_probe(root=tmp_path, platform="linux")) == ["cpu-time", "nvml"]


@pytest.mark.parametrize(
    ("platform", "first", "asked"),
    [
        ("win32", "emi", ["emi", "nvml"]),
        ("darwin", "apple", ["apple", "battery"]),
        ("freebsd14", "cpu-time", []),
        ("android", "cpu-time", ["hwmon", "rapl", "battery", "pmic"]),
    ],
)
def test_a_platform_is_asked_for_its_own_sources(
    platform: str, first: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, "battery", Absent("battery", "there is no battery here"))
    found = find_probe(root=tmp_path, platform=platform)
    assert sources(found) == ["cpu-time"]
    assert [absent.source for absent in found.absent] == asked
    if first != "cpu-time":
        answer(monkeypatch, first, fake(first))
        assert find_probe(root=tmp_path, platform=platform).probe.source == first


def test_the_estimate_is_of_the_process_that_the_caller_means(tmp_path: Path) -> None:
    used = iter([1.0, 3.0])
    found = find_probe(cpu_seconds=lambda: next(used), root=tmp_path, platform="linux")
    assert found.probe.begin().end().energy_j == pytest.approx(2.0 * 5)


def test_counters_in_a_virtual_machine_are_estimates(tmp_path: Path) -> None:
    add_cpuinfo(tmp_path, flags="hypervisor")
    add_zone(tmp_path, "intel-rapl:0", "package-0")
    probe = find_probe(root=tmp_path, platform="linux").probe
    assert (probe.source, probe.kind) == ("rapl", "estimated")


def test_a_meter_that_cannot_be_read_is_an_error_and_no_replacement(tmp_path: Path) -> None:
    with pytest.raises(MeterLogError, match="cannot be read"):
        find_probe(meter=tmp_path / "none.csv", root=tmp_path, platform="linux")


def test_a_wrong_tdp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLM_TDP_W", "-1")
    with pytest.raises(InvalidSettingError, match="POCKETLM_TDP_W is '-1'"):
        find_probe(root=tmp_path, platform="linux")


def modules_after(statement: str) -> set[str]:
    """Modules of this package that a new interpreter has loaded after `statement`."""
    script = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(RUNTIME), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_an_import_loads_no_platform_and_nothing_heavy() -> None:
    loaded = modules_after("import pocketlm.energy")
    probes = {"hwmon", "rapl", "emi", "apple", "battery", "pmic", "nvml"}
    assert not {f"pocketlm.energy.{name}" for name in probes} & loaded
    assert not {"numpy", "onnxruntime", "pynvml", "subprocess"} & loaded


def test_no_platform_loads_another_ones_modules(tmp_path: Path) -> None:
    loaded = modules_after(
        "from pathlib import Path; from pocketlm.energy import find_probe\n"
        f"find_probe(root=Path({str(tmp_path)!r}), platform='linux')"
    )
    assert "pocketlm.energy.rapl" in loaded
    assert not {"pocketlm.energy.emi", "pocketlm.energy.apple"} & loaded


@pytest.mark.parametrize("name", pocketlm.energy.__all__)
def test_public_names(name: str) -> None:
    assert hasattr(pocketlm.energy, name)


def test_the_public_names_are_these() -> None:
    assert pocketlm.energy.__all__ == [
        "Absent",
        "CpuEstimate",
        "CpuSeconds",
        "Found",
        "Kind",
        "MeterLog",
        "MeterLogError",
        "Probe",
        "Reading",
        "SampledProbe",
        "Scope",
        "SharedMeter",
        "SharedWindow",
        "Window",
        "WindowSpoiledError",
        "energy_between",
        "find_probe",
        "process_cpu_seconds",
        "share_of",
        "virtual_machine",
    ]
