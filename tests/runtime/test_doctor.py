"""What the doctor finds of devices and energy, and all its checks together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.doctor import cached_bundle, empty_home
from helpers.tiny_bundle import write_tiny_bundle
from helpers.tunings import a_tuning
from pocketlm.bundle import open_bundle
from pocketlm.device import Machine, Memory
from pocketlm.doctor import energy, examine, hardware, installation, self_test
from pocketlm.doctor.check import Check, Report
from pocketlm.energy import Absent, CpuEstimate, Found
from pocketlm.errors import BundleError, InvalidSettingError, ModelNotFoundError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


def by_name(checks: Iterator[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def machine(architecture: str = "x86_64", *features: str, virtual: str | None = None) -> Machine:
    return Machine("Test Processor", architecture, features, "A System 1.0", None, virtual)


@pytest.mark.parametrize(
    ("found", "system", "state", "text"),
    [
        (
            machine("x86_64", "avx2", "avx512f", "avx512_vnni", "amx_int8"),
            "linux",
            "ok",
            "long prompts above all",
        ),
        (machine("x86_64", "avx2", "avx_vnni"), "linux", "ok", "AVX2, VNNI: int8 models run at full speed"),
        (machine("x86_64", "avx2"), "linux", "ok", "AVX2: without VNNI, int8 products take several"),
        (machine("x86_64", "avx2", "avx512f"), "win32", "ok", "Windows does not tell"),
        (machine("x86_64", "avx"), "linux", "note", "without AVX2 all products are slow"),
        (
            machine("arm64", "asimd", "asimddp", "i8mm"),
            "linux",
            "ok",
            "NEON, dotprod, i8mm: int8 models run at full",
        ),
        (machine("arm64", "asimd", "asimddp"), "darwin", "ok", "int8 models run well"),
        (machine("arm64", "asimd"), "linux", "note", "without dotprod, int8 models are slow"),
        (machine("riscv64"), "linux", "note", "what this processor can do is not known"),
    ],
)
def test_what_instruction_sets_mean(found: Machine, system: str, state: str, text: str) -> None:
    what, meaning = hardware.meaning(found, system)
    assert what == state
    assert text in meaning


@pytest.mark.parametrize(
    ("virtual", "told"),
    [
        (None, "x86_64)"),
        ("unknown", "x86_64, a virtual machine)"),
        ("KVM", "x86_64, a virtual machine (KVM))"),
    ],
)
def test_the_processor(virtual: str | None, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "describe_machine", lambda: machine("x86_64", "avx2", virtual=virtual))
    found = by_name(hardware.processor())
    assert found["system"].text == "A System 1.0"
    assert found["processor"].text == f"Test Processor ({told}"
    assert found["processor"].facts["virtual_machine"] == virtual
    assert found["features"].facts == {"features": ["avx2"]}


class TestThreads:
    @pytest.fixture(autouse=True)
    def cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "hardware_threads", lambda: 8)
        monkeypatch.setattr(hardware, "physical_cores", lambda: 4)
        monkeypatch.setattr("pocketlm.power.physical_cores", lambda: 4)
        monkeypatch.setattr(hardware, "find_tuning", lambda manifest: None)

    def test_the_cores(self) -> None:
        (check,) = hardware.threads(None)
        assert (check.state, check.remedy) == ("ok", None)
        assert check.text == "4, one for each physical core that this process may use"
        assert check.facts == {
            "threads": 4,
            "eco_threads": 2,
            "physical_cores": 4,
            "hardware_threads": 8,
            "tuned_for": None,
            "variable": None,
        }

    def test_a_model_that_could_be_tuned(self, home: Path, tmp_path: Path) -> None:
        (check,) = hardware.threads(cached_bundle(home))
        assert check.remedy == "pocketlm tune tiny-int8 measures whether another number is faster."
        write_tiny_bundle(tmp_path / "my models")
        (check,) = hardware.threads(open_bundle(tmp_path / "my models", verify=False))
        assert check.remedy is not None
        assert check.remedy.startswith(f"pocketlm tune '{tmp_path / 'my models'}' measures")

    def test_a_tuned_model(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "find_tuning", lambda manifest: a_tuning())
        (check,) = hardware.threads(cached_bundle(home))
        assert check.text == f"{a_tuning().threads}, as pocketlm tune found for tiny"
        assert (check.remedy, check.facts["tuned_for"]) == (None, "tiny")

    @pytest.mark.parametrize(("wanted", "state"), [("3", "ok"), ("9", "note")])
    def test_the_variable(self, wanted: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POCKETLM_THREADS", wanted)
        (check,) = hardware.threads(None)
        assert (check.state, check.text) == (state, f"{wanted}, POCKETLM_THREADS says so")
        assert (check.remedy is not None) == (state == "note")

    def test_a_wrong_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POCKETLM_THREADS", "many")
        with pytest.raises(InvalidSettingError, match="POCKETLM_THREADS is 'many'"):
            list(hardware.threads(None))


@pytest.mark.parametrize(
    ("memory", "state", "text"),
    [
        (Memory(16_000_000_000, 8_000_000_000), "ok", "16.0 GB, of which 8.0 GB are free"),
        (Memory(2_000_000_000, 500_000_000), "note", "2.0 GB, of which 500.0 MB are free"),
        (Memory(16_000_000_000, None), "absent", "this system does not tell"),
    ],
)
def test_memory(memory: Memory, state: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory", lambda: memory)
    (check,) = hardware.free_memory()
    assert (check.state, check.text, check.remedy is not None) == (state, text, state == "note")
    assert check.facts == vars(memory)


@pytest.mark.parametrize(("threads", "who"), [("1", "1 thread"), ("3", "3 threads")])
def test_bandwidth(threads: str, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLM_THREADS", threads)
    monkeypatch.setattr(hardware, "read_rate", lambda count: 12.34e9)
    calls: list[tuple[int, int]] = []
    (check,) = hardware.bandwidth(lambda task, done, total, unit: calls.append((done, total)))
    assert check.text.startswith(f"12.3 GB/s read by {who}: a model of 1 GB decodes 12 tokens/s at most")
    assert check.facts == {"read_bytes_per_s": 12.34e9, "threads": int(threads)}
    assert calls == [(0, 1), (1, 1)]


# Energy


class Probe:
    resolution_j = None
    least_window_s = 10.0

    def __init__(self, source: str, kind: str, scope: str) -> None:
        self.source, self.kind, self.scope, self.closed = source, kind, scope, False

    def close(self) -> None:
        self.closed = True


def found(*probes: Any, absent: tuple[Absent, ...] = ()) -> Found:
    return Found(probes[0], probes[1:], absent)


def test_a_sensor_and_what_else_there_is() -> None:
    first, second = Probe("rapl", "measured", "package"), Probe("cpu-time", "estimated", "process")
    source, other = energy.describe(found(first, second))
    assert (source.name, source.state) == ("source", "ok")
    assert source.text == "rapl: measured, covers the processor package"
    assert source.facts["scope"] == "package"
    assert (other.name, other.state) == ("cpu-time", "ok")
    assert other.text.endswith("less trusted, not used")


def test_an_estimate_where_somebody_could_open_a_sensor() -> None:
    probe = CpuEstimate(lambda: 0.0)
    absent = (
        Absent("hwmon", "no chip"),
        Absent("rapl", "root only", "Open it."),
        Absent("nvml", "no", "pip"),
    )
    source, hwmon, rapl, nvml = energy.describe(found(probe, absent=absent))
    assert (source.state, source.text.endswith("Each figure comes with an interval")) == ("note", True)
    assert (hwmon.state, hwmon.text, hwmon.remedy) == ("absent", "no chip", None)
    assert (rapl.state, rapl.text, rapl.remedy) == ("note", "root only", "Open it.")
    assert (nvml.state, nvml.remedy) == ("absent", "pip")


def test_an_estimate_where_nothing_measures() -> None:
    source, *_ = energy.describe(found(CpuEstimate(lambda: 0.0), absent=(Absent("nvml", "no", "pip"),)))
    assert source.state == "ok"


def test_probes_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = [Probe("rapl", "measured", "package"), Probe("battery", "measured", "device")]
    monkeypatch.setattr(energy, "find_probe", lambda: found(*probes))
    assert len(list(energy.sources())) == 2
    assert all(probe.closed for probe in probes)


def test_the_model_by_name_by_folder_or_the_smallest(home: Path, tmp_path: Path) -> None:
    cached_bundle(home, "large", size=1000)
    small = cached_bundle(home, "small")
    elsewhere = tmp_path / "elsewhere"
    write_tiny_bundle(elsewhere, name="guest")
    for name, expected in (
        (None, "small"),
        ("large", "large"),
        ("large-int8", "large"),
        (str(elsewhere), "guest"),
    ):
        found = examine.find_local(name)
        assert found is not None
        assert found.manifest.name == expected
    (elsewhere / "model.onnx").unlink()
    with pytest.raises(BundleError, match="is missing"):
        examine.find_local(str(elsewhere))
    assert small.manifest.name == "small"


def test_a_model_that_is_not_here(home: Path) -> None:
    assert examine.find_local(None) is None
    cached_bundle(home, "smollm")
    with pytest.raises(ModelNotFoundError, match=r"Did you mean smollm\? Fetch it with: pocketlm pull smolm"):
        examine.find_local("smolm")


def test_all_checks_of_this_machine() -> None:
    report = examine.examine(measure_bandwidth=False, test_network=False)
    assert [check.name for check in report.checks if check.group == "Device"] == [
        *("system", "processor", "features", "threads", "memory"),
    ]
    groups = list(dict.fromkeys(check.group for check in report.checks))
    assert groups == ["Device", "Energy", "Installation", "Cache", "Privacy"]
    assert not any("could not be looked at" in check.text for check in report.checks)
    json.dumps([check.facts for check in report.checks], default=None)


def test_measurements_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "bandwidth", lambda progress: [Check("bandwidth", "ok", "fast")])
    monkeypatch.setattr(self_test, "without_network", lambda *given: [Check("self-test", "ok", "quiet")])
    names = {check.name: check.group for check in examine.examine().checks}
    assert (names["bandwidth"], names["self-test"]) == ("Device", "Privacy")


def test_what_fails_does_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Check]:
        raise RuntimeError("no such luck")

    monkeypatch.setenv("POCKETLM_THREADS", "many")
    monkeypatch.setattr(installation, "extras", broken)
    report = examine.examine(measure_bandwidth=False, test_network=False)
    problems = {check.name: check.text for check in report.checks if check.state == "problem"}
    assert problems == {
        "threads": "POCKETLM_THREADS is 'many'; a whole number of threads is expected.",
        "extras": "could not be looked at: RuntimeError: no such luck",
    }
    assert report.state == "problem"
    assert report.count("problem") == 2


def test_the_worst_counts() -> None:
    assert Report(()).state == Report((Check("a", "absent", ""),)).state == "ok"
    assert Report((Check("a", "absent", ""), Check("b", "note", ""), Check("c", "ok", ""))).state == "note"
