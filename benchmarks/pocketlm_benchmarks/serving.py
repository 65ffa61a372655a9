"""A server under load: `python -m pocketlm_benchmarks.serving load URL|BUNDLE [--against URL]` and
`python -m pocketlm_benchmarks.serving soak URL|BUNDLE --minutes 10`.

load   so many clients at once, each asking for one streamed answer after the other; servers take turns in
       each round. Time to first token as a client sees it, time for each further token (both as p50 and p99
       of all requests), tokens of all answers per second, what was refused, and, of a server on this machine,
       its processor's time for a token and its memory.
soak   streams, whole answers, clients that go away, that read slowly or talk nonsense, JSON schemas,
       embeddings and conversations, for minutes. Exit code 1 if memory grows, or if p99 of the time to first
       token leaves its bound in any stretch.

For llama-server: `llama-server -m FILE.gguf -t THREADS -np 8 -c 8192 --port 8080`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import typer

from pocketlm.errors import PocketlmError
from pocketlm_benchmarks.plain_table import plain_table
from pocketlm_benchmarks.result import OURS
from pocketlm_benchmarks.serving_client import Answered
from pocketlm_benchmarks.serving_process import Served, served
from pocketlm_benchmarks.serving_soak import Sample, Soak
from pocketlm_benchmarks.serving_soak import soak as run_soak

app = typer.Typer(add_completion=False, help="A server under load.")

_JSON = typer.Option("--json", help="Print JSON instead of a table.")
_OPTIONS = typer.Option(help="More options of `pocketlm serve` for a BUNDLE, as one text.")
_WHERE = typer.Argument(metavar="URL|BUNDLE", help="A server, or a bundle to serve.")


@dataclass
class Cell:
    """All rounds of one server with so many clients."""

    server: str
    clients: int
    answers: list[Answered] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float | None = 0.0
    own_bytes: int | None = None

    def figures(self) -> dict[str, float | int | str | None]:
        """Units are in the names; None where there is nothing to tell."""
        good = [each for each in self.answers if each.ok]
        tokens = sum(each.tokens for each in good)
        return {
            "server": self.server,
            "clients": self.clients,
            "ttft_p50_s": _percentile([each.ttft_s for each in good], 50),
            "ttft_p99_s": _percentile([each.ttft_s for each in good], 99),
            "token_p50_s": _percentile([each.token_s for each in good], 50),
            "token_p99_s": _percentile([each.token_s for each in good], 99),
            "tokens_per_s": tokens / self.wall_s if self.wall_s else None,
            "answers": len(good),
            "refused": sum(each.status == 503 for each in self.answers),
            "failed": sum(each.status not in (200, 503) for each in self.answers),
            "cpu_s_per_token": self.cpu_s / tokens if self.cpu_s is not None and tokens else None,
            "own_bytes": self.own_bytes,
        }


@app.command()
def load(
    where: Annotated[str, _WHERE],
    against: Annotated[str, typer.Option(help="Other servers: URLs, separated by commas.")] = "",
    clients: Annotated[str, typer.Option(help="Numbers of clients.")] = "1,8,64",
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    requests: Annotated[int, typer.Option(min=1, help="For each client, in a round.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=2, help="For each answer.")] = 64,
    options: Annotated[str, _OPTIONS] = "",
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Many clients at once, on one server or on several in turns."""
    try:
        numbers = [int(number) for number in clients.split(",")]
        peers = [url for url in against.split(",") if url]
        with ExitStack() as stack:
            servers = [stack.enter_context(served(OURS, where, options.split()))]
            servers += [stack.enter_context(served(url, url)) for url in peers]
            cells = asyncio.run(measure(servers, numbers, rounds, requests, max_tokens))
    except PocketlmError as error:
        _fail(f"Error: {error}")
    typer.echo(json.dumps([cell.figures() for cell in cells]) if as_json else table(cells))


async def measure(
    servers: Sequence[Served], numbers: Sequence[int], rounds: int, requests: int, max_tokens: int
) -> list[Cell]:
    """`numbers` of clients on each server, in turns."""
    cells = {(number, server.name): Cell(server.name, number) for number in numbers for server in servers}
    for server in servers:
        await _client(server, 0, 1, 2)  # the first answer loads what is loaded late
    for round_ in range(rounds):
        for number in numbers:
            for server in servers[:: -1 if round_ % 2 else 1]:
                await _add(cells[number, server.name], server, requests, max_tokens, seed=round_)
    return list(cells.values())


async def _add(cell: Cell, server: Served, requests: int, max_tokens: int, seed: int) -> None:
    cpu_before, begun = server.cpu_s, time.perf_counter()
    asking = (_client(server, 1000 * seed + number, requests, max_tokens) for number in range(cell.clients))
    for answers in await asyncio.gather(*asking):
        cell.answers += answers
    cell.wall_s += time.perf_counter() - begun
    cpu_after = server.cpu_s
    if cpu_before is None or cpu_after is None or cell.cpu_s is None:
        cell.cpu_s = None
    else:
        cell.cpu_s += cpu_after - cpu_before
    cell.own_bytes = server.own_bytes


