"""NVIDIA graphics cards: NVML's energy counter, in millijoules since the driver was loaded.

nvmlDeviceGetTotalEnergyConsumption exists from the Volta generation on (NVML API reference, "Device
Queries"). The counter is refreshed about every 20 to 100 ms. It covers the card and nothing else, so it never
stands for a whole query of a model that computes on the processor.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pocketlm.energy.reading import Absent, Kind, Reading, Scope

SOURCE = "nvml"
INSTALL = "pip install nvidia-ml-py"


class NvmlProbe:
    """All cards that count their energy, summed; each is a part by its index."""

    source = SOURCE
    scope: Scope = "gpu"
    kind: Kind = "measured"
    resolution_j: float | None = 1e-3
    least_window_s = 10.0  # a hundred refreshes of the counter
    quick = True

    def __init__(
        self,
        nvml: Any,
        cards: Mapping[str, Any],
        flags: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        nvml: the module pynvml, initialized; `close()` shuts it down.
        cards: NVML's handles by name, "gpu0" and so on.
        """
        self._nvml = nvml
        self._cards = dict(cards)
        self._flags = tuple(flags)
        self._clock = clock

    def begin(self) -> NvmlWindow:
        return NvmlWindow(self._read_mj, self._flags, self._clock)

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _read_mj(self) -> dict[str, int] | str:
        """Millijoules by card, or why there are none."""
        try:
            return {
                name: int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(card))
                for name, card in self._cards.items()
            }
        except self._nvml.NVMLError as error:
            return f"NVML fails: {error}"


class NvmlWindow:
    """A measurement under way."""

    def __init__(
        self, read_mj: Callable[[], dict[str, int] | str], flags: tuple[str, ...], clock: Callable[[], float]
    ) -> None:
        self._read_mj = read_mj
        self._flags = flags
        self._clock = clock
        self._before = read_mj()
        self._start_s = clock()

    def end(self) -> Reading:
        duration_s = self._clock() - self._start_s
        before, after = self._before, self._read_mj()
        if isinstance(before, str):
            return self._none(duration_s, before)
        if isinstance(after, str):
            return self._none(duration_s, after)
        parts_j = {name: (after[name] - before[name]) / 1e3 for name in before}
        if min(parts_j.values()) < 0:
            return self._none(duration_s, "a card's counter went back; was its driver loaded anew?")
        energy_j = sum(parts_j.values())
        if energy_j == 0:
            return self._none(
                duration_s,
                f"no card refreshed its counter in the window's {duration_s:.3g} s; it takes about 0.1 s",
            )
        return Reading(SOURCE, "gpu", "measured", duration_s, energy_j, parts_j=parts_j, flags=self._flags)

    def _none(self, duration_s: float, reason: str) -> Reading:
        return Reading(SOURCE, "gpu", "measured", duration_s, None, reason=reason)


def find(load: Callable[[], Any] | None = None) -> NvmlProbe | Absent:
    """A probe for this machine's NVIDIA cards, or why there is none. `load` imports pynvml."""
    try:
        nvml = (load or _pynvml)()
    except ImportError:
        return Absent(SOURCE, "the package nvidia-ml-py is not installed", INSTALL)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Absent(SOURCE, f"no NVIDIA driver answers: {error}")
    try:
        cards, flags = _counting_cards(nvml)
    except nvml.NVMLError as error:
        cards, flags = {}, [f"NVML lists no cards: {error}"]
    if not cards:
        nvml.nvmlShutdown()
        return Absent(SOURCE, "; ".join(flags) or "there is no NVIDIA card here")
    return NvmlProbe(nvml, cards, flags)


def _pynvml() -> Any:
    return importlib.import_module("pynvml")


def _counting_cards(nvml: Any) -> tuple[dict[str, Any], list[str]]:
    """The cards that count their energy, and a remark for each that does not."""
    cards: dict[str, Any] = {}
    remarks: list[str] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            card = nvml.nvmlDeviceGetHandleByIndex(index)
            nvml.nvmlDeviceGetTotalEnergyConsumption(card)
        except nvml.NVMLError as error:
            remarks.append(f"gpu{index} does not count its energy ({error})")
        else:
            cards[f"gpu{index}"] = card
    return cards, remarks
