"""The real weights behind HTTP: what clients get is what the engine gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

import pocketlm
from helpers.serving import running

pytestmark = pytest.mark.real

QUESTION = "Why is the sky blue?"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(bundle_folder: Path) -> Iterator[httpx.Client]:
    with running({"smollm2-135m": bundle_folder}, context_length=2048) as server, server.client() as client:
        yield client


def test_an_answer_is_the_engines_own(client: httpx.Client, model: pocketlm.Model) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16}
    answer = client.post("/v1/chat/completions", json=body).json()
    expected = model.generate(QUESTION, max_tokens=16)
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert answer["usage"]["energy"]["energy_j"] > 0


def test_a_form(client: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "Anna is 34 years old. Answer with her name and age."}],
        "max_tokens": 60,
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
    }
    text = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert json.loads(text) == {"name": "Anna", "age": 34}


def test_vectors_tell_topics_apart(client: httpx.Client) -> None:
    texts = [
        "The cat sleeps on the sofa.",
        "A kitten is napping on the couch.",
        "Interest rates rose again in March.",
    ]
    data = client.post("/v1/embeddings", json={"input": texts}).json()["data"]
    cat, kitten, rates = (np.array(each["embedding"]) for each in data)
    assert cat @ kitten > cat @ rates
    assert cat @ kitten > kitten @ rates
