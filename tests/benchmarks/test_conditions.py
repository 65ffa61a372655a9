"""What could have spoilt a measurement, on trees that change between two looks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from helpers.trees import write_tree
from pocketlm_benchmarks import conditions
from pocketlm_benchmarks.conditions import Conditions, Sensors, sensors

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc and /sys are Linux's")

CPU = "sys/devices/system/cpu"
WORKER = 4_000_000  # above any process id
TICK_S = 0.01


def stat(*, user: int = 0, system: int = 0, idle: int = 0, steal: int = 0) -> dict[str, object]:
    """The machine's time, in ticks."""
    return {"proc/stat": f"cpu  {user} 0 {system} {idle} 0 0 0 {steal} 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0"}


def process(pid: int, *, own: int = 0, children: int = 0) -> dict[str, object]:
    """A process's time, in ticks."""
    return {f"proc/{pid}/stat": f"{pid} (a (b) c) S {'1 ' * 10}{own} 0 {children} 0 20 0 1"}


def idle(root: Path) -> Path:
    return write_tree(root, {**stat(), **process(os.getpid())})


@pytest.fixture(autouse=True)
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: round(1 / TICK_S), raising=False)


@linux_only
class TestLoad:
    def test_none_where_all_is_ours(self, tmp_path: Path) -> None:
        watched = Conditions(lambda: [WORKER], idle(tmp_path))
        write_tree(tmp_path, {**stat(user=1900, idle=100), **process(WORKER, own=1890)})
        assert watched.flags() == []

    def test_other_processes(self, tmp_path: Path) -> None:
        watched = Conditions(lambda: [WORKER], idle(tmp_path))
        write_tree(tmp_path, {**stat(user=1000, system=600, idle=400), **process(WORKER, own=1000)})
        (flag,) = watched.flags()
        assert flag.startswith("Other processes used 30% of the processor's time")

    def test_only_time_since_the_start_counts(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {**stat(user=10_000), **process(os.getpid(), own=1000)})
        watched = Conditions(list, tmp_path)
        write_tree(tmp_path, {**stat(user=10_100, idle=900), **process(os.getpid(), own=1090)})
        assert watched.flags() == []

    def test_a_worker_that_has_ended_counts_with_its_parent(self, tmp_path: Path) -> None:
        pids = [WORKER]
        write_tree(tmp_path, {**stat(), **process(os.getpid(), own=5), **process(WORKER, own=100)})
        watched = Conditions(lambda: pids, tmp_path)
        pids.clear()
        (tmp_path / f"proc/{WORKER}/stat").unlink()
        write_tree(tmp_path, {**stat(user=900, idle=100), **process(os.getpid(), own=5, children=1000)})
        assert watched.flags() == []

    def test_a_worker_that_is_no_longer_named_still_counts(self, tmp_path: Path) -> None:
        pids = [WORKER]
        watched = Conditions(lambda: pids, write_tree(idle(tmp_path), process(WORKER)))
        pids.clear()
        write_tree(tmp_path, {**stat(user=900, idle=100), **process(WORKER, own=900)})
        assert watched.flags() == []

    def test_steal(self, tmp_path: Path) -> None:
        watched = Conditions(list, idle(tmp_path))
        write_tree(tmp_path, stat(idle=970, steal=30))
        assert watched.flags() == [
            "The hypervisor gave 3.0% of the processor's time to other machines (steal)."
        ]
        write_tree(tmp_path, stat(idle=990, steal=10))
        assert watched.flags() == []

    @pytest.mark.parametrize("text", ["", "cpu 1 2 3", "intr 1 2 3 4 5 6 7 8 9"])
    def test_times_that_are_not_told(self, text: str, tmp_path: Path) -> None:
        watched = Conditions(list, write_tree(idle(tmp_path), {"proc/stat": text}))
        assert watched.flags() == []
        write_tree(tmp_path, stat(user=1000))
        assert watched.flags() == []

    def test_no_time_has_passed(self, tmp_path: Path) -> None:
        assert Conditions(list, idle(tmp_path)).flags() == []

    def test_this_machine(self) -> None:
        assert all(flag.endswith((".", "performance")) for flag in Conditions(list).flags())


