"""How fast this device reads its memory: what bounds decoding, as each token reads all weights once.

The figure is the best of many repetitions, as in STREAM (McCalpin, 1995): whatever else runs can only slow
one down, and each takes milliseconds, so none is fast by chance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocketlm.device import memory
from pocketlm.system import read_text

Bytes = NDArray[np.uint8]

SECONDS = 0.8

_LEAST_REPETITIONS = 3
_LEAST_BUFFER = 256 << 20
_CACHE_FOLD = 4  # how many times larger than all last-level caches together the buffer is
_MEMORY_SHARE = 8  # the buffer takes an eighth of the memory that is free at most
_PASSES = 4  # over the buffer in one run, so that handing it to the threads does not count


def read_rate(threads: int, buffer_bytes: int | None = None, seconds: float = SECONDS) -> float:
    """Bytes a second that `threads` threads read together, measured for `seconds` or a little longer.

    `buffer_bytes` is by default far more than the caches hold. Raises MemoryError without memory for it.
    """
    size = buffer_bytes or buffer_size()
    with ThreadPoolExecutor(threads) as pool:
        # Written, as memory that never was is one page of zeros; and by the threads, so that the system puts
        # it near them where memory has places.
        parts = list(pool.map(lambda _: np.ones(size // threads, np.uint8), range(threads)))
        work = _PASSES * sum(part.nbytes for part in parts)
        return best_rate(work, lambda: read_all(parts, pool), seconds)


def best_rate(
    work: float, run: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Units of `work` a second in the fastest of the runs that fit into `seconds`, three at least.

    One more comes before them, to warm up: threads, pages, frequency.
    """
    run()
    shortest, repetitions, begun = float("inf"), 0, clock()
    end = begun + seconds
    while repetitions < _LEAST_REPETITIONS or begun < end:
        run()
        now = clock()
        shortest, begun, repetitions = min(shortest, now - begun), now, repetitions + 1
    return work / shortest


def buffer_size(root: Path = Path("/")) -> int:
    """Bytes to read so that the caches do not matter; a smaller machine's memory bounds them."""
    caches: dict[tuple[str | None, str | None], int] = {}
    for index in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        if (size := _cache_bytes(read_text(index / "size"))) is not None:
            caches[read_text(index / "level"), read_text(index / "shared_cpu_list")] = size
    last = max((level or "" for level, _ in caches), default="")
    cached = sum(size for (level, _), size in caches.items() if level == last)
    wanted = max(_LEAST_BUFFER, _CACHE_FOLD * cached)
    available = memory(root).available_bytes
    return wanted if available is None else min(wanted, available // _MEMORY_SHARE)


def _cache_bytes(text: str | None) -> int | None:
    """A size as Linux writes it: 512K."""
    number = (text or "").removesuffix("K")
    return int(number) << 10 if number.isdecimal() else None


def read_all(parts: Sequence[Bytes], pool: ThreadPoolExecutor, passes: int = _PASSES) -> int:
    """The largest byte of all parts, each read `passes` times by a thread of its own.

    NumPy's maximum of bytes is vectorized on every processor, costs next to nothing beside the reading, and
    lets go of the interpreter's lock.
    """
    return max(pool.map(lambda part: max(int(part.max()) for _ in range(passes)), parts))
