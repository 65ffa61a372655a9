"""Forms of answers through the whole engine: a random model has no choice but to follow them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import pocketlm
from helpers.tiny import bundle_with_tools
from pocketlm.errors import InvalidSettingError, PromptError

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["colour", "count"],
}
PAINT = {
    "type": "function",
    "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA},
}


@pytest.fixture(scope="module")
def caller(int8_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a template that shows tools."""
    return bundle_with_tools(int8_bundle, tmp_path_factory.mktemp("caller") / "bundle")


@pytest.mark.parametrize("speculate", [True, False])
def test_json_by_a_schema(int8_bundle: Path, speculate: bool) -> None:
    with pocketlm.load(int8_bundle) as model:
        for seed in range(5):
            completion = model.generate(
                "A colour?", json_schema=SCHEMA, temperature=1.0, seed=seed, speculate=speculate
            )
            assert completion.finish_reason == "stop"
            jsonschema.validate(json.loads(completion.text), SCHEMA)
            # The names of the properties can only be what they are, so they are verified in one pass.
            assert (completion.timings.accepted_tokens > 5) == speculate


def test_forms_of_answers_under_way_together(int8_bundle: Path) -> None:
    with pocketlm.load(int8_bundle) as model:
        streams = [
            model.stream("A number?", regex=r"[0-9]{3}", temperature=1.0, seed=seed, max_tokens=20)
            for seed in range(4)
        ]
        free = model.stream("Anything.", max_tokens=20, ignore_eos=True)
        texts = [stream.finish().text for stream in streams]
        assert all(re.fullmatch(r"[0-9]{3}", text) for text in texts)
        assert free.finish().usage.completion_tokens == 20


def test_a_grammar_and_a_limit(int8_bundle: Path) -> None:
    with pocketlm.load(int8_bundle) as model:
        assert model.generate("Yes?", grammar='start: "yes" | "no"').text in ("yes", "no")
        cut = model.generate("Yes?", regex="a{10}", max_tokens=4)
    assert (cut.text, cut.finish_reason) == ("aaaa", "length")


def test_a_call_that_has_to_come(caller: Path) -> None:
    with pocketlm.load(caller) as model:
        completion = model.generate("Paint!", tools=[PAINT], tool_choice="required", temperature=1.0, seed=3)
    assert completion.finish_reason == "stop"
    assert completion.text.strip() == ""
    assert completion.tool_calls
    for call in completion.tool_calls:
        assert call.name == "paint"
        jsonschema.validate(dict(call.arguments), SCHEMA)


def test_tools_reach_the_template(caller: Path) -> None:
    with pocketlm.load(caller) as model:
        with_tools = model.generate("Paint!", tools=[PAINT], max_tokens=1)
        without = model.generate("Paint!", tools=[PAINT], tool_choice="none", max_tokens=1)
        plain = model.generate("Paint!", max_tokens=1)
    assert with_tools.usage.prompt_tokens > plain.usage.prompt_tokens
    assert without.usage.prompt_tokens == with_tools.usage.prompt_tokens


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"tools": [PAINT]}, PromptError, "chat template has no tools"),
        ({"tools": [PAINT], "regex": "a"}, InvalidSettingError, "a form of the answer too"),
        ({"tools": [{"type": "function"}]}, InvalidSettingError, "a tool is"),
        ({"tool_choice": "required"}, InvalidSettingError, "there are no tools"),
        ({"regex": "a", "json_schema": SCHEMA}, InvalidSettingError, "json_schema and regex are given"),
        ({"regex": "("}, InvalidSettingError, "regex"),
    ],
)
def test_what_cannot_be_kept(
    int8_bundle: Path, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pocketlm.load(int8_bundle) as model, pytest.raises(kind, match=message):
        model.generate("Hello", **settings)


def test_tools_need_messages(caller: Path) -> None:
    with pocketlm.load(caller) as model, pytest.raises(PromptError, match="give the prompt as messages"):
        model.generate([1, 2, 3], tools=[PAINT])


def test_tools_that_no_call_is_asked_of_need_no_template(int8_bundle: Path) -> None:
    with pocketlm.load(int8_bundle) as model:
        without = model.generate("Paint!", tools=[PAINT], tool_choice="none", max_tokens=1)
        plain = model.generate("Paint!", max_tokens=1)
    assert without.usage.prompt_tokens == plain.usage.prompt_tokens
