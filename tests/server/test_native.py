"""llama-server's own paths: health, metrics, properties, tokens and templates."""

from __future__ import annotations

import importlib.metadata
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.serving import Running, running
from helpers.tiny import END_OF_TEXT, IM_START, VOCABULARY, tokenizer_json
from pocketlm.bundle import open_bundle
from pocketlm.manifest import Tokens
from pocketlm.network_lock import NetworkLock
from pocketlm.server import native
from pocketlm.server.config import ServerConfig
from pocketlm.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def ask(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    # Half a surrogate pair passes as JSON's escape only.
    response = client.post(path, content=json.dumps(body).encode())
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_health(server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.head("/health").status_code == 200
    for state, text in (("loading", "Loading model"), ("draining", "about to end")):
        monkeypatch.setattr(server.service, "state", state)
        response = client.get("/health")
        assert response.status_code == 503
        assert text in response.json()["error"]["message"]
        assert client.head("/health").status_code == 503
        assert client.post("/tokenize", json={"content": "x"}).status_code == 503


def test_metrics(client: httpx.Client) -> None:
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert "pocketlm_build_info" in plain.text
    openmetrics = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")


def test_refusals_are_counted(int8_bundle: Path) -> None:
    """Also those that no API hears of."""
    config = ServerConfig(
        port=0, api_keys=("key",), max_body_bytes=10, body_timeout_s=0.05, max_connections=1, send_timeout_s=5
    )
    key = {"x-api-key": "key"}

    def slow() -> Iterator[bytes]:
        yield b"{"
        limited = client.get("/metrics", headers=key)
        assert limited.status_code == 503
        time.sleep(0.2)
        yield b"}"

    with running({"tiny": int8_bundle}, config) as server, server.client() as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403
        assert client.get("/health", headers={"Origin": "https://evil.example"}).status_code == 403
        assert client.post("/tokenize", content=b"x" * 100, headers=key).status_code == 413
        with server.client() as other:
            assert other.post("/tokenize", content=slow(), headers=key).status_code == 408
        told = client.get("/metrics", headers=key).text
    counts = {"unauthorized": 1, "forbidden": 2, "too_large": 1, "too_many": 1, "timeout": 1}
    for reason, count in counts.items():
        assert f'pocketlm_refused_total{{reason="{reason}"}} {count}.0' in told


def test_an_error_that_nobody_foresaw_leaves_the_connection_open(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(server.service.store, "states", fails)
    for _ in range(3):
        response = client.get("/v1/models")
        assert response.status_code == 500
        assert "defect" not in response.text
    assert [record.name for record in caplog.records if record.exc_info] == ["pocketlm.server"] * 3


def test_props(server: Running, client: httpx.Client, tools_bundle: Path) -> None:
    props = client.get("/props").json()
    general = props["default_generation_settings"]
    assert general["n_ctx"] == 512
    assert (general["params"]["temperature"], general["params"]["n_predict"]) == (0, -1)
    assert (props["model_path"], props["total_slots"]) == ("tiny", 8)
    assert props["build_info"] == f"pocketlm {importlib.metadata.version('pocketlm')}"
    assert [each["name"] for each in props["models"]] == ["tiny", "tiny-tools"]
    assert props["energy"]["source"] == server.service.probe.source
    assert props["limits"]["max_body_bytes"] == 4 << 20
    named = client.get("/props", params={"model": "tiny-tools:latest"}).json()
    assert named["model_path"] == "tiny-tools"
    assert named["chat_template"] == open_bundle(tools_bundle, verify=False).chat_template
    assert client.get("/props", params={"model": "no"}).status_code == 404


def test_props_tell_what_the_operator_has_chosen(int8_bundle: Path) -> None:
    config = ServerConfig(port=0, max_tokens=9)
    with running({"tiny": int8_bundle}, config) as server, server.client() as client:
        props = client.get("/props").json()
        assert (props["network_lock"], props["models"][0]["loaded"]) == (None, False)
        assert props["default_generation_settings"]["params"]["n_predict"] == 9
        server.service.network_lock = NetworkLock("python", "an old kernel")
        lock = client.get("/props").json()["network_lock"]
        assert lock == {"kind": "python", "reason": "an old kernel"}


def test_tokens(client: httpx.Client) -> None:
    ids = ask(client, "/tokenize", content="Hi<|im_start|>")["tokens"]
    assert ids[-1] == IM_START
    assert ask(client, "/detokenize", tokens=ids) == {"content": "Hi<|im_start|>"}
    named = ask(client, "/tokenize", content="Hi<|im_start|>", model="tiny-tools:int8", parse_special=True)
    assert named == {"tokens": ids}
    assert ask(client, "/tokenize", content="") == {"tokens": []}
    assert ask(client, "/detokenize", tokens=[]) == {"content": ""}


def test_many_tokens_are_written_in_parts(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ask(client, "/tokenize", content="ABCDE")
    monkeypatch.setattr(native, "_PART", 2)
    assert ask(client, "/tokenize", content="ABCDE") == whole


def test_pieces(client: httpx.Client) -> None:
    tokens = ask(client, "/tokenize", content="the é", with_pieces=True)["tokens"]
    assert [each["piece"] for each in tokens] == ["the", " ", [0xC3], [0xA9]]
    assert [each["id"] for each in tokens] == ask(client, "/tokenize", content="the é")["tokens"]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_tokens_are_the_text(client: httpx.Client, text: str) -> None:
    tokens = ask(client, "/tokenize", content=text, with_pieces=True)["tokens"]
    pieces = (
        each["piece"].encode() if isinstance(each["piece"], str) else bytes(each["piece"]) for each in tokens
    )
    assert b"".join(pieces) == text.encode()
    assert ask(client, "/detokenize", tokens=[each["id"] for each in tokens]) == {"content": text}


def test_a_long_text_leaves_the_interpreter_to_others() -> None:
    tokenizer = Tokenizer(tokenizer_json(), None, Tokens(bos=None, eos=(END_OF_TEXT,), add_bos=False))
    encoding = threading.Thread(target=tokenizer.encode, args=("ab " * 50_000,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 3


def test_the_begin_of_text_comes_where_it_was_trained(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(client, "/tokenize", content="H", add_special=True)["tokens"] == [
        *ask(client, "/tokenize", content="H")["tokens"]
    ]
    trained = Tokenizer(tokenizer_json(), None, Tokens(bos=END_OF_TEXT, eos=(END_OF_TEXT,), add_bos=True))

    async def with_tokenizer(service: object, model: str | None, work: Any) -> Any:
        return work(trained)

    monkeypatch.setattr(native, "_with_tokenizer", with_tokenizer)
    [begin, token] = ask(client, "/tokenize", content="H", add_special=True)["tokens"]
    assert begin == END_OF_TEXT
    assert ask(client, "/tokenize", content="H") == {"tokens": [token]}


def test_a_template_is_applied(client: httpx.Client) -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>\n"
    assert ask(client, "/apply-template", messages=[USER]) == {"prompt": f"{prompt}<|im_start|>assistant\n"}
    bare = ask(client, "/apply-template", messages=[USER], add_generation_prompt=False)
    assert bare == {"prompt": prompt}
    with_tools = ask(client, "/apply-template", messages=[USER], tools=[TOOL], model="tiny-tools")
    assert '"name": "f"' in with_tools["prompt"]


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"content": "\udc00"}, "content"),
        ("/tokenize", {"content": "x", "parse_special": False}, "parse_special"),
        ("/tokenize", {"content": "x", "with_pieces": "yes"}, "with_pieces"),
        ("/tokenize", {"content": "x", "more": 1}, "more"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [1 << 70]}, "tokens.0"),
        ("/detokenize", {"tokens": [1.5]}, "tokens.0"),
        ("/detokenize", {"tokens": [0, VOCABULARY]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/apply-template", {"messages": []}, "messages"),
        ("/apply-template", {"messages": [USER], "tools": [TOOL]}, "messages"),
        ("/apply-template", {"messages": [{"role": "user"}]}, "messages.0.content"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    client: httpx.Client, path: str, body: dict[str, Any], named: str
) -> None:
    response = client.post(path, content=json.dumps(body).encode())
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == named


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/apply-template"])
def test_an_unknown_model(client: httpx.Client, path: str) -> None:
    body = {"/tokenize": {"content": "x"}, "/detokenize": {"tokens": []}}.get(path, {"messages": [USER]})
    assert client.post(path, json={**body, "model": "no"}).status_code == 404
