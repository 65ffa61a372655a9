"""Forward passes of several bundles beside each other: `python -m pocketlm_benchmarks.steps BUNDLE BUNDLE …`.

For changes to graphs, kernels and precisions: nothing is sampled and no text is made. The bundles take turns
of a few passes, so that whatever else the machine does hits all of them alike. Trust the ratios before the
times.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from pocketlm.bundle import open_bundle
from pocketlm.errors import InvalidSettingError, PocketlmError
from pocketlm.kv_cache import KVCache
from pocketlm.session import Session
from pocketlm.threads import thread_count
from pocketlm_benchmarks.prefix_reuse import prefill, random_ids

_PASSES = 8  # of a turn
_WARM_UP = 2  # passes before them: the bundle before has left its weights in the caches

Clock = Callable[[], float]


@dataclass(frozen=True)
class Step:
    """One pass of `rows` tokens, all with logits, behind `depth` others."""

    rows: int
    depth: int

    def __str__(self) -> str:
        return f"{self.rows} {'row' if self.rows == 1 else 'rows'} behind {self.depth:,}"

    @property
    def capacity(self) -> int:
        return self.depth + self.rows

    def seconds(self, subject: Subject, clock: Clock) -> list[float]:
        subject.fill(self.depth)
        ids = subject.ids[self.depth : self.capacity]
        run = partial(subject.session.forward, ids, subject.cache, range(self.rows))
        timed = [_timed(run, subject.cache, clock) for _ in range(_WARM_UP + _PASSES)]
        return timed[_WARM_UP:]


@dataclass(frozen=True)
class Prefill:
    """A prompt of `tokens` in chunks, as the engine computes it."""

    tokens: int

    def __str__(self) -> str:
        return f"prefill of {self.tokens:,}"

    @property
    def capacity(self) -> int:
        return self.tokens

    def seconds(self, subject: Subject, clock: Clock) -> list[float]:
        subject.cache.truncate(0)
        return [_timed(partial(subject.fill, self.tokens), subject.cache, clock)]


Case = Step | Prefill


class Subject:
    """A bundle under measurement, with a cache and tokens to fill it."""

    def __init__(self, folder: Path, capacity: int, threads: int | None) -> None:
        """Raises BundleError, and InvalidSettingError for more tokens than the model was trained for."""
        bundle = open_bundle(folder)
        dimensions = bundle.manifest.dimensions
        if capacity > dimensions.context_length:
            raise InvalidSettingError(
                f"{capacity:,} tokens were asked for, but {bundle.manifest.name} was trained for "
                f"{dimensions.context_length:,}. Ask for fewer."
            )
        threads = thread_count(threads)
        self.session = Session(bundle.graph_path, dimensions, bundle.manifest.graph, threads=threads)
        self.cache = self.session.new_cache(capacity)
        self.ids = random_ids(capacity, dimensions)

    def fill(self, length: int) -> None:
        """Brings the cache to `length` tokens; those that are there stay."""
        self.cache.truncate(length)
        prefill(self.session, self.ids[len(self.cache) : length], self.cache)


def main(
    bundles: Annotated[list[Path], typer.Argument(help="Folders of bundles; ratios are to the first.")],
    rows: Annotated[str, typer.Option(help="Tokens of a pass.")] = "1,2,8",
    depths: Annotated[str, typer.Option(help="Tokens before the pass.")] = "0,512,2048",
    prefills: Annotated[
        str, typer.Option("--prefill", help="Tokens of a prompt; empty for none.")
    ] = "512,2048",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each bundle.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
) -> None:
    """Compare the time of bundles' forward passes."""
    try:
        cases = cases_of(
            _numbers("--rows", rows, 1), _numbers("--depths", depths), _numbers("--prefill", prefills, 1)
        )
        typer.echo(report(bundles, cases, rounds, threads))
    except PocketlmError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


def cases_of(rows: Sequence[int], depths: Sequence[int], prefills: Sequence[int]) -> list[Case]:
    """Every number of rows at every depth, then prompts. Raises InvalidSettingError if that is nothing."""
    cases: list[Case] = [Step(count, depth) for depth in depths for count in rows]
    cases += [Prefill(tokens) for tokens in prefills]
    if not cases:
        raise InvalidSettingError("There is nothing to measure. Give --rows and --depths, or --prefill.")
    return cases


def report(folders: Sequence[Path], cases: Sequence[Case], rounds: int, threads: int | None = None) -> str:
    """The table as text. Raises as Subject."""
    capacity = max(case.capacity for case in cases)
    subjects = [Subject(folder, capacity, threads) for folder in folders]
    medians = [[median(each) for each in measure(case, subjects, rounds)] for case in cases]
    names = [f"{n}  {folder}" for n, folder in enumerate(folders, 1)]
    title = f"threads: {subjects[0].session.threads}, rounds: {rounds}, medians in ms, times faster than 1"
    return "\n".join([title, *names, "", table(cases, medians)])


def measure(
    case: Case, subjects: Sequence[Subject], rounds: int, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Seconds of each subject's passes, the subjects taking turns."""
    seconds: list[list[float]] = [[] for _ in subjects]
    for _ in range(rounds):
        for subject, passes in zip(subjects, seconds, strict=True):
            passes += case.seconds(subject, clock)
    return seconds


def table(cases: Sequence[Case], medians: Sequence[Sequence[float]]) -> str:
    """A line a case, a column a bundle; `medians` are in seconds."""
    heads = [f"{n + 1:>{_width(n)}}" for n in range(len(medians[0]))]
    lines = [" " * 22 + "".join(heads)]
    for case, seconds in zip(cases, medians, strict=True):
        line = f"{case!s:<22}{1e3 * seconds[0]:>{_width(0)},.2f}"
        for each in seconds[1:]:
            line += f"{1e3 * each:>12,.2f} ({seconds[0] / each:.3f}×)"
        lines.append(line)
    return "\n".join(lines)


def _width(column: int) -> int:
    return 21 if column else 12  # with a ratio behind the time, or without


def _timed(run: Callable[[], object], cache: KVCache, clock: Clock) -> float:
    """Seconds that `run` takes; the cache is as long as before afterwards."""
    length = len(cache)
    began = clock()
    run()
    taken = clock() - began
    cache.truncate(length)
    return taken


def _numbers(option: str, text: str, least: int = 0) -> list[int]:
    """Whole numbers from a list with commas. Raises InvalidSettingError for anything else."""
    try:
        numbers = [int(each) for each in text.split(",")] if text else []
    except ValueError:
        numbers = [least - 1]
    if any(number < least for number in numbers):
        raise InvalidSettingError(
            f"{option} is {text!r}; whole numbers from {least} on are expected, with commas between."
        )
    return numbers


if __name__ == "__main__":
    typer.run(main)
