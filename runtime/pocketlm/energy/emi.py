"""Windows' Energy Meter Interface (EMI): the processor's RAPL counters without a driver of one's own and
without administrator's rights.

Control codes and structures are those of emi.h in the Windows SDK; Microsoft's "Energy Meter Interface" page
describes their use. A device offers channels, each a counter in picowatt-hours that comes with the time of
its measurement. Intel's and AMD's processors show channels named RAPL_PackageN_PKG (cores, uncore and all
else in the package), _PP0 (cores), _PP1 (graphics) and _DRAM. AMD adds a device for each core, which are not
used: those counters are unreliable. Windows on Arm shows other rails (SYS, GPU, CPU_CLUSTER_0) whose extent
no vendor documents; they are not used either.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pocketlm.energy.reading import Absent, Kind, Reading, Scope
from pocketlm.energy.windows import Device, Devices, WindowsDevices
from pocketlm.errors import PocketlmError

SOURCE = "emi"
INTERFACE = "45bd8344-7ed6-49cf-a440-c276c933b053"  # GUID_DEVICE_ENERGY_METER

# CTL_CODE(FILE_DEVICE_UNKNOWN, n, METHOD_BUFFERED, FILE_READ_ACCESS) for n from 0 to 3
IOCTL_GET_VERSION = 0x224000
IOCTL_GET_METADATA_SIZE = 0x224004
IOCTL_GET_METADATA = 0x224008
IOCTL_GET_MEASUREMENT = 0x22400C

JOULES_PER_PICOWATT_HOUR = 3.6e-9
SECONDS_PER_TICK = 100e-9
COUNTER_RANGE = 2**64
MOST_PLAUSIBLE_W = 10_000.0  # a counter that was set back looks like a wrap, but of terawatts

_MOST_METADATA = 2**20
_PICOWATT_HOURS = 0  # EmiMeasurementUnitPicowattHours
_MEASUREMENT = struct.Struct("<QQ")  # EMI_CHANNEL_MEASUREMENT_DATA: AbsoluteEnergy, AbsoluteTime
_METADATA_V1 = struct.Struct("<I32s32sHH")  # unit, OEM, model, revision, size of the name that follows
_METADATA_V2 = struct.Struct("<32s32sHH")  # OEM, model, revision, number of the channels that follow
_CHANNEL_V2 = struct.Struct("<IH")  # unit, size of the name that follows, in bytes

_WITHOUT_DRAM = "memory (dram) is not in the total"
_PACKAGE = re.compile(r"RAPL_Package\d+_PKG")
_PART = re.compile(r"RAPL_Package\d+_(?:PP0|PP1|DRAM)")


class EmiError(PocketlmError):
    """A meter's answer that does not follow emi.h."""


class Sample(NamedTuple):
    """A channel's counter."""

    energy_pwh: int
    time_ticks: int  # of 100 ns, on the meter's own clock


def parse_metadata(version: int, data: bytes) -> tuple[str, ...]:
    """The channels' names, in the order of their measurements, from EMI_METADATA_V1 or EMI_METADATA_V2.

    Raises EmiError where the bytes end early, the version is unknown or a unit is not picowatt-hours.
    """
    match version:
        case 1:
            unit, _, _, _, size = _unpack(_METADATA_V1, data, 0)
            return (_channel_name(unit, data, _METADATA_V1.size, size),)
        case 2:
            *_, channels = _unpack(_METADATA_V2, data, 0)
            names, offset = [], _METADATA_V2.size
            for _ in range(channels):
                unit, size = _unpack(_CHANNEL_V2, data, offset)
                names.append(_channel_name(unit, data, offset + _CHANNEL_V2.size, size))
                offset += _CHANNEL_V2.size + size
            return tuple(names)
        case _:
            raise EmiError(f"the meter speaks version {version} of EMI; 1 and 2 are known")


