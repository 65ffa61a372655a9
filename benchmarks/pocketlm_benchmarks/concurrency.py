"""Answers at once: `python -m pocketlm_benchmarks.concurrency BUNDLE [--against server=URL]`.

The same chat prompts put to an engine one, two, four … at a time; tokens of all answers per second, from
handing the prompts over to the last token. Engines take turns in each round. Speculation is off, as it is
for answers that are computed together. For llama-server, as many slots as answers at once:
`llama-server -m FILE.gguf -t THREADS -np 8 -c 8192`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from pocketlm import PocketlmError
from pocketlm.bundle import open_bundle
from pocketlm.threads import thread_count
from pocketlm.tokenizer import Tokenizer
from pocketlm_benchmarks.engines.process import EngineProcess
from pocketlm_benchmarks.engines.protocol import EngineSpec, Query
from pocketlm_benchmarks.engines.registry import parse_against
from pocketlm_benchmarks.plain_table import plain_table, ratio
from pocketlm_benchmarks.result import OURS
from pocketlm_benchmarks.workloads import load_workload

CONTEXT_LENGTH = 1024

Rates = dict[str, dict[int, list[float]]]
"""Tokens per second by engine and answers at once, one for each round."""


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    against: Annotated[str, typer.Option(help="Peers, as of `pocketlm bench`.")] = "",
    peer_python: Annotated[str | None, typer.Option(help="The interpreter that has the peers.")] = None,
    at_once: Annotated[str, typer.Option(help="Numbers of answers.")] = "1,2,4,8",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="For each answer.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
) -> None:
    """Compare the throughput of several answers at once with that of one."""
    numbers = [int(number) for number in at_once.split(",")]
    try:
        typer.echo(
            table(measure(bundle, against, peer_python, numbers, rounds, new_tokens, thread_count(threads)))
        )
    except PocketlmError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


def measure(
    folder: Path,
    against: str,
    peer_python: str | None,
    numbers: list[int],
    rounds: int,
    new_tokens: int,
    threads: int,
) -> Rates:
    bundle = open_bundle(folder)
    tokenizer = Tokenizer(bundle.tokenizer_json, bundle.chat_template, bundle.manifest.tokens)
    # Without the messages: they would switch our speculation on.
    queries = [
        Query(tuple(tokenizer.encode_chat(prompt)), new_tokens) for prompt in load_workload("batch").prompts
    ]
    weights = {OURS: str(folder)}
    weights |= {peer.kind: peer.weights for peer in (parse_against(against) if against else [])}
    rates: Rates = {kind: defaultdict(list) for kind in weights}
    with ExitStack() as stack:
        engines = {
            kind: stack.enter_context(
                EngineProcess(
                    EngineSpec(kind, path, threads, CONTEXT_LENGTH, None if kind == OURS else peer_python)
                )
            )
            for kind, path in weights.items()
        }
        for engine in engines.values():
            engine.answer(queries[:1])
        for _ in range(rounds):
            for number in numbers:
                some = (queries * (1 + number // len(queries)))[:number]
                for kind, engine in engines.items():
                    rates[kind][number].append(number * new_tokens / engine.answer(some).wall_s)
    return rates


def table(rates: Rates) -> str:
    ours = rates[OURS]
    rows = [
        ["at once", *(f"{kind} tok/s" for kind in rates), "× one", *(f"× {k}" for k in rates if k != OURS)]
    ]
    for number in ours:
        row = [str(number), *(f"{median(each[number]):.1f}" for each in rates.values())]
        row.append(ratio(ours[number], ours[min(ours)]))
        rows.append(row + [ratio(ours[number], rates[kind][number]) for kind in rates if kind != OURS])
    return plain_table(rows)


if __name__ == "__main__":
    typer.run(main)
