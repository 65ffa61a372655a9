"""RAPL counters in fake powercap trees."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.powercap import RANGE_UJ, Clock, add_cpuinfo, add_zone
from pocketlm.energy import rapl
from pocketlm.energy.rapl import CounterError, RaplProbe, spent_uj
from pocketlm.energy.reading import Absent, Reading


def found(root: Path, clock: Clock) -> RaplProbe:
    probe = rapl.find(root, clock=clock)
    assert isinstance(probe, RaplProbe)
    return probe


def absent(root: Path) -> Absent:
    probe = rapl.find(root)
    assert isinstance(probe, Absent)
    assert probe.source == "rapl"
    return probe


def measure(probe: RaplProbe, clock: Clock, counters: dict[Path, int], seconds: float = 10.0) -> Reading:
    """A window in which the counters move to these values."""
    window = probe.begin()
    for path, energy_uj in counters.items():
        path.write_text(f"{energy_uj}\n")
    clock.now_s += seconds
    return window.end()


def deny(monkeypatch: pytest.MonkeyPatch, denied: Path) -> None:
    """Makes one file unreadable, also to root, who runs tests in containers."""
    read_text = Path.read_text

    def guarded(self: Path, *args: object, **kwargs: object) -> str:
        if self == denied:
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", guarded)


def test_the_packages_are_summed_and_their_domains_are_parts(tmp_path: Path) -> None:
    clock = Clock()
    packages = [add_zone(tmp_path, f"intel-rapl:{n}", f"package-{n}", 1_000_000) for n in (0, 1)]
    core = add_zone(tmp_path, "intel-rapl:0:0", "core", 500_000)
    uncore = add_zone(tmp_path, "intel-rapl:0:1", "uncore", 0)
    probe = found(tmp_path, clock)
    reading = measure(
        probe, clock, {packages[0]: 31_000_000, packages[1]: 11_500_000, core: 20_500_000, uncore: 1_000_000}
    )
    assert reading.energy_j == pytest.approx(30 + 10.5)
    assert reading.parts_j == {
        "package-0": pytest.approx(30),
        "package-0/core": pytest.approx(20),
        "package-0/uncore": pytest.approx(1),
        "package-1": pytest.approx(10.5),
    }
    assert (reading.source, reading.scope, reading.kind) == ("rapl", "package", "measured")
    assert (reading.duration_s, reading.low_j, reading.high_j, reading.flags) == (10, None, None, ())
    assert reading.power_w == pytest.approx(4.05)
    probe.close()


def test_memory_and_the_platform_are_never_added(tmp_path: Path) -> None:
    clock = Clock()
    package = add_zone(tmp_path, "intel-rapl:0", "package-0")
    dram = add_zone(tmp_path, "intel-rapl:0:0", "dram")
    psys = add_zone(tmp_path, "intel-rapl:1", "psys")
    reading = measure(found(tmp_path, clock), clock, {package: 10_000_000, dram: 2_000_000, psys: 25_000_000})
    assert reading.energy_j == pytest.approx(10)
    assert reading.parts_j == {
        "package-0": pytest.approx(10),
        "package-0/dram": pytest.approx(2),
        "psys": pytest.approx(25),
    }
    assert reading.flags == ("memory (dram) is not in the total",)


@pytest.mark.parametrize("twin", ["intel-rapl-mmio:0", "intel-rapl:7"])
def test_a_twin_of_a_package_counts_once(twin: str, tmp_path: Path) -> None:
    clock = Clock()
    package = add_zone(tmp_path, "intel-rapl:0", "package-0")
    again = add_zone(tmp_path, twin, "package-0")
    reading = measure(found(tmp_path, clock), clock, {package: 10_000_000, again: 99_000_000})
    assert reading.energy_j == pytest.approx(10)
    assert set(reading.parts_j) == {"package-0"}


def test_ten_packages_of_two_dies(tmp_path: Path) -> None:
    clock = Clock()
    counters = [
        add_zone(tmp_path, f"intel-rapl:{2 * package + die}", f"package-{package}-die-{die}")
        for package in range(10)
        for die in (0, 1)
    ]
    reading = measure(found(tmp_path, clock), clock, dict.fromkeys(counters, 1_000_000))
    assert reading.energy_j == pytest.approx(20)


def test_amd_has_packages_and_its_core_domain_is_left_out(tmp_path: Path) -> None:
    clock = Clock()
    add_cpuinfo(tmp_path, vendor="AuthenticAMD")
    package = add_zone(tmp_path, "intel-rapl:0", "package-0", range_uj=65_532_610_987)
    core = add_zone(tmp_path, "intel-rapl:0:0", "core", range_uj=65_532_610_987)
    reading = measure(found(tmp_path, clock), clock, {package: 5_000_000, core: 9_000_000})
    assert reading.energy_j == pytest.approx(5)
    assert set(reading.parts_j) == {"package-0"}


def test_a_counter_that_wraps(tmp_path: Path) -> None:
    clock = Clock()
    package = add_zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 1_000_000)
    reading = measure(found(tmp_path, clock), clock, {package: 2_000_000 - 1})
    assert reading.energy_j == pytest.approx(3.0)
    assert reading.flags == ()


def test_a_window_in_which_a_counter_may_have_wrapped_twice(tmp_path: Path) -> None:
    clock = Clock()
    package = add_zone(tmp_path, "intel-rapl:0", "package-0")
    longest_s = RANGE_UJ / 1e6 / 300  # at 300 W
    reading = measure(found(tmp_path, clock), clock, {package: 1_000_000}, longest_s - 1)
    assert reading.flags == ()
    reading = measure(found(tmp_path, clock), clock, {package: 2_000_000}, longest_s + 1)
    assert reading.flags == ("a counter may have wrapped more than once in so long a window",)
    assert reading.energy_j == pytest.approx(1)


@pytest.mark.parametrize("text", [None, "nonsense", "0"])
def test_a_range_that_is_missing(text: str | None, tmp_path: Path) -> None:
    clock = Clock()
    package = add_zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000, range_uj=None)
    if text is not None:
        (package.parent / "max_energy_range_uj").write_text(text)
    probe = found(tmp_path, clock)
    assert measure(probe, clock, {package: 8_000_000}).energy_j == pytest.approx(3)
    reading = measure(probe, clock, {package: 1_000_000})
    assert reading.energy_j is None
    assert reading.reason == (
        "the counter of package-0 fell from 8000000 to 1000000 µJ, and max_energy_range_uj is missing"
    )


@settings(deadline=None)
@given(range_uj=st.integers(1, 2**63), data=st.data())
def test_the_law_of_the_wrap(range_uj: int, data: st.DataObject) -> None:
    before = data.draw(st.integers(0, range_uj))
    spent = data.draw(st.integers(0, range_uj))
    assert spent_uj(before, (before + spent) % (range_uj + 1), range_uj) == spent


@settings(deadline=None)
@given(before=st.integers(0, 2**63), spent=st.integers(0, 2**63))
def test_a_counter_without_a_range_only_rises(before: int, spent: int) -> None:
    assert spent_uj(before, before + spent, None) == spent
    with pytest.raises(CounterError, match="fell from"):
        spent_uj(before + spent + 1, before, None)


@pytest.mark.parametrize(("before", "after"), [(11, 3), (3, 11), (-1, 3)])
def test_a_counter_outside_of_its_range(before: int, after: int) -> None:
    with pytest.raises(CounterError, match=f"went from {before} to {after} µJ, outside of 0 to 10"):
        spent_uj(before, after, 10)


@pytest.mark.parametrize("garbage", [None, "", "not a number"])
def test_a_package_that_goes_away_during_the_window(garbage: str | None, tmp_path: Path) -> None:
    clock = Clock()
    add_zone(tmp_path, "intel-rapl:0", "package-0")
    gone = add_zone(tmp_path, "intel-rapl:1", "package-1")
    window = found(tmp_path, clock).begin()
    clock.now_s += 10
    gone.unlink()
    if garbage is not None:
        gone.write_text(garbage)
    reading = window.end()
    assert reading.energy_j is None
    assert reading.reason is not None
    assert reading.reason.startswith("the counter of package-1 cannot be read: ")
    assert reading.duration_s == 10
    assert reading.parts_j == {}


def test_a_package_that_is_away_when_the_window_begins(tmp_path: Path) -> None:
    clock = Clock()
    package = add_zone(tmp_path, "intel-rapl:0", "package-0")
    probe = found(tmp_path, clock)
    package.unlink()
    window = probe.begin()
    package.write_text("5")
    reason = window.end().reason
    assert reason is not None
    assert reason.startswith("the counter of package-0 cannot be read: ")


def test_a_part_that_goes_away_is_left_out(tmp_path: Path) -> None:
    clock = Clock()
    package = add_zone(tmp_path, "intel-rapl:0", "package-0")
    core = add_zone(tmp_path, "intel-rapl:0:0", "core")
    probe = found(tmp_path, clock)
    core.unlink()
    reading = measure(probe, clock, {package: 4_000_000})
    assert reading.energy_j == pytest.approx(4)
    assert set(reading.parts_j) == {"package-0"}


def test_counters_for_root_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_cpuinfo(tmp_path)
    deny(monkeypatch, add_zone(tmp_path, "intel-rapl:0", "package-0"))
    none = absent(tmp_path)
    assert none.reason == "energy_uj of package-0 may be read by root only (CVE-2020-8694)"
    assert none.remedy is not None
    assert 'SUBSYSTEM=="powercap", KERNEL=="intel-rapl:*", ACTION=="add"' in none.remedy
    assert "/bin/chmod g+r /sys%p/energy_uj" in none.remedy
    assert "udevadm trigger --subsystem-match=powercap --action=add" in none.remedy
    assert "sudo" not in none.remedy


def test_a_domain_for_root_only_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    package = add_zone(tmp_path, "intel-rapl:0", "package-0")
    deny(monkeypatch, add_zone(tmp_path, "intel-rapl:0:0", "core"))
    reading = measure(found(tmp_path, clock), clock, {package: 1_000_000})
    assert set(reading.parts_j) == {"package-0"}


def test_a_counter_that_is_no_file(tmp_path: Path) -> None:
    counter = add_zone(tmp_path, "intel-rapl:0", "package-0")
    counter.unlink()
    counter.mkdir()
    none = absent(tmp_path)
    assert none.reason.startswith(f"{counter} cannot be read: ")
    assert none.remedy is None


def test_a_container_that_hides_the_counters(tmp_path: Path) -> None:
    folder = tmp_path / "sys/class/powercap"
    folder.mkdir(parents=True)
    (folder / "intel-rapl:0").symlink_to("../../devices/virtual/powercap/intel-rapl/intel-rapl:0")
    none = absent(tmp_path)
    assert none.reason == "the counters are hidden from this container"
    assert none.remedy == rapl.CONTAINER_REMEDY


@pytest.mark.parametrize(
    ("vendor", "flags", "reason", "remedy"),
    [
        ("GenuineIntel", "fpu", "no RAPL zone in /sys/class/powercap", "As root: modprobe intel_rapl_msr"),
        ("AuthenticAMD", "fpu", "no RAPL zone in /sys/class/powercap", "As root: modprobe intel_rapl_msr"),
        (
            "GenuineIntel",
            "fpu hypervisor",
            "no RAPL zone, and a virtual machine's host seldom lends it one",
            None,
        ),
        ("CentaurHauls", "fpu", "this processor has no RAPL counters that Linux knows", None),
    ],
)
def test_no_zones(vendor: str, flags: str, reason: str, remedy: str | None, tmp_path: Path) -> None:
    add_cpuinfo(tmp_path, vendor=vendor, flags=flags)
    assert (absent(tmp_path).reason, absent(tmp_path).remedy) == (reason, remedy)


def test_zones_without_a_package(tmp_path: Path) -> None:
    add_cpuinfo(tmp_path)
    add_zone(tmp_path, "intel-rapl:0", "psys")
    nameless = add_zone(tmp_path, "intel-rapl:1", "package-0")
    (nameless.parent / "name").unlink()
    assert absent(tmp_path).reason == "no RAPL zone in /sys/class/powercap"


def test_in_a_virtual_machine_it_is_an_estimate(tmp_path: Path) -> None:
    clock = Clock()
    add_cpuinfo(tmp_path, flags="fpu hypervisor avx2")
    package = add_zone(tmp_path, "intel-rapl:0", "package-0")
    probe = found(tmp_path, clock)
    assert probe.kind == "estimated"
    reading = measure(probe, clock, {package: 10_000_000})
    assert reading.kind == "estimated"
    assert (reading.energy_j, reading.low_j, reading.high_j) == pytest.approx((10, 3, 30))
    assert reading.flags == ("a virtual machine: the counters are what its host attributes to it",)


def test_windows_may_overlap(tmp_path: Path) -> None:
    clock = Clock()
    package = add_zone(tmp_path, "intel-rapl:0", "package-0")
    probe = found(tmp_path, clock)
    whole, first = probe.begin(), probe.begin()
    package.write_text("1000000")
    assert first.end().energy_j == pytest.approx(1)
    second = probe.begin()
    package.write_text("3000000")
    assert second.end().energy_j == pytest.approx(2)
    assert whole.end().energy_j == pytest.approx(3)
