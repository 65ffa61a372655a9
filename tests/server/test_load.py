"""Many clients at once: whole and right answers up to the queue's bound, an orderly refusal beyond it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.processes import wait_for
from helpers.serving import PATIENCE_S, Running, running
from helpers.steps import Steps
from pocketlm.server.config import ServerConfig

CLIENTS = 64
CONCURRENCY, QUEUE = 8, 64
TOO_MANY = 90
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def crowded(int8_bundle: Path) -> Iterator[Running]:
    with running(
        {"tiny": int8_bundle}, ServerConfig(port=0), concurrency=CONCURRENCY, queue_limit=QUEUE
    ) as server:
        yield server


def question(number: int) -> dict[str, Any]:
    content = f"Question {number}: what is {number} + {number * number}?"
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "ignore_eos": True}


async def streamed(client: httpx.AsyncClient, number: int) -> str:
    """The whole answer to a question, or an error's code."""
    body = {**question(number), "stream": True}
    async with client.stream("POST", CHAT, json=body) as answer:
        if answer.status_code != 200:
            error = json.loads(await answer.aread())["error"]
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert error["type"] == "overloaded_error"
            assert error.keys() == {"message", "type", "param", "code"}
            return f"error: {error['code']}"
        lines = [line async for line in answer.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def all_at_once(
    server: Running, numbers: range, when_some_are_done: tuple[int, Callable[[], None]] = (0, lambda: None)
) -> list[str]:
    """The answers to these questions. Something may be done once so many of them are there."""

    async def run() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=server.url, timeout=PATIENCE_S, verify=False, limits=limits
        ) as client:
            asking = [asyncio.create_task(streamed(client, number)) for number in numbers]
            count, act = when_some_are_done
            while sum(each.done() for each in asking) < count:
                await asyncio.sleep(0.01)
            act()
            return await asyncio.gather(*asking)

    return asyncio.run(run())


def await_idle(server: Running) -> None:
    """Waits until no request, no use of the model and no slot of its memory is taken."""
    wait_for(lambda: all(not each.running and not each.waiting for each in server.service.store.states()))
    entry = server.service.store._entry("tiny")
    wait_for(lambda: entry.users == 0)
    assert entry.model is not None
    taken = entry.model.model._scheduler.call(lambda pool: set(pool.slots.caches) - set(pool._idle))
    assert taken.result(PATIENCE_S) == set()


@pytest.fixture(scope="module")
def alone(crowded: Running) -> list[str]:
    """What one client gets, question by question."""
    with crowded.client() as client:
        answers = [client.post(CHAT, json=question(number)).json() for number in range(TOO_MANY)]
    return [answer["choices"][0]["message"]["content"] for answer in answers]


def test_each_of_many_clients_gets_what_one_alone_gets(crowded: Running, alone: list[str]) -> None:
    assert len(set(alone)) > TOO_MANY // 2
    assert all_at_once(crowded, range(CLIENTS)) == alone[:CLIENTS]
    await_idle(crowded)


def test_beyond_the_queue_clients_are_told_to_come_again(
    crowded: Running, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    refused = TOO_MANY - CONCURRENCY - QUEUE
    try:
        answers = all_at_once(crowded, range(TOO_MANY), (refused, steps.free))
    finally:
        steps.free()
    assert answers.count("error: queue_full") == refused
    assert all(got in (right, "error: queue_full") for got, right in zip(answers, alone, strict=True))
    await_idle(crowded)
    assert all_at_once(crowded, range(4)) == alone[:4]


def test_small_answers_are_sent_at_once(crowded: Running) -> None:
    with crowded.client() as client:
        client.get("/v1/models")
        (connection,) = crowded.server.server_state.connections
        own = connection.transport.get_extra_info("socket")
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
