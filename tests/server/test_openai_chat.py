"""`/v1/chat/completions`, field by field, as a client without a library sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

import pocketlm
from helpers.serving import running
from helpers.tiny import END_OF_TEXT, VOCABULARY, letters, only, tokenizer_json
from pocketlm.server.config import ServerConfig

PATH = "/v1/chat/completions"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
LETTERS = {str(token_id): max(bias, -100) for token_id, bias in only(letters()).items()}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"digit": {"enum": [1, 2]}}, "required": ["digit"]},
    },
}
OTHER = {"type": "function", "function": {"name": "other"}}
NAMED = {"type": "function", "function": {"name": "another"}}
LONG_TYPE = {"type": "function", "function": {"name": "f", "parameters": {"type": "x" * 5000}}}
BROKEN_CALL = {"name": "add", "arguments": "["}
CLOSING_BRACE = str(Tokenizer.from_str(tokenizer_json()).token_to_id("}"))


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"messages": HELLO, "max_tokens": 8, **body})
    assert response.status_code == 200, response.text
    return response.json()


def chunks(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = client.post(PATH, json={"messages": HELLO, "max_tokens": 8, "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(some: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in some for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def refusal(client: httpx.Client, **body: Any) -> dict[str, Any]:
    # Not `json=`, which refuses half surrogate pairs and NaN.
    content = json.dumps({"messages": HELLO, "max_tokens": 2, **body})
    response = client.post(PATH, content=content)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_an_answer_is_the_engines_own(client: httpx.Client, int8_bundle: Path) -> None:
    settings: dict[str, Any] = {"temperature": 1.5, "seed": 7, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
    settings |= {"presence_penalty": 0.5, "frequency_penalty": 0.5, "ignore_eos": True}
    with pocketlm.load(int8_bundle, threads=1) as model:
        expected = model.generate(HELLO, max_tokens=8, repetition_penalty=1.2, **settings)
    answer = ask(client, **settings, repeat_penalty=1.2)
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert answer["model"] == "tiny"
    assert answer["object"] == "chat.completion"
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["timings"]["predicted_n"] == 8


def test_what_is_left_out_is_greedy(client: httpx.Client, int8_bundle: Path) -> None:
    with pocketlm.load(int8_bundle, threads=1) as model:
        expected = model.generate(HELLO, max_tokens=8).text
    assert ask(client)["choices"][0]["message"]["content"] == expected
    neutral = {"store": False, "modalities": ["text"], "n": 1, "response_format": {"type": "text"}}
    neutral |= {"reasoning_effort": "none", "service_tier": "auto", "audio": None, "functions": None}
    labels = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}}
    assert ask(client, **neutral, **labels)["choices"][0]["message"]["content"] == expected


def test_usage_counts_tokens_and_joules(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "a prompt that nothing else begins with"}]
    first, again = (ask(client, messages=messages, ignore_eos=True)["usage"] for _ in range(2))
    assert first["completion_tokens"] == 8
    assert first["total_tokens"] == first["prompt_tokens"] + 8
    assert first["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens_details"]["cached_tokens"]
    energy = first["energy"]
    assert energy["low_j"] <= energy["energy_j"] <= energy["high_j"]
    assert energy.keys() >= {"source", "scope", "kind", "duration_s", "flags", "reason"}
    assert energy["kind"] == "estimated"


def test_streams_begin_with_the_role_and_end_with_the_reason(client: httpx.Client) -> None:
    whole = ask(client)["choices"][0]
    begin, *pieces, end = chunks(client)
    assert begin["choices"][0]["delta"]["role"] == "assistant"
    assert text_of(pieces) == whole["message"]["content"]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in pieces)
    assert end["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert end["timings"]["predicted_n"] == 8
    assert not any("usage" in chunk for chunk in [begin, *pieces, end])


def test_usage_comes_last_in_a_stream(client: httpx.Client) -> None:
    *rest, last = chunks(client, stream_options={"include_usage": True, "include_obfuscation": False})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert last["usage"]["energy"]["source"] == "cpu-time"
    assert "timings" in last
    assert all(chunk["usage"] is None for chunk in rest)


def test_several_answers(client: httpx.Client) -> None:
    settings: dict[str, Any] = {
        "n": 3,
        "temperature": 1.0,
        "seed": 5,
        "logit_bias": LETTERS,
        "ignore_eos": True,
    }
    answer = ask(client, **settings)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert all(len(text) == 8 and text.isupper() for text in texts)
    assert answer["usage"]["completion_tokens"] == 24
    assert "timings" not in answer
    assert all("timings" in choice for choice in answer["choices"])
    streamed = chunks(client, **settings)
    assert [text_of(streamed, index) for index in range(3)] == texts
    assert [chunk["choices"][0]["finish_reason"] for chunk in streamed[-3:]] == ["length"] * 3


def test_logprobs(client: httpx.Client) -> None:
    choice = ask(client, logprobs=True, top_logprobs=2, logit_bias=LETTERS, ignore_eos=True)["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    for token in tokens:
        assert bytes(token["bytes"]).decode() == token["token"]
        assert token["logprob"] <= token["top_logprobs"][0]["logprob"] <= 0
        assert len(token["top_logprobs"]) == 2
    streamed = chunks(client, logprobs=True, logit_bias=LETTERS, ignore_eos=True)
    entries = [chunk["choices"][0]["logprobs"] for chunk in streamed if chunk["choices"][0]["logprobs"]]
    assert [entry["content"][0]["token"] for entry in entries] == [token["token"] for token in tokens]
    assert entries[0]["content"][0]["top_logprobs"] == []


def test_the_end_of_text_is_no_token_of_the_content(client: httpx.Client) -> None:
    ends = {str(END_OF_TEXT): 100}
    choice = ask(client, logprobs=True, logit_bias=ends)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["content"] == []
    later = ask(client, logprobs=True, logit_bias=ends, min_tokens=2)["choices"][0]
    assert len(later["logprobs"]["content"]) == 2


@pytest.mark.parametrize(
    "fields",
    [{"stop": "B"}, {"stop": ["Z", "B"]}],
)
def test_stops(client: httpx.Client, fields: dict[str, Any]) -> None:
    bias = {str(letters()[1]): 100}  # nothing but B
    choice = ask(client, logit_bias=bias, **fields)["choices"][0]
    assert choice["message"]["content"] == ""
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("limit", [0, -2])
def test_a_limit_out_of_range(client: httpx.Client, limit: int) -> None:
    """What may be is told, not the one value that stands for no limit."""
    error = client.post(PATH, json={"messages": HELLO, "max_tokens": limit}).json()["error"]
    assert error["param"] == "max_tokens"
    assert "greater than or equal to 1" in error["message"]


@pytest.mark.parametrize("fields", [{"max_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}])
def test_limits_of_tokens(client: httpx.Client, fields: dict[str, Any]) -> None:
    assert ask(client, ignore_eos=True, **fields)["usage"]["completion_tokens"] == 3


def test_no_limit_fills_the_context(client: httpx.Client) -> None:
    usage = ask(client, max_tokens=-1, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == 512


def test_a_timeout_ends_an_answer_as_a_limit_does(client: httpx.Client) -> None:
    answer = ask(client, max_tokens=None, ignore_eos=True, timeout_s=1e-4)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] < 512


def test_the_operators_timeout_is_the_longest(int8_bundle: Path) -> None:
    config = ServerConfig(port=0, answer_timeout_s=1e-4)
    with running({"tiny": int8_bundle}, config) as server, server.client() as client:
        usage = ask(client, max_tokens=None, ignore_eos=True, timeout_s=1000)["usage"]
    assert usage["total_tokens"] < 512


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}, "logit_bias": {CLOSING_BRACE: 100}},
        {"response_format": {"type": "json_object", "schema": {"enum": [{"a": 1}]}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "it", "strict": True, "schema": {"const": {"a": 1}}},
            }
        },
        {"regex": r'\{"a": [0-9]\}'},
        {"grammar": 'start: "{" /"a": [0-9]/ "}"'},
    ],
)
def test_forms_of_answers(client: httpx.Client, fields: dict[str, Any]) -> None:
    choice = ask(client, max_tokens=100, **fields)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "add"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "add"}}],
            },
        },
    ],
)
def test_tool_calls(client: httpx.Client, choice: Any) -> None:
    tools = [ADD] if choice == "required" else [OTHER, ADD]
    fields = {"model": "tiny-tools", "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    answer = ask(client, max_tokens=200, **fields)["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"])["digit"] in (1, 2)
    assert len(call["id"]) == 9
    streamed = chunks(client, max_tokens=200, **fields)
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed]
    ((delta,),) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert delta["index"] == 0
    assert delta["function"] == call["function"]
    assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_no_tool_is_called_unless_it_may_be(client: httpx.Client) -> None:
    choice = ask(client, model="tiny-tools", tools=[ADD], tool_choice="none")["choices"][0]
    assert "tool_calls" not in choice["message"]


def test_a_conversation_with_calls_goes_through_the_template(client: httpx.Client) -> None:
    call = {"id": "123456789", "type": "function", "function": {"name": "add", "arguments": '{"digit": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "Add", "name": "me"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call], "annotations": []},
        {"role": "tool", "content": "2", "tool_call_id": "123456789"},
    ]
    plain = [
        {"role": "system", "content": "Be\nbrief"},
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    assert (
        ask(client, messages=messages)["choices"][0]["message"]
        == (ask(client, messages=plain)["choices"][0]["message"])
    )


def test_a_conversation_that_is_too_long_is_refused_or_cut_if_that_is_asked_for(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "x" * 200} for _ in range(4)]
    error = refusal(client, messages=messages)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "512" in error["message"]
    assert ask(client, messages=messages, overflow="slide")["usage"]["dropped_messages"] == 2


def test_models_are_chosen_by_their_names(client: httpx.Client) -> None:
    assert ask(client, model="tiny-tools")["model"] == "tiny-tools"
    response = client.post(PATH, json={"messages": HELLO, "model": "../tiny"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": BROKEN_CALL}]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 1.1, "repeat_penalty": 1.2}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"n": 10**400}, "n"),
        ({"n": 17}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {"not": {}}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "it"}}},
            "response_format.json_schema.schema",
        ),
        ({"regex": "("}, "regex"),
        ({"grammar": "no"}, "grammar"),
        ({"regex": "a", "grammar": 'start: "a"'}, None),
        ({"tools": [{"type": "custom"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {
                "model": "tiny-tools",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}],
            },
            "tools",
        ),
        ({"model": "tiny-tools", "tools": [LONG_TYPE]}, "tools"),
        ({"tools": [ADD]}, "messages"),  # the template shows none
        ({"messages": HELLO * 8193}, "messages"),
        ({"tool_choice": "auto"}, "tool_choice"),
        (
            {
                "tools": [ADD],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
            },
            "tool_choice",
        ),
        ({"overflow": "cut"}, "overflow"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"prediction": {}}, "prediction"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"bogus": 1}, "bogus"),
        ({f"field{number}": 1 for number in range(1000)}, None),
        ({"\ud800": 1}, None),
    ],
)
def test_what_is_wrong_is_named(client: httpx.Client, fields: dict[str, Any], param: str | None) -> None:
    error = refusal(client, **fields)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) <= 1000


def test_the_message_says_what_to_use_instead(client: httpx.Client) -> None:
    assert "use tools" in refusal(client, functions=[{"name": "f"}])["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"n":' + b"9" * 10_000 + b"}",
        b'{"messages":[' + b"{}," * 99_999 + b"0]}",
    ],
)
def test_bodies_that_are_no_requests(client: httpx.Client, content: bytes) -> None:
    response = client.post(PATH, content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
