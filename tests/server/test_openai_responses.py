"""`/v1/responses` over HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from helpers.serving import Running
from pocketlm.server.answers import Answers
from pocketlm.server.errors import ApiError

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Now.",
    "parameters": {"type": "object", "properties": {"c": {"enum": ["Oslo"]}}, "required": ["c"]},
    "strict": True,
}
USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"c": "Oslo"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "Rain"}
TOOLS: dict[str, Any] = {
    "model": "tiny-tools",
    "tools": [WEATHER],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_output_tokens": 80,
}


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "input": "Hi", "max_output_tokens": 8, **changes}


def ask(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    response = client.post("/v1/responses", json=body(**changes))
    assert response.status_code == 200, response.text
    found = response.json()
    Response.model_validate(found)
    return dict(found)


def stream(client: httpx.Client, **changes: Any) -> list[dict[str, Any]]:
    """The data of the events, which are what the API's own types allow."""
    response = client.post("/v1/responses", json=body(stream=True, **changes))
    assert response.status_code == 200, response.text
    found = []
    for number, block in enumerate(filter(None, response.text.split("\n\n"))):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        EVENT.validate_python(found[-1])
        assert name == f"event: {found[-1]['type']}"
        assert found[-1]["sequence_number"] == number
    return found


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The events' types, repeated ones once."""
    found: list[str] = []
    for each in events:
        if found[-1:] != [each["type"].removeprefix("response.")]:
            found.append(each["type"].removeprefix("response."))
    return found


