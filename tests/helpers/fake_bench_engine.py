"""An engine for the harness's tests: it computes nothing, and misbehaves as its weights' name says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pocketlm_benchmarks.engines.protocol import (
    EngineError,
    EngineInfo,
    EngineMissingError,
    EngineSpec,
    Query,
    Trace,
)

ADAPTER = f"{__name__}:FakeBenchEngine"


class FakeBenchEngine:
    """`spec.weights` is what it does: "sound", or a fault; "hangs" has a child that hangs too."""

    def __init__(self, spec: EngineSpec) -> None:
        self._fault = spec.weights
        if self._fault == "not installed":
            raise EngineMissingError("fake is not installed. Install it with: pip install fake")
        if self._fault == "dies at the start":
            os._exit(7)
        if self._fault == "never starts":
            time.sleep(60)
        if self._fault == "hangs":
            _start_child()
        if self._fault == "prints":
            os.write(1, b"a native library that prints\n")
            print("and Python that does")
        self.info = EngineInfo("fake", "1.0", "none", 42, 0.5, False, note=f"{spec.threads} threads")

    def answer(self, queries: Sequence[Query]) -> list[Trace]:
        if self._fault == "cannot":
            raise EngineMissingError("fake runs no such case")
        if self._fault == "fails":
            raise EngineError("out of luck")
        if self._fault == "has a bug":
            raise KeyError("bug")
        if self._fault == "gives NaN":
            return [Trace(1, 0, 1, float("nan"), None, 0, (), "") for _ in queries]
        if self._fault == "drops one":
            return []
        if self._fault == "aborts":
            os.write(2, b"progress...\nGGML_ASSERT(false) failed\n")
            os.abort()
        if self._fault in ("hangs", "sleeps"):
            time.sleep(60)
        return [_trace(query) for query in queries]

    def close(self) -> None:
        if self._fault == "never closes":
            time.sleep(60)
        if self._fault == "leaves a child":
            _start_child()


def _trace(query: Query) -> Trace:
    count = query.new_tokens
    gaps_s = (0.25,) * (count - 1)
    text = f"{list(query.prompt_ids)} {[dict(message) for message in query.messages]}"
    return Trace(len(query.prompt_ids), 0, count, 0.125, 0.25 * (count - 1), count - 1, gaps_s, text)


def _start_child() -> None:
    """One that would outlive us; its id goes to the file that the environment names."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(os.environ["FAKE_CHILD_FILE"]).write_text(str(child.pid))