@linux_only
class TestThrottling:
    def test_counters_that_grew(self, tmp_path: Path) -> None:
        core, package = (f"{CPU}/cpu0/thermal_throttle/{kind}_throttle_count" for kind in ("core", "package"))
        write_tree(idle(tmp_path), {core: 5, package: 1000})
        watched = Conditions(list, tmp_path)
        assert watched.flags() == []
        write_tree(tmp_path, {core: 7, package: 2000})
        assert watched.flags() == [
            "The processor slowed down for its temperature: its throttling counters grew by 1,002."
        ]

    @pytest.mark.parametrize(
        ("kind", "state", "flagged"),
        [
            ("Processor", 2, True),
            ("cpufreq-cpu0", 1, True),
            ("cpufreq-cpu0", 0, False),
            ("pwm-fan", 3, False),
            ("intel_powerclamp", -1, False),
        ],
    )
    def test_cooling_policies(self, kind: str, state: int, flagged: bool, tmp_path: Path) -> None:
        watched = Conditions(list, idle(tmp_path))
        device = "sys/class/thermal/cooling_device0"
        write_tree(tmp_path, {f"{device}/type": kind, f"{device}/cur_state": state})
        assert bool(watched.flags()) is flagged

    @pytest.mark.parametrize(
        ("before", "after", "told"),
        [
            ("0", "0", None),
            ("0", "50005", "under-voltage, throttling"),
            ("50000", "50000", None),  # before the measurement
            ("10000", "50000", "throttling"),  # it came and went
            ("50000", "50008", "the soft temperature limit"),
            ("nonsense", "20000", "a capped frequency"),
        ],
    )
    def test_a_raspberry_pi(self, before: str, after: str, told: str | None, tmp_path: Path) -> None:
        file = "sys/devices/platform/soc/soc:firmware/get_throttled"
        write_tree(idle(tmp_path), {"proc/device-tree/model": "Raspberry Pi 4 Model B", file: before})
        watched = Conditions(list, tmp_path)
        write_tree(tmp_path, {file: after})
        expected = f"The board reports {told}: check its power supply and its cooling."
        assert watched.flags() == ([] if told is None else [expected])

    @pytest.mark.parametrize("printed", ["throttled=0x4\n", None, "error\n"])
    def test_a_raspberry_pi_without_the_file(
        self, printed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commands: list[Sequence[str]] = []
        monkeypatch.setattr(conditions, "command_output", lambda command: commands.append(command) or printed)
        write_tree(idle(tmp_path), {"proc/cpuinfo": "processor : 0\n\nModel : Raspberry Pi 5"})
        flags = Conditions(list, tmp_path).flags()
        assert commands[0] == ["vcgencmd", "get_throttled"]
        assert len(flags) == (1 if printed and "0x4" in printed else 0)


@linux_only
class TestPowerAndMemory:
    PLUG = "sys/class/power_supply/AC"
    BATTERY = "sys/class/power_supply/BAT0"

    def supplies(self, online: int) -> dict[str, object]:
        status = "Charging" if online else "Discharging"
        return {
            f"{self.PLUG}/type": "Mains",
            f"{self.PLUG}/online": online,
            f"{self.BATTERY}/type": "Battery",
            f"{self.BATTERY}/status": status,
        }

    def test_plugged_in_on_the_way(self, tmp_path: Path) -> None:
        watched = Conditions(list, write_tree(idle(tmp_path), self.supplies(0)))
        assert watched.flags() == ["The machine runs on battery, which slows many machines down."]
        write_tree(tmp_path, self.supplies(1))
        assert watched.flags() == ["The power source changed from battery to mains during the measurement."]

    def test_on_mains(self, tmp_path: Path) -> None:
        assert Conditions(list, write_tree(idle(tmp_path), self.supplies(1))).flags() == []

    @pytest.mark.parametrize(("free", "flagged"), [(900_000, True), (990_000, False), (1_000_000, False)])
    def test_swapping(self, free: int, flagged: bool, tmp_path: Path) -> None:
        meminfo = "MemTotal: 8000000 kB\nSwapTotal: 1000000 kB\nSwapFree: {} kB"
        watched = Conditions(list, write_tree(idle(tmp_path), {"proc/meminfo": meminfo.format(1_000_000)}))
        write_tree(tmp_path, {"proc/meminfo": meminfo.format(free)})
        expected = "Memory ran short: 102 MB were swapped out during the measurement."
        assert watched.flags() == ([expected] if flagged else [])

    @pytest.mark.parametrize(
        ("governor", "driver", "part"),
        [
            ("powersave", "acpi-cpufreq", "is held at its lowest"),
            ("powersave", "intel_pstate", "follows the load"),
            ("powersave", "amd-pstate-epp", "follows the load"),
            ("ondemand", "cpufreq-dt", "follows the load"),
            ("performance", "cpufreq-dt", None),
            ("schedutil", "cpufreq-dt", None),
        ],
    )
    def test_governors(self, governor: str, driver: str, part: str | None, tmp_path: Path) -> None:
        policy = f"{CPU}/cpufreq/policy0"
        write_tree(
            idle(tmp_path), {f"{policy}/scaling_governor": governor, f"{policy}/scaling_driver": driver}
        )
        flags = Conditions(list, tmp_path).flags()
        if part is None:
            assert flags == []
        else:
            (flag,) = flags
            assert part in flag
            assert f"(governor {governor})" in flag


class TestElsewhere:
    """macOS and Windows, through psutil."""

    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """Its figures, to be changed."""
        here = SimpleNamespace(user=0.0, idle=0.0, own={os.getpid(): 0.0}, swap=0, plugged=True, pressure="0")

        def processes(pid: int) -> SimpleNamespace:
            if pid not in here.own:
                raise psutil.NoSuchProcess(pid)
            return SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=here.own[pid], system=0.0))

        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(
            psutil, "cpu_times", lambda: SimpleNamespace(user=here.user, system=0.0, idle=here.idle, nice=0.0)
        )
        monkeypatch.setattr(psutil, "Process", processes)
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=here.swap))
        monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=here.plugged))
        monkeypatch.setattr(
            conditions,
            "command_output",
            lambda command: here.pressure and f"{command[-1]} {here.pressure}\n",
        )
        return here

    def test_others_swap_and_battery(self, machine: SimpleNamespace, tmp_path: Path) -> None:
        watched = Conditions(list, tmp_path)
        assert watched.flags() == []
        machine.user, machine.idle, machine.swap, machine.plugged = 50.0, 50.0, 1 << 30, False
        assert [flag.split(":")[0] for flag in watched.flags()] == [
            "The power source changed from mains to battery during the measurement.",
            "Other processes used 50% of the processor's time",
            "Memory ran short",
        ]

    def test_a_process_that_has_ended_keeps_what_it_used(
        self, machine: SimpleNamespace, tmp_path: Path
    ) -> None:
        machine.own[WORKER] = 0.0
        watched = Conditions(lambda: [WORKER], tmp_path)
        machine.user, machine.idle, machine.own[WORKER] = 50.0, 50.0, 50.0
        assert watched.flags() == []
        del machine.own[WORKER]
        assert watched.flags() == []

    @pytest.mark.parametrize(
        ("level", "told"), [("0", None), ("2", "heavy"), ("9", "sleeping"), ("-", None), ("", None)]
    )
    def test_thermal_pressure(
        self, level: str, told: str | None, machine: SimpleNamespace, tmp_path: Path
    ) -> None:
        machine.pressure = level
        expected = f"macOS reports {told} thermal pressure: the processor is slowed down."
        assert Conditions(list, tmp_path).flags() == ([] if told is None else [expected])


