"""Ollama's API over HTTP."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.serving import PATIENCE_S, Running, running
from helpers.tiny import VOCABULARY
from pocketlm.errors import PocketlmError
from pocketlm.manifest import read_manifest
from pocketlm.server.answers import Answers
from pocketlm.server.config import ServerConfig
from pocketlm.server.ollama.descriptions import _readable
from pocketlm.server.ollama.messages import ChatMessage, template_messages
from pocketlm.server.ollama.times import nanoseconds, timestamp
from pocketlm.tools import ToolChoice

USER = {"role": "user", "content": "Hi"}
FUNCTION = {
    "name": "weather",
    "description": "Now.",
    "parameters": {"type": "object", "properties": {"c": {"enum": ["Oslo"]}}, "required": ["c"]},
}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"function": {"name": "weather", "arguments": {"c": "Oslo"}}}
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def chat(**changes: Any) -> dict[str, Any]:
    options = {"num_predict": 8, **changes.pop("options", {})}
    return {"model": "tiny", "messages": [USER], "stream": False, "options": options, **changes}


def generate(**changes: Any) -> dict[str, Any]:
    options = {"num_predict": 8, **changes.pop("options", {})}
    return {"model": "tiny", "prompt": "Hi", "stream": False, "options": options, **changes}


def ask(client: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return dict(response.json())


def refusal(client: httpx.Client, path: str, body: Mapping[str, Any], status: int = 400) -> str:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


def lines(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an answer that is streamed because nothing says otherwise."""
    body.pop("stream")
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    found = [json.loads(line) for line in response.text.splitlines()]
    assert [each["done"] for each in found] == [False] * (len(found) - 1) + [True]
    return found


def without_times(answer: Mapping[str, Any]) -> dict[str, Any]:
    changing = {"created_at", "energy", "cached_tokens", *DURATIONS}
    return {name: value for name, value in answer.items() if name not in changing}


def test_a_message(client: httpx.Client) -> None:
    answer = ask(client, "/api/chat", chat())
    assert answer["model"] == "tiny"
    assert datetime.fromisoformat(answer["created_at"]).tzinfo is not None
    assert set(answer["message"]) == {"role", "content"}
    assert (answer["done"], answer["done_reason"], answer["eval_count"]) == (True, "length", 8)
    assert all(isinstance(answer[name], int) and answer[name] > 0 for name in DURATIONS)
    assert answer["total_duration"] >= answer["eval_duration"]
    assert answer["energy"]["source"]


