"""Windows' Energy Meter Interface, on bytes laid out as emi.h has them."""

from __future__ import annotations

import struct
import sys
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.energy import emi
from pocketlm.energy.emi import EmiError, EmiProbe, Meter, Sample, parse_measurement, parse_metadata, used_j
from pocketlm.energy.reading import Absent

INTEL = ("RAPL_Package0_PKG", "RAPL_Package0_PP0", "RAPL_Package0_PP1", "RAPL_Package0_DRAM")
PWH_PER_J = 1 / 3.6e-9
TICKS_PER_S = 10_000_000


def wide(text: str, size: int) -> bytes:
    """A fixed field of UTF-16 characters."""
    return text.encode("utf-16-le").ljust(size, b"\0")


def metadata_v2(*names: str, unit: int = 0, blanks: int = 49) -> bytes:
    """Names are padded with blanks and end with a NUL, as Microsoft's driver writes them."""
    data = wide("Microsoft", 32) + wide("RAPL", 32) + struct.pack("<HH", 1, len(names))
    for name in names:
        raw = (name.ljust(blanks) + "\0").encode("utf-16-le")
        data += struct.pack("<IH", unit, len(raw)) + raw
    return data


def metadata_v1(name: str) -> bytes:
    raw = (name + "\0").encode("utf-16-le")
    return struct.pack("<I", 0) + wide("OEM", 32) + wide("Model", 32) + struct.pack("<HH", 2, len(raw)) + raw


class FakeDevice:
    """Answers control codes."""

    def __init__(self, metadata: bytes, version: int = 2) -> None:
        self.answers = {
            emi.IOCTL_GET_VERSION: struct.pack("<H", version),
            emi.IOCTL_GET_METADATA_SIZE: struct.pack("<I", len(metadata)),
            emi.IOCTL_GET_METADATA: metadata,
        }
        self.open = True

    def measures(self, *counters: tuple[int, int]) -> None:
        """Sets the counters: picowatt-hours and ticks by channel."""
        self.answers[emi.IOCTL_GET_MEASUREMENT] = b"".join(struct.pack("<QQ", *pair) for pair in counters)

    def control(self, code: int, size: int) -> bytes:
        if code not in self.answers:
            raise OSError("DeviceIoControl fails with Windows error 31")
        return self.answers[code][:size]

    def close(self) -> None:
        self.open = False


class FakeDevices:
    def __init__(self, *devices: FakeDevice | OSError) -> None:
        self.devices = {f"\\\\?\\meter{index}": device for index, device in enumerate(devices)}

    def paths(self, interface: str) -> list[str]:
        assert interface == "45bd8344-7ed6-49cf-a440-c276c933b053"
        return list(self.devices)

    def open(self, path: str) -> FakeDevice:
        device = self.devices[path]
        if isinstance(device, OSError):
            raise device
        return device


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def probe_of(*devices: FakeDevice) -> tuple[EmiProbe, Clock]:
    clock = Clock()
    return EmiProbe([Meter.of(device) for device in devices], clock), clock


class TestMetadata:
    def test_channels_of_version_2(self) -> None:
        assert parse_metadata(2, metadata_v2(*INTEL)) == INTEL

    def test_names_without_padding(self) -> None:
        assert parse_metadata(2, metadata_v2("SYS", "GPU", blanks=0)) == ("SYS", "GPU")

    def test_the_device_of_version_1_is_one_channel(self) -> None:
        assert parse_metadata(1, metadata_v1("CPU rail")) == ("CPU rail",)

    def test_no_channels(self) -> None:
        assert parse_metadata(2, metadata_v2()) == ()

    def test_bytes_after_the_terminator_are_not_the_name(self) -> None:
        name = "GPU\0left".encode("utf-16-le")
        data = bytes(64) + struct.pack("<HHIH", 1, 1, 0, len(name)) + name
        assert parse_metadata(2, data) == ("GPU",)

    @given(st.integers(min_value=0, max_value=len(metadata_v2(*INTEL)) - 1))
    def test_truncated_wherever_it_is(self, length: int) -> None:
        with pytest.raises(EmiError, match="ends"):
            parse_metadata(2, metadata_v2(*INTEL)[:length])

    @given(st.integers(min_value=0, max_value=len(metadata_v1("CPU")) - 1))
    def test_truncated_version_1(self, length: int) -> None:
        with pytest.raises(EmiError, match="ends"):
            parse_metadata(1, metadata_v1("CPU")[:length])

    def test_an_unknown_unit(self) -> None:
        with pytest.raises(EmiError, match="'RAPL_Package0_PKG' counts in unit 7 of EMI; only pico"):
            parse_metadata(2, metadata_v2(*INTEL, unit=7))

    @pytest.mark.parametrize("version", [0, 3])
    def test_an_unknown_version(self, version: int) -> None:
        with pytest.raises(EmiError, match=f"version {version} of EMI; 1 and 2 are known"):
            parse_metadata(version, b"")

    @given(st.binary(max_size=200), st.sampled_from([1, 2]))
    def test_garbage_is_an_emi_error_or_names(self, data: bytes, version: int) -> None:
        with suppress(EmiError):
            assert all(isinstance(name, str) for name in parse_metadata(version, data))


