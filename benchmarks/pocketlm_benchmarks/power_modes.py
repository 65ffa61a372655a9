"""What the power modes cost: `python -m pocketlm_benchmarks.power_modes BUNDLE`.

A process for each mode, of which one is at work at a time, in turns; figures are medians over the rounds,
ratios those of a round's. Processor time is that of all threads, so it holds what spinning costs; joules are
those of this device's most trusted probe.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, get_args

import typer

from pocketlm.bundle import open_bundle
from pocketlm.cli import console
from pocketlm.energy import Kind, Probe, find_probe
from pocketlm.power import Power, PowerMode, power
from pocketlm.session import Session
from pocketlm.tuning import find_tuning
from pocketlm_benchmarks.conditions import Conditions

MODES: tuple[PowerMode, ...] = get_args(PowerMode)
REFERENCE: PowerMode = "fast"

PROMPT, CHUNK = 256, 128
ROWS = 4  # drafts and the token before them, verified in one pass
PAUSE_S = 0.3


@dataclass(frozen=True)
class Round:
    """Seconds for a token, on the clock and of processor time, and what a pause costs."""

    prefill_s: float
    decode_s: float
    prefill_cpu_s: float
    decode_cpu_s: float
    rows_cpu_s: float  # for a pass over ROWS tokens
    pause_cpu_s: float  # in PAUSE_S without work, right behind a pass
    decode_j: float | None


@dataclass(frozen=True)
class Started:
    """What a mode's process says first."""

    power: Power
    energy_source: str
    energy_kind: Kind


class _Worker:
    """One mode, measured in the process that it is made in."""

    def __init__(self, session: Session, probe: Probe, tokens: int) -> None:
        self._session = session
        self._probe = probe
        self._tokens = tokens
        self._cache = session.new_cache(PROMPT + max(tokens, ROWS))

    def round(self) -> Round:
        prefill_s, prefill_cpu_s = _timed(self._prefill)
        window, decoded, decode_s, decode_cpu_s = self._probe.begin(), 0, 0.0, 0.0
        while not decoded or decode_s < self._probe.least_window_s:
            self._cache.truncate(PROMPT)
            elapsed_s, cpu_s = _timed(self._decode)
            decoded += self._tokens
            decode_s += elapsed_s
            decode_cpu_s += cpu_s
        energy_j = window.end().energy_j
        _, rows_cpu_s = _timed(self._verify)
        _, pause_cpu_s = _timed(lambda: time.sleep(PAUSE_S))
        return Round(
            prefill_s=prefill_s / PROMPT,
            decode_s=decode_s / decoded,
            prefill_cpu_s=prefill_cpu_s / PROMPT,
            decode_cpu_s=decode_cpu_s / decoded,
            rows_cpu_s=rows_cpu_s / self._tokens,
            pause_cpu_s=pause_cpu_s,
            decode_j=None if energy_j is None else energy_j / decoded,
        )

    def _prefill(self) -> None:
        self._cache.truncate(0)
        for start in range(0, PROMPT, CHUNK):
            self._session.forward([0] * min(CHUNK, PROMPT - start), self._cache)

    def _decode(self) -> None:
        for _ in range(self._tokens):
            self._session.forward([0], self._cache)

    def _verify(self) -> None:
        for _ in range(self._tokens):
            self._cache.truncate(PROMPT)
            self._session.forward([0] * ROWS, self._cache, range(ROWS))


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds on the clock and of this process's processor time, all threads together."""
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun_s, time.process_time() - begun_cpu_s


def _serve(connection: Connection, folder: Path, mode: PowerMode, tokens: int) -> None:
    """A mode's process: a round for each message, until the other end closes."""
    bundle = open_bundle(folder, verify=False)
    manifest = bundle.manifest
    chosen = power(mode, tuning=find_tuning(manifest))
    session = Session(
        bundle.graph_path,
        manifest.dimensions,
        manifest.graph,
        threads=chosen.threads,
        spin_us=chosen.spin_us,
    )
    probe = find_probe().probe
    worker = _Worker(session, probe, tokens)
    worker.round()  # warms up
    connection.send(Started(chosen, probe.source, probe.kind))
    with suppress(EOFError):
        while True:
            connection.recv()
            connection.send(worker.round())
    probe.close()