def test_the_whole_prompt_is_counted(client: httpx.Client) -> None:
    body = chat(messages=[{"role": "user", "content": "What is cached counts too."}])
    first, second = ask(client, "/api/chat", body), ask(client, "/api/chat", body)
    assert first["prompt_eval_count"] == second["prompt_eval_count"]
    assert second["cached_tokens"] > first["cached_tokens"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", chat()),
        ("/api/chat", chat(logprobs=True, top_logprobs=2, options={"temperature": 1.0, "seed": 3})),
        ("/api/chat", chat(model="tiny-tools", tools=[TOOL], options={"num_predict": 60})),
        ("/api/generate", generate(system="Be brief.")),
        ("/api/generate", generate(raw=True, logprobs=True)),
    ],
)
def test_the_lines_add_up_to_the_answer(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    whole = ask(client, path, body)
    found = lines(client, path, dict(body))
    added_up = dict(found[-1])
    if "message" in whole:
        message = {"role": "assistant", "content": "".join(each["message"]["content"] for each in found)}
        if calls := [call for each in found for call in each["message"].get("tool_calls", ())]:
            message["tool_calls"] = calls
        added_up["message"] = message
    else:
        added_up["response"] = "".join(each["response"] for each in found)
    if "logprobs" in whole:
        added_up["logprobs"] = [token for each in found[:-1] for token in each["logprobs"]]
        assert len(whole["logprobs"]) == whole["eval_count"]
    assert without_times(added_up) == without_times(whole)


def test_a_call_has_its_arguments_as_an_object(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tiny model calls nothing of its own accord, and the API cannot make it.
    monkeypatch.setattr(ToolChoice, "parse", classmethod(lambda cls, *_: cls("required")))
    body = chat(model="tiny-tools", tools=[TOOL], options={"num_predict": 400})
    answer = ask(client, "/api/chat", body)
    calls = answer["message"]["tool_calls"]
    assert calls[0] == CALL
    assert answer["done_reason"] == "stop"
    told = [each["message"].get("tool_calls", []) for each in lines(client, "/api/chat", dict(body))]
    assert [call for some in told for call in some] == calls
    back = [USER, answer["message"], {"role": "tool", "content": "Rain", "tool_name": "weather"}]
    assert ask(client, "/api/chat", {**body, "messages": back})["done"]


def test_calls_and_results_find_each_other() -> None:
    named = {**CALL, "id": "given", "type": "function"}
    messages = [
        {"role": "assistant", "tool_calls": [CALL, named]},
        {"role": "tool", "content": "1", "tool_name": "weather"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "000000003"},
        {"role": "tool", "content": "5"},
    ]
    found: list[Any] = list(template_messages([ChatMessage.model_validate(each) for each in messages]))
    assert [call["id"] for call in found[0]["tool_calls"]] == ["000000000", "given"]
    assert found[0]["tool_calls"][0] == {"id": "000000000", "type": "function", **CALL}
    assert found[1] == {"role": "tool", "content": "1", "tool_call_id": "000000000", "name": "weather"}
    assert [each.get("tool_call_id") for each in found[2:4]] == ["given", None]
    assert [call["id"] for call in found[4]["tool_calls"]] == ["000000002", "000000003"]
    assert [each["tool_call_id"] for each in found[5:]] == ["000000003", "000000002"]


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [({"enum": ["yes", "no"]}, r'"(yes|no)"'), ("json", r"\{.*"), ("", r".*")],
)
def test_the_answer_keeps_to_its_format(client: httpx.Client, wanted: object, pattern: str) -> None:
    answer = ask(client, "/api/chat", chat(format=wanted, options={"num_predict": 20}))
    assert re.fullmatch(pattern, answer["message"]["content"], re.DOTALL)


def test_a_stop_ends_the_answer(client: httpx.Client) -> None:
    text = ask(client, "/api/generate", generate(options={"num_predict": 12}))["response"]
    stop = text[4:6]
    answer = ask(client, "/api/generate", generate(options={"num_predict": 12, "stop": [stop]}))
    assert (answer["response"], answer["done_reason"]) == (text[: text.index(stop)], "stop")


def test_a_seed_gives_the_same_text(client: httpx.Client) -> None:
    options = {"temperature": 1.5, "seed": 7, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    texts = [ask(client, "/api/generate", generate(options=options))["response"] for _ in range(2)]
    assert texts[0] == texts[1]
    ask(client, "/api/generate", generate(options={**options, "seed": -1}))


def test_the_prompt_goes_through_the_template_unless_it_is_raw(client: httpx.Client) -> None:
    def count(**changes: Any) -> int:
        return int(ask(client, "/api/generate", generate(**changes))["prompt_eval_count"])

    assert count(raw=True) == 2
    as_message = ask(client, "/api/chat", chat())["prompt_eval_count"]
    assert count() == as_message < count(system="S")


OPTIONS_THAT_ASK_FOR_NOTHING: dict[str, Any] = {
    "num_predict": 2,
    "num_ctx": 512,
    "repeat_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repeat_last_n": -1,
    "penalize_newline": True,
    "typical_p": 1.0,
    "tfs_z": 1,
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "num_keep": 5,
    "num_gpu": 0,
    "num_thread": None,
    "low_vram": False,
    "use_mmap": True,
}


def test_what_asks_for_nothing_is_taken(client: httpx.Client) -> None:
    empty = {"context": [], "images": [], "suffix": "", "template": "", "think": False, "shift": False}
    body = generate(options=OPTIONS_THAT_ASK_FOR_NOTHING, **empty)
    assert ask(client, "/api/generate", body)["eval_count"] == 2


@pytest.mark.parametrize("limit", [-1, -2])
def test_without_a_limit_the_context_fills_up(client: httpx.Client, limit: int) -> None:
    messages = [{"role": "user", "content": "a" * 470}]
    answer = ask(client, "/api/chat", chat(messages=messages, options={"num_predict": limit}))
    assert answer["done_reason"] == "length"
    assert answer["prompt_eval_count"] + answer["eval_count"] == 512


def test_a_conversation_is_only_cut_when_that_is_asked_for(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "b" * 300}, {"role": "assistant", "content": "b" * 200}, USER]
    told = refusal(client, "/api/chat", chat(messages=messages))
    assert "messages" in told
    assert "512" in told
    assert ask(client, "/api/chat", chat(messages=messages, truncate=True))["dropped_messages"] == 2


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"stream": 0}, "stream"),
    ({"format": "xml"}, "format"),
    ({"format": {"type": "nothing"}}, "format"),
    ({"think": True}, "think"),
    ({"think": "low"}, "think"),
    ({"shift": True}, "shift"),
    ({"keep_alive": "soon"}, "keep_alive"),
    ({"keep_alive": True}, "keep_alive"),
    ({"keep_alive": 1e12}, "keep_alive"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"suffix": "x"}, "suffix"),
    ({"tools": [TOOL]}, "tools"),  # of a model whose template has none
    ({"tools": [{"type": "function", "function": {**FUNCTION, "parameters": {"type": 1}}}]}, "tool"),
    ({"messages": [{**USER, "images": ["aGk="]}]}, "messages.0.images"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages.0.tool_calls"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        "messages.0.tool_calls.0.function.arguments",
    ),
    *(
        ({"options": {name: value}}, f"options.{name}")
        for name, value in {
            "num_ctx": 1024,
            "num_predict": 0,
            "num_thread": 4,
            "num_batch": 8,
            "num_gpu": 99,
            "mirostat": 1,
            "typical_p": 0.7,
            "tfs_z": 0.5,
            "repeat_last_n": 64,
            "penalize_newline": False,
            "use_mmap": False,
            "temperature": -1,
            "seed": 1 << 64,
            "stop": [""],
            "stopp": ["x"],
        }.items()
    ),
]