async def _client(server: Served, number: int, requests: int, max_tokens: int) -> list[Answered]:
    """One answer after the other. Each prompt is its own, so that no cache has it."""
    answers = []
    for request in range(requests):
        content = (
            f"Person {number}, question {request}: tell a story about the number {number * 7 + request}."
        )
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
        answers.append(await server.client.chat({**body, "temperature": 0.0, "ignore_eos": True}))
    return answers


def table(cells: Sequence[Cell]) -> str:
    names = (
        "ttft p50",
        "p99",
        "ms/token p50",
        "p99",
        "tok/s",
        "answers",
        "503",
        "failed",
        "CPU ms/token",
        "MB",
    )
    rows = [["server", "clients", *names]]
    for each in (cell.figures() for cell in cells):
        times = (_ms(each[name]) for name in ("ttft_p50_s", "ttft_p99_s", "token_p50_s", "token_p99_s"))
        counts = (str(each[name]) for name in ("answers", "refused", "failed"))
        rate, cpu, own = each["tokens_per_s"], _ms(each["cpu_s_per_token"]), _mb(each["own_bytes"])
        rows.append([str(each["server"]), str(each["clients"]), *times, _number(rate), *counts, cpu, own])
    return plain_table(rows)


@app.command()
def soak(
    where: Annotated[str, _WHERE],
    minutes: Annotated[float, typer.Option(min=0.01)] = 10.0,
    samples: Annotated[int, typer.Option(min=4, help="Stretches, each with its figures.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=2, help="For each answer.")] = 24,
    bound_mb: Annotated[float, typer.Option(help="Growth a minute that is no failure.")] = 1.0,
    bound_ttft_s: Annotated[float, typer.Option(help="p99 of the time to first token.")] = 5.0,
    options: Annotated[str, _OPTIONS] = "--cache-memory 64MB",
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Everything that clients do, for minutes; exit code 1 if memory grows or answers become slow."""

    def told(sample: Sample) -> None:
        if not as_json:
            typer.echo(_line(sample))

    if not as_json:
        typer.echo(f"{'s':>8}{'MB':>10}{'requests':>10}{'ttft p50 ms':>13}{'p99 ms':>10}")
    seconds = 60 * minutes
    try:
        with served(OURS, where, options.split()) as server:
            result = asyncio.run(run_soak(server, seconds, seconds / samples, max_tokens, told))
    except PocketlmError as error:
        _fail(f"Error: {error}")
    typer.echo(json.dumps(as_object(result)) if as_json else summary(result))
    problems = failures(result, bound_mb, bound_ttft_s)
    if problems:
        _fail("\n".join(problems))


def as_object(result: Soak) -> dict[str, object]:
    return {
        "samples": [dataclasses.asdict(each) for each in result.samples],
        "requests": dict(result.requests),
        "errors": dict(result.errors),
        "growth_mb_per_min": result.growth_mb_per_min,
        "worst_p99_s": result.worst_p99_s,
    }


def summary(result: Soak) -> str:
    growth = result.growth_mb_per_min
    kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(result.requests.items()))
    errors = ", ".join(f"{count:,} {name}" for name, count in sorted(result.errors.items())) or "none"
    grown = "unknown" if growth is None else f"{growth:+.2f} MB a minute"
    return f"Requests: {kinds}.\nErrors: {errors}.\nGrowth in the second half: {grown}."


def failures(result: Soak, bound_mb: float, bound_ttft_s: float) -> list[str]:
    """What is out of its bounds. Memory that nobody can tell is no failure; errors of requests are."""
    growth, worst = result.growth_mb_per_min, result.worst_p99_s
    problems = []
    if growth is not None and growth > bound_mb:
        problems.append(f"Memory grew by {growth:.2f} MB a minute; {bound_mb:g} is the bound.")
    if worst is None:
        problems.append("No answer ever began.")
    elif worst > bound_ttft_s:
        problems.append(f"p99 of the time to first token was {worst:.2f} s; {bound_ttft_s:g} s is the bound.")
    if result.errors:
        problems.append(f"{sum(result.errors.values()):,} requests went wrong.")
    return problems


def _line(sample: Sample) -> str:
    times = f"{_ms(sample.ttft_p50_s):>13}{_ms(sample.ttft_p99_s):>10}"
    return f"{sample.at_s:>8.0f}{_mb(sample.own_bytes):>10}{sample.requests:>10,}{times}"


def _percentile(values: Sequence[float | None], percent: int) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.percentile(known, percent)) if known else None


def _ms(seconds: float | int | str | None) -> str:
    return "-" if seconds is None else f"{1000 * float(seconds):.1f}"


def _mb(size: float | int | str | None) -> str:
    return "-" if size is None else f"{float(size) / 1e6:.1f}"


def _number(value: float | int | str | None) -> str:
    return "-" if value is None else f"{float(value):.1f}"


def _fail(message: str) -> None:
    typer.echo(message, err=True)
    sys.exit(1)


if __name__ == "__main__":
    app()
