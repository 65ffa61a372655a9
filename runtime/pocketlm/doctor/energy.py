"""Where joules come from on this machine, and why not from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from pocketlm.doctor.check import Check
from pocketlm.energy import Found, Probe, find_probe

_SCOPES = {
    "wall": "all that the plug delivers",
    "device": "the whole device",
    "board": "the board",
    "soc": "the system on a chip",
    "package": "the processor package",
    "gpu": "the graphics card",
    "process": "the processor time of pocketlm alone",
}
_PARTS = {"nvml"}
"""They cover a graphics card, which most machines have not got and answers are not computed on."""


def sources() -> Iterator[Check]:
    """Raises InvalidSettingError for a wrong POCKETLM_TDP_W."""
    found = find_probe()
    try:
        yield from describe(found)
    finally:
        for probe in (found.probe, *found.others):
            probe.close()


def describe(found: Found) -> Iterator[Check]:
    """The source that is used first."""
    probe = found.probe
    could_measure = any(absent.remedy and absent.source not in _PARTS for absent in found.absent)
    yield Check(
        "source",
        "note" if probe.kind == "estimated" and could_measure else "ok",
        f"{probe.source}: {_what(probe)}"
        + ("" if probe.kind == "measured" else ". Each figure comes with an interval"),
        facts=_facts(probe),
    )
    for other in found.others:
        yield Check(other.source, "ok", f"{_what(other)}; less trusted, not used", facts=_facts(other))
    for absent in found.absent:
        yield Check(
            absent.source,
            "note" if absent.remedy and absent.source not in _PARTS else "absent",
            absent.reason,
            absent.remedy,
            {"reason": absent.reason},
        )


def _what(probe: Probe) -> str:
    return f"{probe.kind}, covers {_SCOPES[probe.scope]}"


def _facts(probe: Probe) -> dict[str, str | float | None]:
    return {
        "source": probe.source,
        "kind": probe.kind,
        "scope": probe.scope,
        "resolution_j": probe.resolution_j,
        "least_window_s": probe.least_window_s,
    }