@pytest.mark.parametrize(("changes", "named"), BAD_CHATS)
def test_what_is_not_supported_is_refused_by_name(
    client: httpx.Client, changes: dict[str, Any], named: str
) -> None:
    assert named in refusal(client, "/api/chat", chat(**changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"context": [1]}, "context"),
        ({"images": ["aGk="]}, "images"),
        ({"raw": True, "system": "S"}, "system"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a" * 900}, "512"),
        ({"messages": [USER]}, "messages"),
    ],
)
def test_what_a_prompt_cannot_have_is_refused(
    client: httpx.Client, changes: dict[str, Any], named: str
) -> None:
    # Half a surrogate pair passes as JSON's escape only.
    content = json.dumps(generate(**changes)).encode()
    response = client.post("/api/generate", content=content)
    assert response.status_code == 400, response.text
    assert named in response.json()["error"]


def test_num_ctx_is_refused_with_both_numbers(client: httpx.Client) -> None:
    told = refusal(client, "/api/chat", chat(options={"num_ctx": 4096}))
    assert "4,096" in told
    assert "512" in told


def test_the_operators_limit_is_told_by_the_clients_name(int8_bundle: Path) -> None:
    config = ServerConfig(port=0, max_tokens=4)
    with running({"tiny": int8_bundle}, config) as server, server.client() as client:
        assert "options.num_predict" in refusal(client, "/api/chat", chat())
        answer = ask(client, "/api/chat", {**chat(), "options": {}})
        assert (answer["eval_count"], answer["done_reason"]) == (4, "length")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", chat(model="no")),
        ("/api/chat", chat(model="no", messages=[])),
        ("/api/chat", chat(model="no", messages=[], keep_alive=0)),
        ("/api/generate", generate(model="no")),
        ("/api/embed", {"model": "no", "input": "x"}),
        ("/api/embeddings", {"model": "no", "prompt": "x"}),
        ("/api/show", {"model": "no"}),
    ],
)
def test_an_unknown_model(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert "'no'" in refusal(client, path, body, 404)


def test_an_answer_that_breaks_off_ends_with_an_error(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: Answers) -> Any:
        yield 0, await anext(self._streams[0])
        raise PocketlmError("The disk is gone.")

    monkeypatch.setattr(Answers, "__aiter__", broken)
    response = client.post("/api/chat", json={**chat(), "stream": True})
    assert json.loads(response.text.splitlines()[-1]) == {"error": "The disk is gone."}


def test_models_come_and_go(int8_bundle: Path) -> None:
    def names(path: str) -> list[str]:
        return [each["name"] for each in client.get(path).json()["models"]]

    def kept() -> str | None:
        [model] = client.get("/api/ps").json()["models"]
        return model["expires_at"]

    with running({"tiny": int8_bundle}) as server, server.client() as client:
        assert (names("/api/tags"), names("/api/ps")) == (["tiny"], [])
        loaded = ask(client, "/api/generate", {"model": "tiny:latest", "keep_alive": "10m"})
        assert (loaded["done_reason"], loaded["response"], loaded["model"]) == ("load", "", "tiny")
        assert loaded["load_duration"] > 1
        assert names("/api/ps") == ["tiny"]
        left_s = datetime.fromisoformat(kept() or "").timestamp() - time.time()
        assert 500 < left_s <= 600

        assert ask(client, "/api/chat", chat(model="tiny:int8", keep_alive=-1))["model"] == "tiny"
        assert kept() is None
        ask(client, "/api/embed", {"model": "tiny", "input": "x", "keep_alive": "1h30m"})
        assert kept() is not None

        unloaded = ask(client, "/api/chat", {"model": "tiny", "messages": [], "keep_alive": "0"})
        assert (unloaded["done_reason"], unloaded["message"]["content"]) == ("unload", "")
        assert names("/api/ps") == []

        ask(client, "/api/generate", generate(keep_alive=0))
        deadline = time.monotonic() + PATIENCE_S
        while names("/api/ps") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert names("/api/ps") == []


def test_tags_and_ps(server: Running, client: httpx.Client, int8_bundle: Path) -> None:
    manifest = read_manifest(int8_bundle)
    tiny, tools = client.get("/api/tags").json()["models"]
    assert (tiny["name"], tiny["model"], tiny["size"]) == ("tiny", "tiny", manifest.bytes)
    assert re.fullmatch("[0-9a-f]{64}", tiny["digest"])
    assert tiny["digest"] != tools["digest"]
    assert datetime.fromisoformat(tiny["modified_at"]).tzinfo is not None
    assert tiny["details"]["family"] == "llama"
    assert (tiny["details"]["format"], tiny["details"]["quantization_level"]) == ("onnx", "int8")

    ask(client, "/api/generate", {"model": "tiny"})
    loaded = {each["name"]: each for each in client.get("/api/ps").json()["models"]}["tiny"]
    assert loaded["digest"] == tiny["digest"]
    assert loaded["size"] == server.service.store.get("tiny").memory.most_bytes
    assert (loaded["context_length"], loaded["size_vram"]) == (512, 0)
    assert (loaded["running"], loaded["waiting"]) == (0, 0)


def test_show_needs_no_loaded_model(int8_bundle: Path, tools_bundle: Path) -> None:
    with running({"tiny": int8_bundle, "tiny-tools": tools_bundle}) as server, server.client() as client:
        plain = ask(client, "/api/show", {"model": "tiny:latest", "verbose": True})
        tools = ask(client, "/api/show", {"model": "tiny-tools"})
        assert client.get("/api/ps").json() == {"models": []}
    assert plain["capabilities"] == ["completion", "embedding"]
    assert tools["capabilities"] == ["completion", "tools", "embedding"]
    assert "tools" in tools["template"]
    info = plain["model_info"]
    assert (info["general.architecture"], info["llama.context_length"]) == ("llama", 512)
    assert (info["llama.block_count"], info["llama.embedding_length"]) == (2, 64)
    assert plain["modelfile"].startswith("FROM tiny\n")
    assert "num_ctx" in plain["parameters"]


def test_parameters_are_counted(int8_bundle: Path) -> None:
    manifest = read_manifest(int8_bundle)
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96
    norms = (2 * 2 + 1) * 64
    assert manifest.parameters == 2 * layer + 2 * VOCABULARY * 64 + norms  # its head is a matrix of its own
    assert [_readable(n) for n in (7, 88_456, 134_500_000, 1_100_048_384)] == ["7", "88K", "134M", "1.1B"]


def test_times() -> None:
    assert timestamp(0.5) == "1970-01-01T00:00:00.500000Z"
    assert (nanoseconds(1.5), nanoseconds(0)) == (1_500_000_000, 1)


def test_embeddings(client: httpx.Client) -> None:
    answer = ask(client, "/api/embed", {"model": "tiny", "input": ["One", "Two"], "truncate": True})
    first, second = answer["embeddings"]
    assert len(first) == 64
    assert first != second
    assert sum(value**2 for value in first) == pytest.approx(1, abs=1e-5)
    assert answer["prompt_eval_count"] == 6
    assert answer["total_duration"] >= answer["load_duration"] > 0
    alone = ask(client, "/api/embed", {"model": "tiny", "input": "One", "dimensions": 64})
    assert alone["embeddings"] == [first]
    assert ask(client, "/api/embeddings", {"model": "tiny", "prompt": "Two"}) == {"embedding": second}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"input": "a" * 600, "truncate": True}, "512"),
        ({"input": "a" * 600}, "600"),
        ({"input": []}, "input"),
        ({"input": ["x", ""]}, "input"),
        ({"input": [1]}, "input"),
        ({"input": ["x"] * 300}, "input"),
        ({"dimensions": 32}, "dimensions"),
        ({"options": {"num_ctx": 600}}, "options.num_ctx"),
    ],
)
def test_what_cannot_be_embedded(client: httpx.Client, changes: dict[str, Any], named: str) -> None:
    assert named in refusal(client, "/api/embed", {"model": "tiny", "input": "x", **changes})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/pull"),
        ("POST", "/api/push"),
        ("POST", "/api/create"),
        ("POST", "/api/copy"),
        ("DELETE", "/api/delete"),
        ("POST", "/api/blobs/sha256:00"),
    ],
)
def test_models_are_not_changed_from_afar(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path, content=b'{"model": "x"}')
    assert response.status_code == 403
    assert "pocketlm pull" in response.json()["error"]


def test_a_blob_is_not_there(client: httpx.Client) -> None:
    assert client.head("/api/blobs/sha256:00").status_code == 403


def test_the_version(client: httpx.Client) -> None:
    assert re.match(r"\d+\.\d+", client.get("/api/version").json()["version"])
