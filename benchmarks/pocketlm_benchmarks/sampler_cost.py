"""What choosing a token costs, for each kind of setting: `python -m pocketlm_benchmarks.sampler_cost`.

A decode step computes one row of logits and chooses from it, so each figure adds to every token's time. Exact
choices need the exponential of every logit only where the likely ones leave something undecided (see
`pocketlm.distribution`); log-probabilities always do.

The rows have the shape that language models give them: mostly noise that is about normal, far below a few
likely tokens whose logits fall with the logarithm of their rank (Zipf). A figure is the median over rows of
each row's fastest of several repetitions, as whatever else runs can only slow one down.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from pocketlm.distribution import Floats
from pocketlm.sampling import Sampler, Sampling

VOCABULARIES = (49_152, 262_144)
ROWS, REPETITIONS = 24, 15
PROMPT_TOKENS = 512

_SPREAD = 4.0  # standard deviation of the noise, in nats
_PEAK = 22.0  # the likeliest token above the noise's mean, in nats
_FALL = 3.0  # nats by which a likely token's logit falls while its rank grows e-fold
_LIKELY = 300  # tokens, where the two meet


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    sampling: Sampling
    top_logprobs: int | None = None


CASES = (
    Case("greedy", Sampling()),
    Case("greedy, logprob", Sampling(), 0),
    Case("greedy, 20 top logprobs", Sampling(), 20),
    Case("temperature 1", Sampling(temperature=1.0, seed=0)),
    Case("temperature 0.7", Sampling(temperature=0.7, seed=0)),
    Case("temperature 0.7, top_k 40", Sampling(temperature=0.7, top_k=40, seed=0)),
    Case("temperature 0.7, top_p 0.9", Sampling(temperature=0.7, top_p=0.9, seed=0)),
    Case("temperature 0.7, min_p 0.05", Sampling(temperature=0.7, min_p=0.05, seed=0)),
    Case(
        "temperature 0.7, top_k 40, top_p 0.9, min_p 0.05",
        Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, seed=0),
    ),
    Case("greedy, penalties", Sampling(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1)),
)


def rows_like_a_models(rows: int, vocabulary: int, seed: int = 0) -> Floats:
    """(rows, vocabulary) logits, the same for the same seed."""
    random = np.random.default_rng(seed)
    logits = random.normal(0.0, _SPREAD, (rows, vocabulary))
    likely = min(_LIKELY, vocabulary)
    falling = _PEAK - _FALL * np.log(np.arange(1, likely + 1))
    for row in logits:
        row[random.permutation(vocabulary)[:likely]] = falling + random.normal(0.0, 0.5, likely)
    return logits.astype(np.float32)


def cost_us(
    case: Case, logits: Floats, repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """µs a token. `logits`: (rows, vocabulary), at least one row."""
    vocabulary = logits.shape[1]
    prompt = np.random.default_rng(1).integers(0, vocabulary, PROMPT_TOKENS).tolist()
    sampler = Sampler(case.sampling, vocabulary, prompt, top_logprobs=case.top_logprobs)
    elapsed_s = np.empty((repetitions, len(logits)))
    for repetition in elapsed_s:
        for index, row in enumerate(logits):
            begun = clock()
            sampler.sample(row)
            repetition[index] = clock() - begun
    return float(np.median(elapsed_s.min(axis=0)) * 1e6)


def measure(
    vocabularies: Sequence[int],
    rows: int = ROWS,
    repetitions: int = REPETITIONS,
    cases: Sequence[Case] = CASES,
) -> dict[str, list[float]]:
    """For each case, µs a token with each vocabulary."""
    figures: dict[str, list[float]] = {case.name: [] for case in cases}
    for vocabulary in vocabularies:
        logits = rows_like_a_models(rows, vocabulary)
        for case in cases:
            figures[case.name].append(cost_us(case, logits, repetitions))
    return figures


def table(vocabularies: Sequence[int], figures: dict[str, list[float]]) -> Table:
    result = Table(title="Choosing a token, µs")
    result.add_column("settings")
    for vocabulary in vocabularies:
        result.add_column(f"{vocabulary:,} tokens", justify="right")
    for name, costs in figures.items():
        result.add_row(name, *(f"{cost:.0f}" for cost in costs))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What choosing a token costs, for each kind of setting.")
    parser.add_argument("--vocabulary", type=int, action="append", help="tokens; may be given several times")
    parser.add_argument("--rows", type=int, default=ROWS, help="different rows of logits")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="of each row")
    options = parser.parse_args(arguments)
    vocabularies = options.vocabulary or VOCABULARIES
    for name, values in (
        ("--vocabulary", vocabularies),
        ("--rows", [options.rows]),
        ("--repetitions", [options.repetitions]),
    ):
        if min(values) < 1:
            parser.error(f"{name} is {min(values)}, expected 1 or more")
    Console().print(table(vocabularies, measure(vocabularies, options.rows, options.repetitions)))


if __name__ == "__main__":
    main()