def added_up(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that the events tell of."""
    output: list[dict[str, Any]] = []
    for each in events:
        match each["type"].removeprefix("response."):
            case "output_item.added":
                assert each["output_index"] == len(output)
                output.append(each["item"])
            case "content_part.added":
                output[each["output_index"]]["content"].append(each["part"])
            case "output_text.delta":
                part = output[each["output_index"]]["content"][each["content_index"]]
                part["text"] += each["delta"]
                part["logprobs"] += each["logprobs"]
            case "output_text.done":
                part = output[each["output_index"]]["content"][each["content_index"]]
                assert (part["text"], part["logprobs"]) == (each["text"], each["logprobs"])
            case "function_call_arguments.delta":
                output[each["output_index"]]["arguments"] += each["delta"]
            case "output_item.done":
                output[each["output_index"]]["status"] = each["item"]["status"]
                assert output[each["output_index"]] == each["item"]
    return output


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**item, "id": None, "call_id": None} for item in output]


def test_a_response(client: httpx.Client) -> None:
    response = ask(
        client,
        instructions="Be brief.",
        metadata={"k": "v"},
        user="u",
        service_tier="auto",
        store=False,
        top_p=0.5,
    )
    assert (response["status"], response["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    [message] = response["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "incomplete")
    assert [part["type"] for part in message["content"]] == ["output_text"]
    echoed = {"instructions": "Be brief.", "metadata": {"k": "v"}, "user": "u", "top_p": 0.5}
    assert echoed.items() <= response.items()
    assert (response["store"], response["reasoning"], response["truncation"]) == (False, None, "disabled")
    assert response["text"] == {"format": {"type": "text"}}
    usage = response["usage"]
    assert usage["output_tokens"] == 8
    assert usage["total_tokens"] == usage["input_tokens"] + 8
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    assert usage["energy"]["source"]


def test_answers_are_counted(client: httpx.Client) -> None:
    ask(client)
    assert 'pocketlm_requests_total{api="responses",model="tiny",status="200"}' in client.get("/metrics").text


def test_the_servers_first_model_answers_when_none_is_named(client: httpx.Client) -> None:
    assert (
        client.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1}).json()["model"] == "tiny"
    )


def test_the_events_of_a_text(client: httpx.Client) -> None:
    events = stream(client, **LOGPROBS)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    final = events[-1]["response"]
    assert added_up(events) == final["output"]
    assert final["usage"]["output_tokens"] == 8
    assert {each["response"]["id"] for each in events if "response" in each} == {final["id"]}
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert without_ids(final["output"]) == without_ids(ask(client, **LOGPROBS)["output"])


def test_logprobs(client: httpx.Client) -> None:
    [message] = ask(client, **LOGPROBS)["output"]
    [part] = message["content"]
    written = b"".join(bytes(each["bytes"]) for each in part["logprobs"])
    assert written.decode(errors="replace") == part["text"]
    assert all(len(each["top_logprobs"]) == 2 for each in part["logprobs"])


def test_the_events_of_a_call(client: httpx.Client) -> None:
    events = stream(client, **TOOLS)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    final = events[-1]["response"]
    assert added_up(events) == final["output"]
    assert without_ids(final["output"]) == without_ids(ask(client, **TOOLS)["output"])
    assert (final["tools"], final["tool_choice"]) == ([WEATHER], "required")


def test_what_was_answered_may_be_sent_back(client: httpx.Client) -> None:
    [call] = ask(client, **TOOLS)["output"]
    assert (call["type"], call["name"]) == ("function_call", "weather")
    assert json.loads(call["arguments"]) == {"c": "Oslo"}
    asked = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    result = {**RESULT, "call_id": call["call_id"]}
    followed = ask(client, **{**TOOLS, "tool_choice": "none"}, input=[*asked, call, result])
    ask(client, input=[*asked, *followed["output"], *asked], **LOGPROBS)


def test_one_function_is_chosen(client: httpx.Client) -> None:
    other = {**WEATHER, "name": "other"}
    choice = {"type": "function", "name": "other"}
    response = ask(client, **{**TOOLS, "tools": [WEATHER, other], "tool_choice": choice})
    assert [item["name"] for item in response["output"]] == ["other"]
    assert response["tool_choice"] == choice


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "json_schema", "name": "n", "schema": {"enum": ["yes"]}, "strict": True}, "yes"),
        ({"type": "json_object", "schema": {"const": {"a": 1}}}, {"a": 1}),
    ],
)
def test_the_answer_keeps_to_a_form(client: httpx.Client, form: dict[str, Any], expected: object) -> None:
    response = ask(client, text={"format": form}, max_output_tokens=40)
    assert json.loads(response["output"][0]["content"][0]["text"]) == expected
    assert response["status"] == "completed"
    assert response["completed_at"] >= response["created_at"]
    assert response["text"]["format"] == form


def test_a_conversation_that_is_too_long_loses_its_beginning_only_when_asked(client: httpx.Client) -> None:
    turns = [{"role": role, "content": "a" * 190} for role in ("user", "assistant", "user")]
    refused = client.post("/v1/responses", json=body(input=turns))
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert refused.json()["error"]["param"] == "input"
    response = ask(client, input=turns, truncation="auto")
    assert response["truncation"] == "auto"
    assert response["usage"]["dropped_messages"] > 0


@pytest.mark.parametrize(
    ("changes", "param", "named"),
    [
        ({"store": True}, "store", "stores no responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
        ({"input": []}, "input", "empty"),
        ({"input": 3}, "input", "3"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None, "input_image"),
        ({"input": [{"role": "user", "content": 3}]}, "input.0.content", "3"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0", "reasoning"),
        ({"input": [3]}, "input.0", "input.0"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "tool"),
        ({"input": [USER, RESULT]}, "input.1.call_id", "'c1'"),
        ({"input": [USER, {**CALL, "arguments": "{"}]}, None, "tool call"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading", "defer_loading"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools.0.name", "a b"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type", "mcp"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format", "grammar"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 3}}}},
            None,
            "json_schema",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "low"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "high"),
        ({"background": True}, "background", "background"),
        ({"include": ["file_search_call.results"]}, "include.0", "file_search_call.results"),
        ({"top_logprobs": 2}, "top_logprobs", "message.output_text.logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens", "0"),
        ({"max_output_tokens": "8"}, "max_output_tokens", "'8'"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"service_tier": "flex"}, "service_tier", "flex"),
        ({"conversation": "conv_1"}, "conversation", "conversation"),
        ({"max_tool_calls": 2}, "max_tool_calls", "max_tool_calls"),
        ({"messages": []}, "messages", "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: httpx.Client, changes: dict[str, Any], param: str | None, named: str
) -> None:
    response = client.post("/v1/responses", json=body(**changes))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]
    if param is not None:
        assert error["param"] == param


def test_an_answer_that_breaks_off_has_failed(
    client: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "result", property(_fails))
    *_, done, failed = stream(client)
    assert (done["type"], done["item"]["status"]) == ("response.output_item.done", "incomplete")
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "No more."}
    assert failed["response"]["output"] == [done["item"]]


def _fails(_: Answers) -> None:
    raise ApiError(503, "No more.")
