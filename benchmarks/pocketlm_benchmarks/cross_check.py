"""codecarbon beside our own energy figures, where it is installed and asked for.

Its figures stand apart and are never mixed with ours: it assumes a constant power for memory, and a
processor's power from a table where it finds no counter.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from pocketlm.energy.reading import JOULES_PER_WH
from pocketlm.errors import PocketlmError

CODECARBON = "codecarbon"


class CrossCheckError(PocketlmError):
    """The program to check with is not installed."""


@contextmanager
def codecarbon(*, enabled: bool) -> Iterator[dict[str, float]]:
    """Joules of what runs inside, after codecarbon; the dictionary is filled at the end, empty if disabled.

    The offline tracker of the whole machine is used: nothing is looked up, reported or written to a file.
    Raises CrossCheckError where it is not installed.
    """
    joules: dict[str, float] = {}
    if not enabled:
        yield joules
        return
    try:
        module = importlib.import_module(CODECARBON)
    except ModuleNotFoundError:
        raise CrossCheckError(
            "--cross-check needs codecarbon. Install it with: pip install codecarbon"
        ) from None
    tracker = module.OfflineEmissionsTracker(
        country_iso_code="USA",  # for the grams of carbon, which are not used
        tracking_mode="machine",
        save_to_file=False,
        log_level="error",
    )
    tracker.start()
    try:
        yield joules
    finally:
        tracker.stop()
    joules[CODECARBON] = float(tracker.final_emissions_data.energy_consumed) * 1000 * JOULES_PER_WH
