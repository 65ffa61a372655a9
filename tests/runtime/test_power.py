"""What the power modes come to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from helpers.tunings import a_tuning
from pocketlm import power as module
from pocketlm.errors import InvalidSettingError
from pocketlm.power import BALANCED_SPIN_US, Power, PowerMode, power

MODES: tuple[PowerMode, ...] = ("eco", "balanced", "fast")


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POCKETLM_THREADS", raising=False)
    monkeypatch.setattr(module, "physical_cores", lambda: 8)


def test_without_a_tuning_eco_takes_half_of_the_cores_and_never_spins() -> None:
    assert power("eco") == Power(threads=4, spin_us=0, speculate=True)
    assert power("balanced") == Power(threads=8, spin_us=BALANCED_SPIN_US, speculate=True)
    assert power("fast") == Power(threads=8, spin_us=None, speculate=True)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (64, 32)])
def test_eco_has_one_thread_at_least(cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "physical_cores", lambda: cores)
    assert power("eco").threads == threads


def test_a_tuning_knows_better() -> None:
    tuning = dataclasses.replace(a_tuning(), threads=6, eco_threads=3)
    assert [power(mode, tuning=tuning).threads for mode in MODES] == [3, 6, 6]


@pytest.mark.parametrize("mode", MODES)
def test_the_users_number_of_threads_goes_first(mode: PowerMode, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = power(mode, tuning=a_tuning())
    monkeypatch.setenv("POCKETLM_THREADS", "5")
    assert power(mode, tuning=a_tuning()) == dataclasses.replace(usual, threads=5)
    assert power(mode, threads=7, tuning=a_tuning()) == dataclasses.replace(usual, threads=7)


@pytest.mark.parametrize("mode", ["turbo", "Fast", "", None])
def test_a_mode_that_is_none(mode: Any) -> None:
    with pytest.raises(InvalidSettingError, match=f"mode is {mode!r}; eco, balanced, fast are expected"):
        power(mode)


def test_threads_out_of_range() -> None:
    with pytest.raises(InvalidSettingError, match="number of threads is 0"):
        power("eco", threads=0)
