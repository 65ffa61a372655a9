"""The same seed gives the same text, however it is computed: on the real weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pocketlm

pytestmark = pytest.mark.real

TOPICS = [
    "the sea",
    "a recipe for bread",
    "why leaves fall",
    "def sort(items):",
    "Grüße aus Köln 🚲",
    "12 × 12",
]
FORMS = ["Tell me about {}.", "Repeat this twice: {}, {}, {}.", "{}", "Write a list: {}"]

prompts = st.builds(
    lambda form, topic: form.replace("{}", topic), st.sampled_from(FORMS), st.sampled_from(TOPICS)
)
ways = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.8]),
        "repetition_penalty": st.just(1.2),
        "seed": st.integers(0, 5),
    },
)
few = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def reproducible(bundle_folder: Path) -> Iterator[pocketlm.Model]:
    with pocketlm.load(bundle_folder, context_length=1024, reproducible=True) as loaded:
        yield loaded


def seeded(chosen: dict[str, object]) -> pocketlm.Settings:
    return {"seed": 1, "max_tokens": 24, **chosen}  # type: ignore[typeddict-item]  # from the strategy above


@few
@given(chosen=ways, texts=st.lists(prompts, min_size=2, max_size=4))
def test_cached_or_not_alone_or_not(
    model: pocketlm.Model, chosen: dict[str, object], texts: list[str]
) -> None:
    plan: pocketlm.Settings = {**seeded(chosen), "speculate": False}
    alone = [model.generate(text, **{**plan, "cache_prompt": False}).token_ids for text in texts]
    streams = [model.stream(text, **plan) for text in texts]
    assert [stream.finish().token_ids for stream in streams] == alone
    assert [model.generate(text, **plan).token_ids for text in texts] == alone


@few
@given(chosen=ways, texts=st.lists(prompts, min_size=1, max_size=3))
def test_speculation_where_it_is_promised(
    reproducible: pocketlm.Model, chosen: dict[str, object], texts: list[str]
) -> None:
    plan = seeded(chosen)
    without = [reproducible.generate(text, **{**plan, "speculate": False}).token_ids for text in texts]
    assert [reproducible.generate(text, **plan).token_ids for text in texts] == without
    streams = [reproducible.stream(text, **plan) for text in texts]
    assert [stream.finish().token_ids for stream in streams] == without


def test_drafts_are_verified_in_the_reproducible_mode_too(reproducible: pocketlm.Model) -> None:
    timings = reproducible.generate("Repeat ten times: red, green, blue.", max_tokens=64).timings
    assert 0 < timings.accepted_tokens <= timings.drafted_tokens


def test_by_default_the_same_request_gives_the_same_text(model: pocketlm.Model) -> None:
    first, second = (
        model.generate("Repeat ten times: red, green, blue.", max_tokens=64, cache_prompt=False)
        for _ in range(2)
    )
    assert first.timings.drafted_tokens == second.timings.drafted_tokens > 0
    assert first.token_ids == second.token_ids
