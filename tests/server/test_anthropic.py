"""Anthropic's API over HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from pocketlm.energy import Reading
from pocketlm.generate import Completion, Piece, Timings, Usage
from pocketlm.server.answers import Answers, Result
from pocketlm.server.anthropic import reply as replies
from pocketlm.server.anthropic.request import MessagesRequest, PromptFields, conversation, settings
from pocketlm.server.errors import ApiError
from pocketlm.tools import ToolCall

USER = {"role": "user", "content": "Hi"}
WEATHER = {
    "name": "weather",
    "description": "Now.",
    "input_schema": {"type": "object", "properties": {"c": {"enum": ["Oslo"]}}, "required": ["c"]},
}
CALL = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"c": "Oslo"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "Rain"}


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 8, "messages": [USER], **changes}


def ask(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    response = client.post("/v1/messages", json=body(**changes))
    assert response.status_code == 200, response.text
    return dict(response.json())


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events."""
    found = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def stream(client: httpx.Client, **changes: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/messages", json=body(stream=True, **changes))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert all(name == data["type"] for name, data in found)
    return [data for _, data in found]


def added_up(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events tell of."""
    message = dict(found[0]["message"])
    for each in found[1:]:
        match each["type"]:
            case "content_block_start":
                assert each["index"] == len(message["content"])
                message["content"].append({**each["content_block"], "json": ""})
            case "content_block_delta" if each["delta"]["type"] == "text_delta":
                message["content"][each["index"]]["text"] += each["delta"]["text"]
            case "content_block_delta":
                message["content"][each["index"]]["json"] += each["delta"]["partial_json"]
            case "message_delta":
                message |= each["delta"]
                message["usage"] |= each["usage"]
    for block in message["content"]:
        written = block.pop("json")
        if written:
            block["input"] = json.loads(written)
    return message


def comparable(message: Mapping[str, Any]) -> dict[str, Any]:
    usage = {name: value for name, value in message["usage"].items() if name == "output_tokens"}
    content = [{name: value for name, value in each.items() if name != "id"} for each in message["content"]]
    return {**message, "id": None, "usage": usage, "content": content}


def test_a_message(client: httpx.Client) -> None:
    message = ask(client, system="Be brief.", metadata={"user_id": "u"}, service_tier="auto")
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "tiny")
    assert [block["type"] for block in message["content"]] == ["text"]
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    usage = message["usage"]
    assert usage["output_tokens"] == 8
    assert usage["cache_creation_input_tokens"] == 0
    assert usage["energy"]["source"]


def test_answers_are_counted(client: httpx.Client) -> None:
    ask(client)
    assert 'pocketlm_requests_total{api="messages",model="tiny",status="200"}' in client.get("/metrics").text


def test_what_is_cached_is_counted_apart(client: httpx.Client) -> None:
    question = [{"role": "user", "content": "What is cached is not counted twice."}]
    whole = ask(client, messages=question)["usage"]
    again = ask(client, messages=question)["usage"]
    total = client.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": question}).json()
    assert again["cache_read_input_tokens"] > whole["cache_read_input_tokens"]
    for usage in (whole, again):
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == total["input_tokens"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 1, "top_k": 1, "top_p": 0.5},
        {"model": "tiny-tools", "tools": [WEATHER], "tool_choice": {"type": "any"}, "max_tokens": 80},
    ],
)
def test_the_events_add_up_to_the_message(client: httpx.Client, changes: dict[str, Any]) -> None:
    found = stream(client, **changes)
    kinds = [each["type"] for each in found]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert comparable(added_up(found)) == comparable(ask(client, **changes))


def test_a_stop_sequence_is_named(client: httpx.Client) -> None:
    text = ask(client, max_tokens=12)["content"][0]["text"]
    stop = text[4:6]
    before = text[: text.index(stop)]
    message = ask(client, max_tokens=12, stop_sequences=["not in it", stop])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert message["content"] == [{"type": "text", "text": before}]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call(client: httpx.Client, choice: dict[str, Any]) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    message = ask(client, model="tiny-tools", tools=[WEATHER], tool_choice=choice, max_tokens=80)
    assert message["stop_reason"] == "tool_use"
    [block] = message["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "weather", {"c": "Oslo"})
    turns = [USER, {"role": "assistant", "content": message["content"]}]
    result = {**RESULT, "tool_use_id": block["id"]}
    ask(client, model="tiny-tools", tools=[WEATHER], messages=[*turns, {"role": "user", "content": [result]}])


def test_the_answer_keeps_to_a_schema(client: httpx.Client) -> None:
    output = {"format": {"type": "json_schema", "schema": {"enum": ["yes", "no"]}}}
    message = ask(client, output_config=output, max_tokens=20)
    assert json.loads(message["content"][0]["text"]) in ("yes", "no")
    assert message["stop_reason"] == "end_turn"


def test_the_context_is_full(client: httpx.Client) -> None:
    message = ask(client, messages=[{"role": "user", "content": "a" * 450}], max_tokens=4096)
    assert message["stop_reason"] == "model_context_window_exceeded"


def test_a_prompt_that_does_not_fit_is_refused(client: httpx.Client) -> None:
    response = client.post("/v1/messages", json=body(messages=[{"role": "user", "content": "a" * 900}]))
    assert response.status_code == 400
    told = response.json()
    assert told["type"] == "error"
    assert told["error"]["type"] == "invalid_request_error"
    assert "512" in told["error"]["message"]


def test_tokens_are_counted_as_the_prompt_has_them(client: httpx.Client) -> None:
    asked = {"model": "tiny-tools", "messages": [USER], "system": "S", "tools": [WEATHER]}
    counted = client.post("/v1/messages/count_tokens", json=asked).json()
    usage = ask(client, **asked, tool_choice={"type": "none"})["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    without = client.post("/v1/messages/count_tokens", json={**asked, "tools": []}).json()
    assert without["input_tokens"] < counted["input_tokens"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [USER, {"role": "assistant", "content": "I"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "citations": [1]}]}]},
            "messages.0.content.0.citations",
        ),
        (
            {"messages": [{"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}]},
            "messages.0.content.0.content.0.type",
        ),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "'t1'"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}, USER]}, "messages.0.content"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [WEATHER]}, "tools"),  # of a model whose template has none
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: httpx.Client, changes: dict[str, Any], named: str
) -> None:
    asked = {name: value for name, value in body(**changes).items() if value is not None}
    response = client.post("/v1/messages", json=asked)
    assert response.status_code == 400, response.text
    told = response.json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert named in told["error"]["message"]


def test_an_unknown_model(client: httpx.Client) -> None:
    for path, asked in (("", body(model="no")), ("/count_tokens", {"model": "no", "messages": [USER]})):
        response = client.post(f"/v1/messages{path}", json=asked)
        assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")


@pytest.mark.parametrize(
    ("error", "kind"), [(ApiError(503, "No more."), "overloaded_error"), (ZeroDivisionError(), "api_error")]
)
def test_an_answer_that_breaks_off_ends_with_an_error(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    def result(_: Answers) -> None:
        raise error

    monkeypatch.setattr(Answers, "result", property(result))
    *_, (name, data) = events(client.post("/v1/messages", json=body(stream=True)).text)
    assert name == "error"
    assert (data["type"], data["error"]["type"]) == ("error", kind)


def prompt(*turns: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    fields = PromptFields.model_validate({"model": "m", "messages": list(turns), **changes})
    return [dict(message) for message in conversation(fields)]


def test_turns_become_messages() -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    said = {"type": "text", "text": "Wait.", "cache_control": {"type": "ephemeral"}}
    answer = {"role": "assistant", "content": [thought, said, {**CALL, "caller": {"type": "direct"}}]}
    result = {**RESULT, "is_error": True, "content": [{"type": "text", "text": "down"}]}
    asked = {"role": "user", "content": [result, {"type": "text", "text": "And?"}]}
    assert prompt(USER, USER, answer, asked, system=[{"type": "text", "text": "S"}]) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi\nHi"},
        {
            "role": "assistant",
            "content": "Wait.",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"c": "Oslo"}}}
            ],
        },
        {"role": "tool", "content": "Error: down", "tool_call_id": "t1", "name": "weather"},
        {"role": "user", "content": "And?"},
    ]


def test_turns_of_the_assistant_are_joined() -> None:
    calls = [{"role": "assistant", "content": [{**CALL, "id": name}]} for name in ("t1", "t2")]
    text = {"role": "assistant", "content": "So."}
    [_, answer, *results] = prompt(USER, text, *calls, {"role": "user", "content": [RESULT, RESULT]})
    assert answer["content"] == "So."
    assert [call["id"] for call in answer["tool_calls"]] == ["t1", "t2"]
    assert [each["role"] for each in results] == ["tool", "tool"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, {}),
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "any", "disable_parallel_tool_use": False}, {"tool_choice": "required"}),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"type": "tool", "name": "f"},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
    ],
)
def test_choices(choice: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    found = settings(MessagesRequest.model_validate(body(tool_choice=choice)))
    assert found == {"max_tokens": 8, **expected}


def completion(reason: Any, *pieces: Piece) -> Completion:
    timings = Timings(0, 0, 0, 0, 0, None, None)
    return Completion("", (), reason, Usage(1, 0, len(pieces)), timings, pieces)


def content_of(*pieces: Piece) -> list[dict[str, Any]]:
    """The content that an answer in these pieces has, whole as in its events."""
    reading = Reading("none", "process", "estimated", 0.0, None, reason="no probe")
    result = Result((completion("stop", *pieces),), reading)
    reply = replies.Reply("m", 9)
    found = reply.begin(result.completions[0].usage)
    for piece in pieces:
        found += reply.add(piece)
    streamed = added_up(found + reply.end(result))
    whole = replies.Reply("m", 9).message(result)
    assert comparable(streamed) == comparable(whole)
    return list(whole["content"])


def test_texts_and_calls_are_blocks_of_their_own() -> None:
    call = ToolCall("weather", {"c": "Oslo"})
    content = content_of(
        Piece("Let", 1), Piece("", 2), Piece(" me", 3, tool_calls=(call, call)), Piece("So.", 4)
    )
    assert [block["type"] for block in content] == ["text", "tool_use", "tool_use", "text"]
    assert [block["text"] for block in content[::3]] == ["Let me", "So."]
    assert [block["input"] for block in content[1:3]] == [{"c": "Oslo"}, {"c": "Oslo"}]
    assert content[1]["id"] != content[2]["id"]


def test_an_empty_answer_has_an_empty_text() -> None:
    assert content_of(Piece("", 1)) == [{"type": "text", "text": ""}]


@pytest.mark.parametrize(
    ("reason", "limit", "expected"),
    [("length", 1, "max_tokens"), ("timeout", 9, "max_tokens"), ("stop", 9, "end_turn")],
)
def test_stop_reasons(reason: str, limit: int, expected: str) -> None:
    assert replies._stop_reason(completion(reason, Piece("a", 1)), limit) == expected


def test_an_answer_that_the_server_breaks_off_is_no_answer() -> None:
    with pytest.raises(ApiError, match="ended the answer"):
        replies._stop_reason(completion("cancelled"), 1)
