"""codecarbon beside our own energy figures, where it is installed and asked for.

Its figures stand apart and are never mixed with ours: it assumes a constant power for memory, and a
processor's power from a table where it finds no counter.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType

from pocketlm.energy.reading import JOULES_PER_WH
from pocketlm.errors import PocketlmError

CODECARBON = "codecarbon"


class CrossCheckError(PocketlmError):
    """The program to check with is not installed."""


def load_codecarbon() -> ModuleType:
    """The package. Raises CrossCheckError where it is not installed."""
    try:
        return importlib.import_module(CODECARBON)
    except ModuleNotFoundError:
        raise CrossCheckError(
            "--cross-check needs codecarbon. Install it with: pip install codecarbon"
        ) from None


@contextmanager
def codecarbon(*, enabled: bool) -> Iterator[dict[str, float]]:
    """Joules of what runs inside, after codecarbon; the dictionary is filled at the end, empty if disabled.

    The offline tracker of the whole machine is used: nothing is looked up, reported or written to a file. It
    stays empty too if the tracker fails at its end: that is no reason to lose what ran inside.
    Raises CrossCheckError where it is not installed.
    """
    joules: dict[str, float] = {}
    if not enabled:
        yield joules
        return
    tracker = load_codecarbon().OfflineEmissionsTracker(
        country_iso_code="USA",  # for the grams of carbon, which are not used
        tracking_mode="machine",
        save_to_file=False,
        log_level="error",
    )
    tracker.start()
    try:
        yield joules
    finally:
        # It may raise what it likes; it has no figure where another tracker of this machine was running.
        with suppress(Exception):
            tracker.stop()
            joules[CODECARBON] = float(tracker.final_emissions_data.energy_consumed) * 1000 * JOULES_PER_WH
