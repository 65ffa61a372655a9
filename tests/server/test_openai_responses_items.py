"""Items of `/v1/responses`: how they become a prompt, and how an answer becomes items."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from pocketlm.energy import Reading
from pocketlm.generate import Completion, Piece, Timings, Usage
from pocketlm.server.answers import Result
from pocketlm.server.errors import ApiError
from pocketlm.server.openai import responses_output
from pocketlm.server.openai.responses_input import ResponsesRequest, conversation, settings
from pocketlm.server.openai.responses_output import Output
from pocketlm.tools import ToolCall

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"c": "Oslo"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "Rain"}


def prompt(*items: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    request = ResponsesRequest.model_validate({"input": list(items), **changes})
    return [dict(message) for message in conversation(request)]


def test_items_become_messages() -> None:
    developer = {"role": "developer", "content": "D"}
    answer = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [
            {"type": "output_text", "text": "Wait.", "annotations": [], "logprobs": [], "parsed": None}
        ],
    }
    calls = [{**CALL, "id": "fc_1", "status": "completed"}, {**CALL, "call_id": "c2"}]
    results = [RESULT, {**RESULT, "call_id": "c2", "output": [{"type": "input_text", "text": "Sun"}]}]
    function = {"name": "weather", "arguments": '{"c": "Oslo"}'}
    assert prompt(developer, USER, answer, *calls, *results, instructions="I") == [
        {"role": "system", "content": "I\nD"},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Wait.",
            "tool_calls": [{"id": name, "type": "function", "function": function} for name in ("c1", "c2")],
        },
        {"role": "tool", "content": "Rain", "tool_call_id": "c1", "name": "weather"},
        {"role": "tool", "content": "Sun", "tool_call_id": "c2", "name": "weather"},
    ]


def test_users_messages_stay_apart() -> None:
    assert prompt(USER, USER) == [USER, USER]


def test_only_what_is_given_is_set() -> None:
    assert settings(ResponsesRequest.model_validate({"input": "Hi"})) == {}


def ended(reason: Any, *pieces: Piece) -> Result:
    timings = Timings(0, 0, 0, 0, 0, None, None)
    completion = Completion("", (), reason, Usage(1, 0, len(pieces)), timings, pieces)
    return Result((completion,), Reading("none", "process", "estimated", 0.0, None, reason="no probe"))


def output_of(*pieces: Piece) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of an answer in these pieces, and the last one's response."""
    answers: Any = SimpleNamespace(model=SimpleNamespace(model=None), model_name="m", created=0)
    output = Output(ResponsesRequest.model_validate({"input": "Hi"}), answers)
    events = [each for piece in pieces for each in output.add(piece)] + output.end(ended("stop", *pieces))
    for each in events:
        EVENT.validate_python(each)
    return events, events[-1]["response"]


def test_texts_and_calls_are_items_of_their_own() -> None:
    call = ToolCall("weather", {"c": "Oslo"})
    events, response = output_of(
        Piece("Let", 1), Piece("", 2), Piece(" me", 3, tool_calls=(call, call)), Piece("So.", 4)
    )
    assert [item["type"] for item in response["output"]] == [
        "message",
        "function_call",
        "function_call",
        "message",
    ]
    assert [item["content"][0]["text"] for item in response["output"][::3]] == ["Let me", "So."]
    assert len({item["id"] for item in response["output"]}) == 4
    done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
    assert done == response["output"]


def test_an_empty_answer_is_an_empty_message() -> None:
    events, response = output_of(Piece("", 1))
    assert [item["content"][0]["text"] for item in response["output"]] == [""]
    done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
    assert done == response["output"]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("stop", ("completed", None)),
        ("length", ("incomplete", {"reason": "max_output_tokens"})),
        ("timeout", ("incomplete", {"reason": "max_output_tokens"})),
    ],
)
def test_endings(reason: str, expected: object) -> None:
    assert responses_output._ending(ended(reason).completions[0]) == expected


def test_an_answer_that_the_server_breaks_off_is_no_answer() -> None:
    with pytest.raises(ApiError, match="ended the answer"):
        responses_output._ending(ended("cancelled").completions[0])
