"""Ways to have a prompt's keys and values: `python -m pocketlm_benchmarks.prefix_reuse BUNDLE`.

Four ways to the same cache, one after the other in each round, each into memory that was never written:

prefill    computing them, as of a prompt that nothing is known of
load       reading and checking a file that was saved, then restoring from it
restore    finding them in the store of prefixes, and copying
fork       copying them from another sequence's cache

The first multiplies each token with all weights, the others move its results. The file was written just
before and is in the system's cache; a disk's own time would come on top.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

from pocketlm.bundle import open_bundle
from pocketlm.errors import InvalidSettingError, PocketlmError
from pocketlm.files import readable_size
from pocketlm.kv_cache import KVCache
from pocketlm.manifest import Dimensions
from pocketlm.prefill import PREFILL_CHUNK, passes
from pocketlm.prefix_store import PrefixStore, StoredPrefix
from pocketlm.saved_prefix import fingerprint, load, save
from pocketlm.session import Session
from pocketlm.threads import thread_count

Way = Callable[[KVCache], None]
"""Fills an empty cache."""

_SEED = 0


class DifferentError(PocketlmError):
    """A way to fill a cache did not give the same bits as prefilling."""


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    tokens: Annotated[int, typer.Option(min=2, help="Length of the prefix.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each way is measured.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
) -> None:
    """Compare prefilling a prefix with loading, restoring and forking it."""
    try:
        typer.echo(report(bundle, tokens, rounds, threads))
    except PocketlmError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


def report(folder: Path, tokens: int, rounds: int, threads: int | None = None) -> str:
    """The table as text. Raises BundleError, InvalidSettingError and DifferentError."""
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    if tokens > manifest.dimensions.context_length:
        raise InvalidSettingError(
            f"{tokens:,} tokens were asked for, but {manifest.name} was trained for "
            f"{manifest.dimensions.context_length:,}. Ask for fewer."
        )
    session = Session(bundle.graph_path, manifest.dimensions, manifest.graph, threads=thread_count(threads))
    with tempfile.TemporaryDirectory() as scratch:
        tied_to = fingerprint(manifest)
        source = session.new_cache(tokens)
        prefill(session, random_ids(tokens, manifest.dimensions), source)
        ways = ways_to(session, source, Path(scratch) / "prefix", tied_to)
        seconds = measure(ways, source, lambda: session.new_cache(tokens), rounds)
        size = readable_size((Path(scratch) / "prefix").stat().st_size)
    title = f"{tokens:,} tokens of {tied_to}, {size}, threads: {session.threads}, rounds: {rounds}"
    return f"{title}\n\n{table(seconds)}"


def random_ids(count: int, dimensions: Dimensions) -> list[int]:
    """The same ids for the same vocabulary; what they mean is nothing to the time."""
    drawn = np.random.default_rng(_SEED).integers(0, dimensions.vocabulary, count)
    return [int(token_id) for token_id in drawn]


def prefill(session: Session, ids: Sequence[int], cache: KVCache) -> None:
    """Computes `ids` into the empty cache, in chunks as the engine does."""
    for start, end in passes(0, len(ids), PREFILL_CHUNK):
        session.forward(ids[start:end], cache)


def ways_to(session: Session, source: KVCache, path: Path, tied_to: str) -> dict[str, Way]:
    """The ways to what `source` holds; `path` is where a file of it is written."""
    ids, length = list(source.ids), len(source)
    prefix = StoredPrefix.of(source, length)
    store = PrefixStore(prefix.bytes)
    store.put(prefix)
    save(path, prefix, tied_to)

    def from_store(cache: KVCache) -> None:
        if best := store.best(ids):
            found, shared = best
            store.restore(found, cache, shared)

    return {
        "prefill": lambda cache: prefill(session, ids, cache),
        "load": lambda cache: store.restore(load(path, tied_to, session.dimensions), cache, length),
        "restore": from_store,
        "fork": lambda cache: cache.copy_from(source, length),
    }


def measure(
    ways: Mapping[str, Way], source: KVCache, new_cache: Callable[[], KVCache], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each way in each round.

    Raises DifferentError if one gives other ids, keys or values than `source` has.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, fill in ways.items():
            cache = new_cache()
            began = time.perf_counter()
            fill(cache)
            seconds[name].append(time.perf_counter() - began)
            _check(name, cache, source)
    return seconds


def table(seconds: Mapping[str, Sequence[float]]) -> str:
    """Medians and extremes in milliseconds, and how many times faster than the first way each is."""
    first = median(next(iter(seconds.values())))
    lines = [f"{'way':<10}{'median ms':>12}{'min ms':>10}{'max ms':>10}{'times faster':>15}"]
    for name, each in seconds.items():
        times = "".join(f"{1e3 * value:>{width},.1f}" for value, width in _columns(each))
        lines.append(f"{name:<10}{times}{first / median(each):>15,.1f}")
    return "\n".join(lines)


def _columns(seconds: Sequence[float]) -> list[tuple[float, int]]:
    return [(median(seconds), 12), (min(seconds), 10), (max(seconds), 10)]


def _check(name: str, cache: KVCache, source: KVCache) -> None:
    length = len(source)
    same = cache.ids == source.ids and cache.settled == source.settled
    if not same or not np.array_equal(cache.buffer[..., :length, :], source.buffer[..., :length, :]):
        raise DifferentError(
            f"{name} gave other keys and values than the same prefix had before. Something is broken: please "
            "report it with the model and the processor."
        )


if __name__ == "__main__":
    typer.run(main)
