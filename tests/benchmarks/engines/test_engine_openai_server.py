"""A server by URL: what it can do is found out, and what it cannot is said."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from helpers.fake_openai_server import Behaviour, serving
from pocketlm_benchmarks.engines.http_json import Server
from pocketlm_benchmarks.engines.openai_server import OpenAIServer
from pocketlm_benchmarks.engines.protocol import (
    EngineError,
    EngineMissingError,
    EngineSpec,
    Message,
    Query,
    Trace,
)

MESSAGES = (Message(role="user", content="Hi"),)
GRID = Query((5, 6, 7, 8), 3)
WORKLOAD = Query((5, 6), 3, MESSAGES)


def opened(url: str) -> OpenAIServer:
    return OpenAIServer(EngineSpec("server", url, threads=2, context_length=64))


def answered(behaviour: Behaviour, *queries: Query) -> tuple[OpenAIServer, list[Trace]]:
    with serving(behaviour) as url:
        server = opened(url)
        behaviour.requests.clear()
        traces = server.answer(queries)
        server.close()
    return server, traces


def test_llama_server_takes_ids_and_tells_all() -> None:
    behaviour = Behaviour()
    server, (trace,) = answered(behaviour, GRID)
    assert (server.info.name, server.info.version) == ("llama-server", "b42-abc")
    assert (server.info.precision, server.info.weight_bytes) == ("Q8_0", 1234)
    assert (server.info.energy_seen, server.info.load_s) == ("machine", None)
    assert "prompts as token ids" in server.info.note
    assert "may end early" not in server.info.note
    ((path, body),) = behaviour.requests
    assert path == "/v1/completions"
    assert body == {
        "model": "tiny",
        "prompt": [5, 6, 7, 8],
        "max_tokens": 3,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "cache_prompt": False,
    }
    assert (trace.prompt_tokens, trace.cached_tokens, trace.new_tokens) == (4, 0, 3)
    assert trace.text == " t0 t1 t2"
    assert trace.prefill_s is not None
    assert trace.prefill_s > 0
    assert trace.decode_tokens == len(trace.gaps_s) == 2
    assert trace.decode_s == pytest.approx(sum(trace.gaps_s))


def test_a_server_that_takes_messages_only() -> None:
    behaviour = Behaviour(takes_ids=False, takes_extras=False)
    server, (trace,) = answered(behaviour, WORKLOAD)
    assert "prompts as messages" in server.info.note
    assert "answers may end early and prompts may come from its cache" in server.info.note
    ((path, body),) = behaviour.requests
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "Hi"}]
    assert not {"prompt", "ignore_eos", "cache_prompt"} & body.keys()
    assert (trace.prompt_tokens, trace.cached_tokens, trace.new_tokens) == (11, 4, 3)
    assert len(trace.gaps_s) == 2  # the chunk that opens the answer counts for nothing


def test_messages_only_cannot_do_the_grid() -> None:
    with pytest.raises(EngineMissingError, match="takes no token ids"):
        answered(Behaviour(takes_ids=False), WORKLOAD, GRID)


def test_ids_that_are_taken_for_text_are_not_used() -> None:
    behaviour = Behaviour(miscounts_ids=True)
    answered(behaviour, WORKLOAD)
    assert behaviour.requests[0][0] == "/v1/chat/completions"


def test_without_the_servers_counts_its_chunks_are_counted() -> None:
    server, (trace,) = answered(Behaviour(counts=False), WORKLOAD)
    assert "tokens counted by the chunks" in server.info.note
    assert (trace.prompt_tokens, trace.new_tokens, len(trace.gaps_s)) == (2, 3, 2)


def test_chunks_of_several_tokens_leave_no_gaps() -> None:
    _, (trace,) = answered(Behaviour(merges_chunks=True), GRID)
    assert (trace.new_tokens, trace.decode_tokens, trace.gaps_s) == (3, 2, ())
    assert trace.decode_s is not None


def test_an_answer_that_ends_early_says_so() -> None:
    _, (trace,) = answered(Behaviour(ends_after=1), GRID)
    assert (trace.new_tokens, trace.decode_s, trace.decode_tokens) == (1, None, 0)


def test_queries_are_under_way_together() -> None:
    behaviour = Behaviour()
    with serving(behaviour) as url:
        server = opened(url)
        behaviour.barrier = threading.Barrier(3)  # would break if one waited for another
        traces = server.answer([GRID, WORKLOAD, GRID])
    assert [trace.prompt_tokens for trace in traces] == [4, 2, 4]


@pytest.mark.parametrize(
    ("models", "pages", "identity"),
    [
        ([{"id": "m", "owned_by": "vllm"}], {"/version": {"version": "0.9"}}, ("vllm", "0.9")),
        ([{"id": "m", "owned_by": "library"}], {"/api/version": {"version": "0.5"}}, ("ollama", "0.5")),
        ([{"id": "m"}], {"/api/version": ["nonsense"]}, ("server", "unknown")),
    ],
)
def test_identity(models: list[dict[str, Any]], pages: dict[str, Any], identity: tuple[str, str]) -> None:
    server, _ = answered(Behaviour(models=models, pages=pages), GRID)
    assert (server.info.name, server.info.version) == identity
    assert (server.info.precision, server.info.weight_bytes) == ("unknown", None)
    assert "may end early" in server.info.note  # it took the fields, but who knows


def test_several_models_need_a_name() -> None:
    with serving(Behaviour(models=[{"id": "a"}, {"id": "b"}])) as url:
        with pytest.raises(EngineError, match=r"has 2 models; name one: http://.*#MODEL. It has: a, b"):
            opened(url)
        assert opened(f"{url}#b")._model == "b"


def test_a_server_that_fails() -> None:
    with serving(Behaviour(fails="out of memory")) as url, pytest.raises(EngineError, match="out of memory"):
        opened(url)


def test_a_server_that_fails_later() -> None:
    behaviour = Behaviour()
    with serving(behaviour) as url:
        server = opened(url)
        behaviour.fails = "out of memory"
        with pytest.raises(EngineError, match="/completions reported out of memory"):
            server.answer([GRID])
        behaviour.fails, behaviour.ends_after = None, 0
        with pytest.raises(EngineError, match="answered without a token"):
            server.answer([GRID])


def test_a_server_that_goes_away() -> None:
    with serving(Behaviour()) as url:
        server = opened(url)
    with pytest.raises(EngineError, match=r"/completions did not answer: ConnectionRefusedError"):
        server.answer([GRID])


def test_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(EngineMissingError, match="no OpenAI-compatible server answers at http://127"):
        opened(f"http://127.0.0.1:{port}/v1")


def test_another_kind_of_server() -> None:
    with serving(Behaviour()) as url:
        with pytest.raises(EngineError, match="/models answered 404: no /other/models"):
            opened(url.replace("/v1", "/other"))
        with pytest.raises(EngineError, match="is no URL of a server"):
            opened("ftp://127.0.0.1")


def test_what_is_not_http_or_not_json() -> None:
    for reply, message in (
        (b"SSH-2.0-OpenSSH\r\n", "/models did not answer: BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", "b'<html>'; JSON is expected"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=_reply_once, args=(listener, reply))
            thread.start()
            with pytest.raises(EngineError, match=message):
                opened(f"http://127.0.0.1:{listener.getsockname()[1]}")
            thread.join()


def _reply_once(listener: socket.socket, reply: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(reply)


def test_the_environments_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving(Behaviour()) as url:
        assert Server(url).get("/models")["data"]


@pytest.mark.parametrize(
    ("host", "seen"),
    [("localhost", True), ("127.0.0.2", True), ("192.168.0.7", False), ("host.local", False)],
)
def test_loopback(host: str, seen: bool) -> None:
    from pocketlm_benchmarks.engines.openai_server import _is_loopback

    assert _is_loopback(host) is seen
