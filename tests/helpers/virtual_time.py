"""An event loop on which hours pass in no time, and where waiting for nothing is an error."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE_S = 10.0


class _Selector(selectors.DefaultSelector):  # type: ignore[valid-type, misc]
    """Does not sleep, but says that it has."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        # Without a timer there may still be a thread whose end is to be waited for.
        ready = super().select(_PATIENCE_S if timeout is None else 0)
        if not ready and timeout is None:
            raise RuntimeError("every task waits, and nothing will ever happen")
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its `time()` begins at 0 and goes on when all tasks wait, straight to the next timer."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on a `VirtualTimeLoop`."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)
