"""Which answers stay the same: `python -m pocketlm_benchmarks.determinism BUNDLE`.

Every prompt of the shipped workloads is answered greedily and with a seed: alone, from an empty cache and
without speculation, and then in other ways that must not matter. The table says how many answers are the
same, token for token, and where the others part, for a model as it is loaded by default and for one that is
loaded with `reproducible=True`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from pocketlm import Model, PocketlmError, Settings, Stream
from pocketlm.bundle import open_bundle
from pocketlm_benchmarks.workloads import load_workload, workload_names

CONTEXT_LENGTH = 2048

Ids = tuple[int, ...]
Way = Callable[[Model, Sequence[Sequence[int]], Settings], list[Ids]]
"""Answers all prompts."""


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    prompts: Annotated[int | None, typer.Option(min=1, help="Only so many of them.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="At most, for each answer.")] = 128,
) -> None:
    """Count the answers that are the same however they are computed."""
    try:
        typer.echo("\n".join(lines(bundle, prompts, new_tokens)))
    except PocketlmError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


def lines(folder: Path, prompts: int | None, new_tokens: int) -> Iterator[str]:
    """The table, line by line."""
    for reproducible in (False, True):
        with Model(open_bundle(folder), context_length=CONTEXT_LENGTH, reproducible=reproducible) as model:
            some = [
                model.tokenizer.encode_chat(prompt)
                for name in workload_names()
                for prompt in load_workload(name).prompts
            ][:prompts]
            some = [ids for ids in some if len(ids) + new_tokens <= CONTEXT_LENGTH]
            yield f"{'reproducible' if reproducible else 'default'}, {len(some)} prompts"
            for seed in (None, 1):
                sampled: Settings = {} if seed is None else {"temperature": 0.8, "top_p": 0.95, "seed": seed}
                settings: Settings = {"max_tokens": new_tokens, **sampled}
                alone = one_by_one(model, some, {**settings, "speculate": False, "cache_prompt": False})
                for name, (way, more) in WAYS.items():
                    answers = way(model, some, {**settings, **more})
                    how = "greedy" if seed is None else "sampled"
                    yield f"  {how:8} {name:24} {compared(alone, answers)}"


def one_by_one(model: Model, prompts: Sequence[Sequence[int]], settings: Settings) -> list[Ids]:
    return [model.generate(ids, **settings).token_ids for ids in prompts]


def twice(model: Model, prompts: Sequence[Sequence[int]], settings: Settings) -> list[Ids]:
    """Each prompt behind another one that shares its beginning."""
    answers = []
    for ids in prompts:
        model.generate(ids[: 2 * len(ids) // 3], max_tokens=1)
        answers.append(model.generate(ids, **settings).token_ids)
    return answers


def together(model: Model, prompts: Sequence[Sequence[int]], settings: Settings) -> list[Ids]:
    """Eight at a time."""
    answers: list[Ids] = []
    for begin in range(0, len(prompts), 8):
        streams: list[Stream] = [model.stream(ids, **settings) for ids in prompts[begin : begin + 8]]
        answers += [stream.finish().token_ids for stream in streams]
    return answers


WAYS: dict[str, tuple[Way, Settings]] = {
    "part of the prompt cached": (twice, {"speculate": False}),
    "eight at once": (together, {"speculate": False, "cache_prompt": False}),
    "speculation": (one_by_one, {"cache_prompt": False}),
    "all of these": (together, {}),
}


def compared(these: Sequence[Ids], those: Sequence[Ids]) -> str:
    same = sum(one == other for one, other in zip(these, those, strict=True))
    text = f"{same} of {len(these)} the same"
    apart = [_first_difference(one, other) for one, other in zip(these, those, strict=True) if one != other]
    return f"{text}, the others part at token {median(apart):.0f} (median)" if apart else text


def _first_difference(one: Ids, other: Ids) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return 1 + next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


if __name__ == "__main__":
    typer.run(main)
