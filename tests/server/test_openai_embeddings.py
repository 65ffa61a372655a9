"""`/v1/embeddings` and `/v1/models`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import pocketlm
from helpers.tiny import CONFIG
from pocketlm.server.errors import api_error
from pocketlm.session import NoHiddenStatesError

PATH = "/v1/embeddings"
TEXTS = ["one", "two words"]


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"input": TEXTS, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_vectors_are_the_engines_own(client: httpx.Client, int8_bundle: Path) -> None:
    with pocketlm.load(int8_bundle, threads=1) as model:
        expected = model.embed(TEXTS)
        ids = [model.tokenizer.encode(text) for text in TEXTS]
    answer = ask(client)
    assert [each["index"] for each in answer["data"]] == [0, 1]
    vectors = [each["embedding"] for each in answer["data"]]
    np.testing.assert_array_equal(np.array(vectors, np.float32), expected.vectors)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == expected.prompt_tokens
    assert usage["energy"]["energy_j"] is not None
    assert answer["model"] == "tiny"

    assert ask(client, input=ids)["data"] == answer["data"]
    assert ask(client, input=ids[0])["data"][0] == answer["data"][0]
    assert ask(client, input="one", dimensions=CONFIG["hidden_size"])["data"][0] == answer["data"][0]
    packed = ask(client, encoding_format="base64", model="tiny", user="u")["data"][1]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), expected.vectors[1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": "x" * 600}, "input"),
        ({"input": ["a"] * 257}, "input"),
        ({"input": [100_000]}, "input"),
        ({"dimensions": 7}, "dimensions"),
        ({"dimensions": 7, "model": "tiny"}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"pooling": "cls"}, "pooling"),
    ],
)
def test_what_is_wrong_is_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = client.post(PATH, content=json.dumps({"input": "one", **fields}))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_bundle_without_hidden_states_is_the_requests_fault() -> None:
    told = api_error(NoHiddenStatesError("it gives no embeddings"))
    assert (told.status, told.code, told.param) == (400, "no_embeddings", "model")


def test_unknown_models(client: httpx.Client) -> None:
    for fields in ({}, {"dimensions": 64}):
        response = client.post(PATH, json={"input": "one", "model": "nothing", **fields})
        assert response.status_code == 404


def test_models_are_described(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [each["id"] for each in listed["data"]] == ["tiny", "tiny-tools"]
    first = listed["data"][0]
    assert first["owned_by"] == "pocketlm"
    assert first["meta"]["precision"] == "int8"
    assert first["meta"]["context_length"] == first["meta"]["trained_context_length"] == 512
    assert first["meta"]["bytes"] > 100_000
    assert first["meta"]["quality"]["top1"] <= 1
    for name in ("tiny", "tiny:int8", "Tiny:latest"):
        found = client.get(f"/v1/models/{name}").json()
        assert (found["id"], found["meta"]["bytes"]) == ("tiny", first["meta"]["bytes"])


@pytest.mark.parametrize("name", ["nothing", "..%2F..%2Fetc%2Fpasswd", "a/b", "%00", "tiny%FF"])
def test_unknown_names_are_not_found(client: httpx.Client, name: str) -> None:
    response = client.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
