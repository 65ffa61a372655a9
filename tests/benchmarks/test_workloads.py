"""The shipped prompts, held against their README, and a loader that refuses what it does not know."""

from __future__ import annotations

import re
from importlib import resources
from itertools import pairwise

import pytest

import pocketlm_benchmarks.workloads as package
from pocketlm.errors import InvalidSettingError
from pocketlm_benchmarks.workloads import WorkloadError, load_workload, parse_workload, workload_names

NAMES = ("batch", "chat", "code-edit", "extract", "retrieval", "summarize")
README = resources.files(package).joinpath("README.md").read_text(encoding="utf-8")

GOOD = """
description = "two questions"
licence = "Apache-2.0"
new_tokens = 4
concurrent = 1
[[prompts]]
messages = [{ role = "user", content = " Why? " }]
[[prompts]]
[[prompts.messages]]
role = "user"
content = "When?"
[[prompts.messages]]
role = "assistant"
content = "Now."
[[prompts.messages]]
role = "user"
content = '''
Where?
'''
"""


def characters(name: str) -> list[int]:
    prompts = load_workload(name).prompts
    return [sum(len(message["content"]) for message in prompt) for prompt in prompts]


def rough_tokens(name: str) -> list[int]:
    """Words, digits and signs; a tokenizer of English makes some more of them."""
    prompts = load_workload(name).prompts
    return [sum(len(re.findall(r"[^\W\d]+|\d|[^\w\s]", m["content"])) for m in prompt) for prompt in prompts]


def readme_row(name: str) -> list[str]:
    (row,) = (line for line in README.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def bounds(cell: str) -> tuple[int, int]:
    low, high = (int(number.replace(",", "")) for number in cell.split("–"))
    return low, high


def test_names() -> None:
    assert workload_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_as_the_readme_says(name: str) -> None:
    loaded = load_workload(name)
    _, prompts, new_tokens, length, tokens, _ = readme_row(name)
    assert prompts.split(",")[0] == str(len(loaded.prompts))
    assert new_tokens == str(loaded.new_tokens)
    assert bounds(length) == (min(characters(name)), max(characters(name)))
    low, high = bounds(tokens)
    template = 40  # tokens of a chat template and a system prompt at most
    assert min(rough_tokens(name)) <= low <= 1.4 * min(rough_tokens(name)) + template
    assert max(rough_tokens(name)) <= high <= 1.4 * max(rough_tokens(name)) + template


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_many_and_clean(name: str) -> None:
    loaded = load_workload(name)
    assert (loaded.name, loaded.licence) == (name, "Apache-2.0")
    assert len(loaded.prompts) >= 8
    assert loaded.new_tokens >= 64
    for prompt in loaded.prompts:
        for message in prompt:
            assert message["content"] == message["content"].strip()
            assert "\t" not in message["content"]


def test_eight_at_once_and_long_prompts() -> None:
    assert load_workload("batch").concurrent == 8
    assert {load_workload(name).concurrent for name in NAMES if name != "batch"} == {1}
    assert bounds(readme_row("retrieval")[4]) >= (1200, 1200)
    assert bounds(readme_row("retrieval")[4])[1] <= 1600
    assert any(len(prompt) > 1 for prompt in load_workload("chat").prompts)


def test_prompts_that_follow_each_other_share_no_passage() -> None:
    passages = [
        re.findall(r"^\[\d\] (.+)$", prompt[0]["content"], re.MULTILINE)
        for prompt in load_workload("retrieval").prompts
    ]
    assert {len(each) for each in passages} == {8}
    for first, second in pairwise(passages):
        assert not set(first) & set(second)


def test_what_a_file_says() -> None:
    loaded = parse_workload("questions", GOOD)
    assert (loaded.name, loaded.description, loaded.licence) == ("questions", "two questions", "Apache-2.0")
    assert (loaded.new_tokens, loaded.concurrent) == (4, 1)
    assert loaded.prompts == (
        ({"role": "user", "content": "Why?"},),
        (
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": "Now."},
            {"role": "user", "content": "Where?"},
        ),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("new_tokens = 4", "new_tokens = ", r"questions\.toml is not valid TOML"),
        ("new_tokens = 4", "", r"questions\.toml: new_tokens is missing"),
        ("new_tokens = 4", 'new_tokens = "4"', "new_tokens is '4'"),
        ("new_tokens = 4", "new_tokens = 0", "new_tokens is 0"),
        ("new_tokens = 4", "new_tokens = 4\nsampling = 1", "sampling is 1"),
        ('"two questions"', '" "', "description is ' '"),
        ('role = "assistant"', 'role = "system"', r"prompts\.1\.messages\.1\.role is 'system'"),
        ('content = "Now."', 'content = ""', r"prompts\.1\.messages\.1\.content is ''"),
        ('role = "assistant"', 'role = "user"', "prompts.1 is said by user, user, user; expected"),
        ('[{ role = "user", content = " Why? " }]', "[]", "prompts.0 is said by nobody"),
        ("concurrent = 1", "concurrent = 2", "has 2 prompts, expected a multiple of 2, .* from 4 on"),
        ("concurrent = 1", "concurrent = 3", "has 2 prompts, expected a multiple of 3"),
    ],
)
def test_a_file_with_a_mistake(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(WorkloadError, match=message):
        parse_workload("questions", GOOD.replace(old, new))


def test_a_prompt_that_is_there_twice() -> None:
    again = '\n[[prompts]]\nmessages = [{ role = "user", content = "Why?" }]\n'
    with pytest.raises(WorkloadError, match=r"prompts\.2 is there twice"):
        parse_workload("questions", GOOD + again)


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(
        InvalidSettingError, match=r"no workload 'retreival'\. Did you mean retrieval .*batch, "
    ):
        load_workload("retreival")
    with pytest.raises(InvalidSettingError, match=r"no workload '\.\./chat'"):
        load_workload("../chat")
