"""How long an engine takes to load, with its files read from the disk and with its files in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pocketlm_benchmarks.engines.process import Answered
from pocketlm_benchmarks.engines.protocol import EngineInfo, EngineSpec, Query
from pocketlm_benchmarks.result import Summary
from pocketlm_benchmarks.statistics import summarize


class RunningEngine(Protocol):
    """An engine in its process, as `EngineProcess` is one."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def pid(self) -> int: ...

    def answer(self, queries: Sequence[Query]) -> Answered: ...

    def close(self) -> None: ...


Start = Callable[[EngineSpec], RunningEngine]


@dataclass(frozen=True)
class Loads:
    """Seconds, without the start of the process and its imports."""

    cold_s: float | None  # None where the system does not let go of the files, or the engine does not tell
    warm_s: Summary | None


def load(spec: EngineSpec, start: Start, *, warm: int) -> tuple[RunningEngine, Loads]:
    """The engine, loaded, and how long that took: once cold and `warm` times warm, the last of which stays.

    Raises what `start` raises.
    """
    cold_s = None
    if drop_from_page_cache(Path(spec.weights)):
        engine = start(spec)
        cold_s = engine.info.load_s
        engine.close()
    seconds: list[float] = []
    for _ in range(warm - 1):
        engine = start(spec)
        seconds += [] if engine.info.load_s is None else [engine.info.load_s]
        engine.close()
    engine = start(spec)
    seconds += [] if engine.info.load_s is None else [engine.info.load_s]
    return engine, Loads(cold_s, summarize(seconds) if seconds else None)


def drop_from_page_cache(path: Path) -> bool:
    """Makes the system forget a file's content, or that of all files in a folder.

    True if it did: asked for a page, it would have to read the disk. That can be told on Linux only.
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "preadv") or not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        paths = [each for each in _files(path) if each.stat().st_size]
        for each in paths:
            with each.open("rb") as file:
                os.fsync(file.fileno())  # a page that is not on the disk yet is never dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return bool(paths) and not any(map(_is_cached, paths))
    except OSError:  # a file that may not be read, or a file system that does none of this
        return False


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (each for each in path.rglob("*") if each.is_file())


def _is_cached(path: Path) -> bool:
    """Whether the first or the last page of a file can be read without waiting for the disk."""
    with path.open("rb") as file:
        for offset in (0, path.stat().st_size - 1):
            try:
                os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:  # a file system that cannot tell
                return True
            return True
    return False
