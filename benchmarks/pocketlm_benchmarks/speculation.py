"""What speculation gains: `python -m pocketlm_benchmarks.speculation BUNDLE [--against llama.cpp=FILE]`.

The prompts of the shipped workloads, each answered to the model's own end, with speculation and without, one
after the other in each round; a peer makes as many tokens from the same prompt. Rates are those of decoding,
the tokens behind the first, and a workload's is that of all its tokens together.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from pocketlm import Completion, Model, PocketlmError
from pocketlm.bundle import open_bundle
from pocketlm.threads import thread_count
from pocketlm_benchmarks.engines.process import EngineProcess
from pocketlm_benchmarks.engines.protocol import EngineSpec, Query
from pocketlm_benchmarks.engines.registry import parse_against
from pocketlm_benchmarks.plain_table import plain_table, ratio
from pocketlm_benchmarks.workloads import load_workload

ORDINARY = ("chat",)
REPEATING = ("summarize", "extract", "code-edit")
CONTEXT_LENGTH = 2048


@dataclass
class Tally:
    """Tokens behind the first and the seconds for them, a pair for each round."""

    tokens: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, round_: int, tokens: int, seconds: float) -> None:
        self.tokens[round_] += tokens
        self.seconds[round_] += seconds

    def rates(self) -> list[float]:
        return [self.tokens[each] / self.seconds[each] for each in self.tokens]


@dataclass
class Measured:
    """One workload."""

    off: Tally = field(default_factory=Tally)
    on: Tally = field(default_factory=Tally)
    peers: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    drafted: int = 0
    accepted: int = 0
    answers: int = 0
    different: int = 0  # of the answers, with another text than without speculation


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    against: Annotated[str, typer.Option(help="Peers, as of `pocketlm bench`.")] = "",
    peer_python: Annotated[str | None, typer.Option(help="The interpreter that has the peers.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="At most, for each answer.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
) -> None:
    """Compare answers with speculation to those without, and to a peer's."""
    try:
        typer.echo(report(bundle, against, peer_python, rounds, new_tokens, thread_count(threads)))
    except PocketlmError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


def report(
    folder: Path, against: str, peer_python: str | None, rounds: int, new_tokens: int, threads: int
) -> str:
    """The table as text."""
    with ExitStack() as stack:
        model = stack.enter_context(
            Model(open_bundle(folder), context_length=CONTEXT_LENGTH, threads=threads)
        )
        peers = {
            peer.kind: stack.enter_context(
                EngineProcess(EngineSpec(peer.kind, peer.weights, threads, CONTEXT_LENGTH, peer_python))
            )
            for peer in (parse_against(against) if against else [])
        }
        measured = {name: measure(model, name, peers, rounds, new_tokens) for name in (*ORDINARY, *REPEATING)}
    return table(measured)


def measure(
    model: Model, name: str, peers: dict[str, EngineProcess], rounds: int, new_tokens: int
) -> Measured:
    measured = Measured()
    for round_ in range(rounds):
        for prompt in load_workload(name).prompts:
            ids = model.tokenizer.encode_chat(prompt)
            answers = {}
            for speculate in (False, True) if round_ % 2 else (True, False):
                answers[speculate] = answer(model, ids, new_tokens, speculate=speculate)
            for speculate, tally in ((False, measured.off), (True, measured.on)):
                count = len(answers[speculate].token_ids)
                tally.add(round_, count - 1, answers[speculate].timings.decode_s)
            with_drafts = answers[True]
            measured.drafted += with_drafts.timings.drafted_tokens
            measured.accepted += with_drafts.timings.accepted_tokens
            measured.answers += 1
            measured.different += with_drafts.text != answers[False].text
            for kind, process in peers.items():
                query = Query(tuple(ids), max(2, len(with_drafts.token_ids)), tuple(prompt))
                for trace in process.answer([query]).traces:
                    if trace.decode_s:
                        measured.peers[kind].add(round_, trace.decode_tokens, trace.decode_s)
    return measured


def answer(model: Model, ids: list[int], new_tokens: int, *, speculate: bool) -> Completion:
    return model.generate(ids, max_tokens=new_tokens, speculate=speculate, cache_prompt=False)


def table(measured: dict[str, Measured]) -> str:
    kinds = list(next(iter(measured.values())).peers)
    head = ["workload", "off tok/s", "on tok/s", "on / off", "accepted", "same text"]
    rows = [[*head, *(f"on / {kind}" for kind in kinds)]]
    for name, each in measured.items():
        off, on = each.off.rates(), each.on.rates()
        agreed = f"{each.accepted / each.drafted:.0%} of {each.drafted:,}" if each.drafted else "no drafts"
        row = [name, f"{median(off):.1f}", f"{median(on):.1f}", ratio(on, off), agreed]
        row.append(f"{each.answers - each.different} of {each.answers}")
        rows.append(row + [ratio(on, each.peers[kind].rates()) for kind in kinds])
    return plain_table(rows)


if __name__ == "__main__":
    typer.run(main)
