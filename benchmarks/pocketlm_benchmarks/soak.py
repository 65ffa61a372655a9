"""Whether memory grows: `python -m pocketlm_benchmarks.soak BUNDLE [--requests 2000]`.

Many short requests put to one model, in turns of each kind: a conversation, four at once, one cancelled, two
answers to one prompt, a longer prompt, and one that begins as another did. After each hundred, garbage is
collected and the process's memory taken: what is its own, where the system tells that apart from the weights
that it maps.

Caches fill up at first, as they are meant to. So growth is the slope of the least-squares line through the
samples of the second half. The budget for idle conversations is small enough to be used up long before, and
lengths repeat after every fifty requests, so that a hundred later the caches hold as much as they did.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import pocketlm
from pocketlm.engine import Model
from pocketlm.errors import InvalidSettingError, PocketlmError
from pocketlm.manifest import read_manifest
from pocketlm_benchmarks import memory

CONTEXT_LENGTH = 512
CACHE_BYTES = 32 << 20

_SEED = 0
_LEAST_SAMPLES = 4
_ROUNDS = 5  # of ten requests each, until lengths repeat
_MB = 1e6


@dataclass(frozen=True)
class Sample:
    requests: int  # so far
    bytes: int


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    requests: Annotated[int, typer.Option(min=1, help="How many in all.")] = 2000,
    every: Annotated[int, typer.Option(min=1, help="Requests between two samples.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=2, help="For each answer.")] = 8,
    bound_mb: Annotated[float, typer.Option(help="Growth that is no failure, for 1,000 requests.")] = 2.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
) -> None:
    """Answer many requests and see whether memory grows; exit code 1 if it does."""
    try:
        grown_mb = report(bundle, requests, every, max_tokens, typer.echo, threads=threads)
    except PocketlmError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
    if grown_mb > bound_mb:
        typer.echo(f"Memory grew by more than {bound_mb:g} MB per 1,000 requests.", err=True)
        sys.exit(1)


def report(
    bundle: Path,
    requests: int,
    every: int,
    max_tokens: int,
    write: Callable[[str], object],
    *,
    threads: int | None = None,
) -> float:
    """Writes a line for each sample, and the growth. Returns it, in MB per 1,000 requests.

    Raises what `pocketlm.load` raises, and InvalidSettingError for too few samples.
    """
    if requests // every < _LEAST_SAMPLES:
        raise InvalidSettingError(
            f"{requests:,} requests with a sample after every {every:,} make {requests // every} samples; "
            f"at least {_LEAST_SAMPLES} are expected. Ask for more requests, or more often."
        )
    samples = []
    write(f"{'requests':>10}{'MB':>10}")
    with pocketlm.load(
        bundle, context_length=_context_length(bundle), threads=threads, cache_bytes=CACHE_BYTES
    ) as model:
        for sample in soak(model, requests, every, max_tokens):
            samples.append(sample)
            write(f"{sample.requests:>10,}{sample.bytes / _MB:>10.1f}")
    grown_mb = 1000 * growth(samples) / _MB
    write(f"Growth in the second half: {grown_mb:+.2f} MB per 1,000 requests.")
    return grown_mb


def _context_length(bundle: Path) -> int:
    return min(CONTEXT_LENGTH, read_manifest(bundle).dimensions.context_length)


def soak(model: Model, requests: int, every: int, max_tokens: int) -> Iterator[Sample]:
    """Answers at least so many requests, and takes a sample each time that `every` more are done."""
    load = _Load(model, max_tokens)
    done = taken = 0
    while taken < requests // every:
        for kind in load.kinds:
            done += kind()
            if done // every > taken:
                taken = done // every
                gc.collect()
                yield Sample(done, own_bytes())
                if taken >= requests // every:
                    return


def growth(samples: Sequence[Sample]) -> float:
    """Bytes per request: the slope of the least-squares line through the second half of the samples."""
    half = samples[len(samples) // 2 :]
    slope, _ = np.polyfit([each.requests for each in half], [each.bytes for each in half], 1)
    return float(slope)


def own_bytes() -> int:
    """This process's memory without what it maps from files; with it where the system does not say."""
    return memory.own_bytes(os.getpid())


class _Load:
    """Requests of each kind. Prompts are random tokens: what they mean is nothing to memory."""

    def __init__(self, model: Model, max_tokens: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._random = np.random.default_rng(_SEED)
        self._room = model.context_length - max_tokens
        self._beginning = self._ids(self._room // 4)
        self._chat = model.chat()
        self._lengths = cycle(self._room * step // (2 * _ROUNDS) for step in range(1, _ROUNDS + 1))
        self.kinds: tuple[Callable[[], int], ...] = (
            self._turn,
            self._at_once,
            self._cancelled,
            self._answers,
            self._long,
            self._prefix_hit,
        )
        """Each answers requests and returns how many."""

    def _turn(self) -> int:
        if len(self._chat.messages) >= 2 * _ROUNDS:
            self._chat.reset()
        words = " ".join(str(number) for number in self._random.integers(100, 1000, 3))
        self._chat.send(f"Add {words}.", max_tokens=self._max_tokens, overflow="slide")
        return 1

    def _at_once(self) -> int:
        prompts = [self._ids(12) for _ in range(4)]
        streams = [self._model.stream(prompt, max_tokens=self._max_tokens) for prompt in prompts]
        for stream in streams:
            stream.finish()
        return len(streams)

    def _cancelled(self) -> int:
        with self._model.stream(self._ids(12), max_tokens=self._max_tokens, ignore_eos=True) as stream:
            next(stream)
        return 1

    def _answers(self) -> int:
        streams = self._model.streams(
            self._ids(12), 2, max_tokens=self._max_tokens, temperature=0.8, seed=_SEED
        )
        for stream in streams:
            stream.finish()
        return len(streams)

    def _long(self) -> int:
        self._model.generate(self._ids(next(self._lengths)), max_tokens=self._max_tokens)
        return 1

    def _prefix_hit(self) -> int:
        self._model.generate([*self._beginning, *self._ids(4)], max_tokens=self._max_tokens)
        return 1

    def _ids(self, count: int) -> list[int]:
        drawn = self._random.integers(0, self._model.manifest.dimensions.vocabulary, count)
        return [int(token_id) for token_id in drawn]


if __name__ == "__main__":
    typer.run(main)