class TestSensors:
    def hwmon(self, number: int, name: str, **values: object) -> dict[str, object]:
        return {
            f"sys/class/hwmon/hwmon{number}/{key}": value for key, value in {"name": name, **values}.items()
        }

    def test_a_laptop(self, tmp_path: Path) -> None:
        write_tree(
            tmp_path,
            {
                **self.hwmon(0, "nvme", temp1_input=99_000),
                **self.hwmon(
                    1,
                    "coretemp",
                    temp1_input=61_000,
                    temp1_label="Package id 0",
                    temp2_input=63_000,
                    temp2_label="Core 0",
                ),
                f"{CPU}/cpu0/cpufreq/scaling_cur_freq": 2_000_000,
                f"{CPU}/cpu1/cpufreq/scaling_cur_freq": 3_000_000,
                f"{CPU}/cpu0/thermal_throttle/core_throttle_count": 3,
                "proc/cpuinfo": "cpu MHz : 1.0",
            },
        )
        assert sensors(tmp_path) == Sensors(temperature_c=61.0, frequency_hz=2.5e9, throttles=3)

    def test_the_hottest_where_none_stands_for_the_whole(self, tmp_path: Path) -> None:
        write_tree(tmp_path, self.hwmon(0, "k10temp", temp1_input=50_500, temp3_input=55_250))
        assert sensors(tmp_path).temperature_c == 55.25

    @pytest.mark.parametrize(
        ("kind", "value", "temperature_c"),
        [
            ("cpu-thermal", 48_312, 48.312),
            ("x86_pkg_temp", 70_000, 70.0),
            ("iwlwifi_1", 40_000, None),
            ("cpu-thermal", -127_000, None),
            ("cpu-thermal", "?", None),
        ],
    )
    def test_thermal_zones(
        self, kind: str, value: object, temperature_c: float | None, tmp_path: Path
    ) -> None:
        zone = "sys/class/thermal/thermal_zone0"
        write_tree(tmp_path, {f"{zone}/type": kind, f"{zone}/temp": value})
        assert sensors(tmp_path).temperature_c == temperature_c

    def test_the_frequency_of_cpuinfo(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"proc/cpuinfo": "processor : 0\ncpu MHz : 2000.0\n\ncpu MHz : 2500.5"})
        assert sensors(tmp_path).frequency_hz == pytest.approx(2.25025e9)

    def test_nothing_is_told(self, tmp_path: Path) -> None:
        assert sensors(tmp_path) == Sensors(None, None, None)
