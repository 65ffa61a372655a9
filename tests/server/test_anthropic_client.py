"""Anthropic's and OpenAI's own packages against the server: messages and responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from helpers.serving import PATIENCE_S, Running

WEATHER: dict[str, Any] = {"type": "object", "properties": {"c": {"enum": ["Oslo"]}}, "required": ["c"]}
TOOL: Any = {"name": "weather", "description": "Now.", "input_schema": WEATHER}
FUNCTION: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
USER: Any = {"role": "user", "content": "Hi"}


class Verdict(BaseModel):
    verdict: Literal["yes", "no"]


@pytest.fixture
def messages(server: Running) -> Iterator[Any]:
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client.messages


@pytest.fixture
def responses(server: Running) -> Iterator[Any]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client.responses


def test_a_message_whole_and_streamed(messages: Any) -> None:
    asked = {"model": "tiny", "max_tokens": 8, "messages": [USER], "stop_sequences": ["\0"]}
    whole = messages.create(**asked, extra_body={"temperature": 0.0})
    anthropic.types.Message.model_validate(whole.to_dict())
    assert whole.usage.output_tokens == 8
    with messages.stream(**asked) as stream:
        events = list(stream)
        streamed = stream.get_final_message()
    text = "".join(event.text for event in events if event.type == "text")
    [ending] = [event for event in events if event.type == "message_delta"]
    assert text == streamed.content[0].text == whole.content[0].text
    assert streamed.stop_reason == whole.stop_reason == "max_tokens"
    assert ending.usage.energy["source"] == whole.usage.energy["source"]
    counted = messages.count_tokens(model="tiny", messages=[USER])
    assert counted.input_tokens == streamed.usage.input_tokens + streamed.usage.cache_read_input_tokens


def test_anthropics_tools(messages: Any) -> None:
    asked = {"model": "tiny-tools", "max_tokens": 80, "tools": [TOOL]}
    with messages.stream(**asked, messages=[USER], tool_choice={"type": "tool", "name": "weather"}) as stream:
        answer = stream.get_final_message()
    [call] = answer.content
    assert (answer.stop_reason, call.name, call.input) == ("tool_use", "weather", {"c": "Oslo"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain"}
    turns = [USER, answer.to_param(), {"role": "user", "content": [result]}]
    final = messages.create(**asked, messages=turns, tool_choice={"type": "none"})
    assert [block.type for block in final.content] == ["text"]


def test_anthropics_structured_output(messages: Any) -> None:
    parsed = messages.parse(model="tiny", max_tokens=40, messages=[USER], output_format=Verdict)
    assert isinstance(parsed.parsed_output, Verdict)


def test_anthropics_errors(messages: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        messages.create(model="tiny", max_tokens=8, messages=[USER], thinking={"type": "adaptive"})
    with pytest.raises(anthropic.NotFoundError, match="absent") as found:
        messages.create(model="absent", max_tokens=8, messages=[USER])
    assert found.value.body["error"]["type"] == "not_found_error"


def test_the_async_client_and_its_betas(server: Running) -> None:
    async def streamed() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=server.url, api_key="none", timeout=PATIENCE_S) as client,
            client.beta.messages.stream(
                model="tiny", max_tokens=8, messages=[USER], betas=["prompt-caching-2024-07-31"]
            ) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(streamed())


def test_a_response_whole_and_streamed(responses: Any) -> None:
    asked = {"model": "tiny", "input": "Hi", "max_output_tokens": 8, "store": False}
    whole = responses.create(**asked)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    with responses.stream(**asked) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == 8


def test_openais_tools(responses: Any) -> None:
    asked = {"model": "tiny-tools", "tools": [FUNCTION], "max_output_tokens": 80}
    with responses.stream(**asked, input=[USER], tool_choice="required", parallel_tool_calls=False) as stream:
        answer = stream.get_final_response()
    [call] = answer.output
    assert json.loads(call.arguments) == {"c": "Oslo"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}
    final = responses.create(**asked, input=[USER, *answer.output, result], tool_choice="none")
    assert [item.type for item in final.output] == ["message"]


def test_openais_structured_output(responses: Any) -> None:
    parsed = responses.parse(model="tiny", input="Hi", text_format=Verdict, max_output_tokens=40)
    assert isinstance(parsed.output_parsed, Verdict)
    again = responses.create(model="tiny", input=[USER, *parsed.output, USER], max_output_tokens=4)
    assert again.output_text


def test_openais_errors(responses: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="stores no responses") as found:
        responses.create(model="tiny", input="Hi", previous_response_id="resp_1")
    assert found.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError, match="absent"):
        responses.create(model="absent", input="Hi")
