"""The synthetic grid and the workloads as queries: sizes, names, hashes and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pytest

from helpers.tiny import TEMPLATE, tokenizer_json
from pocketlm.errors import InvalidSettingError, PromptError
from pocketlm.manifest import Tokens
from pocketlm.tokenizer import Tokenizer
from pocketlm_benchmarks.cases import Work, grid, workload
from pocketlm_benchmarks.engines.protocol import Message
from pocketlm_benchmarks.workloads import load_workload, workload_names

PINNED = [(11, 38, 22, 29), (8, 23, 32, 14)]
PINNED_SHA256 = "988f9a95b4b8aad2ed39284651a33b4290f5241dfa791300b0e6fb8d2a3503c0"


def a_grid(**changes: Any) -> list[Work]:
    settings: dict[str, Any] = {
        "prompt_tokens": [16, 5],
        "new_tokens": 8,
        "depths": [0, 12],
        "vocabulary": 40,
        "seed": 0,
    }
    return grid(**{**settings, **changes})


def encode(messages: Sequence[Message]) -> list[int]:
    """One token a character."""
    return [ord(character) for message in messages for character in message["content"]]


def test_the_grid_is_llama_benchs() -> None:
    works = a_grid()
    assert [
        (work.case.name, work.case.kind, work.case.prompt_tokens, work.case.new_tokens, work.context_length)
        for work in works
    ] == [
        ("pp16", "prefill", 16, 1, 17),
        ("pp5", "prefill", 5, 1, 6),
        ("tg8", "decode", 1, 9, 10),  # 8 behind the first, which comes from the prompt
        ("tg8@d12", "decode", 12, 9, 21),
    ]
    for work in works:
        assert work.case.concurrent == 1
        assert len(work.groups) == 8
        for (query,) in work.groups:
            assert len(query.prompt_ids) == work.case.prompt_tokens
            assert query.new_tokens == work.case.new_tokens
            assert query.messages == ()
    assert works[0].case.description == "process 16 tokens of prompt"
    assert works[2].case.description == "make 8 tokens behind an empty context"
    assert works[3].case.description == "make 8 tokens behind 12 tokens"
    assert a_grid(new_tokens=1)[2].case.description.startswith("make 1 token behind")


def test_no_two_prompts_of_a_case_begin_alike() -> None:
    for work in a_grid(groups=30):
        assert len({group[0].prompt_ids[0] for group in work.groups}) == len(work.groups) == 30


def test_special_ids_are_not_drawn() -> None:
    ids = {
        each
        for work in a_grid(prompt_tokens=[200], special_ids=[0, 7, 39, 1000])
        for group in work.groups
        for query in group
        for each in query.prompt_ids
    }
    assert ids == set(range(40)) - {0, 7, 39}


def test_a_case_does_not_depend_on_the_others() -> None:
    together = {work.case.name: work for work in a_grid(prompt_tokens=[5, 16], depths=[12, 0])}
    assert together == {work.case.name: work for work in a_grid()}
    assert a_grid(prompt_tokens=[], depths=[12]) == [together["tg8@d12"]]
    assert a_grid(prompt_tokens=[], depths=[]) == []


def test_each_release_draws_the_same() -> None:
    prefill, decode = a_grid(prompt_tokens=[4], depths=[0], groups=2)
    assert [group[0].prompt_ids for group in prefill.groups] == PINNED
    assert prefill.case.sha256 == PINNED_SHA256
    assert prefill.case.sha256 != decode.case.sha256


def test_the_hash_is_of_ids_and_lengths() -> None:
    (work,) = a_grid(prompt_tokens=[3], depths=[], groups=2)
    queries = [[[list(query.prompt_ids), 1] for query in group] for group in work.groups]
    text = json.dumps(queries, separators=(",", ":"))
    assert work.case.sha256 == hashlib.sha256(text.encode()).hexdigest()
    shas = {a_grid(seed=seed, new_tokens=new)[2].case.sha256 for seed in (0, 1) for new in (8, 9)}
    assert len(shas) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": [16, 0]}, "prompt_tokens is 0; at least 1"),
        ({"prompt_tokens": [16, 5, 16]}, "prompt_tokens holds 16 twice"),
        ({"depths": [-1]}, "depths is -1; at least 0"),
        ({"depths": [0, 0]}, "depths holds 0 twice"),
        ({"new_tokens": 0}, "new_tokens is 0; at least 1"),
        ({"groups": 1}, "groups is 1; at least 2"),
        ({"vocabulary": 7}, "the vocabulary has 7 ordinary tokens, but 8 prompts"),
        ({"special_ids": range(33)}, "the vocabulary has 7 ordinary tokens"),
    ],
)
def test_sizes_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        a_grid(**changes)


@pytest.mark.parametrize("name", workload_names())
def test_a_workload_becomes_groups_of_queries(name: str) -> None:
    loaded = load_workload(name)
    work = workload(name, encode, 10_000)
    queries = [query for group in work.groups for query in group]
    assert len(work.groups) >= 2
    assert {len(group) for group in work.groups} == {loaded.concurrent} == {work.case.concurrent}
    assert [query.messages for query in queries] == list(loaded.prompts)
    assert [list(query.prompt_ids) for query in queries] == [encode(prompt) for prompt in loaded.prompts]
    assert {query.new_tokens for query in queries} == {loaded.new_tokens} == {work.case.new_tokens}
    assert work.case.prompt_tokens == pytest.approx(sum(map(len, map(encode, loaded.prompts))) / len(queries))
    assert (work.case.name, work.case.kind) == (name, "workload")
    assert work.case.description == loaded.description


def test_another_tokenizer_is_other_work() -> None:
    shifted = workload("chat", lambda messages: [each + 1 for each in encode(messages)], 10_000)
    assert shifted.case.sha256 != workload("chat", encode, 10_000).case.sha256


def test_a_workload_has_to_fit_the_context() -> None:
    needed = workload("chat", encode, 10_000).context_length
    assert workload("chat", encode, needed).context_length == needed
    with pytest.raises(InvalidSettingError, match=rf"chat needs a context of {needed} tokens, 128 of them"):
        workload("chat", encode, needed - 1)


def test_a_workload_that_is_not_there() -> None:
    with pytest.raises(InvalidSettingError, match=r"no workload 'chta'\. Did you mean chat"):
        workload("chta", encode, 10_000)


def test_with_a_tokenizer() -> None:
    tokens = Tokens(bos=None, eos=(0,), add_bos=False)
    tokenizer = Tokenizer(tokenizer_json(), TEMPLATE, tokens)
    work = workload("chat", tokenizer.encode_chat, 2048)
    (query,) = work.groups[0]
    text = tokenizer.decode(query.prompt_ids, skip_special=False)
    assert text.startswith("<|im_start|>user\nMy bicycle chain")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(PromptError, match="no chat template"):
        workload("chat", Tokenizer(tokenizer_json(), None, tokens).encode_chat, 2048)