def measure(
    folder: Path, *, rounds: int, tokens: int, modes: Sequence[PowerMode] = MODES
) -> tuple[dict[PowerMode, Started], dict[PowerMode, list[Round]], list[str]]:
    """What each mode is here, its rounds, and what could have spoiled them.

    Raises what opening the bundle raises.
    """
    open_bundle(folder, verify=False)  # says what is wrong here, not in a process of its own
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        connections: dict[PowerMode, Connection] = {}
        started: dict[PowerMode, Started] = {}
        processes = []
        for mode in modes:
            connections[mode], theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, folder, mode, tokens), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies is an end of file here
            processes.append(process)
            stack.callback(process.join)
            stack.callback(connections[mode].close)
            started[mode] = connections[mode].recv()
        conditions = Conditions(lambda: [process.pid for process in processes if process.pid is not None])
        measured: dict[PowerMode, list[Round]] = {mode: [] for mode in modes}
        for _ in range(rounds):
            for mode, connection in connections.items():
                connection.send(True)
                measured[mode].append(connection.recv())
        flags = conditions.flags()
    return started, measured, flags


def median(rounds: Sequence[Round], of: Callable[[Round], float | None]) -> float | None:
    """Over the rounds; None if one of them lacks it."""
    values = [value for each in rounds if (value := of(each)) is not None]
    return statistics.median(values) if len(values) == len(rounds) else None


def ratio(rounds: Sequence[Round], others: Sequence[Round], of: Callable[[Round], float]) -> float:
    """The median of a round's value over that of the other mode's round in the same turn."""
    return statistics.median(of(each) / of(other) for each, other in zip(rounds, others, strict=True))


def main(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Turns of each mode.")] = 7,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens decoded at a time.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print every round as JSON.")] = False,
) -> None:
    """Tokens a second, processor time and joules for a token in each power mode."""
    started, measured, flags = measure(bundle, rounds=rounds, tokens=tokens)
    if as_json:
        console.write_json(
            {
                mode: {
                    **dataclasses.asdict(started[mode]),
                    "rounds": [dataclasses.asdict(each) for each in measured[mode]],
                }
                for mode in measured
            }
        )
    else:
        print_table(started, measured)
    for flag in flags:
        console.note(flag)


def print_table(started: Mapping[PowerMode, Started], measured: Mapping[PowerMode, Sequence[Round]]) -> None:
    """One line a mode, with ratios to REFERENCE."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in (
        *("MODE", "THREADS", "SPIN", "PREFILL", "DECODE", f"TO {REFERENCE.upper()}"),
        *("CPU", f"TO {REFERENCE.upper()}", "ENERGY", f"CPU, {ROWS} ROWS", "CPU, PAUSE"),
    ):
        table.add_column(heading, justify="left" if heading == "MODE" else "right", no_wrap=True)
    for mode, rounds in measured.items():
        chosen, reference = started[mode].power, measured[REFERENCE]
        table.add_row(
            mode,
            str(chosen.threads),
            {None: "default", 0: "none"}.get(chosen.spin_us, f"{chosen.spin_us} µs"),
            _format(median(rounds, lambda each: 1 / each.prefill_s), "{:,.0f} tok/s"),
            _format(median(rounds, lambda each: 1 / each.decode_s), "{:.1f} tok/s"),
            f"{1 / ratio(rounds, reference, lambda each: each.decode_s):.2f}",
            _format(median(rounds, lambda each: 1000 * each.decode_cpu_s), "{:.1f} ms/tok"),
            f"{ratio(rounds, reference, lambda each: each.decode_cpu_s):.2f}",
            _format(median(rounds, lambda each: each.decode_j), "{:.3f} J/tok"),
            _format(median(rounds, lambda each: 1000 * each.rows_cpu_s), "{:.1f} ms"),
            _format(median(rounds, lambda each: 1000 * each.pause_cpu_s), "{:.1f} ms"),
        )
    console.out().print(table)
    first = next(iter(started.values()))
    console.write(
        f"\nCPU is processor time for a decoded token, and for a pause of {PAUSE_S:g} s behind a pass. "
        f"Energy of decoding: {first.energy_source}, {first.energy_kind}.\n"
    )


def _format(value: float | None, how: str) -> str:
    return "–" if value is None else how.format(value)


if __name__ == "__main__":
    typer.run(main)
