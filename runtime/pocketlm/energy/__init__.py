"""Joules, with where they come from: `find_probe()` gives this machine's best source.

found = find_probe()
window = found.probe.begin()
...
reading = window.end()  # reading.energy_j, or reading.reason why there is none

Answers that share an engine each get their part of a window: `SharedMeter`.
"""

from pocketlm.energy.estimate import CpuEstimate, process_cpu_seconds, virtual_machine
from pocketlm.energy.find import Found, find_probe
from pocketlm.energy.meter_log import MeterLog, MeterLogError, energy_between
from pocketlm.energy.reading import Absent, CpuSeconds, Kind, Probe, Reading, Scope, Window
from pocketlm.energy.sampled import SampledProbe, WindowSpoiledError
from pocketlm.energy.sharing import SharedMeter, SharedWindow, share_of

__all__ = [
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