def _channel_name(unit: int, data: bytes, offset: int, size: int) -> str:
    raw = data[offset : offset + size]
    if len(raw) < size:
        raise EmiError(f"the meter's metadata ends in a name: {len(raw)} bytes of {size}")
    # Some drivers pad names to a fixed width with blanks, and what follows the terminator is undefined.
    name = raw.decode("utf-16-le", errors="replace").split("\0")[0].strip()
    if unit != _PICOWATT_HOURS:
        raise EmiError(f"channel {name!r} counts in unit {unit} of EMI; only picowatt-hours (0) are known")
    return name


def parse_measurement(channels: Sequence[str], data: bytes) -> dict[str, Sample]:
    """The channels' counters from EMI_MEASUREMENT_DATA_V1 or _V2; raises EmiError if bytes are missing."""
    return {
        name: Sample(*_unpack(_MEASUREMENT, data, index * _MEASUREMENT.size))
        for index, name in enumerate(channels)
    }


def _unpack(record: struct.Struct, data: bytes, offset: int) -> tuple[int, ...]:
    if len(data) < offset + record.size:
        raise EmiError(
            f"the meter's answer ends after {len(data)} bytes; at least {offset + record.size} belong"
        )
    return record.unpack_from(data, offset)


@dataclass(frozen=True)
class Meter:
    """An open device and its channels' names."""

    device: Device
    channels: tuple[str, ...]

    @classmethod
    def of(cls, device: Device) -> Meter:
        """Asks for the channels; raises OSError, or EmiError for an answer that is no EMI."""
        version = int.from_bytes(_answer(device, IOCTL_GET_VERSION, 2), "little")
        size = int.from_bytes(_answer(device, IOCTL_GET_METADATA_SIZE, 4), "little")
        if size > _MOST_METADATA:
            raise EmiError(
                f"the meter announces {size:,} bytes of metadata; at most {_MOST_METADATA:,} are likely"
            )
        return cls(device, parse_metadata(version, device.control(IOCTL_GET_METADATA, size)))

    def read(self) -> dict[str, Sample]:
        """All channels, taken at once; raises OSError or EmiError."""
        size = len(self.channels) * _MEASUREMENT.size
        return parse_measurement(self.channels, self.device.control(IOCTL_GET_MEASUREMENT, size))


def _answer(device: Device, code: int, size: int) -> bytes:
    data = device.control(code, size)
    if len(data) < size:
        raise EmiError(
            f"the meter answers control code {code:#x} with {len(data)} bytes; {size} belong there"
        )
    return data


class EmiProbe:
    """The packages of all processors, summed; their cores, graphics and memory as parts."""

    source = SOURCE
    scope: Scope = "package"
    kind: Kind = "measured"
    # The counter's own step is 3.6 nJ, but what feeds it counts in RAPL's usual unit of 2^-14 J (Intel's
    # Software Developer's Manual, volume 3B, "RAPL Interfaces").
    resolution_j: float | None = 2.0**-14
    least_window_s = 10.0
    quick = True

    def __init__(self, meters: Sequence[Meter], clock: Callable[[], float] = time.perf_counter) -> None:
        self._meters = tuple(meters)
        self._clock = clock

    def begin(self) -> EmiWindow:
        return EmiWindow(self, self._clock)

    def read(self) -> dict[str, Sample]:
        """RAPL's channels of all meters; a name that comes twice counts once. Raises OSError or EmiError."""
        samples: dict[str, Sample] = {}
        for meter in self._meters:
            samples = meter.read() | samples
        return {
            name: sample
            for name, sample in samples.items()
            if _PACKAGE.fullmatch(name) or (_PART.fullmatch(name) and sample.energy_pwh)
        }

    def close(self) -> None:
        for meter in self._meters:
            meter.device.close()


