"""Processes that pull, and waiting for what they do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def pulling(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """helpers/pull_process.py with the environment of the test; killed (SIGKILL) at the end of the block."""
    paths = [str(ROOT / folder) for folder in ("models", "runtime", "tests")]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("pull_process.py")), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def wait_for(condition: Callable[[], bool]) -> None:
    """Fails after half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what the test waits for never came")
        time.sleep(0.02)
