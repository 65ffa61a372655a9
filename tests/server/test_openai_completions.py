"""`/v1/completions`, and pocketlm's own benchmark as a client of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import pocketlm
from helpers.serving import PATIENCE_S, Running
from helpers.tiny import letters, only
from pocketlm.energy import Reading
from pocketlm.server.errors import ApiError
from pocketlm.server.openai.usage import finish_reason, together
from pocketlm_benchmarks.engines.openai_server import Manner, OpenAIServer
from pocketlm_benchmarks.engines.protocol import EngineSpec, Query

PATH = "/v1/completions"
LETTERS = {str(token_id): max(bias, -100) for token_id, bias in only(letters()).items()}


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"prompt": "Once", "max_tokens": 6, **body})
    assert response.status_code == 200, response.text
    return response.json()


def chunks(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = client.post(PATH, json={"prompt": "Once", "max_tokens": 6, "stream": True, **body})
    assert response.status_code == 200, response.text
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_text_is_continued_raw(client: httpx.Client, int8_bundle: Path) -> None:
    with pocketlm.load(int8_bundle, threads=1) as model:
        expected = model.generate("Once", raw=True, max_tokens=6).text
        ids = model.tokenizer.encode("Once")
    answer = ask(client)
    assert answer["object"] == "text_completion"
    assert answer["choices"][0] == {
        "index": 0,
        "text": expected,
        "logprobs": None,
        "finish_reason": "length",
    }
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["timings"]["predicted_n"] == 6
    assert ask(client, prompt=ids)["choices"] == answer["choices"]
    neutral = {"suffix": "", "best_of": 1, "user": "u"}
    assert ask(client, **neutral)["choices"] == answer["choices"]


def test_each_prompt_has_answers_of_its_own(client: httpx.Client) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 3, "logit_bias": LETTERS, "ignore_eos": True}
    answer = ask(client, prompt=["one", "two"], n=2, **settings)
    texts = [choice["text"] for choice in answer["choices"]]
    alone = [ask(client, prompt=prompt, n=2, **settings) for prompt in ("one", "two")]
    assert texts == [choice["text"] for each in alone for choice in each["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 24
    assert answer["usage"]["prompt_tokens"] == sum(each["usage"]["prompt_tokens"] for each in alone)
    assert answer["usage"]["energy"]["energy_j"] is not None
    assert all("timings" in choice for choice in answer["choices"])

    streamed = chunks(client, prompt=["one", "two"], n=2, stream_options={"include_usage": True}, **settings)
    parts = [choice for chunk in streamed for choice in chunk["choices"]]
    assert texts == ["".join(each["text"] for each in parts if each["index"] == index) for index in range(4)]
    assert [each["finish_reason"] for each in parts[-4:]] == ["length"] * 4
    assert streamed[-1]["usage"]["completion_tokens"] == 24


def test_lists_of_ids(client: httpx.Client) -> None:
    choices = ask(client, prompt=[[1, 2], [3]])["choices"]
    assert choices[1]["text"] == ask(client, prompt=[3])["choices"][0]["text"]


@pytest.mark.parametrize(("prompt", "text"), [("Once", "Once"), ([35, 36], "DE")])
def test_echo(client: httpx.Client, prompt: Any, text: str) -> None:
    settings = {"prompt": prompt, "logit_bias": LETTERS, "ignore_eos": True}
    plain = ask(client, **settings)["choices"][0]["text"]
    assert ask(client, echo=True, **settings)["choices"][0]["text"] == text + plain
    streamed = chunks(client, echo=True, **settings)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text + plain


def test_logprobs(client: httpx.Client) -> None:
    settings: dict[str, Any] = {"logprobs": 2, "logit_bias": LETTERS, "ignore_eos": True}
    choice = ask(client, **settings)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == list(range(6))
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob <= 0
        assert 2 <= len(top) <= 3
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks(client, **settings)]
    assert [each["text_offset"] for each in streamed if each] == [[offset] for offset in range(6)]
    assert [each["tokens"][0] for each in streamed if each] == logprobs["tokens"]


def test_tokens_that_are_no_text_are_told_apart(client: httpx.Client) -> None:
    tokens = ask(client, logprobs=0, ignore_eos=True, max_tokens=40)["choices"][0]["logprobs"]["tokens"]
    assert any(token.startswith("bytes:\\x") for token in tokens)
    assert "\ufffd" not in tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [10**400]}, "prompt.0"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": [[1]] * 2049}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt.1"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 2}, "n"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"messages": []}, "messages"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_what_is_wrong_is_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = client.post(PATH, json={"prompt": "Once", "max_tokens": 2, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_refused_prompt_ends_those_before_it(server: Running, client: httpx.Client) -> None:
    response = client.post(PATH, json={"prompt": ["Once", "x" * 600], "ignore_eos": True})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    deadline = time.monotonic() + PATIENCE_S
    while any(state.running or state.waiting for state in server.service.store.states()):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_an_answer_that_the_server_breaks_off_has_no_reason(int8_bundle: Path) -> None:
    with pocketlm.load(int8_bundle, threads=1) as model:
        stream = model.stream("Once", ignore_eos=True)
        stream.close()
        with pytest.raises(ApiError, match="shutting down") as ended:
            finish_reason(stream.completion)
    assert ended.value.status == 503


def test_energy_of_several_prompts_is_added() -> None:
    def reading(energy_j: float | None, *flags: str) -> Reading:
        reason = "no counter" if energy_j is None else None
        return Reading("rapl", "package", "measured", 2.0, energy_j, flags=flags, reason=reason)

    whole = together([reading(1.0, "share"), reading(2.0, "share", "short")])
    assert (whole.energy_j, whole.low_j, whole.flags) == (3.0, None, ("share", "short"))
    missing = together([reading(1.0), reading(None)])
    assert (missing.energy_j, missing.reason) == (None, "no counter")


def test_the_benchmark_measures_this_server(server: Running) -> None:
    engine = OpenAIServer(EngineSpec("server", f"{server.url}/v1#tiny", 1, 512))
    assert engine._manner == Manner(ids=True, extras=True)
    (trace,) = engine.answer([Query((5, 6, 7, 8), 20)])
    assert (trace.prompt_tokens, trace.cached_tokens, trace.new_tokens) == (4, 0, 20)
    assert len(trace.gaps_s) == 19  # a chunk a token