class EmiWindow:
    """A measurement under way."""

    def __init__(self, probe: EmiProbe, clock: Callable[[], float]) -> None:
        self._probe = probe
        self._clock = clock
        self._before = _read(probe, "start")
        self._start_s = clock()

    def end(self) -> Reading:
        duration_s = self._clock() - self._start_s
        before, after = self._before, _read(self._probe, "end")
        if isinstance(before, str):
            return self._none(duration_s, before)
        if isinstance(after, str):
            return self._none(duration_s, after)
        return self._reading(before, after, duration_s)

    def _reading(
        self, before: Mapping[str, Sample], after: Mapping[str, Sample], duration_s: float
    ) -> Reading:
        joules = {name: used_j(before[name], after[name]) for name in before if name in after}
        packages = [name for name in joules if _PACKAGE.fullmatch(name)]
        spans_s = [_span_s(before[name], after[name]) for name in packages]
        if min(spans_s) == 0:
            return self._none(duration_s, f"the meter took no measurement in the window's {duration_s:.3g} s")
        energy_j = sum(joules[name] for name in packages)
        if energy_j > MOST_PLAUSIBLE_W * max(duration_s, *spans_s):
            return self._none(duration_s, "the meter's counter was set back during the window")
        return Reading(
            SOURCE,
            "package",
            "measured",
            duration_s,
            energy_j,
            parts_j=joules if len(joules) > 1 else {},
            flags=_flags(joules, max(spans_s, key=lambda span_s: abs(span_s - duration_s)), duration_s),
        )

    def _none(self, duration_s: float, reason: str) -> Reading:
        return Reading(SOURCE, "package", "measured", duration_s, None, reason=reason)


def _read(probe: EmiProbe, moment: str) -> dict[str, Sample] | str:
    """The counters, or why there are none."""
    try:
        return probe.read()
    except (OSError, EmiError) as error:
        return f"the meter could not be read at the {moment} of the window: {error}"


def _flags(joules: Mapping[str, float], span_s: float, duration_s: float) -> tuple[str, ...]:
    flags = [_WITHOUT_DRAM] if any(name.endswith("_DRAM") for name in joules) else []
    if abs(span_s - duration_s) > 0.05 * duration_s:
        flags.append(f"the meter's measurements are {span_s:.3g} s apart, the window is {duration_s:.3g} s")
    return tuple(flags)


def used_j(before: Sample, after: Sample) -> float:
    """Joules between two samples of a counter that wraps at 2^64."""
    return (after.energy_pwh - before.energy_pwh) % COUNTER_RANGE * JOULES_PER_PICOWATT_HOUR


def _span_s(before: Sample, after: Sample) -> float:
    return (after.time_ticks - before.time_ticks) % COUNTER_RANGE * SECONDS_PER_TICK


def find(devices: Devices | None = None) -> EmiProbe | Absent:
    """A probe for this machine's packages, or why there is none. `devices` is Windows' own by default."""
    devices = devices or WindowsDevices.load()
    if devices is None:
        return Absent(SOURCE, "the Energy Meter Interface is a part of Windows")
    try:
        paths = devices.paths(INTERFACE)
    except OSError as error:
        return Absent(SOURCE, f"Windows does not list its energy meters: {error}")
    meters: list[Meter] = []
    others: list[str] = []
    for path in paths:
        try:
            meter = _package_meter(devices.open(path), others)
        except (OSError, EmiError) as error:
            others.append(f"a meter that cannot be used ({error})")
        else:
            meters += [meter] if meter else []
    if meters:
        return EmiProbe(meters)
    if others:
        return Absent(
            SOURCE, f"no energy meter here counts a processor's package; found: {', '.join(others)}"
        )
    return Absent(SOURCE, "Windows shows no energy meter here; virtual machines and older machines have none")


def _package_meter(device: Device, others: list[str]) -> Meter | None:
    """The device as a meter if it counts a package; else closes it and adds its channels to `others`."""
    try:
        meter = Meter.of(device)
        meter.read()
    except (OSError, EmiError):
        device.close()
        raise
    if any(_PACKAGE.fullmatch(name) for name in meter.channels):
        return meter
    device.close()
    others += meter.channels
    return None