class TestMeasurement:
    def test_recorded_bytes(self) -> None:
        data = bytes.fromhex("0010a5d4e8000000 80c3c90100000000 0100000000000000 80c3c90100000000")
        assert parse_measurement(["a", "b"], data) == {
            "a": Sample(10**12, 30_000_000),
            "b": Sample(1, 30_000_000),
        }

    def test_truncated(self) -> None:
        with pytest.raises(EmiError, match="ends after 31 bytes; at least 32 belong"):
            parse_measurement(["a", "b"], bytes(31))

    @given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
    def test_the_counter_wraps_at_64_bits(self, start: int, used: int) -> None:
        after = Sample((start + used) % 2**64, 0)
        assert used_j(Sample(start, 0), after) == used * 3.6e-9


class TestWindow:
    def test_packages_are_the_total_and_the_rest_parts(self) -> None:
        device = FakeDevice(metadata_v2(*INTEL))
        probe, clock = probe_of(device)
        starts, joules = (1_000, 500, 100, 50), (300, 200, 10, 40)
        device.measures(*[(start, 0) for start in starts])
        window = probe.begin()
        clock.now_s += 20
        ends = [start + round(j * PWH_PER_J) for start, j in zip(starts, joules, strict=True)]
        device.measures(*[(end, 20 * TICKS_PER_S) for end in ends])
        reading = window.end()
        assert reading.energy_j == pytest.approx(300)
        assert reading.power_w == pytest.approx(15)
        assert reading.parts_j == pytest.approx(dict(zip(INTEL, joules, strict=True)))
        assert (reading.source, reading.scope, reading.kind) == ("emi", "package", "measured")
        assert reading.flags == ("memory (dram) is not in the total",)

    def test_two_processors(self) -> None:
        first, second = (FakeDevice(metadata_v2(f"RAPL_Package{n}_PKG")) for n in (0, 1))
        probe, clock = probe_of(first, second)
        for device, joules in ((first, 0), (second, 0), (first, 30), (second, 12)):
            device.measures((round(joules * PWH_PER_J), 10 * TICKS_PER_S if joules else 0))
            if (device, joules) == (second, 0):
                window = probe.begin()
        clock.now_s += 10
        assert window.end().energy_j == pytest.approx(42)

    def test_a_package_that_two_devices_show_counts_once(self) -> None:
        devices = [FakeDevice(metadata_v2("RAPL_Package0_PKG")) for _ in range(2)]
        probe, clock = probe_of(*devices)
        for device in devices:
            device.measures((0, 0))
        window = probe.begin()
        clock.now_s += 10
        for device in devices:
            device.measures((round(25 * PWH_PER_J), 10 * TICKS_PER_S))
        reading = window.end()
        assert reading.energy_j == pytest.approx(25)
        assert reading.flags == ()

    def test_a_domain_that_never_counted_is_no_part(self) -> None:
        device = FakeDevice(metadata_v2("RAPL_Package0_PKG", "RAPL_Package0_DRAM"))
        probe, clock = probe_of(device)
        device.measures((0, 0), (0, 0))
        window = probe.begin()
        clock.now_s += 1
        device.measures((round(PWH_PER_J), TICKS_PER_S), (0, TICKS_PER_S))
        reading = window.end()
        assert reading.energy_j == pytest.approx(1)
        assert not reading.parts_j
        assert reading.flags == ()

    def test_wrap_around(self) -> None:
        device = FakeDevice(metadata_v2("RAPL_Package0_PKG"))
        probe, clock = probe_of(device)
        used = round(150 * PWH_PER_J)
        device.measures((2**64 - used // 3, 2**64 - 1))
        window = probe.begin()
        clock.now_s += 10
        device.measures((used - used // 3, 10 * TICKS_PER_S - 1))
        assert window.end().energy_j == pytest.approx(150)

    def test_a_counter_that_is_set_back(self) -> None:
        device = FakeDevice(metadata_v2("RAPL_Package0_PKG"))
        probe, clock = probe_of(device)
        device.measures((10**15, 0))
        window = probe.begin()
        clock.now_s += 10
        device.measures((0, 10 * TICKS_PER_S))
        reading = window.end()
        assert reading.energy_j is None
        assert reading.reason == "the meter's counter was set back during the window"

    def test_no_new_measurement_in_so_short_a_window(self) -> None:
        device = FakeDevice(metadata_v2("RAPL_Package0_PKG"))
        probe, clock = probe_of(device)
        device.measures((5, 5))
        window = probe.begin()
        clock.now_s += 0.0005
        reading = window.end()
        assert reading.energy_j is None
        assert reading.reason == "the meter took no measurement in the window's 0.0005 s"

    def test_a_slow_meter_is_flagged(self) -> None:
        device = FakeDevice(metadata_v2("RAPL_Package0_PKG"))
        probe, clock = probe_of(device)
        device.measures((0, 0))
        window = probe.begin()
        clock.now_s += 10
        device.measures((round(90 * PWH_PER_J), 9 * TICKS_PER_S))
        reading = window.end()
        assert reading.energy_j == pytest.approx(90)
        assert reading.flags == ("the meter's measurements are 9 s apart, the window is 10 s",)

    @pytest.mark.parametrize("moment", ["start", "end"])
    def test_a_device_that_fails(self, moment: str) -> None:
        device = FakeDevice(metadata_v2("RAPL_Package0_PKG"))
        probe, _ = probe_of(device)
        device.measures((0, 0))
        if moment == "start":
            del device.answers[emi.IOCTL_GET_MEASUREMENT]
        window = probe.begin()
        device.answers.pop(emi.IOCTL_GET_MEASUREMENT, None)
        reading = window.end()
        assert reading.energy_j is None
        assert reading.reason is not None
        assert reading.reason.startswith(f"the meter could not be read at the {moment} of the window:")
        assert "Windows error 31" in reading.reason

    def test_a_truncated_measurement(self) -> None:
        device = FakeDevice(metadata_v2("RAPL_Package0_PKG"))
        probe, _ = probe_of(device)
        device.measures((0, 0))
        window = probe.begin()
        device.answers[emi.IOCTL_GET_MEASUREMENT] = bytes(9)
        reading = window.end()
        assert reading.energy_j is None
        assert "ends after 9 bytes; at least 16 belong" in str(reading.reason)


class TestFind:
    def test_the_device_with_the_package(self) -> None:
        # An AMD processor shows a device for each core, and one of them has the package too.
        core = FakeDevice(metadata_v2("RAPL_Package0_Core1_CORE"))
        package = FakeDevice(metadata_v2("RAPL_Package0_PKG", "RAPL_Package0_Core0_CORE"))
        core.measures((1, 1))
        package.measures((1, 1), (1, 1))
        found = emi.find(FakeDevices(core, package))
        assert isinstance(found, EmiProbe)
        assert set(found.read()) == {"RAPL_Package0_PKG"}
        assert (core.open, package.open) == (False, True)
        found.close()
        assert not package.open

    @pytest.mark.skipif(sys.platform == "win32", reason="for the other systems")
    def test_not_windows(self) -> None:
        assert emi.find() == Absent("emi", "the Energy Meter Interface is a part of Windows")

    def test_no_meter(self) -> None:
        found = emi.find(FakeDevices())
        assert isinstance(found, Absent)
        assert "shows no energy meter" in found.reason

    def test_meters_of_other_things_are_named(self) -> None:
        device = FakeDevice(metadata_v2("SYS", "GPU"))
        device.measures((1, 1), (1, 1))
        found = emi.find(FakeDevices(device))
        assert isinstance(found, Absent)
        assert found.reason.endswith("found: SYS, GPU")
        assert not device.open

    def test_a_meter_that_may_not_be_opened(self) -> None:
        found = emi.find(FakeDevices(OSError("CreateFileW fails with Windows error 5")))
        assert isinstance(found, Absent)
        assert "CreateFileW fails with Windows error 5" in found.reason

    def test_a_meter_that_opens_but_does_not_measure(self) -> None:
        device = FakeDevice(metadata_v2("RAPL_Package0_PKG"))
        found = emi.find(FakeDevices(device))
        assert isinstance(found, Absent)
        assert "Windows error 31" in found.reason
        assert not device.open

    def test_a_short_answer(self) -> None:
        device = FakeDevice(metadata_v2(*INTEL))
        device.answers[emi.IOCTL_GET_VERSION] = b"\2"
        found = emi.find(FakeDevices(device))
        assert isinstance(found, Absent)
        assert "control code 0x224000 with 1 bytes; 2 belong there" in found.reason

    def test_an_absurd_size(self) -> None:
        device = FakeDevice(metadata_v2(*INTEL))
        device.answers[emi.IOCTL_GET_METADATA_SIZE] = b"\xff" * 4
        found = emi.find(FakeDevices(device))
        assert isinstance(found, Absent)
        assert "announces 4,294,967,295 bytes" in found.reason

    def test_a_list_that_fails(self) -> None:
        class Broken(FakeDevices):
            def paths(self, interface: str) -> list[str]:
                raise OSError("SetupDiGetClassDevsW fails with Windows error 8")

        found = emi.find(Broken())
        assert isinstance(found, Absent)
        assert found.reason.endswith("SetupDiGetClassDevsW fails with Windows error 8")
