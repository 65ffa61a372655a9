"""What a report is told of how energy was measured."""

from __future__ import annotations

import pytest

from helpers.scripted import ScriptedProbe, found
from pocketlm.energy import Kind, Scope
from pocketlm_benchmarks.metering import Meter


@pytest.mark.parametrize(
    ("scope", "kind", "said", "not_said"),
    [
        ("process", "estimated", "processor time", "Idle power is subtracted"),
        ("package", "estimated", "Idle power is subtracted", "processor time"),  # RAPL in a virtual machine
        ("package", "measured", "Idle power is subtracted", "estimate"),
    ],
)
def test_the_note_says_what_the_figures_are(scope: Scope, kind: Kind, said: str, not_said: str) -> None:
    meter = Meter(find=lambda **_: found(ScriptedProbe([1.0], scope=scope, kind=kind)))
    note = meter.setup([], {}).note
    assert said in note
    assert not_said not in note
    assert ("stimate" in note) == (kind == "estimated")
