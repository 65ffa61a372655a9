"""LangChain's OpenAI classes as clients: pointed at the server, nothing else is changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

from helpers.serving import Running


class Verdict(BaseModel):
    """Whether something is so."""

    so: bool


@tool
def note(so: bool) -> str:
    """Notes it."""
    return f"noted {so}"


@pytest.fixture(scope="module")
def options(server: Running) -> Iterator[dict[str, Any]]:
    with httpx.Client(verify=False) as http:
        yield {
            "base_url": f"{server.url}/v1",
            "api_key": SecretStr("none"),
            "http_client": http,
            "max_retries": 0,
        }


@pytest.fixture(scope="module")
def model(options: dict[str, Any]) -> ChatOpenAI:
    return ChatOpenAI(model="tiny", temperature=0, max_completion_tokens=6, stream_usage=True, **options)


def test_invoke_and_stream(model: ChatOpenAI) -> None:
    messages = [SystemMessage("Be brief."), HumanMessage("Hello")]
    whole = model.invoke(messages)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 6
    assert whole.response_metadata["finish_reason"] == "length"
    pieces = list(model.stream(messages))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert any(piece.usage_metadata for piece in pieces)


@pytest.mark.parametrize(("name", "method"), [("tiny", "json_schema"), ("tiny-tools", "function_calling")])
def test_structured_output(options: dict[str, Any], name: str, method: Any) -> None:
    model = ChatOpenAI(model=name, max_completion_tokens=300, **options)
    chain = model.with_structured_output(Verdict, method=method)
    assert isinstance(chain.invoke("Is it so?"), Verdict)


def test_tools(options: dict[str, Any]) -> None:
    model = ChatOpenAI(model="tiny-tools", max_completion_tokens=300, **options)
    caller = model.bind_tools([note], tool_choice="note", parallel_tool_calls=False)
    question = HumanMessage("Is it so?")
    asked = caller.invoke([question])
    assert isinstance(asked, AIMessage)
    (call,) = asked.tool_calls
    assert call["name"] == "note"
    result = note.invoke(call)
    assert isinstance(result, ToolMessage)
    last = model.bind(max_completion_tokens=4).invoke([question, asked, result])
    assert last.response_metadata["finish_reason"] == "length"


def test_embeddings(options: dict[str, Any]) -> None:
    # Without tiktoken, whose tables it would fetch: the server tells when a text is too long.
    embeddings = OpenAIEmbeddings(model="tiny", check_embedding_ctx_length=False, **options)
    first, second = embeddings.embed_documents(["a", "b"])
    assert len(first) == 64
    assert embeddings.embed_query("b") == pytest.approx(second)
