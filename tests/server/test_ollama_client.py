"""The `ollama` package against this server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from helpers.serving import Running

ollama = pytest.importorskip("ollama")

QUESTION = [{"role": "user", "content": "Hi"}]
OPTIONS = {"num_predict": 6}


@pytest.fixture
def client(server: Running) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as client:
        yield client


def weather(city: str) -> str:
    """How it is there now.

    Args:
        city: where
    """
    return f"Rain in {city}"


def test_chat(client: ollama.Client) -> None:
    whole = client.chat("tiny", QUESTION, options=OPTIONS)
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 6)
    parts = list(client.chat("tiny", QUESTION, stream=True, options=OPTIONS))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert parts[-1].total_duration > 0


def test_generate(client: ollama.Client) -> None:
    whole = client.generate("tiny", "Hi", options=OPTIONS, logprobs=True, top_logprobs=2)
    assert len(whole.logprobs) == whole.eval_count == 6
    assert len(whole.logprobs[0].top_logprobs) == 2
    parts = list(client.generate("tiny", "Hi", stream=True, options=OPTIONS, keep_alive="5m"))
    assert "".join(part.response for part in parts) == whole.response
    assert client.generate("tiny", keep_alive=-1).done_reason == "load"


def test_a_format(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer = client.chat("tiny", QUESTION, format=schema, options={"num_predict": 64})
    if answer.done_reason == "stop":
        assert isinstance(json.loads(answer.message.content)["ok"], bool)
    else:
        assert answer.message.content.lstrip().startswith("{")


def test_tools(client: ollama.Client) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        *QUESTION,
        ollama.Message(role="assistant", tool_calls=[call]),
        ollama.Message(role="tool", tool_name="weather", content=weather("Oslo")),
    ]
    answer = client.chat("tiny-tools", messages, tools=[weather], options=OPTIONS)
    assert answer.message.role == "assistant"


def test_models(client: ollama.Client) -> None:
    models = {model.model: model for model in client.list().models}
    assert set(models) == {"tiny", "tiny-tools"}
    shown = client.show("tiny")
    assert shown.modelinfo["llama.block_count"] == 2
    assert shown.details.quantization_level == "int8"
    client.generate("tiny")
    running = {model.name: model for model in client.ps().models}["tiny"]
    assert running.digest == models["tiny"].digest
    assert running.context_length == 512


def test_embeddings(client: ollama.Client) -> None:
    embedded = client.embed("tiny", ["One", "Two"], dimensions=64)
    assert [len(vector) for vector in embedded.embeddings] == [64, 64]
    assert client.embeddings("tiny", "One").embedding == pytest.approx(embedded.embeddings[0])


def test_errors(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="no model 'no'") as missing:
        client.chat("no", QUESTION)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="pocketlm pull") as refused:
        client.pull("tiny")
    assert refused.value.status_code == 403
    with pytest.raises(ollama.ResponseError, match="think"):
        client.generate("tiny", "Hi", think=True)
