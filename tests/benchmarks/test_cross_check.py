"""codecarbon beside our figures, with a stand-in for the package."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pocketlm_benchmarks.cross_check import CrossCheckError, codecarbon


class Tracker:
    made: list[Tracker] = []  # noqa: RUF012  # a record for the test

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.calls: list[str] = []
        self.final_emissions_data = SimpleNamespace(energy_consumed=0.002)
        Tracker.made.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    monkeypatch.setitem(sys.modules, "codecarbon", SimpleNamespace(OfflineEmissionsTracker=Tracker))
    Tracker.made.clear()
    return Tracker


def test_its_joules(tracker: type[Tracker]) -> None:
    with codecarbon(enabled=True) as joules:
        assert joules == {}
    assert joules == {"codecarbon": pytest.approx(7200)}
    assert tracker.made[0].calls == ["start", "stop"]
    assert tracker.made[0].settings["save_to_file"] is False


def test_it_stops_when_the_run_fails(tracker: type[Tracker]) -> None:
    with pytest.raises(KeyError), codecarbon(enabled=True):
        raise KeyError
    assert tracker.made[0].calls == ["start", "stop"]


def test_not_asked_for_it_is_not_loaded(tracker: type[Tracker]) -> None:
    with codecarbon(enabled=False) as joules:
        pass
    assert (joules, tracker.made) == ({}, [])


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(CrossCheckError, match="pip install codecarbon"), codecarbon(enabled=True):
        pass


def test_a_tracker_that_fails_at_its_end_costs_its_own_figure_only(tracker: type[Tracker]) -> None:
    """As one does that never began, because another one runs."""
    with codecarbon(enabled=True) as joules:
        del tracker.made[0].final_emissions_data
    assert joules == {}
