"""Memory of a process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from helpers.trees import write_tree
from pocketlm_benchmarks.memory import UNKNOWN, memory_of
from pocketlm_benchmarks.result import Memory

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

STATUS = """Name:\tpython
VmPeak:\t  900000 kB
VmHWM:\t  200000 kB
VmRSS:\t  150000 kB
RssAnon:\t   60000 kB
RssFile:\t   80000 kB
RssShmem:\t   10000 kB
Threads:\t4"""


@linux_only
class TestLinux:
    def test_parts(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"proc/17/status": STATUS})
        assert memory_of(17, tmp_path) == Memory(
            peak_bytes=200_000 << 10, anonymous_bytes=60_000 << 10, file_bytes=90_000 << 10
        )

    def test_an_old_kernel_tells_the_peak_alone(self, tmp_path: Path) -> None:
        lines = [line for line in STATUS.splitlines() if not line.startswith("Rss")]
        write_tree(tmp_path, {"proc/17/status": "\n".join(lines)})
        assert memory_of(17, tmp_path) == Memory(
            peak_bytes=200_000 << 10, anonymous_bytes=None, file_bytes=None
        )

    def test_an_ended_process_that_nobody_waited_for_has_none(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"proc/17/status": "Name:\tpython\nState:\tZ (zombie)"})
        assert memory_of(17, tmp_path) == UNKNOWN

    def test_a_process_that_has_gone(self, tmp_path: Path) -> None:
        assert memory_of(17, tmp_path) == UNKNOWN

    def test_this_process(self) -> None:
        memory = memory_of(os.getpid())
        assert memory.peak_bytes is not None
        assert memory.anonymous_bytes is not None
        assert memory.file_bytes is not None
        assert 0 < memory.anonymous_bytes <= memory.peak_bytes
        assert 0 < memory.file_bytes <= memory.peak_bytes


@pytest.mark.parametrize(("system", "peak"), [("win32", 123), ("darwin", None)])
def test_elsewhere_the_peak_at_most(system: str, peak: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = SimpleNamespace(rss=100) if peak is None else SimpleNamespace(rss=100, peak_wset=peak)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(memory_info=lambda: counters))
    assert memory_of(17) == Memory(peak_bytes=peak, anonymous_bytes=None, file_bytes=None)


def test_elsewhere_a_process_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(psutil, "Process", gone)
    assert memory_of(17) == UNKNOWN
