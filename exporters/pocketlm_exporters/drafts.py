"""A bundle's table of n-grams, from the model's own answers: what it tends to say is what drafts are made of.

1. The finished bundle answers `texts/prompts.txt`, sampled and greedy, several prompts at a time.
2. What follows each one to three tokens of an answer is counted.
3. The token that follows most often is kept where it follows often enough; the most frequent have precedence.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

from pocketlm.bundle import open_bundle, write_manifest
from pocketlm.engine import Model
from pocketlm.errors import InvalidSettingError
from pocketlm.manifest import Manifest
from pocketlm.ngrams import LONGEST_CONTEXT, NGRAMS_NAME, write_table
from pocketlm.progress import Progress
from pocketlm_exporters import texts

ANSWER_TOKENS = 256  # at most, so that no answer's endless loop fills the table
TEMPERATURE = 0.8
LEAST_CHANCE = 0.25  # of an entry
MOST_ENTRIES = 1 << 16  # 16 bytes each

_CONCURRENCY = 8
_CONTEXT_LENGTH = 1024
_MOST_ROUNDS = 16  # over all prompts

Entries = dict[tuple[int, ...], tuple[int, float]]


def add_ngrams(folder: Path, manifest: Manifest, tokens: int, progress: Progress) -> Manifest:
    """Adds a table from about `tokens` generated tokens to the finished bundle in `folder`.

    Returns the manifest as it then is. Raises InvalidSettingError for less than one token.
    """
    if tokens < 1:
        raise InvalidSettingError(f"A table of n-grams needs at least 1 generated token, not {tokens}.")
    bundle = open_bundle(folder, verify=False)
    trained = manifest.dimensions.context_length
    with Model(bundle, context_length=min(trained, _CONTEXT_LENGTH), concurrency=_CONCURRENCY) as model:
        answers = list(_answers(model, tokens, progress))
    write_table(folder / NGRAMS_NAME, count(answers))
    return write_manifest(folder, manifest)


def count(answers: Iterable[Sequence[int]]) -> Entries:
    """Contexts of one to three tokens → the token that follows most often, and its chance.

    The chance is that of one more count than there were: what was seen once is not certain.
    """
    followers: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for ids in answers:
        for place in range(1, len(ids)):
            for length in range(1, min(LONGEST_CONTEXT, place) + 1):
                followers[tuple(ids[place - length : place])][ids[place]] += 1
    ranked = sorted(_entries(followers), key=lambda entry: (-entry[0], entry[1]))
    return {context: (token_id, chance) for _, context, token_id, chance in ranked[:MOST_ENTRIES]}


def _entries(
    followers: Mapping[tuple[int, ...], Counter[int]],
) -> Iterator[tuple[int, tuple[int, ...], int, float]]:
    """How often the most frequent token was seen, its context, the token and its chance."""
    for context, counts in followers.items():
        token_id, seen = max(counts.items(), key=lambda item: (item[1], -item[0]))
        chance = seen / (counts.total() + 1)
        if chance >= LEAST_CHANCE:
            yield seen, context, token_id, chance


def _answers(model: Model, tokens: int, progress: Progress) -> Iterator[list[int]]:
    """The model's answers, about `tokens` in all, each behind the last tokens of its prompt."""
    done = 0
    jobs = list(_jobs())
    wave = 2 * _CONCURRENCY  # which answers there are must not depend on which are ready first
    with ThreadPoolExecutor(wave) as executor:
        for begin in range(0, len(jobs), wave):
            progress("Generating", min(done, tokens), tokens, "tokens")
            for ids in executor.map(lambda job: _answer(model, *job), jobs[begin : begin + wave]):
                done += len(ids)
                yield ids
            if done >= tokens:
                break
    progress("Generating", tokens, tokens, "tokens")


def _answer(model: Model, prompt: str, temperature: float, seed: int) -> list[int]:
    ids = model.encode(prompt)
    # Without drafts an answer is the same to the last bit, whatever is under way beside it.
    completion = model.generate(
        ids, max_tokens=ANSWER_TOKENS, temperature=temperature, seed=seed, speculate=False
    )
    return [*ids[-LONGEST_CONTEXT:], *completion.token_ids]


def _jobs() -> Iterator[tuple[str, float, int]]:
    """Prompt, temperature and seed of each answer, round after round; the second round is greedy."""
    prompts = resources.files(texts).joinpath(texts.PROMPTS).read_text(encoding="utf-8").splitlines()
    for round_ in range(_MOST_ROUNDS):
        temperature = 0.0 if round_ == 1 else TEMPERATURE
        for number, prompt in enumerate(prompts):
            yield prompt, temperature, round_ * len(prompts) + number
