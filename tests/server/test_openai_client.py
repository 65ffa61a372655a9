"""The `openai` package as a client. It parses every answer into its own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from helpers.serving import PATIENCE_S, Running

HELLO: Any = [{"role": "user", "content": "Hello"}]


@contextmanager
def client_of(server: Running, **options: Any) -> Iterator[OpenAI]:
    with (
        httpx.Client(verify=False) as http,
        OpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            http_client=http,
            max_retries=0,
            timeout=PATIENCE_S,
            **options,
        ) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def api(server: Running) -> Iterator[OpenAI]:
    """A client that takes an answer that is not as its types say for an error."""
    with client_of(server, _strict_response_validation=True) as client:
        yield client


@pytest.fixture(scope="module")
def usual_api(server: Running) -> Iterator[OpenAI]:
    """A client as it comes, for what is not as its types say at OpenAI either."""
    with client_of(server) as client:
        yield client


def test_models(api: OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny", "tiny-tools"]
    assert api.models.retrieve("tiny:latest").id == "tiny"


def test_chat(api: OpenAI) -> None:
    answer = api.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=6, n=2, logprobs=True, top_logprobs=1, seed=1
    )
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["energy"]["kind"] == "estimated"


def test_an_answer_can_be_sent_back(api: OpenAI) -> None:
    first = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, temperature=0)
    messages = [*HELLO, first.choices[0].message.model_dump(), *HELLO]
    again = api.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    assert again.usage is not None
    assert first.usage is not None
    assert again.usage.prompt_tokens > first.usage.prompt_tokens


def test_streams(api: OpenAI) -> None:
    whole = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6)
    text, usage = "", None
    with api.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == 6


class Digit(BaseModel):
    digit: bool


def test_parsed_answers(api: OpenAI) -> None:
    answer = api.chat.completions.parse(model="tiny", messages=HELLO, response_format=Digit, max_tokens=100)
    assert isinstance(answer.choices[0].message.parsed, Digit)


def test_tools_through_the_packages_own_stream(api: OpenAI) -> None:
    tool = openai.pydantic_function_tool(Digit, name="note")
    with api.chat.completions.stream(
        model="tiny-tools",
        messages=HELLO,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    ) as stream:
        answer = stream.get_final_completion()
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, Digit)
    call = calls[0].model_dump(exclude={"function": {"parsed_arguments"}})
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "noted"},
    ]
    again = api.chat.completions.create(model="tiny-tools", messages=messages, max_tokens=4)
    assert again.choices[0].finish_reason == "length"


def test_completions(api: OpenAI, usual_api: OpenAI) -> None:
    answer = api.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, logprobs=1, echo=False)
    assert [choice.index for choice in answer.choices] == [0, 1]
    # The types of streams lack the null of a finish_reason that is still to come.
    chunks = usual_api.completions.create(model="tiny", prompt="a", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_embeddings(api: OpenAI, usual_api: OpenAI) -> None:
    plain = api.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float")
    # By default the package asks for base64, which its types do not know.
    packed = usual_api.embeddings.create(model="tiny", input="b")
    assert packed.data[0].embedding == pytest.approx(plain.data[1].embedding)


def test_errors_become_the_packages_own(api: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nothing"):
        api.chat.completions.create(model="nothing", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(model="tiny", messages=HELLO, store=True)
    assert refused.value.param == "store"
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(model="tiny", messages=HELLO, stream=True, logit_bias={"9999": 1})
    assert refused.value.param == "logit_bias"


def test_an_error_within_a_stream_is_raised(api: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketlm.server.openai import chat

    def broken(*_: object) -> str:
        raise ValueError("a secret")

    monkeypatch.setattr(chat, "finish_reason", broken)
    stream = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, stream=True)
    with pytest.raises(openai.APIError, match="went wrong") as failed:
        list(stream)
    assert "secret" not in json.dumps(failed.value.body)
