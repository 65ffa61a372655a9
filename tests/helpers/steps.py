"""An engine that computes when a test says so."""

from __future__ import annotations

import threading

import pytest

from helpers.processes import wait_for
from pocketlm.scheduler import Scheduler


class Steps:
    """Holds the engine before each step until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._allowed = threading.Semaphore(0)
        self._free = threading.Event()
        self.done = 0
        original = Scheduler._step

        def step(scheduler: Scheduler) -> None:
            while not self._free.is_set() and not self._allowed.acquire(timeout=0.005):
                pass
            original(scheduler)
            self.done += 1

        monkeypatch.setattr(Scheduler, "_step", step)

    def take(self, count: int = 1) -> None:
        """Returns behind so many steps."""
        expected = self.done + count
        self._allowed.release(count)
        wait_for(lambda: self.done >= expected)

    def free(self) -> None:
        self._free.set()
